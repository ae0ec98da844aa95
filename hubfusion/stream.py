"""Read checkpoints on disk a bounded chunk at a time, as float32, with numpy alone.

A contribution's folder was filled by a stranger's download: only regular files are opened, links are not followed,
and every header is parsed again, so that what was screened is what is read.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hubfusion import headers
from hubfusion.errors import CheckpointError
from hubfusion.headers import ITEM_BYTES, TensorSpec

Floats = NDArray[np.float32]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
          "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1"}  # fmt: skip


class Checkpoint:
    """An open checkpoint; ``tensors`` by name. A context manager that closes its files."""

    def __init__(self, folder: Path, *, follow_links: bool = False) -> None:
        """Open the single file or every shard; raises `CheckpointError` that names what is wrong."""
        self.folder = folder
        self.tensors: dict[str, TensorSpec] = {}
        self._files: dict[str, int] = {}
        self._holder: dict[str, int] = {}
        self._follow = follow_links
        try:
            for name in self._names():
                self._add(name)
        except BaseException:
            self.close()
            raise

    def _names(self) -> list[str]:
        single, index = self.folder / SINGLE, self.folder / INDEX
        if single.exists() == index.exists():
            found = "both" if single.exists() else "neither"
            raise CheckpointError(f"{self.folder}: one of {SINGLE} and {INDEX} is needed, found {found}")
        if single.exists():
            return [SINGLE]
        sizes = {p.name: p.lstat().st_size for p in self.folder.iterdir()}
        with open(self._open(INDEX), "rb") as handle:
            text = handle.read(headers.MAX_HEADER_BYTES)
        return sorted(set(headers.parse_index(text, sizes, str(index)).values()))

    def _open(self, name: str) -> int:
        path = self.folder / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if self._follow else os.O_NOFOLLOW))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise CheckpointError(f"{path}: not a regular file")
        return descriptor

    def _add(self, name: str) -> None:
        where, descriptor = str(self.folder / name), self._open(name)
        self._files[name] = descriptor
        size = os.fstat(descriptor).st_size
        length = headers.header_bytes(os.pread(descriptor, 8, 0), size, where)
        for spec in headers.parse_header(os.pread(descriptor, length, 0), size, where).tensors.values():
            if spec.name in self.tensors:
                raise CheckpointError(f"{where}: {spec.name} is in another shard, too")
            self.tensors[spec.name] = spec
            self._holder[spec.name] = descriptor

    def read(self, name: str, first: int, out: Floats) -> Floats:
        """Fill ``out`` (n,) with entries ``first`` … ``first + n`` of a floating parameter, as float32."""
        spec = self.tensors[name]
        if spec.dtype == "F32":
            self._fill(spec, first, out)
            return out
        raw = np.empty(out.shape, _NUMPY[spec.dtype])
        self._fill(spec, first, raw)
        if spec.dtype == "BF16":
            np.left_shift(raw, 16, out=out.view(np.uint32), dtype=np.uint32)
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                out[...] = raw
        return out

    def read_whole(self, name: str) -> NDArray[Any]:
        """All entries of a small tensor of any dtype, flat, in its own dtype (BF16 and BOOL as unsigned integers)."""
        spec = self.tensors[name]
        raw = np.empty(spec.entries, _NUMPY[spec.dtype])
        self._fill(spec, 0, raw)
        return raw

    def _fill(self, spec: TensorSpec, first: int, out: NDArray[Any]) -> None:
        start = spec.start + first * ITEM_BYTES[spec.dtype]
        if out.nbytes and os.preadv(self._holder[spec.name], [out.data.cast("B")], start) != out.nbytes:
            raise CheckpointError(f"{self.folder}: {spec.name} is cut off")

    def close(self) -> None:
        """Close all files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> Checkpoint:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all files."""
        self.close()
