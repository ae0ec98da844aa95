"""Webhooks: what happened is written to an outbox in the database, and a thread carries it to the listeners."""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hubfusion.localhub.refusal import Refusal
from hubfusion.localhub.state import Hub
from hubfusion.localhub.store.repos import MAIN, Repo
from hubfusion.localhub.web import Call

log = logging.getLogger(__name__)
_WAITS = (0.0, 1.0, 5.0, 30.0)
"""Seconds before each try of a delivery; after the last it is dropped with a warning."""
_TIMEOUT = 10.0


def announce_content(call: Call, repo: Repo, moved: list[tuple[str, str, str]]) -> None:
    """Tell listeners that refs of a repository moved: (ref, old, new), `NOTHING` for one that was not there."""
    refs = [{"ref": ref, "oldSha": _sha(old), "newSha": _sha(new)} for ref, old, new in moved]
    announce(call, repo, {"action": "update", "scope": "repo.content"}, {"updatedRefs": refs})


def _sha(sha: str) -> str | None:
    return None if set(sha) == {"0"} else sha


def announce_repo(call: Call, repo: Repo, action: str, scope: str = "repo") -> None:
    """Tell listeners that a repository was made, moved, changed or deleted."""
    announce(call, repo, {"action": action, "scope": scope}, {})


def announce_discussion(
    call: Call, repo: Repo, document: dict[str, Any], action: str, comment: dict[str, Any] | None = None
) -> None:
    """Tell listeners of a discussion or of one comment in it."""
    where = f"{call.hub.endpoint}/{repo.kind.prefix}{repo.id}/discussions/{document['num']}"
    api = f"{call.hub.endpoint}/api/{repo.kind.plural}/{repo.id}/discussions/{document['num']}"
    extra: dict[str, Any] = {
        "discussion": {
            "id": f"{repo.number}-{document['num']}",
            "num": document["num"],
            "title": document["title"],
            "author": {"id": document["author"]},
            "url": {"web": where, "api": api},
            "isPullRequest": document["pull"],
            "status": document["status"],
            "changes": {"base": document["target"], "mergeCommitId": document["merged"]} if document["pull"] else None,
            "pinned": False,
        }
    }
    scope = "discussion"
    said = comment or (document["events"][0] if action == "create" and document["events"] else None)
    if said is not None:
        scope = "discussion.comment" if comment is not None else scope
        extra["comment"] = {
            "id": said["id"],
            "author": {"id": said["author"]},
            "content": said["data"]["raw"],
            "hidden": said["data"]["hidden"],
            "url": {"web": f"{where}#{said['id']}"},
        }
    announce(call, repo, {"action": action, "scope": scope}, extra)


def announce(call: Call, repo: Repo, event: dict[str, str], extra: dict[str, Any]) -> None:
    """Put an event into the outbox of every webhook that watches it."""
    hub = call.hub
    hooks = [hook for hook in hub.db.documents("webhook") if _watches(hub, hook, repo, event["scope"])]
    if not hooks:
        return
    payload = {
        "event": event,
        "repo": {
            "type": repo.kind,
            "name": repo.id,
            "id": f"{repo.number:024x}",
            "private": repo.private,
            "headSha": hub.repos.git(repo).ref(MAIN),
            "owner": {"id": repo.namespace},
            "url": {"web": f"{call.hub.endpoint}/{repo.kind.prefix}{repo.id}", "api": _api(call, repo)},
            "tags": [],
        },
        **extra,
    }
    for hook in hooks:
        key = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
        delivery = {"key": key, "hook": hook["id"], "payload": payload | {"webhook": {"id": hook["id"], "version": 3}}}
        hub.db.put_document("outbox", key, hook["owner"], delivery)
    hub.outbox.set()


def _api(call: Call, repo: Repo) -> str:
    return f"{call.hub.endpoint}/api/{repo.kind.plural}/{repo.id}"


def _watches(hub: Hub, hook: dict[str, Any], repo: Repo, scope: str) -> bool:
    if hook["disabled"] or scope.split(".")[0] not in hook["domains"]:
        return False
    if repo.private and not hub.accounts.owns(hook["owner"], repo.namespace):
        return False
    names = {(str(repo.kind), repo.id), ("user", repo.namespace), ("org", repo.namespace)}
    return any((watched["type"], watched["name"]) in names for watched in hook["watched"])


class Courier:
    """Empties the outbox: in order for each webhook, several webhooks at once, each delivery tried a few times."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="localhub-webhooks", daemon=True)
        self._carriers = ThreadPoolExecutor(8, thread_name_prefix="localhub-webhook")
        self._busy: set[str] = set()

    def start(self) -> None:
        """Begin; what a killed process left in the outbox goes first."""
        self._hub.outbox.set()
        self._thread.start()

    def stop(self) -> None:
        """Finish the deliveries at hand and end; the rest stays in the outbox."""
        self._stop.set()
        self._hub.outbox.set()
        if self._thread.is_alive():
            self._thread.join()
        self._carriers.shutdown(cancel_futures=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._hub.outbox.wait()
            self._hub.outbox.clear()
            for hook in {delivery["hook"] for delivery in self._hub.db.documents("outbox")} - self._busy:
                self._busy.add(hook)
                self._carriers.submit(self._drain, hook)

    def _drain(self, hook: str) -> None:
        try:
            for delivery in self._hub.db.documents("outbox"):
                if delivery["hook"] == hook and not self._stop.is_set():
                    self._deliver(delivery)
        finally:
            self._busy.discard(hook)
            if any(delivery["hook"] == hook for delivery in self._hub.db.documents("outbox")):
                self._hub.outbox.set()  # more came meanwhile

    def _deliver(self, delivery: dict[str, Any]) -> None:
        hook = self._hub.db.document("webhook", delivery["hook"])
        error = ""
        for wait in _WAITS if hook and not hook["disabled"] else ():
            if self._stop.wait(wait):
                return
            try:
                self._carry(hook or {}, delivery["payload"])
                break
            except (OSError, ValueError, Refusal) as failure:
                error = str(failure)
        else:
            log.warning("webhook %s: delivery dropped: %s", delivery["hook"], error or "the webhook is gone")
        self._hub.db.delete_document("outbox", delivery["key"])

    def _carry(self, hook: dict[str, Any], payload: dict[str, Any]) -> None:
        if hook["job"]:
            self._hub.jobs.run_webhook(hook, payload)
            return
        headers = {"Content-Type": "application/json", "User-Agent": "localhub-webhook"}
        if hook.get("secret"):
            headers["X-Webhook-Secret"] = hook["secret"]
        request = urllib.request.Request(hook["url"], json.dumps(payload).encode(), headers, method="POST")
        with _OPENER.open(request, timeout=_TIMEOUT) as response:
            response.read(1)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """A listener that redirects is a listener that failed: its secret is not carried elsewhere."""


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)
