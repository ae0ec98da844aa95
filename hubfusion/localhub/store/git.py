"""Bare git repositories through git's plumbing: every write makes objects first and then moves one ref, checked."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hubfusion.localhub.store.objects import POINTER_MAX, Pointer, parse_pointer
from hubfusion.localhub.store.recent import Recent

NOTHING = "0" * 40
CONVERTS = "refs/convert/"
"""Refs of conversions: the parquet files that a bot makes of a dataset are at `refs/convert/parquet`."""
_SHA1 = re.compile(r"[0-9a-f]{40}")
ENVIRONMENT = {
    "PATH": os.environ.get("PATH", os.defpath),
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_TERMINAL_PROMPT": "0",
    "LC_ALL": "C.UTF-8",
}


class GitError(Exception):
    """A git command failed; the message is its name and what it wrote to stderr."""


class RefMoved(GitError):
    """A ref did not have the value that was expected: nothing was written."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a revision: `oid` is git's blob id, `size` the bytes a download has (of the object, if large)."""

    path: str
    oid: str
    size: int
    mode: str
    pointer: Pointer | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All files of one commit by path, and the tree ids of its folders by path."""

    sha: str
    files: dict[str, Entry]
    folders: dict[str, str]


@dataclass(frozen=True, slots=True)
class Signature:
    """Who and when (seconds since 1970) a commit is by."""

    name: str
    at: float

    @property
    def email(self) -> str:
        """An address that cannot receive mail."""
        return f"{self.name}@users.noreply.localhub"


@dataclass(frozen=True, slots=True)
class Put:
    """A change: `path` gets these bytes."""

    path: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Delete:
    """A change: the file or folder at `path` goes away."""

    path: str


Change = Put | Delete


@dataclass(frozen=True, slots=True)
class Commit:
    """One line of history."""

    sha: str
    parents: tuple[str, ...]
    author: str
    at: int
    title: str
    message: str


class GitRepo:
    """One bare repository. Writers hold the lock of their repository; readers need none."""

    def __init__(self, path: Path, snapshots: Recent[tuple[str, str], Snapshot]) -> None:
        self.path = path
        self._snapshots = snapshots

    def run(self, *arguments: str, given: bytes | None = None, codes: tuple[int, ...] = (0,)) -> tuple[int, bytes]:
        """Exit code and output of one git command; another exit code than `codes` raises `GitError`."""
        done = subprocess.run(
            ["git", "--git-dir", str(self.path), *arguments], input=given, capture_output=True, env=ENVIRONMENT
        )
        if done.returncode not in codes:
            raise GitError(f"git {arguments[0]}: {done.stderr.decode(errors='replace').strip()[:500]}")
        return done.returncode, done.stdout

    # Refs

    def ref(self, name: str) -> str | None:
        """The object a full ref name points to, or None; reads the loose file and asks git only if there is none."""
        try:
            text = (self.path / name).read_text().strip()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            text = ""
            if (self.path / "packed-refs").exists():
                text = self.run("for-each-ref", "--format=%(objectname)", name)[1].decode().strip()
        return text if _SHA1.fullmatch(text) else None

    def refs(self, prefix: str) -> dict[str, str]:
        """Full ref names under a prefix with the commits they come down to."""
        form = "%(refname) %(if)%(*objectname)%(then)%(*objectname)%(else)%(objectname)%(end)"
        lines = self.run("for-each-ref", f"--format={form}", prefix)[1].decode().splitlines()
        return {name: sha for name, sha in (line.split(" ", 1) for line in lines)}

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, tag, `refs/...` name or (7 to 40 digits of a) commit id stands for, or None."""
        if not is_ref_name(f"refs/heads/{revision}"):
            return None
        names = [f"refs/heads/{revision}", f"refs/tags/{revision}"]
        if revision.startswith(("refs/pr/", "refs/heads/", "refs/tags/", CONVERTS)):
            names = [revision]
        for name in names:
            if sha := self.ref(name):
                return self._commit_of(sha) if name.startswith("refs/tags/") else sha
        return self._commit_of(revision) if re.fullmatch(r"[0-9a-f]{7,40}", revision) else None

    def _commit_of(self, sha: str) -> str | None:
        if self._snapshots.get((self.path.name, sha)):
            return sha
        code, out = self.run("rev-parse", "--verify", "--quiet", f"{sha}^{{commit}}", codes=(0, 1, 128))
        return out.decode().strip() if code == 0 else None

    def move_refs(self, moves: Iterable[tuple[str, str, str]]) -> None:
        """All of (ref, new, expected old) at once or none; `NOTHING` stands for absent, "" for any old value.

        Raises `RefMoved` when a ref is not where it was expected.
        """
        lines = []
        for name, new, old in moves:
            if new == NOTHING:
                lines.append(f"delete {name}" + (f" {old}" if old else ""))
            else:
                lines.append(f"update {name} {new}" + (f" {old}" if old else ""))
        script = "\n".join(["start", *lines, "prepare", "commit", ""])
        try:
            self.run("update-ref", "--stdin", given=script.encode())
        except GitError as error:
            raise RefMoved(str(error)) from error

    # Reading

    def snapshot(self, sha: str) -> Snapshot:
        """The files of a commit; cached, since a commit never changes."""
        cached = self._snapshots.get((self.path.name, sha))
        if cached:
            return cached
        files: list[tuple[str, str, int, str]] = []
        folders: dict[str, str] = {}
        for line in self.run("ls-tree", "-r", "-t", "-z", "-l", "--full-tree", sha)[1].split(b"\0"):
            if not line:
                continue
            facts, path = line.split(b"\t", 1)
            mode, kind, oid, size = facts.decode().split()
            if kind == "tree":
                folders[path.decode(errors="surrogateescape")] = oid
            elif kind == "blob":
                files.append((path.decode(errors="surrogateescape"), oid, int(size), mode))
        small = [oid for _, oid, size, _ in files if 100 <= size <= POINTER_MAX]
        pointers = {oid: parse_pointer(blob) for oid, blob in self.blobs(small).items()}
        entries = {}
        for path_text, oid, stored, mode in files:
            pointer = pointers.get(oid)
            entries[path_text] = Entry(path_text, oid, pointer.size if pointer else stored, mode, pointer)
        made = Snapshot(sha, entries, folders)
        self._snapshots.put((self.path.name, sha), made)
        return made

    def blobs(self, oids: Sequence[str]) -> dict[str, bytes]:
        """The contents of several blobs in one process."""
        if not oids:
            return {}
        out = memoryview(self.run("cat-file", "--batch", given="\n".join([*oids, ""]).encode())[1])
        found, at = {}, 0
        for oid in oids:
            end = at + bytes(out[at : at + 200]).index(b"\n")
            header = bytes(out[at:end]).split()
            if len(header) != 3:
                raise GitError(f"cat-file: {bytes(out[at:end])!r}")
            size = int(header[2])
            found[oid] = bytes(out[end + 1 : end + 1 + size])
            at = end + size + 2
        return found

    def blob(self, oid: str) -> bytes:
        """The content of one blob."""
        return self.run("cat-file", "blob", oid)[1]

    def log(self, revisions: Sequence[str], skip: int = 0, count: int | None = None) -> list[Commit]:
        """History from the newest; `revisions` as `git log` takes them (made of shas only)."""
        limits = [f"--skip={skip}", *([f"--max-count={count}"] if count is not None else [])]
        form = "%H%x1f%P%x1f%an%x1f%ct%x1f%s%x1f%b%x1e"
        out = self.run("log", f"--format={form}", *limits, *revisions, "--")[1].decode(errors="replace")
        commits = []
        for record in out.split("\x1e"):
            if record.strip():
                sha, parents, author, at, title, body = record.lstrip("\n").split("\x1f")
                commits.append(Commit(sha, tuple(parents.split()), author, int(at), title, body.strip()))
        return commits

    def count(self, revision: str) -> int:
        """How many commits a revision has behind it, itself included."""
        return int(self.run("rev-list", "--count", revision)[1])

    def is_ancestor(self, older: str, newer: str) -> bool:
        """Whether `newer` has `older` in its history (or is it)."""
        return self.run("merge-base", "--is-ancestor", older, newer, codes=(0, 1))[0] == 0

    def merge_base(self, one: str, other: str) -> str | None:
        """The best common ancestor, or None."""
        code, out = self.run("merge-base", one, other, codes=(0, 1))
        return out.decode().strip() if code == 0 else None

    def last_commits(self, sha: str, paths: Iterable[str]) -> dict[str, Commit]:
        """For each file or folder the newest first-parent commit that touched it, in one walk over the history."""
        wanted, found = set(paths), {}
        form = "%x1e%H%x1f%P%x1f%an%x1f%ct%x1f%s%x1f"
        out = self.run("log", f"--format={form}", "-m", "--first-parent", "--name-only", "-z", sha, "--")[1]
        for record in out.decode(errors="surrogateescape").split("\x1e")[1:]:
            sha_, parents, author, at, title, names = record.split("\x1f", 5)
            commit = Commit(sha_, tuple(parents.split()), author, int(at), title, "")
            for name in names.replace("\0\n", "\0").strip("\0\n").split("\0"):
                while name:
                    if name in wanted:
                        wanted.discard(name)
                        found[name] = commit
                    name = name.rpartition("/")[0]
            if not wanted:
                break
        return found

    def diff(self, old: str, new: str) -> str:
        """The unified diff between two commits."""
        return self.run("diff", "--no-color", "--no-ext-diff", old, new, "--")[1].decode(errors="replace")

    # Writing objects: none of this is visible before `move_refs`.

    def write_commit(
        self, parents: Sequence[str], changes: Sequence[Change], message: str, by: Signature, tree_of: str | None = None
    ) -> str:
        """A new commit on its parents with the changes applied to the first (or to `tree_of`); returns its sha."""
        who = f"{_line(by.name)} <{_line(by.email)}> {int(by.at)} +0000"
        text = message.encode()
        parts = [f"commit refs/localhub/import\nmark :1\nauthor {who}\ncommitter {who}\ndata {len(text)}\n".encode()]
        parts += [text, b"\n"]
        if parents:
            parts.append(f"from {parents[0]}\n".encode())
        parts += [f"merge {parent}\n".encode() for parent in parents[1:]]
        if tree_of:
            parts.append(f'M 040000 {self.tree(tree_of)} ""\n'.encode())
        for change in changes:
            name = _quote(change.path)
            if isinstance(change, Delete):
                parts.append(b"D " + name + b"\n")
            else:
                parts += [
                    b"M 100644 inline " + name + f"\ndata {len(change.content)}\n".encode(),
                    change.content,
                    b"\n",
                ]
        # The import's own branch is taken back in the same stream, so that only `move_refs` ever publishes.
        parts.append(f"get-mark :1\nreset refs/localhub/import\nfrom {NOTHING}\n\ndone\n".encode())
        out = self.run("fast-import", "--quiet", "--done", "--date-format=raw", given=b"".join(parts))[1]
        return out.decode().strip()

    def tree(self, sha: str) -> str:
        """The tree id of a commit."""
        return self.run("rev-parse", "--verify", f"{sha}^{{tree}}")[1].decode().strip()

    def write_merge(self, ours: str, theirs: str) -> tuple[str, list[str]]:
        """The tree of a three-way merge and the paths in conflict (empty when it is clean)."""
        code, out = self.run(
            "merge-tree", "--write-tree", "--allow-unrelated-histories", "--name-only", "-z", ours, theirs, codes=(0, 1)
        )
        tree, *rest = out.decode(errors="surrogateescape").split("\0")
        return tree.strip(), sorted(set(rest[: rest.index("")])) if code == 1 else []

    def commit_tree(self, tree: str, parents: Sequence[str], message: str, by: Signature) -> str:
        """A commit of a ready tree; returns its sha."""
        who = f"{_line(by.name)} <{_line(by.email)}> {int(by.at)} +0000"
        lines = [f"tree {tree}", *(f"parent {parent}" for parent in parents), f"author {who}", f"committer {who}"]
        given = ("\n".join(lines) + f"\n\n{message}").encode()
        return self.run("hash-object", "-t", "commit", "-w", "--stdin", given=given)[1].decode().strip()

    def write_tag(self, name: str, sha: str, message: str, by: Signature) -> str:
        """An annotated tag object; returns its sha."""
        who = f"{_line(by.name)} <{_line(by.email)}> {int(by.at)} +0000"
        given = f"object {sha}\ntype commit\ntag {name}\ntagger {who}\n\n{message}\n".encode()
        return self.run("mktag", given=given)[1].decode().strip()


_CONFIG = """[core]
	repositoryformatversion = 0
	filemode = true
	bare = true
	fsync = committed,reference
[gc]
	auto = 0
"""


def init_bare(path: Path) -> None:
    """A new bare repository with `main` as its HEAD and every object forced to the disk before a ref names it."""
    subprocess.run(
        ["git", "init", "--quiet", "--bare", "--initial-branch=main", "--template=", str(path)],
        check=True,
        capture_output=True,
        env=ENVIRONMENT,
    )
    (path / "config").write_text(_CONFIG)


def is_ref_name(name: str) -> bool:
    """Whether git would take it as a full ref name (see git check-ref-format); never a path out of the repository."""
    bad = re.search(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|/[.-]|\.lock(/|$)|\.$|/$|^/|^\.", name)
    return bool(name) and not bad and name != "@" and len(name) <= 300 and not name.startswith("-")


def _quote(path: str) -> bytes:
    return b'"' + path.encode(errors="surrogateescape").replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'


def _line(text: str) -> str:
    return re.sub(r"[<>\n\0]", " ", text)
