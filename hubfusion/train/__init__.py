"""Finetune one checkpoint on one dataset: `Training` is the recipe, `hubfusion.train.finetune` follows it."""

from __future__ import annotations

from hubfusion.train.recipe import Encoding, Mode, Precision, Training

__all__ = ["Encoding", "Mode", "Precision", "Training"]
