"""Faults on purpose, for tests: a network and a Hub that fail in the ways real ones do.

`LocalHub(faults=plan)` asks `plan(request)` before every request; it answers None (serve as usual) or a `Fault`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass(frozen=True, slots=True)
class FaultRequest:
    """What a plan may look at: method, path as it came (percent-encoded), query and headers."""

    method: str
    path: str
    query: str
    headers: Headers


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with one request; the fields add up.

    delay: seconds before anything else happens.
    land: the request is carried out before its answer is replaced or lost. Without it, it never reaches the Hub.
    status, headers: answer this instead (429, 500, 503, ... with e.g. Retry-After).
    cut: close the connection after this many bytes of the answer's body; 0 closes it before the answer begins.
    flip: invert the bits of the byte at this place of the body, sizes and headers unchanged.
    """

    delay: float = 0.0
    land: bool = False
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    flip: int | None = None


LOST = Fault(land=True, cut=0)
"""The request is carried out, its answer never arrives."""

Plan = Callable[[FaultRequest], Fault | None]


class Faults:
    """The middleware: outermost, so that everything the Hub says can be lost."""

    def __init__(self, app: ASGIApp, plan: Plan) -> None:
        self._app = app
        self._plan = plan

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request with the fault that the plan has for it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope.get("raw_path", b"").decode("latin-1")
        query = scope.get("query_string", b"").decode("latin-1")
        fault = self._plan(FaultRequest(scope["method"], path, query, Headers(scope=scope)))
        if fault is None:
            await self._app(scope, receive, send)
            return
        await asyncio.sleep(fault.delay)
        if fault.land and (fault.status is not None or fault.cut == 0):
            await self._app(scope, receive, _swallow)
        if fault.cut == 0:
            _hang_up(receive)
        elif fault.status is not None:
            answer = JSONResponse({"error": f"fault {fault.status}"}, fault.status, fault.headers)
            await answer(scope, receive, send)
        else:
            await self._app(scope, receive, _Spoiled(fault, receive, send))


async def _swallow(message: Message) -> None:
    pass


class _Spoiled:
    """Passes an answer on, with a byte flipped or the end missing."""

    def __init__(self, fault: Fault, receive: Receive, send: Send) -> None:
        self._fault, self._receive, self._send = fault, receive, send
        self._sent = 0
        self._over = False

    async def __call__(self, message: Message) -> None:
        if self._over:
            return
        if message["type"] == "http.response.body":
            body = bytearray(message.get("body", b""))
            flip, cut = self._fault.flip, self._fault.cut
            if flip is not None and self._sent <= flip < self._sent + len(body):
                body[flip - self._sent] ^= 0xFF
            if cut is not None and self._sent + len(body) >= cut:
                await self._send({**message, "body": bytes(body[: cut - self._sent]), "more_body": True})
                self._over = True
                await asyncio.sleep(0.05)  # let the socket carry what was written before it closes
                _hang_up(self._receive)
                return
            self._sent += len(body)
            message = {**message, "body": bytes(body)}
        await self._send(message)


def _hang_up(receive: Receive) -> None:
    """Close the client's connection at once; ASGI has no word for that, so this reaches into uvicorn."""
    cycle = getattr(receive, "__self__", None)
    transport = getattr(cycle, "transport", None)
    if transport is None:
        raise RuntimeError("faults need uvicorn: there is no connection to close")
    transport.abort()
