"""Accumulate inputs as they download: each is added to a sum on the disk and may be deleted afterwards.

Only for methods that add multiples of the deltas with factors known in advance (`Method.as_sum`). The sum is kept in
one file, in the working precision of an ordinary fuse, and the additions are the same in the same order, so the result
has the same bytes. Whether every input fits is checked first, from the headers alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from hubfusion.checkpoint import Array, Checkpoint, Writing, write_checkpoint
from hubfusion.checkpoint.deltas import (
    ROW_ENTRIES,
    Chunk,
    Models,
    Source,
    fitting,
    norms_of,
    open_models,
    open_source,
    square,
)
from hubfusion.errors import CheckpointError, RecipeError
from hubfusion.fuse.engine import Fused, FuseProgress, Listener, Settings, fuse, in_given_order, refuse_same_place
from hubfusion.fuse.methods import METHODS
from hubfusion.fuse.methods.kinds import Sum, add_up
from hubfusion.fuse.recipe import check_recipe
from hubfusion.lineage import Input, Recipe
from hubfusion.parallel import counter, spread

SUM = "sum.safetensors"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Arrivals:
    """The k inputs of a fuse, in canonical order, some of which are still being downloaded.

    ``known`` has for each a folder, or the headers of one that is not downloaded yet. ``batches`` yields the
    folders in the same order, one or more at a time; they may be deleted when the next are requested. The sum is kept
    in the folder ``room``.
    """

    known: tuple[Path | Checkpoint, ...]
    batches: Iterator[Sequence[Path]]
    room: Path


@dataclass(frozen=True, slots=True)
class _Added:
    """The finished sum, as the one input of an ordinary fuse."""

    checkpoint: Checkpoint
    is_wide: bool
    dropped: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def names(self) -> Mapping[str, str]:
        return {name: name for name in self.checkpoint.parameters}

    def dtype_of(self, name: str) -> str:
        return self.checkpoint.parameters[name].dtype

    def own_name(self, name: str) -> str:
        return name

    def changed_constant(self, base: Checkpoint) -> str:
        return ""

    def read_delta(self, name: str, first: int, base: Array, out: Array) -> None:
        self.checkpoint.read(name, first, out)


def sum_of(recipe: Recipe) -> Sum | None:
    """What a recipe adds up, in canonical order; None when its method must know the deltas before."""
    find = METHODS[recipe.method].as_sum
    return find([recipe.inputs[i].coefficient for i in recipe.order], **dict(recipe.options)) if find else None


def fuse_arriving(
    recipe: Recipe,
    base: Path,
    arrivals: Arrivals,
    out: Path,
    *,
    state: Path | None = None,
    settings: Settings | None = None,
    on_event: Listener | None = None,
) -> Fused:
    """Fuse inputs as they arrive, with the same files, errors and result as `hubfusion.fuse.fuse` of all of them.

    On the CPU only. An input that does not fit is refused before any is waited for; values that are not finite are
    refused when they come, and ``out`` is as it was. ``on_event`` counts the model's entries once an input and once
    more for writing.
    Raises `RecipeError` for a method that is no sum.
    """
    check_recipe(recipe)
    settings, tell = settings or Settings(), on_event or (lambda event: None)
    total = sum_of(recipe)
    if total is None or settings.device is not None:
        raise RecipeError(
            f"{recipe.method}: needs its inputs more than once, or a device; they cannot be added one by one"
        )
    refuse_same_place(out, [base, *(k for k in arrivals.known if isinstance(k, Path))])
    with open_models(base, arrivals.known) as models:
        entries = models.entries
        work = entries * len(models.sources)
        count = counter(work, lambda done, _: tell(FuseProgress(done, work + entries)))
        specs = [replace(models.base.parameters[n], dtype=models.state_dtype) for n in models.fused]
        with write_checkpoint(arrivals.room, specs, single=SUM, digest=False) as writing:
            folding = _Folding(models, total, writing, settings, models.workers(settings.workers), count)
            fused = fuse(
                replace(recipe, inputs=(Input(SUM),)),
                base,
                [_Added(folding.so_far, models.dtype is np.float64)],
                out,
                state=state,
                settings=replace(settings, norms=False),
                on_event=lambda event: tell(FuseProgress(work + event.done, work + entries)),
                prepare=lambda: folding.add_all(arrivals.batches),
            )
        norms = folding.norms if settings.norms else [None] * len(models.sources)
        seen = in_given_order(recipe, norms, [source.dropped for source in models.sources])
    return replace(fused, inputs=seen)


@dataclass(frozen=True, slots=True)
class _Folding:
    """A sum in progress; ``models`` has all inputs, known by their headers, ``norms`` those of the deltas so far."""

    models: Models
    total: Sum
    writing: Writing
    settings: Settings
    workers: int
    count: Callable[[int], None]
    norms: list[float] = field(default_factory=list)

    @property
    def so_far(self) -> Checkpoint:
        """The sum that is being written, for reading."""
        return Checkpoint(self.writing.folder, self.writing.parameters, self.writing.descriptors)

    def add_all(self, batches: Iterator[Sequence[Path]]) -> None:
        """Add every input when it comes, in canonical order."""
        for folders in batches:
            with ExitStack() as stack:
                sources = tuple(
                    stack.enter_context(open_source(f, self.models.base, self.models.backbone)) for f in folders
                )
                for source, known in zip(sources, self.models.sources[len(self.norms) :], strict=False):
                    _check_same_headers(source, known)
                self.norms.extend(self.add(replace(self.models, sources=sources), len(self.norms)))
        log.info("added up %d inputs as they came, to be fused as one", len(self.norms))

    def add(self, models: Models, first: int) -> list[float]:
        """Add ``models.sources``, of which the first is input number ``first``; return the norms of their deltas."""
        last, so_far = first + len(models.sources), self.so_far
        factors = self.total.factors[first:last]

        def start() -> Callable[[Chunk], list[float]]:
            buffer = np.empty((3, 0), models.dtype)

            def do(chunk: Chunk) -> list[float]:
                nonlocal buffer
                buffer = fitting(buffer, chunk.last - chunk.first)
                total: Array | None = None
                squares: list[float] = []
                if first:
                    total = np.empty(chunk.last - chunk.first, models.dtype)
                    so_far.read(chunk.parameter.name, chunk.first, total)

                def rows() -> Iterator[Array]:
                    for delta in models.read_rows(chunk, buffer):
                        squares.append(square(delta))
                        yield delta

                with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused by name
                    total = add_up(zip(rows(), factors, strict=True), total, owned=True)
                    if last == len(self.total.factors):
                        total = self.total.finish(total)
                squares = models.finite_squares(chunk, squares)
                self.writing.write(chunk.parameter.name, chunk.first, total)
                return squares

            return do

        entries = self.settings.chunk_entries or ROW_ENTRIES
        all_squares = []
        for chunk, squares in spread(models.chunks(entries), start, self.workers):
            all_squares.append(squares)
            self.count((chunk.last - chunk.first) * len(models.sources))
        return norms_of(all_squares)


def _check_same_headers(source: Source, known: Source) -> None:
    """Refuse an input whose file is not what its headers said, on which the sum was begun."""
    if (source.names, source.is_wide, source.dropped) != (known.names, known.is_wide, known.dropped):
        raise CheckpointError(f"{source.path}: the parameters are not those of the headers that were read before")
