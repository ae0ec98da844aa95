"""Settings of webhooks; what they deliver is in `hubfusion.localhub.webhooks`."""

from __future__ import annotations

import secrets
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import Response

from hubfusion.localhub.access import require_owner
from hubfusion.localhub.refusal import Refusal
from hubfusion.localhub.web import Call, Routes, answer

routes = Routes()
_ALL = "/api/settings/webhooks"
_ONE = _ALL + "/{webhook}"
_KINDS = ("user", "org", "model", "dataset", "space")
_DOMAINS = ("repo", "discussion")
_MOST = 100


def _find(call: Call) -> dict[str, Any]:
    hook = call.hub.db.document("webhook", call.params["webhook"])
    if hook is None or hook["owner"] != call.require_user():
        raise Refusal(404, f"Webhook {call.params['webhook'][:60]} not found")
    return hook


def _show(hook: dict[str, Any]) -> dict[str, Any]:
    names = ("id", "url", "watched", "domains", "secret", "disabled")
    shown = {name: hook[name] for name in names}
    if hook["job"]:
        shown["job"] = {key: value for key, value in hook["job"].items() if key != "secrets"}
    return shown


def _fill(call: Call, hook: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    """The webhook with what the body says, checked."""
    if (url := body.get("url")) is not None:
        parts = urlsplit(str(url))
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Refusal(400, f'"url" must be an http(s) address, got {str(url)[:200]!r}')
        hook |= {"url": url, "job": None}
    if (source := body.get("jobSourceId")) is not None:
        job = call.hub.db.document("job", str(source))
        if job is None:
            raise Refusal(404, f"Job {str(source)[:60]} not found")
        require_owner(call, job["owner"])
        given = body.get("secrets") if isinstance(body.get("secrets"), dict) else {}
        hook |= {"url": None, "job": {**job["spec"], "secrets": given}}
    if not hook["url"] and not hook["job"]:
        raise Refusal(400, "a webhook needs a url or a job")
    watched = body.get("watched")
    if watched:
        if not isinstance(watched, list) or len(watched) > _MOST or not all(map(_is_watched, watched)):
            raise Refusal(400, f'"watched" must be a list of {{type, name}} with types of [{", ".join(_KINDS)}]')
        hook["watched"] = [{"type": item["type"], "name": item["name"]} for item in watched]
    domains = body.get("domains")
    if domains:
        if not isinstance(domains, list) or not set(domains) <= set(_DOMAINS):
            raise Refusal(400, f'"domains" must be of [{", ".join(_DOMAINS)}], got {str(domains)[:100]}')
        hook["domains"] = domains
    if body.get("secret") is not None:
        secret = str(body["secret"])
        if not secret.isascii() or not secret.isprintable() or len(secret) > 200:
            raise Refusal(400, '"secret" must be at most 200 printable ASCII characters')
        hook["secret"] = secret
    return hook


def _is_watched(item: object) -> bool:
    return isinstance(item, dict) and item.get("type") in _KINDS and isinstance(item.get("name"), str)


@routes.add("GET", _ALL)
def list_webhooks(call: Call) -> Response:
    """The caller's webhooks."""
    return answer([_show(hook) for hook in call.hub.db.documents("webhook", call.require_user())])


@routes.add("POST", _ALL)
def create(call: Call) -> Response:
    """A new webhook."""
    user = call.require_user()
    hook = {
        "id": secrets.token_hex(12),
        "owner": user,
        "url": None,
        "job": None,
        "watched": [],
        "domains": list(_DOMAINS),
        "secret": None,
        "disabled": False,
    }
    _fill(call, hook, call.json())
    if len(call.hub.db.documents("webhook", user)) >= _MOST:
        raise Refusal(400, f"a user has at most {_MOST} webhooks")
    call.hub.db.put_document("webhook", str(hook["id"]), user, hook)
    return answer({"webhook": _show(hook)})


@routes.add("GET", _ONE)
def get(call: Call) -> Response:
    """One webhook."""
    return answer({"webhook": _show(_find(call))})


@routes.add("POST", _ONE)
def update(call: Call) -> Response:
    """Change a webhook."""
    with call.hub.db.write():
        hook = _fill(call, _find(call), call.json())
        call.hub.db.put_document("webhook", hook["id"], hook["owner"], hook)
    return answer({"webhook": _show(hook)})


@routes.add("POST", _ONE + "/{switch:enable|disable}")
def switch(call: Call) -> Response:
    """Switch a webhook on or off."""
    with call.hub.db.write():
        hook = _find(call) | {"disabled": call.params["switch"] == "disable"}
        call.hub.db.put_document("webhook", hook["id"], hook["owner"], hook)
    return answer({"webhook": _show(hook)})


@routes.add("DELETE", _ONE)
def delete(call: Call) -> Response:
    """Delete a webhook."""
    call.hub.db.delete_document("webhook", _find(call)["id"])
    return answer({"success": True})
