"""Read a base and k finetunes of it in chunks of bounded size: the one loop under every fuse.

A chunk is consecutive entries of one parameter. Reading it gives the base's values and the k deltas
(finetune − base), in float32 (in float64 when any file is). Buffers are sized for a core's cache, so memory depends
neither on k nor on the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hubfusion.checkpoint import adapters
from hubfusion.checkpoint.backbone import Backbone, Match, match, read_backbone
from hubfusion.checkpoint.reader import FLOATS, Array, Checkpoint, Parameter, open_checkpoint
from hubfusion.checkpoint.writer import encode
from hubfusion.errors import CheckpointError
from hubfusion.parallel import suited

SMALLEST_CHUNK = 8192
BUFFER_ENTRIES = 1 << 20
ROW_ENTRIES = 3 << 16


class Granularity(StrEnum):
    """What a method must see whole: any entries, rows (the last axis), or a parameter."""

    ENTRIES = "entries"
    ROWS = "rows"
    PARAMETER = "parameter"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Entries ``first ... last`` of one parameter, counted in row-major order."""

    parameter: Parameter
    first: int
    last: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the chunk: the parameter's own when whole, (rows, columns) of whole rows, else flat."""
        size, shape = self.last - self.first, self.parameter.shape
        if size == self.parameter.entries:
            return shape
        return (size // shape[-1], shape[-1]) if size % shape[-1] == 0 and self.first % shape[-1] == 0 else (size,)


@dataclass(frozen=True, slots=True)
class LoadedChunk:
    """A `Chunk` read: ``base`` (n,) and ``deltas`` (k, n), valid until the next chunk is read into the buffers."""

    chunk: Chunk
    base: Array
    deltas: Array


class Source(Protocol):
    """One input, matched to the base."""

    @property
    def path(self) -> Path:
        """Folder or file, for errors."""

    @property
    def names(self) -> Mapping[str, str]:
        """Base parameters that this input can give a delta for."""

    @property
    def dropped(self) -> tuple[str, ...]:
        """Names of the input's own that are not fused: heads."""

    @property
    def is_wide(self) -> bool:
        """Whether float32 would lose some of its precision."""

    def dtype_of(self, name: str) -> str:
        """The safetensors dtype in which this input stores the base's parameter ``name``."""

    def own_name(self, name: str) -> str:
        """What this input calls the base's parameter ``name``, for errors."""

    def changed_constant(self, base: Checkpoint) -> str:
        """The first buffer whose value is not the base's, "" when there is none."""

    def read_delta(self, name: str, first: int, base: Array, out: Array) -> None:
        """Fill ``out`` with this input minus ``base``, from entry ``first`` of the base's parameter ``name``."""


@dataclass(frozen=True, slots=True)
class FinetunedSource:
    """A whole finetuned checkpoint as a `Source`."""

    checkpoint: Checkpoint
    match: Match

    @property
    def path(self) -> Path:
        """Folder or file of the checkpoint."""
        return self.checkpoint.path

    @property
    def names(self) -> Mapping[str, str]:
        """Base name to own name."""
        return self.match.names

    @property
    def dropped(self) -> tuple[str, ...]:
        """Its own head, and constants that the base does not store."""
        return self.match.heads

    @property
    def is_wide(self) -> bool:
        """Whether any fused parameter is float64."""
        return any(self.checkpoint.parameters[n].dtype == "F64" for n in self.match.names.values())

    def dtype_of(self, name: str) -> str:
        """The dtype of its own tensor."""
        return self.checkpoint.parameters[self.match.names[name]].dtype

    def own_name(self, name: str) -> str:
        """Its own name of a parameter."""
        return self.match.names[name]

    def changed_constant(self, base: Checkpoint) -> str:
        """The first constant whose value is not the base's (rounded to the finetune's dtype), "" when there is none."""
        for ours, theirs in self.match.constants.items():
            if not _is_same_constant(base, ours, self.checkpoint, theirs):
                return theirs
        return ""

    def read_delta(self, name: str, first: int, base: Array, out: Array) -> None:
        """Read the finetuned entries and subtract the base's."""
        self.checkpoint.read(self.match.names[name], first, out)
        np.subtract(out, base, out=out)


@dataclass(frozen=True, slots=True)
class Models:
    """A base and its inputs, open and matched; ``fused`` are the base's parameters that every input has."""

    base: Checkpoint
    backbone: Backbone
    sources: tuple[Source, ...]
    fused: tuple[str, ...]
    dtype: type[np.floating[Any]]

    @property
    def kept(self) -> tuple[str, ...]:
        """Parameters and buffers of the base that are not fused: copied as they are."""
        return tuple(sorted(set(self.base.parameters) - set(self.fused)))

    @property
    def entries(self) -> int:
        """Entries of all fused parameters together."""
        return sum(self.base.parameters[n].entries for n in self.fused)

    @property
    def state_dtype(self) -> str:
        """The safetensors dtype of what is kept at working precision."""
        return "F64" if self.dtype is np.float64 else "F32"

    def chunks(
        self, entries: int, granularity: Granularity = Granularity.ENTRIES, names: Sequence[str] | None = None
    ) -> Iterator[Chunk]:
        """Split the fused parameters, in order of their names, into chunks of at most about ``entries`` entries.

        Whole rows or parameters are never split when ``granularity`` says so; others are cut at multiples of
        `SMALLEST_CHUNK`.
        """
        for name in self.fused if names is None else names:
            spec = self.base.parameters[name]
            step = max(SMALLEST_CHUNK, entries // SMALLEST_CHUNK * SMALLEST_CHUNK)
            if granularity is Granularity.PARAMETER or (granularity is Granularity.ROWS and len(spec.shape) < 2):
                step = spec.entries
            elif granularity is Granularity.ROWS and spec.shape[-1]:
                step = max(1, entries // spec.shape[-1]) * spec.shape[-1]
            for first in range(0, spec.entries, max(step, 1)):
                yield Chunk(spec, first, min(first + step, spec.entries))

    def chunk_entries(self) -> int:
        """Entries a chunk may have so that the buffers of one worker stay in a core's cache."""
        return max(SMALLEST_CHUNK, BUFFER_ENTRIES // (len(self.sources) + 1) // SMALLEST_CHUNK * SMALLEST_CHUNK)

    def workers(self, asked: int | None) -> int:
        """How many workers a walk over these models gets (`hubfusion.parallel.suited`)."""
        return suited(self.entries * (len(self.sources) + 1), asked)

    def read(self, chunk: Chunk, buffer: Array) -> LoadedChunk:
        """Read one chunk into ``buffer`` (k + 1, at least n)."""
        for _ in self.read_rows(chunk, buffer):
            pass
        size = chunk.last - chunk.first
        return LoadedChunk(chunk, buffer[0, :size], buffer[1:, :size])

    def read_rows(self, chunk: Chunk, buffer: Array) -> Iterator[Array]:
        """Read the base into ``buffer[0]`` and yield the deltas (n,), in the other rows of ``buffer``.

        With fewer than k of them the last is used again and again: a delta in it is valid until the next is taken.
        """
        size = chunk.last - chunk.first
        base = buffer[0, :size]
        self.base.read(chunk.parameter.name, chunk.first, base)
        for number, source in enumerate(self.sources):
            out = buffer[min(1 + number, len(buffer) - 1), :size]
            source.read_delta(chunk.parameter.name, chunk.first, base, out)
            yield out

    def refuse_not_finite(self, loaded: LoadedChunk, sources: Sequence[Source] | None = None) -> None:
        """Raise `CheckpointError` for the first delta that is not finite: its file, parameter and entry."""
        chunk = loaded.chunk
        for source, delta in zip(sources or self.sources, loaded.deltas, strict=True):
            bad = np.flatnonzero(~np.isfinite(delta))
            if bad.size:
                raise CheckpointError(
                    f"{source.path}: {chunk.parameter.name}: entry {chunk.first + int(bad[0])} minus the base's is "
                    f"{float(delta[bad[0]])}; only finite values can be fused"
                )

    def read_again(self, chunk: Chunk) -> LoadedChunk:
        """Read a chunk again whose result is not finite; raises if an input's values are not."""
        loaded = self.read(chunk, np.empty((len(self.sources) + 1, chunk.last - chunk.first), self.dtype))
        self.refuse_not_finite(loaded)
        return loaded

    def finite_squares(self, chunk: Chunk, squares: list[float]) -> list[float]:
        """Return the squared norms of a chunk's deltas, in float64 when they overflow; raises as `read_again`."""
        if all(map(math.isfinite, squares)):
            return squares
        return [square(delta.astype(np.float64)) for delta in self.read_again(chunk).deltas]

    def loaded_chunks(
        self, entries: int | None = None, granularity: Granularity = Granularity.ENTRIES
    ) -> Iterator[LoadedChunk]:
        """Read all chunks in canonical order, in this thread; each overwrites the one before."""
        buffer = np.empty((len(self.sources) + 1, 0), self.dtype)
        for chunk in self.chunks(entries or self.chunk_entries(), granularity):
            buffer = fitting(buffer, chunk.last - chunk.first)
            yield self.read(chunk, buffer)


def fitting(buffer: Array, entries: int) -> Array:
    """Return ``buffer`` when its rows have room for ``entries``, otherwise a larger one of the same rows and dtype."""
    return buffer if buffer.shape[1] >= entries else np.empty((buffer.shape[0], entries), buffer.dtype)


def square(delta: Array) -> float:
    """Squared norm (n,); in chunks small enough that the BLAS library starts no threads of its own."""
    whole = delta.size - delta.size % SMALLEST_CHUNK
    chunks, tail = delta[:whole].reshape(-1, SMALLEST_CHUNK), delta[whole:]
    return float(np.vecdot(chunks, chunks).sum(dtype=np.float64)) + float(np.vecdot(tail, tail))


def norms_of(squares: Iterable[list[float]]) -> list[float]:
    """L2 norm of each input from the squared norms of all chunks, to 6 digits: the last bits depend on the chunks."""
    return [float(f"{math.sqrt(math.fsum(column)):.6g}") for column in zip(*squares, strict=True)]


@contextmanager
def open_models(base: Path, inputs: Sequence[Path | Checkpoint | Source]) -> Iterator[Models]:
    """Open a base and its finetunes and match every parameter; raises `CheckpointError` for what does not fit.

    An input is a checkpoint folder, a ``.safetensors`` file, or a PEFT adapter folder (``adapter_config.json``); a
    `Checkpoint` or a `Source` is the caller's, to be closed there.
    """
    if not inputs:
        raise CheckpointError(f"{base}: at least one finetune is needed, got none")
    with ExitStack() as stack:
        ours = stack.enter_context(open_checkpoint(base))
        backbone = read_backbone(base, ours)
        sources = tuple(stack.enter_context(open_source(p, ours, backbone)) for p in inputs)
        for source in sources:
            if changed := source.changed_constant(ours):
                raise CheckpointError(
                    f"{source.path}: {changed}: buffer differs from the base's; buffers must be equal or absent"
                )
        fused = set.intersection(*(set(s.names) for s in sources))
        if not fused:
            raise CheckpointError(f"{base}: no float parameter is shared by all of {len(sources)} inputs")
        wide = any(ours.parameters[n].dtype == "F64" for n in fused) or any(s.is_wide for s in sources)
        yield Models(ours, backbone, sources, tuple(sorted(fused)), np.float64 if wide else np.float32)


@contextmanager
def open_source(given: Path | Checkpoint | Source, base: Checkpoint, backbone: Backbone) -> Iterator[Source]:
    """Open one input and match it to the base; raises `CheckpointError` naming its folder or file."""
    if isinstance(given, Checkpoint):
        yield _matched(given, base, backbone)
    elif not isinstance(given, Path):
        yield given
    elif (given / adapters.CONFIG).is_file():
        with adapters.open_adapter(given, base, backbone) as adapter:
            yield adapter
    else:
        with open_checkpoint(given) as checkpoint:
            yield _matched(checkpoint, base, backbone)


def _matched(checkpoint: Checkpoint, base: Checkpoint, backbone: Backbone) -> FinetunedSource:
    try:
        return FinetunedSource(checkpoint, match(backbone, base.parameters, checkpoint.parameters))
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from None


def _is_same_constant(base: Checkpoint, ours: str, checkpoint: Checkpoint, theirs: str) -> bool:
    one, other = base.parameters[ours], checkpoint.parameters[theirs]
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype:
        return base.read_bytes(ours) == checkpoint.read_bytes(theirs)
    if one.dtype not in FLOATS or other.dtype not in FLOATS:
        return False
    values = np.empty(one.entries)
    base.read(ours, 0, values)
    return encode(values, other.dtype).tobytes() == checkpoint.read_bytes(theirs)
