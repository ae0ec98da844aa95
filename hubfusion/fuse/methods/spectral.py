"""Methods on the singular values of matrices: Iso-C and TSV-M. Parameters that are not matrices are averaged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import array_api_compat
import numpy as np

from hubfusion.fuse.methods.kinds import Array, namespace, share, to_numpy
from hubfusion.fuse.methods.linear import weighted_sum


def iso_c(deltas: Array, coefficients: Sequence[float]) -> Array:
    """Iso-C: add the deltas of each matrix, then give every singular direction the same length.

    U Σ Vᵀ = Σ α_i τ_i;  δ = mean(Σ) U Vᵀ  (parameters that are not matrices: Σ α_i τ_i / Σ α_i)

    Paper: No Task Left Behind, arXiv 2502.04959 (its α is the recipe's ``scale``, 1.5 for 8 tasks). Departures:
    directions with no length at all (below rounding) stay without, since they are not determined; the mean is over
    the others. Embeddings are matrices like any other (the paper fuses image encoders, which have none). Memory: the
    largest matrix, about eight times in float32's size for its decomposition, whatever the number of inputs.

    >>> iso_c(np.asarray([[[3.0, 0.0], [0.0, 1.0]]]), [1]).round(6).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """
    first, rows = _first(deltas)
    if first.ndim != 2:
        return weighted_sum(rows, share(coefficients, "iso_c"))
    total = weighted_sum(rows, [float(c) for c in coefficients])
    if not _is_finite(total):
        return total * math.nan
    left, values, right = _svd(total)
    if not values.size:
        return total * 0
    left *= values.mean()
    return _like(total, left @ right)


def tsv(deltas: Array, coefficients: Sequence[float]) -> Array:
    """TSV-M: keep each task's leading singular directions, make them orthogonal between tasks, and add.

    U_i Σ_i V_iᵀ = α_i τ_i, the leading ⌊r / k⌋ (at least one) directions of r = min(rows, columns);
    U = [U_1 … U_k], V likewise, each replaced by its nearest orthogonal matrix; δ = U diag(Σ_1 … Σ_k) Vᵀ
    (parameters that are not matrices: Σ α_i τ_i / Σ α_i)

    Paper: Task Singular Vectors, arXiv 2412.00081. Departures: directions with no length are left out. With one
    input it returns that input's delta. Memory: as `iso_c`, and the directions kept, which are one matrix in all.

    >>> tsv(np.asarray([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 3.0]]]), [1, 1]).round(6).tolist()
    [[2.0, 0.0], [0.0, 3.0]]
    """
    first, rows = _first(deltas)
    if first.ndim != 2:
        return weighted_sum(rows, share(coefficients, "tsv"))
    rank = max(1, min(first.shape) // len(coefficients))
    lefts, values, rights = [], [], []
    for delta, coefficient in zip(rows, coefficients, strict=True):
        if not _is_finite(delta):
            return delta * math.nan
        left, value, right = _svd(delta * float(coefficient))
        lefts.append(left[:, :rank].copy())  # the rest is not kept in memory
        values.append(value[:rank])
        rights.append(right[:rank].T.copy())
    lengths = np.concatenate(values)
    if not lengths.size:
        return first * 0
    left, right = _orthogonal(np.concatenate(lefts, axis=1)), _orthogonal(np.concatenate(rights, axis=1))
    left *= lengths
    return _like(first, left @ right.T)


def _first(deltas: Iterable[Array]) -> tuple[Array, Iterable[Array]]:
    """The first delta, for its shape and kind, and all of them."""
    rows = iter(deltas)
    first = next(rows)
    return first, chain([first], rows)


def _is_finite(matrix: Array) -> bool:
    """Whether there is a decomposition; the caller knows the file to blame when there is none."""
    return bool(namespace(matrix).all(namespace(matrix).isfinite(matrix)))


def _svd(matrix: Array) -> tuple[Any, Any, Any]:
    """Thin SVD in float64 without the directions below rounding.

    Rounding every entry of a matrix of r singular values moves them by at most eps / 2 · √r of the largest; four
    times that leaves room for the roundings of the sum.
    """
    left, values, right = np.linalg.svd(to_numpy(matrix).astype(np.float64), full_matrices=False)
    floor = 2 * np.finfo(np.float32).eps * min(matrix.shape) ** 0.5 * (values[0] if values.size else 0.0)
    rank = int((values > floor).sum())
    return left[:, :rank], values[:rank], right[:rank]


def _orthogonal(columns: Any) -> Any:
    """Nearest matrix with orthonormal columns (or rows, when it is wide): U Vᵀ of its SVD."""
    left, _, right = np.linalg.svd(columns, full_matrices=False)
    return left @ right


def _like(delta: Array, values: Any) -> Array:
    xp = namespace(delta)
    return xp.asarray(np.ascontiguousarray(values), dtype=delta.dtype, device=array_api_compat.device(delta))
