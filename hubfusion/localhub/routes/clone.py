"""`git clone` and `git fetch` over smart HTTP; pushes go through commits instead."""

from __future__ import annotations

import gzip
import io
import re
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import suppress

from starlette.responses import Response, StreamingResponse

from hubfusion.localhub.access import readable_repo
from hubfusion.localhub.refusal import Refusal
from hubfusion.localhub.store.git import ENVIRONMENT
from hubfusion.localhub.web import Call, Routes

routes = Routes()
_FRESH = {"Cache-Control": "no-cache"}
_REQUEST_MAX = 64 << 20


def _command(call: Call, *options: str) -> tuple[list[str], dict[str, str]]:
    call.params["name"] = call.params["name"].removesuffix(".git")
    repo = readable_repo(call)
    protocol = call.headers.get("git-protocol", "")
    environment = dict(ENVIRONMENT)
    if re.fullmatch(r"version=[0-9]", protocol):
        environment["GIT_PROTOCOL"] = protocol
    return ["git", "upload-pack", "--stateless-rpc", *options, str(call.hub.repos.git(repo).path)], environment


@routes.add("GET", "/{ns}/{name}/info/refs")
@routes.add("GET", "/{kind:datasets|spaces}/{ns}/{name}/info/refs")
def advertise(call: Call) -> Response:
    """The refs, as `git clone` asks for them first."""
    if call.query.get("service") != "git-upload-pack":
        call.require_user()
        raise Refusal(403, "this Hub takes changes through huggingface_hub, not through git push")
    command, environment = _command(call, "--advertise-refs")
    refs = subprocess.run(command, capture_output=True, check=True, env=environment).stdout
    head = (
        b"" if "GIT_PROTOCOL" in environment and refs[4:13] == b"version 2" else b"001e# service=git-upload-pack\n0000"
    )
    return Response(head + refs, 200, _FRESH, "application/x-git-upload-pack-advertisement")


@routes.add("POST", "/{ns}/{name}/git-upload-pack", limit=_REQUEST_MAX)
@routes.add("POST", "/{kind:datasets|spaces}/{ns}/{name}/git-upload-pack", limit=_REQUEST_MAX)
def upload_pack(call: Call) -> Response:
    """The objects a clone lacks, streamed as git packs them."""
    command, environment = _command(call)
    request = call.raw()
    if call.headers.get("content-encoding") == "gzip":
        request = _unzip(request)
    return StreamingResponse(
        _stream(command, environment, request), 200, _FRESH, "application/x-git-upload-pack-result"
    )


def _unzip(request: bytes) -> bytes:
    try:
        with gzip.open(io.BytesIO(request)) as file:
            plain = file.read(_REQUEST_MAX + 1)
    except (OSError, EOFError, zlib.error):
        raise Refusal(400, "request body is not gzip") from None
    if len(plain) > _REQUEST_MAX:
        raise Refusal(413, "request body is too large")
    return plain


def _stream(command: list[str], environment: dict[str, str], request: bytes) -> Iterator[bytes]:
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None  # both are pipes
        try:
            with suppress(BrokenPipeError):  # git hangs up on a request that makes no sense
                process.stdin.write(request)
                process.stdin.close()
            while block := process.stdout.read(1 << 16):
                yield block
        finally:
            process.kill()
