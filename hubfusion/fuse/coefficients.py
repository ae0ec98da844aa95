"""Rules that compute coefficients from what is known about contributions; the recipe stores the numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import numpy as np

from hubfusion.checkpoint.deltas import open_models
from hubfusion.errors import RecipeError
from hubfusion.fuse.first_pass import grams


class CoefficientRule(StrEnum):
    """How contributions are weighed against each other."""

    UNIFORM = "uniform"
    EXAMPLES = "examples"
    INVERSE_NORM = "inverse-norm"


def uniform(inputs: int) -> tuple[float, ...]:
    """One for each input, as in ColD Fusion."""
    return (1.0,) * inputs


def by_examples(examples: Sequence[int | None]) -> tuple[float, ...]:
    """Each input's number of training examples, as federated averaging does (arXiv 1602.05629).

    Raises `RecipeError` when one is unknown or not positive.

    >>> by_examples([100, 300])
    (100.0, 300.0)
    """
    for position, count in enumerate(examples):
        if count is None or count <= 0:
            raise RecipeError(f"coefficients by examples: input {position} declares {count}, at least 1 is needed")
    return tuple(float(count) for count in examples if count is not None)


def by_inverse_norm(norms: Sequence[float]) -> tuple[float, ...]:
    """Median norm over each input's norm, to 6 digits: every input pulls equally far.

    An input that does not differ from the base gets 1: its delta is zero whatever it is.

    >>> by_inverse_norm([0.5, 1.0, 4.0])
    (2.0, 1.0, 0.25)
    """
    longer = [n for n in norms if n > 0 and math.isfinite(n)]
    middle = float(np.median(longer)) if longer else 1.0
    return tuple(float(f"{middle / n:.6g}") if n > 0 else 1.0 for n in norms)


def delta_norms(base: Path, inputs: Sequence[Path]) -> tuple[float, ...]:
    """L2 norm of each input's delta over the parameters that all share, in one pass."""
    with open_models(base, inputs) as models:
        squares = np.sum([np.diag(gram)[1:] for gram in grams(models, models.workers(None)).values()], axis=0)
    return tuple(np.sqrt(squares).tolist())
