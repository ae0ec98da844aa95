"""Why `hubfusion.parallel` has a protocol of its own: beside it, a pool of multiprocessing's fork context.

Both average k float32 models chunk by chunk into one file, as a fuse does: a job is a chunk of 196,608 entries, which a
worker reads from k files by `preadv` into its own buffers, averages, and writes. Only numbers of jobs and their results
(a count) pass between processes. The caller works as well in ours; a pool has all its workers beside the caller.

    python -m benchmarks.parallel [--entries 50331648] [--inputs 8] [--workers 2] [--repeat 7]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from hubfusion.parallel import spread

CHUNK = 196_608
Do = Callable[[int], int]
state: list[Do] = []


def worker(inputs: list[int], target: int) -> Do:
    rows = np.empty((len(inputs), CHUNK), np.float32)

    def do(chunk: int) -> int:
        at = chunk * CHUNK * 4
        for row, descriptor in zip(rows, inputs, strict=True):
            os.preadv(descriptor, [row.data], at)
        total = rows[0] * np.float32(1)
        for row in rows[1:]:
            total += row
        total /= len(inputs)
        return os.pwrite(target, total.data, at)

    return do


def begin(inputs: list[int], target: int) -> None:
    state.append(worker(inputs, target))


def in_pool(chunk: int) -> int:
    return state[0](chunk)


def by_ours(jobs: range, inputs: list[int], target: int, workers: int) -> int:
    return sum(written for _, written in spread(jobs, lambda: worker(inputs, target), workers))


def by_pool(jobs: range, inputs: list[int], target: int, workers: int) -> int:
    with multiprocessing.get_context("fork").Pool(workers, begin, (inputs, target)) as pool:
        return sum(pool.imap_unordered(in_pool, jobs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("entries", 48 << 20), ("inputs", 8), ("workers", 2), ("repeat", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    jobs = range(max(1, given.entries // CHUNK))
    with tempfile.TemporaryDirectory() as folder:
        values = np.random.default_rng(0).standard_normal(CHUNK, dtype=np.float32)
        files = [Path(folder, str(number)) for number in range(given.inputs)]
        for path in files:
            with path.open("wb") as file:
                for _ in jobs:
                    file.write(values.data)
        inputs = [os.open(path, os.O_RDONLY) for path in files]
        target = os.open(Path(folder, "out"), os.O_RDWR | os.O_CREAT)
        times: dict[str, list[float]] = {"ours": [], "pool": []}
        for _ in range(given.repeat + 1):
            for name, way in (("ours", by_ours), ("pool", by_pool)):
                began = time.perf_counter()
                assert way(jobs, inputs, target, given.workers) == len(jobs) * CHUNK * 4
                times[name].append(time.perf_counter() - began)
    ours, pool = (median(taken[1:]) for taken in times.values())
    print(f"{len(jobs)} jobs, {given.inputs} inputs, {given.workers} workers, median of {given.repeat}")
    print(f"hubfusion.parallel {ours * 1e3:.1f} ms, multiprocessing {pool * 1e3:.1f} ms, ratio {pool / ours:.2f}")


if __name__ == "__main__":
    main()
