"""Commits as clients send them: which files go where, what a commit holds, and how it lands on a branch or as a PR."""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hubfusion.localhub import cards
from hubfusion.localhub.facts import facts_of
from hubfusion.localhub.paths import checked_path
from hubfusion.localhub.refusal import STALE_PARENT, Refusal, missing_entry, missing_revision
from hubfusion.localhub.state import Hub
from hubfusion.localhub.store.git import CONVERTS, Change, Delete, GitRepo, Put, RefMoved, Signature, Snapshot
from hubfusion.localhub.store.gitattributes import LfsPatterns, line_for
from hubfusion.localhub.store.objects import Pointer, parse_pointer
from hubfusion.localhub.store.repos import MAIN, Kind, Repo

REGULAR_MAX = 10 << 20
"""Bytes: larger files go to large file storage."""
_FILES_MAX = 25_000


@dataclass(slots=True)
class Proposal:
    """One commit as it came: the message, the parent it was made for, and the changes in order."""

    summary: str = ""
    description: str = ""
    parent: str | None = None
    puts: list[Put] = field(default_factory=list)
    large: list[tuple[str, Pointer]] = field(default_factory=list)
    deleted_files: list[str] = field(default_factory=list)
    deleted_folders: list[str] = field(default_factory=list)

    @property
    def message(self) -> str:
        """The commit message for git."""
        return f"{self.summary}\n\n{self.description}".strip() + "\n"


def read_proposal(hub: Hub, repo: Repo, lines: Iterable[bytes]) -> Proposal:
    """Parse the NDJSON of a commit; refuses unknown keys, unsafe paths and objects that were not uploaded here."""
    proposal, entries = Proposal(), 0
    for line in lines:
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            key, value = item["key"], item["value"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise Refusal(400, f"line {entries + 1} of the commit is not {{key, value}} in JSON") from None
        if not isinstance(value, dict):
            raise Refusal(400, f"{key!r}: value must be an object")
        entries += 1
        if entries > _FILES_MAX:
            raise Refusal(413, f"a commit has at most {_FILES_MAX} operations")
        _read_operation(hub, repo, proposal, key, value)
    if not proposal.summary.strip():
        raise Refusal(400, "a commit needs a summary")
    return proposal


def _read_operation(hub: Hub, repo: Repo, proposal: Proposal, key: object, value: dict[str, Any]) -> None:
    if key == "header":
        proposal.summary = _text(value, "summary").strip()
        proposal.description = _text(value, "description")
        proposal.parent = _text(value, "parentCommit") or None
    elif key == "file":
        content = _decode(value)
        if len(content) > REGULAR_MAX:
            raise Refusal(413, f"{value.get('path')}: files over {REGULAR_MAX} bytes go to large file storage")
        if pointer := parse_pointer(content):  # as from a clone without git-lfs
            require_upload(hub, repo, str(value.get("path")), pointer.sha256, pointer.size)
        proposal.puts.append(Put(checked_path(value.get("path")), content))
    elif key == "lfsFile":
        path, oid = checked_path(value.get("path")), _text(value, "oid")
        proposal.large.append((path, Pointer(oid, require_upload(hub, repo, path, oid, value.get("size")))))
    elif key == "deletedFile":
        proposal.deleted_files.append(checked_path(value.get("path")))
    elif key == "deletedFolder":
        proposal.deleted_folders.append(checked_path(str(value.get("path") or "").rstrip("/")))
    else:
        raise Refusal(400, f"operation must be header, file, lfsFile, deletedFile or deletedFolder, got {key!r}")


def _text(value: dict[str, Any], name: str) -> str:
    text = value.get(name) or ""
    if not isinstance(text, str) or "\0" in text or len(text) > 65536:
        raise Refusal(400, f"{name} must be a text of at most 65536 characters without NUL")
    return text.encode(errors="replace").decode()


def _decode(value: dict[str, Any]) -> bytes:
    content = value.get("content")
    if not isinstance(content, str):
        raise Refusal(400, f"{value.get('path')}: content must be a text")
    if value.get("encoding", "utf-8") != "base64":
        return content.encode(errors="surrogatepass")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(400, f"{value.get('path')}: content is not base64") from None


def uploaded_size(hub: Hub, repo_number: int, oid: str) -> int | None:
    """Bytes of an object that was uploaded to this repository, or None.

    Objects are shared between repositories on disk, but knowing a sha256 must not be enough to read somebody's file.
    """
    row = hub.db.row("SELECT size FROM objects WHERE repo = ? AND sha256 = ?", repo_number, oid)
    return int(row["size"]) if row and hub.objects.size(oid) == row["size"] else None


def require_upload(hub: Hub, repo: Repo, path: str, oid: str, said: object) -> int:
    """Bytes of an object for `path`; refuses one that was not uploaded to this repository or has another size."""
    size = uploaded_size(hub, repo.number, oid)
    if size is None or said not in (None, size):
        raise Refusal(400, f"{path}: object {oid[:64]} of {said} bytes was not uploaded to this repo")
    return size


def record_upload(hub: Hub, repo_number: int, oid: str, size: int, xet: str = "") -> None:
    """Remember that an object was uploaded to a repository, after it is in place."""
    with hub.db.write() as connection:
        connection.execute(
            "INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?)", (repo_number, oid, size, time.time(), xet)
        )


def large_patterns(git: GitRepo, snapshot: Snapshot) -> LfsPatterns:
    """What `.gitattributes` of a revision says about large files."""
    return LfsPatterns(_attributes(git, snapshot))


def _attributes(git: GitRepo, snapshot: Snapshot) -> str:
    entry = snapshot.files.get(".gitattributes")
    return git.blob(entry.oid).decode(errors="replace") if entry and entry.size <= REGULAR_MAX else ""


def changes_of(git: GitRepo, base: Snapshot, proposal: Proposal) -> list[Change]:
    """The changes of a proposal on a revision; refuses deletions of what is not there and unreadable cards."""
    changes: list[Change] = []
    for path in proposal.deleted_files:
        if path not in base.files and path not in base.folders:
            raise missing_entry(path)
        changes.append(Delete(path))
    for path in proposal.deleted_folders:
        if path not in base.folders:
            raise missing_entry(path)
        changes.append(Delete(path))
    for put in proposal.puts:
        if put.path == "README.md":
            _check_card(put.content)
        changes.append(put)
    changes += [Put(path, pointer.text()) for path, pointer in proposal.large]
    if proposal.large:
        own = next(
            (put.content.decode(errors="replace") for put in proposal.puts if put.path == ".gitattributes"), None
        )
        text = _attributes(git, base) if own is None else own
        patterns = LfsPatterns(text)
        if missing := [line_for(path) for path, _ in proposal.large if not patterns.has(path)]:
            text += "" if not text or text.endswith("\n") else "\n"
            changes.append(Put(".gitattributes", (text + "".join(missing)).encode()))
    return changes


def _check_card(content: bytes) -> None:
    try:
        card = cards.parse_card(content.decode(errors="replace"))
    except cards.CardError as error:
        raise Refusal(400, f"Invalid metadata in README.md.\n- Error: {error}") from None
    if errors := cards.check_metadata(Kind.MODEL, card)[0]:
        raise Refusal(400, "Invalid metadata in README.md.\n" + "\n".join(f"- Error: {text}" for text in errors))


def branch_ref(revision: str) -> str:
    """The full name of a branch, pull request or conversion (`refs/convert/...`) that can be committed to."""
    if revision.startswith(("refs/pr/", "refs/heads/", CONVERTS)):
        return revision
    return f"refs/heads/{revision}"


def check_parent(parent: str | None, head: str) -> None:
    """Refuse with 412 a parent that is not the head; its first 7 digits are enough to name it."""
    if parent is not None and not (len(parent) >= 7 and head.startswith(parent)):
        raise Refusal(412, STALE_PARENT)


def land(hub: Hub, repo: Repo, revision: str, proposal: Proposal, user: str) -> tuple[str, str, str]:
    """Put a proposal on a branch: (full ref, old head, new head). The caller holds the repository's lock."""
    git = hub.repos.git(repo)
    ref = branch_ref(revision)
    head = git.resolve(ref)
    if head is None:
        raise missing_revision(revision)
    check_parent(proposal.parent, head)
    changes = changes_of(git, git.snapshot(head), proposal)
    new = git.write_commit([head], changes, proposal.message, Signature(user, time.time()))
    publish(hub, repo, ref, new, head)
    return ref, head, new


def publish(hub: Hub, repo: Repo, ref: str, new: str, old: str) -> None:
    """Move a ref from its old to its new commit, and remember the time when it is `main`."""
    try:
        hub.repos.git(repo).move_refs([(ref, new, old)])
    except RefMoved:
        raise Refusal(412, STALE_PARENT) from None
    if ref == MAIN:
        hub.repos.touch(repo)
        hub.tasks.submit(facts_of, hub, repo, new)
