"""Write tokens for Xet uploads, and the two routes to which hf_xet then sends xorbs and shards."""

from __future__ import annotations

import time

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from hubfusion.localhub.access import proposed_repo
from hubfusion.localhub.commits import record_upload, uploaded_size
from hubfusion.localhub.refusal import Refusal
from hubfusion.localhub.web import Call, Routes, answer, credentials
from hubfusion.localhub.xet import XORB_MAX, chunk_offsets, parse_shard

routes = Routes()
_SECONDS = 3600
_PURPOSE = "xet"
_CAS = "/__cas/{store}"


@routes.add("GET", "/api/{kind:models|datasets|spaces}/{ns}/{name}/xet-write-token/{rev}")
def write_token(call: Call) -> Response:
    """A token to upload to this repository. The store's id stands in the URL, by which clients key their caches."""
    repo = proposed_repo(call)
    token = call.hub.seal.issue(_PURPOSE, str(repo.number), _SECONDS)
    url, until = f"{call.base}/__cas/{call.hub.store_id}", int(time.time()) + _SECONDS
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(until)}
    return answer({"casUrl": url, "accessToken": token, "exp": until}, headers=headers)


def _repo_number(call: Call) -> int:
    if call.params["store"] != call.hub.store_id:
        raise Refusal(404, "this is another store than the one that gave the token")
    return int(call.hub.seal.open(_PURPOSE, credentials(call.headers) or ""))


@routes.add("POST", _CAS + "/v1/xorbs/{prefix}/{hash}", streams=True, sealed=True)
async def xorb(call: Call) -> Response:
    """Take one xorb; the first to come under a name stays."""
    _repo_number(call)
    path = call.hub.xorbs.path(call.params["hash"])
    held = bytearray()
    async for block in call.stream:
        held += block
        if len(held) > XORB_MAX:
            raise Refusal(413, f"xorb is larger than the {XORB_MAX} bytes allowed")

    def keep() -> bool:
        chunk_offsets(bytes(held))
        if path.exists():
            return False
        with call.hub.objects.incoming(XORB_MAX) as incoming:
            incoming.write(bytes(held))
            incoming.settle(path)
        return True

    return answer({"was_inserted": await run_in_threadpool(keep)})


@routes.add("POST", _CAS + "/v1/shards", limit=XORB_MAX, sealed=True)
@routes.add("POST", _CAS + "/shards", limit=XORB_MAX, sealed=True)
def shard(call: Call) -> Response:
    """Make every file of a shard from its chunks, check it, and keep it as an object of the repository."""
    number = _repo_number(call)
    for recipe in parse_shard(call.raw()):
        if recipe.size > call.hub.rules.object_bytes:
            raise Refusal(413, f"file has {recipe.size} bytes, {call.hub.rules.object_bytes} are allowed")
        # What another repository holds is made again: naming a sha256 must not be enough to get its bytes.
        if uploaded_size(call.hub, number, recipe.sha256) != recipe.size:
            call.hub.objects.add(call.hub.xorbs.blocks(recipe), recipe.sha256, recipe.size)
        record_upload(call.hub, number, recipe.sha256, recipe.size, recipe.xet)
    return answer({"result": 1})
