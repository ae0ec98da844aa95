"""The Hub calls that we make, as a Protocol, and the values they take and return.

The real client (measured on huggingface_hub 2.4) has no timeouts, retries unevenly and without an upper bound, follows
page links to any host with the token, reports a failure when the answer to a commit is lost, ignores ``parent_commit``
in a commit without changes, and checks only the size of downloads. Implementations of this protocol therefore give
every request a timeout and a bounded number of tries, send the token only to the endpoint's own host, look for a
commit's nonce before they report a failure, and hash every file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from hubfusion.lineage import RemoteFile, Revision

OnBytes = Callable[[int], None]


class RepoKind(StrEnum):
    """What a repository holds."""

    MODEL = "model"
    DATASET = "dataset"


@dataclass(frozen=True, slots=True)
class Listing:
    """One model in a listing: its head commit at the time of the listing; ``modified`` is ISO 8601, UTC."""

    revision: Revision
    modified: str
    tags: tuple[str, ...]
    gated: bool


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit of a branch's history, ``message`` without the title line."""

    sha: str
    title: str
    message: str


class Hub(Protocol):
    """What we ask of a Hub. Errors: `NotFound`, `Conflict`, else `HubError`; each message is one line.

    ``revision`` arguments called ``name`` take branches and tags; `Revision` values are pinned.
    """

    endpoint: str

    def whoami(self) -> str:
        """The user whom the token belongs to."""
        ...

    def resolve(self, repo: str, name: str = "main", kind: RepoKind = RepoKind.MODEL) -> Revision:
        """The commit that a branch or tag points to now."""
        ...

    def tags(self, repo: str, kind: RepoKind = RepoKind.MODEL) -> dict[str, str]:
        """Tag name to commit sha."""
        ...

    def history(self, repo: str, kind: RepoKind = RepoKind.MODEL) -> Iterator[Commit]:
        """Commits of ``main``, newest first."""
        ...

    def models(self, *filters: str) -> Iterator[Listing]:
        """Models that carry every one of the tags in ``filters``, all pages, in the Hub's order."""
        ...

    def files(self, revision: Revision, kind: RepoKind = RepoKind.MODEL, limit: int = 1000) -> tuple[RemoteFile, ...]:
        """The files at a pinned commit; stops after ``limit`` + 1 entries, so that more can be told from enough."""
        ...

    def present(self, revision: Revision, paths: Sequence[str], kind: RepoKind = RepoKind.MODEL) -> frozenset[str]:
        """Those of ``paths`` that exist at a pinned commit, without listing the whole repository."""
        ...

    def flagged(self, revision: Revision, paths: Sequence[str]) -> dict[str, str]:
        """Those of ``paths`` that the Hub's own scanners warn of, with their word for it; empty where none scans."""
        ...

    def read(
        self, revision: Revision, path: str, *, start: int = 0, stop: int, kind: RepoKind = RepoKind.MODEL
    ) -> bytes:
        """Bytes ``start`` to ``stop`` (exclusive) of one file, fewer when it ends before; never reads beyond."""
        ...

    def download(
        self,
        revision: Revision,
        file: RemoteFile,
        target: Path,
        kind: RepoKind = RepoKind.MODEL,
        on_bytes: OnBytes | None = None,
    ) -> Path:
        """Fetch one file to ``target``, whole and with the listed hash, or raise `Corrupt`; resumes a cut transfer."""
        ...

    def create(self, repo: str, kind: RepoKind = RepoKind.MODEL) -> None:
        """Make sure that the repository exists."""
        ...

    def commit(self, repo: str, change: Change, kind: RepoKind = RepoKind.MODEL) -> str:
        """Put ``change`` on ``main`` as one commit on top of its parent and return the new sha.

        Raises `Conflict` when the branch is no longer at the parent: then nothing was written. An answer that was
        lost on the way is looked up by the nonce, so the commit is there exactly once.
        """
        ...

    def tag(self, repo: str, name: str, sha: str, kind: RepoKind = RepoKind.MODEL) -> None:
        """Tag a commit; the same tag on the same commit is fine, on another one it is a `Conflict`."""
        ...

    def discuss(self, repo: str, title: str, body: str) -> int:
        """Open a discussion, once: one of ours with this title is answered with its number instead."""
        ...

    def start_job(self, job: HubJob) -> str:
        """Run a command on the Hub's machines, once for each nonce, and return its id; it gets our token."""
        ...

    def job_state(self, namespace: str, key: str) -> JobState:
        """How a job is doing."""
        ...

    def job_log(self, namespace: str, key: str) -> tuple[str, ...]:
        """The lines that a job has written so far, or wrote until it was over."""
        ...

    def cancel_job(self, namespace: str, key: str) -> None:
        """End a job; one that is over stays as it is."""
        ...


@dataclass(frozen=True, slots=True)
class Change:
    """A commit before it is made: it can be printed, counted and tested.

    ``files`` maps paths to bytes or to a local file. ``nonce`` names this one attempt in the commit message; at least
    one file must differ from the parent, or the client would skip the commit and the race check with it.
    """

    title: str
    parent: str
    nonce: str
    files: Mapping[str, bytes | Path]
    delete: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class HubJob:
    """A command to run in a container of ``image`` on a machine of kind ``flavor``, on the account of ``namespace``.

    It is ended after ``seconds``. ``nonce`` names this one attempt. Its environment has ``HF_ENDPOINT``, our token as
    the secret ``HF_TOKEN``, and ``environment``.
    """

    namespace: str
    image: str
    command: tuple[str, ...]
    flavor: str
    seconds: int
    nonce: str
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JobState:
    """Whether a job is over, and the Hub's words for how it is."""

    over: bool
    message: str
