"""`hubfusion methods`, and `hubfusion fuse` in the list of commands."""

from __future__ import annotations

from typing import Annotated

import typer

from hubfusion.cli.app import app


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def fuse(context: typer.Context) -> None:
    """Fuse finetunes into their base; write weights, recipe, manifest and card."""
    from hubfusion.cli.fuse import fuse

    fuse(context.args)


@app.command()
def methods(
    markdown: Annotated[bool, typer.Option(help="Print every formula and its departures: docs/methods.md.")] = False,
) -> None:
    """List the fuse methods and the outer optimizers, one line each."""
    from hubfusion.fuse.folder import methods_markdown
    from hubfusion.fuse.methods import METHODS
    from hubfusion.fuse.outer import OUTERS

    if markdown:
        print(methods_markdown(), end="")
        return
    for title, table in (("method", METHODS), ("outer optimizer", OUTERS)):
        print(f"{title:16} what it does (options and defaults)")
        for name, entry in table.items():
            options = ", ".join(f"{k}={v}" for k, v in entry.options.items())
            print(f"  {name:16} {entry.summary}{f' ({options})' if options else ''}")
