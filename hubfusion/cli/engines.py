"""`hubfusion evaluate --engine`, and `hubfusion measure`, which is what a job runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hubfusion.cli.access import open_hub
from hubfusion.cli.app import app
from hubfusion.cli.models import Model, cache, find_model
from hubfusion.errors import EvaluationError

if TYPE_CHECKING:
    from hubfusion.evaluate.units import Engine, Evaluated, Result, Unit


class EngineName(StrEnum):
    """Where what is missing gets measured."""

    LOCAL = "local"
    RAY = "ray"
    JOBS = "jobs"


EngineOption = Annotated[EngineName, typer.Option("--engine", help="This process, a Ray cluster, or jobs of the Hub.")]
PerWorker = Annotated[
    int | None,
    typer.Option("--units-per-worker", help="Most units of one task or job; all of a dataset by default."),
]
RayAddress = Annotated[str, typer.Option("--ray-address", help="The cluster; auto finds RAY_ADDRESS or a local one.")]
Gpus = Annotated[
    float | None,
    typer.Option("--gpus-per-unit", help="Ray: GPUs of one task, e.g. 0.25; 1 by default if the cluster has any."),
]
Flavor = Annotated[str, typer.Option("--flavor", help="Jobs: the kind of machine.")]
Image = Annotated[
    str | None, typer.Option("--image", help="Jobs: an image that has hubfusion; installed with uv by default.")
]
Namespace = Annotated[str | None, typer.Option("--namespace", help="Jobs: who runs and pays; you by default.")]
AtOnce = Annotated[int, typer.Option("--jobs-at-once", min=1, help="Jobs: how many run at a time.")]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The options of the engines, as they were given."""

    engine: EngineName
    per_worker: int | None
    ray_address: str
    gpus: float | None
    flavor: str
    image: str | None
    namespace: str | None
    at_once: int


def choose_engine(model: Model, results: str | None, settings: EngineOptions) -> Engine:
    """The engine that was asked for; the model's files are fetched when it is first used, by jobs not at all."""
    if settings.engine is EngineName.JOBS:
        return _choose_jobs(results, settings)
    if settings.engine is EngineName.RAY:
        from hubfusion.evaluate.engines.ray import Cluster

        handed_on = {"HF_ENDPOINT": os.environ["HF_ENDPOINT"]} if "HF_ENDPOINT" in os.environ else {}
        cluster = Cluster(settings.ray_address, settings.gpus, settings.per_worker, handed_on)
        return lambda units: cluster.measure(model.folder(), units)
    return _here(model)


def _here(model: Model) -> Engine:
    from hubfusion.evaluate.engines.local import measure_here

    return lambda units: measure_here(model.folder(), units)


def _choose_jobs(results: str | None, settings: EngineOptions) -> Engine:
    from hubfusion.evaluate.engines.jobs import UV, UV_IMAGE, HubJobs

    if results is None:
        raise EvaluationError("--engine jobs needs --results OWNER/NAME, where the jobs write")
    hub = open_hub()
    jobs = HubJobs(
        hub,
        results,
        settings.namespace or hub.whoami(),
        image=settings.image or UV_IMAGE,
        program=("hubfusion",) if settings.image else UV,
        flavor=settings.flavor,
        at_once=settings.at_once,
        most=settings.per_worker,
    )
    return jobs.measure


@contextmanager
def sharing(
    results: str | None, units: Sequence[Unit], store: Path, every: float = 300.0
) -> Iterator[Callable[[Evaluated], None]]:
    """Read results from the Hub and write new ones to it, if a repository was given; yields the callback.

    ``every``: seconds between two commits, as a Hub grants some hundred an hour. A run that dies loses no more.
    """
    if results is None:
        yield tell
        return
    from hubfusion.evaluate.results import shared

    with shared(open_hub(), results, units, store, every) as note:

        def both(event: Evaluated) -> None:
            tell(event)
            note(event)

        yield both


def tell(event: Evaluated) -> None:
    """One line of progress on stderr, the same for every engine."""
    how = "stored" if event.stored else "measured"
    line = f"{event.done}/{event.total} {event.dataset} {event.protocol} seed {event.seed}: {event.value:.2f} ({how})"
    typer.echo(line, err=True)


@app.command(hidden=True)
def measure(
    order: Annotated[str, typer.Argument(help="The units, as `hubfusion evaluate --engine jobs` writes them.")],
    results: Annotated[str, typer.Option("--results", help="OWNER/NAME of the dataset that takes the results.")],
    every: Annotated[float, typer.Option("--every", help="Seconds between two commits of results.")] = 300.0,
) -> None:
    """What a job runs: measure the units of an order and write their results to the Hub."""
    from hubfusion.evaluate.engines.jobs import read_order, write_line
    from hubfusion.evaluate.units import score_units

    units, store = read_order(order), cache() / "scores"
    model = find_model(units[0].model)
    with sharing(results, units, store, every) as note:

        def said(missing: Sequence[Unit]) -> Iterator[tuple[Unit, Result]]:
            for unit, result in _here(model)(missing):
                typer.echo(write_line(unit, result))
                yield unit, result

        score_units(units, store, said, on_event=note)
