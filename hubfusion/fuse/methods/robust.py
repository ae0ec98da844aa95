"""Robust methods: a few bad updates must not move the result far.

Benign contributions to ColD Fusion are nearly orthogonal and differ up to 46-fold in norm. Each method here can
therefore treat the norms first: "clip" shortens every delta to at most the median norm, "equal" scales every delta to
it, "keep" leaves them. Raw Krum or a raw median would discard the long updates, which are useful.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hubfusion.errors import RecipeError
from hubfusion.fuse.methods.geometry import gram_of
from hubfusion.fuse.methods.kinds import Array, in_range, namespace, norm_factors, share
from hubfusion.fuse.methods.linear import weighted_sum

SMOOTHING, MAX_STEPS = 1e-6, 1000


def _treated(deltas: Array, norm: str, norms: Sequence[float] | None) -> Array:
    if norm == "keep":
        return deltas
    norms = np.sqrt(np.diag(gram_of(deltas))).tolist() if norms is None else norms
    xp = namespace(deltas)
    factors = norm_factors(norms, norm)
    return xp.stack([deltas[i, ...] * f for i, f in enumerate(factors)])


def sorted_rows(rows: Sequence[Array]) -> list[Array]:
    """Sort k arrays entry by entry: Batcher's odd-even merge sort, only minima and maxima of whole rows."""
    xp, out, count = namespace(rows[0]), list(rows), len(rows)
    p = 1
    while p < count:
        k = p
        while k >= 1:
            for j in range(k % p, count - k, 2 * k):
                for i in range(min(k, count - j - k)):
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p):
                        low, high = out[i + j], out[i + j + k]
                        out[i + j], out[i + j + k] = xp.minimum(low, high), xp.maximum(low, high)
            k //= 2
        p *= 2
    return out


def _uniform(where: str, coefficients: Sequence[float]) -> None:
    if len(set(coefficients)) != 1 or coefficients[0] <= 0:
        raise RecipeError(f"{where}: coefficients must be equal and positive, got {list(coefficients)}")


def trimmed_mean(
    deltas: Array,
    coefficients: Sequence[float],
    *,
    trim: float = 0.2,
    norm: str = "clip",
    norms: Sequence[float] | None = None,
) -> Array:
    """Trimmed mean: entry by entry, drop the smallest and largest int(trim · k) values, average the rest.

    δ = (τ_(c+1) + … + τ_(k−c)) / (k − 2c), c = int(trim · k), τ_(1) ≤ … ≤ τ_(k) the sorted values of an entry

    Paper: Byzantine-Robust Distributed Learning (Yin et al.), arXiv 1803.01498. Departures: the norm treatment before
    it (``norm="keep"`` is the paper's); trim · k is rounded down. ``norms`` (k,) are over the whole model. Trim in
    [0, 0.5); coefficients must be equal.

    >>> trimmed_mean(np.asarray([[1.0], [2.0], [3.0], [90.0]]), [1] * 4, trim=0.25, norm="keep").tolist()
    [2.5]
    """
    in_range("trimmed_mean", "trim", trim, 0, 0.5, open_high=True)
    _uniform("trimmed_mean", coefficients)
    deltas = _treated(deltas, norm, norms)
    rows = deltas.shape[0]
    cut = int(trim * rows)
    inner = sorted_rows([deltas[i, ...] for i in range(rows)])[cut : rows - cut]
    total = inner[0] * 1.0
    for row in inner[1:]:
        total += row
    total /= len(inner)
    return total


def median(
    deltas: Array, coefficients: Sequence[float], *, norm: str = "clip", norms: Sequence[float] | None = None
) -> Array:
    """Coordinate-wise median: entry by entry, the middle value, or the mean of the two middle ones.

    δ = (τ_(⌊(k+1)/2⌋) + τ_(⌈(k+1)/2⌉)) / 2, τ_(1) ≤ … ≤ τ_(k) the sorted values of an entry

    Paper: arXiv 1803.01498. Departures: the norm treatment before it. The median of sparse, nearly disjoint updates
    is close to zero. Coefficients must be equal.

    >>> median(np.asarray([[1.0], [2.0], [90.0]]), [1, 1, 1], norm="keep").tolist()
    [2.0]
    """
    _uniform("median", coefficients)
    deltas = _treated(deltas, norm, norms)
    rows = deltas.shape[0]
    ordered = sorted_rows([deltas[i, ...] for i in range(rows)])
    return (ordered[(rows - 1) // 2] + ordered[rows // 2]) / 2


def geometric_median(
    deltas: Array, coefficients: Sequence[float], *, norm: str = "clip", gram: Any | None = None
) -> Array:
    """Geometric median (RFA): the point with the least weighted sum of distances to the deltas, over the model.

    δ = argmin_z Σ α_i |z − τ_i|, by the smoothed Weiszfeld iteration β_i ∝ α_i / max(ν m, |z − τ_i|), z = Σ β_i τ_i

    Paper: Robust Aggregation for Federated Learning (Pillutla et al.), arXiv 1912.13445. Departures: the norm
    treatment before it; iterated until β settles (the paper stops after 3 steps); ν = 1e-6 is relative to the median
    norm m. ``gram`` (k, k) is over the whole model. Coefficients must have a positive sum.

    >>> geometric_median(np.asarray([[0.0], [0.0], [9.0]]), [1, 1, 1], norm="keep").round(3).tolist()
    [0.0]
    """
    alphas = np.asarray(share(coefficients, "geometric_median"))
    gram = gram_of(deltas) if gram is None else gram
    factors = np.asarray(norm_factors(np.sqrt(np.diag(gram)).tolist(), norm))
    gram = gram * np.outer(factors, factors)
    floor = SMOOTHING * float(np.median(np.sqrt(np.diag(gram)))) or SMOOTHING
    betas = alphas
    for _ in range(MAX_STEPS):
        squares = np.diag(gram) - 2 * gram @ betas + betas @ gram @ betas
        pulls = alphas / np.maximum(np.sqrt(np.maximum(squares, 0.0)), floor)
        before, betas = betas, pulls / pulls.sum()
        if np.abs(betas - before).max() < 1e-12:
            break
    return weighted_sum(deltas, (betas * factors).tolist())


def multi_krum(
    deltas: Array,
    coefficients: Sequence[float],
    *,
    faulty: int = 1,
    keep: int = 0,
    norm: str = "equal",
    gram: Any | None = None,
) -> Array:
    """Multi-Krum: average the inputs whose nearest neighbors are nearest, over the whole model.

    score_i = Σ of the k − f − 2 smallest |τ_i − τ_j|², j ≠ i; δ = Σ α_i τ_i / Σ α_i over the ``keep`` smallest scores

    Paper: Machine Learning with Adversaries (Blanchard et al.), arXiv 1703.02757; keep = 1 is Krum. Departures: the
    norm treatment before it, "equal" by default (distances of raw updates only see their length); ``keep`` 0 means
    k − f. Equal scores: the earlier input in canonical order. Needs k ≥ f + 3 and 0 ≤ f; the paper's guarantee
    needs k ≥ 2 f + 3.

    >>> multi_krum(np.asarray([[1.0], [1.2], [1.1], [-5.0]]), [1] * 4, norm="keep").round(3).tolist()
    [1.1]
    """
    rows = len(coefficients)
    chosen = krum_choice(gram_of(deltas) if gram is None else gram, faulty, keep, norm)
    norms = np.sqrt(np.diag(gram_of(deltas) if gram is None else gram)).tolist()
    factors = norm_factors(norms, norm)
    shares = share([coefficients[i] for i in chosen], "multi_krum")
    weights = [0.0] * rows
    for index, one in zip(chosen, shares, strict=True):
        weights[index] = one * factors[index]
    return weighted_sum(deltas, weights)


def krum_choice(gram: Any, faulty: int, keep: int, norm: str) -> list[int]:
    """Indices, ascending, of the inputs that `multi_krum` averages."""
    rows = len(gram)
    if faulty < 0 or rows < faulty + 3:
        raise RecipeError(f"multi_krum: faulty must be in [0, {rows - 3}] with {rows} inputs, got {faulty}")
    if not 0 <= keep <= rows:
        raise RecipeError(f"multi_krum: keep must be in [0, {rows}], got {keep}")
    factors = np.asarray(norm_factors(np.sqrt(np.diag(gram)).tolist(), norm))
    gram = gram * np.outer(factors, factors)
    squares = np.maximum(np.diag(gram)[:, None] - 2 * gram + np.diag(gram), 0.0)
    scores = [math.fsum(sorted(np.delete(squares[i], i))[: rows - faulty - 2]) for i in range(rows)]
    return sorted(sorted(range(rows), key=lambda i: (scores[i], i))[: keep or rows - faulty])
