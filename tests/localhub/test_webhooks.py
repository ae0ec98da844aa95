"""Webhooks: what is delivered, to whom, and that nothing waits for a listener that does not answer."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, WebhookPayload
from huggingface_hub.errors import HfHubHTTPError

from hubfusion.localhub import LocalHub
from tests.localhub.conftest import USERS, World, clients


class Listener:
    """An HTTP server that keeps what is posted to it; paths under /fail answer 500, under /hang they wait."""

    def __init__(self) -> None:
        self.got: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        outer = self

        class Answer(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.got.append((self.path, dict(self.headers), json.loads(body)))
                if self.path.startswith("/hang"):
                    time.sleep(3)
                self.send_response(500 if self.path.startswith("/fail") else 200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def wait(self, count: int, path: str = "/hook") -> list[dict[str, Any]]:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            found = [payload for at, _, payload in self.got if at == path]
            if len(found) >= count:
                return found
            time.sleep(0.02)
        raise AssertionError(f"{len(self.got)} deliveries, {count} expected: {self.got}")


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.server.shutdown()
    made.server.server_close()


def watch(kind: str, name: str) -> list[dict[str, str]]:
    return [{"type": kind, "name": name}]


def test_commits_and_comments_are_delivered_in_order_with_the_secret(world: World, listener: Listener) -> None:
    world.ann.create_repo("ann/hooked")
    hook = world.ann.create_webhook(url=f"{listener.url}/hook", watched=watch("model", "ann/hooked"), secret="s3")
    oid = world.ann.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="ann/hooked").oid
    opened = world.bob.create_discussion("ann/hooked", title="hello", description="are you there?")
    world.bob.comment_discussion("ann/hooked", opened.num, "@bot please")
    payloads = listener.wait(3)
    parsed = [WebhookPayload.model_validate(payload) for payload in payloads]
    assert [(p.event.scope, p.event.action) for p in parsed] == [
        ("repo.content", "update"),
        ("discussion", "create"),
        ("discussion.comment", "create"),
    ]
    assert payloads[0]["updatedRefs"][0]["newSha"] == oid == payloads[0]["repo"]["headSha"]
    assert (parsed[2].comment.content, parsed[2].comment.author.id) == ("@bot please", "bob")
    assert parsed[2].discussion.url.api == f"{world.endpoint}/api/models/ann/hooked/discussions/{opened.num}"
    assert {headers["X-Webhook-Secret"] for _, headers, _ in listener.got} == {"s3"}
    world.ann.delete_webhook(hook.id)


def test_the_address_in_a_delivery_does_not_come_from_who_caused_it(world: World, listener: Listener) -> None:
    """A listener answers to `discussion.url.api` with its token: nobody may choose that address for it."""
    from huggingface_hub.utils import get_session

    world.ann.create_repo("ann/host")
    hook = world.ann.create_webhook(url=f"{listener.url}/hook", watched=watch("model", "ann/host"))
    url = f"{world.endpoint}/api/models/ann/host/discussions"
    headers = {"Authorization": "Bearer hf_bob", "Host": "evil.example"}
    assert get_session().post(url, json={"title": "hello", "description": "x"}, headers=headers).status_code == 200
    assert "evil.example" not in json.dumps(listener.wait(1))
    world.ann.delete_webhook(hook.id)


def test_a_disabled_webhook_and_other_domains_are_silent(world: World, listener: Listener) -> None:
    world.ann.create_repo("ann/quiet")
    talk = world.ann.create_webhook(url=f"{listener.url}/hook", watched=watch("user", "ann"), domains=["discussion"])
    off = world.ann.create_webhook(url=f"{listener.url}/off", watched=watch("user", "ann"))
    world.ann.disable_webhook(off.id)
    assert world.ann.get_webhook(off.id).disabled
    world.ann.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="ann/quiet")
    world.ann.create_discussion("ann/quiet", title="hello")
    listener.wait(1)
    assert [(at, payload["event"]["scope"]) for at, _, payload in listener.got] == [("/hook", "discussion")]
    for hook in (talk, off):
        world.ann.delete_webhook(hook.id)
    assert world.ann.list_webhooks() == []


def test_private_repositories_are_told_to_their_owners_only(world: World, listener: Listener) -> None:
    world.ann.create_repo("ann/private", private=True)
    foreign = world.bob.create_webhook(url=f"{listener.url}/bob", watched=watch("user", "ann"))
    own = world.ann.create_webhook(url=f"{listener.url}/hook", watched=watch("user", "ann"))
    world.ann.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="ann/private")
    listener.wait(1)
    assert {at for at, _, _ in listener.got} == {"/hook"}
    with pytest.raises(HfHubHTTPError):
        world.ann.get_webhook(foreign.id)
    world.bob.delete_webhook(foreign.id)
    world.ann.delete_webhook(own.id)


def test_a_slow_listener_delays_neither_commits_nor_other_listeners(world: World, listener: Listener) -> None:
    world.ann.create_repo("ann/slow")
    hooks = [
        world.ann.create_webhook(url=listener.url + path, watched=watch("model", "ann/slow"))
        for path in ("/hang", "/fail", "/hook")
    ]
    start = time.monotonic()
    for n in range(3):
        world.ann.create_commit("ann/slow", [CommitOperationAdd("a", b"%d" % n)], commit_message=f"{n}")
    listener.wait(3)
    assert time.monotonic() - start < 2.5
    for hook in hooks:
        world.ann.delete_webhook(hook.id)


def test_what_was_not_delivered_is_delivered_after_a_restart(directory: Path, listener: Listener) -> None:
    with LocalHub(directory, USERS) as hub:
        ann = clients(hub).ann
        ann.create_repo("ann/later")
        ann.create_webhook(url=f"{listener.url}/hook", watched=watch("user", "ann"))
        hub._courier.stop()
        oid = ann.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="ann/later").oid
    assert listener.got == []
    with LocalHub(directory, USERS):
        assert listener.wait(1)[0]["updatedRefs"][0]["newSha"] == oid


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "file:///etc/passwd"},
        {"url": "nonsense"},
        {"watched": [{"type": "galaxy", "name": "x"}]},
        {"secret": "a\nb"},
    ],
)
def test_a_webhook_that_makes_no_sense_is_refused(world: World, wrong: dict[str, Any]) -> None:
    with pytest.raises(HfHubHTTPError) as error:
        world.ann.create_webhook(**({"url": "http://127.0.0.1:9/x", "watched": watch("user", "ann")} | wrong))
    assert error.value.response.status_code == 400
