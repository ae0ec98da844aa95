"""Estimate inner products of very long vectors from short sketches, in one pass over each vector.

A count sketch (Charikar, Chen, Farach-Colton 2002): every entry gets a random sign and one of `SIZE` buckets, buckets
are summed. ``sketch(x) · sketch(y)`` is an unbiased estimate of ``x · y`` with standard deviation about
``|x| |y| / sqrt(SIZE)``, so N contributions are compared with each other in N passes. It is linear: the sketch of a
difference is the difference of the sketches, and equal vectors have equal sketches to the last bit.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

SIZE = 1 << 14
CHUNK = 1 << 18


class Signs:
    """The random signs of one run: a tile for a whole chunk, and one sign and one shift for each chunk.

    ``seed`` should not be known to the authors of the vectors beforehand: whoever knows it can steer a sketch.
    """

    def __init__(self, seed: int) -> None:
        """Draw the tile: `CHUNK` sign bits, as masks for float32."""
        self.seed = seed
        bits = np.random.Generator(np.random.PCG64(seed)).integers(0, 2, CHUNK, dtype=np.uint32)
        self._tile = (bits << np.uint32(31)).reshape(-1, SIZE)

    def add(self, sketch: NDArray[np.float64], name: str, first: int, chunk: NDArray[np.float32]) -> None:
        """Add entries ``first`` … of the parameter ``name`` to ``sketch`` (SIZE,); ``chunk`` (≤ CHUNK,) is used up."""
        digest = hashlib.blake2b(f"{self.seed}/{name}/{first}".encode(), digest_size=8).digest()
        draw = int.from_bytes(digest, "little")
        shift, sign = draw % SIZE, -1.0 if draw >> 63 else 1.0
        rows, rest = divmod(len(chunk), SIZE)
        row = np.zeros(SIZE, np.float32)
        masks = chunk.view(np.uint32)
        if rows:
            body = masks[: rows * SIZE].reshape(rows, SIZE)
            np.bitwise_xor(body, self._tile[:rows], out=body)
            np.add.reduce(body.view(np.float32), axis=0, out=row)
        if rest:
            tail = masks[rows * SIZE :]
            np.bitwise_xor(tail, self._tile[rows, :rest], out=tail)
            row[:rest] += tail.view(np.float32)
        sketch[shift:] += sign * row[: SIZE - shift]
        sketch[:shift] += sign * row[SIZE - shift :]
