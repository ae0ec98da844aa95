"""`hubfusion contribute` and `hubfusion tag`: the contributor's two commands."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hubfusion.cli.access import open_hub
from hubfusion.cli.app import app
from hubfusion.errors import FusionError

if TYPE_CHECKING:
    from hubfusion.hub import Hub

Base = Annotated[str, typer.Option("--base", help="The base's repository, e.g. ibm/ColD-Fusion.")]
License = Annotated[str, typer.Option("--license", help="License of your model, as the Hub names it.")]


def _hub() -> Hub:
    if not os.environ.get("HF_TOKEN"):
        raise FusionError("HF_TOKEN is not set: create a token that may write to your models and export it as HF_TOKEN")
    return open_hub()


@app.command()
def contribute(
    base: Base,
    dataset: Annotated[str, typer.Option("--dataset", help="Hub id of a classification dataset with train and test.")],
    repo: Annotated[str, typer.Option("--repo", help="Where your finetune goes, YOU/MODEL; made if it is not there.")],
    license: License,
    config: Annotated[str | None, typer.Option(help="Configuration (subset) of the dataset.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Text column; repeat it for pairs. [default: text]")] = None,
    label: Annotated[str, typer.Option(help="Label column.")] = "label",
    examples: Annotated[
        int | None, typer.Option(min=1, help="Train on this many, drawn by the seed; all if unset.")
    ] = None,
    test_examples: Annotated[
        int | None, typer.Option(min=1, help="Score on this many of a split; all if unset.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    learning_rate: Annotated[float, typer.Option()] = 5e-5,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens a text is cut to.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the draw, the order, the head and dropout.")] = 0,
    work: Annotated[Path, typer.Option(help="Folder for the base and the finetune.")] = Path("contribution"),
) -> None:
    """Finetune the current version of a base on your data and offer it to the next version.

    Example: hubfusion contribute --base ibm/ColD-Fusion --dataset me/reviews --repo me/model --license apache-2.0
    """
    from hubfusion.cli.progress import bar
    from hubfusion.contribute import FinetunePlan
    from hubfusion.contribute import contribute as offer
    from hubfusion.data.suite import Dataset
    from hubfusion.train import Training

    training = Training(
        learning_rate=learning_rate, batch_size=batch_size, epochs=epochs, max_length=max_length, seed=seed, warmup=0.06
    )
    name, columns = dataset.split("/")[-1], tuple(text or ["text"])
    source = Dataset(name, dataset, columns, label, config, validation_cap=test_examples, test_cap=test_examples)
    with bar("finetune") as tell:
        done = offer(
            _hub(),
            repo,
            base,
            FinetunePlan(source, training, license, examples),
            work,
            uuid.uuid4().hex,
            lambda event: tell(event.done, event.total),
        )
    tuned = done.finetuned
    print(
        f"{done.revision}: {tuned.examples} examples on {base} {done.version}, test {tuned.metric} {tuned.test:.2f}; "
        f"the bot will look at it in its next iteration"
    )


@app.command()
def tag(
    model: Annotated[str, typer.Argument(help="Your finetune on the Hub, YOU/MODEL.")],
    base: Base,
    license: License,
    revision: Annotated[str, typer.Option(help="Version (v7) or commit of the base that you finetuned.")],
    dataset: Annotated[
        list[str] | None, typer.Option(help="Hub id of a dataset it was trained on; repeat for more.")
    ] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Number of training examples.")] = None,
) -> None:
    """Offer a finetune that is on the Hub already: adds the metadata to its card and touches nothing else.

    Example: hubfusion tag me/reviews-model --base ibm/ColD-Fusion --revision v7 --license apache-2.0
    """
    from hubfusion.contribute import Offer
    from hubfusion.contribute import tag as add

    hub = _hub()
    offer = Offer(hub.resolve(base, revision), license, tuple(dataset or ()), examples)
    sha = add(hub, model, offer, uuid.uuid4().hex)
    print(f"{model}@{sha[:12]} is offered to {base} as a finetune of {revision}")
