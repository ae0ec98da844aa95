"""The `hubfusion` command: a thin door; every subcommand imports what it needs when it runs, and nothing before."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from hubfusion.errors import FusionError

app = typer.Typer(
    name="hubfusion",
    add_completion=False,
    help="Recycle finetuned models into a better base (ColD Fusion, arXiv 2212.01378).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def run(application: typer.Typer, argv: list[str] | None = None) -> NoReturn:
    """Run a typer application; a `FusionError` becomes one line on stderr and exit code 1, never a traceback."""
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
    """Entry point of the console script."""
    run(app, argv)


from hubfusion.cli import contribute as _contribute  # noqa: E402,F401
from hubfusion.cli import evaluate as _evaluate  # noqa: E402,F401
from hubfusion.cli import fuse as _fuse  # noqa: E402,F401
from hubfusion.cli import hub as _hub  # noqa: E402,F401
from hubfusion.cli import trust as _trust  # noqa: E402,F401
