"""Repositories: make, delete, move, settings, info and listings."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from hubfusion.localhub.access import (
    commit_of,
    is_visible,
    kind_of,
    readable_repo,
    require_owner,
    visible_repo,
    written_repo,
)
from hubfusion.localhub.accounts import is_name
from hubfusion.localhub.info import list_page, show_one
from hubfusion.localhub.refusal import Refusal, missing_repo
from hubfusion.localhub.store.repos import Kind, Repo
from hubfusion.localhub.web import Call, Routes, answer
from hubfusion.localhub.webhooks import announce_repo

routes = Routes()
_KINDS = "/api/{kind:models|datasets|spaces}"
_HERE = _KINDS + "/{ns}/{name}"
_SDKS = ("gradio", "docker", "static", "streamlit")


@routes.add("POST", "/api/repos/create")
def create(call: Call) -> Response:
    """Make a repository; 409 with its url when it exists."""
    user, body = call.require_user(), call.json()
    kind, name = _kind(body), body.get("name")
    namespace = str(body.get("organization") or user)
    if not isinstance(name, str) or not is_name(name):
        raise Refusal(400, f"{str(name)[:100]!r} is not a name for a repository")
    require_owner(call, namespace)
    if other := call.hub.repos.find(kind, namespace, name):
        taken = Refusal(409, f"You already created this {kind} repo: {other.id}")
        return answer({"error": taken.message, "url": _web(call, other)}, 409, {"X-Error-Message": taken.message})
    sdk = str(body.get("sdk") or "")
    if kind is Kind.SPACE and sdk not in _SDKS:
        raise Refusal(400, f'"sdk" must be one of [{", ".join(_SDKS)}], got {sdk[:40]!r}')
    repo = call.hub.repos.create(kind, namespace, name, user, _private(body) or False, sdk)
    for key in ("secrets", "variables"):
        _store_space(call, repo, key, body.get(key))
    announce_repo(call, repo, "create")
    return answer({"url": _web(call, repo), "name": repo.id, "id": f"{repo.number:024x}"})


def _store_space(call: Call, repo: Repo, key: str, entries: Any) -> None:
    if repo.kind is Kind.SPACE and isinstance(entries, list):
        body = {str(entry["key"]): entry for entry in entries if isinstance(entry, dict) and "key" in entry}
        call.hub.db.put_document(f"space-{key}", str(repo.number), repo.namespace, body)


def _kind(body: dict[str, Any]) -> Kind:
    text = body.get("type") or "model"
    if text not in tuple(Kind):
        raise Refusal(400, f'"type" must be one of [{", ".join(Kind)}], got {str(text)[:40]!r}')
    return Kind(text)


def _private(body: dict[str, Any]) -> bool | None:
    if body.get("visibility") is not None:
        if body["visibility"] not in ("public", "private"):
            raise Refusal(400, f'"visibility" must be public or private, got {str(body["visibility"])[:40]!r}')
        return bool(body["visibility"] == "private")
    return bool(body["private"]) if body.get("private") is not None else None


def _web(call: Call, repo: Repo) -> str:
    return f"{call.base}/{repo.kind.prefix}{repo.id}"


@routes.add("DELETE", "/api/repos/delete")
def delete(call: Call) -> Response:
    """Delete a repository for ever."""
    user, body = call.require_user(), call.json()
    repo = _named(call, _kind(body), f"{body.get('organization') or user}/{body.get('name')}")
    require_owner(call, repo.namespace)
    announce_repo(call, repo, "delete")
    call.hub.repos.delete(repo)
    for area in ("space-secrets", "space-variables"):
        call.hub.db.delete_document(area, str(repo.number))
    return answer({"success": True})


def _named(call: Call, kind: Kind, text: str) -> Repo:
    namespace, _, name = text.partition("/")
    repo = call.hub.repos.find(kind, namespace, name)
    if repo is None or not is_visible(call, repo):
        raise missing_repo(call.user is None)
    return repo


@routes.add("POST", "/api/repos/move")
def move(call: Call) -> Response:
    """Give a repository another name; both namespaces must be the caller's."""
    call.require_user()
    body = call.json()
    repo = _named(call, _kind(body), str(body.get("fromRepo")))
    namespace, _, name = str(body.get("toRepo")).partition("/")
    require_owner(call, repo.namespace)
    if not call.hub.accounts.exists(namespace) or not is_name(name):
        raise Refusal(400, f"{str(body.get('toRepo'))[:200]!r} is not a name for a repository")
    require_owner(call, namespace)
    moved = call.hub.repos.move(repo, namespace, name)
    announce_repo(call, moved, "move")
    return answer({"success": True, "url": _web(call, moved)})


@routes.add("PUT", _HERE + "/settings")
def settings(call: Call) -> Response:
    """Change visibility and gating."""
    repo, body = written_repo(call), call.json()
    gated = body.get("gated")
    if gated not in (None, False, "auto", "manual"):
        raise Refusal(400, f'"gated" must be one of [auto, manual, false], got {str(gated)[:40]!r}')
    changed = call.hub.repos.change(repo, _private(body), None if gated is None else gated or "")
    announce_repo(call, changed, "update", "repo.config")
    return answer({"private": changed.private, "gated": changed.gated or False})


@routes.add("GET", _KINDS)
def listing(call: Call) -> Response:
    """One page of repositories."""
    page, headers = list_page(call, kind_of(call))
    return answer(page, headers=headers)


@routes.add("GET", _HERE)
@routes.add("GET", _HERE + "/revision/{rev}")
def info(call: Call) -> Response:
    """A repository at one revision."""
    repo = visible_repo(call)
    sha = commit_of(call.hub.repos.git(repo), call.params.get("rev", "main"))
    return answer(show_one(call, repo, sha), headers={"X-Repo-Commit": sha})


@routes.add("GET", _KINDS + "/{name}")
@routes.add("GET", _KINDS + "/{name}/revision/{rev}")
@routes.add("GET", "/{name}/resolve/{rev}/{path*}")
@routes.add("GET|POST|PUT|DELETE", _KINDS + "/{name}/{what:refs|commits|tree|paths-info|commit|preupload|discussions}")
@routes.add("GET|POST|PUT|DELETE", _KINDS + "/{name}/{what:commits|tree|paths-info|commit|preupload}/{rev}")
@routes.add("GET|POST|DELETE", _KINDS + "/{name}/{what:like|likers|settings|auth-check}")
def without_namespace(call: Call) -> Response:
    """The Hub's few repositories without a namespace do not exist here."""
    raise missing_repo(call.user is None)


@routes.add("GET", _HERE + "/auth-check")
@routes.add("GET", _HERE + "/auth-check/{write:write}")
def auth_check(call: Call) -> Response:
    """200 when who asks may read (or write) the files."""
    repo = written_repo(call) if "write" in call.params else readable_repo(call)
    return answer({"id": repo.id})
