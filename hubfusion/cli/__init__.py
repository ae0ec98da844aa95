"""The `hubfusion` command. Each subcommand imports its dependencies when it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from hubfusion.errors import FusionError


def run(application: Callable[..., object], argv: list[str] | None = None) -> NoReturn:
    """Run an application; a `FusionError` becomes one line on stderr and exit code 1, never a traceback."""
    try:
        application(args=argv)
    except FusionError as error:
        # What a stranger wrote may be in the message; nothing in it may act on a terminal.
        shown = "".join(c if c.isprintable() else "?" for c in str(error))
        print(f"error: {shown}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def main(argv: list[str] | None = None) -> NoReturn:
    """Entry point of the console script.

    `hubfusion fuse` does not pass through typer but has a parser of argparse: through typer, a fuse of two models of
    1 KB takes 0.18 s more (0.63 instead of 0.36 s of wall time, 0.42 instead of 0.24 s of CPU; ``--help`` the same).
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["fuse"]:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the cores have workers of their own
        from hubfusion.cli.fuse import fuse

        run(fuse, argv[1:])
    from hubfusion.cli.commands import app

    run(app, argv)
