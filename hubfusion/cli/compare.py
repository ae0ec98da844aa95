"""`hubfusion compare`: compare two models as bases, on seen and on unseen datasets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hubfusion.cli.app import app
from hubfusion.errors import EvaluationError

if TYPE_CHECKING:
    from hubfusion.data.suite import Suite
    from hubfusion.evaluate.scores import Comparison, Scores


@app.command()
def compare(
    candidate: Annotated[Path, typer.Argument(help="Its scores.json.")],
    base: Annotated[Path, typer.Argument(help="The scores.json of what it would replace.")],
    suite: Annotated[str | None, typer.Option("--suite", help="Suite that knows the noisy datasets and folds.")] = None,
    seen: Annotated[str | None, typer.Option("--seen", help="Datasets that it was trained on, a,b,c.")] = None,
    fold: Annotated[int | None, typer.Option("--fold", help="Fold of the suite that it was not trained on.")] = None,
) -> None:
    """Compare two models by their scores, paired by dataset, protocol and seed; refuses what was not measured alike.

    Example: hubfusion compare cold.json roberta.json --suite recycling36 --fold 1
    """
    from rich.console import Console
    from rich.table import Table

    from hubfusion.data.suite import load_suite
    from hubfusion.evaluate.scores import compare as pair

    chosen = load_suite(suite) if suite else None
    found = pair(_read(candidate), _read(base))
    table = Table("over", "scores", "mean gain", "95 % interval", "median", "better", "worse", "worst")
    for name, part in _parts(found, chosen, _trained_on(found, chosen, seen, fold)):
        low, high = part.interval()
        worst = f"{part.worst.dataset} by {part.worst.protocol} {part.worst.mean:+.2f}"
        sizes = (f"{part.mean:+.2f}", f"{low:+.2f} to {high:+.2f}", f"{part.median:+.2f}", str(part.wins))
        table.add_row(name, str(len(part.gains)), *sizes, str(part.losses), worst)
    Console().print(f"{found.candidate} over {found.base}, in points", highlight=False)
    Console().print(table)


def _read(path: Path) -> Scores:
    from hubfusion.codec import loads
    from hubfusion.evaluate.scores import Scores

    try:
        return loads(Scores, path.read_bytes(), str(path))
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read: {error.strerror}") from None


def _trained_on(found: Comparison, suite: Suite | None, seen: str | None, fold: int | None) -> set[str] | None:
    """Names of the seen datasets, None when nobody said."""
    if fold is not None:
        if suite is None or seen is not None:
            raise EvaluationError("compare: --fold needs --suite, and goes without --seen")
        return {d.name for d in suite.fold(fold)[0].datasets}
    if seen is None:
        return None
    names, known = {n.strip() for n in seen.split(",")}, {g.dataset for g in found.gains}
    if unknown := sorted(names - known):
        raise EvaluationError(f"compare: --seen {unknown[0]} was not measured, there is {', '.join(sorted(known))}")
    return names


def _parts(found: Comparison, suite: Suite | None, seen: set[str] | None) -> Iterator[tuple[str, Comparison]]:
    """The whole comparison and its parts; a part that no dataset is in is left out."""
    names = {g.dataset for g in found.gains}
    noisy = {d.name for d in suite.datasets if d.noisy} if suite else set()
    yield "all", found
    for title, datasets in (
        ("all but the noisy", names - noisy if noisy & names else set()),
        ("seen", names & seen if seen is not None else set()),
        ("unseen", names - seen if seen is not None else set()),
    ):
        if datasets:
            yield title, found.only(datasets)
