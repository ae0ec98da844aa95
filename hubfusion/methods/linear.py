"""Methods that are a sum of the deltas, each times a number."""

from __future__ import annotations

from collections.abc import Sequence

from hubfusion.methods.kinds import Array, share


def weighted_sum(deltas: Array, factors: Sequence[float]) -> Array:
    """Return Σ f_i δ_i, added in the order given; ``deltas`` (k, *shape), ``factors`` k numbers.

    Equal factors are applied once, after the sum: one rounding instead of k.
    """
    if len(set(factors)) > 1 or len(factors) == 1:
        total = deltas[0, ...] * factors[0]
        for row in range(1, len(factors)):
            total += deltas[row, ...] * factors[row]
        return total
    total = deltas[0, ...] + deltas[1, ...]
    for row in range(2, len(factors)):
        total += deltas[row, ...]
    if factors[0] != 1.0:
        total *= factors[0]
    return total


def average(deltas: Array, coefficients: Sequence[float]) -> Array:
    """Weighted mean of the deltas: ColD Fusion's own method, and the default.

    δ = Σ α_i δ_i / Σ α_i

    Paper: ColD Fusion, arXiv 2212.01378 (uniform α). Departures: the paper averages parameters, this averages
    deltas to the base; the two are the same number, but deltas are small, so their float32 sum loses nothing that the
    rounding of the result would show. ``coefficients`` must have a positive sum; raises `RecipeError` otherwise.

    >>> import numpy as np
    >>> average(np.asarray([[1.0, 0.0], [5.0, 2.0]]), [1, 3]).tolist()
    [4.0, 1.5]
    """
    if len(set(coefficients)) == 1:
        share(coefficients, "average")
        total = weighted_sum(deltas, [1.0] * len(coefficients))
        total /= len(coefficients)
        return total
    return weighted_sum(deltas, share(coefficients, "average"))


def task_arithmetic(deltas: Array, coefficients: Sequence[float]) -> Array:
    """Sum of task vectors, each times its coefficient.

    δ = Σ α_i δ_i

    Paper: Editing Models with Task Arithmetic, arXiv 2212.04089; its λ is the recipe's ``scale`` (0.3 to 0.5 is
    typical; 1/k gives the mean). Departures: none. Negative coefficients forget a task.

    >>> import numpy as np
    >>> task_arithmetic(np.asarray([[1.0, 0.0], [5.0, 2.0]]), [1, -1]).tolist()
    [-4.0, -2.0]
    """
    return weighted_sum(deltas, [float(c) for c in coefficients])
