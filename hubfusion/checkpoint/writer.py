"""Write safetensors checkpoints in chunks, in any order, to a temporary folder that is renamed when complete."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hubfusion.checkpoint.headers import ITEM_BYTES
from hubfusion.checkpoint.reader import INDEX, SINGLE, WEIGHTS_NAME, Array, Parameter, numpy_dtype
from hubfusion.errors import CheckpointError

MAX_SHARD_BYTES = 50 * 10**9
HASHED_BYTES = 1 << 20
PARTIAL = ".fusing"
MANIFEST = "fuse.json"


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file of a finished checkpoint: its name in the folder, bytes and sha256 (None when nobody asked for it)."""

    name: str
    size: int
    sha256: str | None


class Digest:
    """The sha256 of a file that is being written in chunks, in any order; its first ``begun`` bytes are there."""

    def __init__(self, file: Path, descriptor: int, begun: int) -> None:
        self._file, self._descriptor, self._sha256 = file, descriptor, hashlib.sha256()
        self._done, self._later = 0, {0: begun}

    def add(self, start: int, stop: int) -> None:
        """Bytes ``start ... stop`` are written; they are taken in when all before them are."""
        if start == stop:
            return
        self._later[start] = stop
        end = self._done
        while end in self._later:
            end = self._later.pop(end)
        self._take(end)

    def _take(self, end: int) -> None:
        while self._done < end:
            raw = os.pread(self._descriptor, min(HASHED_BYTES, end - self._done), self._done)
            if not raw:
                raise CheckpointError(f"{self._file}: cut off at byte {self._done} while being hashed")
            self._sha256.update(raw)
            self._done += len(raw)

    def finish(self) -> str:
        """Hexadecimal sha256 of the whole file."""
        self._take(os.fstat(self._descriptor).st_size)
        return self._sha256.hexdigest()


@dataclass(slots=True)
class Writing:
    """A checkpoint being written beside its place; `Writing.write` may be called from several threads, in any order."""

    folder: Path
    parameters: Mapping[str, Parameter]
    descriptors: Mapping[Path, int]
    index: dict[str, str] | None
    digests: Mapping[Path, Digest]
    written: tuple[WrittenFile, ...] = field(default=())

    def write(self, name: str, first: int, values: Array) -> None:
        """Round ``values`` (1-D float) to the parameter's dtype, once and to nearest even, and store them.

        Raises `CheckpointError` with the parameter's name when a value is not finite after rounding.
        """
        spec = self.parameters[name]
        raw = encode(values, spec.dtype)
        if not _is_finite(raw, spec.dtype):
            bad = int(np.flatnonzero(~np.isfinite(raw.view(numpy_dtype(spec.dtype))))[0])
            raise CheckpointError(
                f"{self.folder / spec.file.name}: {name}: entry {first + bad} would be {float(values[bad])} in "
                f"{spec.dtype}; only finite values are written"
            )
        self.write_bytes(name, first * ITEM_BYTES[spec.dtype], raw.data)

    def digest(self, name: str, first: int, last: int) -> None:
        """Take entries ``first ... last`` of a parameter, which are written, into the file's sha256.

        That is done as soon as all bytes before them are there, while others work; not to be called from several
        threads. What is never told is taken in when the checkpoint is finished.
        """
        spec = self.parameters[name]
        if spec.file in self.digests:
            item = ITEM_BYTES[spec.dtype]
            self.digests[spec.file].add(spec.start + first * item, spec.start + last * item)

    def write_bytes(self, name: str, first: int, raw: bytes | memoryview) -> None:
        """Store raw bytes at byte ``first`` of a parameter."""
        spec = self.parameters[name]
        view, offset = memoryview(raw).cast("B"), spec.start + first
        while view:
            done = os.pwrite(self.descriptors[spec.file], view, offset)
            view, offset = view[done:], offset + done


def encode(values: Array, dtype: str) -> Array:
    """Round floats to a safetensors dtype, to nearest even; bfloat16 comes back as its bits in uint16."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(numpy_dtype(dtype), copy=False)
    return rounded.view(np.uint16) if dtype == "BF16" else rounded


def _is_finite(raw: Array, dtype: str) -> bool:
    if dtype == "BF16":  # bits of the exponent: more than twice as fast as isfinite of bfloat16
        return bool(((raw & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(raw).all())


def plan_shards(parameters: Sequence[Parameter], max_shard_bytes: int) -> list[list[Parameter]]:
    """Group parameters into shards of at most ``max_shard_bytes`` (a larger parameter has one of its own).

    The order is the canonical one of the safetensors library (wider dtypes first, then by name), whatever the order
    or the shards of the base were.
    """
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    shards: list[list[Parameter]] = [[]]
    filled = 0
    for parameter in sorted(parameters, key=lambda p: (-ITEM_BYTES[p.dtype], p.name)):
        if shards[-1] and filled + parameter.size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(parameter)
        filled += parameter.size
    return shards


@contextmanager
def write_checkpoint(
    folder: Path,
    parameters: Sequence[Parameter],
    *,
    single: str = SINGLE,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    digest: bool = True,
) -> Iterator[Writing]:
    """Write a checkpoint into ``folder``: all of it or nothing, replacing an older one whole.

    Parameters' ``file`` and ``start`` are ignored; name, dtype and shape count. Inside the block the files grow in
    a hidden folder in ``folder``; when the block ends, old weights, index and manifest leave and the new ones are
    renamed in, the index last. When it raises, the folder is as it was. A second writer in the same folder is
    refused. Use another ``single`` for another kind of file (an optimizer's state): then no checkpoint is replaced.
    """
    partial = folder / f"{PARTIAL}-{single.removesuffix('.safetensors')}"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(partial):
        with ExitStack() as files:
            writing = _start(files, folder, partial, plan_shards(parameters, max_shard_bytes), single, digest)
            yield writing
            writing.written = tuple(
                WrittenFile(f.name, f.stat().st_size, writing.digests[f].finish() if digest else None)
                for f in writing.descriptors
            )
        _replace(folder, partial, writing, single)


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{partial.parent}: another fuse is writing here; only one at a time may") from None
        try:
            for leftover in partial.iterdir():
                leftover.unlink()
            yield
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(lock)


def _start(
    files: ExitStack, folder: Path, partial: Path, shards: list[list[Parameter]], single: str, digest: bool
) -> Writing:
    """Open the files, to be closed by ``files``, write their headers and reserve their room."""
    parameters: dict[str, Parameter] = {}
    descriptors: dict[Path, int] = {}
    digests: dict[Path, Digest] = {}
    stem = single.removesuffix(".safetensors")
    for number, shard in enumerate(shards, 1):
        name = single if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for spec in shard:
            table[spec.name] = {
                "dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [end, end + spec.size],
            }  # fmt: skip
            end += spec.size
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file, end = partial / name, 8 + len(text)
        descriptors[file] = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        files.callback(os.close, descriptors[file])
        os.pwrite(descriptors[file], len(text).to_bytes(8, "little") + text, 0)
        if digest:
            digests[file] = Digest(file, descriptors[file], end)
        for spec in shard:
            parameters[spec.name] = Parameter(spec.name, spec.dtype, spec.shape, file, end)
            end += spec.size
        _reserve(descriptors[file], end)
    index = {p.name: p.file.name for p in parameters.values()} if len(shards) > 1 else None
    return Writing(folder, parameters, descriptors, index, digests)


def _reserve(descriptor: int, size: int) -> None:
    """Set the length of a file and reserve its space where the system can: a full disk is reported before the work.

    Writing into reserved blocks takes two thirds of the time, too (ext4).
    """
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:  # not on macOS, and not on every file system
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.truncate(descriptor, size)


def _replace(folder: Path, partial: Path, writing: Writing, single: str) -> None:
    if single == SINGLE:
        stale = [p for p in folder.iterdir() if WEIGHTS_NAME.fullmatch(p.name) or p.name == MANIFEST]
        for old in sorted(stale, key=lambda p: p.name != INDEX):
            old.unlink()
    for file in writing.descriptors:
        os.replace(file, folder / file.name)
    if writing.index is not None:
        size = sum(p.size for p in writing.parameters.values())
        table = {"metadata": {"total_size": size}, "weight_map": dict(sorted(writing.index.items()))}
        index = partial / f"{single}.index.json"
        index.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        os.replace(index, folder / index.name)
