"""Fuse: recipe + checkpoints -> candidate, streaming.

A chunk of the base and of every input is read, the method turns the deltas into one, and the sum is written. No
more than a chunk is in memory. The same recipe over the same bytes gives the same bytes, whatever the number
of workers, the size of chunks, the shards of the inputs or their order: inputs are taken in a canonical order (by
repository and commit), deltas are float32 (float64 when any file is), and the result is rounded once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hubfusion.checkpoint import MAX_SHARD_BYTES, Array, Writing, WrittenFile, write_checkpoint
from hubfusion.checkpoint.deltas import (
    ROW_ENTRIES,
    Chunk,
    LoadedChunk,
    Models,
    Source,
    fitting,
    norms_of,
    open_models,
    square,
)
from hubfusion.errors import CheckpointError, RecipeError
from hubfusion.fuse.first_pass import Keywords, survey
from hubfusion.fuse.methods import METHODS, Method
from hubfusion.fuse.outer import OUTERS, STATE_FILE, Stepping, open_stepping
from hubfusion.fuse.recipe import check_recipe
from hubfusion.lineage import Input, Recipe
from hubfusion.parallel import counter, spread

DEVICE_ENTRIES = 1 << 23
ON_DEVICE = ("base", "fishers")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settings:
    """How the work is done: on the CPU none of it changes a byte of the result.

    ``device`` None computes in numpy; a torch device name ("cuda", "cpu") runs the same formulas on torch tensors
    there, a chunk at a time, with the device's own rounding of sums and products. ``workers`` are processes, or threads
    where a fork is not safe (`hubfusion.parallel`); None takes one for a small model, else as many as there are cores,
    at most four. ``digest`` False saves the sha256 of the output, ``norms`` False measuring the deltas.
    """

    device: str | None = None
    workers: int | None = None
    chunk_entries: int | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES
    digest: bool = True
    norms: bool = True


@dataclass(frozen=True, slots=True)
class FuseProgress:
    """Entries of the model done so far, and all of them; one event a chunk."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class FusedInput:
    """What a fuse saw of one input: the L2 norm of its delta over the fused parameters (None: not measured).

    ``dropped`` names the parameters that only this model has, such as its task head.
    """

    input: Input
    norm: float | None
    dropped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fused:
    """What a fuse wrote and saw: ``inputs`` in the recipe's order, ``kept`` base parameters copied as they are."""

    files: tuple[WrittenFile, ...]
    inputs: tuple[FusedInput, ...]
    fused: tuple[str, ...]
    kept: tuple[str, ...]


Listener = Callable[[FuseProgress], None]


def fuse(
    recipe: Recipe,
    base: Path,
    inputs: Sequence[Path | Source],
    out: Path,
    *,
    state: Path | None = None,
    settings: Settings | None = None,
    on_event: Listener | None = None,
    prepare: Callable[[], None] | None = None,
) -> Fused:
    """Fuse ``inputs`` (one for each of the recipe's) into ``base`` and write the weights to the folder ``out``.

    The output has the base's parameters, dtypes and names. Parameters that some input lacks (a pretraining head, a
    pooler), task heads and integer buffers are the base's own. ``state`` is the folder or file of the outer
    optimizer's last state (None: the base folder's own, or a fresh one); the next is written beside the weights.
    ``on_event`` gets a `FuseProgress` when chunks are done. ``prepare`` is called when everything
    is open and matched and (unless the method needs a first pass) no delta was read. Raises `CheckpointError` for
    files that do not fit or values that are not finite and `RecipeError` for options; ``out`` is then as it was before.
    """
    check_recipe(recipe)
    settings = settings or Settings()
    if len(inputs) != len(recipe.inputs):
        raise RecipeError(f"recipe has {len(recipe.inputs)} inputs, {len(inputs)} paths came")
    refuse_same_place(out, [base, *(i if isinstance(i, Path) else i.path for i in inputs)])
    if state is None and OUTERS[recipe.outer].slots and (base / STATE_FILE).is_file():
        state = base
    order = recipe.order
    with ExitStack() as stack:
        models = stack.enter_context(open_models(base, [inputs[i] for i in order]))
        workers = models.workers(settings.workers)
        keywords = survey(recipe.method, dict(recipe.options), models, stack, workers)
        specs = list(models.base.parameters.values())
        steps = [replace(models.base.parameters[n], dtype=models.state_dtype) for n in models.fused]
        with (
            open_stepping(recipe.outer, dict(recipe.outer_options), state, out, steps, settings.digest) as stepping,
            write_checkpoint(out, specs, max_shard_bytes=settings.max_shard_bytes, digest=settings.digest) as writing,
        ):
            work = _Work(recipe, models, writing, stepping, keywords, settings, on_event)
            if prepare:
                prepare()
            work.copy_kept()
            entries = settings.chunk_entries or work.chunk_entries()
            chunks = models.chunks(entries, METHODS[recipe.method].granularity)
            for chunk, squares in spread(chunks, work.start, workers, fork=settings.device is None):
                work.record(chunk, squares)
        seen = in_given_order(recipe, work.norms(), [source.dropped for source in models.sources])
        fused = Fused((*writing.written, *stepping.written), seen, models.fused, models.kept)
    log.info("fused %d inputs by %s: %d parameters", len(inputs), recipe.method, len(models.fused))
    return fused


def in_given_order(
    recipe: Recipe, norms: Sequence[float | None], dropped: Sequence[tuple[str, ...]]
) -> tuple[FusedInput, ...]:
    """What was seen of the inputs in canonical order, in the order of the recipe."""
    seen = {i: FusedInput(recipe.inputs[i], norms[n], dropped[n]) for n, i in enumerate(recipe.order)}
    return tuple(seen[i] for i in range(len(seen)))


def refuse_same_place(out: Path, sources: Sequence[Path]) -> None:
    """Raise `CheckpointError` when ``out`` is the folder of a model that is read."""
    if any(_same_place(out, path) for path in sources):
        raise CheckpointError(f"{out}: the output folder must be neither the base nor an input")


def _same_place(one: Path, other: Path) -> bool:
    folder = other if other.is_dir() else other.parent
    return one.resolve() == folder.resolve()


class _Work:
    """One fuse in progress: what its workers share."""

    def __init__(
        self,
        recipe: Recipe,
        models: Models,
        writing: Writing,
        stepping: Stepping,
        keywords: Keywords,
        settings: Settings,
        on_event: Listener | None,
    ) -> None:
        self.models, self.writing, self.keywords = models, writing, keywords
        self.stepping, self.device = stepping, settings.device
        self.method: Method = METHODS[recipe.method]
        self.wants_norms = settings.norms
        self.measured = settings.norms or not self.method.is_sum  # elsewhere the norms show what is not finite
        self.options: Mapping[str, Any] = dict(recipe.options)
        self.scale = recipe.scale
        self.coefficients = [recipe.inputs[i].coefficient for i in recipe.order]
        self.count = counter(
            models.entries, (lambda done, total: on_event(FuseProgress(done, total))) if on_event else None
        )
        self.squares: list[list[float]] = []

    @property
    def by_row(self) -> bool:
        """Whether the deltas of a chunk are read one after another, rather than all before the method begins."""
        return self.method.by_row and self.device is None

    def chunk_entries(self) -> int:
        """Entries of a chunk: as many as fit a core's cache, or a device."""
        if self.device is not None:
            return DEVICE_ENTRIES
        return ROW_ENTRIES if self.by_row else self.models.chunk_entries()

    def start(self) -> Callable[[Chunk], list[float]]:
        """Return the work of one worker: a function from a chunk to its deltas' squared norms, with own buffers."""
        buffer = np.empty((3 if self.by_row else len(self.models.sources) + 1, 0), self.models.dtype)

        def do(chunk: Chunk) -> list[float]:
            nonlocal buffer
            buffer = fitting(buffer, chunk.last - chunk.first)
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused by name
                base, delta, squares = (self.fuse_rows if self.by_row else self.fuse_whole)(chunk, buffer)
            if self.scale != 1.0:
                delta *= self.scale
            delta = self.stepping.step(chunk.parameter.name, chunk.first, base, delta)
            delta += base
            try:
                self.writing.write(chunk.parameter.name, chunk.first, delta)
            except CheckpointError:
                self.models.read_again(chunk)  # name the input if its values are the reason
                raise
            return squares

        return do

    def record(self, chunk: Chunk, squares: list[float]) -> None:
        """Record a chunk that is done."""
        self.squares.append(squares)
        self.writing.digest(chunk.parameter.name, chunk.first, chunk.last)
        self.stepping.digest(chunk.parameter.name, chunk.first, chunk.last)
        self.count(chunk.last - chunk.first)

    def fuse_rows(self, chunk: Chunk, buffer: Array) -> tuple[Array, Array, list[float]]:
        """Read and fuse one delta after another: base and fused delta (n,), squared norms."""
        squares: list[float] = []
        shape = chunk.shape

        def rows() -> Iterator[Array]:
            for delta in self.models.read_rows(chunk, buffer):
                if self.measured:
                    squares.append(square(delta))
                yield delta.reshape(shape)

        base = buffer[0, : chunk.last - chunk.first]
        keywords = self.keywords(LoadedChunk(chunk, base, buffer[1:1]))
        fused: Array = self.method.function(rows(), self.coefficients, **self.options, **keywords)
        return base, fused.reshape(-1), self.models.finite_squares(chunk, squares)

    def fuse_whole(self, chunk: Chunk, buffer: Array) -> tuple[Array, Array, list[float]]:
        """Read all deltas, then fuse them: base and fused delta (n,), squared norms."""
        loaded = self.models.read(chunk, buffer)
        squares = self.models.finite_squares(chunk, [square(delta) for delta in loaded.deltas])
        delta = self.apply(loaded.deltas.reshape(-1, *chunk.shape), self.keywords(loaded))
        return loaded.base, delta.reshape(-1), squares

    def apply(self, deltas: Array, keywords: Mapping[str, Any]) -> Array:
        """Apply the method to the deltas of a chunk, in numpy or on the device."""
        if self.device is None:
            result: Array = self.method.function(deltas, self.coefficients, **self.options, **keywords)
            return result
        import torch  # only here: a fuse on the CPU must not pay for the import

        def move(value: Array) -> Any:
            wide = value.astype(np.int32) if value.dtype == np.uint16 else value
            return torch.from_numpy(np.array(wide)).to(self.device)

        moved = {n: move(v) if n in ON_DEVICE else v for n, v in keywords.items()}
        if "draws" in keywords:
            moved["draws"] = map(move, keywords["draws"])
        fused = self.method.function(move(deltas), self.coefficients, **self.options, **moved)
        return np.asarray(fused.cpu().numpy())

    def norms(self) -> list[float | None]:
        """L2 norm of each delta, when they were asked for."""
        return [*norms_of(self.squares)] if self.wants_norms else [None] * len(self.models.sources)

    def copy_kept(self, step: int = 1 << 20) -> None:
        """Copy the base's bytes of every parameter that is not fused."""
        for name in self.models.kept:
            for first in range(0, self.models.base.parameters[name].size, step):
                last = min(first + step, self.models.base.parameters[name].size)
                self.writing.write_bytes(name, first, self.models.base.read_bytes(name, first, last))
            self.writing.digest(name, 0, self.models.base.parameters[name].entries)
