"""Open safetensors checkpoints and read a byte range of one parameter at a time.

A checkpoint is one ``.safetensors`` file, or a folder with ``model.safetensors`` or its shards and index (also
``adapter_model.safetensors``). Reading uses ``preadv`` into the caller's buffer: as fast as a mapped file, and the
resident memory does not grow with what was read.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hubfusion.checkpoint.headers import ITEM_BYTES, header_bytes, parse_header, parse_index
from hubfusion.errors import CheckpointError

FLOATS = ("F64", "F32", "F16", "BF16")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
MAX_INDEX_BYTES = 8 << 20
NUMPY_NAMES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}

Array = npt.NDArray[Any]


@functools.cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a float dtype of safetensors; bfloat16 is `ml_dtypes`'s, imported (12 ms) on first need."""
    if name != "BF16":
        return np.dtype(NUMPY_NAMES[name])
    from ml_dtypes import bfloat16

    dtype: np.dtype[Any] = np.dtype(bfloat16)
    return dtype


@dataclass(frozen=True, slots=True)
class Parameter:
    """One named tensor of a checkpoint and where its bytes begin: ``start`` counts from the beginning of ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int = 0

    @property
    def entries(self) -> int:
        """Number of entries; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes of the whole parameter."""
        return self.entries * ITEM_BYTES[self.dtype]

    @property
    def is_float(self) -> bool:
        """Whether it is a floating-point parameter; everything else is a buffer, compared and never fused."""
        return self.dtype in FLOATS


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint: its parameters by name, and a descriptor a file. Safe to read from several threads."""

    path: Path
    parameters: Mapping[str, Parameter]
    descriptors: Mapping[Path, int]

    def read(self, name: str, first: int, out: Array) -> None:
        """Fill ``out`` (1-D float32 or float64) with entries ``first ... first + len(out)`` of a float parameter.

        The conversion is exact: float16 and bfloat16 widen; float64 is rounded only when ``out`` is float32.
        """
        spec = self.parameters[name]
        if spec.dtype == "F32" and out.dtype == np.float32:
            self._read_raw(spec, first * 4, out)
            return
        item = ITEM_BYTES[spec.dtype]
        raw = np.empty(out.size * item, np.uint8)
        self._read_raw(spec, first * item, raw)
        out[:] = raw.view(numpy_dtype(spec.dtype))

    def read_bytes(self, name: str, first: int = 0, last: int | None = None) -> bytes:
        """Return the stored bytes ``first ... last`` of a parameter of any dtype (all of them by default)."""
        spec = self.parameters[name]
        raw = np.empty((spec.size if last is None else last) - first, np.uint8)
        self._read_raw(spec, first, raw)
        return raw.tobytes()

    def _read_raw(self, spec: Parameter, first: int, out: Array) -> None:
        descriptor, offset, view, done = self.descriptors[spec.file], spec.start + first, out.data, 0
        while done < out.nbytes:
            got = os.preadv(descriptor, [view.cast("B")[done:] if done else view], offset + done)
            if got == 0:
                raise CheckpointError(f"{spec.file}: {spec.name}: cut off at byte {offset + done} while being read")
            done += got

    def close(self) -> None:
        """Close the descriptors."""
        for descriptor in self.descriptors.values():
            os.close(descriptor)


@contextmanager
def open_checkpoint(path: Path, name: str = SINGLE) -> Iterator[Checkpoint]:
    """Open a ``.safetensors`` file, or a folder with ``name`` or (for the default name) its shards and index.

    Every header is parsed strictly (`hubfusion.checkpoint.headers`). Raises `CheckpointError` naming the file.
    """
    checkpoint = _open(Path(path), name)
    try:
        yield checkpoint
    finally:
        checkpoint.close()


def _open(path: Path, name: str) -> Checkpoint:
    files, listed = _weights_files(path, name)
    parameters: dict[str, Parameter] = {}
    descriptors: dict[Path, int] = {}
    try:
        for file in files:
            descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            for spec in _read_specs(file, descriptors[file]):
                if listed is not None and listed.get(spec.name) != file.name:
                    raise CheckpointError(f"{file}: {spec.name}: the index places it in {listed.get(spec.name)}")
                parameters[spec.name] = spec
                if spec.dtype == "BF16":
                    numpy_dtype(spec.dtype)  # imported here once, not in every worker process
        if listed is not None and (missing := sorted(set(listed) - set(parameters))):
            raise CheckpointError(f"{path / INDEX}: {missing[0]}: not in {listed[missing[0]]}")
    except BaseException:
        for descriptor in descriptors.values():
            os.close(descriptor)
        raise
    return Checkpoint(path, dict(sorted(parameters.items())), descriptors)


def _weights_files(path: Path, name: str) -> tuple[list[Path], dict[str, str] | None]:
    if path.is_file():
        return [path], None
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    if (path / name).is_file():
        return [path / name], None
    index = path / INDEX
    if name != SINGLE or not index.is_file():
        raise CheckpointError(f"{path}: no {name}{f' or {INDEX}' if name == SINGLE else ''} in it")
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise CheckpointError(f"{index}: {index.stat().st_size} bytes, at most {MAX_INDEX_BYTES} are allowed")
    listed = parse_index(index.read_bytes(), {p.name: p.stat().st_size for p in path.iterdir()}, str(index))
    return [path / shard for shard in sorted(set(listed.values()))], listed


def _read_specs(file: Path, descriptor: int) -> list[Parameter]:
    size = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, header_bytes(os.pread(descriptor, 8, 0), size, str(file)), 0)
    header = parse_header(prefix, size, str(file))
    return [Parameter(s.name, s.dtype, s.shape, file, s.start) for s in header.tensors.values()]
