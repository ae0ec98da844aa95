from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from hubfusion.fuse.selection import nth_largest, select


def stream_of(values: np.ndarray, calls: list[int], step: int = 100):
    def stream(every: int) -> Iterator[np.ndarray]:
        calls.append(every)
        for first in range(0, values.size, step * every):
            yield values[first : first + step].copy()

    return stream


DATA = {
    "normal": np.abs(np.random.default_rng(0).standard_normal(20_000)),
    "zeros and a few": np.where(np.arange(20_000) % 50 == 0, np.arange(20_000), 0),
    "one value": np.full(20_000, 3.25),
    "two values": np.repeat([1.0, 2.0], 10_000),
    "sorted, so that a sample of blocks misleads": np.linspace(0, 1, 20_000) ** 8,
    "tiny and huge": 10.0 ** np.random.default_rng(1).uniform(-40, 38, 20_000),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("rank", [1, 2, 777, 4000, 19_999, 20_000])
def test_the_nth_largest_is_exactly_that_of_a_full_sort(name, rank, dtype):
    values = DATA[name].astype(dtype)
    calls: list[int] = []
    found = nth_largest(stream_of(values, calls), values.size, rank, dtype, max_held=500)
    assert found == np.sort(values)[::-1][rank - 1]
    assert len(calls) < 40


def test_two_passes_are_enough_where_a_sample_is_fair():
    values = np.random.default_rng(5).random(100_000).astype(np.float32)
    calls: list[int] = []
    nth_largest(stream_of(values, calls), values.size, 20_000, max_held=20_000)
    assert calls == [5, 1]


@pytest.mark.parametrize("rank", [0, 11])
def test_a_rank_outside_is_refused(rank):
    with pytest.raises(ValueError, match=r"rank must be in \[1, 10\]"):
        nth_largest(stream_of(np.arange(10.0), []), 10, rank)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("rank", [1, 777, 4000, 20_000])
@pytest.mark.parametrize("max_held, sample", [(500, 300), (20_000, 20_000)])
def test_the_energies_are_those_of_the_rows_whose_number_is_at_least_the_one_found(name, rank, max_held, sample):
    values = DATA[name].astype(np.float32)
    rows = np.random.default_rng(7).standard_normal((3, values.size)).astype(np.float32)

    def stream(every: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in range(0, values.size, 100 * every):
            yield values[first : first + 100].copy(), rows[:, first : first + 100].copy()

    found, energies = select(stream, values.size, rank, np.float32, max_held, sample)
    assert found == np.sort(values)[::-1][rank - 1]
    chosen = rows[:, values >= found].astype(np.float64)
    assert energies == pytest.approx((chosen**2).sum(axis=1).tolist(), rel=1e-12)
