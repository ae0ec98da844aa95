"""Find the n-th largest of very many numbers exactly, without sorting them and without holding them.

A sample brackets the wanted number; one pass counts what is above the bracket and keeps what is inside; a partition of
those few finishes. A bracket that missed, or that holds too many, is moved or narrowed and the pass repeated, so the
answer is always exact and the memory always bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hubfusion.weights import Array

MAX_HELD = 1 << 22
SAMPLE = 1 << 20
SPREAD = 6.0

Stream = Callable[[int], Iterator[Array]]


@dataclass(slots=True)
class _Bracket:
    """Numbers low ≤ x ≤ high, ``above`` of all numbers being larger than high; ``sample`` is from inside."""

    low: float
    high: float
    held: list[Array]
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
    if not 1 <= rank <= entries:
        raise ValueError(f"rank must be in [1, {entries}], got {rank}")
    max_held = max_held or MAX_HELD
    known = (0.0, math.inf)
    low, high = known
    if entries > max_held:
        every = max(2, entries // min(max_held, SAMPLE))
        sample = np.concatenate([part.copy() for part in stream(every)])
        low, high = _narrow(sample, rank / entries, *known)
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
            return low
        elif bracket.stride == 1:
            held = np.concatenate(bracket.held)
            return float(np.partition(held, held.size - inside)[held.size - inside])
        else:
            known = (low, high)
            low, high = _narrow(np.concatenate(bracket.held), inside / bracket.count, *known)


def _narrow(sample: Array, share: float, low: float, high: float) -> tuple[float, float]:
    """Bracket the number that has ``share`` of all above it, from a sample; never wider than (low, high)."""
    size = sample.size
    middle, slack = share * size, SPREAD * math.sqrt(size * share * (1 - share)) + 8
    first, last = math.floor(middle - slack), math.ceil(middle + slack)
    pivots = [min(size - 1, max(0, size - 1 - math.floor(p))) for p in (first, middle, last)]
    sample = np.partition(sample, pivots)
    upper = float(sample[pivots[0]]) if first >= 0 else high
    lower = float(sample[pivots[2]]) if last < size else low
    if (lower, upper) != (low, high):
        return lower, upper
    # Very many equal numbers: ask for one of them alone. Whatever the answer, it leaves the known range.
    pivot = float(sample[pivots[1]])
    return pivot, pivot


def _count(stream: Stream, low: float, high: float, max_held: int) -> _Bracket:
    bracket = _Bracket(low, high, [])
    for part in stream(1):
        inside: Any = part >= low
        if high < math.inf:
            below = part <= high
            bracket.above += int(part.size - np.count_nonzero(below))
            inside &= below
        found = part[inside]
        bracket.count += found.size
        kept = found[:: bracket.stride].copy() if bracket.stride > 1 else found
        bracket.held.append(kept)
        bracket.size += kept.size
        while bracket.size > max_held:
            thinned = np.concatenate(bracket.held)[::2].copy()
            bracket.held, bracket.size, bracket.stride = [thinned], thinned.size, bracket.stride * 2
    return bracket
