from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from hubfusion.errors import Conflict, NotFound
from hubfusion.hub import Change, Files, RepoKind, append
from hubfusion.hub.append import TRIES
from hubfusion.lineage import Revision
from tests.fake_hub import FakeHub

REPO, FILE = "ibm/ledger", "lines.txt"


@dataclass
class RacedHub(FakeHub):
    """Another writer commits a line just before each of the first ``races`` commits."""

    races: int = 0
    nonces: list[str] = field(default_factory=list)

    def commit(self, repo: str, change: Change, kind: RepoKind = RepoKind.MODEL) -> str:
        self.nonces.append(change.nonce)
        if self.races:
            self.races -= 1
            text = self.read(self.resolve(repo), FILE, stop=1 << 20)
            self.add(repo, {FILE: text + f"theirs {self.races}\n".encode()}, f"race {self.races}")
        return super().commit(repo, change, kind)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


def add_line(hub: FakeHub, line: bytes, **options: bool) -> str:
    def plan(head: Revision) -> tuple[str, Files]:
        try:
            there = hub.read(head, FILE, stop=1 << 20)
        except NotFound:
            there = b""
        return "add a line", {} if line in there.splitlines() else {FILE: there + line + b"\n"}

    return append(hub, REPO, plan, nonce="n", **options)


@pytest.mark.parametrize("races", [0, 1, TRIES - 1])
def test_a_raced_line_is_added_to_what_the_others_wrote(races: int, waits: list[float]) -> None:
    hub = RacedHub(races=races)
    hub.add(REPO, {FILE: b"first\n"})
    sha = add_line(hub, b"mine")
    head = hub.resolve(REPO)
    lines = hub.read(head, FILE, stop=1 << 20).decode().splitlines()
    assert lines == ["first", *(f"theirs {n}" for n in reversed(range(races))), "mine"]
    assert head.sha == sha
    assert hub.nonces == [f"n-{attempt}" for attempt in range(races + 1)]
    assert len(waits) == races
    assert all(0.05 * 2**n <= wait <= 0.15 * 2**n for n, wait in enumerate(waits))


def test_a_writer_who_is_always_slower_gives_up_and_changes_nothing(waits: list[float]) -> None:
    hub = RacedHub(races=TRIES)
    hub.add(REPO, {FILE: b""})
    with pytest.raises(Conflict, match=r"^ibm/ledger: other writers were faster 8 times in a row; nothing"):
        add_line(hub, b"mine")
    assert b"mine" not in hub.read(hub.resolve(REPO), FILE, stop=1 << 20)
    assert len(hub.nonces) == TRIES and len(waits) == TRIES - 1


def test_what_is_there_already_makes_no_commit() -> None:
    hub = RacedHub()
    head = hub.add(REPO, {FILE: b"mine\n"})
    assert add_line(hub, b"mine") == head.sha
    assert not hub.nonces


def test_a_repository_that_does_not_exist_is_made_where_asked() -> None:
    hub = RacedHub()
    with pytest.raises(NotFound):
        add_line(hub, b"mine")
    add_line(hub, b"mine", create=True)
    assert hub.read(hub.resolve(REPO), FILE, stop=9) == b"mine\n"
