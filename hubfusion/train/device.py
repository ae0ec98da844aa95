"""Choose the device and its token budget, and use all cores of a CPU.

The cores of a CPU work on different batches, one thread each, instead of sharing each operation of one batch. So cores
do not wait for each other within a batch, nor for Python between two operations.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

import torch

from hubfusion.train.recipe import Precision
from hubfusion.train.tokens import Tokens

# Padded tokens in one pass: what fits the caches of a core, and what keeps a GPU busy.
TRAINING_BUDGET = {"cpu": 1024, "cuda": 65536}
INFERENCE_BUDGET = {"cpu": 1024, "cuda": 262144}
# What one more pass costs, in tokens: starting its kernels, adding its gradients to the others.
OVERHEAD = {"cpu": 16, "cuda": 2048}
MOST = 8  # threads, as each has gradients of its own; more cores share the operations of one

Item = TypeVar("Item")
Found = TypeVar("Found")


def pick_device() -> str:
    """``cuda`` if there is one, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def as_inputs(tokens: Tokens, rows: list[int], device: str) -> dict[str, Any]:
    """The batch of these rows as tensors on the device."""
    return {k: torch.from_numpy(v).to(device, non_blocking=True) for k, v in tokens.batch(rows).items()}


def autocast(device: str, precision: Precision) -> Any:
    """The forward pass in bfloat16 when asked for; otherwise nothing."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision is Precision.BFLOAT16)


class Cores:
    """Threads that divide a CPU's cores among them, at most `MOST`; the caller's own thread for a GPU."""

    def __init__(self, device: str) -> None:
        self._before = torch.get_num_threads()
        self.count = min(self._before, MOST) if device == "cpu" else 1
        self._share = self._before // self.count
        self._pool = ThreadPoolExecutor(self.count, "core", _take, (self._share,)) if self.count > 1 else None

    def map(self, function: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
        """What ``function`` gives for each item, in their order; few are begun before they are asked for."""
        if self._pool is None:
            yield from map(function, items)
            return
        begun: deque[Future[Found]] = deque()
        for item in items:
            begun.append(self._pool.submit(function, item))
            if len(begun) >= 2 * self.count:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, the caller's operations take one core too: a second thread of theirs would wait where others work."""
        if self._pool is not None:
            torch.set_num_threads(self._share)
        try:
            yield
        finally:
            if self._pool is not None:
                torch.set_num_threads(self._before)

    def __enter__(self) -> Cores:
        """These cores."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what was begun; what was not is dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._before)  # a thread's setting is also that of all threads started later


def _take(threads: int) -> None:
    """Give each operation of the thread that calls this so many ``threads``."""
    torch.get_num_threads()  # a thread's first look takes over what was set last anywhere, and would undo ours
    torch.set_num_threads(threads)
