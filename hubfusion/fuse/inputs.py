"""Find the models of a recipe: local folders are used as they are, Hub ids are pinned to a commit and downloaded."""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from hubfusion.checkpoint import INDEX, MAX_INDEX_BYTES, SINGLE, Array, Checkpoint, Parameter, adapters
from hubfusion.checkpoint.backbone import MODULE_FILE
from hubfusion.checkpoint.headers import parse_index, read_header
from hubfusion.errors import CheckpointError, RecipeError
from hubfusion.fuse.first_pass import ACTIVATIONS_FILE, FISHER_FILE
from hubfusion.fuse.folder import COMPANIONS
from hubfusion.fuse.methods import METHODS, Need
from hubfusion.fuse.outer import OUTERS, STATE_FILE
from hubfusion.fuse.recipe import MODEL_ID
from hubfusion.parallel import counter

if TYPE_CHECKING:
    from hubfusion.fuse.incremental import Arrivals
    from hubfusion.hub import Hub
    from hubfusion.lineage import Recipe, RemoteFile, Revision

WEIGHTS = re.compile(r"(model|adapter_model)\.safetensors|adapter_config\.json", re.ASCII)
SHARDED = re.compile(r"model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json", re.ASCII)
STATISTICS = {Need.FISHERS: FISHER_FILE, Need.ACTIVATIONS: ACTIVATIONS_FILE}
DOWNLOADS = 4
IN_FLIGHT = 4
HEADER_GUESS = 64 << 10

Tell = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Fetched:
    """A recipe with every Hub id pinned (``owner/name@sha``), and the folders in which its models lie.

    With ``arrivals`` not all ``inputs`` are there: `hubfusion.fuse.incremental.fuse_arriving` takes them as they come.
    """

    recipe: Recipe
    base: Path
    inputs: tuple[Path, ...]
    state: Path | None
    arrivals: Arrivals | None = None


@dataclass(frozen=True, slots=True)
class _ModelFolder:
    """A model by its pinned name (or the name of its folder), and the folder in which it lies."""

    pinned: str
    folder: Path


@dataclass(frozen=True, slots=True)
class _Download:
    revision: Revision
    file: RemoteFile
    target: Path


@contextmanager
def fetched(
    recipe: Recipe, endpoint: str, token: str | None, tell: Tell | None = None, *, once: bool = False
) -> Iterator[Fetched]:
    """Fetch what is not here, `DOWNLOADS` files at a time, and remove it when the block ends.

    Only safetensors weights, adapter configurations, the statistics that the method needs and, of the base, config,
    tokenizer and the outer optimizer's state are fetched, into a folder of their own in the system's temporary folder
    (``TMPDIR``); each file's hash is checked. ``tell`` gets the bytes done and all of them. Raises `RecipeError` for
    a name that is neither a folder nor an id, and when the files do not fit on the disk.

    With ``once`` (nothing but the fuse, on the CPU, reads the inputs) and a method that just adds them up, inputs come
    during the fuse, `IN_FLIGHT` of them on the disk at a time, where that takes less of it.
    """
    names = [recipe.base, *(each.model for each in recipe.inputs), *([recipe.state] if recipe.state else [])]
    for name in names:
        if not Path(name).exists() and not MODEL_ID.fullmatch(name):
            raise RecipeError(f"{name}: neither a folder here nor owner/name[@revision]")
    if all(Path(n).exists() for n in names):
        yield _with_folders(recipe, {name: _ModelFolder(name, Path(name)) for name in names})
        return
    from hubfusion.fuse.incremental import Arrivals  # only here: a fuse of folders must not pay for the import
    from hubfusion.hub import connect

    hub = connect(endpoint, token)
    with tempfile.TemporaryDirectory(prefix="hubfusion-") as temporary, ThreadPoolExecutor(DOWNLOADS) as pool:
        root = Path(temporary)
        models, downloads = _look_up(hub, pool, recipe, names, root)
        result = _with_folders(recipe, models)
        uses = Counter(models[name].folder for name in names)
        known = _later(hub, pool, result, uses, downloads) if once else {}
        first = [d for folder, some in downloads.items() if folder not in known for d in some]
        coming = {folder: downloads[folder] for folder in known}
        _check_room(root, _size(first) + (_sum_bytes(known) + _held(coming) if coming else 0))
        with _downloading(hub, pool, counter(sum(map(_size, downloads.values())), tell)) as submit:
            jobs = submit(first)
            if coming:
                order = [result.inputs[i] for i in result.recipe.order]
                batches = _arrive(submit, order, coming)
                result = replace(result, arrivals=Arrivals(tuple(known.get(p, p) for p in order), batches, root))
            for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
                job.result()
            yield result


def _with_folders(recipe: Recipe, models: Mapping[str, _ModelFolder]) -> Fetched:
    """The recipe with every model pinned, and its folders; ``models`` are by the model's name in the recipe."""
    inputs = tuple(replace(each, model=models[each.model].pinned) for each in recipe.inputs)
    state = models[recipe.state] if recipe.state else None
    pinned = replace(
        recipe, base=models[recipe.base].pinned, inputs=inputs, state=state.pinned if state else recipe.state
    )
    folders = tuple(models[each.model].folder for each in recipe.inputs)
    return Fetched(pinned, models[recipe.base].folder, folders, state.folder if state else None)


def _look_up(
    hub: Hub, pool: Executor, recipe: Recipe, names: Sequence[str], root: Path
) -> tuple[dict[str, _ModelFolder], dict[Path, list[_Download]]]:
    """Pin every id and list what must be fetched, by folder; one commit has one folder, whatever it is needed as."""

    def ask(name: str) -> tuple[Revision, dict[str, RemoteFile]] | None:
        matched = MODEL_ID.fullmatch(name)
        if Path(name).exists() or matched is None:
            return None
        revision = hub.resolve(matched["repo"], matched["name"] or "main")
        return revision, {file.path: file for file in hub.files(revision)}

    models: dict[str, _ModelFolder] = {}
    downloads: dict[Path, dict[str, _Download]] = {}
    # The base's in this thread: what a first request imports is not imported in several, where a signal may lock them.
    answers = chain([ask(names[0])], pool.map(ask, names[1:]))
    for number, (name, answer) in enumerate(zip(names, answers, strict=True)):
        if answer is None:
            models[name] = _ModelFolder(name, Path(name))
            continue
        revision, files = answer
        folder = root / revision.pinned.replace("/", "@")
        models[name] = _ModelFolder(revision.pinned, folder)
        wanted = downloads.setdefault(folder, {})
        for path in _needed(recipe, number, set(files)):
            wanted[path] = _Download(revision, files[path], folder / path)
    return models, {folder: list(wanted.values()) for folder, wanted in downloads.items()}


def _needed(recipe: Recipe, number: int, files: set[str]) -> set[str]:
    """Files of one model that this recipe reads; number 0 is the base, then the inputs, then the state's revision."""
    if number > len(recipe.inputs):
        return files & {STATE_FILE}
    wanted = {f for f in files if WEIGHTS.fullmatch(f) or (SINGLE not in files and SHARDED.fullmatch(f))}
    if number:
        return wanted | files & {STATISTICS.get(METHODS[recipe.method].needs, "")}
    keeps_state = OUTERS[recipe.outer].slots and not recipe.state
    wanted |= {f for f in files if MODULE_FILE.fullmatch(f)}
    return wanted | files & {*COMPANIONS, *([STATE_FILE] if keeps_state else [])}


def _size(downloads: Sequence[_Download]) -> int:
    return sum(d.file.size for d in downloads)


def _check_room(root: Path, wanted: int) -> None:
    free = shutil.disk_usage(root).free
    if wanted > free:
        raise RecipeError(f"{root.parent}: {wanted} bytes are needed, {free} are free; TMPDIR names another folder")


Submit = Callable[[Sequence[_Download]], list[Future[None]]]


@contextmanager
def _downloading(hub: Hub, pool: Executor, on_bytes: Callable[[int], None]) -> Iterator[Submit]:
    """Give a function that starts downloads; those that are not done when the block ends are stopped."""
    stopped = threading.Event()

    def count(length: int) -> None:
        if stopped.is_set():
            raise InterruptedError("another download failed")
        on_bytes(length)

    def fetch(one: _Download) -> None:
        one.target.parent.mkdir(parents=True, exist_ok=True)
        hub.download(one.revision, one.file, one.target, on_bytes=count)

    def submit(downloads: Sequence[_Download]) -> list[Future[None]]:
        return [pool.submit(fetch, one) for one in downloads]

    try:
        yield submit
    finally:
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)


# ------------------------------------------------------------------------------- inputs that come during the fuse
@dataclass(frozen=True, slots=True)
class _Remote(Checkpoint):
    """A checkpoint on the Hub of which the headers are known; what else is asked for is read from there."""

    hub: Hub
    revision: Revision

    def _read_raw(self, spec: Parameter, first: int, out: Array) -> None:
        view, start = memoryview(out.data).cast("B"), spec.start + first
        body = self.hub.read(self.revision, spec.file.name, start=start, stop=start + len(view)) if view else b""
        if len(body) != len(view):
            raise CheckpointError(f"{spec.file}: {spec.name}: cut off at byte {start + len(body)} while being read")
        view[:] = body


def _read_headers(hub: Hub, downloads: Sequence[_Download]) -> _Remote | None:
    """Read the headers of one input; None when only its whole files can say what it is, or what is wrong with it."""
    files = {d.file.path: d for d in downloads}
    if adapters.CONFIG in files or not files.keys() & {SINGLE, INDEX}:
        return None
    start = files.get(SINGLE) or files[INDEX]
    folder, parameters, listed = start.target.parent, dict[str, Parameter](), dict[str, str]()
    try:
        if SINGLE not in files:
            text = hub.read(start.revision, INDEX, stop=min(start.file.size, MAX_INDEX_BYTES))
            listed = parse_index(text, {path: d.file.size for path, d in files.items()}, str(start.target))
        for name in sorted(set(listed.values())) or [SINGLE]:
            size, where = files[name].file.size, str(files[name].target)
            read = partial(_read_range, hub, start.revision, name)
            for spec in read_header(read, size, where, guess=HEADER_GUESS)[0].tensors.values():
                parameters[spec.name] = Parameter(spec.name, spec.dtype, spec.shape, folder / name, spec.start)
    except CheckpointError:
        return None
    if listed and listed != {name: spec.file.name for name, spec in parameters.items()}:
        return None
    return _Remote(folder, dict(sorted(parameters.items())), {}, hub, start.revision)


def _read_range(hub: Hub, revision: Revision, name: str, start: int, stop: int) -> bytes:
    return hub.read(revision, name, start=start, stop=stop)


def _later(
    hub: Hub,
    pool: Executor,
    models: Fetched,
    uses: Mapping[Path, int],
    downloads: Mapping[Path, list[_Download]],
) -> dict[Path, _Remote]:
    """The headers of those inputs that may come during the fuse; none unless that takes a tenth less room.

    An input that is also the base, or there twice, comes before the fuse, as an adapter does.
    """
    from hubfusion.fuse.incremental import sum_of

    some = [p for p in models.inputs if p in downloads and uses[p] == 1]
    if len(some) <= IN_FLIGHT or sum_of(models.recipe) is None:
        return {}
    read = pool.map(lambda folder: (folder, _read_headers(hub, downloads[folder])), some)
    known = {folder: remote for folder, remote in read if remote}
    coming = {folder: downloads[folder] for folder in known}
    together = sum(map(_size, coming.values()))
    return known if _held(coming) + _sum_bytes(known) < 0.9 * together else {}


def _held(coming: Mapping[Path, Sequence[_Download]]) -> int:
    """Bytes that are on the disk at a time, at most, of inputs that come during the fuse."""
    return sum(sorted(map(_size, coming.values()))[-IN_FLIGHT:])


def _sum_bytes(known: Mapping[Path, Checkpoint]) -> int:
    """Bytes of the sum, at most: it has no parameter that some input lacks."""
    specs = [list(remote.parameters.values()) for remote in known.values()]
    item = 8 if any(p.dtype == "F64" for some in specs for p in some) else 4
    return min((item * sum(p.entries for p in some if p.is_float) for some in specs), default=0)


def _arrive(submit: Submit, order: Sequence[Path], coming: Mapping[Path, list[_Download]]) -> Iterator[list[Path]]:
    """Begin to fetch, and iterate over the folders in ``order`` when they are whole: one at least, all that are.

    Those that are ``coming`` are removed, and others begun, when more are asked for.
    """
    rest, begun = deque(order), deque[tuple[Path, list[Future[None]]]]()

    def begin() -> None:
        while rest and (rest[0] not in coming or sum(folder in coming for folder, _ in begun) < IN_FLIGHT):
            folder = rest.popleft()
            begun.append((folder, submit(coming.get(folder, ()))))

    def batches() -> Iterator[list[Path]]:
        while begun:
            batch: list[Path] = []
            while begun and (not batch or all(job.done() for job in begun[0][1])):
                folder, jobs = begun.popleft()
                for job in jobs:
                    job.result()
                batch.append(folder)
            yield batch
            for folder in set(batch) & set(coming):
                shutil.rmtree(folder)
            begin()

    begin()
    return batches()
