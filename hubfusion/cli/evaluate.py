"""`hubfusion evaluate`, `suite`, `audit`, `recommend`: score a model as a base, and check data and published scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hubfusion.cli.app import app
from hubfusion.cli.engines import (
    AtOnce,
    EngineName,
    EngineOption,
    EngineOptions,
    Flavor,
    Gpus,
    Image,
    Namespace,
    PerWorker,
    RayAddress,
    choose_engine,
    sharing,
    tell,
)
from hubfusion.cli.models import cache, find_model
from hubfusion.errors import EvaluationError

if TYPE_CHECKING:
    from rich.table import Table

    from hubfusion.evaluate.audit import Finding
    from hubfusion.evaluate.protocols import Protocol
    from hubfusion.evaluate.scores import Scores

suites = typer.Typer(help="Evaluation suites: what is in them, and is the data sound?", no_args_is_help=True)
app.add_typer(suites, name="suite")

Store = Annotated[
    Path | None, typer.Option("--store", help="Folder of stored results; in the user's cache by default.")
]
SuiteName = Annotated[str, typer.Option("--suite", help="A shipped suite, or a TOML file.")]
Recipes = Annotated[Path | None, typer.Option("--recipes", help="TOML file that defines or changes protocols.")]
Seeds = Annotated[str, typer.Option("--seeds", help="Seeds, e.g. 0,1,2.")]
Results = Annotated[
    str | None,
    typer.Option("--results", help="OWNER/NAME of a dataset on the Hub: results are read from there and written to."),
]


def _protocols(names: str, recipes: Path | None) -> list[Protocol]:
    from hubfusion.evaluate.protocols import STANDARD, find_protocol, read_protocols

    known = dict(STANDARD) | (read_protocols(recipes) if recipes else {})
    return [find_protocol(n.strip(), known) for n in names.split(",")]


def _seeds(text: str) -> list[int]:
    try:
        return [int(s) for s in text.split(",")]
    except ValueError:
        raise EvaluationError(f"--seeds: whole numbers with commas between, got {text!r}") from None


def _show(table: Table) -> None:
    from rich.console import Console

    Console().print(table)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A folder, or OWNER/NAME with @revision if need be.")],
    suite: SuiteName = "offline",
    protocol: Annotated[str, typer.Option("--protocol", help="Protocols, e.g. linear-probing,finetune.")] = (
        "linear-probing"
    ),
    recipes: Recipes = None,
    seeds: Seeds = "0",
    store: Store = None,
    out: Annotated[Path, typer.Option("--out", help="Where the scores go, as JSON.")] = Path("scores.json"),
    results: Results = None,
    engine: EngineOption = EngineName.LOCAL,
    units_per_worker: PerWorker = None,
    ray_address: RayAddress = "auto",
    gpus_per_unit: Gpus = None,
    flavor: Flavor = "cpu-basic",
    image: Image = None,
    namespace: Namespace = None,
    jobs_at_once: AtOnce = 8,
) -> None:
    """Score a model as a base; what was measured before is read, not measured again.

    Example: hubfusion evaluate ibm/ColD-Fusion --suite offline --protocol linear-probing,finetune --seeds 0,1
    """
    from hubfusion.codec import dumps
    from hubfusion.data.suite import load_suite
    from hubfusion.evaluate.units import plan_units, score_units

    chosen, recipe = load_suite(suite), _protocols(protocol, recipes)
    settings = EngineOptions(
        engine, units_per_worker, ray_address, gpus_per_unit, flavor, image, namespace, jobs_at_once
    )
    found, place = find_model(model), store or cache() / "scores"
    missing = choose_engine(found, results, settings)
    units = plan_units(found.key, chosen, recipe, _seeds(seeds))
    with sharing(results, units, place) as note:
        scores = score_units(units, place, missing, on_event=note)
        out.write_text(dumps(scores), encoding="utf-8")
        _show(_table(scores, [p.name for p in recipe]))
        typer.echo(f"{out}: {len(scores.entries)} scores of {found.key}")


def _table(scores: Scores, protocols: list[str]) -> Table:
    from rich.table import Table

    table = Table("dataset", "metric", "test", *protocols, title=scores.model)
    for dataset in dict.fromkeys(s.dataset for s in scores):
        mine = {s.protocol: s for s in scores if s.dataset == dataset}
        first = next(iter(mine.values()))
        cells = [
            f"{mine[p].mean:.2f}" + (f" ± {mine[p].stderr:.2f}" if len(mine[p].seeds) > 1 else "") if p in mine else ""
            for p in protocols
        ]
        table.add_row(dataset, first.metric, str(first.examples), *cells)
    table.add_section()
    table.add_row("mean", "", "", *(f"{scores.mean(p):.2f}" for p in protocols))
    return table


@suites.command("list")
def list_suites() -> None:
    """The suites that ship, and what is in them."""
    from hubfusion.data.suite import load_suite, shipped_suites

    for name in shipped_suites():
        suite = load_suite(name)
        typer.echo(f"{name}: {len(suite.datasets)} datasets. {suite.description}")


@suites.command("check")
def check(
    name: Annotated[str, typer.Argument(help="A shipped suite, or a TOML file.")],
    against: Annotated[
        str | None, typer.Option("--against", help="Another suite: are our test texts in its training data?")
    ] = None,
) -> None:
    """Read every dataset: schema, labels, sizes, duplicates, test texts in training data. Exit code 1 on problems."""
    from rich.table import Table

    from hubfusion.data.checks import check_suite, find_contamination
    from hubfusion.data.suite import load_suite

    table = Table("dataset", "train", "validation", "test", "labels", "majority", "repeated", "leaked", title=name)
    problems, read = [], {}
    for report, data in check_suite(load_suite(name)):
        sizes = (report.train, report.validation, report.test, report.labels)
        cells = (*map(str, sizes), f"{report.majority:.1f} %", str(report.repeated), str(report.leaked))
        table.add_row(report.dataset, *cells)
        problems += [f"{report.dataset}: {p}" for p in report.problems]
        if data is not None:
            read[report.dataset] = data
    trains = {n: d.train for n, d in read.items()}
    if against is not None:
        others = {r.dataset: d for r, d in check_suite(load_suite(against)) if d is not None}
        trains = {f"{against}: {n}": d.train for n, d in others.items()}
    for found in find_contamination({n: d.test for n, d in read.items()}, trains):
        problems.append(f"{found.test}: {found.count} test texts are in the training data of {found.train}")
    _show(table)
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(1)


@app.command()
def audit(
    table: Annotated[Path, typer.Argument(help="CSV: a column of model names, a column for each dataset.")],
    suite: SuiteName = "recycling36",
    out: Annotated[Path | None, typer.Option("--out", help="Write all findings here, as JSON.")] = None,
    show: Annotated[int, typer.Option("--show", help="How many findings of each kind to print.")] = 5,
) -> None:
    """Find what went wrong in a published table of scores: shifted, copied, impossible, implausible values.

    Exit code 1 if anything was found. Example: hubfusion audit models_tested.csv --out findings.json
    """
    from hubfusion.codec import dumps
    from hubfusion.data.suite import load_suite
    from hubfusion.evaluate.audit import FindingKind, read_table
    from hubfusion.evaluate.audit import audit as examine

    datasets = load_suite(suite).datasets
    sizes = {d.name: d.test_size for d in datasets if d.test_size is not None and d.metric.value == "accuracy"}
    read = read_table(table, [d.name for d in datasets])
    findings = examine(read, sizes)
    for kind in FindingKind:
        mine = [f for f in findings if f.kind is kind]
        typer.echo(f"{kind}: {len({f.row for f in mine})} of {len(read.models)} rows")
        for finding in mine[:show]:
            typer.echo(f"  {_line(finding)}")
    if out is not None:
        out.write_text(dumps(findings), encoding="utf-8")
    if findings:
        raise typer.Exit(1)


def _line(finding: Finding) -> str:
    return f"row {finding.row}, {finding.model}: {finding.detail}"


@app.command()
def recommend(
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help="The first is what you would start from.")],
    suite: SuiteName = "offline",
    data: Annotated[Path | None, typer.Option("--data", help="Your own CSV, JSON lines or parquet file.")] = None,
    text: Annotated[str, typer.Option("--text", help="Its text column, or two with a comma.")] = "text",
    label: Annotated[str, typer.Option("--label", help="Its label column.")] = "label",
    recipes: Recipes = None,
    seeds: Seeds = "0,1,2",
    store: Store = None,
) -> None:
    """Which base should I start from? All are probed on one dataset, up to three are tried on your own data.

    Example: hubfusion recommend roberta-base-folder ibm/ColD-Fusion --suite offline --data my.csv
    """
    from rich.table import Table

    from hubfusion.data.suite import load_suite
    from hubfusion.evaluate.recommend import KnownModel, own_dataset
    from hubfusion.evaluate.recommend import recommend as rank

    probe, finetune = _protocols("linear-probing,finetune", recipes)
    own = own_dataset(data, text.split(","), label) if data else None
    known = [KnownModel(m.key, m.folder()) for m in map(find_model, models)]
    found = rank(
        known,
        load_suite(suite),
        (probe, finetune),
        _seeds(seeds),
        store or cache() / "scores",
        own=own,
        on_event=tell,
    )
    table = Table("try", "model", "probing", "gain on your data", "95 % interval")
    for place, one in enumerate(found, 1):
        gain = f"{one.tried.mean:+.2f}" if one.tried else ""
        interval = "{:+.2f} to {:+.2f}".format(*one.tried.interval()) if one.tried else ""
        table.add_row(str(place), one.model, f"{one.probe:.2f} ({one.probe_gain:+.2f})", gain, interval)
    _show(table)
