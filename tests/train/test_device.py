"""All cores at work: pieces in order, one thread each, and a caller whose own threads stay as they were."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest
import torch

from hubfusion.train.device import Cores


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_each_core_runs_its_operations_alone_and_answers_come_in_order(three_threads: None) -> None:
    together = threading.Barrier(3, timeout=20)

    def work(item: int) -> tuple[int, int, int]:
        together.wait()  # passes only if three items are under way at once
        return item, torch.get_num_threads(), threading.get_ident()

    with Cores("cpu") as cores:
        assert cores.count == 3
        found = list(cores.map(work, range(6)))
    assert [f[:2] for f in found] == [(i, 1) for i in range(6)]
    assert len({f[2] for f in found}) == 3


def test_the_callers_threads_stay_and_so_do_those_of_threads_started_later(three_threads: None) -> None:
    with Cores("cpu") as cores:
        list(cores.map(lambda _: None, range(9)))
        with cores.alone():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert (torch.get_num_threads(), later) == (3, [3])


def test_a_gpu_is_fed_from_the_callers_thread() -> None:
    with Cores("cuda") as cores:
        assert (cores.count, list(cores.map(lambda _: threading.get_ident(), [1]))) == (1, [threading.get_ident()])


def test_an_error_on_a_core_reaches_the_caller(three_threads: None) -> None:
    with pytest.raises(ZeroDivisionError), Cores("cpu") as cores:
        list(cores.map(lambda x: 1 // x, [1, 0, 1]))


def test_endless_work_is_begun_as_it_is_asked_for(three_threads: None) -> None:
    begun: list[int] = []
    with Cores("cpu") as cores:
        found = cores.map(lambda x: begun.append(x) or x, itertools.count())
        assert [next(found) for _ in range(4)] == [0, 1, 2, 3]
    assert len(begun) <= 4 + 2 * 3
