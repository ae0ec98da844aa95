"""`python -m bot`: run one iteration, serve a schedule, or found a new base. Exceptions end here, in one line."""

from __future__ import annotations

import logging
import sys
import uuid
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from bot.config import Config, read_access, read_config
from bot.iteration import Iteration, Run, Verdict, run_iteration
from bot.report import show
from bot.schedule import serve as serve_schedule
from bot.schedule import stop_on_signals
from hubfusion.cli import run as run_app
from hubfusion.errors import FusionError
from hubfusion.hub import connect
from hubfusion.release.signature import check_signer

app = typer.Typer(
    name="bot",
    add_completion=False,
    help="The recycling bot: finetunes come in from the Hub, a better base goes out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
ConfigFile = Annotated[Path, typer.Option("--config", help="The bot's settings.")]
DEFAULT_CONFIG = Path("bot.toml")


def configure_logging() -> None:
    """One line a stage on stderr: colored on a terminal, plain elsewhere."""
    handler: logging.Handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    if sys.stderr.isatty():
        handler = RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S")
    for name in ("bot", "hubfusion"):
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).addHandler(handler)


def new_run(config: Config, *, act: bool) -> Run:
    """Connect one client with our token and one without it; fail here if signing is not possible."""
    access = read_access()
    if act and access.token is None:
        raise FusionError(
            "HF_TOKEN is not set: publishing needs a token that may write to the base, ledger and ranking"
        )
    if act and access.signer:
        check_signer(access.signer)
    reader = connect(access.endpoint)
    hub = connect(access.endpoint, access.token) if access.token else reader
    return Run(config, hub, reader, uuid.uuid4().hex, stop_on_signals(), access.signer)


@app.command()
def iterate(
    publish: Annotated[
        bool, typer.Option("--publish", help="Act on the plan; without it the Hub is only read.")
    ] = False,
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Run one iteration. A dry run unless told to --publish.

    [dim]python -m bot iterate                    # what would happen?[/]
    [dim]HF_TOKEN=… python -m bot iterate --publish  # do it[/]
    """
    configure_logging()
    show(run_iteration(new_run(read_config(config), act=publish), act=publish), acted=publish)


@app.command()
def serve(config: ConfigFile = DEFAULT_CONFIG) -> None:
    """Run iterations on the schedule of bot.toml, one at a time, until SIGTERM; stops between two steps."""
    configure_logging()
    settings = read_config(config)

    def once() -> Iteration:
        result = run_iteration(new_run(settings, act=True), act=True)
        if result.verdict is not Verdict.NOTHING_NEW:
            show(result, acted=True)
        return result

    new_run(settings, act=True)
    serve_schedule(settings.schedule, once)


@app.command()
def found(
    model: Annotated[str, typer.Argument(help="A folder with config, tokenizer and safetensors, or OWNER/NAME[@REV].")],
    license: Annotated[
        str | None, typer.Option(help="License, as the Hub names it (apache-2.0, mit, …); its own card's by default.")
    ] = None,
    config: ConfigFile = DEFAULT_CONFIG,
    language: Annotated[str | None, typer.Option(help="Language; its own card's by default, else en.")] = None,
) -> None:
    """Found a base: push a pretrained model as v0, and make its ledger and its ranking. Safe to repeat.

    [dim]python -m bot found FacebookAI/roberta-base[/]
    """
    from bot.founding import found_base

    configure_logging()
    run = new_run(read_config(config), act=True)
    print(f"{run.config.base} v0 is {found_base(run, model, license, language).sha}")


if __name__ == "__main__":
    run_app(app)
