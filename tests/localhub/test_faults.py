"""Faults on purpose: what a test can make go wrong, and that nothing else does."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session

from hubfusion.localhub import LOST, Fault, FaultRequest, LocalHub
from tests.localhub.conftest import USERS, World, clients


class Once:
    """A plan: this fault for the first request that fits, then none."""

    def __init__(self) -> None:
        self.fault: Fault | None = None
        self.fits: Callable[[FaultRequest], bool] = lambda request: True

    def __call__(self, request: FaultRequest) -> Fault | None:
        if self.fault is None or not self.fits(request):
            return None
        fault, self.fault = self.fault, None
        return fault

    def on(self, method: str, part: str, fault: Fault) -> None:
        self.fits = lambda request: request.method == method and part in request.path
        self.fault = fault


@pytest.fixture(scope="module")
def plan() -> Once:
    return Once()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, plan: Once):
    with LocalHub(tmp_path_factory.mktemp("hub"), USERS, faults=plan) as hub:
        made = clients(hub)
        made.ann.create_repo("ann/x")
        made.ann.upload_file(path_or_fileobj=bytes(200_000), path_in_repo="w.bin", repo_id="ann/x")
        yield made


def add(world: World, name: str) -> str:
    commit = world.ann.create_commit("ann/x", [CommitOperationAdd(name, name.encode())], commit_message=name)
    return str(commit.oid)


def test_a_lost_answer_has_landed_and_a_refused_request_has_not(world: World, plan: Once) -> None:
    before = world.ann.model_info("ann/x").sha
    plan.on("POST", "/commit/", Fault(status=503))
    with pytest.raises(HfHubHTTPError) as error:
        add(world, "refused")
    assert error.value.response.status_code == 503 and world.ann.model_info("ann/x").sha == before
    plan.on("POST", "/commit/", LOST)
    with pytest.raises(Exception, match="(?i)disconnect|reset|closed"):
        add(world, "lost")
    assert world.ann.model_info("ann/x").sha != before and "lost" in world.ann.list_repo_files("ann/x")
    plan.on("POST", "/commit/", Fault(land=True, status=500))
    with pytest.raises(HfHubHTTPError):
        add(world, "landed")
    assert "landed" in world.ann.list_repo_files("ann/x") and "refused" not in world.ann.list_repo_files("ann/x")


def test_an_answer_can_carry_headers_and_come_late(world: World, plan: Once) -> None:
    plan.on("GET", "/api/models/ann/x", Fault(delay=0.3, status=429, headers={"Retry-After": "7"}))
    start = time.monotonic()
    answer = get_session().get(f"{world.endpoint}/api/models/ann/x")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7") and time.monotonic() - start >= 0.3
    assert get_session().get(f"{world.endpoint}/api/models/ann/x").status_code == 200


def test_a_body_can_be_cut_and_a_byte_flipped(world: World, plan: Once, tmp_path: Path) -> None:
    url = f"{world.endpoint}/ann/x/resolve/main/w.bin"
    plan.on("GET", "w.bin", Fault(cut=50_000))
    got = b""
    with pytest.raises(Exception, match="(?i)closed|incomplete|reset|disconnect"):
        with get_session().stream("GET", url) as answer:
            for block in answer.iter_bytes():
                got += block
    assert len(got) <= 50_000
    plan.on("GET", "w.bin", Fault(flip=150_000))
    spoiled = get_session().get(url).content
    assert [at for at, byte in enumerate(spoiled) if byte] == [150_000] and len(spoiled) == 200_000


def test_the_client_resumes_a_download_that_was_cut(world: World, plan: Once, tmp_path: Path) -> None:
    plan.on("GET", "w.bin", Fault(cut=120_000))
    path = world.ann.hf_hub_download("ann/x", "w.bin", local_dir=tmp_path)
    assert Path(path).read_bytes() == bytes(200_000)
