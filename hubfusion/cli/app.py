"""All commands of `hubfusion`, by area."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="hubfusion",
    add_completion=False,
    help="Recycle finetuned models into a better base (ColD Fusion, arXiv 2212.01378).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

from hubfusion.cli import compare as _compare  # noqa: E402,F401
from hubfusion.cli import contribute as _contribute  # noqa: E402,F401
from hubfusion.cli import evaluate as _evaluate  # noqa: E402,F401
from hubfusion.cli import hub as _hub  # noqa: E402,F401
from hubfusion.cli import methods as _methods  # noqa: E402,F401
from hubfusion.cli import trust as _trust  # noqa: E402,F401
