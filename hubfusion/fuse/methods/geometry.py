"""Methods that need only the inner products of the inputs: Model Stock, SLERP, Karcher mean.

The result is a sum of the inputs times numbers that come from the k × k Gram matrix, so one cheap pass finds the
numbers and a second one adds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hubfusion.errors import RecipeError
from hubfusion.fuse.methods.kinds import Array, one_of, share, to_numpy
from hubfusion.fuse.methods.linear import weighted_sum

SPACES = ("weights", "deltas")
TOLERANCE, MAX_STEPS, OPPOSITE = 1e-13, 200, 1e-6


def gram_of(deltas: Array) -> Any:
    """Inner products of the k deltas in float64: (k, k)."""
    rows = to_numpy(deltas).reshape(deltas.shape[0], -1).astype(np.float64)
    return rows @ rows.T


def model_stock(
    deltas: Array, coefficients: Sequence[float], *, scope: str = "parameter", gram: Any | None = None
) -> Array:
    """Model Stock: the mean delta, drawn back to the base by how much the inputs disagree in direction.

    cos = mean over i < j of ⟨τ_i, τ_j⟩ / (|τ_i| |τ_j|);  t = k cos / (1 + (k − 1) cos)
    δ = t Σ α_i τ_i / Σ α_i

    Paper: Model Stock, arXiv 2403.19522 (each parameter alone: scope "parameter"; "model" takes one t for all).
    Departures: t is kept in [0, 1], so inputs that point apart give the base; no floor under the norms, so small
    deltas are treated as large ones; a zero delta has cosine 0. Needs k ≥ 2. With the near-orthogonal inputs of
    different tasks t is small and the base hardly moves.

    >>> model_stock(np.asarray([[2.0, 0.0], [1.0, 3**0.5]]), [1, 1]).round(3).tolist()
    [1.0, 0.577]
    """
    one_of("model_stock", "scope", scope, ("parameter", "model"))
    rows = len(coefficients)
    if rows < 2:
        raise RecipeError(f"model_stock: at least 2 inputs are needed, got {rows}")
    gram = gram_of(deltas) if gram is None else gram
    norms = np.sqrt(np.diag(gram))
    safe = np.where(norms > 0, norms, 1.0)
    cosines = gram / safe[:, None] / safe
    cosine = float((cosines.sum() - np.trace(cosines)) / (rows * (rows - 1)))
    t = rows * cosine / (1 + (rows - 1) * cosine) if cosine > 0 else 0.0
    return weighted_sum(deltas, [min(t, 1.0) * c for c in share(coefficients, "model_stock")])


def slerp(
    deltas: Array,
    coefficients: Sequence[float],
    *,
    space: str = "weights",
    gram: Any | None = None,
    base: Array | None = None,
) -> Array:
    """SLERP: the point at t = α_2 / (α_1 + α_2) of the arc between two models, each parameter alone.

    θ = sin((1 − t) Ω) / sin Ω · θ_1 + sin(t Ω) / sin Ω · θ_2, Ω the angle between θ_1 and θ_2; δ = θ − θ_base

    Paper: Shoemake 1985 (Animating rotation with quaternion curves); common practice for models. ``space="deltas"``
    takes the arc between the deltas instead. Departures: mergekit turns to linear interpolation above |cos| = 0.9995,
    where all finetunes of one base lie; this is exact for every angle. Exactly opposite models (scalars of different
    sign) have no shortest arc: they are interpolated linearly, as a model that is zero is. Needs k = 2.
    ``gram`` (2, 2) and ``base`` are of the space; without ``base`` the deltas themselves are turned.

    >>> slerp(np.asarray([[1.0, 0.0], [0.0, 1.0]]), [1, 1]).round(4).tolist()
    [0.7071, 0.7071]
    """
    one_of("slerp", "space", space, SPACES)
    if len(coefficients) != 2:
        raise RecipeError(f"slerp: exactly 2 inputs are needed, got {len(coefficients)}")
    _, t = share(coefficients, "slerp")
    gram = _gram_in_space(deltas, base) if gram is None else gram
    if gram[0, 0] == 0 or gram[1, 1] == 0:
        return _combine(deltas, [1 - t, t], base)
    angle = _angle(gram / np.sqrt(np.outer(np.diag(gram), np.diag(gram))))
    if math.pi - angle < OPPOSITE:
        return _combine(deltas, [1 - t, t], base)
    return _combine(deltas, [(1 - t) * _sinc((1 - t) * angle, angle), t * _sinc(t * angle, angle)], base)


def _angle(unit: Any) -> float:
    """Angle of two unit vectors from their Gram matrix, accurate for small angles too."""
    between = max(0.0, unit[0, 0] + unit[1, 1] - 2 * unit[0, 1])
    return 2 * math.atan2(math.sqrt(between), math.sqrt(max(0.0, unit[0, 0] + unit[1, 1] + 2 * unit[0, 1])))


def _sinc(part: float, whole: float) -> float:
    """(sin part / part) / (sin whole / whole), 1 in the limit of small angles."""
    return float(np.sinc(part / math.pi) / np.sinc(whole / math.pi))


def karcher(
    deltas: Array,
    coefficients: Sequence[float],
    *,
    space: str = "weights",
    gram: Any | None = None,
    base: Array | None = None,
) -> Array:
    """Karcher mean: the weighted center of the models' directions on the sphere, each parameter alone.

    u_i = θ_i / |θ_i|; u is where Σ α_i log_u(u_i) = 0; θ = (Σ α_i |θ_i|) u with Σ α_i = 1; δ = θ − θ_base

    Paper: Karcher 1977 (Riemannian center of mass); common practice for models. ``space="deltas"`` takes the center
    of the deltas instead. Departures: iterated until the steps stop shrinking rather than for ten steps; models that
    are zero count for the length and not for the direction; where a model is exactly opposite to the center, which
    then does not exist, the weighted mean is taken. ``gram`` (k, k) and ``base`` are of the space, as in `slerp`.

    >>> karcher(np.asarray([[2.0, 0.0], [0.0, 4.0]]), [1, 1]).round(4).tolist()
    [2.1213, 2.1213]
    """
    one_of("karcher", "space", space, SPACES)
    shares = np.asarray(share(coefficients, "karcher"))
    gram = _gram_in_space(deltas, base) if gram is None else gram
    norms = np.sqrt(np.diag(gram))
    if not (norms > 0).any():
        return _combine(deltas, shares.tolist(), base)
    units = gram / np.outer(np.where(norms > 0, norms, 1.0), np.where(norms > 0, norms, 1.0))
    alphas = np.where(norms > 0, shares, 0.0)
    direction = _center(units, alphas / alphas.sum())
    if direction is None:
        return _combine(deltas, shares.tolist(), base)
    factors = float(shares @ norms) * direction / np.where(norms > 0, norms, 1.0)
    return _combine(deltas, factors.tolist(), base)


def _center(units: Any, alphas: Any) -> Any | None:
    """Karcher mean of unit vectors with Gram matrix ``units``, as coefficients of those vectors; None: no center."""
    point, last = alphas, math.inf
    for _ in range(MAX_STEPS):
        length = _length(units, point)
        if length < OPPOSITE:
            return None
        point = point / length
        cosines = np.clip(units @ point, -1.0, 1.0)
        angles = np.arccos(cosines)
        if (math.pi - angles[alphas > 0] < OPPOSITE).any():
            return None
        logs = alphas / np.sinc(angles / math.pi)
        step = logs - (logs @ cosines) * point
        size = _length(units, step)
        point = math.cos(size) * point + np.sinc(size / math.pi) * step
        if size < TOLERANCE or size >= last:
            break
        last = size
    return point / _length(units, point)


def _length(units: Any, point: Any) -> float:
    return math.sqrt(max(0.0, float(point @ units @ point)))


def _gram_in_space(deltas: Array, base: Array | None) -> Any:
    return gram_of(deltas if base is None else deltas + base)


def _combine(deltas: Array, factors: Sequence[float], base: Array | None) -> Array:
    """Σ f_i θ_i − base, from deltas: Σ f_i δ_i + (Σ f_i − 1) base."""
    total = weighted_sum(deltas, factors)
    if base is not None:
        total += base * (math.fsum(factors) - 1.0)
    return total
