"""Fuse finetunes into a base: the formulas (`hubfusion.fuse.methods`), the engine that streams them, its recipes."""

from __future__ import annotations

from hubfusion.fuse.engine import Fused, FusedInput, FuseProgress, Settings, fuse
from hubfusion.fuse.methods import METHODS

__all__ = ["METHODS", "Fused", "FusedInput", "FuseProgress", "Settings", "fuse"]
