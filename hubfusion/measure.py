"""One streaming pass over a base and many checkpoints: what the law of honest updates is checked on.

For each checkpoint: ‖τ‖² by parameter, ⟨τ, θ⟩, the largest entry, the effective number of moved entries and a sketch
of τ, where τ = checkpoint − base over the parameters of the base. A bounded chunk of each is in memory at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hubfusion.errors import CheckpointError
from hubfusion.headers import TensorSpec
from hubfusion.layout import Layout, is_parameter
from hubfusion.lineage import Reason
from hubfusion.sketch import CHUNK, SIZE, Signs
from hubfusion.stream import Checkpoint, Floats

OnEntries = Callable[[int, int], None]
LAYER = re.compile(r"(?:^|\.)(?:layer|layers|h|block)\.(\d+)\.")


@dataclass(slots=True)
class TaskVector:
    """What one pass gathers about one checkpoint; ``bad`` is why it was given up on the way."""

    checkpoint: Checkpoint
    layout: Layout
    sketch: NDArray[np.float64] = field(default_factory=lambda: np.zeros(SIZE))
    squares: dict[str, float] = field(default_factory=dict)
    fourth: float = 0.0
    along: float = 0.0
    largest: float = 0.0
    bad: tuple[Reason, str] | None = None

    @property
    def norm(self) -> float:
        """‖τ‖."""
        return math.sqrt(math.fsum(self.squares.values()))

    @property
    def effective(self) -> float:
        """(Στ²)²/Στ⁴: how many entries moved, if they all had moved alike; 0.0 when none did."""
        return math.fsum(self.squares.values()) ** 2 / self.fourth if self.fourth else 0.0


def entries_of(encoder: Mapping[str, TensorSpec]) -> int:
    """Entries of all parameters together."""
    return sum(spec.entries for spec in encoder.values() if is_parameter(spec))


def measure(
    base: Checkpoint,
    encoder: Mapping[str, TensorSpec],
    vectors: Sequence[TaskVector],
    signs: Signs,
    on_entries: OnEntries | None = None,
) -> float:
    """Run over ``encoder`` (`hubfusion.layout.encoder_of` the base) and fill ``vectors``; returns ‖θ‖² of the base.

    Raises `CheckpointError` when the base itself has a value that is not finite.
    """
    total, done, size = entries_of(encoder), 0, 0.0
    theta, tau = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for name, spec in encoder.items():
        if not is_parameter(spec):
            _compare_buffers(base, name, spec, vectors)
            continue
        for first in range(0, spec.entries, CHUNK):
            count = min(CHUNK, spec.entries - first)
            chunk = base.read(spec.name, first, theta[:count])
            size += (square := float(np.dot(chunk, chunk)))
            if not math.isfinite(square):
                raise CheckpointError(f"{base.folder}: {spec.name} is not finite or too large to fuse")
            for vector in vectors:
                if vector.bad is None:
                    _add(vector, name, first, chunk, tau[:count], signs)
            done += count
            if on_entries:
                on_entries(done, total)
    return size


def _add(vector: TaskVector, name: str, first: int, theta: Floats, tau: Floats, signs: Signs) -> None:
    """Take one chunk of one parameter into account; ``tau`` is scratch space."""
    try:
        vector.checkpoint.read(vector.layout.names[name], first, tau)
    except CheckpointError as error:
        vector.bad = (Reason.CORRUPT, str(error))
        return
    with np.errstate(over="ignore", invalid="ignore"):
        np.subtract(tau, theta, out=tau)
        square = float(np.dot(tau, tau))
        if not math.isfinite(square):
            wrong = np.flatnonzero(~np.isfinite(tau))
            if len(wrong):
                vector.bad = _not_finite(vector, name, first + int(wrong[0]), float(tau[wrong[0]]))
                return
            square = float(np.square(tau, dtype=np.float64).sum())
        if square == 0.0:
            return
        vector.squares[name] = vector.squares.get(name, 0.0) + square
        vector.along += float(np.dot(tau, theta))
        vector.largest = max(vector.largest, float(tau.max()), -float(tau.min()))
        signs.add(vector.sketch, name, first, tau)
        np.square(tau, out=tau)
        vector.fourth += float(np.dot(tau, tau))


def _not_finite(vector: TaskVector, name: str, entry: int, value: float) -> tuple[Reason, str]:
    spec = vector.checkpoint.tensors[vector.layout.names[name]]
    place = ", ".join(str(int(i)) for i in np.unravel_index(entry, spec.shape))
    return Reason.NOT_FINITE, f"{spec.name}[{place}] is {value}; train again and check the loss"


def _compare_buffers(base: Checkpoint, name: str, spec: TensorSpec, vectors: Sequence[TaskVector]) -> None:
    ours = base.read_whole(spec.name)
    for vector in vectors:
        theirs = vector.layout.names.get(name)
        if theirs and not vector.bad and not np.array_equal(ours, vector.checkpoint.read_whole(theirs)):
            vector.bad = (Reason.BUFFERS, f"buffer {theirs} differs from the base's; it is a constant")


def kind_of(vector: TaskVector, encoder: Mapping[str, TensorSpec]) -> str:
    """Which part of the encoder was trained, in words."""
    names = list(vector.squares)
    if not names:
        return "nothing of the encoder"
    if all(n.endswith(("bias", "beta")) for n in names):
        return "biases only"
    if all("norm" in n.lower() for n in names):
        return "normalisation only"
    if all("embed" in n or ".wte" in n or ".wpe" in n for n in names):
        return "embeddings only"
    layers = {int(m.group(1)) for n in names if (m := LAYER.search(n))}
    everything = {int(m.group(1)) for n in encoder if (m := LAYER.search(n))}
    if layers < everything and not any("embed" in n for n in names):
        return "layers " + ", ".join(map(str, sorted(layers))) + " only" if layers else "outside the layers only"
    return "whole encoder"
