"""Detect copied, shifted, impossible and implausible values in a published table of scores.

The checks need no models. A score on n test examples is a multiple of 1/n, so two test sets of coprime sizes cannot
give the same number, and a number that is no such multiple was not measured on that test set. Most models score close
to others of their architecture on most datasets, so a row that fits the others much better when its values are moved by
one column has been shifted. Model Recycling's table has 136 such rows.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from hubfusion.errors import EvaluationError

Array = np.ndarray[Any, np.dtype[np.float64]]

FEWEST_ROWS = 5  # a band needs neighbors
IMPLAUSIBLE_POINTS, IMPLAUSIBLE_SCALES = 8.0, 6.0
FLOOR_POINTS = 0.5  # no dataset is steadier between models than this
FAR = 10.0  # one wild value must not outvote the others
FITS, BETTER = 2.0, 0.5  # mean distance that counts as fitting, and how much smaller it must have become


class FindingKind(StrEnum):
    """What is wrong with a row."""

    SHIFTED = "shifted"
    COPIED = "copied"
    OFF_GRID = "off-grid"
    IMPLAUSIBLE = "implausible"
    REPEATED = "repeated"
    INCOMPLETE = "incomplete"


@dataclass(frozen=True, slots=True)
class Table:
    """Scores as published: one row a model, percent, nan where empty; ``digits`` after the point of a percentage."""

    models: tuple[str, ...]
    groups: tuple[str, ...]
    datasets: tuple[str, ...]
    values: Array
    digits: int


@dataclass(frozen=True, slots=True)
class Realignment:
    """From ``start`` to ``end`` each value belongs one column to the right; the value of ``start`` is lost.

    ``before`` and ``after`` are mean distances from the architecture's median, in robust standard deviations.
    """

    start: str
    end: str
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong with one row (counted from 0, the header not included)."""

    row: int
    model: str
    kind: FindingKind
    datasets: tuple[str, ...]
    detail: str
    realignment: Realignment | None = None


def read_table(path: Path, datasets: Sequence[str] = (), group: str = "base_model") -> Table:
    """Read a CSV whose first text column names the models.

    ``datasets`` are the columns that hold scores if the file has them, in the file's order; otherwise every numeric
    column within [0, 100] is one. Fractions become percentages when no value is above 1. ``group`` is the column
    of architectures (one group if there is none).
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EvaluationError(f"{path}: not a CSV file: {error}") from None
    if not rows:
        raise EvaluationError(f"{path}: no rows")
    columns = [c for c in rows[0] if c in datasets] or [c for c in rows[0] if _is_score(rows, c)]
    if len(columns) < 2:
        raise EvaluationError(f"{path}: at least 2 columns of scores are needed, got {len(columns)}")
    name = next((c for c in ("model_name", "model", "name") if c in rows[0]), next(iter(rows[0])))
    values = np.array([[_number(r[c]) for c in columns] for r in rows])
    longest = max(len((r[c] or "").partition(".")[2]) for r in rows for c in columns)
    if not np.nanmax(values) > 1:
        values, longest = 100 * values, longest - 2
    groups = tuple((r.get(group) or "all") for r in rows)
    return Table(tuple(r[name] for r in rows), groups, tuple(columns), values, max(0, longest))


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _is_score(rows: Sequence[Mapping[str, str]], column: str) -> bool:
    found = [_number(r[column]) for r in rows if r[column]]
    return bool(column) and bool(found) and all(0 <= v <= 100 for v in found)


def audit(table: Table, sizes: Mapping[str, int] | None = None) -> list[Finding]:
    """Everything found wrong, row by row. ``sizes``: test examples of those datasets that report a share of them."""
    sizes = sizes or {}
    findings: list[Finding] = []
    seen: dict[str, int] = {}
    bands = {g: _band(table, g) for g in set(table.groups)}
    for row, model in enumerate(table.models):
        values = table.values[row]
        if model in seen:
            findings.append(Finding(row, model, FindingKind.REPEATED, (), f"is also row {seen[model]}"))
        seen.setdefault(model, row)
        present = ~np.isnan(values)
        if not present.any():
            continue
        if missing := [d for d, p in zip(table.datasets, present, strict=True) if not p]:
            findings.append(
                Finding(row, model, FindingKind.INCOMPLETE, tuple(missing), f"{len(missing)} scores are missing")
            )
        findings += _copies(table, row, sizes, bands[table.groups[row]])
        findings += _off_grid(table, row, sizes)
        findings += _implausible(table, row, bands[table.groups[row]])
    return findings


def _band(table: Table, group: str) -> tuple[Array, Array] | None:
    """Median and robust standard deviation of each dataset over the group's complete rows, percent and points."""
    rows = table.values[[g == group for g in table.groups]]
    rows = rows[~np.isnan(rows).any(axis=1)]
    if len(rows) < FEWEST_ROWS:
        return None
    median = np.median(rows, axis=0)
    return median, np.maximum(1.4826 * np.median(np.abs(rows - median), axis=0), FLOOR_POINTS)


def _copies(table: Table, row: int, sizes: Mapping[str, int], band: tuple[Array, Array] | None) -> list[Finding]:
    """Equal values of two datasets that cannot be equal by chance; a shift if the two are neighbors."""
    values, names, model = table.values[row], table.datasets, table.models[row]
    by_value: dict[float, list[int]] = {}
    for column, value in enumerate(values.tolist()):
        if not math.isnan(value):
            by_value.setdefault(value, []).append(column)
    findings = []
    for same in by_value.values():
        pairs = [
            (i, j)
            for k, i in enumerate(same)
            for j in same[k + 1 :]
            if _is_copy(table, i, j, values[i], sizes) or (j == i + 1 and _is_far(values, (i, j), band))
        ]
        for i, j in pairs:
            if j == i + 1:
                realignment = _realign(table, values, j, band)
                how = (
                    f"fits when moved right from {realignment.start}: {realignment.before:.1f} to "
                    f"{realignment.after:.1f} standard deviations from its architecture's median"
                    if realignment
                    else "no single shift makes it fit"
                )
                detail = f"{names[i]} and its neighbor {names[j]} are both {values[i]:.4f}; {how}"
                findings.append(Finding(row, model, FindingKind.SHIFTED, (names[i], names[j]), detail, realignment))
            else:
                detail = f"{names[i]} and {names[j]} are both {values[i]:.4f}"
                findings.append(Finding(row, model, FindingKind.COPIED, (names[i], names[j]), detail))
    return findings


def _is_copy(table: Table, i: int, j: int, value: float, sizes: Mapping[str, int]) -> bool:
    """Whether two equal values are no coincidence: no common share of both test sets, or many equal digits."""
    a, b = sizes.get(table.datasets[i]), sizes.get(table.datasets[j])
    if table.digits < 4:
        return False
    if a is None or b is None:
        return abs(value * 10 - round(value * 10)) > 1e-6  # 55.0 happens; 56.3380281690 does not
    return not _on_grid(value, math.gcd(a, b), table.digits)


def _is_far(values: Array, columns: tuple[int, int], band: tuple[Array, Array] | None) -> bool:
    """Whether one of the columns is implausible, so that its being equal to the other is no coincidence either."""
    return band is not None and any(_far(values, band)[c] for c in columns)


def _far(values: Array, band: tuple[Array, Array]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    distance = np.abs(values - band[0])
    return (distance > IMPLAUSIBLE_POINTS) & (distance > IMPLAUSIBLE_SCALES * band[1])


def _on_grid(value: float, size: int, digits: int) -> bool:
    """Whether a percentage printed with ``digits`` can be k out of ``size``."""
    k = round(value * size / 100)
    return abs(value - 100 * k / size) <= 0.51 * 10.0**-digits + 1e-9


def _off_grid(table: Table, row: int, sizes: Mapping[str, int]) -> list[Finding]:
    """Datasets whose value is no share of their test examples; silent where rounding hides it."""
    off = [
        name
        for name, value in zip(table.datasets, table.values[row].tolist(), strict=True)
        if name in sizes
        and not math.isnan(value)
        and 10.0**-table.digits * sizes[name] < 10
        and not _on_grid(value, sizes[name], table.digits)
    ]
    if not off:
        return []
    first = off[0]
    detail = f"{len(off)} values are no share of their test set, e.g. {first} of {sizes[first]}"
    return [Finding(row, table.models[row], FindingKind.OFF_GRID, tuple(off), detail)]


def _implausible(table: Table, row: int, band: tuple[Array, Array] | None) -> list[Finding]:
    if band is None:
        return []
    median, scale = band
    distance, far = np.abs(table.values[row] - median), _far(table.values[row], band)
    names = tuple(n for n, f in zip(table.datasets, far.tolist(), strict=True) if f)
    if not names:
        return []
    worst = int(np.nanargmax(np.where(far, distance / scale, -1)))
    detail = f"{table.datasets[worst]} is {table.values[row, worst]:.2f}, others of its kind {median[worst]:.2f}"
    return [Finding(row, table.models[row], FindingKind.IMPLAUSIBLE, names, detail)]


def move_right(values: Array, start: int, end: int) -> Array:
    """The row with the values of columns start … end-1 in start+1 … end; ``start`` becomes nan.

    >>> move_right(np.array([1.0, 2.0, 3.0, 3.0, 9.0]), 1, 3).tolist()
    [1.0, nan, 2.0, 3.0, 9.0]
    """
    moved = values.copy()
    moved[start + 1 : end + 1] = values[start:end]
    moved[start] = math.nan
    return moved


def _distance(values: Array, band: tuple[Array, Array]) -> float:
    return float(np.nanmean(np.minimum(np.abs(values - band[0]) / band[1], FAR)))


def _realign(table: Table, values: Array, end: int, band: tuple[Array, Array] | None) -> Realignment | None:
    """The start column whose shift fits best, if it fits at all and much better than the row as printed."""
    if band is None:
        return None
    before = _distance(values, band)
    after, start = min((_distance(move_right(values, s, end), band), s) for s in range(end))
    if after > FITS or after > BETTER * before:
        return None
    return Realignment(table.datasets[start], table.datasets[end], before, after)
