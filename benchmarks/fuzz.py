"""A million hostile headers and indexes: no crash, no hang, flat memory, and never more lenient than the library.

    python benchmarks/fuzz.py [--inputs 1000000] [--seed 0]

Inputs are valid files of a few tensors, mutated by bytes, by JSON tokens and by structure, and index files likewise.
Each header that we accept must be accepted by the safetensors library with the same tensors and the same bytes.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import resource
import struct
import time
from typing import Any

import psutil
from safetensors import SafetensorError, deserialize

from hubfusion.checkpoint.headers import ITEM_BYTES, parse_header, parse_index
from hubfusion.errors import CheckpointError

TOKENS = (
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"null", b"true", b"NaN", b"-1", b"0", b"1e9", b"18446744073709551616",
    b'"dtype"', b'"shape"', b'"data_offsets"', b'"F32"', b'"BF16"', b'"__metadata__"', b"\xff", b"\0", b" ", b"9" * 30,
    b"[[[[[[[[", b'{"a":', b'"../a.safetensors"', b'"a.safetensors"', b'"weight_map"', b"\\u0061",
)  # fmt: skip
FILES = {"a.safetensors": 10, "model-00001-of-00002.safetensors": 10}
WARM = 10_000
DTYPES = (*ITEM_BYTES, "F8_E4M3", "f32", "")


def random_table(rng: random.Random) -> tuple[dict[str, Any], int]:
    """A valid header of up to four tensors, sometimes with one thing off, and its bytes of data."""
    table: dict[str, Any] = {}
    end = 0
    for i in range(rng.randrange(5)):
        dtype, shape = rng.choice(list(ITEM_BYTES)), [rng.randrange(4) for _ in range(rng.randrange(3))]
        size = ITEM_BYTES[dtype]
        for s in shape:
            size *= s
        table[f"t{i}"] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    if table and rng.random() < 0.4:
        entry = table[rng.choice(list(table))]
        match rng.randrange(5):
            case 0:
                entry["data_offsets"] = [rng.randrange(-2, 50), rng.randrange(-2, 50)]
            case 1:
                entry["shape"] = [
                    rng.choice((-1, 0, 1, 2, 2**32, 2**63, 1.5, True, None)) for _ in range(rng.randrange(10))
                ]
            case 2:
                entry["dtype"] = rng.choice(DTYPES)
            case 3:
                entry[rng.choice(("note", "dtype", "shape"))] = rng.choice((1, None, [], "F32"))
            case _:
                table["__metadata__"] = rng.choice(({}, {"a": "b"}, {"a": 1}, [], None))
    return table, end


def mutate(text: bytearray, rng: random.Random) -> bytearray:
    """Up to three edits: a byte set, a token put in, a stretch cut out or doubled."""
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(text) + 1)
        match rng.randrange(4):
            case 0 if text:
                text[at % len(text)] = rng.randrange(256)
            case 1:
                text[at:at] = rng.choice(TOKENS)
            case 2:
                del text[at : at + rng.randrange(1, 12)]
            case _:
                text[at:at] = text[at : at + rng.randrange(1, 40)]
    return text


def one_header(rng: random.Random) -> str:
    """Parse one hostile header both ways; how it ended."""
    table, data = random_table(rng)
    text = mutate(bytearray(json.dumps(table).encode()), rng)
    length = len(text) + (rng.choice((-1, 1, 7, 1 << 20, 1 << 63)) if rng.random() < 0.05 else 0)
    file = struct.pack("<Q", max(0, length) % (1 << 64)) + bytes(text)
    file += bytes(max(0, data + (rng.choice((-1, 1, 8)) if rng.random() < 0.05 else 0)))
    if rng.random() < 0.02:
        file = file[: rng.randrange(12)]
    try:
        ours = parse_header(file, len(file), "f").tensors
    except CheckpointError as error:
        if "\n" in str(error):
            raise AssertionError(f"two lines: {error!s}") from None
        try:
            deserialize(file)
        except SafetensorError:
            return "header: both refuse"
        return "header: only we refuse"
    try:
        theirs = dict(deserialize(file))
    except SafetensorError as error:
        raise AssertionError(f"we accept, the library says {error}: {file!r}") from None
    if {n: (s.dtype, list(s.shape), file[s.start : s.stop]) for n, s in ours.items()} != {
        n: (t["dtype"], t["shape"], bytes(t["data"])) for n, t in theirs.items()
    }:
        raise AssertionError(f"we read something else than the library: {file!r}")
    return "header: both accept"


def one_index(rng: random.Random) -> str:
    """Parse one hostile index; what is accepted names only files that are there."""
    table = {"metadata": {}, "weight_map": {f"t{i}": rng.choice(list(FILES)) for i in range(rng.randrange(4))}}
    text = mutate(bytearray(json.dumps(table).encode()), rng)
    try:
        index = parse_index(bytes(text), FILES, "f")
    except CheckpointError as error:
        if "\n" in str(error):
            raise AssertionError(f"two lines: {error!s}") from None
        return "index: refused"
    if not set(index.values()) <= set(FILES):
        raise AssertionError(f"a file that is not there: {bytes(text)!r}")
    return "index: accepted"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, ends = random.Random(arguments.seed), collections.Counter[str]()
    slowest, memory, begin = 0.0, 0, time.monotonic()
    for number in range(arguments.inputs):
        start = time.process_time()
        ends[one_header(rng) if number % 5 else one_index(rng)] += 1
        slowest = max(slowest, time.process_time() - start)
        if number == WARM:
            memory = psutil.Process().memory_info().rss
    grown = psutil.Process().memory_info().rss - memory
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for name, count in sorted(ends.items()):
        print(f"{count:9,} {name}")
    print(f"{arguments.inputs:,} inputs in {time.monotonic() - begin:.0f} s, slowest {1000 * slowest:.1f} ms (CPU)")
    print(f"memory grew by {grown / 2**20:.1f} MiB after the first {WARM:,}, peak {peak:.0f} MiB")


if __name__ == "__main__":
    main()
