"""Parse untrusted safetensors headers and shard indexes strictly, in bounded time and memory.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length N, N bytes of JSON, data.
The published reader accepts files that the format's specification forbids (duplicate keys, leading space, extra
fields). Such files are refused here with a specific message, before any data is read.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hubfusion.errors import CheckpointError

MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 20_000
MAX_RANK = 8
MAX_NAME = 512
ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1,
}  # fmt: skip
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors", re.ASCII)
TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", re.ASCII)


class HeaderTooLong(CheckpointError):
    """A header is longer than the reader is willing to read."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of one file: ``start`` and ``stop`` are byte offsets from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def entries(self) -> int:
        """Number of entries; 1 for a scalar."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of one safetensors file in the order of their bytes, and its free-text metadata."""

    tensors: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]
    size: int


def header_bytes(prefix: bytes, file_size: int, where: str) -> int:
    """Bytes from the start of the file to its first data byte, from its first 8 bytes; checks them against the file.

    Raises `CheckpointError` when the file is too short, or the header longer than the file or `MAX_HEADER_BYTES`.
    """
    if file_size < 8 or len(prefix) < 8:
        raise CheckpointError(f"{where}: {file_size} bytes are too few for a safetensors file, at least 10 are needed")
    (length,) = struct.unpack("<Q", prefix[:8])
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{where}: header of {length} bytes, at most {MAX_HEADER_BYTES} are allowed")
    if length < 2 or 8 + length > file_size:
        raise CheckpointError(f"{where}: header of {length} bytes does not fit in a file of {file_size}")
    return 8 + int(length)


def read_header(
    read: Callable[[int, int], bytes], file_size: int, where: str, *, guess: int, most: int | None = None
) -> tuple[Header, int]:
    """The header of a file that is read by range, and the bytes that were read of it.

    ``read(start, stop)`` gives bytes of the file. One call serves when the header is within the first ``guess`` bytes,
    else two. With ``most``, a header that is longer is a `HeaderTooLong`, and is not read.
    """
    first = guess if most is None else min(guess, most)
    prefix = read(0, max(8, min(first, file_size)))
    size = header_bytes(prefix, file_size, where)
    if most is not None and size > most:
        raise HeaderTooLong(f"{where}: header of {size} bytes, at most {most} are read")
    if len(prefix) < size:
        prefix += read(len(prefix), size)
    return parse_header(prefix, file_size, where), len(prefix)


def parse_header(prefix: bytes, file_size: int, where: str) -> Header:
    """Parse the header at the start of ``prefix`` (at least the whole header) of a file of ``file_size`` bytes.

    Tensors must cover the data exactly: no gap, no overlap, nothing after the last. Raises `CheckpointError` naming
    ``where`` and the tensor.
    """
    size = header_bytes(prefix, file_size, where)
    if len(prefix) < size:
        raise CheckpointError(f"{where}: header of {size} bytes is cut off after {len(prefix)}")
    if prefix[8:9] != b"{":
        raise CheckpointError(f"{where}: header must begin with '{{', got {prefix[8:9]!r}")
    table = _parse_table(prefix[8:size], where, "header")
    metadata = _parse_metadata(table.pop("__metadata__", {}), where)
    if len(table) > MAX_TENSORS:
        raise CheckpointError(f"{where}: {len(table)} tensors, at most {MAX_TENSORS} are allowed")
    specs = sorted((_parse_spec(n, e, size, where) for n, e in table.items()), key=lambda s: (s.start, s.stop, s.name))
    end = size
    for spec in specs:
        if spec.start != end:
            kind = "overlaps the tensor before it" if spec.start < end else "leaves a gap before it"
            raise CheckpointError(f"{where}: {spec.name}: starts at byte {spec.start}, {kind} (expected {end})")
        end = spec.stop
    if end != file_size:
        kind = "is cut off" if end > file_size else "has trailing bytes"
        raise CheckpointError(f"{where}: {kind}: tensors end at byte {end}, the file at {file_size}")
    return Header({s.name: s for s in specs}, metadata, size)


def _parse_table(text: bytes, where: str, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{where}: key {twice[:80]!a} appears twice in the {what}")
        return table

    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=_refuse_constant)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: {what} is not JSON: {str(error)[:120]}") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{where}: {what} must be a JSON object, got {type(table).__name__}")
    return table


def _refuse_constant(name: str) -> None:
    raise ValueError(f"constant {name}")


def _parse_metadata(data: Any, where: str) -> dict[str, str]:
    if not isinstance(data, dict) or not all(isinstance(v, str) for v in data.values()):
        raise CheckpointError(f"{where}: __metadata__ must map text to text")
    return data


def _parse_spec(name: str, entry: Any, data_start: int, where: str) -> TensorSpec:
    if not TENSOR_NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise CheckpointError(f"{where}: tensor name {name[:80]!a} is not allowed (letters, digits, '_', '-' and '.')")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: {name}: fields must be exactly dtype, shape, data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{where}: {name}: dtype {dtype!a:.40} is not one of {', '.join(ITEM_BYTES)}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_size(s) for s in shape):
        raise CheckpointError(f"{where}: {name}: shape must be up to {MAX_RANK} sizes in 0..2^48, got {shape!a:.80}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(o) for o in offsets):
        raise CheckpointError(f"{where}: {name}: data_offsets must be two byte offsets, got {offsets!a:.80}")
    start, stop = offsets
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if stop - start != expected:
        raise CheckpointError(
            f"{where}: {name}: {dtype} {list(shape)} needs {expected} bytes, its offsets span {stop - start}"
        )
    return TensorSpec(name, dtype, tuple(shape), data_start + start, data_start + stop)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 1 << 48


def parse_index(text: bytes, files: Mapping[str, int], where: str) -> dict[str, str]:
    """Read ``model.safetensors.index.json``: tensor name to shard file name, each a plain name present in ``files``.

    Raises `CheckpointError` for paths, missing shards, duplicate keys and anything that is not the index format.
    """
    table = _parse_table(text, where, "index")
    weight_map = table.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: weight_map must map tensor names to shard files")
    if len(weight_map) > MAX_TENSORS:
        raise CheckpointError(f"{where}: {len(weight_map)} tensors, at most {MAX_TENSORS} are allowed")
    for name, shard in weight_map.items():
        if not TENSOR_NAME.fullmatch(name) or len(name) > MAX_NAME:
            raise CheckpointError(f"{where}: tensor name {name[:80]!a} is not allowed")
        if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard):
            raise CheckpointError(f"{where}: {name[:80]}: shard {shard!a:.80} must be a plain .safetensors file name")
        if shard not in files:
            raise CheckpointError(f"{where}: {name[:80]}: shard {shard} is not in the repository")
    return weight_map
