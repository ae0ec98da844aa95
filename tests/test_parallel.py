"""Jobs spread over processes or threads: each done once, errors heard, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hubfusion import parallel as workers
from hubfusion.errors import CheckpointError, FusionError, RecipeError
from hubfusion.parallel import spread, suited

KINDS = pytest.mark.parametrize("fork", [True, False], ids=["processes", "threads"])
may_fork = workers.may_fork


@pytest.fixture(autouse=True)
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork also beside the idle threads that other tests left."""
    monkeypatch.setattr(workers, "may_fork", lambda: True)


@contextmanager
def leaving_nothing() -> Iterator[None]:
    """No descriptor, thread or child process is left of what happens inside."""
    before = held()
    yield
    assert held() == before


def held() -> tuple[int, int, str]:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return len(os.listdir("/proc/self/fd")), threading.active_count(), children


def slowly(seconds: float = 0.005) -> Callable[[], Callable[[int], tuple[int, int, int]]]:
    """A worker that says for each job its square, its process and its thread."""

    def start() -> Callable[[int], tuple[int, int, int]]:
        def do(number: int) -> tuple[int, int, int]:
            time.sleep(seconds)
            return number**2, os.getpid(), threading.get_ident()

        return do

    return start


@KINDS
@pytest.mark.parametrize("count", [0, 1, 2, 3, 50, 3000])
@pytest.mark.parametrize("crew", [1, 2, 4])
def test_every_job_is_done_once_and_comes_with_what_was_found(fork, count, crew):
    with leaving_nothing():
        found = list(spread(range(count), lambda: lambda n: n**2, crew, fork=fork))
    assert sorted(found) == [(n, n**2) for n in range(count)]


@KINDS
def test_the_work_is_shared(fork):
    with leaving_nothing():
        found = [f for _, f in spread(range(40), slowly(), 3, fork=fork)]
    assert len({pid for _, pid, _ in found}) == (3 if fork else 1)
    assert len({(pid, ident) for _, pid, ident in found}) == 3


def test_no_fork_beside_another_thread(monkeypatch):
    monkeypatch.setattr(workers, "may_fork", may_fork)
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    try:
        found = [f for _, f in spread(range(20), slowly(), 2)]
    finally:
        over.set()
        thread.join()
    assert {pid for _, pid, _ in found} == {os.getpid()}
    assert len({ident for _, _, ident in found}) == 2


@KINDS
def test_each_worker_has_buffers_of_its_own(fork):
    def start() -> Callable[[int], bool]:
        buffer: list[int] = []

        def do(number: int) -> bool:
            buffer.append(number)
            time.sleep(0.002)
            return buffer[-1] == number

        return do

    assert all(own for _, own in spread(range(50), start, 4, fork=fork))


def failing(error: Exception, where: str) -> Callable[[], Callable[[int], int]]:
    """A worker that raises in the caller ("here") or in another one ("there")."""
    here = threading.get_ident(), os.getpid()

    def start() -> Callable[[int], int]:
        is_here = (threading.get_ident(), os.getpid()) == here

        def do(number: int) -> int:
            if is_here == (where == "here") and number >= 4:
                raise error
            time.sleep(0.005)
            return number

        return do

    return start


@KINDS
@pytest.mark.parametrize("where", ["here", "there"])
def test_the_first_error_ends_the_work_and_is_raised_here(fork, where):
    with leaving_nothing(), pytest.raises(CheckpointError, match="^x: entry 3 is nan$"):
        for _ in spread(range(10_000), failing(CheckpointError("x: entry 3 is nan"), where), 3, fork=fork):
            pass


def test_an_unexpected_error_says_where_it_was_raised():
    with leaving_nothing(), pytest.raises(KeyError, match="lost") as caught:
        list(spread(range(1000), failing(KeyError("lost"), "there"), 2))
    assert "in a worker process" in caught.value.__notes__[0] and "raise error" in caught.value.__notes__[0]


class Awkward(Exception):
    """It cannot be pickled back: its arguments are not those of its constructor."""

    def __init__(self, file: str, line: int) -> None:
        super().__init__(f"{file}, line {line}")


def test_an_error_that_cannot_be_sent_is_told():
    with leaving_nothing(), pytest.raises(FusionError, match="^Awkward: x, line 3\n") as caught:
        list(spread(range(1000), failing(Awkward("x", 3), "there"), 2))
    assert "raise error" in caught.value.__notes__[0]


def test_an_error_before_the_first_job_is_heard():
    here = os.getpid()

    def start() -> Callable[[int], int]:
        if os.getpid() != here:
            raise MemoryError("no buffer")
        return lambda number: time.sleep(0.01) or number

    with leaving_nothing(), pytest.raises(MemoryError, match="no buffer"):
        list(spread(range(1000), start, 2))


def test_a_worker_that_is_killed_ends_the_work():
    here = os.getpid()

    def start() -> Callable[[int], int]:
        def do(number: int) -> int:
            if os.getpid() != here:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.005)
            return number

        return do

    with leaving_nothing(), pytest.raises(FusionError, match=r"worker process \d+ was ended from outside"):
        list(spread(range(1000), start, 3))


@KINDS
def test_whoever_stops_taking_stops_the_work(fork):
    with leaving_nothing():
        started = time.monotonic()
        for number, _ in spread(range(100_000), slowly(), 2, fork=fork):
            if number > 10:
                break
        assert time.monotonic() - started < 20


def test_results_larger_than_a_pipe_arrive():
    found = dict(spread(range(20), lambda: lambda n: (time.sleep(0.002), bytes([n]) * 300_000)[1], 2))
    assert all(found[n] == bytes([n]) * 300_000 for n in range(20))


def test_without_room_for_a_process_the_others_do_its_share(monkeypatch):
    def refuse() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    with leaving_nothing():
        assert sorted(spread(range(9), lambda: lambda n: -n, 3)) == [(n, -n) for n in range(9)]


def test_workers_end_when_the_caller_is_killed():
    program = """
import os, time
from hubfusion.parallel import spread
for _, pid in spread(range(10**6), lambda: lambda n: time.sleep(0.01) or os.getpid(), 2):
    if pid != os.getpid():
        print(pid, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as work:
        assert work.stdout is not None
        fork = int(work.stdout.readline())
        work.kill()
        work.wait()
    deadline = time.monotonic() + 20
    while is_running(fork) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(fork)


def is_running(process: int) -> bool:
    """Whether it has not ended; where nobody waits for orphans, an ended one stays as a zombie."""
    try:
        with open(f"/proc/{process}/stat", encoding="ascii") as stat:
            return stat.read().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def test_how_many_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert suited(10) == 1
    assert suited(10**9) == workers.MOST
    assert suited(10, 7) == 7
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert suited(10**9) == 1
    with pytest.raises(RecipeError, match="workers must be at least 1, got 0"):
        list(spread([1], lambda: lambda n: n, 0))
