"""One streaming pass over a base and many checkpoints: what the law of honest updates is checked on.

For each checkpoint: ‖τ‖² by parameter, ⟨τ, θ⟩, the largest entry, the effective number of moved entries and a sketch
of τ, where τ = checkpoint − base over the parameters of the base. A bounded chunk of each is in memory at a time.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hubfusion.errors import CheckpointError
from hubfusion.layout import Layout, Tensor, is_parameter
from hubfusion.lineage import Reason
from hubfusion.sketch import CHUNK, SIZE, Signs
from hubfusion.streaming import THREADS, in_threads
from hubfusion.weights import Checkpoint

Floats = NDArray[np.float32]
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


def entries_of(encoder: Mapping[str, Tensor]) -> int:
    """Entries of all parameters together."""
    return sum(spec.entries for spec in encoder.values() if is_parameter(spec))


def measure(
    base: Checkpoint,
    encoder: Mapping[str, Tensor],
    vectors: Sequence[TaskVector],
    signs: Signs,
    on_entries: OnEntries | None = None,
    threads: int = THREADS,
) -> float:
    """Run over ``encoder`` (`hubfusion.layout.encoder_of` the base) and fill ``vectors``; returns ‖θ‖² of the base.

    Sums are kept by chunk and added up in one order, whatever the number of threads. Raises `CheckpointError` when
    the base itself has a value that is not finite.
    """
    for name, spec in encoder.items():
        if not is_parameter(spec):
            _compare_buffers(base, name, spec, vectors)
    places = [
        _Place(name, spec, first, min(CHUNK, spec.entries - first))
        for name, spec in encoder.items()
        if is_parameter(spec)
        for first in range(0, spec.entries, CHUNK)
    ]
    sums = np.zeros((len(vectors) + 1, len(places), 4))
    sketches: list[NDArray[np.float64]] = []
    done, total, lock = 0, entries_of(encoder), threading.Lock()

    def work() -> Callable[[int], None]:
        theta, tau = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
        sketch = np.zeros((len(vectors), SIZE))
        sketches.append(sketch)

        def do(number: int) -> None:
            nonlocal done
            place = places[number]
            chunk = theta[: place.count]
            base.read(place.spec.name, place.first, chunk)
            sums[-1, number, 0] = np.dot(chunk, chunk)
            for i, vector in enumerate(vectors):
                if vector.bad is None:
                    sums[i, number] = _add(vector, place, chunk, tau[: place.count], signs, sketch[i])
            with lock:
                done += place.count
                if on_entries:
                    on_entries(done, total)

        return do

    in_threads(range(len(places)), work, threads)
    if not np.isfinite(sums[-1]).all():
        wrong = places[int(np.flatnonzero(~np.isfinite(sums[-1, :, 0]))[0])]
        raise CheckpointError(f"{base.path}: {wrong.spec.name} is not finite or too large to fuse")
    for i, vector in enumerate(vectors):
        vector.sketch = np.sum([sketch[i] for sketch in sketches], axis=0)
        for place, square in zip(places, sums[i, :, 0], strict=True):
            if square:
                vector.squares[place.name] = vector.squares.get(place.name, 0.0) + float(square)
        vector.along, vector.fourth = math.fsum(sums[i, :, 1]), math.fsum(sums[i, :, 2])
        vector.largest = float(sums[i, :, 3].max(initial=0.0))
    return math.fsum(sums[-1, :, 0])


@dataclass(frozen=True, slots=True)
class _Place:
    """``count`` entries from ``first`` of one parameter."""

    name: str
    spec: Tensor
    first: int
    count: int


def _add(
    vector: TaskVector, place: _Place, theta: Floats, tau: Floats, signs: Signs, sketch: NDArray[np.float64]
) -> tuple[float, float, float, float]:
    """Read one chunk into ``tau`` (used up) and return Στ², Στθ, Στ⁴ and max |τ| over it; add to ``sketch``."""
    with np.errstate(over="ignore", invalid="ignore"):
        try:
            vector.checkpoint.read(vector.layout.names[place.name], place.first, tau)
        except CheckpointError as error:
            vector.bad = (Reason.CORRUPT, str(error))
            return 0.0, 0.0, 0.0, 0.0
        np.subtract(tau, theta, out=tau)
        square = float(np.dot(tau, tau))
        if not math.isfinite(square):
            wrong = np.flatnonzero(~np.isfinite(tau))
            if len(wrong):
                vector.bad = _not_finite(vector, place, int(wrong[0]), float(tau[wrong[0]]))
                return 0.0, 0.0, 0.0, 0.0
            square = float(np.square(tau, dtype=np.float64).sum())
        if square == 0.0:
            return 0.0, 0.0, 0.0, 0.0
        along, largest = float(np.dot(tau, theta)), max(float(tau.max()), -float(tau.min()))
        signs.add(sketch, place.name, place.first, tau)
        np.square(tau, out=tau)
        return square, along, float(np.dot(tau, tau)), largest


def _not_finite(vector: TaskVector, place: _Place, entry: int, value: float) -> tuple[Reason, str]:
    spec = vector.checkpoint.parameters[vector.layout.names[place.name]]
    where = ", ".join(str(int(i)) for i in np.unravel_index(place.first + entry, spec.shape))
    return Reason.NOT_FINITE, f"{spec.name}[{where}] is {value}; train again and check the loss"


def _compare_buffers(base: Checkpoint, name: str, spec: Tensor, vectors: Sequence[TaskVector]) -> None:
    ours = base.read_bytes(spec.name)
    for vector in vectors:
        theirs = vector.layout.names.get(name)
        if theirs and not vector.bad and vector.checkpoint.read_bytes(theirs) != ours:
            vector.bad = (Reason.BUFFERS, f"buffer {theirs} differs from the base's; it is a constant")


def kind_of(vector: TaskVector, encoder: Mapping[str, Tensor]) -> str:
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
