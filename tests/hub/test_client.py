"""The door to the network, against the embedded Hub with faults on the way."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hubfusion.errors import Conflict, Corrupt, Forbidden, HubError, NotFound
from hubfusion.hub import Change, RepoKind, connect
from hubfusion.hub import client as hub_client
from hubfusion.hub.client import HubClient
from hubfusion.lineage import RemoteFile, Revision
from hubfusion.localhub import LOST, Fault, FaultRequest, LocalHub

Rule = Callable[[FaultRequest], Fault | None]


class Faults:
    """A switch: tests set ``rule``, the server asks it about every request; ``seen`` counts method and path."""

    def __init__(self) -> None:
        self.rule: Rule = lambda request: None
        self.seen: list[tuple[str, str]] = []

    def __call__(self, request: FaultRequest) -> Fault | None:
        self.seen.append((request.method, request.path))
        return self.rule(request)

    def count(self, method: str, part: str) -> int:
        return sum(m == method and part in p for m, p in self.seen)


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def server(tmp_path: Path, faults: Faults) -> Iterator[LocalHub]:
    with LocalHub(tmp_path / "hub", {"ann": "hf_ann", "bob": "hf_bob"}, faults=faults).start() as hub:
        yield hub


@pytest.fixture(autouse=True)
def quick_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses between tries take no time here; returns how long they would have been."""
    slept: list[float] = []
    monkeypatch.setattr(hub_client.time, "sleep", slept.append)
    return slept


@pytest.fixture
def ann(server: LocalHub) -> HubClient:
    hub = HubClient(server.endpoint, "hf_ann", tries=3)
    hub.create("ann/model")
    return hub


def change(hub: HubClient, files: dict[str, bytes | Path], nonce: str = "n1", parent: str = "") -> Change:
    return Change("a change", parent or hub.resolve("ann/model").sha, nonce, files)


def on(method: str, part: str, *answers: Fault | None) -> Rule:
    """The first matching requests get ``answers`` in turn, everything else is served."""
    queue = list(answers)

    def rule(request: FaultRequest) -> Fault | None:
        return queue.pop(0) if queue and request.method == method and part in request.path else None

    return rule


def test_a_commit_is_one_commit_on_its_parent_with_its_nonce(ann: HubClient) -> None:
    parent = ann.resolve("ann/model").sha
    sha = ann.commit("ann/model", change(ann, {"a.txt": b"1", "w.safetensors": os.urandom(2000)}))
    first, second = list(ann.history("ann/model"))[:2]
    assert (first.sha, second.sha, first.title) == (sha, parent, "a change")
    assert "Nonce: n1" in first.message


def test_a_stale_parent_is_a_conflict_and_nothing_is_written(ann: HubClient) -> None:
    parent = ann.resolve("ann/model").sha
    head = ann.commit("ann/model", change(ann, {"a.txt": b"1"}))
    with pytest.raises(Conflict, match=f"main moved from {parent[:12]} to {head[:12]}, nothing was written"):
        ann.commit("ann/model", change(ann, {"b.txt": b"2"}, "n2", parent))
    assert ann.resolve("ann/model").sha == head


def test_a_commit_whose_answer_was_lost_is_found_and_made_once(ann: HubClient, faults: Faults) -> None:
    planned = change(ann, {"a.txt": b"1"})
    faults.rule = on("POST", "/commit/", LOST)
    sha = ann.commit("ann/model", planned)
    assert [c.title for c in ann.history("ann/model")].count("a change") == 1
    assert ann.resolve("ann/model").sha == sha
    assert faults.count("POST", "/commit/") == 1


def test_a_500_after_the_commit_landed_is_a_success(ann: HubClient, faults: Faults) -> None:
    faults.rule = on("POST", "/commit/", Fault(land=True, status=500))
    sha = ann.commit("ann/model", change(ann, {"a.txt": b"1"}))
    assert ann.resolve("ann/model").sha == sha


def test_a_lost_answer_is_found_even_when_others_committed_after_it(
    ann: HubClient, server: LocalHub, faults: Faults
) -> None:
    other = HubClient(server.endpoint, "hf_ann")
    planned = change(ann, {"a.txt": b"1"})

    def rule(request: FaultRequest) -> Fault | None:
        if request.method == "POST" and "/commit/" in request.path:
            faults.rule = lambda request: None
            return Fault(land=True, status=503)
        return None

    faults.rule = rule
    original, ann._landed = ann._landed, None  # type: ignore[method-assign, assignment]

    def landed_after_somebody_else(repo: str, planned: Change, kind: RepoKind) -> str | None:
        other.commit(repo, Change("later", other.resolve(repo).sha, "n9", {"b.txt": b"2"}))
        return original(repo, planned, kind)

    ann._landed = landed_after_somebody_else  # type: ignore[method-assign]
    sha = ann.commit("ann/model", planned)
    assert [c.title for c in other.history("ann/model")][:2] == ["later", "a change"]
    assert sha == [c.sha for c in other.history("ann/model")][1]


def test_a_busy_hub_is_asked_again_and_a_dead_one_a_bounded_number_of_times(
    ann: HubClient, faults: Faults, quick_pauses: list[float]
) -> None:
    planned = change(ann, {"a.txt": b"1"})
    faults.rule = on("POST", "/commit/", Fault(status=503), Fault(status=409))
    ann.commit("ann/model", planned)
    assert faults.count("POST", "/commit/") == 3
    planned = change(ann, {"a.txt": b"2"}, "n2")
    faults.rule = on("POST", "/commit/", *[Fault(status=503)] * 9)
    with pytest.raises(HubError, match="commit to ann/model: HTTP 503"):
        ann.commit("ann/model", planned)
    assert faults.count("POST", "/commit/") == 6
    assert quick_pauses == [0.5, 1.0, 0.5, 1.0]


def test_a_permanent_412_with_an_unmoved_head_ends(ann: HubClient, faults: Faults) -> None:
    faults.rule = on("POST", "/commit/", *[Fault(status=412)] * 9)
    with pytest.raises(HubError, match="HTTP 412"):
        ann.commit("ann/model", change(ann, {"a.txt": b"1"}))
    assert faults.count("POST", "/commit/") == 3


def test_a_commit_that_changes_nothing_is_an_error_and_not_a_silent_success(ann: HubClient) -> None:
    ann.commit("ann/model", change(ann, {"a.txt": b"1"}))
    with pytest.raises(HubError, match="changes no file"):
        ann.commit("ann/model", change(ann, {"a.txt": b"1"}, "n2"))


def test_who_may_not_write_is_told_so_at_once(ann: HubClient, server: LocalHub, faults: Faults) -> None:
    bob = connect(server.endpoint, "hf_bob", tries=3)
    with pytest.raises(Forbidden, match="commit to ann/model: HTTP 403"):
        bob.commit("ann/model", change(ann, {"a.txt": b"1"}))
    assert faults.count("POST", "/preupload/") <= 1


def test_fifty_writers_with_one_parent_have_one_winner(ann: HubClient, server: LocalHub) -> None:
    parent = ann.resolve("ann/model").sha
    verdicts: list[str] = []

    def race(number: int) -> None:
        hub = HubClient(server.endpoint, "hf_ann", tries=3)
        try:
            hub.commit("ann/model", Change(f"racer {number}", parent, f"r{number}", {"a.txt": b"%d" % number}))
            verdicts.append("won")
        except Conflict:
            verdicts.append("lost")

    threads = [threading.Thread(target=race, args=(n,)) for n in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (verdicts.count("won"), verdicts.count("lost")) == (1, 49)


def test_a_tag_is_set_once_and_never_moved(ann: HubClient, faults: Faults) -> None:
    first = ann.commit("ann/model", change(ann, {"a.txt": b"1"}))
    faults.rule = on("POST", "/tag/", LOST)
    ann.tag("ann/model", "v1", first)
    ann.tag("ann/model", "v1", first)
    second = ann.commit("ann/model", change(ann, {"a.txt": b"2"}, "n2"))
    with pytest.raises(Conflict, match=f"tag v1 is on {first[:12]}, not on {second[:12]}"):
        ann.tag("ann/model", "v1", second)
    assert ann.tags("ann/model") == {"v1": first}


def download(hub: HubClient, target: Path, path: str = "w.safetensors") -> Path:
    head = hub.resolve("ann/model")
    (file,) = [f for f in hub.files(head) if f.path == path]
    return hub.download(head, file, target / path)


@pytest.fixture
def body(ann: HubClient) -> bytes:
    content = os.urandom(3 << 20)
    ann.commit("ann/model", change(ann, {"w.safetensors": content, "small.json": b'{"a": 1}'}))
    return content


def test_a_download_has_the_listed_hash(ann: HubClient, body: bytes, tmp_path: Path) -> None:
    assert download(ann, tmp_path).read_bytes() == body
    assert download(ann, tmp_path, "small.json").read_bytes() == b'{"a": 1}'


def test_a_cut_download_goes_on_where_it_was_cut(ann: HubClient, body: bytes, tmp_path: Path, faults: Faults) -> None:
    ranges: list[str] = []
    answers: list[Fault | None] = [Fault(cut=2 << 20), Fault(status=503), None]

    def rule(request: FaultRequest) -> Fault | None:
        if "/resolve/" not in request.path:
            return None
        ranges.append(request.headers.get("range", ""))
        return answers.pop(0)

    faults.rule = rule
    assert download(ann, tmp_path).read_bytes() == body
    assert ranges[0] == "bytes=0-" and ranges[1] == ranges[2]
    assert 0 < int(ranges[2].removeprefix("bytes=").removesuffix("-")) <= 2 << 20


def test_a_flipped_bit_is_found_and_the_file_is_fetched_once_more(
    ann: HubClient, body: bytes, tmp_path: Path, faults: Faults
) -> None:
    faults.rule = on("GET", "/resolve/", Fault(flip=1_000_000))
    assert download(ann, tmp_path).read_bytes() == body
    faults.rule = on("GET", "/resolve/", Fault(flip=1), Fault(flip=2))
    with pytest.raises(Corrupt, match=r"w\.safetensors: the bytes do not have the hash that the Hub lists, twice"):
        download(ann, tmp_path / "again")
    assert not list((tmp_path / "again").iterdir())


def test_a_file_that_is_there_already_is_checked_and_not_fetched_again(
    ann: HubClient, body: bytes, tmp_path: Path, faults: Faults
) -> None:
    target = download(ann, tmp_path)
    before = faults.count("GET", "/resolve/")
    assert download(ann, tmp_path).read_bytes() == body
    assert faults.count("GET", "/resolve/") == before
    target.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))  # a poisoned cache
    assert download(ann, tmp_path).read_bytes() == body


def test_a_listed_size_that_is_too_small_stops_the_transfer(ann: HubClient, body: bytes, tmp_path: Path) -> None:
    lie = RemoteFile("w.safetensors", 1000, "0" * 40, hashlib.sha256(body).hexdigest())
    with pytest.raises(Corrupt, match="more than the listed 1000 bytes came"):
        ann.download(ann.resolve("ann/model"), lie, tmp_path / "w")


def test_a_range_is_read_and_nothing_beyond_it(ann: HubClient, body: bytes) -> None:
    head = ann.resolve("ann/model")
    assert ann.read(head, "w.safetensors", start=8, stop=16) == body[8:16]
    assert ann.read(head, "w.safetensors", start=len(body) - 3, stop=len(body) + 9) == body[-3:]
    assert ann.read(head, "w.safetensors", start=len(body) + 1, stop=len(body) + 9) == b""
    with pytest.raises(NotFound, match=r"nope\.txt"):
        ann.read(head, "nope.txt", stop=1)


def test_reads_survive_429_and_500_and_give_up_on_a_pause_that_is_too_long(
    ann: HubClient, body: bytes, faults: Faults
) -> None:
    head = ann.resolve("ann/model")
    faults.rule = on("GET", "/resolve/", Fault(status=429), Fault(status=500))
    assert ann.read(head, "small.json", stop=4) == b'{"a"'
    faults.rule = on("GET", "/api/models", Fault(status=429, headers={"Retry-After": "1000000000"}))
    with pytest.raises(HubError, match="told to wait 1000000000 s, at most 60 s are granted"):
        list(ann.models("cold-fusion"))


def test_the_token_stays_at_home_when_a_page_link_leads_elsewhere(
    server: LocalHub, faults: Faults, ann: HubClient
) -> None:
    from huggingface_hub.utils import get_session

    away = server.endpoint.replace("127.0.0.1", "localhost")
    seen: list[str | None] = []

    def rule(request: FaultRequest) -> Fault | None:
        seen.append(request.headers.get("authorization"))
        return None

    faults.rule = rule
    ann.whoami()
    get_session().get(f"{away}/api/models", headers={"authorization": "Bearer hf_ann"})
    get_session().get(f"{away}/api/models", headers={"authorization": "Bearer hf_of_somebody_else"})
    connect("http://127.0.0.1:9")  # without a token, somewhere else
    get_session().get(f"{away}/api/models")
    assert seen == ["Bearer hf_ann", None, "Bearer hf_of_somebody_else", None]


def test_a_discussion_is_opened_once_even_when_its_answer_was_lost(ann: HubClient, faults: Faults) -> None:
    faults.rule = on("POST", "/discussions", Fault(land=True, status=503))
    first = ann.discuss("ann/model", "Part of v1 (commit abc)", "Thank you")
    assert ann.discuss("ann/model", "Part of v1 (commit abc)", "Thank you") == first
    assert ann.discuss("ann/model", "Part of v2 (commit abc)", "Thank you") == first + 1


def test_listings_carry_commit_tags_and_time_over_all_pages(ann: HubClient, server: LocalHub) -> None:
    for number in range(7):
        ann.create(f"ann/m{number}")
        card = b"---\ntags: [cold-fusion]\nbase_model: ibm/base\nbase_model_relation: finetune\n---\n"
        repo = f"ann/m{number}"
        ann.commit(repo, Change("card", ann.resolve(repo).sha, f"n{number}", {"README.md": card}))
    reader = connect(server.endpoint)
    found = {item.revision.repo: item for item in reader.models("cold-fusion", "base_model:ibm/base")}
    assert sorted(found) == [f"ann/m{n}" for n in range(7)]
    assert found["ann/m3"].revision == reader.resolve("ann/m3")
    assert "base_model:finetune:ibm/base" in found["ann/m3"].tags
    assert found["ann/m3"].modified.endswith("+00:00")


def test_an_endpoint_that_is_none_is_refused() -> None:
    with pytest.raises(HubError, match=r"endpoint must be http\(s\)://host"):
        connect("huggingface.co")


def test_nobody_listening_is_one_line(quick_pauses: list[float]) -> None:
    with pytest.raises(HubError, match=r"^ibm/base@main: ConnectError: "):
        connect("http://127.0.0.1:9", tries=2).resolve("ibm/base")
    assert quick_pauses == [0.5]


def test_a_hidden_repository_is_not_found(ann: HubClient, server: LocalHub) -> None:
    with pytest.raises(NotFound, match="ann/nothing@main"):
        connect(server.endpoint).resolve("ann/nothing")
    assert isinstance(ann.resolve("ann/model"), Revision)


def test_warnings_of_the_hubs_scanners_are_passed_on_for_the_files_asked_for(
    ann: HubClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.hf_api import RepoFile

    head = ann.resolve("ann/model")
    assert ann.flagged(head, [".gitattributes"]) == {}  # the embedded Hub scans nothing

    def scanned(path: str, status: str) -> RepoFile:
        scan = {"status": status, "avScan": None, "pickleImportScan": None}
        return RepoFile(path=path, size=1, oid="0" * 40, securityFileStatus=scan)

    answer = [scanned("a", "safe"), scanned("b", "unsafe"), scanned("c", "suspicious"), scanned("d", "queued")]
    monkeypatch.setattr(ann._api, "get_paths_info", lambda *_, **__: answer)
    assert ann.flagged(head, ["a", "b", "c", "d"]) == {"b": "unsafe", "c": "suspicious"}
