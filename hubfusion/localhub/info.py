"""Repositories as listings and info calls show them, and how listings are filtered, ordered and cut into pages."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

from hubfusion.localhub.access import is_visible
from hubfusion.localhub.facts import Facts, facts_of, when
from hubfusion.localhub.refusal import Refusal
from hubfusion.localhub.state import Hub
from hubfusion.localhub.store.repos import MAIN, Kind, Repo
from hubfusion.localhub.web import Call

_PAGE = 1000
_UNKNOWN = frozenset(
    "downloadsAllTime gguf inference inferenceProviderMapping mask_token resourceGroup spaces transformersInfo "
    "trendingScore widgetData citation description mainSize paperswithcode_id datasets models subdomain".split()
)
"""Properties that clients may ask for and that this Hub does not keep: left out of the answer."""


def _children(hub: Hub, repo: Repo) -> int:
    heads = (_head(hub, other) for other in hub.repos.all(Kind.MODEL))
    return sum(repo.id in facts.get("bases", ()) for facts in heads if facts)


def _head(hub: Hub, repo: Repo) -> Facts | None:
    sha = hub.repos.git(repo).ref(MAIN)
    return facts_of(hub, repo, sha) if sha else None


def _base_models(repo: Repo, facts: Facts) -> dict[str, Any] | None:
    bases = facts.get("bases")
    return {"relation": facts["relation"], "models": [{"id": base, "_id": base} for base in bases]} if bases else None


def _likes(hub: Hub, repo: Repo) -> int:
    row = hub.db.row("SELECT count(*) AS n FROM likes WHERE repo = ?", repo.number)
    return int(row["n"]) if row else 0


def _properties(hub: Hub, repo: Repo, sha: str, facts: Facts) -> dict[str, Callable[[], Any]]:
    return {
        "author": lambda: repo.namespace,
        "sha": lambda: sha,
        "createdAt": lambda: when(repo.created),
        "lastModified": lambda: when(repo.modified),
        "private": lambda: repo.private,
        "gated": lambda: repo.gated or False,
        "disabled": lambda: False,
        "downloads": lambda: 0,
        "likes": lambda: _likes(hub, repo),
        "tags": lambda: facts["tags"],
        "cardData": lambda: facts["cardData"] or None,
        "siblings": lambda: [{"rfilename": sibling["rfilename"]} for sibling in facts["siblings"]],
        "usedStorage": lambda: facts["usedStorage"],
        "library_name": lambda: facts.get("library_name"),
        "pipeline_tag": lambda: facts.get("pipeline_tag"),
        "config": lambda: facts.get("config"),
        "model-index": lambda: facts.get("model-index"),
        "safetensors": lambda: facts.get("safetensors"),
        "evalResults": lambda: facts.get("evalResults") or [],
        "baseModels": lambda: _base_models(repo, facts),
        "childrenModelCount": lambda: _children(hub, repo),
        "sdk": lambda: repo.sdk or None,
        "runtime": lambda: {"stage": "STOPPED", "hardware": {"current": None, "requested": None}},
    }


_LISTED = {
    Kind.MODEL: "private likes downloads tags pipeline_tag library_name createdAt".split(),
    Kind.DATASET: "author disabled gated lastModified likes private sha downloads tags createdAt".split(),
    Kind.SPACE: "private likes tags sdk createdAt".split(),
}
_FULL = "author disabled gated lastModified sha siblings private likes downloads tags createdAt".split()
_INFO = {
    Kind.MODEL: "author sha createdAt lastModified private gated disabled downloads likes tags cardData siblings "
    "usedStorage library_name pipeline_tag config model-index safetensors".split(),
    Kind.DATASET: "author sha createdAt lastModified private gated disabled downloads likes tags cardData siblings "
    "usedStorage".split(),
    Kind.SPACE: "author sha createdAt lastModified private gated disabled likes tags cardData siblings usedStorage sdk "
    "runtime".split(),
}


def show(hub: Hub, repo: Repo, sha: str, wanted: list[str]) -> dict[str, Any]:
    """The wanted properties of a repository at one commit, without those that are empty."""
    properties = _properties(hub, repo, sha, facts_of(hub, repo, sha))
    shown: dict[str, Any] = {"_id": f"{repo.number:024x}", "id": repo.id}
    if repo.kind is Kind.MODEL:
        shown["modelId"] = repo.id
    for name in wanted:
        if name not in properties and name not in _UNKNOWN:
            raise Refusal(400, f'"expand" must be one of [{", ".join(sorted([*properties, *_UNKNOWN]))}], got {name!r}')
        value = properties[name]() if name in properties else None
        if value is not None:
            shown[name] = value
    return shown


def expanded(call: Call) -> list[str]:
    """The properties asked for by `expand`, in both ways of writing a list into a query."""
    return [name for key, name in call.query.multi_items() if key in ("expand", "expand[]")]


def show_one(call: Call, repo: Repo, sha: str) -> dict[str, Any]:
    """What an info call answers."""
    wanted = expanded(call)
    shown = show(call.hub, repo, sha, wanted or _INFO[repo.kind])
    if call.flag("blobs") and not wanted:
        shown["siblings"] = facts_of(call.hub, repo, sha)["siblings"]
    if call.flag("securityStatus"):
        # This Hub runs no scanners, and says so: nothing was scanned and nothing was found.
        shown["securityRepoStatus"] = {"scansDone": False, "filesWithIssues": []}
    return shown


def list_page(call: Call, kind: Kind) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One page of a listing and the `Link` header to the next."""
    found = [(repo, sha) for repo, sha, facts in heads_of(call, kind) if _fits(call, repo, facts)]
    keys = {"createdAt": lambda repo: repo.created, "lastModified": lambda repo: repo.modified}
    likes = {row["repo"]: row["n"] for row in call.hub.db.rows("SELECT repo, count(*) AS n FROM likes GROUP BY repo")}
    sort = {"created_at": "createdAt", "last_modified": "lastModified"}.get(s := call.query.get("sort", ""), s)
    if sort in ("likes", "trendingScore", "trending_score", "downloads", ""):
        key: Callable[[Repo], float] = lambda repo: likes.get(repo.number, 0) if sort == "likes" else 0  # noqa: E731
    elif sort in keys:
        key = keys[sort]
    else:
        raise Refusal(
            400, f'"sort" must be one of [createdAt, lastModified, likes, downloads, trendingScore], got {sort!r}'
        )
    up = call.query.get("direction") == "1"
    ordered = sorted(found, key=lambda pair: (key(pair[0]), pair[0].number), reverse=not up)
    limit = call.number("limit", _PAGE, _PAGE) or _PAGE
    if cursor := call.query.get("cursor"):
        ordered = _after(ordered, key, up, cursor)
    page, rest = ordered[:limit], ordered[limit:]
    wanted = expanded(call) or [
        *_LISTED[kind],
        *(_FULL if call.flag("full") else []),
        *(["cardData"] if call.flag("cardData") else []),
        *(["config"] if call.flag("config") and kind is Kind.MODEL else []),
    ]
    shown = [show(call.hub, repo, sha, wanted) for repo, sha in page]
    return shown, _next(call, json.dumps([key(page[-1][0]), page[-1][0].number])) if rest else {}


def heads_of(call: Call, kind: Kind) -> list[tuple[Repo, str, Facts]]:
    """The repositories that who asks may see, by `author` and `search`, with head and facts of main."""
    author = call.query.get("author", "").lower()
    search = call.query.get("search", "").lower().split()
    heads = []
    for repo in call.hub.repos.all(kind):
        if author and repo.namespace.lower() != author or not is_visible(call, repo):
            continue
        if not all(word in repo.id.lower() for word in search):
            continue
        if sha := call.hub.repos.git(repo).ref(MAIN):
            heads.append((repo, sha, facts_of(call.hub, repo, sha)))
    return heads


def _fits(call: Call, repo: Repo, facts: Facts) -> bool:
    """Whether a repository has every tag that was asked for; several filters narrow each other."""
    wanted = [tag for text in call.query.getlist("filter") for tag in text.split(",")]
    for key, prefix in (("pipeline_tag", ""), ("library", ""), ("language", ""), ("license", "license:")):
        wanted += [prefix + value for value in call.query.getlist(key)]
    gated = call.query.get("gated")
    if gated is not None and (gated.lower() == "true") != bool(repo.gated):
        return False
    return all(tag in facts["tags"] or tag == repo.id for tag in wanted)


def _after(
    ordered: list[tuple[Repo, str]], key: Callable[[Repo], float], up: bool, cursor: str
) -> list[tuple[Repo, str]]:
    try:
        value, number = json.loads(base64.urlsafe_b64decode(cursor))
        mark = (float(value), int(number))
    except (ValueError, TypeError):
        raise Refusal(400, "cursor is not one of ours") from None
    return [
        pair
        for pair in ordered
        if ((key(pair[0]), pair[0].number) > mark if up else (key(pair[0]), pair[0].number) < mark)
    ]


def _next(call: Call, mark: str) -> dict[str, str]:
    cursor = base64.urlsafe_b64encode(mark.encode()).decode()
    query = [(key, value) for key, value in call.query.multi_items() if key != "cursor"]
    path = call.url.split("?", 1)[0]
    return {"Link": f'<{path}?{urlencode([*query, ("cursor", cursor)])}>; rel="next"'}


def page_of(call: Call, items: list[dict[str, Any]], most: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One page of a list that stands still, cut by position, and the `Link` header to the next."""
    limit = call.number("limit", most, most) or most
    try:
        start = max(int(base64.urlsafe_b64decode(call.query.get("cursor", "MA=="))), 0)
    except ValueError:
        raise Refusal(400, "cursor is not one of ours") from None
    return items[start : start + limit], _next(call, str(start + limit)) if start + limit < len(items) else {}


def tags_in_use(call: Call, kind: Kind) -> list[str]:
    """Every tag that some visible repository has, in alphabetical order."""
    return sorted({tag for _, _, facts in heads_of(call, kind) for tag in facts["tags"]})
