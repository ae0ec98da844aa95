"""Methods that are a sum of the deltas, each times a number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from hubfusion.fuse.methods.kinds import Array, Sum, norm_factors, share, to_numpy


def sum_by(factors: Sequence[float]) -> Sum:
    """Σ f_i δ_i; equal factors are applied once, after the sum: one rounding instead of k."""
    if len(factors) > 1 and len(set(factors)) == 1:
        return Sum((1.0,) * len(factors), times=factors[0])
    return Sum(tuple(factors))


def weighted_sum(deltas: Iterable[Array], factors: Sequence[float]) -> Array:
    """Return Σ f_i δ_i, added in the order given; ``deltas`` are k arrays, each taken once, ``factors`` k numbers."""
    return sum_by(factors)(deltas)


def average(
    deltas: Array, coefficients: Sequence[float], *, norm: str = "keep", norms: Sequence[float] | None = None
) -> Array:
    """Weighted mean of the deltas: ColD Fusion's own method, and the default.

    δ = Σ α_i f_i τ_i / Σ α_i, f_i = 1

    Paper: ColD Fusion, arXiv 2212.01378 (uniform α). Departures: the paper averages parameters, this averages
    deltas to the base; the two are the same number, but deltas are small, so their float32 sum loses nothing that the
    rounding of the result would show. ``norm="clip"`` shortens deltas to at most the median norm before it (f_i =
    min(1, median / |τ_i|), the cheapest good defense against boosted updates), "equal" scales all to it. ``norms``
    (k,) are over the whole model. Coefficients must have a positive sum; raises `RecipeError` otherwise.

    >>> average(np.asarray([[1.0, 0.0], [5.0, 2.0]]), [1, 3]).tolist()
    [4.0, 1.5]
    """
    if norm != "keep":
        if norms is None:
            norms = [float(np.linalg.norm(to_numpy(delta).astype(float))) for delta in deltas]
        factors = norm_factors(norms, norm)
        shares = share(coefficients, "average")
        return weighted_sum(deltas, [s * f for s, f in zip(shares, factors, strict=True)])
    return _mean(coefficients)(deltas)


def average_sum(coefficients: Sequence[float], *, norm: str = "keep") -> Sum | None:
    """Return what `average` adds up, or None when the norms of all deltas must be known before."""
    return _mean(coefficients) if norm == "keep" else None


def _mean(coefficients: Sequence[float]) -> Sum:
    shares = share(coefficients, "average")
    if len(set(coefficients)) == 1:
        return Sum((1.0,) * len(coefficients), over=len(coefficients))
    return sum_by(shares)


def task_arithmetic(deltas: Array, coefficients: Sequence[float]) -> Array:
    """Sum of task vectors, each times its coefficient.

    δ = Σ α_i δ_i

    Paper: Editing Models with Task Arithmetic, arXiv 2212.04089; its λ is the recipe's ``scale`` (0.3 to 0.5 is
    typical; 1/k gives the mean). Departures: none. Negative coefficients forget a task.

    >>> task_arithmetic(np.asarray([[1.0, 0.0], [5.0, 2.0]]), [1, -1]).tolist()
    [-4.0, -2.0]
    """
    return task_arithmetic_sum(coefficients)(deltas)


def task_arithmetic_sum(coefficients: Sequence[float]) -> Sum:
    """Return what `task_arithmetic` adds up."""
    return sum_by([float(c) for c in coefficients])
