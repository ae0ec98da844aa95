"""One streaming pass over a base and its finetunes: the statistics that the outlier checks use.

For each finetune: ‖τ‖² by parameter, ⟨τ, θ⟩, the largest entry, the effective number of moved entries and a sketch
of τ, where τ = finetune − base over the backbone. A bounded chunk of each is in memory at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hubfusion.checkpoint import Checkpoint, Parameter, encode
from hubfusion.checkpoint.backbone import Backbone
from hubfusion.checkpoint.deltas import Source
from hubfusion.checkpoint.reader import numpy_dtype
from hubfusion.errors import CheckpointError
from hubfusion.lineage import Reason
from hubfusion.parallel import counter, spread, suited
from hubfusion.screen.sketch import CHUNK, SIZE, Signs

Floats = NDArray[np.float32]
OnEntries = Callable[[int, int], None]
TOGETHER = 8  # chunks a job, whose sketches are then one
LAYER = re.compile(r"(?:^|\.)(?:layer|layers|h|block)\.(\d+)\.")


@dataclass(slots=True)
class TaskVector:
    """What one pass gathers about one finetune; ``bad`` is the reason when the pass stopped reading it."""

    source: Source
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


def entries_of(parameters: Mapping[str, Parameter]) -> int:
    """Entries of all parameters together."""
    return sum(spec.entries for spec in parameters.values())


def measure(
    base: Checkpoint,
    backbone: Backbone,
    vectors: Sequence[TaskVector],
    signs: Signs,
    on_entries: OnEntries | None = None,
    workers: int | None = None,
) -> float:
    """Run over the backbone and fill ``vectors``; returns ‖θ‖² of the base's backbone.

    The base's pretraining head may be fused as well: its deltas are read to see that they are finite, and not added
    up. Sums are kept by chunk and added up in one order, whatever the number of workers. Raises `CheckpointError` when
    the base itself has a value that is not finite.
    """
    for vector in vectors:
        _check_constants(base, vector)
    chunks = [
        _Chunk(base.parameters[name], first, min(CHUNK, base.parameters[name].entries - first), is_head)
        for names, is_head in ((backbone.parameters, False), (backbone.heads, True))
        for name in names
        for first in range(0, base.parameters[name].entries, CHUNK)
    ]

    def work() -> Callable[[int], _Sums]:
        theta, tau = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
        bad = [vector.bad for vector in vectors]  # this worker's own view of who is to be read on

        def do(first: int) -> _Sums:
            part = _Sums(np.zeros((len(vectors) + 1, TOGETHER, 4)), np.zeros((len(vectors), SIZE)), bad)
            for number, chunk in enumerate(chunks[first : first + TOGETHER]):
                values = theta[: chunk.count]
                base.read(chunk.spec.name, chunk.first, values)
                if not chunk.is_head or not np.isfinite(values).all():
                    part.sums[-1, number, 0] = np.dot(values, values)
                for i, vector in enumerate(vectors):
                    if bad[i] is None and chunk.spec.name in vector.source.names:
                        into = tau[: chunk.count]
                        bad[i], part.sums[i, number] = _add(vector, chunk, values, into, signs, part.sketches[i])
            return part

        return do

    sums = np.zeros((len(vectors) + 1, len(chunks) + TOGETHER, 4))
    sketches = np.zeros((len(vectors), SIZE))
    total = sum(chunk.count for chunk in chunks)
    count = counter(total, on_entries)
    jobs = range(0, len(chunks), TOGETHER)
    for first, part in spread(jobs, work, suited(total * (len(vectors) + 1), workers)):
        sums[:, first : first + TOGETHER] = part.sums
        sketches += part.sketches
        for vector, bad in zip(vectors, part.bad, strict=True):
            vector.bad = vector.bad or bad
        count(sum(chunk.count for chunk in chunks[first : first + TOGETHER]))
    sums = sums[:, : len(chunks)]
    if not np.isfinite(sums[-1]).all():
        wrong = chunks[int(np.flatnonzero(~np.isfinite(sums[-1, :, 0]))[0])]
        raise CheckpointError(f"{base.path}: {wrong.spec.name} is not finite or too large to fuse")
    for i, vector in enumerate(vectors):
        vector.sketch = sketches[i]
        for chunk, square in zip(chunks, sums[i, :, 0], strict=True):
            if square:
                vector.squares[chunk.spec.name] = vector.squares.get(chunk.spec.name, 0.0) + float(square)
        vector.along, vector.fourth = math.fsum(sums[i, :, 1]), math.fsum(sums[i, :, 2])
        vector.largest = float(sums[i, :, 3].max(initial=0.0))
    return math.fsum(sums[-1, :, 0])


@dataclass(frozen=True, slots=True)
class _Chunk:
    """``count`` entries from ``first`` of one parameter, of the backbone or of the base's pretraining head."""

    spec: Parameter
    first: int
    count: int
    is_head: bool


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of `TOGETHER` chunks: what `_add` gives for each vector, ‖θ‖² last; sketches; reasons of rejections so far."""

    sums: NDArray[np.float64]
    sketches: NDArray[np.float64]
    bad: list[tuple[Reason, str] | None]


def _add(
    vector: TaskVector, chunk: _Chunk, theta: Floats, tau: Floats, signs: Signs, sketch: NDArray[np.float64]
) -> tuple[tuple[Reason, str] | None, tuple[float, float, float, float]]:
    """Read one chunk into ``tau`` (used up) and add it to ``sketch``; return what is bad, Στ², Στθ, Στ⁴ and max |τ|."""
    nothing = (0.0, 0.0, 0.0, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        try:
            vector.source.read_delta(chunk.spec.name, chunk.first, theta, tau)
        except CheckpointError as error:
            return (Reason.CORRUPT, str(error)), nothing
        square = float(np.dot(tau, tau))
        if not math.isfinite(square):
            wrong = np.flatnonzero(~np.isfinite(tau))
            if len(wrong):
                return _not_finite(vector, chunk, int(wrong[0]), float(tau[wrong[0]])), nothing
            square = float(np.square(tau, dtype=np.float64).sum())
        if square == 0.0 or chunk.is_head or _is_rounding(vector, chunk, theta, tau):
            return None, nothing
        along, largest = float(np.dot(tau, theta)), max(float(tau.max()), -float(tau.min()))
        signs.add(sketch, chunk.spec.name, chunk.first, tau)
        np.square(tau, out=tau)
        return None, (square, along, float(np.dot(tau, tau)), largest)


def _not_finite(vector: TaskVector, chunk: _Chunk, entry: int, value: float) -> tuple[Reason, str]:
    name = vector.source.own_name(chunk.spec.name)
    index = ", ".join(str(int(i)) for i in np.unravel_index(chunk.first + entry, chunk.spec.shape))
    return Reason.NOT_FINITE, f"{name}[{index}] is {value}; train again and check the loss"


def _is_rounding(vector: TaskVector, chunk: _Chunk, theta: Floats, tau: Floats) -> bool:
    """Whether a chunk of a finetune in half precision is just the base's, rounded: then nothing was trained there."""
    dtype = vector.source.dtype_of(chunk.spec.name)
    if dtype not in ("F16", "BF16"):
        return False
    rounded = encode(theta, dtype).view(numpy_dtype(dtype)).astype(np.float32)
    return bool(np.array_equal(rounded - theta, tau))


def _check_constants(base: Checkpoint, vector: TaskVector) -> None:
    if changed := vector.source.changed_constant(base):
        vector.bad = (Reason.BUFFERS, f"buffer {changed} differs from the base's; it is a constant")


def kind_of(vector: TaskVector, backbone: Backbone) -> str:
    """Which part of the backbone was trained, in words, from the names of its parameters."""
    names = list(vector.squares)
    if not names:
        return "nothing of the backbone"
    if all(n.endswith(("bias", "beta")) for n in names):
        return "biases only"
    if all("norm" in n.lower() for n in names):
        return "normalization only"
    if all("embed" in n or ".wte" in n or ".wpe" in n for n in names):
        return "embeddings only"
    layers = {int(m.group(1)) for n in names if (m := LAYER.search(n))}
    everything = {int(m.group(1)) for n in backbone.parameters if (m := LAYER.search(n))}
    if layers < everything and not any("embed" in n for n in names):
        return "layers " + ", ".join(map(str, sorted(layers))) + " only" if layers else "outside the layers only"
    return "whole backbone"
