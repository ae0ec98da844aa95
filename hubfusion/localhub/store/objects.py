"""Large files by their sha256 in a folder: written beside, checked, then renamed into place."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hubfusion.localhub.refusal import Refusal

SHA256 = re.compile(r"[0-9a-f]{64}")
_POINTER = re.compile(
    rb"version https://git-lfs\.github\.com/spec/v1\n(?:[^\n]*\n)*?oid sha256:([0-9a-f]{64})\nsize ([0-9]{1,15})\n"
)
POINTER_MAX = 512
"""Bytes: a git blob longer than this is never read as a pointer."""
BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Pointer:
    """What git holds in place of a large file: its sha256 in hex and its size in bytes."""

    sha256: str
    size: int

    def text(self) -> bytes:
        """The pointer file, byte for byte as git-lfs writes it."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()


def parse_pointer(blob: bytes) -> Pointer | None:
    """The pointer in a git blob, or None for an ordinary small file."""
    if len(blob) > POINTER_MAX:
        return None
    match = _POINTER.fullmatch(blob)
    return Pointer(match[1].decode(), int(match[2])) if match else None


class Incoming:
    """A file on its way in: written block by block and hashed as it comes; gone unless kept."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self.size = 0
        self._limit = limit
        self._hash = hashlib.sha256()
        self._file: BinaryIO = path.open("xb")

    def write(self, block: bytes | memoryview) -> None:
        """Append a block; more than the limit is refused with 413."""
        self.size += len(block)
        if self.size > self._limit:
            raise Refusal(413, f"upload is larger than the {self._limit} bytes allowed")
        self._hash.update(block)
        self._file.write(block)

    def sha256(self) -> str:
        """Hex digest of what came so far."""
        return self._hash.hexdigest()

    def settle(self, target: Path) -> None:
        """Flush to the disk and rename onto `target`, so that it is there whole or not at all."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.path, target)

    def discard(self) -> None:
        """Close and remove; harmless after `settle`."""
        self._file.close()
        self.path.unlink(missing_ok=True)


class ObjectStore:
    """A folder of immutable objects named by their sha256, and a folder for what is on its way in."""

    def __init__(self, root: Path, temporary: Path) -> None:
        self.root = root
        self.temporary = temporary
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        root.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Where an object lies or would lie; refuses what is not a sha256 in hex."""
        if not SHA256.fullmatch(sha256):
            raise Refusal(422, f"object id must be 64 lower-case hex digits, got {sha256[:80]!r}")
        return self.root / sha256[:2] / sha256[2:4] / sha256

    def size(self, sha256: str) -> int | None:
        """Bytes of an object, or None when it is not here."""
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError:
            return None

    @contextmanager
    def incoming(self, limit: int) -> Iterator[Incoming]:
        """A new temporary file of at most `limit` bytes, removed at the end unless it was settled."""
        incoming = Incoming(self.temporary / uuid.uuid4().hex, limit)
        try:
            yield incoming
        finally:
            incoming.discard()

    def keep(self, incoming: Incoming, sha256: str, size: int) -> None:
        """Check size and sha256 of what came, then put it into place; a mismatch is refused with 422."""
        if incoming.size != size:
            raise Refusal(422, f"object {sha256[:12]}: {incoming.size} bytes came, {size} were announced")
        if incoming.sha256() != sha256:
            raise Refusal(422, f"object {sha256[:12]}: the bytes have sha256 {incoming.sha256()[:12]}")
        incoming.settle(self.path(sha256))

    def add(self, blocks: Iterable[bytes], sha256: str, size: int) -> None:
        """Store the blocks as one object if they have this sha256 and size."""
        with self.incoming(size) as incoming:
            for block in blocks:
                incoming.write(block)
            self.keep(incoming, sha256, size)


def read_blocks(path: Path, start: int = 0, length: int | None = None) -> Iterator[bytes]:
    """A file, or `length` bytes of it from `start`, in blocks of 1 MiB."""
    with path.open("rb") as file:
        file.seek(start)
        left = path.stat().st_size - start if length is None else length
        while left > 0:
            block = file.read(min(BLOCK, left))
            if not block:
                return
            left -= len(block)
            yield block
