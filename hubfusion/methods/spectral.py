"""Methods on the singular values of matrices: Iso-C and TSV-M. Parameters that are not matrices are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import array_api_compat
import numpy as np

from hubfusion.methods.kinds import Array, namespace, share, to_numpy
from hubfusion.methods.linear import weighted_sum


def iso_c(deltas: Array, coefficients: Sequence[float]) -> Array:
    """Iso-C: add the deltas of each matrix, then give every singular direction the same length.

    U Σ Vᵀ = Σ α_i τ_i;  δ = mean(Σ) U Vᵀ  (parameters that are not matrices: Σ α_i τ_i / Σ α_i)

    Paper: No Task Left Behind, arXiv 2502.04959 (its α is the recipe's ``scale``, 1.5 for 8 tasks). Departures:
    directions with no length at all (below rounding) stay without, since they are not determined; the mean is over
    the others. Needs a whole parameter and float64 work memory of three of them.

    >>> iso_c(np.asarray([[[3.0, 0.0], [0.0, 1.0]]]), [1]).round(6).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """
    if deltas.ndim != 3:
        return weighted_sum(deltas, share(coefficients, "iso_c"))
    left, values, right = _svd(weighted_sum(deltas, [float(c) for c in coefficients]))
    if not values.size:
        return deltas[0, ...] * 0
    return _like(deltas, (left * values.mean()) @ right)


def tsv(deltas: Array, coefficients: Sequence[float]) -> Array:
    """TSV-M: keep each task's leading singular directions, make them orthogonal between tasks, and add.

    U_i Σ_i V_iᵀ = α_i τ_i, the leading ⌊r / k⌋ (at least one) directions of r = min(rows, columns);
    U = [U_1 … U_k], V likewise, each replaced by its nearest orthogonal matrix; δ = U diag(Σ_1 … Σ_k) Vᵀ
    (parameters that are not matrices: Σ α_i τ_i / Σ α_i)

    Paper: Task Singular Vectors, arXiv 2412.00081. Departures: directions with no length are left out. With one
    input it returns that input's delta. Needs whole parameters, as `iso_c`.

    >>> tsv(np.asarray([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 3.0]]]), [1, 1]).round(6).tolist()
    [[2.0, 0.0], [0.0, 3.0]]
    """
    if deltas.ndim != 3:
        return weighted_sum(deltas, share(coefficients, "tsv"))
    rows = deltas.shape[0]
    rank = max(1, min(deltas.shape[1:]) // rows)
    lefts, values, rights = [], [], []
    for row, coefficient in enumerate(coefficients):
        left, value, right = _svd(deltas[row, ...] * float(coefficient))
        lefts.append(left[:, :rank])
        values.append(value[:rank])
        rights.append(right[:rank].T)
    lengths = np.concatenate(values)
    if not lengths.size:
        return deltas[0, ...] * 0
    left, right = _orthogonal(np.concatenate(lefts, axis=1)), _orthogonal(np.concatenate(rights, axis=1))
    return _like(deltas, (left * lengths) @ right.T)


def _svd(matrix: Array) -> tuple[Any, Any, Any]:
    """Thin SVD in float64 without the directions below rounding."""
    left, values, right = np.linalg.svd(to_numpy(matrix).astype(np.float64), full_matrices=False)
    floor = np.finfo(np.float32).eps * max(matrix.shape) * (values[0] if values.size else 0.0)
    rank = int((values > floor).sum())
    return left[:, :rank], values[:rank], right[:rank]


def _orthogonal(columns: Any) -> Any:
    """Nearest matrix with orthonormal columns (or rows, when it is wide): U Vᵀ of its SVD."""
    left, _, right = np.linalg.svd(columns, full_matrices=False)
    return left @ right


def _like(deltas: Array, values: Any) -> Array:
    xp = namespace(deltas)
    return xp.asarray(np.ascontiguousarray(values), dtype=deltas.dtype, device=array_api_compat.device(deltas))
