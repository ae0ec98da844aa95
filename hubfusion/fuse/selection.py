"""Find the n-th largest of very many numbers exactly, without sorting or holding all of them.

A sample gives a bracket around the wanted number. One pass counts the numbers above the bracket and keeps those inside;
a partition of these gives the answer. If the bracket missed, or holds too many, it is moved or narrowed and the pass is
repeated, so the answer is exact and memory is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hubfusion.checkpoint import Array

MAX_HELD = 3 << 20
SAMPLE, LARGEST_SAMPLE = 1 << 20, 2 << 20
SPREAD = 6.0

Stream = Callable[[int], Iterator[Array]]
Rows = Callable[[int], Iterator[tuple[Array, Array]]]


@dataclass(slots=True)
class _Bracket:
    """Of the numbers low ≤ x ≤ high, ``count`` in all, one in ``stride`` is held; ``above`` numbers are larger.

    ``energies`` (k,) are sums of squares of the rows that came with numbers larger than high, and with those inside
    when low = high; ``rows`` are those of the numbers held, while all are.
    """

    low: float
    high: float
    held: list[Array] = field(default_factory=list)
    rows: list[Array] = field(default_factory=list)
    energies: Any = 0.0
    count: int = 0
    above: int = 0
    stride: int = 1
    size: int = 0


def nth_largest(
    stream: Stream, entries: int, rank: int, dtype: type[np.floating[Any]] = np.float32, max_held: int | None = None
) -> float:
    """Return the ``rank``-th largest (1 is the largest) of ``entries`` non-negative finite numbers, exactly.

    ``stream(every)`` yields them in arrays of ``dtype`` that may be overwritten between steps, or about one in
    ``every`` of them when that is larger than 1; it is called again for each pass. At most ``max_held``
    (default `MAX_HELD`) are held.
    """

    def alone(every: int) -> Iterator[tuple[Array, Array]]:
        for part in stream(every):
            yield part, part[None][:0]

    return select(alone, entries, rank, dtype, max_held)[0]


def select(
    stream: Rows,
    entries: int,
    rank: int,
    dtype: type[np.floating[Any]] = np.float32,
    max_held: int | None = None,
    sample: int | None = None,
) -> tuple[float, list[float]]:
    """Return the ``rank``-th largest number as `nth_largest` does, and the energies of what comes with the largest.

    ``stream`` yields numbers (n,) with rows (k, n); the energies are k sums of squares, in float64, over the entries
    whose number is at least the one returned. About ``sample`` numbers (a million or two) are looked at first.
    """
    if not 1 <= rank <= entries:
        raise ValueError(f"rank must be in [1, {entries}], got {rank}")
    max_held = max_held or MAX_HELD
    sample = sample or min(LARGEST_SAMPLE, max(SAMPLE, entries // 256))
    known = (0.0, math.inf)
    low, high = known
    if entries > min(max_held, 4 * sample):
        every = max(2, entries // min(max_held, sample))
        looked = np.concatenate([part.copy() for part, _ in stream(every)])
        low, high = _narrow(looked, rank / entries, *known)
    while True:
        bracket = _count(stream, low, high, max_held)
        inside = rank - bracket.above
        if inside < 1:
            known = (float(np.nextafter(dtype(high), dtype(np.inf))), known[1])
            low, high = known
        elif inside > bracket.count:
            known = (known[0], float(np.nextafter(dtype(low), dtype(-np.inf))))
            low, high = known
        elif low == high:
            return low, bracket.energies.tolist()
        elif bracket.stride == 1:
            ordered = np.concatenate(bracket.held)
            ordered.partition(ordered.size - inside)
            value = float(ordered[ordered.size - inside])
            for held, rows in zip(bracket.held, bracket.rows, strict=True):
                bracket.energies += _energies(rows, held >= value)
            return value, bracket.energies.tolist()
        else:
            known = (low, high)
            low, high = _narrow(np.concatenate(bracket.held), inside / bracket.count, *known)


def _energies(rows: Array, chosen: Array) -> Array:
    """Sums of squares (k,) in float64 of the chosen columns of (k, n)."""
    if not len(rows):
        return np.zeros(0)
    picked = np.take(rows, np.flatnonzero(chosen), axis=1).astype(np.float64)
    picked *= picked
    sums: Array = picked.sum(axis=1)
    return sums


def _narrow(sample: Array, share: float, low: float, high: float) -> tuple[float, float]:
    """Bracket the number that has ``share`` of all above it, from a sample; never wider than (low, high).

    The sample is put in another order.
    """
    size = sample.size
    middle, slack = share * size, SPREAD * math.sqrt(size * share * (1 - share)) + 8
    first, last = math.floor(middle - slack), math.ceil(middle + slack)
    pivots = [min(size - 1, max(0, size - 1 - math.floor(p))) for p in (first, middle, last)]
    sample.partition(pivots)
    upper = float(sample[pivots[0]]) if first >= 0 else high
    lower = float(sample[pivots[2]]) if last < size else low
    if (lower, upper) != (low, high):
        return lower, upper
    # Very many equal numbers: ask for one of them alone. Whatever the answer, it leaves the known range.
    pivot = float(sample[pivots[1]])
    return pivot, pivot


def _count(stream: Rows, low: float, high: float, max_held: int) -> _Bracket:
    bracket = _Bracket(low, high)
    for part, rows in stream(1):
        inside: Any = part >= low
        if high < math.inf:
            below = part <= high
            bracket.above += int(part.size - np.count_nonzero(below))
            bracket.energies += _energies(rows, inside if low == high else ~below)
            inside &= below
        chosen = part[inside]
        bracket.count += chosen.size
        bracket.held.append(chosen[:: bracket.stride].copy() if bracket.stride > 1 else chosen)
        bracket.size += bracket.held[-1].size
        if bracket.stride == 1:
            bracket.rows.append(np.take(rows, np.flatnonzero(inside), axis=1) if len(rows) else rows[:, :0])
        while bracket.size > max_held:
            thinned = np.concatenate(bracket.held)[::2].copy()
            bracket.held, bracket.size, bracket.stride = [thinned], thinned.size, bracket.stride * 2
            bracket.rows = []
    return bracket
