"""Change files of a repository that others write to as well: read, modify, commit, and retry after a conflict."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from hubfusion.errors import Conflict, NotFound
from hubfusion.hub.protocol import Change, Hub, RepoKind
from hubfusion.lineage import Revision

TRIES = 8
FIRST_SECONDS = 0.1

Files = Mapping[str, bytes | Path]


def append(
    hub: Hub,
    repo: str,
    plan: Callable[[Revision], tuple[str, Files]],
    *,
    nonce: str,
    kind: RepoKind = RepoKind.DATASET,
    create: bool = False,
) -> str:
    """Commit what ``plan`` makes of the newest commit, on top of it; returns the sha of the head as it is now.

    ``plan`` gets the head and returns a title and the files to write; no files, no commit. When another writer was
    faster, it is asked again with the new head, after 0.1 s doubled with each race lost and drawn between half and
    one and a half of that, so that two writers do not meet again. Raises `Conflict` after 8 races lost in a row. With
    ``create`` a repository that does not exist is made.
    """
    for attempt in range(TRIES):
        try:
            head = hub.resolve(repo, kind=kind)
        except NotFound:
            if not create:
                raise
            hub.create(repo, kind)
            head = hub.resolve(repo, kind=kind)
        title, files = plan(head)
        if not files:
            return head.sha
        try:
            return hub.commit(repo, Change(title, head.sha, f"{nonce}-{attempt}", files), kind)
        except Conflict:
            if attempt + 1 < TRIES:
                time.sleep(FIRST_SECONDS * 2**attempt * random.uniform(0.5, 1.5))
    raise Conflict(f"{repo}: other writers were faster {TRIES} times in a row; nothing was written")
