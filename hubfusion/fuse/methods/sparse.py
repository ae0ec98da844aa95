"""Methods that keep some entries of every delta: TIES, DARE, DELLA, Breadcrumbs, SCE.

``elect`` is shared: TIES is four different functions in four libraries, so each choice is an option here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import array_api_compat
import numpy as np

from hubfusion.errors import RecipeError
from hubfusion.fuse.methods.draws import LEVELS, draw_rows
from hubfusion.fuse.methods.kinds import Array, in_range, namespace, one_of
from hubfusion.fuse.methods.linear import weighted_sum

SIGNS = ("mass", "count")
COMBINES = ("mean", "sum")
SCOPES = ("model", "parameter")


def kept_count(density: float, entries: int) -> int:
    """Entries that a density keeps: the nearest whole number, at least one.

    >>> kept_count(0.2, 12), kept_count(0.001, 10)
    (2, 1)
    """
    return min(entries, max(1, round(density * entries)))


def ties(
    deltas: Array,
    coefficients: Sequence[float],
    *,
    density: float = 0.2,
    scope: str = "model",
    sign: str = "mass",
    combine: str = "mean",
    thresholds: Sequence[float] | None = None,
) -> Array:
    """TIES: trim each delta to its largest entries, elect a sign, merge the entries that agree with it.

    τ̂_i = τ_i where |τ_i| ≥ the kept_count(density)-th largest |τ_i|, else 0
    γ = sign(Σ α_i τ̂_i)  (``sign="count"``: sign(Σ sign(α_i τ̂_i)))
    δ = Σ_{i: sign(α_i τ̂_i) = γ} α_i τ̂_i / Σ_{the same i} |α_i|  (``combine="sum"``: not divided)

    Paper: TIES-Merging, arXiv 2306.01708 (density 0.2, disjoint mean, λ = 1, the trim over the whole model: scope
    "model"; "parameter" trims each parameter alone, as mergekit does). Departures: entries equal to the threshold are
    all kept (the authors' code keeps one entry too many, which is different); a vote that is exactly zero gives 0
    (the authors give it the model's majority sign); coefficients are ours, 1 each in the paper. ``thresholds`` (k,)
    come from a first pass over the model; without them ``deltas`` are taken as all there is. Density in (0, 1].

    >>> ties(np.asarray([[3.0, 1.0, -5.0], [4.0, 9.0, 6.0]]), [1, 1], density=2 / 3).tolist()
    [3.0, 9.0, 6.0]
    """
    in_range("ties", "density", density, 0, 1, open_low=True)
    one_of("ties", "scope", scope, SCOPES)
    if thresholds is None:
        thresholds = largest(deltas, kept_count(density, math.prod(deltas.shape[1:])))
    trimmed = (delta * (abs(delta) >= float(t)) for delta, t in zip(deltas, thresholds, strict=True))
    return elect("ties", trimmed, coefficients, sign, combine)


def elect(where: str, deltas: Iterable[Array], coefficients: Sequence[float], sign: str, combine: str) -> Array:
    """Elect a sign for each entry and merge the deltas that agree with it; ``deltas`` may be overwritten.

    Zeros do not vote and are not counted. See `ties` for the formula.
    """
    one_of(where, "sign", sign, SIGNS)
    one_of(where, "combine", combine, COMBINES)
    equal = len(set(coefficients)) == 1 and coefficients[0] > 0
    up: Array = None
    lead: Array = 0
    for delta, coefficient in zip(deltas, coefficients, strict=True):
        if coefficient != 1.0:
            delta *= float(coefficient)
        if up is None:
            zeros = namespace(delta).zeros_like(delta)
        rise = namespace(delta).maximum(delta, zeros)  # an array, as numpy takes three times as long with a number
        delta -= rise
        rises, falls = rise > 0, delta < 0
        if sign == "count":
            xp = namespace(rises)
            lead = xp.astype(rises, xp.int16) - xp.astype(falls, xp.int16) + lead
        weight = None if equal else abs(float(coefficient))
        rises, falls = (_votes(v, weight, len(coefficients), delta.dtype) for v in (rises, falls))
        if up is None:
            up, down, for_up, for_down = rise, delta, rises, falls
        else:
            up += rise
            down += delta
            for_up += rises
            for_down += falls
    total = up + down if sign == "mass" else lead
    if combine == "mean":
        unit = float(coefficients[0]) if equal else 1.0
        up /= _positive(for_up, unit, up.dtype)
        down /= _positive(for_down, unit, up.dtype)
    up *= total > 0
    down *= total < 0
    up += down
    return up


def _votes(votes: Array, weight: float | None, inputs: int, dtype: Any) -> Array:
    """Votes as weights: whole numbers when all inputs weigh the same (a byte each if that will do), else floats."""
    xp = namespace(votes)
    if weight is None:
        return xp.astype(votes, xp.uint8 if inputs < 256 else xp.int16)
    return xp.astype(votes, dtype) * weight


def _positive(weights: Array, unit: float, dtype: Any) -> Array:
    """Weights as divisors: 1 where nobody voted (the sum is 0 there)."""
    xp = namespace(weights)
    return xp.astype(weights + (weights == 0), dtype) * unit


def largest(deltas: Array, count: int) -> list[float]:
    """Return each row's ``count``-th largest absolute value; ``deltas`` (k, *shape)."""
    xp = namespace(deltas)
    flat = xp.sort(xp.reshape(xp.abs(deltas), (deltas.shape[0], -1)), axis=-1)
    return [float(row[-count]) for row in flat]


def _thin(where: str, deltas: Array, density: float, seed: int, draws: Array | None) -> Iterable[Array]:
    """Keep each entry with probability ``density`` and divide it by that: DARE's drop and rescale."""
    in_range(where, "density", density, 0, 1, open_low=True)
    limit = max(1, round(density * LEVELS))
    for delta, drawn in zip(deltas, _drawn(deltas, seed) if draws is None else draws, strict=True):
        kept = delta * (drawn < limit)
        kept *= LEVELS / limit
        yield kept


def _drawn(deltas: Array, seed: int) -> Iterator[Array]:
    """Draws for deltas that are all there is."""
    for row in draw_rows(seed, deltas.shape[0], "", 0, tuple(deltas.shape[1:])):
        yield namespace(deltas).asarray(row.astype(np.int32))


def dare(
    deltas: Array,
    coefficients: Sequence[float],
    *,
    density: float = 0.5,
    seed: int = 0,
    draws: Iterable[Array] | None = None,
) -> Array:
    """DARE: drop entries of each delta at random, rescale the rest, and add them as task arithmetic does.

    δ = Σ α_i m_i ∘ τ_i / density, m_i ~ Bernoulli(density)

    Paper: Language Models are Super Mario, arXiv 2311.03099 (its drop rate p is 1 − density). Departures: density is
    rounded to a multiple of 2^-16; masks come from the seed, the input's place in canonical order, the parameter's
    name and the entry, so a recipe gives the same bytes everywhere. Not mergekit's rescaling, which matches the L1
    norm. ``draws`` are whole numbers in 0 ... 65535, of the shape of
    a delta for each. Density in (0, 1].

    >>> dare(np.asarray([[1.0, 2.0], [3.0, 4.0]]), [1, 1], density=1.0).tolist()
    [4.0, 6.0]
    """
    return _sum(_thin("dare", deltas, density, seed, draws), coefficients)


def _sum(deltas: Iterable[Array], coefficients: Sequence[float]) -> Array:
    total: Array = None
    for delta, coefficient in zip(deltas, coefficients, strict=True):
        if coefficient != 1.0:
            delta *= float(coefficient)
        total = delta if total is None else _add(total, delta)
    return total


def _add(total: Array, delta: Array) -> Array:
    total += delta
    return total


def dare_ties(
    deltas: Array,
    coefficients: Sequence[float],
    *,
    density: float = 0.5,
    sign: str = "mass",
    combine: str = "mean",
    seed: int = 0,
    draws: Iterable[Array] | None = None,
) -> Array:
    """DARE's drop and rescale in place of TIES's trim, then TIES's election and merge.

    τ̂_i = m_i ∘ τ_i / density, m_i ~ Bernoulli(density); then as `ties`

    Paper: arXiv 2311.03099 with arXiv 2306.01708. Departures: those of `dare` and `ties`.

    >>> dare_ties(np.asarray([[3.0, -1.0], [1.0, 5.0]]), [1, 1], density=1.0).tolist()
    [2.0, 5.0]
    """
    return elect("dare_ties", _thin("dare_ties", deltas, density, seed, draws), coefficients, sign, combine)


def della(
    deltas: Array,
    coefficients: Sequence[float],
    *,
    density: float = 0.5,
    epsilon: float = 0.1,
    sign: str = "mass",
    combine: str = "mean",
    seed: int = 0,
    draws: Iterable[Array] | None = None,
) -> Array:
    """DELLA: drop entries at random, small ones more often, rescale the rest, then TIES's election and merge.

    In each row of n entries, r = 0 (smallest |τ|) ... n−1: keep probability p_r = density − ε/2 + ε (r + ½) / n
    τ̂_i = m_i ∘ τ_i / p_r, m_i ~ Bernoulli(p_r); then as `ties`

    Paper: DELLA-Merging (MagPrune), arXiv 2406.11617. Departures: the ½ makes the mean keep probability exactly
    ``density``; p_r is rounded to a multiple of 2^-16 (at least one); magnitudes are ranked by their first 9
    significant bits, equal ones by position (four times as fast as an exact sort, and p_r of neighbors differs by
    ε / n only); a row's draws belong to its ranks, not to its entries; a row is the last axis, a parameter of one axis
    is one row.
    Density in (0, 1] and 0 ≤ ε ≤ 2 min(density, 1 − density).

    >>> della(np.asarray([[3.0, -1.0], [1.0, 5.0]]), [1, 1], density=1.0, epsilon=0.0).tolist()
    [2.0, 5.0]
    """
    in_range("della", "density", density, 0, 1, open_low=True)
    in_range("della", "epsilon", epsilon, 0, 2 * min(density, 1 - density))

    def thinned() -> Iterator[Array]:
        last: Array = None
        for delta, drawn in zip(deltas, _drawn(deltas, seed) if draws is None else draws, strict=True):
            if last is None:
                last, factors = _chances(delta, density, epsilon, isinstance(drawn, np.ndarray))
            xp = namespace(delta)
            values = xp.astype(xp.reshape(drawn, (-1, last.shape[0])) <= last, delta.dtype)
            values *= factors
            kept = by_rank(abs(delta), values)
            kept *= delta
            yield kept

    return elect("della", thinned(), coefficients, sign, combine)


def _chances(delta: Array, density: float, epsilon: float, is_numpy: bool) -> tuple[Array, Array]:
    """For each rank in a row: the last draw that keeps an entry, and what the entry is then multiplied by."""
    columns = delta.shape[-1] if delta.ndim else 1
    steps = (np.arange(columns) + 0.5) / columns
    limits = np.clip(np.round((density - epsilon / 2 + epsilon * steps) * LEVELS), 1, LEVELS)
    xp, device = namespace(delta), array_api_compat.device(delta)
    last = xp.asarray((limits - 1).astype(np.uint16 if is_numpy else np.int32), device=device)
    return last, xp.asarray(LEVELS / limits, dtype=delta.dtype, device=device)


def by_rank(magnitudes: Array, values: Array) -> Array:
    """Give each entry the value of its rank in its row; ``values`` (rows, columns), rank 0 is the smallest.

    Numbers are compared by the first 16 bits of their float32 (9 significant bits); equal ones rank by position.
    """
    xp = namespace(magnitudes)
    count, columns = values.shape
    rows = xp.astype(xp.reshape(magnitudes, values.shape), xp.float32)
    if not isinstance(rows, np.ndarray):
        ranks = xp.argsort(xp.argsort(rows.view(xp.int32) >> 15, axis=-1, stable=True), axis=-1, stable=True)
        ranks += xp.arange(count, device=rows.device)[:, None] * columns
        return xp.reshape(xp.take(xp.reshape(values, (-1,)), xp.reshape(ranks, (-1,))), magnitudes.shape)
    keys = (rows.view(np.uint32) >> np.uint32(15)).astype(np.uint16)
    order = np.argsort(keys, axis=-1, kind="stable")  # 16 bits: numpy has a radix sort for them
    order += (np.arange(count) * columns)[:, None]
    placed = np.empty(values.size, values.dtype)
    placed[order.reshape(-1)] = values.reshape(-1)
    return placed.reshape(magnitudes.shape)


def breadcrumbs(
    deltas: Array,
    coefficients: Sequence[float],
    *,
    density: float = 0.9,
    gamma: float = 0.01,
    bands: Sequence[Sequence[float]] | None = None,
) -> Array:
    """Model Breadcrumbs: drop the largest outliers and the small entries of each delta, add the rest.

    Of n entries of a parameter, the round(γ n) largest |τ_i| are dropped, the next kept_count(density, n) kept, the
    rest dropped; δ = Σ α_i τ̂_i

    Paper: Model Breadcrumbs, arXiv 2312.06795 (layer-wise masks; its β is 1 − density − γ). Departures: entries equal
    to a kept boundary are kept. ``bands`` (k, 2) are the smallest and largest kept |τ|. Density in (0, 1 − γ], γ in
    [0, 1).

    >>> breadcrumbs(np.asarray([[9.0, 1.0, 3.0, 2.0]]), [1], density=0.5, gamma=0.25).tolist()
    [0.0, 0.0, 3.0, 2.0]
    """
    check_band(density, gamma)
    if bands is None:
        entries = math.prod(deltas.shape[1:])
        first, last = band_ranks(density, gamma, entries)
        bands = list(zip(largest(deltas, last), largest(deltas, first), strict=True))
    kept = (
        delta * ((abs(delta) >= float(low)) & (abs(delta) <= float(high)))
        for delta, (low, high) in zip(deltas, bands, strict=True)
    )
    return _sum(kept, coefficients)


def check_band(density: float, gamma: float) -> None:
    """Refuse a density and an outlier share that do not fit together."""
    in_range("breadcrumbs", "gamma", gamma, 0, 1, open_high=True)
    in_range("breadcrumbs", "density", density, 0, 1 - gamma, open_low=True)


def band_ranks(density: float, gamma: float, entries: int) -> tuple[int, int]:
    """Ranks (1 is the largest) of the largest and the smallest kept entry.

    >>> band_ranks(0.5, 0.25, 4)
    (2, 3)
    """
    first = min(round(gamma * entries), entries - 1) + 1
    return first, min(entries, first + kept_count(density, entries) - 1)


def sce(
    deltas: Array,
    coefficients: Sequence[float],
    *,
    density: float = 0.1,
    combine: str = "mean",
    threshold: float | None = None,
    energies: Sequence[float] | None = None,
) -> Array:
    """SCE: select the entries that vary most between inputs, calculate shares from their energy, erase minorities.

    S = the kept_count(density, n) entries of a parameter with the largest variance over the k deltas
    η_i = α_i Σ_S τ_i² / Σ_j α_j Σ_S τ_j²;  γ = sign(Σ_i τ_i)
    δ = Σ_{i: sign(τ_i) = γ} η_i τ_i / Σ_{the same i} η_i on S, 0 elsewhere  (``combine="sum"``: not divided)

    Paper: FuseChat, arXiv 2408.07990; the division by the shares that are left is its authors' code's. Departures:
    entries equal to the smallest selected variance are all selected; a vote that is exactly zero gives 0; α is ours,
    1 each in the paper. ``threshold`` (that variance) and ``energies`` (k sums over S) come from passes over the
    whole parameter. Density in (0, 1]; coefficients ≥ 0.

    >>> sce(np.asarray([[1.0, 2.0], [1.0, -1.0]]), [1, 1], density=0.5).tolist()
    [0.0, 2.0]
    """
    in_range("sce", "density", density, 0, 1, open_low=True)
    one_of("sce", "combine", combine, COMBINES)
    if min(float(c) for c in coefficients) < 0:
        raise RecipeError(f"sce: coefficients must not be negative, got {list(coefficients)}")
    xp = namespace(deltas)
    flat = xp.reshape(deltas, (deltas.shape[0], -1))
    spread = variance(flat)
    if threshold is None:
        threshold = float(xp.sort(spread)[-kept_count(density, spread.shape[0])])
    (chosen,) = xp.nonzero(spread >= threshold)
    picked = xp.take(flat, chosen, axis=1)
    if energies is None:
        energies = [float(xp.sum(delta**2)) for delta in picked]
    shares = [float(c) * float(e) for c, e in zip(coefficients, energies, strict=True)]
    total = math.fsum(shares)
    vote = weighted_sum(picked, [1.0] * len(shares))
    rises, falls = vote > 0, vote < 0
    merged, left = vote * 0, vote * 0
    for delta, one in zip(picked, shares, strict=True):
        kept = xp.astype(((delta > 0) & rises) | ((delta < 0) & falls), deltas.dtype)
        kept *= one / total if total else 0.0
        left += kept
        kept *= delta
        merged += kept
    if combine == "mean":
        left += left == 0  # nobody agrees: the sum is 0 there
        merged /= left
    out = spread * 0
    out[chosen] = merged
    return xp.reshape(out, deltas.shape[1:])


def variance(deltas: Array) -> Array:
    """Variance of each entry over the k deltas, divided by k."""
    rows = deltas.shape[0]
    mean = weighted_sum(deltas, [1.0] * rows)
    mean /= rows
    total: Array = None
    for row in range(rows):
        off = deltas[row, ...] - mean
        off *= off
        total = off if total is None else _add(total, off)
    total /= rows
    return total
