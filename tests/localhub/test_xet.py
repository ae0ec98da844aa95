"""Uploads by Xet: the formats by hand, and hf_xet itself in a process of its own."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
from pathlib import Path

import lz4.frame
import pytest

from hubfusion.localhub import LocalHub
from hubfusion.localhub.refusal import Refusal
from hubfusion.localhub.xet import Recipe, Segment, XorbStore, chunk_offsets, hash_text, parse_shard, unpack_chunk
from tests.localhub.conftest import USERS


def chunk(plain: bytes, scheme: int) -> bytes:
    """A chunk as xet-core writes it: version, packed length, scheme, plain length, bytes."""
    grouped = b"".join(plain[k::4] for k in range(4)) if scheme == 2 else plain
    packed = grouped if scheme == 0 else lz4.frame.compress(grouped)
    return bytes([0]) + len(packed).to_bytes(3, "little") + bytes([scheme]) + len(plain).to_bytes(3, "little") + packed


@pytest.mark.parametrize("scheme", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 4097, 100_002])
def test_chunks_are_unpacked(scheme: int, size: int) -> None:
    plain = os.urandom(size // 2) + bytes(size - size // 2)
    xorb = chunk(b"first", 0) + chunk(plain, scheme)
    offsets = chunk_offsets(xorb)
    assert offsets == [0, 13, len(xorb)]
    assert unpack_chunk(xorb, 0) == b"first" and unpack_chunk(xorb, 13) == plain


def test_bytes_are_grouped_by_four_as_the_format_says() -> None:
    """0 4 8 | 1 5 9 | 2 6 | 3 7, counted by hand for ten bytes."""
    packed = lz4.frame.compress(bytes([0, 4, 8, 1, 5, 9, 2, 6, 3, 7]))
    raw = bytes([0]) + len(packed).to_bytes(3, "little") + bytes([2]) + (10).to_bytes(3, "little") + packed
    assert unpack_chunk(raw, 0) == bytes(range(10))


def test_what_is_not_a_xorb_or_lies_about_its_size_is_refused() -> None:
    good = chunk(bytes(1000), 1)
    bomb = lz4.frame.compress(bytes(50 << 20))
    lying = bytes([0]) + len(bomb).to_bytes(3, "little") + bytes([1]) + (100).to_bytes(3, "little") + bomb
    for bad in (b"", good[:-1], b"XETBLOB", b"\0" * 3):
        with pytest.raises(Refusal):
            chunk_offsets(bad)
    for bad in (lying, good[:4] + b"\x07" + good[5:], good[:20] + b"\xff" * (len(good) - 20)):
        with pytest.raises(Refusal):
            unpack_chunk(bad, 0)


def words(digest: bytes) -> bytes:
    """A digest as shards hold it: each of its 8-byte words reversed."""
    return b"".join(digest[at : at + 8][::-1] for at in range(0, 32, 8))


def shard(sha256: bytes, xorb: bytes, count: int, size: int, flags: int = 1 << 30) -> bytes:
    head = struct.pack("<32sIIQ", b"\x11" * 32, flags, 1, 0)
    segment = struct.pack("<32sIIII", xorb, 0, size, 0, count)
    return bytes(48) + head + segment + words(sha256) + bytes(16) + b"\xff" * 32 + bytes(16)


def test_a_file_is_put_together_from_its_recipe(tmp_path: Path) -> None:
    plain = [os.urandom(500), os.urandom(700)]
    digest = hashlib.sha256(b"".join(plain)).digest()
    (recipe,) = parse_shard(shard(digest, b"\x22" * 32, 2, 1200))
    assert recipe == Recipe(hash_text(b"\x11" * 32), digest.hex(), (Segment("22" * 32, 0, 2, 1200),))
    store = XorbStore(tmp_path)
    with pytest.raises(Refusal, match="was not uploaded"):
        b"".join(store.blocks(recipe))
    store.path("22" * 32).parent.mkdir()
    store.path("22" * 32).write_bytes(chunk(plain[0], 1) + chunk(plain[1], 2))
    assert b"".join(store.blocks(recipe)) == b"".join(plain)


def test_a_shard_that_is_cut_or_has_no_sha256_is_refused() -> None:
    whole = shard(b"\x33" * 32, b"\x22" * 32, 1, 10)
    for bad in (whole[:60], whole[:100], whole[:180], shard(b"\x33" * 32, b"\x22" * 32, 1, 10, flags=0), b""):
        with pytest.raises(Refusal):
            parse_shard(bad)


CLIENT = """
import os, sys, hashlib
from huggingface_hub import HfApi, constants
assert not constants.HF_HUB_DISABLE_XET
api, size = HfApi(), int(sys.argv[2])
api.create_repo("ann/xet", exist_ok=True)
first = os.urandom(size)
second = first[: size // 2] + os.urandom(100) + first[size // 2 :]
for name, content in (("a.bin", first), ("a.bin", second), ("copy.bin", first)):
    api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id="ann/xet")
    got = open(api.hf_hub_download("ann/xet", name, force_download=True), "rb").read()
    assert got == content, name
    assert api.get_paths_info("ann/xet", name)[0].lfs.sha256 == hashlib.sha256(content).hexdigest()
print("done")
"""


def run_client(hub: LocalHub, home: Path, size: int) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_TOKEN": "hf_ann"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for name in ("HF_HUB_DISABLE_XET", "HF_HUB_OFFLINE", "HF_XET_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, "-", str(size)], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr[-2000:]


def test_hf_xet_uploads_changes_and_copies_and_the_bytes_come_back(tmp_path: Path) -> None:
    pytest.importorskip("hf_xet")
    with LocalHub(tmp_path / "one", USERS) as hub:
        run_client(hub, tmp_path / "home", 3_000_000)
        assert len(list((tmp_path / "one" / "xorbs").rglob("*"))) > 0
    with LocalHub(tmp_path / "two", USERS) as hub:  # another store: the client's cache of the first must not mislead it
        run_client(hub, tmp_path / "home", 300_000)


def test_a_write_token_is_for_one_store_and_cannot_be_made_up(tmp_path: Path) -> None:
    from huggingface_hub.utils import get_session

    with LocalHub(tmp_path, USERS) as hub:
        base = f"{hub.endpoint}/__cas/{hub.hub.store_id}/v1"
        for token in ("", "hf_ann", "1.99999999999." + "0" * 64):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            assert get_session().post(f"{base}/shards", content=b"", headers=headers).status_code == 401
            xorb = get_session().post(f"{base}/xorbs/default/{'0' * 64}", content=chunk(b"x", 0), headers=headers)
            assert xorb.status_code == 401
        assert hub.hub.seal.open("xet", hub.hub.seal.issue("xet", "7", 60)) == "7"
        with pytest.raises(Refusal):
            hub.hub.seal.open("xet", hub.hub.seal.issue("xet", "7", -1))
        with pytest.raises(Refusal):
            hub.hub.seal.open("other", hub.hub.seal.issue("xet", "7", 60))
