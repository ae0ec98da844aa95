"""Discussions and pull requests."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from hubfusion.localhub import discussions as talk
from hubfusion.localhub.access import proposed_repo, require_grant, visible_repo
from hubfusion.localhub.refusal import Refusal
from hubfusion.localhub.store.repos import Repo
from hubfusion.localhub.web import Call, Routes, answer
from hubfusion.localhub.webhooks import announce_content, announce_discussion

routes = Routes()
_ALL = "/api/{kind:models|datasets|spaces}/{ns}/{name}/discussions"
_ONE = _ALL + "/{num}"
_PAGE = 50


def _number(call: Call) -> int:
    text = call.params["num"]
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise Refusal(404, f"Discussion {text[:40]} not found")
    return int(text)


def _may_moderate(call: Call, repo: Repo, author: str) -> str:
    user = call.require_user()
    if user != author and not call.hub.accounts.owns(user, repo.namespace):
        raise Refusal(403, "Forbidden: only the author or an owner of the repository may do this")
    return user


@routes.add("GET", _ALL)
def list_discussions(call: Call) -> Response:
    """One page of discussions, newest first, filtered by type, status and author."""
    repo = visible_repo(call)
    wanted_kind, status, author = (call.query.get(name) for name in ("type", "status", "author"))
    found = [
        document
        for document in talk.every(call.hub, repo)
        if (wanted_kind in (None, "all") or document["pull"] == (wanted_kind == "pull_request"))
        and (status in (None, "all") or (status == "open") == (document["status"] in ("open", "draft")))
        and (author is None or document["author"] == author)
    ]
    start = call.number("p", 0, 10_000_000) * _PAGE
    page = [talk.show(document, repo) for document in found[start : start + _PAGE]]
    return answer({"discussions": page, "count": len(found), "start": start})


@routes.add("POST", _ALL)
def create_discussion(call: Call) -> Response:
    """Open a discussion, or a draft pull request."""
    found, body = proposed_repo(call), call.json()
    user, title = call.require_user(), talk.checked_title(body.get("title"))
    text = talk.checked_comment(body["description"]) if body.get("description") else ""
    with call.hub.repos.writing(found) as repo:
        make = talk.open_draft if body.get("pullRequest") else talk.open_discussion
        document = make(call.hub, repo, user, title, text)
    announce_discussion(call, repo, document, "create")
    return answer({"num": document["num"], "pullRequest": document["pull"]})


@routes.add("GET", _ONE)
def discussion(call: Call) -> Response:
    """One discussion with its events."""
    repo = visible_repo(call)
    if call.flag("diff"):
        require_grant(call, repo)
    return answer(talk.show_whole(call.hub, repo, talk.find(call.hub, repo, _number(call)), call.flag("diff")))


@routes.add("POST", _ONE + "/comment")
def comment(call: Call) -> Response:
    """Add a comment."""
    found, user = visible_repo(call), call.require_user()
    item = talk.comment_event(user, talk.checked_comment(call.json().get("comment")))
    with call.hub.repos.writing(found) as repo:
        document = talk.find(call.hub, repo, _number(call))
        document["events"].append(item)
        talk.save(call.hub, repo, document)
    announce_discussion(call, repo, document, "create", item)
    return answer({"newMessage": talk.show_event(item)})


def _comment(document: talk.Document, comment_id: str) -> dict[str, Any]:
    events: list[dict[str, Any]] = document["events"]
    for item in events:
        if item["id"] == comment_id.lower() and item["type"] == "comment":
            return item
    raise Refusal(404, f"Comment {comment_id[:40]} not found")


@routes.add("POST", _ONE + "/comment/{comment}/{what:edit|hide}")
def change_comment(call: Call) -> Response:
    """Edit one's own comment, or hide a comment for good."""
    found, user = visible_repo(call), call.require_user()
    with call.hub.repos.writing(found) as repo:
        document = talk.find(call.hub, repo, _number(call))
        item = _comment(document, call.params["comment"])
        data = item["data"]
        if call.params["what"] == "hide":
            _may_moderate(call, repo, item["author"])
            data.update(hidden=True, raw="This comment has been hidden", history=[])
        else:
            if user != item["author"]:
                raise Refusal(403, "Forbidden: only its author may edit a comment")
            if data["hidden"]:
                raise Refusal(400, "a hidden comment cannot be edited")
            data["history"].append(data["raw"])
            data.update(edited=True, raw=talk.checked_comment(call.json().get("content")))
        talk.save(call.hub, repo, document)
    announce_discussion(call, repo, document, "update", item)
    return answer({"updatedComment": talk.show_event(item)})


@routes.add("POST", _ONE + "/title")
def rename(call: Call) -> Response:
    """Change the title."""
    found, title = visible_repo(call), talk.checked_title(call.json().get("title"))
    with call.hub.repos.writing(found) as repo:
        document = talk.find(call.hub, repo, _number(call))
        user = _may_moderate(call, repo, document["author"])
        item = talk.event("title-change", user, {"from": document["title"], "to": title})
        document["title"] = title
        document["events"].append(item)
        talk.save(call.hub, repo, document)
    announce_discussion(call, repo, document, "update")
    return answer({"newTitle": talk.show_event(item)})


@routes.add("POST", _ONE + "/status")
def change_status(call: Call) -> Response:
    """Open or close, with an optional comment."""
    found, body = visible_repo(call), call.json()
    status = body.get("status")
    if status not in ("open", "closed"):
        raise Refusal(400, f"status must be open or closed, got {status!r}")
    with call.hub.repos.writing(found) as repo:
        document = talk.find(call.hub, repo, _number(call))
        user = _may_moderate(call, repo, document["author"])
        if document["status"] == "merged":
            raise Refusal(400, "a merged pull request stays merged")
        if body.get("comment"):
            document["events"].append(talk.comment_event(user, talk.checked_comment(body["comment"])))
        item = talk.event("status-change", user, {"status": status})
        document["status"] = status
        document["events"].append(item)
        talk.save(call.hub, repo, document)
    announce_discussion(call, repo, document, "update")
    return answer({"newStatus": talk.show_event(item)})


@routes.add("POST", _ONE + "/merge")
def merge(call: Call) -> Response:
    """Merge a pull request; only owners of the repository may."""
    found, user = visible_repo(call), call.require_user()
    if not call.hub.accounts.owns(user, found.namespace):
        raise Refusal(403, "Forbidden: only an owner of the repository may merge")
    text = str(call.json().get("comment") or "")
    with call.hub.repos.writing(found) as repo:
        document = talk.find(call.hub, repo, _number(call))
        old, new = talk.merge(call.hub, repo, document, user, text.strip())
    announce_content(call, repo, [(document["target"], old, new)])
    announce_discussion(call, repo, document, "update")
    return answer({"success": True, "mergeCommitId": new})
