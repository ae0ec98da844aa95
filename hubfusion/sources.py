"""Where the models of a recipe lie: local folders as they are, Hub ids pinned to a commit and fetched for the fuse."""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hubfusion.errors import RecipeError
from hubfusion.fusion import COMPANIONS
from hubfusion.methods import METHODS, Need
from hubfusion.outer import OUTERS, STATE_FILE
from hubfusion.recipes import MODEL_ID, FuseRecipe
from hubfusion.survey import ACTIVATIONS_FILE, FISHER_FILE
from hubfusion.weights import SINGLE

if TYPE_CHECKING:
    from hubfusion.hub import Hub
    from hubfusion.lineage import RemoteFile, Revision

WEIGHTS = re.compile(r"(model|adapter_model)\.safetensors|adapter_config\.json", re.ASCII)
SHARDED = re.compile(r"model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json", re.ASCII)
STATISTICS = {Need.FISHERS: FISHER_FILE, Need.ACTIVATIONS: ACTIVATIONS_FILE}
DOWNLOADS = 4

Tell = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Fetched:
    """A recipe with every Hub id pinned (``owner/name@sha``), and the folders in which its models lie."""

    recipe: FuseRecipe
    base: Path
    inputs: tuple[Path, ...]
    state: Path | None


@dataclass(frozen=True, slots=True)
class _Download:
    revision: Revision
    file: RemoteFile
    target: Path


@contextmanager
def fetched(recipe: FuseRecipe, endpoint: str, token: str | None, tell: Tell | None = None) -> Iterator[Fetched]:
    """Fetch what is not here, `DOWNLOADS` files at a time, and remove it when the block ends.

    Only safetensors weights, adapter configurations, the statistics that the method needs and, of the base, config,
    tokenizer and the outer optimizer's state are fetched, into a folder of their own in the system's temporary folder
    (``TMPDIR``); each file's hash is checked. ``tell`` gets the bytes done and all of them. Raises `RecipeError` for
    a name that is neither a folder nor an id, and when the files do not fit on the disk.
    """
    names = [recipe.base, *recipe.plan.labels, *([recipe.state] if recipe.state else [])]
    for name in names:
        if not Path(name).exists() and not MODEL_ID.fullmatch(name):
            raise RecipeError(f"{name}: neither a folder here nor owner/name[@revision]")
    if all(Path(n).exists() for n in names):
        yield _with_places(recipe, names, [Path(n) for n in names])
        return
    from hubfusion.hub import connect

    hub = connect(endpoint, token)
    with tempfile.TemporaryDirectory(prefix="hubfusion-") as root:
        pinned, places, downloads = _look_up(hub, recipe, names, Path(root))
        _download_all(hub, downloads, Path(root), tell)
        yield _with_places(recipe, pinned, places)


def _with_places(recipe: FuseRecipe, names: Sequence[str], places: Sequence[Path]) -> Fetched:
    inputs = len(recipe.plan.labels)
    plan = replace(recipe.plan, labels=tuple(names[1 : inputs + 1]))
    state = names[inputs + 1] if recipe.state else None
    found = replace(recipe, base=names[0], plan=plan, state=state)
    return Fetched(found, places[0], tuple(places[1 : inputs + 1]), places[-1] if recipe.state else None)


def _look_up(
    hub: Hub, recipe: FuseRecipe, names: Sequence[str], root: Path
) -> tuple[list[str], list[Path], list[_Download]]:
    """Pin every id and list what must be fetched; one commit has one folder, whatever it is needed as."""
    pinned: list[str] = []
    places: list[Path] = []
    downloads: dict[Path, _Download] = {}
    for number, name in enumerate(names):
        found = MODEL_ID.fullmatch(name)
        if Path(name).exists() or found is None:
            pinned.append(name)
            places.append(Path(name))
            continue
        revision = hub.resolve(found["repo"], found["name"] or "main")
        pinned.append(f"{revision.repo}@{revision.sha}")
        places.append(root / pinned[-1].replace("/", "@"))
        files = {file.path: file for file in hub.files(revision)}
        for path in _needed(recipe, number, set(files)):
            target = places[-1] / path
            downloads[target] = _Download(revision, files[path], target)
    return pinned, places, list(downloads.values())


def _needed(recipe: FuseRecipe, number: int, files: set[str]) -> set[str]:
    """Files of one model that this recipe reads; number 0 is the base, then the inputs, then the state's revision."""
    if number > len(recipe.plan.labels):
        return files & {STATE_FILE}
    wanted = {f for f in files if WEIGHTS.fullmatch(f) or (SINGLE not in files and SHARDED.fullmatch(f))}
    if number:
        return wanted | files & {STATISTICS.get(METHODS[recipe.plan.method].needs, "")}
    keeps_state = OUTERS[recipe.plan.outer].slots and not recipe.state
    return wanted | files & {*COMPANIONS, *([STATE_FILE] if keeps_state else [])}


def _download_all(hub: Hub, downloads: Sequence[_Download], root: Path, tell: Tell | None) -> None:
    total = sum(d.file.size for d in downloads)
    free = shutil.disk_usage(root).free
    if total > free:
        raise RecipeError(f"{root.parent}: {total} bytes to fetch, {free} are free; TMPDIR names another folder")
    done, lock, stopped = 0, threading.Lock(), threading.Event()

    def on_bytes(count: int) -> None:
        nonlocal done
        if stopped.is_set():
            raise InterruptedError("another download failed")
        with lock:
            done = min(total, done + count)
            if tell:
                tell(done, total)

    def fetch(one: _Download) -> None:
        one.target.parent.mkdir(parents=True, exist_ok=True)
        hub.download(one.revision, one.file, one.target, on_bytes=on_bytes)

    with ThreadPoolExecutor(DOWNLOADS) as pool:
        try:
            jobs = [pool.submit(fetch, one) for one in downloads]
            for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
                job.result()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
