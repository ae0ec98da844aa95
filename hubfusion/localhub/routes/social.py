"""Likes, access requests to gated repositories, leaderboards, and what belongs to Spaces."""

from __future__ import annotations

import json
import time
from typing import Any

from starlette.responses import Response

from hubfusion.localhub.access import is_visible, visible_repo, written_repo
from hubfusion.localhub.facts import when
from hubfusion.localhub.info import heads_of, page_of
from hubfusion.localhub.refusal import Refusal
from hubfusion.localhub.store.repos import Kind, Repo
from hubfusion.localhub.web import Call, Routes, answer

routes = Routes()
_HERE = "/api/{kind:models|datasets|spaces}/{ns}/{name}"
_SPACE = "/api/{kind:spaces}/{ns}/{name}"
_STATES = ("pending", "accepted", "rejected")


@routes.add("GET", _HERE + "/likers")
def likers(call: Call) -> Response:
    """Who likes a repository."""
    repo = visible_repo(call)
    rows = call.hub.db.rows("SELECT user FROM likes WHERE repo = ? ORDER BY at", repo.number)
    users = [call.hub.accounts.avatar(row["user"], call.base) | {"user": row["user"]} for row in rows]
    page, link = page_of(call, users, 1000)
    return answer(page, headers=link)


@routes.add("POST|DELETE", _HERE + "/like")
def like(call: Call) -> Response:
    """Like a repository, or no longer."""
    repo, user = visible_repo(call), call.require_user()
    with call.hub.db.write() as connection:
        if call.method == "POST":
            connection.execute("INSERT OR IGNORE INTO likes VALUES (?, ?, ?)", (repo.number, user, time.time()))
        else:
            connection.execute("DELETE FROM likes WHERE repo = ? AND user = ?", (repo.number, user))
    return answer({"success": True})


@routes.add("GET", "/api/users/{user}/likes")
def liked(call: Call) -> Response:
    """What a user likes."""
    rows = call.hub.db.rows("SELECT repo, at FROM likes WHERE user = ? ORDER BY at DESC", call.params["user"])
    by_number = {repo.number: repo for repo in call.hub.repos.all()}
    shown: list[dict[str, Any]] = []
    for row in rows:
        repo = by_number.get(row["repo"])
        if repo and is_visible(call, repo):
            shown.append({"createdAt": when(row["at"]), "repo": {"name": repo.id, "type": repo.kind}})
    page, link = page_of(call, shown, 1000)
    return answer(page, headers=link)


# Access to gated repositories


def _request_of(call: Call, repo: Repo, user: str) -> dict[str, Any] | None:
    row = call.hub.db.row("SELECT body FROM access WHERE repo = ? AND user = ?", repo.number, user)
    return json.loads(row["body"]) if row else None


def _put_request(call: Call, repo: Repo, user: str, status: str, fields: dict[str, Any] | None = None) -> None:
    body = {"status": status, "at": time.time(), "fields": fields}
    with call.hub.db.write() as connection:
        connection.execute("INSERT OR REPLACE INTO access VALUES (?, ?, ?)", (repo.number, user, json.dumps(body)))


@routes.add("GET", _HERE + "/user-access-request/{status:pending|accepted|rejected}")
def access_requests(call: Call) -> Response:
    """The requests in one state; for owners."""
    repo = written_repo(call)
    shown = []
    for row in call.hub.db.rows("SELECT user, body FROM access WHERE repo = ? ORDER BY rowid", repo.number):
        body = json.loads(row["body"])
        if body["status"] == call.params["status"]:
            user = {"user": row["user"], "fullname": row["user"], "email": None}
            shown.append(
                {"user": user, "requestId": row["user"], "status": body["status"], "timestamp": when(body["at"])}
                | ({"fields": body["fields"]} if body["fields"] else {})
            )
    page, link = page_of(call, shown, 1000)
    return answer(page, headers=link)


@routes.add("POST", "/{ns}/{name}/ask-access")
@routes.add("POST", "/{kind:datasets|spaces}/{ns}/{name}/ask-access")
def ask_access(call: Call) -> Response:
    """Ask for access; a repository with automatic gating grants it at once."""
    repo, user = visible_repo(call), call.require_user()
    if not repo.gated:
        raise Refusal(400, f"{repo.id} is not gated")
    if _request_of(call, repo, user):
        raise Refusal(400, f"access to {repo.id} was already asked for")
    _put_request(call, repo, user, "accepted" if repo.gated == "auto" else "pending", dict(call.form()))
    return answer({"success": True})


@routes.add("POST", _HERE + "/user-access-request/{action:handle|grant|cancel}")
def handle_access(call: Call) -> Response:
    """Accept, reject or take back a request, or grant access unasked; for owners."""
    repo, body = written_repo(call), call.json()
    user = str(body.get("user") or body.get("requestId") or "")
    if not repo.gated:
        raise Refusal(400, f"{repo.id} is not gated")
    if user not in call.hub.accounts.users:
        raise Refusal(404, f"User {user[:100]} not found")
    found = _request_of(call, repo, user)
    if call.params["action"] == "grant":
        if found:
            raise Refusal(400, f"{user} has already asked for access to {repo.id}: {found['status']}")
        _put_request(call, repo, user, "accepted")
        return answer({"success": True})
    status = "pending" if call.params["action"] == "cancel" else body.get("status")
    if status not in _STATES:
        raise Refusal(400, f"status must be one of {', '.join(_STATES)}, got {str(status)[:40]!r}")
    if found is None or found["status"] == status:
        raise Refusal(404, f"no request of {user} to {repo.id} that is not {status} yet")
    _put_request(call, repo, user, status, found["fields"])
    return answer({"success": True})


@routes.add("GET", "/api/{kind:datasets}/{ns}/{name}/leaderboard")
def leaderboard(call: Call) -> Response:
    """Models by the value that their `.eval_results` report on this dataset, best first."""
    dataset = visible_repo(call)
    entries: list[dict[str, Any]] = []
    for repo, _, facts in heads_of(call, Kind.MODEL):
        for result in facts.get("evalResults") or []:
            data = result["data"]
            on = data.get("dataset") if isinstance(data.get("dataset"), dict) else {}
            if on.get("id") == dataset.id and isinstance(data.get("value"), int | float):
                entries.append(
                    {
                        "modelId": repo.id,
                        "value": data["value"],
                        "filename": result["filename"],
                        "verified": False,
                        "source": data.get("source"),
                        "notes": data.get("notes"),
                        "author": call.hub.accounts.avatar(repo.namespace, call.base),
                    }
                )
    entries.sort(key=lambda entry: -entry["value"])
    return answer([{"rank": rank, **entry} for rank, entry in enumerate(entries, 1)])


# Spaces: their settings are kept; nothing is run.


@routes.add("GET|POST|DELETE", _SPACE + "/{what:secrets|variables}")
def space_settings(call: Call) -> Response:
    """Secrets (whose values never leave again) and variables of a Space."""
    found, what = written_repo(call), call.params["what"]
    area = f"space-{what}"
    with call.hub.repos.writing(found) as repo:
        kept = call.hub.db.document(area, str(repo.number)) or {}
        if call.method != "GET":
            body = call.json()
            key = body.get("key")
            if not isinstance(key, str) or not key.isidentifier():
                raise Refusal(400, f"key must be a name for an environment variable, got {str(key)[:60]!r}")
            kept.pop(key, None)
            if call.method == "POST":
                kept[key] = {
                    "key": key,
                    "value": str(body.get("value", "")),
                    "description": str(body.get("description") or ""),
                    "updatedAt": when(time.time()),
                }
            call.hub.db.put_document(area, str(repo.number), repo.namespace, kept)
    hidden = {"value"} if what == "secrets" else set()
    return answer({key: {k: v for k, v in entry.items() if k not in hidden} for key, entry in kept.items()})


@routes.add("GET", _SPACE + "/runtime")
def space_runtime(call: Call) -> Response:
    """A Space is only its files here: it is always stopped."""
    visible_repo(call)
    return answer({"stage": "STOPPED", "hardware": {"current": None, "requested": None}, "storage": None})
