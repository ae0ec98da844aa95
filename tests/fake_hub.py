"""A Hub in memory: the Protocol of `hubfusion.hub`, counting what is read. Also makes `Finetune`s from folders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubfusion.errors import Conflict, Corrupt, NotFound
from hubfusion.hub import Change, Commit, HubJob, JobState, Listing, OnBytes, RepoKind
from hubfusion.lineage import Finetune, RemoteFile, Revision

Content = bytes | Path


@dataclass
class FakeHub:
    """Repositories as lists of commits; each commit maps paths to bytes or to local files."""

    endpoint: str = "http://fake"
    me: str = "bot"
    traffic: int = 0
    requests: int = 0
    reads: list[tuple[str, str, int, int]] = field(default_factory=list)
    commits: dict[str, list[tuple[Commit, dict[str, Content]]]] = field(default_factory=dict)
    tagged: dict[str, dict[str, str]] = field(default_factory=dict)
    listings: list[Listing] = field(default_factory=list)
    warnings: dict[str, str] = field(default_factory=dict)
    discussions: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, repo: str, files: Mapping[str, Content], title: str = "push") -> Revision:
        """One more commit on main that holds just these files."""
        history = self.commits.setdefault(repo, [])
        sha = hashlib.sha1(f"{repo}/{len(history)}/{title}".encode()).hexdigest()
        history.append((Commit(sha, title, ""), dict(files)))
        return Revision(repo, sha)

    def whoami(self) -> str:
        return self.me

    def resolve(self, repo: str, name: str = "main", kind: RepoKind = RepoKind.MODEL) -> Revision:
        if repo not in self.commits:
            raise NotFound(f"{repo}: no such repository")
        if name in self.tagged.get(repo, {}):
            return Revision(repo, self.tagged[repo][name])
        return Revision(repo, self.commits[repo][-1][0].sha)

    def tags(self, repo: str, kind: RepoKind = RepoKind.MODEL) -> dict[str, str]:
        return dict(self.tagged.get(repo, {}))

    def history(self, repo: str, kind: RepoKind = RepoKind.MODEL) -> Iterator[Commit]:
        return reversed([commit for commit, _ in self.commits.get(repo, [])])

    def models(self, *filters: str) -> Iterator[Listing]:
        return (entry for entry in self.listings if set(filters) <= set(entry.tags))

    def _tree(self, revision: Revision) -> dict[str, Content]:
        for commit, tree in self.commits.get(revision.repo, []):
            if commit.sha == revision.sha:
                return tree
        raise NotFound(f"{revision}: no such revision")

    def files(self, revision: Revision, kind: RepoKind = RepoKind.MODEL, limit: int = 1000) -> tuple[RemoteFile, ...]:
        tree = self._tree(revision)
        return tuple(remote_file(path, content) for path, content in sorted(tree.items()))[: limit + 1]

    def present(self, revision: Revision, paths: Sequence[str], kind: RepoKind = RepoKind.MODEL) -> frozenset[str]:
        self.requests += 1
        return frozenset(self._tree(revision).keys() & set(paths))

    def flagged(self, revision: Revision, paths: Sequence[str]) -> dict[str, str]:
        self.requests += 1
        return {path: self.warnings[path] for path in paths if path in self.warnings}

    def read(
        self, revision: Revision, path: str, *, start: int = 0, stop: int, kind: RepoKind = RepoKind.MODEL
    ) -> bytes:
        tree = self._tree(revision)
        if path not in tree:
            raise NotFound(f"{revision} {path}: no such file")
        self.requests += 1
        content = tree[path]
        if isinstance(content, bytes):
            body = content[start:stop]
        else:
            with open(content, "rb") as handle:
                handle.seek(start)
                body = handle.read(max(0, stop - start))
        self.traffic += len(body)
        self.reads.append((revision.repo, path, start, stop))
        return body

    def download(
        self,
        revision: Revision,
        file: RemoteFile,
        target: Path,
        kind: RepoKind = RepoKind.MODEL,
        on_bytes: OnBytes | None = None,
    ) -> Path:
        tree = self._tree(revision)
        if file.path not in tree:
            raise NotFound(f"{revision} {file.path}: no such file")
        content = tree[file.path]
        found = remote_file(file.path, content)
        if (found.sha256 or found.blob) != (file.sha256 or file.blob):
            raise Corrupt(f"{revision} {file.path}: the bytes do not have the hash that the Hub lists")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        return target

    def create(self, repo: str, kind: RepoKind = RepoKind.MODEL) -> None:
        if repo not in self.commits:
            self.add(repo, {}, "initial commit")

    def commit(self, repo: str, change: Change, kind: RepoKind = RepoKind.MODEL) -> str:
        history = self.commits[repo]
        if history and history[-1][0].sha != change.parent:
            raise Conflict(f"{repo}: main moved")
        tree = dict(history[-1][1]) if history else {}
        for path in change.delete:
            tree.pop(path, None)
        new = {p: c.read_bytes() if isinstance(c, Path) else c for p, c in change.files.items()}
        return self.add(repo, tree | new, change.title).sha

    def tag(self, repo: str, name: str, sha: str, kind: RepoKind = RepoKind.MODEL) -> None:
        if self.tagged.setdefault(repo, {}).setdefault(name, sha) != sha:
            raise Conflict(f"{repo}: tag {name} is elsewhere")

    def discuss(self, repo: str, title: str, body: str) -> int:
        self.discussions.append((repo, title, body))
        return len(self.discussions)

    def start_job(self, job: HubJob) -> str:
        raise NotImplementedError("jobs are tested on the embedded Hub")

    def job_state(self, namespace: str, key: str) -> JobState:
        raise NotImplementedError("jobs are tested on the embedded Hub")

    def job_log(self, namespace: str, key: str) -> tuple[str, ...]:
        raise NotImplementedError("jobs are tested on the embedded Hub")

    def cancel_job(self, namespace: str, key: str) -> None:
        raise NotImplementedError("jobs are tested on the embedded Hub")


def remote_file(path: str, content: Content) -> RemoteFile:
    """The entry that a Hub lists: safetensors are LFS files, with their sha256."""
    data = content if isinstance(content, bytes) else content.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest() if path.endswith(".safetensors") else None
    return RemoteFile(path, len(data), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), sha256)


def finetune(hub: FakeHub, revision: Revision, card: Any, **changes: Any) -> Finetune:
    """What `crawl` would have found at ``revision``."""
    values: dict[str, Any] = {
        "revision": revision,
        "author": revision.repo.partition("/")[0],
        "modified": "2026-11-01T00:00:00+00:00",
        "tags": ("cold-fusion",),
        "card": card,
        "files": hub.files(revision),
    }
    return Finetune(**(values | changes))
