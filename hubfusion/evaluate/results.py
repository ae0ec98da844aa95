"""Results on the Hub: a dataset repository (it may be the ranking's) with one file for each measured unit.

The layout is that of a local store, under ``results/``. File names are digests of model, data, recipe and seed, so two
writers can only write the same file. Results are trusted: whoever may write to the repository can change them.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from hubfusion.codec import dumps
from hubfusion.errors import HubError, NotFound
from hubfusion.evaluate.units import Evaluated, Result, Unit, parse_result, path_of, read_result, write_result
from hubfusion.hub import Files, Hub, RepoKind, append
from hubfusion.lineage import Revision

log = logging.getLogger(__name__)

FOLDER = "results"
MAX_BYTES = 1 << 20


def _path(unit: Unit) -> str:
    return f"{FOLDER}/{path_of(unit)}"


def fetch_results(hub: Hub, head: Revision, units: Sequence[Unit]) -> Iterator[tuple[Unit, Result]]:
    """Those of ``units`` that the repository has at ``head``, with their results."""
    there = hub.present(head, [_path(u) for u in units], RepoKind.DATASET)

    def read(unit: Unit) -> tuple[Unit, Result]:
        data = hub.read(head, _path(unit), stop=MAX_BYTES, kind=RepoKind.DATASET)
        return unit, parse_result(unit, data, f"{head} {_path(unit)}")

    with ThreadPoolExecutor(8) as pool:
        yield from pool.map(read, [u for u in units if _path(u) in there])


def pull(hub: Hub, repo: str, units: Sequence[Unit], store: Path) -> int:
    """Copy to the store what it lacks and the Hub has; returns how many. No repository is an empty one."""
    missing = [u for u in units if read_result(store, u) is None]
    if not missing:
        return 0
    try:
        head = hub.resolve(repo, kind=RepoKind.DATASET)
    except NotFound:
        return 0
    count = 0
    for unit, result in fetch_results(hub, head, missing):
        write_result(store, unit, result)
        count += 1
    log.info("results: %d of %d missing units read from %s", count, len(missing), head)
    return count


def push(hub: Hub, repo: str, units: Sequence[Unit], store: Path) -> int:
    """Commit, at once, what the store has and the Hub lacks; returns how many. Makes the repository if there is none.

    Raises `Conflict` after 8 races lost in a row, `Forbidden` without the right to write.
    """
    known = {_path(u): dumps(r).encode() for u in units if (r := read_result(store, u)) is not None}
    if not known:
        return 0
    new: dict[str, bytes] = {}

    def plan(head: Revision) -> tuple[str, Files]:
        nonlocal new
        there = hub.present(head, list(known), RepoKind.DATASET)
        new = {path: data for path, data in known.items() if path not in there}
        return f"{len(new)} results of {units[0].model}", new

    append(hub, repo, plan, nonce=secrets.token_hex(8), create=True)
    if new:
        log.info("results: %d written to %s", len(new), repo)
    return len(new)


@contextmanager
def shared(
    hub: Hub, repo: str, units: Sequence[Unit], store: Path, every: float
) -> Iterator[Callable[[Evaluated], None]]:
    """`pull` at the start, `push` at the end, even of a run that fails; the callback in between takes its events.

    After ``every`` seconds with something new it pushes as well; a Hub that does not take it then is asked again later.
    """
    pull(hub, repo, units, store)
    pushed = time.monotonic()

    def note(event: Evaluated) -> None:
        nonlocal pushed
        if not event.stored and time.monotonic() - pushed >= every:
            pushed = time.monotonic()
            try:
                push(hub, repo, units, store)
            except HubError as error:
                log.warning("results: not written yet: %s", error)

    try:
        yield note
    finally:
        push(hub, repo, units, store)
