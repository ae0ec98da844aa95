"""The application that `hubfusion.cli.commands` fills."""

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
