"""Who asks, and checks that touch no repository."""

from __future__ import annotations

from typing import Any

from starlette.responses import PlainTextResponse, Response

from hubfusion.localhub import cards
from hubfusion.localhub.access import is_visible
from hubfusion.localhub.info import tags_in_use
from hubfusion.localhub.refusal import Refusal
from hubfusion.localhub.store.repos import Kind
from hubfusion.localhub.web import Call, Routes, answer

routes = Routes()


@routes.add("GET", "/api/whoami-v2")
def whoami(call: Call) -> Response:
    """The user of the token, and the user's organizations."""
    user = call.require_user()
    accounts = call.hub.accounts
    orgs = [accounts.avatar(name, call.base) for name in accounts.namespaces(user)[1:]]
    return answer(
        {
            **accounts.avatar(user, call.base),
            "id": user,
            "email": None,
            "emailVerified": False,
            "isPro": False,
            "canPay": False,
            "periodEnd": None,
            "orgs": [{**org, "id": org["name"], "roleInOrg": "write", "isEnterprise": False} for org in orgs],
            "auth": {"type": "access_token", "accessToken": {"displayName": "localhub", "role": "write"}},
        }
    )


@routes.add("GET", "/api/users/{user}/overview")
@routes.add("GET", "/api/organizations/{user}/overview")
def overview(call: Call) -> Response:
    """A user or organization with the number of its public repositories."""
    name, hub = call.params["user"], call.hub
    if not hub.accounts.exists(name):
        raise Refusal(404, f"User {name[:100]} not found")
    counts = {
        kind: sum(repo.namespace == name and is_visible(call, repo) for repo in hub.repos.all(kind)) for kind in Kind
    }
    shown: dict[str, Any] = {**hub.accounts.avatar(name, call.base), "user": name, "isPro": False}
    shown |= {"numModels": counts[Kind.MODEL], "numDatasets": counts[Kind.DATASET], "numSpaces": counts[Kind.SPACE]}
    shown["orgs"] = [hub.accounts.avatar(org, call.base) for org in hub.accounts.namespaces(name)[1:]]
    row = hub.db.row("SELECT count(*) AS n FROM likes WHERE user = ?", name)
    return answer(shown | {"numLikes": row["n"] if row else 0, "numUsers": len(hub.accounts.orgs.get(name, ()))})


@routes.add("GET", "/api/organizations/{org}/members")
def members(call: Call) -> Response:
    """The users that may write to an organization."""
    names = call.hub.accounts.orgs.get(call.params["org"])
    if names is None:
        raise Refusal(404, f"Organization {call.params['org'][:100]} not found")
    return answer([call.hub.accounts.avatar(name, call.base) | {"user": name} for name in names])


@routes.add("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Response:
    """Check the metadata of a card: 400 with the errors, as text when the client wants text."""
    body = call.json()
    try:
        kind = Kind(body.get("repoType") or "model")
    except ValueError:
        kind = Kind.MODEL
    try:
        errors, warnings = cards.check_metadata(kind, cards.parse_card(str(body.get("content", ""))))
    except cards.CardError as error:
        errors, warnings = [f"metadata is not YAML: {error}"], []
    status = 400 if errors else 200
    if "text/plain" in call.headers.get("accept", ""):
        lines = [f"- Error: {text}" for text in errors] + [f"- Warning: {text}" for text in warnings]
        return PlainTextResponse("\n".join(lines) or "ok", status)
    listed = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return answer(listed, status)


@routes.add("GET", "/api/{kind:models|datasets}-tags-by-type")
def tags_by_type(call: Call) -> Response:
    """The tags in use, grouped by what they are about."""
    kind = Kind.MODEL if call.params["kind"] == "models" else Kind.DATASET
    groups: dict[str, list[dict[str, str]]] = {}
    for tag in tags_in_use(call, kind):
        group = tag.partition(":")[0] if ":" in tag else "other"
        groups.setdefault(group, []).append({"id": tag, "label": tag.partition(":")[2] or tag, "type": group})
    return answer(groups)


@routes.add("GET", "/api/agent-harnesses")
def agent_harnesses(call: Call) -> Response:
    """Nothing is known about harnesses here."""
    return answer({"standardEnvVars": [], "harnesses": {}})


@routes.add("GET", "/healthz")
def health(call: Call) -> Response:
    """Whether the store answers, and which store it is."""
    return answer({"ok": call.hub.db.row("SELECT 1") is not None, "store": call.hub.store_id})
