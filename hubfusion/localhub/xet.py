"""The upload side of Xet, as hf_xet speaks it: xorbs (blocks of compressed chunks) and shards (recipes of files).

A shard says of each file from which chunks of which xorbs it is made. We put the file together, check it against the
sha256 that the shard carries, and keep it as an ordinary object, so that downloads are plain HTTP. The layout follows
xet-core (mdb_shard and cas_object); hashes are written as four little-endian 64-bit words in hex.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lz4.frame

from hubfusion.localhub.refusal import Refusal

CHUNK_MAX = 4 << 20
"""Bytes of one chunk, unpacked; xet-core cuts at 128 KiB."""
XORB_MAX = 96 << 20
_HASH = re.compile(r"[0-9a-f]{64}")
_END = b"\xff" * 32
_SHARD_HEAD = 48
_RECORD = 48
_WITH_VERIFICATION = 1 << 31
_WITH_METADATA = 1 << 30


@dataclass(frozen=True, slots=True)
class Segment:
    """Chunks `start` to `end` (excluded) of one xorb."""

    xorb: str
    start: int
    end: int
    size: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one file is made: its Xet hash, its sha256 and its segments in order."""

    xet: str
    sha256: str
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return sum(segment.size for segment in self.segments)


def hash_text(raw: bytes) -> str:
    """A 32-byte hash as xet-core prints it."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def parse_shard(shard: bytes) -> list[Recipe]:
    """The recipes in a shard; a file without a sha256 is refused, since nothing could check it."""
    recipes, at = [], _SHARD_HEAD
    try:
        while shard[at : at + 32] != _END:
            file_hash, flags, count = struct.unpack_from("<32sII", shard, at)
            at += _RECORD
            if count > (len(shard) - at) // _RECORD:
                raise Refusal(400, "shard: more segments are announced than there are bytes")
            segments = []
            for _ in range(count):
                xorb, _, size, start, end = struct.unpack_from("<32sIIII", shard, at)
                segments.append(Segment(hash_text(xorb), start, end, size))
                at += _RECORD
            at += _RECORD * count if flags & _WITH_VERIFICATION else 0
            if not flags & _WITH_METADATA:
                raise Refusal(400, "shard: a file comes without its sha256")
            recipes.append(Recipe(hash_text(file_hash), hash_text(shard[at : at + 32]), tuple(segments)))
            at += _RECORD
    except struct.error:
        raise Refusal(400, "shard: ends in the middle of a record") from None
    return recipes


def chunk_offsets(xorb: bytes) -> list[int]:
    """Where each chunk of a xorb begins, and where the last ends; refuses what is not a row of whole chunks."""
    offsets, at = [], 0
    while at + 8 <= len(xorb) and xorb[at] == 0:
        length = int.from_bytes(xorb[at + 1 : at + 4], "little")
        offsets.append(at)
        at += 8 + length
    if at > len(xorb) or not offsets:
        raise Refusal(400, "xorb: ends in the middle of a chunk")
    return [*offsets, at]


def unpack_chunk(xorb: bytes, at: int) -> bytes:
    """One chunk, unpacked (stored as it is, LZ4, or LZ4 over bytes grouped by four)."""
    length = int.from_bytes(xorb[at + 1 : at + 4], "little")
    scheme, size = xorb[at + 4], int.from_bytes(xorb[at + 5 : at + 8], "little")
    packed = xorb[at + 8 : at + 8 + length]
    if size > CHUNK_MAX or scheme > 2:
        raise Refusal(400, f"xorb: chunk of {size} bytes with scheme {scheme} is not one we know")
    if scheme == 0:
        plain = packed
    else:
        try:
            unpacker = lz4.frame.LZ4FrameDecompressor()
            plain = bytes(unpacker.decompress(packed, max_length=size + 1))
        except RuntimeError as error:
            raise Refusal(400, f"xorb: {error}") from None
        plain = _ungroup(plain) if scheme == 2 else plain
    if len(plain) != size:
        raise Refusal(400, f"xorb: a chunk has {len(plain)} bytes, {size} were announced")
    return plain


def _ungroup(grouped: bytes) -> bytes:
    """Undo the grouping by four: the k-th group holds every byte whose position is k modulo 4."""
    plain = bytearray(len(grouped))
    at = 0
    for k in range(4):
        count = (len(grouped) - k + 3) // 4
        plain[k::4] = grouped[at : at + count]
        at += count
    return bytes(plain)


class XorbStore:
    """A folder of xorbs by their hash, which clients name again when they upload a changed file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where a xorb lies or would lie."""
        if not _HASH.fullmatch(name):
            raise Refusal(400, f"xorb: name must be 64 hex digits, got {name[:80]!r}")
        return self.root / name[:2] / name

    def blocks(self, recipe: Recipe) -> Iterator[bytes]:
        """The bytes of a file, chunk by chunk."""
        held: tuple[str, bytes, list[int]] | None = None
        for segment in recipe.segments:
            if held is None or held[0] != segment.xorb:
                try:
                    xorb = self.path(segment.xorb).read_bytes()
                except FileNotFoundError:
                    raise Refusal(400, f"shard: xorb {segment.xorb[:12]} was not uploaded to this store") from None
                held = (segment.xorb, xorb, chunk_offsets(xorb))
            _, xorb, offsets = held
            if not segment.start < segment.end < len(offsets):
                raise Refusal(400, f"shard: xorb {segment.xorb[:12]} has {len(offsets) - 1} chunks")
            for at in offsets[segment.start : segment.end]:
                yield unpack_chunk(xorb, at)
