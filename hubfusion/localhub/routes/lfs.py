"""Large files: the LFS batch call, signed links for the bytes (whole or in parts), and downloads for git-lfs."""

from __future__ import annotations

import hashlib
import re
import time
from math import ceil
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from hubfusion.localhub.access import proposed_repo, readable_repo
from hubfusion.localhub.commits import record_upload, uploaded_size
from hubfusion.localhub.refusal import Refusal
from hubfusion.localhub.store.objects import BLOCK, SHA256, Incoming, read_blocks
from hubfusion.localhub.store.repos import Repo
from hubfusion.localhub.web import Call, Routes, answer

routes = Routes()
_LINK_SECONDS = 6 * 3600
_OBJECTS_MAX = 1000
_LINK = "/__lfs/{action:up|down|part|complete}/{repo}/{oid}/{size}/{until}/{number}/{signature}"


@routes.add("POST", "/{ns}/{name}.git/info/lfs/objects/batch")
@routes.add("POST", "/{kind:datasets|spaces}/{ns}/{name}.git/info/lfs/objects/batch")
def batch(call: Call) -> Response:
    """Say of each object whether it is here, and where to send or fetch it."""
    body = call.json()
    upload = body.get("operation") == "upload"
    repo = proposed_repo(call) if upload else readable_repo(call)
    objects = body.get("objects")
    if not isinstance(objects, list) or len(objects) > _OBJECTS_MAX:
        raise Refusal(422, f"objects must be a list of at most {_OBJECTS_MAX}")
    multipart = "multipart" in (body.get("transfers") or [])
    rules = call.hub.rules
    in_parts = [multipart and _size(item) > rules.multipart_from for item in objects] if upload else []
    # One transfer is chosen for a whole answer; basic links inside a multipart answer have no chunk_size.
    shown = [
        _offer(call, repo, item, parts) if upload else _fetch(call, repo, item)
        for item, parts in zip(objects, in_parts or [False] * len(objects), strict=True)
    ]
    return answer({"transfer": "multipart" if any(in_parts) else "basic", "objects": shown, "hash_algo": "sha256"})


def _size(item: Any) -> int:
    size = item.get("size") if isinstance(item, dict) else None
    return size if isinstance(size, int) and not isinstance(size, bool) else -1


def _checked(call: Call, item: Any) -> tuple[str, int]:
    oid, size = item.get("oid") if isinstance(item, dict) else None, _size(item)
    if not isinstance(oid, str) or not SHA256.fullmatch(oid) or size < 0:
        raise Refusal(422, f"object must be {{oid: sha256 in hex, size: bytes}}, got {str(item)[:120]}")
    if size > call.hub.rules.object_bytes:
        raise Refusal(413, f"object {oid[:12]} has {size} bytes, {call.hub.rules.object_bytes} are allowed")
    return oid, size


def _offer(call: Call, repo: Repo, item: Any, in_parts: bool) -> dict[str, Any]:
    oid, size = _checked(call, item)
    shown: dict[str, Any] = {"oid": oid, "size": size}
    if uploaded_size(call.hub, repo.number, oid) == size:
        return shown
    until = time.time_ns() + _LINK_SECONDS * 10**9
    if not in_parts:
        return shown | {"actions": {"upload": {"href": _link(call, "up", repo, oid, size, until), "header": {}}}}
    chunk = call.hub.rules.part_bytes
    header = {"chunk_size": str(chunk)}
    for number in range(1, ceil(size / chunk) + 1):
        header[str(number)] = _link(call, "part", repo, oid, size, until, number)
    href = _link(call, "complete", repo, oid, size, until)
    return shown | {"actions": {"upload": {"href": href, "header": header}}}


def _fetch(call: Call, repo: Repo, item: Any) -> dict[str, Any]:
    oid, size = _checked(call, item)
    if uploaded_size(call.hub, repo.number, oid) is None:
        return {"oid": oid, "size": size, "error": {"code": 404, "message": "Object does not exist"}}
    until = time.time_ns() + _LINK_SECONDS * 10**9
    return {"oid": oid, "size": size, "actions": {"download": {"href": _link(call, "down", repo, oid, size, until)}}}


def _link(call: Call, action: str, repo: Repo, oid: str, size: int, until: int, number: int = 0) -> str:
    signature = call.hub.seal.sign("lfs", action, repo.number, oid, size, until, number)
    return f"{call.base}/__lfs/{action}/{repo.number}/{oid}/{size}/{until}/{number}/{signature}"


def _opened(call: Call, action: str) -> tuple[int, str, int]:
    """(repository number, oid, bytes) of a link of ours that is not over."""
    params = call.params
    if params["action"] != action:
        raise Refusal(405, f"{call.method} is not for a link to {params['action']}")
    numbers = (params["repo"], params["size"], params["until"], params["number"])
    if not all(re.fullmatch(r"[0-9]{1,20}", text) for text in numbers):
        raise Refusal(403, "lfs: not a link of ours")
    call.hub.seal.check(
        params["signature"], "lfs", action, params["repo"], params["oid"], params["size"], params["until"],
        params["number"],
    )  # fmt: skip
    if int(params["until"]) < time.time_ns():
        raise Refusal(403, "lfs: this link is over")
    return int(params["repo"]), params["oid"], int(params["size"])


async def _receive(call: Call, incoming: Incoming) -> None:
    """Write the body in blocks of about 1 MiB, away from the event loop."""
    held: list[bytes] = []
    size = 0
    async for block in call.stream:
        held.append(block)
        size += len(block)
        if size >= BLOCK:
            await run_in_threadpool(incoming.write, b"".join(held))
            held, size = [], 0
    await run_in_threadpool(incoming.write, b"".join(held))


@routes.add("PUT", _LINK, streams=True, sealed=True)
async def put(call: Call) -> Response:
    """Take the bytes of an object, or of one part of it."""
    if call.params["action"] == "part":
        return await _put_part(call)
    number, oid, size = _opened(call, "up")
    with call.hub.objects.incoming(size) as incoming:
        await _receive(call, incoming)
        await run_in_threadpool(call.hub.objects.keep, incoming, oid, size)
    await run_in_threadpool(record_upload, call.hub, number, oid, size)
    return Response(None, 200, {"ETag": f'"{oid}"'})


def _parts(call: Call) -> Path:
    key = hashlib.sha256("\n".join(call.params[name] for name in ("repo", "oid", "size", "until")).encode())
    return call.hub.objects.temporary / f"parts-{key.hexdigest()}"


async def _put_part(call: Call) -> Response:
    _, _, size = _opened(call, "part")
    chunk, number = call.hub.rules.part_bytes, int(call.params["number"])
    expected = min(chunk, size - chunk * (number - 1))
    with call.hub.objects.incoming(expected) as incoming:
        await _receive(call, incoming)
        if incoming.size != expected:
            raise Refusal(422, f"part {number}: {incoming.size} bytes came, {expected} are due")
        etag = incoming.sha256()
        await run_in_threadpool(incoming.settle, _parts(call) / str(number))
    return Response(None, 200, {"ETag": f'"{etag}"'})


@routes.add("POST", _LINK, sealed=True)
def complete(call: Call) -> Response:
    """Put the parts together; the whole must have the sha256 that was announced."""
    number, oid, size = _opened(call, "complete")
    folder = _parts(call)
    count = ceil(size / call.hub.rules.part_bytes)
    paths = [folder / str(n) for n in range(1, count + 1)]
    if missing := [path.name for path in paths if not path.exists()]:
        raise Refusal(422, f"object {oid[:12]}: parts {', '.join(missing[:10])} have not come")
    call.hub.objects.add((block for path in paths for block in read_blocks(path)), oid, size)
    record_upload(call.hub, number, oid, size)
    for path in paths:
        path.unlink()
    folder.rmdir()
    return answer({"success": True})


@routes.add("GET", _LINK, sealed=True)
def get(call: Call) -> Response:
    """The bytes of an object, for git-lfs."""
    _, oid, size = _opened(call, "down")
    return StreamingResponse(read_blocks(call.hub.objects.path(oid)), 200, {"Content-Length": str(size)})
