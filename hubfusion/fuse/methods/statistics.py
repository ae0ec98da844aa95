"""Methods that weigh inputs by statistics of their data (Fisher merging, RegMean), published with each input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import array_api_compat
import numpy as np

from hubfusion.errors import RecipeError
from hubfusion.fuse.methods.kinds import Array, in_range, namespace, share, to_numpy
from hubfusion.fuse.methods.linear import weighted_sum


def fisher(deltas: Array, coefficients: Sequence[float], *, floor: float = 1e-6, fishers: Array | None = None) -> Array:
    """Fisher merging: entry by entry, each input counts by its diagonal Fisher information.

    δ = Σ α_i F_i τ_i / Σ α_i F_i, F_i = max(E[(∂ log p(y|x) / ∂θ)²], floor)

    Paper: Merging Models with Fisher-Weighted Averaging, arXiv 2111.09832. Departures: none (with the floor of the
    authors' code). ``fishers`` (k, *shape) are required: each input's ``fisher.safetensors``, see
    `hubfusion.contribute.statistics`. Floor > 0; coefficients ≥ 0 with a positive sum.

    >>> fisher(np.asarray([[1.0], [5.0]]), [1, 1], fishers=np.asarray([[3.0], [1.0]])).tolist()
    [2.0]
    """
    in_range("fisher", "floor", floor, 0, float("inf"), open_low=True)
    shares = share(coefficients, "fisher")
    if min(shares) < 0:
        raise RecipeError(f"fisher: coefficients must not be negative, got {list(coefficients)}")
    if fishers is None:
        raise RecipeError("fisher: every input needs its diagonal (fisher.safetensors), got none")
    above: Array = None
    below: Array = None
    for row, one in enumerate(shares):
        weight = fishers[row, ...] * 1.0
        weight = weight + (weight < floor) * (floor - weight)
        weight *= one
        part = deltas[row, ...] * weight
        above = part if above is None else above + part
        below = weight if below is None else below + weight
    return above / below


def regmean(
    deltas: Array,
    coefficients: Sequence[float],
    *,
    shrink: float = 0.9,
    activations: Iterable[Any] | None = None,
) -> Array:
    """RegMean: for linear layers, the least-squares fit to every input's outputs on its own data; others averaged.

    G_i = X_iᵀX_i with its off-diagonal entries times ``shrink``;  Δᵀ = (Σ α_i G_i)⁻¹ Σ α_i G_i τ_iᵀ

    Paper: Dataless Knowledge Fusion, arXiv 2212.09849 (shrink 0.9; 0.6 to 0.95 in use). Departures: written for
    deltas, which is the same because the base's part is common; where Σ α_i G_i is singular the least-norm solution
    is taken. ``activations`` are k matrices (d_in, d_in), from each input's ``regmean.safetensors``; None: this
    parameter (d_out, d_in) is averaged. Shrink in [0, 1]. Memory: one layer's sums in float64, whatever the number of
    inputs.

    >>> regmean(np.asarray([[[1.0]], [[5.0]]]), [1, 1], activations=[np.eye(1) * 3, np.eye(1)]).tolist()
    [[2.0]]
    """
    in_range("regmean", "shrink", shrink, 0, 1)
    shares = share(coefficients, "regmean")
    if activations is None:
        return weighted_sum(deltas, shares)
    left: Any = 0.0
    right: Any = 0.0
    for delta, one, gram in zip(deltas, shares, activations, strict=True):
        diagonal = np.array(np.diag(gram), np.float64)
        gram = np.array(gram, np.float64)
        gram *= one * shrink
        np.fill_diagonal(gram, one * diagonal)
        left += gram
        right += gram @ to_numpy(delta).astype(np.float64).T
    try:
        solved = np.linalg.solve(left, right)
    except np.linalg.LinAlgError:
        solved = np.linalg.lstsq(left, right)[0]
    xp = namespace(delta)
    return xp.asarray(np.ascontiguousarray(solved.T), dtype=delta.dtype, device=array_api_compat.device(delta))
