"""`hubfusion.hub.Hub` over the real `huggingface_hub` client."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, set_client_factory
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, httpx

from hubfusion.errors import Conflict, Corrupt, Forbidden, HubError, NotFound
from hubfusion.hub.protocol import Change, Commit, HubJob, JobState, Listing, OnBytes, RepoKind
from hubfusion.lineage import RemoteFile, Revision

T = TypeVar("T")
log = logging.getLogger(__name__)

TIMEOUT = httpx.Timeout(60.0, connect=10.0)
LONGEST_WAIT = 60.0
WARNINGS = {"suspicious", "unsafe"}
RETRIED = {408, 429, 500, 502, 503, 504}
LISTED = ["sha", "lastModified", "tags", "gated"]
ANYBODY = "(no token)"
PATHS_AT_ONCE = 500
JOB_LABEL = "hubfusion"
OVER = {"COMPLETED", "ERROR", "CANCELED", "DELETED"}
_homes: dict[str, set[str]] = {}  # each token that we were given, and the hosts that we were given it for


def _keep_token_home(request: httpx.Request) -> None:
    """Take our tokens off requests to any host but their own (page links and redirects may lead elsewhere)."""
    token = request.headers.get("authorization", "").removeprefix("Bearer ")
    if token in _homes and request.url.netloc.decode() not in _homes[token]:
        del request.headers["authorization"]


def _refuse_long_wait(response: httpx.Response) -> None:
    """Raise when a server asks for a longer pause than we grant: the client would sleep for as long as it is told."""
    wait = response.headers.get("retry-after", "")
    if wait.isdigit() and int(wait) > LONGEST_WAIT:
        raise HubError(f"{response.url.host}: told to wait {wait[:20]} s, at most {LONGEST_WAIT:.0f} s are granted")


def _new_session() -> httpx.Client:
    hooks: dict[str, list[Callable[..., Any]]] = {"request": [_keep_token_home], "response": [_refuse_long_wait]}
    return httpx.Client(event_hooks=hooks, follow_redirects=True, timeout=TIMEOUT)


class HubClient:
    """The calls of `hubfusion.hub.Hub`, each with time-outs, bounded tries and one-line errors."""

    def __init__(self, endpoint: str, token: str | None, *, tries: int = 5) -> None:
        """Connect nothing yet; ``tries`` bounds how often one call is made, the pause between doubles from 0.5 s."""
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise HubError(f"endpoint must be http(s)://host[:port], got {endpoint!r}")
        self.endpoint = endpoint.rstrip("/")
        self._api = HfApi(endpoint=self.endpoint, token=token or False)
        self._tries = tries
        if not _homes:
            set_client_factory(_new_session)
        _homes.setdefault(token or ANYBODY, set()).add(parts.netloc)

    # -- reading ---------------------------------------------------------------------------------------------------

    def whoami(self) -> str:
        """See `Hub.whoami`."""
        return str(self._ask("whoami", lambda: self._api.whoami())["name"])

    def resolve(self, repo: str, name: str = "main", kind: RepoKind = RepoKind.MODEL) -> Revision:
        """See `Hub.resolve`."""
        info = self._ask(
            f"{repo}@{name}", lambda: self._api.repo_info(repo, revision=name, repo_type=kind, expand=["sha"])
        )
        return Revision(repo, str(info.sha))

    def tags(self, repo: str, kind: RepoKind = RepoKind.MODEL) -> dict[str, str]:
        """See `Hub.tags`."""
        refs = self._ask(f"refs of {repo}", lambda: self._api.list_repo_refs(repo, repo_type=kind))
        return {tag.name: tag.target_commit for tag in refs.tags}

    def history(self, repo: str, kind: RepoKind = RepoKind.MODEL) -> Iterator[Commit]:
        """See `Hub.history`."""
        for commit in self._ask(f"history of {repo}", lambda: self._api.list_repo_commits(repo, repo_type=kind)):
            yield Commit(commit.commit_id, commit.title, commit.message or "")

    def models(self, *filters: str) -> Iterator[Listing]:
        """See `Hub.models`; asks for no card, because an untrusted card can break the client's parser for all."""
        call = "list of models"
        for info in self._ask(call, lambda: list(self._api.list_models(filter=list(filters), expand=LISTED))):
            if info.sha and info.last_modified:
                modified = info.last_modified.isoformat()
                yield Listing(Revision(info.id, info.sha), modified, tuple(info.tags or ()), bool(info.gated))

    def files(self, revision: Revision, kind: RepoKind = RepoKind.MODEL, limit: int = 1000) -> tuple[RemoteFile, ...]:
        """See `Hub.files`."""
        tree = self._ask(
            f"files of {revision}",
            lambda: list(
                islice(
                    self._api.list_repo_tree(revision.repo, revision=revision.sha, recursive=True, repo_type=kind),
                    limit + 1,
                )
            ),
        )
        return tuple(
            RemoteFile(e.path, e.size, e.blob_id, e.lfs.sha256 if e.lfs else None)
            for e in tree
            if isinstance(e, RepoFile)
        )

    def present(self, revision: Revision, paths: Sequence[str], kind: RepoKind = RepoKind.MODEL) -> frozenset[str]:
        """See `Hub.present`."""
        found: set[str] = set()
        for start in range(0, len(paths), PATHS_AT_ONCE):
            some = list(paths[start : start + PATHS_AT_ONCE])
            ask = partial(self._api.get_paths_info, revision.repo, some, revision=revision.sha, repo_type=kind)
            found.update(e.path for e in self._ask(f"files of {revision}", ask) if isinstance(e, RepoFile))
        return frozenset(found)

    def flagged(self, revision: Revision, paths: Sequence[str]) -> dict[str, str]:
        """See `Hub.flagged`."""
        found = self._ask(
            f"scans of {revision}",
            lambda: self._api.get_paths_info(revision.repo, list(paths), revision=revision.sha, expand=True),
        )
        scans = {e.path: str(e.security.status) for e in found if isinstance(e, RepoFile) and e.security}
        return {path: status for path, status in scans.items() if status in WARNINGS}

    def read(
        self, revision: Revision, path: str, *, start: int = 0, stop: int, kind: RepoKind = RepoKind.MODEL
    ) -> bytes:
        """See `Hub.read`."""

        def ranged() -> bytes:
            body = bytearray()
            with self._get(revision, path, kind, f"bytes={start}-{stop - 1}") as response:
                if response.status_code == 416:
                    return b""
                hf_raise_for_status(response)
                skip = 0 if response.status_code == 206 else start
                for block in response.iter_raw():
                    body += block
                    if len(body) >= skip + stop - start:
                        break
            return bytes(body[skip : skip + stop - start])

        return self._ask(f"{revision} {path}", ranged)

    def download(
        self,
        revision: Revision,
        file: RemoteFile,
        target: Path,
        kind: RepoKind = RepoKind.MODEL,
        on_bytes: OnBytes | None = None,
    ) -> Path:
        """See `Hub.download`."""
        if target.is_file() and _has_listed_hash(target, file):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        for attempt in range(2):
            part.write_bytes(b"")
            self._ask(f"download {revision} {file.path}", lambda: self._resume(revision, file, part, kind, on_bytes))
            if _has_listed_hash(part, file):
                return part.replace(target)
            log.warning("%s %s: hash differs from the listed one (attempt %d)", revision, file.path, attempt + 1)
        part.unlink()
        raise Corrupt(f"{revision} {file.path}: the bytes do not have the hash that the Hub lists, twice")

    def _resume(
        self, revision: Revision, file: RemoteFile, part: Path, kind: RepoKind, on_bytes: OnBytes | None
    ) -> None:
        """Append what is missing of ``file`` to ``part``; a cut body raises, and the next try goes on from there."""
        have = part.stat().st_size
        if have >= file.size:
            return
        with self._get(revision, file.path, kind, f"bytes={have}-") as response, open(part, "r+b") as out:
            hf_raise_for_status(response)
            out.seek(have if response.status_code == 206 else 0)
            for block in response.iter_raw(1 << 20):
                out.write(block)
                if out.tell() > file.size:
                    raise Corrupt(f"{revision} {file.path}: more than the listed {file.size} bytes came")
                if on_bytes:
                    on_bytes(len(block))
            out.truncate()
        if part.stat().st_size < file.size:
            raise httpx.ReadError(f"{part.stat().st_size} of {file.size} bytes came")

    def _get(self, revision: Revision, path: str, kind: RepoKind, byte_range: str) -> Any:
        prefix = "datasets/" if kind is RepoKind.DATASET else ""
        url = f"{self.endpoint}/{prefix}{revision.repo}/resolve/{revision.sha}/{quote(path)}"
        headers = build_hf_headers(token=self._api.token) | {"Range": byte_range, "Accept-Encoding": "identity"}
        return get_session().stream("GET", url, headers=headers)

    # -- writing ---------------------------------------------------------------------------------------------------

    def create(self, repo: str, kind: RepoKind = RepoKind.MODEL) -> None:
        """See `Hub.create`."""
        self._ask(f"create {repo}", lambda: self._api.create_repo(repo, repo_type=kind, exist_ok=True))

    def commit(self, repo: str, change: Change, kind: RepoKind = RepoKind.MODEL) -> str:
        """See `Hub.commit`."""
        for attempt in range(self._tries):
            try:
                sha = self._send(repo, change, kind)
            except ValueError as error:  # the client checks a card's metadata before it sends anything
                raise HubError(f"commit to {repo}: {_reason(error)}") from None
            except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
                if landed := self._landed(repo, change, kind):
                    return landed
                failure = error
            else:
                if sha != change.parent and self._landed(repo, change, kind):
                    return sha
                raise HubError(f"{repo}: commit {change.title!r} changes no file, so it was not made")
            head = self.resolve(repo, kind=kind).sha
            if head != change.parent:
                raise Conflict(f"{repo}: main moved from {change.parent[:12]} to {head[:12]}, nothing was written")
            status = _status(failure)
            if status in (400, 401, 403, 404):
                raise _explained(f"commit to {repo}", failure)
            self._pause(attempt, f"commit to {repo}", failure)
        raise _explained(f"commit to {repo}", failure)

    def _send(self, repo: str, change: Change, kind: RepoKind) -> str:
        operations: list[Any] = [CommitOperationAdd(path, content) for path, content in change.files.items()]
        operations += [CommitOperationDelete(path) for path in change.delete]
        info = self._api.create_commit(
            repo,
            operations,
            commit_message=change.title,
            commit_description=f"Nonce: {change.nonce}",
            parent_commit=change.parent,
            repo_type=kind,
        )
        return str(info.oid)

    def _landed(self, repo: str, change: Change, kind: RepoKind) -> str | None:
        """The commit that carries our nonce, if it is anywhere between the head and the parent."""
        for commit in self.history(repo, kind):
            if commit.sha == change.parent:
                return None
            if f"Nonce: {change.nonce}" in commit.message:
                return commit.sha
        return None

    def tag(self, repo: str, name: str, sha: str, kind: RepoKind = RepoKind.MODEL) -> None:
        """See `Hub.tag`."""
        tags = self.tags(repo, kind)
        if name not in tags:
            self._ask(
                f"tag {repo} {name}",
                lambda: self._api.create_tag(repo, tag=name, revision=sha, repo_type=kind, exist_ok=True),
            )
            tags = self.tags(repo, kind)
        if tags.get(name) != sha:
            raise Conflict(f"{repo}: tag {name} is on {tags.get(name, 'nothing')[:12]}, not on {sha[:12]}")

    def discuss(self, repo: str, title: str, body: str) -> int:
        """See `Hub.discuss`."""
        me = self.whoami()

        def once() -> int:
            for discussion in self._api.get_repo_discussions(repo, author=me, discussion_type="discussion"):
                if discussion.title == title:
                    return int(discussion.num)
            return int(self._api.create_discussion(repo, title=title, description=body).num)

        return self._ask(f"discussion on {repo}", once)

    # -- jobs ------------------------------------------------------------------------------------------------------

    def start_job(self, job: HubJob) -> str:
        """See `Hub.start_job`."""

        def once() -> str:
            label = {JOB_LABEL: job.nonce}
            for found in self._api.list_jobs(labels=label, namespace=job.namespace):
                return str(found.id)
            started = self._api.run_job(
                image=job.image,
                command=list(job.command),
                flavor=job.flavor,
                timeout=job.seconds,
                env={"HF_ENDPOINT": self.endpoint, **job.environment},
                secrets={"HF_TOKEN": self._api.token} if self._api.token else None,
                labels=label,
                namespace=job.namespace,
            )
            return str(started.id)

        return self._ask(f"job of {job.namespace}", once)

    def job_state(self, namespace: str, key: str) -> JobState:
        """See `Hub.job_state`."""
        what = f"job {key} of {namespace}"
        try:
            status = self._ask(what, lambda: self._api.inspect_job(job_id=key, namespace=namespace).status)
        except NotFound:
            return JobState(True, "the Hub knows it no more")
        stage = str(getattr(status.stage, "value", status.stage))
        words = [stage.lower(), *filter(None, [status.message])]
        return JobState(stage in OVER, ": ".join(" ".join(str(w).split())[:300] for w in words))

    def job_log(self, namespace: str, key: str) -> tuple[str, ...]:
        """See `Hub.job_log`."""
        logs = partial(self._api.fetch_job_logs, job_id=key, namespace=namespace)
        return tuple(self._ask(f"log of job {key} of {namespace}", lambda: list(logs())))

    def cancel_job(self, namespace: str, key: str) -> None:
        """See `Hub.cancel_job`."""
        self._ask(f"job {key} of {namespace}", lambda: self._api.cancel_job(job_id=key, namespace=namespace))

    # -- tries -----------------------------------------------------------------------------------------------------

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        """Make a call that may be repeated without harm, up to ``tries`` times; translate its errors."""
        for attempt in range(self._tries):
            try:
                return call()
            except HfHubHTTPError as error:
                if _status(error) not in RETRIED:
                    raise _explained(what, error) from None
                failure: Exception = error
            except httpx.HTTPError as error:
                failure = error
            self._pause(attempt, what, failure)
        raise _explained(what, failure)

    def _pause(self, attempt: int, what: str, failure: Exception) -> None:
        if attempt + 1 < self._tries:
            log.warning("%s: %s; trying again", what, _reason(failure))
            time.sleep(min(0.5 * 2**attempt, LONGEST_WAIT))


def _has_listed_hash(path: Path, file: RemoteFile) -> bool:
    """SHA-256 for LFS files; git's SHA-1 of ``blob <size>\\0<bytes>`` for the others."""
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == (file.sha256 or file.blob)


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _reason(error: Exception) -> str:
    status, message = _status(error), getattr(error, "server_message", None) or str(error) or type(error).__name__
    line = " ".join(str(message).split())[:200]
    return f"HTTP {status}: {line}" if status else f"{type(error).__name__}: {line}"


def _explained(what: str, error: Exception) -> HubError:
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | EntryNotFoundError) or _status(error) == 404:
        return NotFound(f"{what}: {_reason(error)}")
    return (Forbidden if _status(error) in (401, 403) else HubError)(f"{what}: {_reason(error)}")
