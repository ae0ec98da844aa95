"""Random draws that depend on the recipe's seed, the input, the parameter's name and the entry, and on nothing else."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

LEVELS = 1 << 16


def draw(seed: int, row: int, name: str, first: int, last: int) -> npt.NDArray[np.uint16]:
    """Uniform whole numbers in 0 ... 65535 for entries ``first ... last`` of one input's parameter.

    Entry e has always the same draw, whatever the chunks (PCG64 is advanced to it).
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}\0{row}\0{name}".encode()).digest()[:16], "little")
    generator = np.random.PCG64(key).advance(first // 4)
    # The same words as random_raw gives, but other threads may run meanwhile.
    words = (
        np.random.Generator(generator)
        .integers(0, 1 << 64, (last + 3) // 4 - first // 4, np.uint64)
        .astype("<u8", copy=False)
    )
    return words.view("<u2")[first % 4 : first % 4 + last - first]


def draw_rows(seed: int, rows: int, name: str, first: int, shape: tuple[int, ...]) -> Iterator[npt.NDArray[Any]]:
    """Draws of ``rows`` inputs for a chunk that begins at entry ``first``, one input after another: (*shape)."""
    size = math.prod(shape)
    for row in range(rows):
        yield draw(seed, row, name, first, first + size).reshape(shape)
