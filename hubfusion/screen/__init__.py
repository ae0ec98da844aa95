"""Which finetunes may be fused: from cards and headers (`screen`), then from the weights themselves (`examine`)."""

from __future__ import annotations

from hubfusion.screen.policy import Policy
from hubfusion.screen.rules import Base, apply_caps, path_problem, read_base, screen
from hubfusion.screen.soundness import Bounds, Measure, SoundnessReport, examine

__all__ = [
    "Base",
    "Bounds",
    "Measure",
    "Policy",
    "SoundnessReport",
    "apply_caps",
    "examine",
    "path_problem",
    "read_base",
    "screen",
]
