"""Progress of long work: a bar when stderr is a terminal, a plain line for each tenth elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Tell = Callable[[int, int], None]


@contextmanager
def bar(title: str) -> Iterator[Tell]:
    """Yield ``tell(done, total)``; nothing is shown before the first call."""
    with bars() as make:
        yield make(title)


@contextmanager
def bars() -> Iterator[Callable[[str], Tell]]:
    """Yield a function that makes a bar: a title to its ``tell(done, total)``. None is shown before its first call."""
    if not sys.stderr.isatty():
        yield _plain
        return
    from rich.console import Console
    from rich.progress import Progress

    # Drawn when something is told, not by a thread of its own: beside one, a fuse could not fork its workers.
    with Progress(console=Console(stderr=True), auto_refresh=False) as progress:
        due = 0.0

        def make(title: str) -> Tell:
            task = progress.add_task(title, visible=False)

            def tell(done: int, total: int) -> None:
                nonlocal due
                progress.update(task, completed=done, total=total, visible=True)
                if done == total or time.monotonic() >= due:
                    progress.refresh()
                    due = time.monotonic() + 0.1

            return tell

        yield make


def _plain(title: str) -> Tell:
    tenth = -1

    def tell(done: int, total: int) -> None:
        nonlocal tenth
        if total and done * 10 // total > tenth:
            tenth = done * 10 // total
            print(f"{title}: {100 * done // total} %", file=sys.stderr, flush=True)

    return tell
