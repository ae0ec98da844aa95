"""How one model is finetuned: a frozen recipe (`Training`), the same for contributors and for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from hubfusion.errors import EvaluationError


class Mode(StrEnum):
    """Which parameters learn: all of them, the head alone, or the head and the biases of BitFit (mini)."""

    FULL = "full"
    HEAD = "head"
    BITFIT = "bitfit"


class Encoding(StrEnum):
    """How text becomes tokens: the tokenizer's own pair encoding, or Model Recycling's ``a <SEP> b<name``."""

    PAIR = "pair"
    RECYCLING = "recycling"


class Precision(StrEnum):
    """Arithmetic of the forward pass; parameters and optimizer state are float32 in both."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True, slots=True)
class Training:
    """One finetune. The defaults are the recipe of ColD Fusion (App. B) and Model Recycling (faq.md, code).

    ``warmup`` is the share of steps with rising learning rate (0.0006 as printed in both; "0.6 %" in Where to start?);
    then it falls linearly to 0. ``validate_every`` and ``patience`` count training examples: training stops when the
    validation metric (0-1) did not rise by ``epsilon`` within ``patience`` examples. ``max_length`` is in tokens.
    """

    learning_rate: float = 5e-5
    batch_size: int = 256
    epochs: int = 10
    warmup: float = 0.0006
    weight_decay: float = 0.01
    max_length: int = 250
    validate_every: int = 50 * 256
    patience: int = 20 * 50 * 256
    epsilon: float = 0.001
    clip_norm: float = 1.0
    mode: Mode = Mode.FULL
    encoding: Encoding = Encoding.PAIR
    precision: Precision = Precision.FLOAT32
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values no training could follow."""
        for name in ("learning_rate", "batch_size", "epochs", "max_length", "validate_every", "clip_norm"):
            if not getattr(self, name) > 0:
                raise EvaluationError(f"training: {name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise EvaluationError(f"training: warmup must be a share in [0, 1), got {self.warmup}")
        if self.weight_decay < 0 or self.patience < 0:
            raise EvaluationError("training: weight_decay and patience must not be negative")
