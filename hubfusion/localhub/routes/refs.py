"""Branches, tags, history."""

from __future__ import annotations

import time
from typing import Any

from starlette.responses import Response

from hubfusion.localhub.access import commit_of, visible_repo, written_repo
from hubfusion.localhub.commits import branch_ref, publish
from hubfusion.localhub.facts import when
from hubfusion.localhub.refusal import Refusal, missing_revision
from hubfusion.localhub.store.git import CONVERTS, NOTHING, Commit, GitRepo, RefMoved, Signature, is_ref_name
from hubfusion.localhub.store.repos import MAIN
from hubfusion.localhub.web import Call, Routes, answer
from hubfusion.localhub.webhooks import announce_content

routes = Routes()
_HERE = "/api/{kind:models|datasets|spaces}/{ns}/{name}"
_COMMITS = 50
_LISTED = {"branches": "refs/heads", "converts": CONVERTS.rstrip("/"), "tags": "refs/tags"}


@routes.add("GET", _HERE + "/refs")
def refs(call: Call) -> Response:
    """Branches, conversions, tags and, if asked, pull requests."""
    git = call.hub.repos.git(visible_repo(call))

    def listed(prefix: str) -> list[dict[str, str]]:
        found = git.refs(prefix)
        return [{"name": ref.removeprefix(prefix + "/"), "ref": ref, "targetCommit": sha} for ref, sha in found.items()]

    shown: dict[str, Any] = {name: listed(prefix) for name, prefix in _LISTED.items()}
    if call.flag("include_prs"):
        shown["pullRequests"] = listed("refs/pr")
    return answer(shown)


def _move(git: GitRepo, ref: str, new: str, old: str, conflict: str) -> None:
    try:
        git.move_refs([(ref, new, old)])
    except RefMoved:
        raise Refusal(409, conflict) from None


@routes.add("POST", _HERE + "/branch/{branch*}")
def create_branch(call: Call) -> Response:
    """A new branch at `startingPoint` (main without one), or a conversion if it is named `refs/convert/...`."""
    found, branch = written_repo(call), call.params["branch"]
    ref = branch_ref(branch)
    start = str(call.json().get("startingPoint") or "main")
    if not is_ref_name(ref) or (branch.startswith("refs/") and not branch.startswith(CONVERTS)):
        raise Refusal(400, f"{branch[:100]!r} is not a name for a branch")
    with call.hub.repos.writing(found) as repo:
        git = call.hub.repos.git(repo)
        if git.ref(ref):
            raise Refusal(409, f"Reference {ref} already exists")
        sha = commit_of(git, start)
        _move(git, ref, sha, NOTHING, f"Reference {ref} already exists or is in the way of another")
    announce_content(call, repo, [(ref, NOTHING, sha)])
    return answer({"success": True})


@routes.add("DELETE", _HERE + "/branch/{branch*}")
def delete_branch(call: Call) -> Response:
    """Delete a branch or a conversion; main stays."""
    found, branch = written_repo(call), call.params["branch"]
    ref = branch if branch.startswith(CONVERTS) else f"refs/heads/{branch}"
    with call.hub.repos.writing(found) as repo:
        git = call.hub.repos.git(repo)
        old = git.ref(ref) if is_ref_name(ref) else None
        if old is None:
            raise missing_revision(branch)
        if ref == MAIN:
            raise Refusal(403, "Cannot delete refs/heads/main")
        _move(git, ref, NOTHING, old, f"Reference {ref} has moved")
    announce_content(call, repo, [(ref, old, NOTHING)])
    return answer({"success": True})


@routes.add("POST", _HERE + "/tag/{rev}")
def create_tag(call: Call) -> Response:
    """A new tag on a revision; annotated when it has a message."""
    found, body = written_repo(call), call.json()
    tag, message = body.get("tag"), str(body.get("message") or "")
    ref = f"refs/tags/{tag}"
    with call.hub.repos.writing(found) as repo:
        git = call.hub.repos.git(repo)
        sha = commit_of(git, call.params["rev"])
        if not isinstance(tag, str) or not tag or not is_ref_name(ref) or "\0" in message:
            raise Refusal(400, f"{str(tag)[:100]!r} is not a name for a tag")
        if git.ref(ref):
            raise Refusal(409, f"Reference {ref} already exists")
        by = Signature(call.require_user(), time.time())
        new = git.write_tag(tag, sha, message, by) if message else sha
        _move(git, ref, new, NOTHING, f"Reference {ref} already exists or is in the way of another")
    announce_content(call, repo, [(ref, NOTHING, sha)])
    return answer({"success": True})


@routes.add("DELETE", _HERE + "/tag/{tag*}")
def delete_tag(call: Call) -> Response:
    """Delete a tag."""
    found, tag = written_repo(call), call.params["tag"]
    ref = f"refs/tags/{tag}"
    with call.hub.repos.writing(found) as repo:
        git = call.hub.repos.git(repo)
        old = git.ref(ref) if is_ref_name(ref) else None
        if old is None:
            raise missing_revision(tag)
        _move(git, ref, NOTHING, old, f"Reference {ref} has moved")
    announce_content(call, repo, [(ref, old, NOTHING)])
    return answer({"success": True})


@routes.add("GET", _HERE + "/commits/{rev}")
def commits(call: Call) -> Response:
    """History from the newest, in pages."""
    git = call.hub.repos.git(visible_repo(call))
    sha = commit_of(git, call.params["rev"])
    limit = call.number("limit", _COMMITS, 1000) or _COMMITS
    page = call.number("p", 0, 1_000_000)
    found = git.log([sha], page * limit, limit + 1)
    formatted = "formatted" in call.query.getlist("expand[]") + call.query.getlist("expand")
    headers = {"X-Total-Count": str(git.count(sha))}
    if len(found) > limit:
        query = [(k, v) for k, v in call.query.multi_items() if k != "p"] + [("p", str(page + 1))]
        headers["Link"] = f'<{call.url.split("?", 1)[0]}?{"&".join(f"{k}={v}" for k, v in query)}>; rel="next"'
    return answer([_show(commit, formatted) for commit in found[:limit]], headers=headers)


def _show(commit: Commit, formatted: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "id": commit.sha,
        "title": commit.title,
        "message": commit.message,
        "date": when(commit.at),
        "authors": [{"user": commit.author, "avatar": ""}],
    }
    if formatted:
        shown["formatted"] = {"title": commit.title, "message": commit.message}
    return shown


@routes.add("POST", _HERE + "/super-squash/{rev}")
def super_squash(call: Call) -> Response:
    """Make one commit, without a parent, of all history of a branch or pull request."""
    found, revision = written_repo(call), call.params["rev"]
    message = str(call.json().get("message") or f"Super-squash branch '{revision}' using huggingface_hub")
    ref = branch_ref(revision)
    with call.hub.repos.writing(found) as repo:
        git = call.hub.repos.git(repo)
        old = git.resolve(ref)
        if old is None:
            raise missing_revision(revision)
        by = Signature(call.require_user(), time.time())
        new = git.commit_tree(git.tree(old), [], message + "\n", by)
        publish(call.hub, repo, ref, new, old)
    announce_content(call, repo, [(ref, old, new)])
    return answer({"success": True, "commitOid": new})
