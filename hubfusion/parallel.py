"""Spread jobs over the cores; the caller receives the results and works on jobs as well.

numpy releases the interpreter's lock in every operation, but on chunks that fit a core's cache an operation takes
20 µs, and two threads then wait for each other most of the time. Processes do not: an average takes three quarters of
the time. They are forked, so they have the caller's open files and memory; only job numbers and results go through
pipes.
multiprocessing's pool is not used: it takes 2.2 to 2.5 times as long for 4 jobs of 196,608 entries, 1.7 to 1.8 times
for 64 jobs of 3 inputs, and 0.9 to 1.3 times for 48 to 128 jobs of 8 inputs (``benchmarks/parallel.py``, two busy
cores); and it waits forever for a worker that was killed, which is an error here.
Threads are used where a fork is not safe (another thread is running, torch does the work) or not known to be.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import IO, Any, TypeVar

import numpy as np

from hubfusion.errors import FusionError, RecipeError

MOST = 4  # workers unless told otherwise: more than a few only wait for the memory
SMALL = 1 << 23  # entries to read that one worker is done with before another has begun
FREED_BYTES = 24 << 20
TURNS = 1024  # numbers of 4 bytes that fit any pipe, however small
OFTEN = 0.01  # seconds between the messages of a process

Job = TypeVar("Job")
Found = TypeVar("Found")
Worker = Callable[[], Callable[[Job], Found]]


def suited(entries: int, asked: int | None = None) -> int:
    """How many workers: as ``asked``; else one for few ``entries``, and the cores, at most `MOST`, for many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return asked if asked is not None else 1 if entries < SMALL else min(MOST, cores)


def spread(
    jobs: Iterable[Job], worker: Worker[Job, Found], workers: int, *, fork: bool = True
) -> Iterator[tuple[Job, Found]]:
    """Do every job and yield it with what was found, in the order in which they end.

    Each of the ``workers`` (the caller is one) makes a function for itself with ``worker()``, which has its buffers.
    It may read what is the caller's but should change nothing: unless ``fork`` is False, it may be in another process.
    What it finds should be small. The first exception ends the work and is raised here.
    """
    if workers < 1:
        raise RecipeError(f"workers must be at least 1, got {workers}")
    # Once a mapped block of this size was freed, glibc serves smaller ones from memory it keeps: the formulas'
    # temporaries then cost no page faults (a hundredfold fewer of them, and a third of DARE's time).
    np.empty(FREED_BYTES, np.uint8)
    jobs = list(jobs)
    kind = _Processes if fork and may_fork() else _Threads
    with kind(jobs, worker, min(workers, len(jobs)) - 1) as others:
        do = worker()
        for number in others.numbers():
            yield jobs[number], do(jobs[number])
            yield from ((jobs[n], found) for n, found in others.results())
        yield from ((jobs[n], found) for n, found in others.results(wait=True))


def may_fork() -> bool:
    """Whether a fork is safe here: on Linux, and no other thread can hold a lock that the fork would wait for."""
    return sys.platform == "linux" and threading.active_count() == 1


class _Threads:
    """Workers beside the caller: threads."""

    def __init__(self, jobs: Sequence[Any], worker: Worker[Any, Any], others: int) -> None:
        self._jobs, self._worker, self._others, self._working = jobs, worker, others, 0
        self._messages: SimpleQueue[list[tuple[int, Any]] | BaseException | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._left: SimpleQueue[int] = SimpleQueue()

    def __enter__(self) -> _Threads:
        for number in range(len(self._jobs)):
            self._left.put(number)
        for _ in range(self._others):
            self._start(self._work)
        return self

    def _start(self, run: Callable[..., None], *args: Any) -> None:
        self._threads.append(threading.Thread(target=run, args=args, daemon=True))
        self._threads[-1].start()
        self._working += 1

    def _work(self) -> None:
        try:
            do = self._worker()
            for number in self.numbers():
                self._messages.put([(number, do(self._jobs[number]))])
            self._messages.put(None)
        except BaseException as error:  # noqa: B036 raised again in the caller's thread
            self._messages.put(error)

    def numbers(self) -> Iterator[int]:
        """Numbers of jobs that nobody else has begun."""
        try:
            while True:
                yield self._left.get_nowait()
        except Empty:
            return

    def results(self, wait: bool = False) -> Iterator[tuple[int, Any]]:
        """What the others have found since the last call; with ``wait``, all that they are still to find."""
        while self._working:
            try:
                message = self._messages.get(block=wait)
            except Empty:
                return
            if isinstance(message, BaseException):
                raise message
            if message is None:
                self._working -= 1
            else:
                yield from message

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _ in self.numbers():  # nobody begins another
            pass
        for thread in self._threads:
            thread.join()


class _Processes(_Threads):
    """Workers beside the caller: forks of this process, each with a thread here that hands on what it says."""

    def __enter__(self) -> _Processes:
        self._run, self._forks = len(self._jobs) // TURNS + 1, list[int]()
        self._turns, turns = os.pipe()
        os.write(turns, np.arange(0, len(self._jobs), self._run, dtype="<u4").tobytes())
        os.close(turns)
        pipes: list[int] = []
        for _ in range(self._others):
            receiver, sender = os.pipe()
            try:
                with warnings.catch_warnings():  # Python 3.12 counts the BLAS library's threads; a fork ends them first
                    warnings.simplefilter("ignore", DeprecationWarning)
                    fork = os.fork()
            except OSError:  # no room for one more: the others do its share
                os.close(receiver)
                break
            else:
                if not fork:
                    self._serve([*pipes, receiver], sender)
            finally:
                os.close(sender)
            self._forks.append(fork)
            pipes.append(receiver)
        for fork, pipe in zip(self._forks, pipes, strict=True):
            self._start(self._hand_on, fork, pipe)
        return self

    def _serve(self, receivers: Sequence[int], sender: int) -> None:
        """Be a worker; the process ends with it, at the latest when the caller is gone."""
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller's to answer
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for receiver in receivers:
                os.close(receiver)
            with open(sender, "wb") as pipe:
                try:
                    self._tell_results(pipe)
                except BrokenPipeError:
                    raise
                except BaseException as error:  # noqa: B036 raised again in the caller's process
                    pickle.dump(_portable(error), pipe)
            code = 0
        finally:
            os._exit(code)

    def _tell_results(self, pipe: IO[bytes]) -> None:
        do, found, due = self._worker(), [], 0.0
        for number in self.numbers():
            found.append((number, do(self._jobs[number])))
            if time.monotonic() >= due:
                pickle.dump(found, pipe)
                pipe.flush()
                found, due = [], time.monotonic() + OFTEN
        pickle.dump(found, pipe)
        pickle.dump(None, pipe)

    def _hand_on(self, fork: int, pipe: int) -> None:
        message: Any = []
        with open(pipe, "rb") as receiver:
            while isinstance(message, list):
                try:
                    message = pickle.load(receiver)
                except (EOFError, pickle.UnpicklingError):
                    message = FusionError(f"worker process {fork} was ended from outside")
                self._messages.put(message)

    def numbers(self) -> Iterator[int]:
        while raw := os.read(self._turns, 4):
            first = int.from_bytes(raw, "little")
            yield from range(first, min(first + self._run, len(self._jobs)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(ProcessLookupError, ChildProcessError):  # where SIGCHLD is ignored, nobody need wait
            for fork in self._forks if self._working else ():
                os.kill(fork, signal.SIGTERM)
            for fork in self._forks:
                os.waitpid(fork, 0)
        super().__exit__(kind, error, trace)
        os.close(self._turns)


def _portable(error: BaseException) -> BaseException:
    """The error as it can be sent to another process, with its traceback when it is not one of ours."""
    sent = error
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        sent = FusionError(f"{type(error).__name__}: {error}")
    if not isinstance(error, FusionError):
        sent.add_note(f"in a worker process:\n{''.join(traceback.format_exception(error))}")
    return sent


def counter(total: int, tell: Callable[[int, int], None] | None) -> Callable[[int], None]:
    """Return a function that adds to a count, from any thread, and tells it and ``total``, which it never exceeds."""
    done, lock = 0, threading.Lock()

    def count(more: int) -> None:
        nonlocal done
        with lock:
            done = min(total, done + more)
            if tell:
                tell(done, total)

    return count
