"""One SQLite file for everything that is not git's: repositories, discussions, settings, webhooks, jobs."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS repos (
    number INTEGER PRIMARY KEY,
    kind TEXT NOT NULL, namespace TEXT NOT NULL COLLATE NOCASE, name TEXT NOT NULL COLLATE NOCASE,
    private INTEGER NOT NULL, gated TEXT NOT NULL, sdk TEXT NOT NULL, creator TEXT NOT NULL,
    created REAL NOT NULL, modified REAL NOT NULL,
    UNIQUE (kind, namespace, name));
CREATE TABLE IF NOT EXISTS redirects (
    kind TEXT NOT NULL, namespace TEXT NOT NULL COLLATE NOCASE, name TEXT NOT NULL COLLATE NOCASE,
    repo INTEGER NOT NULL REFERENCES repos ON DELETE CASCADE, PRIMARY KEY (kind, namespace, name));
CREATE TABLE IF NOT EXISTS facts (
    repo INTEGER NOT NULL REFERENCES repos ON DELETE CASCADE, sha TEXT NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (repo, sha));
CREATE TABLE IF NOT EXISTS objects (
    repo INTEGER NOT NULL REFERENCES repos ON DELETE CASCADE, sha256 TEXT NOT NULL, size INTEGER NOT NULL,
    added REAL NOT NULL, xet TEXT NOT NULL DEFAULT '', PRIMARY KEY (repo, sha256));
CREATE TABLE IF NOT EXISTS discussions (
    repo INTEGER NOT NULL REFERENCES repos ON DELETE CASCADE, num INTEGER NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (repo, num));
CREATE TABLE IF NOT EXISTS access (
    repo INTEGER NOT NULL REFERENCES repos ON DELETE CASCADE, user TEXT NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (repo, user));
CREATE TABLE IF NOT EXISTS likes (
    repo INTEGER NOT NULL REFERENCES repos ON DELETE CASCADE, user TEXT NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (repo, user));
CREATE TABLE IF NOT EXISTS documents (
    area TEXT NOT NULL, key TEXT NOT NULL, owner TEXT NOT NULL, body TEXT NOT NULL, PRIMARY KEY (area, key));
CREATE INDEX IF NOT EXISTS documents_by_owner ON documents (area, owner);
"""


class Database:
    """A SQLite file in WAL mode behind one lock: a write is one transaction, whole or not at all."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._connection.row_factory = sqlite3.Row
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.execute("PRAGMA foreign_keys=ON")
        self._connection.executescript(SCHEMA)

    def rows(self, sql: str, *values: object) -> list[sqlite3.Row]:
        """All rows of a query."""
        with self._lock:
            return self._connection.execute(sql, values).fetchall()

    def row(self, sql: str, *values: object) -> sqlite3.Row | None:
        """The first row of a query, or None."""
        with self._lock:
            found: sqlite3.Row | None = self._connection.execute(sql, values).fetchone()
            return found

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """One transaction; an exception inside rolls it back."""
        with self._lock:
            if self._connection.in_transaction:
                yield self._connection
                return
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def close(self) -> None:
        """Close the file; nothing is lost if this is never called."""
        with self._lock:
            self._connection.close()

    def meta(self, key: str, default: str) -> str:
        """A value that is made once for this store and kept for ever."""
        with self.write() as connection:
            connection.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (key, default))
        row = self.row("SELECT value FROM meta WHERE key = ?", key)
        assert row is not None  # inserted above
        return str(row["value"])

    # Documents: small JSON values of one area (webhooks, collections, jobs, ...), looked up by key or owner.

    def document(self, area: str, key: str) -> dict[str, Any] | None:
        """One document, or None."""
        row = self.row("SELECT body FROM documents WHERE area = ? AND key = ?", area, key)
        return json.loads(row["body"]) if row else None

    def documents(self, area: str, owner: str | None = None) -> list[dict[str, Any]]:
        """The documents of an area in the order they were made, optionally of one owner."""
        where = "area = ?" if owner is None else "area = ? AND owner = ?"
        values = (area,) if owner is None else (area, owner)
        return [
            json.loads(row["body"])
            for row in self.rows(f"SELECT body FROM documents WHERE {where} ORDER BY rowid", *values)
        ]

    def put_document(self, area: str, key: str, owner: str, body: dict[str, Any]) -> None:
        """Write one document, whole."""
        with self.write() as connection:
            connection.execute(
                "INSERT INTO documents VALUES (?, ?, ?, ?) "
                "ON CONFLICT (area, key) DO UPDATE SET body = excluded.body, owner = excluded.owner",
                (area, key, owner, json.dumps(body)),
            )

    def delete_document(self, area: str, key: str) -> bool:
        """Whether there was such a document."""
        with self.write() as connection:
            return connection.execute("DELETE FROM documents WHERE area = ? AND key = ?", (area, key)).rowcount > 0
