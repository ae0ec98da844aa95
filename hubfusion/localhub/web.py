"""Requests, routes and answers: the thin layer between ASGI and the areas of the Hub.

Paths are matched before they are percent-decoded, since revisions and folders arrive as one segment with `%2F` in it.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import re
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from email.utils import formatdate
from typing import IO, TYPE_CHECKING, Any, cast
from urllib.parse import parse_qsl, quote, unquote

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, QueryParams
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hubfusion.localhub.refusal import Refusal

if TYPE_CHECKING:
    from hubfusion.localhub.state import Hub

log = logging.getLogger(__name__)
SMALL_BODY = 16 << 20
"""Bytes: the most that a JSON or form body may have."""
COMMIT_BODY = 256 << 20
"""Bytes: the most that one commit may carry inline (base64); large files come as objects instead."""
_SPOOL = 8 << 20


@dataclass(slots=True)
class Call:
    """One request on its way through a route: what came, and who asks (None: anonymous)."""

    hub: Hub
    method: str
    headers: Headers
    query: QueryParams
    params: dict[str, str]
    user: str | None
    base: str
    url: str
    stream: AsyncIterator[bytes]
    body: IO[bytes] | None = None

    def raw(self) -> bytes:
        """The whole body."""
        return self.body.read() if self.body else b""

    def json(self) -> dict[str, Any]:
        """The body as a JSON object; an empty body is {}."""
        raw = self.raw()
        try:
            value = json.loads(raw) if raw.strip() else {}
        except (ValueError, RecursionError) as error:
            raise Refusal(400, f"request body is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise Refusal(400, f"request body must be a JSON object, got {type(value).__name__}")
        return value

    def form(self) -> list[tuple[str, str]]:
        """The body as form fields, or the same from a JSON object with lists."""
        if "json" in self.headers.get("content-type", ""):
            items = self.json().items()
            return [(k, str(x)) for k, v in items for x in (v if isinstance(v, list) else [v])]
        try:
            return parse_qsl(self.raw().decode(), keep_blank_values=True)
        except (UnicodeDecodeError, ValueError) as error:
            raise Refusal(400, f"request body is not a form: {error}") from None

    def require_user(self) -> str:
        """The name of who asks; anonymous is refused with 401."""
        if self.user is None:
            raise Refusal(401, "Invalid username or password.", headers={"WWW-Authenticate": 'Basic realm="hub"'})
        return self.user

    def flag(self, name: str) -> bool:
        """Whether a query parameter says yes."""
        return self.query.get(name, "").lower() in ("1", "true", "yes", "on")

    def number(self, name: str, default: int, most: int) -> int:
        """A query parameter as an integer in [0, most]; larger values are cut to it."""
        text = self.query.get(name) or str(default)
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise Refusal(400, f"{name} must be a number from 0 to {most}, got {text[:40]!r}")
        return min(int(text), most)


Endpoint = Callable[[Call], Response] | Callable[[Call], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Route:
    """One method and path pattern.

    `streams` endpoints are coroutines that read the body themselves; `sealed` ones look at their own credentials.
    """

    method: str
    pattern: re.Pattern[str]
    endpoint: Endpoint
    limit: int
    streams: bool
    sealed: bool


class Routes:
    """The routes of one area. `{x}` is one path segment, `{x*}` the rest, `{x:a|b}` one of some words."""

    def __init__(self) -> None:
        self.all: list[Route] = []

    def add(
        self, method: str, path: str, limit: int = SMALL_BODY, streams: bool = False, sealed: bool = False
    ) -> Callable[[Endpoint], Endpoint]:
        """Decorate the endpoint of a method and path."""

        def register(endpoint: Endpoint) -> Endpoint:
            for verb in method.split("|"):
                self.all.append(Route(verb, _compile(path), endpoint, limit, streams, sealed))
            return endpoint

        return register


def _compile(path: str) -> re.Pattern[str]:
    text = re.sub(r"\{(\w+)\*\}", r"(?P<\1>.*)", path)
    text = re.sub(r"\{(\w+):([^}]*)\}", r"(?P<\1>\2)", text)
    return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", text).replace(".git", r"\.git"))


def answer(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer."""
    body = json.dumps(value, separators=(",", ":")).encode()
    return Response(body, status, headers, "application/json")


def refuse(refusal: Refusal) -> Response:
    """A refusal as an answer: the message in the body and, since HEAD has none, in `X-Error-Message`."""
    line = re.sub(r"[^\x20-\x7e]", "?", refusal.message)[:1000]
    headers = {"X-Error-Message": line, **({"X-Error-Code": refusal.code} if refusal.code else {}), **refusal.headers}
    return answer({"error": refusal.message}, refusal.status, headers)


class Router:
    """The ASGI application: finds the route, says who asks, bounds the body, and answers."""

    def __init__(self, hub: Hub, areas: list[Routes]) -> None:
        self._hub = hub
        self._routes = [route for area in areas for route in area.all]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        # uvicorn's own Date may be seconds old; clients drop log lines that are younger than it.
        limits = {"X-Request-Id": uuid.uuid4().hex, "Date": formatdate(usegmt=True)}
        try:
            response = await self._answer(request, limits)
        except Refusal as refusal:
            response = refuse(refusal)
        except Exception:
            log.exception("%s %s", request.method, request.url.path)
            response = refuse(Refusal(500, "Internal Error - We're working hard to fix this as soon as possible!"))
        for name, value in limits.items():
            response.headers[name] = value
        await response(scope, receive, send)

    async def _answer(self, request: Request, limits: dict[str, str]) -> Response:
        raw_path = cast(bytes, request.scope.get("raw_path") or quote(request.scope["path"]).encode())
        path = raw_path.decode("latin-1").split("?", 1)[0].rstrip("/")
        route, params = self._find(request.method, path)
        user = None if route.sealed else self._hub.accounts.identify(credentials(request.headers))
        host = request.client.host if request.client else ""
        limits.update(self._hub.limits.count(user or host, path))
        base = f"{request.url.scheme}://{request.headers.get('host', request.url.netloc)}"
        url = f"{base}{path}" + (f"?{request.url.query}" if request.url.query else "")
        call = Call(
            self._hub, request.method, request.headers, request.query_params, params, user, base, url, request.stream()
        )
        if route.streams:
            return await cast(Awaitable[Response], route.endpoint(call))
        with tempfile.SpooledTemporaryFile(_SPOOL) as body:
            await _read_body(request, cast(IO[bytes], body), route.limit)
            call.body = cast(IO[bytes], body)
            return await run_in_threadpool(cast(Callable[[Call], Response], route.endpoint), call)

    def _find(self, method: str, path: str) -> tuple[Route, dict[str, str]]:
        wanted = "GET" if method == "HEAD" else method
        others = set()
        for route in self._routes:
            if match := route.pattern.fullmatch(path):
                if route.method == wanted:
                    return route, {name: _decode(value) for name, value in match.groupdict().items()}
                others.add(route.method)
        if others:
            raise Refusal(405, f"{method} is not allowed here", headers={"Allow": ", ".join(sorted(others))})
        raise Refusal(404, f"Sorry, we can't find the page you are looking for: {path[:200]}")


def _decode(segment: str) -> str:
    try:
        text = unquote(segment, errors="strict")
    except UnicodeDecodeError:
        raise Refusal(400, "path is not UTF-8") from None
    if "\0" in text:
        raise Refusal(400, "path must not contain NUL")
    return text


async def _read_body(request: Request, body: IO[bytes], limit: int) -> None:
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > limit:
        raise Refusal(413, f"request body is larger than the {limit} bytes allowed", headers={"Connection": "close"})
    size = 0
    async for block in request.stream():
        size += len(block)
        if size > limit:
            raise Refusal(
                413, f"request body is larger than the {limit} bytes allowed", headers={"Connection": "close"}
            )
        body.write(block)
    body.seek(0)


def credentials(headers: Headers) -> str | None:
    """The token that came: as Bearer, or as the password (or user name) of Basic, as git sends it."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        try:
            name, _, password = base64.b64decode(value, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            raise Refusal(401, "Invalid credentials in Authorization header") from None
        return password or name or None
    return value.strip() or None
