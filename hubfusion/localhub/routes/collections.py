"""Collections: named lists of repositories."""

from __future__ import annotations

import re
import secrets
import time
from typing import Any

from starlette.responses import Response

from hubfusion.localhub.access import is_visible, require_owner
from hubfusion.localhub.facts import when
from hubfusion.localhub.info import page_of
from hubfusion.localhub.refusal import Refusal
from hubfusion.localhub.store.repos import Kind
from hubfusion.localhub.web import Call, Routes, answer

routes = Routes()
_ONE = "/api/collections/{ns}/{slug}"
_AREA = "collection"
_TITLE_MAX, _TEXT_MAX, _ITEMS_MAX = 60, 150, 1000
Collection = dict[str, Any]


def _title(value: object) -> str:
    title = value.strip() if isinstance(value, str) else ""
    if not 1 <= len(title) <= _TITLE_MAX:
        raise Refusal(400, f'"title" must have 1 to {_TITLE_MAX} characters, got {len(title)}')
    return title


def _text(value: object, name: str, most: int) -> str:
    text = value if isinstance(value, str) else ""
    if len(text) > most:
        raise Refusal(400, f'"{name}" must have at most {most} characters, got {len(text)}')
    return text


def _slug(collection: Collection) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", collection["title"].lower()).strip("-") or "collection"
    return f"{collection['owner']}/{words}-{collection['key']}"


def _find(call: Call, write: bool) -> Collection:
    """By the key at the slug's end, so that old slugs work after a new title."""
    key = call.params["slug"].rpartition("-")[2]
    collection = call.hub.db.document(_AREA, key)
    owned = collection is not None and call.hub.accounts.owns(call.user, collection["owner"])
    if collection is None or (collection["private"] and not owned):
        raise Refusal(404, f"Collection {call.params['slug'][:100]} not found")
    if write:
        require_owner(call, collection["owner"])
    return collection


def _save(call: Call, collection: Collection) -> None:
    collection["at"] = time.time()
    call.hub.db.put_document(_AREA, collection["key"], collection["owner"], collection)


def _show(call: Call, collection: Collection, position: bool = True) -> dict[str, Any]:
    items = [
        {
            "_id": item["key"],
            "id": item["id"],
            "type": item["type"],
            "position": place,
            "author": item["id"].split("/")[0],
        }
        | ({"note": {"text": item["note"], "html": ""}} if item["note"] else {})
        for place, item in enumerate(collection["items"])
    ]
    shown = {
        "slug": _slug(collection),
        "title": collection["title"],
        "description": collection["description"] or None,
        "owner": call.hub.accounts.avatar(collection["owner"], call.base),
        "private": collection["private"],
        "theme": collection["theme"],
        "upvotes": 0,
        "lastUpdated": when(collection["at"]),
        "items": items,
    }
    return shown | ({"position": 0} if position else {})


@routes.add("GET", "/api/collections")
def list_collections(call: Call) -> Response:
    """Collections, by owner or by what is in them."""
    owners, items = call.query.getlist("owner"), call.query.getlist("item")
    found = [
        collection
        for collection in call.hub.db.documents(_AREA)
        if (not owners or collection["owner"] in owners)
        and (not items or any(f"{item['type']}s/{item['id']}" in items for item in collection["items"]))
        and (not collection["private"] or call.hub.accounts.owns(call.user, collection["owner"]))
    ]
    found.sort(key=lambda collection: -collection["at"])
    page, link = page_of(call, found, 100)
    return answer([_show(call, collection, position=False) for collection in page], headers=link)


@routes.add("POST", "/api/collections")
def create(call: Call) -> Response:
    """A new collection; 409 with its slug when the owner has one of this title."""
    user, body = call.require_user(), call.json()
    owner, title = str(body.get("namespace") or user), _title(body.get("title"))
    require_owner(call, owner)
    with call.hub.db.write():
        for other in call.hub.db.documents(_AREA, owner):
            if other["title"] == title:
                message = "This collection already exists"
                return answer({"error": message, "slug": _slug(other)}, 409, {"X-Error-Message": message})
        collection: Collection = {
            "key": secrets.token_hex(12),
            "owner": owner,
            "title": title,
            "description": _text(body.get("description"), "description", _TEXT_MAX),
            "private": bool(body.get("private")),
            "theme": "orange",
            "items": [],
        }
        if "item" in body:
            _append(call, collection, body["item"], None)
        _save(call, collection)
    return answer(_show(call, collection))


@routes.add("GET", _ONE)
def get(call: Call) -> Response:
    """One collection."""
    return answer(_show(call, _find(call, write=False)))


@routes.add("PATCH", _ONE)
def change(call: Call) -> Response:
    """Change title, text, theme and visibility; a new title makes a new slug."""
    body = call.json()
    with call.hub.db.write():
        collection = _find(call, write=True)
        if "title" in body:
            collection["title"] = _title(body["title"])
        if "description" in body:
            collection["description"] = _text(body["description"], "description", _TEXT_MAX)
        if "private" in body:
            collection["private"] = bool(body["private"])
        if "theme" in body:
            collection["theme"] = _text(body["theme"], "theme", 20)
        _save(call, collection)
    return answer({"success": True, "data": _show(call, collection)})


@routes.add("DELETE", _ONE)
def delete(call: Call) -> Response:
    """Delete a collection; what was in it stays."""
    call.hub.db.delete_document(_AREA, _find(call, write=True)["key"])
    return answer({"success": True})


def _append(call: Call, collection: Collection, item: object, note: object) -> None:
    name, kind = (item.get("id"), item.get("type")) if isinstance(item, dict) else (None, None)
    if not isinstance(name, str) or kind not in (*Kind, "paper") or len(name) > 200:
        raise Refusal(400, f'"item" must be {{id, type}} with a type of [{", ".join([*Kind, "paper"])}]')
    if kind != "paper":  # papers live elsewhere: any id is taken
        repo = call.hub.repos.find(Kind(str(kind)), *name.partition("/")[::2])
        if repo is None or not is_visible(call, repo):
            raise Refusal(404, f"{kind} {name[:100]} not found")
        name = repo.id
    if any((other["id"], other["type"]) == (name, kind) for other in collection["items"]):
        raise Refusal(409, f"{name} is already in this collection")
    if len(collection["items"]) >= _ITEMS_MAX:
        raise Refusal(400, f"a collection has at most {_ITEMS_MAX} items")
    kept = {"key": secrets.token_hex(12), "id": name, "type": kind, "note": _text(note, "note", 500)}
    collection["items"].append(kept)


@routes.add("POST", _ONE + "/items")
def add_item(call: Call) -> Response:
    """Put a repository into a collection."""
    body = call.json()
    with call.hub.db.write():
        collection = _find(call, write=True)
        _append(call, collection, body.get("item"), body.get("note"))
        _save(call, collection)
    return answer(_show(call, collection))


@routes.add("PATCH|DELETE", _ONE + "/items/{item}")
def change_item(call: Call) -> Response:
    """Change the note or place of an item, or take it out."""
    with call.hub.db.write():
        collection = _find(call, write=True)
        items = collection["items"]
        place = next((n for n, item in enumerate(items) if item["key"] == call.params["item"]), None)
        if place is None:
            raise Refusal(404, f"Item {call.params['item'][:60]} not found in this collection")
        item = items.pop(place)
        if call.method == "PATCH":
            body = call.json()
            if "note" in body:
                item["note"] = _text(body["note"], "note", 500)
            target = body.get("position", place)
            if not isinstance(target, int) or not 0 <= target <= len(items):
                raise Refusal(400, f'"position" must be from 0 to {len(items)}, got {str(target)[:40]}')
            items.insert(target, item)
        _save(call, collection)
    return answer({"success": True})
