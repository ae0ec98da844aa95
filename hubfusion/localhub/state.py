"""Everything one running Hub holds together; endpoints reach all of it through their call."""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hubfusion.errors import HubError
from hubfusion.localhub.accounts import Accounts, Limits, Seal
from hubfusion.localhub.jobs import Jobs
from hubfusion.localhub.store.database import Database
from hubfusion.localhub.store.objects import ObjectStore
from hubfusion.localhub.store.recent import Recent
from hubfusion.localhub.store.repos import Repos
from hubfusion.localhub.xet import XorbStore


@dataclass(frozen=True, slots=True)
class Rules:
    """What this Hub allows: bytes of one object, requests in 5 minutes, multipart sizes, and whether jobs run."""

    object_bytes: int = 50 << 30
    requests: int = 1_000_000
    multipart_from: int = 1 << 30
    part_bytes: int = 256 << 20
    allow_jobs: bool = False


class Hub:
    """A store directory, opened: its accounts, repositories, objects and settings.

    One process at a time: the directory is locked, a second one is refused with `HubError`.
    """

    def __init__(
        self,
        directory: Path,
        users: Mapping[str, str],
        orgs: Mapping[str, Sequence[str]] | None = None,
        rules: Rules | None = None,
    ) -> None:
        self.directory = directory.resolve()
        self.rules = rules or Rules()
        self.accounts = Accounts(users, orgs or {})
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = _lock_directory(self.directory)
        self.db = Database(self.directory / "hub.sqlite")
        self.store_id = self.db.meta("store", secrets.token_hex(16))
        self.seal = Seal(self.db.meta("secret", secrets.token_hex(32)))
        self.limits = Limits(self.rules.requests)
        self.objects = ObjectStore(self.directory / "objects", self.directory / "incoming")
        self.xorbs = XorbStore(self.directory / "xorbs")
        self.repos = Repos(self.db, self.directory / "git")
        self.facts: Recent[tuple[int, str], dict[str, Any]] = Recent(
            2_000_000, lambda facts: 20 + len(facts["siblings"])
        )
        self.jobs = Jobs(self.directory, self.db, self.rules.allow_jobs)
        self.endpoint = ""
        self.outbox = threading.Event()
        self.tasks = ThreadPoolExecutor(1, thread_name_prefix="localhub")

    def close(self) -> None:
        """Let go of the directory."""
        self.jobs.stop()
        self.tasks.shutdown(cancel_futures=True)
        self.db.close()
        self._lock.close()


def _lock_directory(directory: Path) -> IO[str]:
    lock = (directory / "lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise HubError(f"{directory}: another Hub serves this directory") from None
    os.set_inheritable(lock.fileno(), False)
    return lock
