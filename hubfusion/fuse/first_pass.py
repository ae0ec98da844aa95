"""First passes of a fuse: statistics over all deltas that a method needs before it processes a chunk.

Each pass reads the models in chunks of a fixed size, so its results do not depend on how the fuse is run. It returns a
function from a chunk to the keyword arguments of the method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from hubfusion.checkpoint import Array, Checkpoint, Parameter, open_checkpoint
from hubfusion.checkpoint.deltas import ROW_ENTRIES, SMALLEST_CHUNK, Chunk, LoadedChunk, Models, fitting
from hubfusion.errors import CheckpointError
from hubfusion.fuse.methods import METHODS, Need, sparse
from hubfusion.fuse.methods.draws import draw_rows
from hubfusion.fuse.selection import MAX_HELD, Rows, nth_largest, select
from hubfusion.parallel import spread

STREAM_ENTRIES = 1 << 16
SAMPLE_ENTRIES = 1 << 10
SMALLEST_SAMPLE = 1 << 14
SMALL_GEMM = 1 << 17  # multiplications; for larger products the BLAS library would start threads of its own
FISHER_FILE, ACTIVATIONS_FILE = "fisher.safetensors", "regmean.safetensors"

Options = Mapping[str, Any]
Keywords = Callable[[LoadedChunk], dict[str, Any]]


def survey(method: str, options: Options, models: Models, stack: ExitStack, workers: int) -> Keywords:
    """Return the statistics keywords of ``method`` for each chunk; ``stack`` closes the files that it opens."""
    spec = METHODS[method]
    options = {**spec.options, **options}
    find = SURVEYS[spec.needs]
    return find(options, models, stack, workers)


def _nothing(options: Options, models: Models, stack: ExitStack, workers: int) -> Keywords:
    return lambda loaded: {}


def _norms(options: Options, models: Models, stack: ExitStack, workers: int) -> Keywords:
    if options["norm"] == "keep":
        return lambda loaded: {}
    squares = np.sum([np.diag(gram)[1:] for gram in grams(models, workers).values()], axis=0)
    norms = np.sqrt(squares).tolist()
    return lambda loaded: {"norms": norms}


def _gram(options: Options, models: Models, stack: ExitStack, workers: int) -> Keywords:
    each = {name: gram[1:, 1:] for name, gram in grams(models, workers).items()}
    if options.get("scope", "model") == "parameter":
        return lambda loaded: {"gram": each[loaded.chunk.parameter.name]}
    whole = np.sum(list(each.values()), axis=0)
    return lambda loaded: {"gram": whole}


def _sphere(options: Options, models: Models, stack: ExitStack, workers: int) -> Keywords:
    each = grams(models, workers)
    if options["space"] == "deltas":
        return lambda loaded: {"gram": each[loaded.chunk.parameter.name][1:, 1:]}
    whole = {n: g[:1, :1] + g[:1, 1:] + g[1:, :1] + g[1:, 1:] for n, g in each.items()}
    return lambda loaded: {"gram": whole[loaded.chunk.parameter.name], "base": loaded.base.reshape(loaded.chunk.shape)}


def grams(models: Models, workers: int) -> dict[str, Array]:
    """Inner products of the base and the k deltas, a parameter at a time: name to (k + 1, k + 1) in float64.

    Sums are float64 over fixed chunks, in a fixed order: the same bits for any number of workers.
    """
    rows = len(models.sources) + 1
    step = max(1, SMALL_GEMM // rows**2)
    entries = max(SMALLEST_CHUNK, models.chunk_entries() // 2)  # they are held in float64, too

    def start() -> Callable[[tuple[int, Chunk]], Array]:
        buffer = np.empty((rows, entries), models.dtype)
        wide = np.empty((rows, entries), np.float64)

        def do(job: tuple[int, Chunk]) -> Array:
            chunk = job[1]
            size = chunk.last - chunk.first
            models.read(chunk, buffer)
            wide[:, :size] = buffer[:, :size]
            whole = size - size % step
            parts = wide[:, :whole].reshape(rows, -1, step).swapaxes(0, 1)
            tail = wide[:, whole:size]
            total: Array = np.matmul(parts, parts.swapaxes(1, 2)).sum(axis=0) + tail @ tail.T
            if not np.isfinite(total).all():
                models.refuse_not_finite(LoadedChunk(chunk, buffer[0, :size], buffer[1:, :size]))
            return total

        return do

    totals: dict[str, Array] = {name: np.zeros((rows, rows)) for name in models.fused}
    early: dict[int, tuple[str, Array]] = {}  # what came before its turn
    turn = 0
    for (number, chunk), gram in spread(enumerate(models.chunks(entries)), start, workers):
        early[number] = (chunk.parameter.name, gram)
        while turn in early:
            name, gram = early.pop(turn)
            totals[name] += gram
            turn += 1
    return totals


def _draws(options: Options, models: Models, stack: ExitStack, workers: int) -> Keywords:
    seed, rows = options["seed"], len(models.sources)

    def find(loaded: LoadedChunk) -> dict[str, Any]:
        chunk = loaded.chunk
        return {"draws": draw_rows(seed, rows, chunk.parameter.name, chunk.first, chunk.shape)}

    return find


def _thresholds(options: Options, models: Models, stack: ExitStack, workers: int) -> Keywords:
    if options["scope"] == "parameter":
        ranks = {n: [sparse.kept_count(options["density"], models.base.parameters[n].entries)] for n in models.fused}
        ranked = _ranked_each(models, ranks, workers)
        return lambda loaded: {"thresholds": ranked[loaded.chunk.parameter.name][:, 0].tolist()}
    entries = models.entries
    rank = sparse.kept_count(options["density"], entries)

    def start() -> Callable[[int], float]:
        return lambda row: nth_largest(_magnitudes(models, row, models.fused), entries, rank, models.dtype)

    whole = [threshold for _, threshold in sorted(spread(range(len(models.sources)), start, workers))]
    return lambda loaded: {"thresholds": whole}


def _bands(options: Options, models: Models, stack: ExitStack, workers: int) -> Keywords:
    density, gamma = options["density"], options["gamma"]
    sparse.check_band(density, gamma)
    ranks = {n: [*sparse.band_ranks(density, gamma, models.base.parameters[n].entries)] for n in models.fused}
    ranked = _ranked_each(models, ranks, workers)
    return lambda loaded: {"bands": ranked[loaded.chunk.parameter.name][:, ::-1].tolist()}


def _ranked_each(models: Models, ranks: Mapping[str, list[int]], workers: int) -> dict[str, Array]:
    """Exact order statistics of |δ| of each parameter and input: name to (k, ranks)."""

    def start() -> Callable[[tuple[str, int]], Any]:
        def do(job: tuple[str, int]) -> Any:
            name, row = job
            entries = models.base.parameters[name].entries
            stream = _magnitudes(models, row, (name,))
            if entries <= STREAM_ENTRIES * 16:
                values = np.concatenate([part.copy() for part in stream(1)])
                places = [entries - rank for rank in ranks[name]]
                return np.partition(values, places)[places]
            return [nth_largest(stream, entries, rank, models.dtype) for rank in ranks[name]]

        return do

    jobs = [(name, row) for name in ranks if models.base.parameters[name].entries for row in range(len(models.sources))]
    ranked = {name: np.zeros((len(models.sources), len(wanted))) for name, wanted in ranks.items()}
    for (name, row), values in spread(jobs, start, workers):
        ranked[name][row] = values
    return ranked


def _magnitudes(models: Models, row: int, names: tuple[str, ...]) -> Callable[[int], Iterator[Array]]:
    """Stream |δ| of one input over some parameters; every n-th small chunk for a sample."""

    def stream(every: int) -> Iterator[Array]:
        buffer = np.empty((2, ROW_ENTRIES), models.dtype)
        source = models.sources[row]
        for chunk in sampled(models, names, every):
            size = chunk.last - chunk.first
            base, out = buffer[0, :size], buffer[1, :size]
            models.base.read(chunk.parameter.name, chunk.first, base)
            source.read_delta(chunk.parameter.name, chunk.first, base, out)
            np.abs(out, out=out)
            if not math.isfinite(float(np.max(out))):
                models.refuse_not_finite(LoadedChunk(chunk, base, out[None]), (source,))
            yield out

    return stream


def sampled(models: Models, names: tuple[str, ...], every: int) -> Iterator[Chunk]:
    """Chunks that cover some parameters, or about one in ``every`` of their entries in small chunks."""
    if every == 1:
        yield from models.chunks(ROW_ENTRIES, names=names)
        return
    step, start = SAMPLE_ENTRIES * every, 0
    for name in names:
        spec = models.base.parameters[name]
        for first in range(start, spec.entries, step):
            yield Chunk(spec, first, min(first + SAMPLE_ENTRIES, spec.entries))
        start = -(spec.entries - start) % step


def _selection(options: Options, models: Models, stack: ExitStack, workers: int) -> Keywords:
    def start() -> Callable[[str], dict[str, Any]]:
        def do(name: str) -> dict[str, Any]:
            entries = models.base.parameters[name].entries
            rank = sparse.kept_count(options["density"], entries)
            max_held = max(SMALLEST_SAMPLE, 2 * MAX_HELD // (len(models.sources) + 1))
            sample = max(SMALLEST_SAMPLE, entries // 64)
            threshold, energies = select(_variances(models, name), entries, rank, models.dtype, max_held, sample)
            return {"threshold": threshold, "energies": energies}

        return do

    selected = dict(spread([n for n in models.fused if models.base.parameters[n].entries], start, workers))
    return lambda loaded: selected[loaded.chunk.parameter.name]


def _variances(models: Models, name: str) -> Rows:
    """Stream the variance of each entry over the deltas, with the deltas."""

    def stream(every: int) -> Iterator[tuple[Array, Array]]:
        for loaded in _loaded(models, (name,), every):
            with np.errstate(over="ignore", invalid="ignore"):
                spread = sparse.variance(loaded.deltas)
            if not np.isfinite(spread).all():
                models.refuse_not_finite(loaded)
                raise CheckpointError(f"{name}: the variance over the deltas is too large for {models.dtype.__name__}")
            yield spread, loaded.deltas

    return stream


def _loaded(models: Models, names: tuple[str, ...], every: int) -> Iterator[LoadedChunk]:
    buffer = np.empty((len(models.sources) + 1, 0), models.dtype)
    chunks = models.chunks(models.chunk_entries(), names=names) if every == 1 else sampled(models, names, every)
    for chunk in chunks:
        buffer = fitting(buffer, chunk.last - chunk.first)
        yield models.read(chunk, buffer)


def _fishers(options: Options, models: Models, stack: ExitStack, workers: int) -> Keywords:
    files = [stack.enter_context(open_checkpoint(s.path, FISHER_FILE)) for s in models.sources]
    names = [_own_names(models, row, file, required=True) for row, file in enumerate(files)]

    def find(loaded: LoadedChunk) -> dict[str, Any]:
        chunk = loaded.chunk
        fishers = np.empty((len(files), chunk.last - chunk.first), models.dtype)
        for row, file in enumerate(files):
            own = names[row][chunk.parameter.name]
            file.read(own, chunk.first, fishers[row])
            if not (fishers[row] >= 0).all():
                raise CheckpointError(f"{file.path}: {own}: Fisher information must be at least 0 and finite")
        return {"fishers": fishers.reshape(-1, *chunk.shape)}

    return find


def _activations(options: Options, models: Models, stack: ExitStack, workers: int) -> Keywords:
    files = [stack.enter_context(open_checkpoint(s.path, ACTIVATIONS_FILE)) for s in models.sources]
    names = [_own_names(models, row, file, required=False) for row, file in enumerate(files)]

    def find(loaded: LoadedChunk) -> dict[str, Any]:
        name, shape = loaded.chunk.parameter.name, loaded.chunk.parameter.shape
        if not all(name in own for own in names):
            return {}
        specs = [file.parameters[own[name]] for file, own in zip(files, names, strict=True)]
        for spec in specs:
            if len(shape) != 2 or spec.shape != (shape[1], shape[1]):
                raise CheckpointError(
                    f"{spec.file}: {spec.name}: shape {list(spec.shape)}, a linear layer of shape {list(shape)} needs "
                    f"{[shape[-1]] * 2}"
                )
        return {"activations": map(_read_whole, files, specs)}

    return find


def _read_whole(file: Checkpoint, spec: Parameter) -> Array:
    values = np.empty(spec.entries, np.float64)
    file.read(spec.name, 0, values)
    return values.reshape(spec.shape)


def _own_names(models: Models, row: int, file: Checkpoint, *, required: bool) -> dict[str, str]:
    """Base name to the name in an input's statistics file, which uses the input's own names or the base's."""
    source = models.sources[row]
    names = {}
    for name in models.fused:
        own = next((n for n in (source.names[name], name) if n in file.parameters), None)
        if own is None and required:
            raise CheckpointError(f"{file.path}: {source.names[name]} is missing; every fused parameter is needed")
        if own is not None:
            if required and file.parameters[own].shape != models.base.parameters[name].shape:
                raise CheckpointError(
                    f"{file.path}: {own}: shape {list(file.parameters[own].shape)}, the base has "
                    f"{list(models.base.parameters[name].shape)}"
                )
            names[name] = own
    return names


SURVEYS: Mapping[Need, Callable[[Options, Models, ExitStack, int], Keywords]] = {
    Need.NOTHING: _nothing,
    Need.NORMS: _norms,
    Need.GRAM: _gram,
    Need.SPHERE: _sphere,
    Need.DRAWS: _draws,
    Need.THRESHOLDS: _thresholds,
    Need.BANDS: _bands,
    Need.SELECTION: _selection,
    Need.FISHERS: _fishers,
    Need.ACTIVATIONS: _activations,
}
