"""The process is killed in the middle of its work: what was acknowledged is there, and everything is readable."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from tests.localhub.conftest import USERS

REPOS = ("ann/one", "ann/two", "ann/three")


class Server:
    """`hubfusion hub serve` in a process of its own, on a port that stays the same."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.api = HfApi(endpoint=f"http://127.0.0.1:{self.port}", token=USERS["ann"])

    def start(self) -> None:
        command = [sys.executable, "-c", "from hubfusion.cli import main; main()", "hub", "serve"]
        options = ["--dir", str(self.directory), "--port", str(self.port)]
        users = [text for name, token in USERS.items() for text in ("--user", f"{name}:{token}")]
        self.process = subprocess.Popen([*command, *options, *users], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 0.2).close()
                return
            except OSError:
                assert self.process.poll() is None, self.process.stderr.read().decode()
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.05)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Storm:
    """Writers that commit small and large files, tag and talk until the server is gone; remembers what was said."""

    def __init__(self, api: HfApi, seed: int) -> None:
        self.api, self.seed = api, seed
        self.commits: dict[str, list[tuple[str, str, str]]] = {repo: [] for repo in REPOS}
        self.tags: list[tuple[str, str, str]] = []
        self.discussions: list[tuple[str, int, str]] = []
        self.stop = threading.Event()

    def write(self, worker: int) -> None:
        chance, number = random.Random(f"{self.seed} {worker}"), 0
        while not self.stop.is_set():
            number += 1
            repo, name = chance.choice(REPOS), f"{self.seed}-{worker}-{number}"
            content = chance.randbytes(chance.choice([10, 3000]))
            path = f"{name}.{chance.choice(['txt', 'bin'])}"
            try:
                text = content.hex().encode() if path.endswith("txt") else content
                oid = self.api.create_commit(repo, [CommitOperationAdd(path, text)], commit_message=name).oid
                self.commits[repo].append((oid, path, hashlib.sha256(text).hexdigest()))
                if number % 3 == 0:
                    self.api.create_tag(repo, tag=name, revision=oid)
                    self.tags.append((repo, name, oid))
                if number % 4 == 0:
                    found = self.api.create_discussion(repo, title=name, description="text")
                    self.discussions.append((repo, found.num, name))
            except Exception:  # the server was killed under us
                return

    def run(self, server: Server, seconds: float) -> None:
        threads = [threading.Thread(target=self.write, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        server.kill()
        self.stop.set()
        for thread in threads:
            thread.join(30)


def check(server: Server, storm: Storm) -> None:
    for repo in REPOS:
        history = {commit.commit_id for commit in server.api.list_repo_commits(repo)}
        acknowledged = storm.commits[repo]
        assert {oid for oid, _, _ in acknowledged} <= history, f"{repo}: an acknowledged commit is gone"
        files = {entry.path: entry for entry in server.api.list_repo_tree(repo)}
        for _, path, digest in acknowledged:
            if path.endswith("bin"):
                stored = server.directory / "objects" / digest[:2] / digest[2:4] / digest
                assert files[path].lfs.sha256 == digest
                assert hashlib.sha256(stored.read_bytes()).hexdigest() == digest
            else:
                assert path in files
        tags = {tag.name: tag.target_commit for tag in server.api.list_repo_refs(repo).tags}
        assert all(tags[name] == oid for at, name, oid in storm.tags if at == repo)
        titles = {d.num: d.title for d in server.api.get_repo_discussions(repo)}
        assert all(titles[num] == name for at, num, name in storm.discussions if at == repo)
    for path in (server.directory / "git").glob("*.git"):
        done = subprocess.run(["git", "--git-dir", str(path), "fsck", "--strict"], capture_output=True, text=True)
        broken = [
            line for line in (done.stdout + done.stderr).splitlines() if "dangling" not in line and "notice" not in line
        ]
        assert done.returncode == 0 and broken == [], f"{path}: {broken}"
    with sqlite3.connect(server.directory / "hub.sqlite") as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


class _NoPatience:
    """Time for the client without its waiting: a server that was killed is not coming back for its retries."""

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)

    @staticmethod
    def sleep(_: float) -> None:
        pass


@pytest.mark.parametrize("rounds", [2, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.timeout(300)
def test_nothing_acknowledged_is_lost_when_the_server_is_killed(
    directory: Path, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time", _NoPatience())
    server = Server(directory)
    server.start()
    for repo in REPOS:
        server.api.create_repo(repo)
    total = 0
    for seed in range(rounds):
        storm = Storm(server.api, seed)
        storm.run(server, 0.8 + random.Random(seed).random())
        server.start()
        check(server, storm)
        total += sum(map(len, storm.commits.values()))
    assert total > 2 * rounds
    assert list((directory / "incoming").iterdir()) == []
    server.kill()


def test_leftovers_of_a_killed_process_are_swept(directory: Path) -> None:
    from hubfusion.localhub import LocalHub
    from tests.localhub.conftest import clients

    with LocalHub(directory, USERS) as hub:
        clients(hub).ann.create_repo("ann/x")
        git = hub.git_dir("ann/x")
    for leftover in (
        git / "refs/heads/main.lock",
        git / "packed-refs.lock",
        git / "HEAD.lock",
        directory / "incoming/1",
    ):
        leftover.write_text("")
    (directory / "git/99.git/refs").mkdir(parents=True)  # made, but its row was never written
    with LocalHub(directory, USERS) as hub:
        ann = clients(hub).ann
        ann.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="ann/x")
        assert not (directory / "git/99.git").exists() and os.listdir(directory / "incoming") == []
