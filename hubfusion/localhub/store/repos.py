"""The repositories: a row in the database each, and a bare git repository named by the row's number.

The row is what makes a repository exist. It is written after the git directory and removed before it, and moving is a
change of the row alone; what a killed process left behind is swept at the next start.
"""

from __future__ import annotations

import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from hubfusion.localhub.refusal import Refusal
from hubfusion.localhub.store.database import Database
from hubfusion.localhub.store.git import NOTHING, GitRepo, Put, Signature, Snapshot, init_bare
from hubfusion.localhub.store.gitattributes import INITIAL
from hubfusion.localhub.store.recent import Recent

MAIN = "refs/heads/main"
_TEMPLATE = "empty.git"


class Kind(StrEnum):
    """The kinds of repository this Hub serves."""

    MODEL = "model"
    DATASET = "dataset"
    SPACE = "space"

    @property
    def plural(self) -> str:
        """As it stands in paths below /api."""
        return f"{self}s"

    @property
    def prefix(self) -> str:
        """As it stands before the name in web paths."""
        return "" if self is Kind.MODEL else f"{self}s/"


@dataclass(frozen=True, slots=True)
class Repo:
    """One repository as the database knows it; `gated` is "", "auto" or "manual"; times in seconds since 1970."""

    number: int
    kind: Kind
    namespace: str
    name: str
    private: bool
    gated: str
    sdk: str
    creator: str
    created: float
    modified: float

    @property
    def id(self) -> str:
        """namespace/name."""
        return f"{self.namespace}/{self.name}"


class Repos:
    """All repositories of a store, and the lock of each."""

    def __init__(self, db: Database, root: Path) -> None:
        self._db = db
        self._root = root
        self._snapshots: Recent[tuple[str, str], Snapshot] = Recent(500_000, lambda snapshot: len(snapshot.files))
        self._guard = threading.Lock()
        self._naming = threading.Lock()
        self._locks: dict[int, threading.RLock] = {}
        root.mkdir(parents=True, exist_ok=True)
        self._sweep()
        rows = db.rows("SELECT * FROM repos")
        self._by_number = {row["number"]: _repo(row) for row in rows}
        self._by_name = {_key(repo.kind, repo.namespace, repo.name): repo for repo in self._by_number.values()}

    def _sweep(self) -> None:
        known = {f"{row['number']}.git" for row in self._db.rows("SELECT number FROM repos")}
        init_bare(self._root / _TEMPLATE)
        for path in self._root.iterdir():
            if path.name == _TEMPLATE:
                continue
            if path.name not in known:
                shutil.rmtree(path)
                continue
            # A killed git leaves its lock files behind; nobody else writes here.
            for lock in [*path.glob("*.lock"), *(path / "refs").rglob("*.lock")]:
                lock.unlink(missing_ok=True)

    def git(self, repo: Repo) -> GitRepo:
        """The git side of a repository."""
        return GitRepo(self._root / f"{repo.number}.git", self._snapshots)

    def find(self, kind: Kind, namespace: str, name: str) -> Repo | None:
        """The repository of this name (letters of either case), or None."""
        return self._by_name.get(_key(kind, namespace, name))

    def moved_to(self, kind: Kind, namespace: str, name: str) -> Repo | None:
        """The repository that once had this name, if it was moved away."""
        row = self._db.row(
            "SELECT repo FROM redirects WHERE kind = ? AND namespace = ? AND name = ?", kind, namespace, name
        )
        return self._by_number.get(row["repo"]) if row else None

    def all(self, kind: Kind | None = None) -> list[Repo]:
        """All repositories, optionally of one kind, in the order they were made."""
        return [repo for repo in list(self._by_number.values()) if kind is None or repo.kind is kind]

    @contextmanager
    def writing(self, repo: Repo) -> Iterator[Repo]:
        """Hold the repository's lock; yields it as it is now, refuses when it is gone meanwhile."""
        with self._guard:
            lock = self._locks.setdefault(repo.number, threading.RLock())
        with lock:
            current = self._by_number.get(repo.number)
            if current is None:
                raise Refusal(404, "Repository not found")
            yield current

    def create(self, kind: Kind, namespace: str, name: str, creator: str, private: bool, sdk: str) -> Repo:
        """A new repository with one commit that holds `.gitattributes`; 409 when the name is taken."""
        now = time.time()
        with self._naming:
            if self.find(kind, namespace, name):
                raise _taken(kind)
            with self._db.write() as connection:
                # Numbers are never used twice: a deleted repository's leftovers cannot come back to life.
                connection.execute("INSERT OR IGNORE INTO meta VALUES ('number', '0')")
                connection.execute("UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE key = 'number'")
                number = int(connection.execute("SELECT value FROM meta WHERE key = 'number'").fetchone()[0])
            repo = Repo(number, kind, namespace, name, private, "", sdk, creator, now, now)
            self._found(repo, now)
            with self._db.write() as connection:
                connection.execute(
                    "INSERT INTO repos VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (number, kind, namespace, name, private, "", sdk, creator, now, now),
                )
                connection.execute(
                    "DELETE FROM redirects WHERE kind = ? AND namespace = ? AND name = ?", (kind, namespace, name)
                )
            with self._guard:
                self._index(repo)
        return repo

    def _found(self, repo: Repo, now: float) -> None:
        path = self._root / f"{repo.number}.git"
        shutil.copytree(self._root / _TEMPLATE, path)
        git = self.git(repo)
        first = git.write_commit(
            [], [Put(".gitattributes", INITIAL.encode())], "initial commit", Signature(repo.creator, now)
        )
        git.move_refs([(MAIN, first, NOTHING)])

    def delete(self, repo: Repo) -> None:
        """Remove a repository and all that hangs on it."""
        with self.writing(repo), self._guard:
            with self._db.write() as connection:
                connection.execute("DELETE FROM repos WHERE number = ?", (repo.number,))
            del self._by_number[repo.number]
            self._by_name = {_key(r.kind, r.namespace, r.name): r for r in self._by_number.values()}
        shutil.rmtree(self._root / f"{repo.number}.git", ignore_errors=True)

    def move(self, repo: Repo, namespace: str, name: str) -> Repo:
        """Give a repository another name; the old one redirects to it. 409 when the name is taken."""
        with self.writing(repo), self._naming, self._guard:
            if other := self.find(repo.kind, namespace, name):
                if other.number != repo.number:
                    raise Refusal(409, f"A {repo.kind} repository called {other.id} already exists")
            with self._db.write() as connection:
                connection.execute(
                    "UPDATE repos SET namespace = ?, name = ? WHERE number = ?", (namespace, name, repo.number)
                )
                connection.execute(
                    "INSERT OR REPLACE INTO redirects VALUES (?, ?, ?, ?)",
                    (repo.kind, repo.namespace, repo.name, repo.number),
                )
                connection.execute(
                    "DELETE FROM redirects WHERE kind = ? AND namespace = ? AND name = ?", (repo.kind, namespace, name)
                )
            moved = replace(self._by_number[repo.number], namespace=namespace, name=name)
            self._index(moved)
        return moved

    def change(self, repo: Repo, private: bool | None = None, gated: str | None = None, sdk: str | None = None) -> Repo:
        """Change settings; what is None stays."""
        with self.writing(repo) as current:
            new = replace(
                current,
                private=current.private if private is None else private,
                gated=current.gated if gated is None else gated,
                sdk=current.sdk if sdk is None else sdk,
            )
            with self._db.write() as connection:
                connection.execute(
                    "UPDATE repos SET private = ?, gated = ?, sdk = ? WHERE number = ?",
                    (new.private, new.gated, new.sdk, new.number),
                )
            self._index(new)
            return new

    def touch(self, repo: Repo) -> None:
        """Remember that the repository's content changed just now."""
        now = time.time()
        with self._db.write() as connection:
            connection.execute("UPDATE repos SET modified = ? WHERE number = ?", (now, repo.number))
        with self._guard:
            if current := self._by_number.get(repo.number):
                self._by_number[repo.number] = changed = replace(current, modified=now)
                self._by_name[_key(changed.kind, changed.namespace, changed.name)] = changed

    def _index(self, repo: Repo) -> None:
        self._by_number[repo.number] = repo
        self._by_name = {_key(r.kind, r.namespace, r.name): r for r in self._by_number.values()}


def _key(kind: Kind, namespace: str, name: str) -> tuple[Kind, str, str]:
    return kind, namespace.lower(), name.lower()


def _taken(kind: Kind) -> Refusal:
    return Refusal(409, f"You already created this {kind} repo")


def _repo(row: sqlite3.Row) -> Repo:
    return Repo(
        number=row["number"],
        kind=Kind(row["kind"]),
        namespace=row["namespace"],
        name=row["name"],
        private=bool(row["private"]),
        gated=row["gated"],
        sdk=row["sdk"],
        creator=row["creator"],
        created=row["created"],
        modified=row["modified"],
    )
