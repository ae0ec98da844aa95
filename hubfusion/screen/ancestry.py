"""Infer from the weights which version of the base a finetune was made from.

Two kinds of evidence are used. *Untouched rows*: a word that does not occur in the training texts gets no gradient, so
its embedding is that of the true base except for weight decay, which only shrinks it; orthogonal to itself it equals
one version up to rounding. Every sampled row votes. *Distance*: θ_c is nearest to the version that it started from.
Distance alone fails for contributions that were fused into the next version, which lies in their direction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hubfusion.checkpoint import Checkpoint
from hubfusion.checkpoint.backbone import Backbone
from hubfusion.checkpoint.deltas import Source
from hubfusion.screen.sketch import SIZE
from hubfusion.screen.task_vectors import Floats, TaskVector

ROWS = 1024
# A row votes for a version whose row it equals this much better than any other; so many votes, this part, decide.
EQUAL, ENOUGH, SHARE = 0.05, 16, 0.8


@dataclass(frozen=True, slots=True)
class Ancestry:
    """``nearest`` is the tag of the version, ``distances`` ‖θ_c − version‖ by tag, ``votes`` of untouched rows."""

    nearest: str
    distances: Mapping[str, float]
    votes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Sampled rows of the word embeddings: of the base, to project along, and of every version (V, K, width)."""

    base: Checkpoint
    name: str
    numbers: NDArray[np.int64]
    unit: Floats
    versions: Floats
    tags: tuple[str, ...]


def find_ancestry(
    base: Checkpoint,
    backbone: Backbone,
    vectors: Sequence[TaskVector],
    earlier: Mapping[str, TaskVector],
    tag: str,
    seed: int,
) -> list[Ancestry]:
    """The nearest of the base ``tag`` and the ``earlier`` versions, for each of ``vectors`` (measured already)."""
    rows = _sample(base, backbone, earlier, tag, seed) if earlier else None
    ancestries = []
    for vector in vectors:
        distances = _distances(vector, earlier, tag)
        votes = _vote(rows, vector) if rows else {}
        clear = sum(votes.values())
        winner = max(votes, key=lambda name: votes[name], default=tag)
        if clear < ENOUGH or votes[winner] < SHARE * clear:
            winner = _by_distance(vector, earlier, distances, tag)
        ancestries.append(Ancestry(winner, distances, votes))
    return ancestries


def _distances(vector: TaskVector, earlier: Mapping[str, TaskVector], tag: str) -> dict[str, float]:
    distances = {tag: vector.norm}
    for name, version in earlier.items():
        gap = vector.sketch - version.sketch
        if math.isfinite(distance := math.sqrt(float(gap @ gap))):
            distances[name] = distance
    return distances


def _by_distance(
    vector: TaskVector, earlier: Mapping[str, TaskVector], distances: Mapping[str, float], tag: str
) -> str:
    """The nearest version; nearer than the base by less than three times the sketch's noise says nothing."""
    own = float(vector.sketch @ vector.sketch)
    near = [
        name
        for name, version in earlier.items()
        if distances.get(name, math.inf) ** 2 < own - 6 * vector.norm * version.norm / math.sqrt(SIZE)
    ]
    return min(near, key=lambda name: distances[name], default=tag)


def _sample(
    base: Checkpoint, backbone: Backbone, earlier: Mapping[str, TaskVector], tag: str, seed: int
) -> _Rows | None:
    """Rows of the tallest matrix, which is the word embedding, drawn by ``seed``; None for a model without one."""
    tables = [n for n in backbone.parameters if len(base.parameters[n].shape) == 2]
    if not tables:
        return None
    name = max(tables, key=lambda n: base.parameters[n].shape[0])
    count = base.parameters[name].shape[0]
    numbers = np.sort(np.random.default_rng(seed).choice(count, min(count, ROWS), replace=False))
    width = base.parameters[name].shape[1]
    own = _read(base, None, name, numbers, width)
    unit = own / np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-30)
    older = [_read(base, v.source, name, numbers, width) for v in earlier.values()]
    return _Rows(base, name, numbers, unit, np.stack([own, *older]), (tag, *earlier))


def _read(base: Checkpoint, source: Source | None, name: str, numbers: NDArray[np.int64], width: int) -> Floats:
    """Rows of the base, or of one of its finetunes (K, width)."""
    rows, delta = np.empty((len(numbers), width), np.float32), np.empty(width, np.float32)
    for row, number in zip(rows, numbers, strict=True):
        base.read(name, int(number) * width, row)
        if source is not None:
            source.read_delta(name, int(number) * width, row, delta)
            row += delta
    return rows


def _vote(rows: _Rows, vector: TaskVector) -> dict[str, int]:
    """How many rows are, across themselves, equal to one version's and to no other's."""
    own = _read(rows.base, vector.source, rows.name, rows.numbers, rows.unit.shape[1])
    gaps = own[None] - rows.versions
    gaps -= (gaps * rows.unit).sum(axis=2, keepdims=True) * rows.unit
    far = np.linalg.norm(gaps, axis=2)
    first, second = np.sort(far, axis=0)[:2]
    clear = (first < EQUAL * second) & (second > 1e-6 * np.linalg.norm(own, axis=1))
    votes = np.bincount(np.argmin(far, axis=0)[clear], minlength=len(rows.tags))
    return {tag: int(count) for tag, count in zip(rows.tags, votes, strict=True)}
