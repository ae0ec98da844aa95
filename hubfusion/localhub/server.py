"""The embedded Hub as a running server, in this process or for the command line."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import uvicorn
from starlette.types import ASGIApp

from hubfusion.errors import HubError
from hubfusion.localhub.faults import Faults, Plan
from hubfusion.localhub.routes import (
    account,
    clone,
    collections,
    commit,
    discussions,
    files,
    jobs,
    lfs,
    refs,
    repos,
    social,
    webhooks,
    xet,
)
from hubfusion.localhub.state import Hub, Rules
from hubfusion.localhub.store.repos import Kind
from hubfusion.localhub.web import Router
from hubfusion.localhub.webhooks import Courier

log = logging.getLogger(__name__)
_AREAS = (account, repos, commit, files, refs, discussions, lfs, xet, clone, social, collections, webhooks, jobs)
_START_SECONDS = 30.0
_STOP_SECONDS = 5


class LocalHub:
    """A Hub over a directory, served from a thread of this process.

    >>> import tempfile
    >>> from huggingface_hub import HfApi
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     with LocalHub(Path(directory), users={"ann": "hf_ann_1"}) as hub:
    ...         HfApi(endpoint=hub.endpoint, token="hf_ann_1").whoami()["name"]
    'ann'

    users: names and their tokens. orgs: organizations and the users that may write to them.
    port 0 takes a free one. A host other than loopback needs `expose=True`.
    faults: a plan of faults for tests, see `hubfusion.localhub.faults`.
    `endpoint` is the URL for `HF_ENDPOINT` and `HfApi(endpoint=...)` on this machine.
    """

    def __init__(
        self,
        directory: Path,
        users: Mapping[str, str],
        orgs: Mapping[str, Sequence[str]] | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        rules: Rules | None = None,
        faults: Plan | None = None,
        expose: bool = False,
    ) -> None:
        if not expose and not is_loopback(host):
            raise HubError(f"host {host}: only loopback addresses are served unless exposing is asked for")
        self.hub = Hub(Path(directory), users, orgs, rules)
        self._courier = Courier(self.hub)
        try:
            self._socket = _listen(host, port)
        except OSError as error:
            self.hub.close()
            raise HubError(f"{host}:{port}: {error.strerror}") from None
        self.endpoint = self.hub.endpoint = _url(self._socket)
        app: ASGIApp = Router(self.hub, [area.routes for area in _AREAS])
        config = uvicorn.Config(
            app if faults is None else Faults(app, faults),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=120,
            timeout_graceful_shutdown=_STOP_SECONDS,
            http="h11",
            ws="none",
            server_header=False,
            date_header=False,
        )
        self._server = uvicorn.Server(config)
        self._thread: threading.Thread | None = None

    def git_dir(self, repo_id: str, repo_type: str = "model") -> Path:
        """The bare git repository behind a repo, to read it with git itself."""
        namespace, _, name = repo_id.partition("/")
        repo = self.hub.repos.find(Kind(repo_type), namespace, name)
        if repo is None:
            raise HubError(f"{repo_id}: no such {repo_type}")
        return self.hub.repos.git(repo).path

    def start(self) -> LocalHub:
        """Serve from a thread; returns when the first request can come."""
        self._begin()
        self._thread = threading.Thread(target=self._run, name="localhub", daemon=True)
        self._thread.start()
        for _ in range(int(_START_SECONDS / 0.01)):
            if self._server.started:
                log.info("localhub: serving %s at %s", self.hub.directory, self.endpoint)
                return self
            self._thread.join(0.01)
        raise HubError(f"{self.endpoint}: the server did not start in {_START_SECONDS:.0f} s")

    def _begin(self) -> None:
        self._courier.start()
        self.hub.jobs.start(self.endpoint)

    def _run(self) -> None:
        asyncio.run(self._server.serve([self._socket]))

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM, in the calling (main) thread."""
        self._begin()
        try:
            self._server.run([self._socket])
        finally:
            self._close()

    def stop(self) -> None:
        """Finish the requests at hand (for 5 s at most) and let go of the directory."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS + 10)
        self._close()

    def _close(self) -> None:
        self._courier.stop()
        self._socket.close()
        self.hub.close()

    def __enter__(self) -> LocalHub:
        """Start, unless `start` was called already."""
        return self if self._thread else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self.stop()


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named so that asyncio switches off delayed sends, which cost 40 ms an answer.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except OSError:
        listening.close()
        raise
    return listening


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
