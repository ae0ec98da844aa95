"""`hubfusion hub`: serve the embedded Hub."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from hubfusion.cli.app import app
from hubfusion.errors import HubError

hub_app = typer.Typer(help="The embedded Hub: a server that the real huggingface_hub client talks to.")
app.add_typer(hub_app, name="hub", no_args_is_help=True)


@hub_app.command()
def serve(
    directory: Annotated[Path, typer.Option("--dir", help="Where everything is kept.")],
    user: Annotated[list[str], typer.Option("--user", help="NAME:TOKEN of a user; repeat for more.")],
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    org: Annotated[list[str] | None, typer.Option("--org", help="ORG:USER, a user who may write to ORG.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    expose: Annotated[bool, typer.Option("--expose", help="Allow a host that other machines can reach.")] = False,
    allow_jobs: Annotated[
        bool, typer.Option("--allow-jobs", help="Run jobs as local processes: users can run any command.")
    ] = False,
) -> None:
    """Serve the embedded Hub until stopped.

    Example: hubfusion hub serve --dir hub --port 8000 --user ann:hf_ann --user ibm-bot:hf_bot --org ibm:ibm-bot
    then, elsewhere: HF_ENDPOINT=http://127.0.0.1:8000 HF_TOKEN=hf_ann hf auth whoami
    """
    from hubfusion.localhub import LocalHub, Rules

    users: dict[str, str] = {}
    for name, token in (_pair(text, "--user", "NAME:TOKEN") for text in user):
        if name in users:
            raise HubError(f"--user {name}: given twice")
        users[name] = token
    orgs: dict[str, list[str]] = {}
    for name, member in (_pair(text, "--org", "ORG:USER") for text in org or []):
        orgs.setdefault(name, []).append(member)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    rules = Rules(allow_jobs=allow_jobs)
    hub = LocalHub(directory, users, orgs, host=host, port=port, rules=rules, expose=expose)
    typer.echo(f"serving {directory} at {hub.endpoint}")
    hub.run()


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    first, separator, second = text.partition(":")
    if not (first and separator and second):
        raise HubError(f"{option} {first}: must be {form}")
    return first, second
