"""`hubfusion hub`: serve the embedded Hub."""

from __future__ import annotations

import typer

from hubfusion.cli import app

hub_app = typer.Typer(help="The embedded Hub: a server that the real huggingface_hub client talks to.")
app.add_typer(hub_app, name="hub", no_args_is_help=True)
