"""Requests that nobody's client sends: none may hurt the Hub, read what is not theirs, or get a 500."""

from __future__ import annotations

import itertools
import json
import re
import socket

import pytest
from huggingface_hub.utils import get_session

from hubfusion.localhub.server import _AREAS
from tests.localhub.conftest import World

JUNK = [
    b"", b"{}", b"[]", b"null", b"1", b'"text"', b"{", b"\xff\xfe", b"\0", b"[" * 20_000, b'{"a":' * 20_000,
    b'{"files":[1],"objects":[1],"operation":"upload","paths":[{}],"title":1,"name":{},"type":[],"tag":[],"status":{},'
    b'"watched":{},"url":[],"command":"x","jobSpec":[],"item":[],"user":{},"key":1,"organization":[],"message":{}}',
    b'{"files":[{"path":[],"size":-1}],"objects":[{"oid":"x","size":"y"}],"title":"\\ud800","name":"\\u0000",'
    b'"type":"model","comment":"\\ud800","description":{},"status":"open","content":[]}',
    b'{"key":"header","value":{"summary":"\\ud800x","parentCommit":[]}}\n{"key":"file","value":{"path":"a","content":1}}',
]  # fmt: skip


@pytest.fixture(scope="module")
def routes(world: World) -> list[tuple[str, str]]:
    """Every method and path of the Hub, filled in with a repository that exists."""
    world.ann.create_repo("ann/x")
    world.ann.create_repo("ann/x", repo_type="dataset")
    world.ann.create_repo("ann/x", repo_type="space", space_sdk="static")
    world.ann.create_discussion("ann/x", title="first")
    values = {"ns": "ann", "name": "x", "num": "1", "rev": "main", "user": "ann", "kind": "models"}
    found = []
    for route in itertools.chain.from_iterable(area.routes.all for area in _AREAS):
        pattern = route.pattern.pattern.replace("\\.", ".")
        path = re.sub(r"\(\?P<(\w+)>([^)]*)\)", lambda m: _fill(m, values), pattern)
        found.append((route.method, path))
    return found


def _fill(match: re.Match[str], values: dict[str, str]) -> str:
    name, allowed = match[1], match[2]
    words = allowed.split("|") if re.fullmatch(r"[\w|-]+", allowed) else []
    return values[name] if name in values and (not words or values[name] in words) else words[0] if words else "thing"


def test_no_route_answers_junk_with_a_500(world: World, routes: list[tuple[str, str]]) -> None:
    assert len(routes) > 90
    bad = []
    for (method, path), body in itertools.product(routes, JUNK):
        if method == "DELETE" and not body or (method == "GET" and body):
            continue
        headers = {"Authorization": "Bearer hf_ann", "Content-Type": "application/json"}
        if path == "/api/repos/delete":
            headers["Authorization"] = "Bearer hf_bob"
        answer = get_session().request(method, world.endpoint + path, content=body, headers=headers)
        if answer.status_code >= 500:
            bad.append((method, path, body[:60], answer.text[:200]))
    assert bad == []


ODD = [
    "%00",
    "%ff",
    "..",
    "%2e%2e%2f%2e%2e",
    "-x",
    "a" * 3000,
    "'; DROP TABLE repos; --",
    "{}",
    "%0a",
    "refs%2Fpr%2F99999999999",
]


def test_no_route_answers_odd_paths_with_a_500_or_with_a_file(world: World, routes: list[tuple[str, str]]) -> None:
    host, port = world.endpoint.removeprefix("http://").split(":")
    bad = []
    for (method, path), odd in itertools.product(routes, ODD):
        for target in {re.sub(r"\b(thing|1)\b", odd, path), path.replace("main", odd), path.replace("/x", "/" + odd)}:
            with socket.create_connection((host, int(port)), 10) as raw:
                raw.sendall(
                    f"{method} {target} HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode()
                )
                answer = b""
                while block := raw.recv(65536):
                    answer += block
            if not answer.startswith(b"HTTP/1.1 ") or answer[9:10] == b"5" or b"root:" in answer:
                bad.append((method, target[:200], answer[:100]))
    assert bad == []


@pytest.mark.parametrize(
    "path",
    ["/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/ann/x/resolve/main/../../../hub.sqlite", "//etc/passwd"],
)
def test_no_path_leads_out_of_the_store(world: World, path: str, routes: object) -> None:
    host, port = world.endpoint.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        assert raw.recv(65536).split()[1] in (b"400", b"404")


def test_a_body_is_bounded_whether_announced_or_not(world: World, routes: object) -> None:
    url = f"{world.endpoint}/api/repos/create"
    headers = {"Authorization": "Bearer hf_ann"}
    host, port = world.endpoint.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as raw:
        raw.sendall(b"POST /api/repos/create HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999999\r\n\r\n")
        assert raw.recv(65536).startswith(b"HTTP/1.1 413")
    chunks = (bytes(1 << 20) for _ in range(20))
    try:
        assert get_session().post(url, content=chunks, headers=headers).status_code == 413
    except Exception as error:  # the server may hang up while the client still sends
        assert "reset" in str(error).lower() or "broken" in str(error).lower() or "disconnect" in str(error).lower()


def test_one_poisoned_repository_does_not_break_the_listing(world: World) -> None:
    """A file that is not what its name says must not take the others with it."""
    poisons = {
        "config.json": b'{"model_type": {"a": 1e999}, "architectures": [1, null]}',
        "model.safetensors": b"\xff" * 64,
        "model.safetensors.index.json": b'{"weight_map": {"a": "../../etc/passwd", "b": [1]}}',
        ".eval_results/x.yaml": b"- 1\n- {dataset: 3, value: x}\n",
    }
    from huggingface_hub import CommitOperationAdd

    world.ann.create_repo("ann/poison")
    operations = [CommitOperationAdd(path, content) for path, content in poisons.items()]
    world.ann.create_commit("ann/poison", operations, commit_message="poison")
    readme = {"path": "README.md", "content": '---\ntags: ["\\ud800", 3, null, {a: 1}]\nlanguage: [[en]]\n---\n'}
    lines = [{"key": "header", "value": {"summary": "x"}}, {"key": "file", "value": readme}]
    get_session().post(
        f"{world.endpoint}/api/models/ann/poison/commit/main",
        content="\n".join(map(json.dumps, lines)),
        headers={"Authorization": "Bearer hf_ann"},
    )
    listed = {model.id for model in world.anon.list_models(full=True, cardData=True, expand=None)}
    assert "ann/poison" in listed
    world.ann.create_repo("ann/poison-bench", repo_type="dataset")
    assert world.anon.get_dataset_leaderboard("ann/poison-bench") == []


def test_tokens_are_compared_whole_and_basic_credentials_are_checked(world: World) -> None:
    url = f"{world.endpoint}/api/whoami-v2"
    for value in ("Bearer hf_an", "Bearer hf_ann2", "Bearer", "Basic !!!", "Basic YW5uOndyb25n", "Digest x", "hf_ann"):
        assert get_session().get(url, headers={"Authorization": value}).status_code == 401, value
    assert get_session().get(url, headers={"Authorization": "Basic YW5uOmhmX2Fubg=="}).json()["name"] == "ann"
