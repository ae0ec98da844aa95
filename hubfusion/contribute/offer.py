"""The contributor's side: finetune the current base, tag the result, push it.

A contribution is an ordinary finetune on the Hub. What makes it one is metadata in its card: the tag, the base with the
relation ``finetune``, the license, the datasets, and under ``cold_fusion`` the exact base revision it started from.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubfusion.data.loading import draw, load
from hubfusion.data.suite import Dataset
from hubfusion.errors import FusionError, NotFound
from hubfusion.hub import Change, Hub
from hubfusion.hub.cards import TAG, front_matter
from hubfusion.lineage import Revision
from hubfusion.release.card import merge_metadata, render
from hubfusion.release.publish import WEIGHTS, Release, current_release, fetch_release
from hubfusion.train import Training

if TYPE_CHECKING:
    from hubfusion.train.finetune import TrainedModel, TrainingProgress

    OnProgress = Callable[[TrainingProgress], None]

log = logging.getLogger(__name__)

MAX_README_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Offer:
    """What a contribution declares about itself; ``examples`` counts the training examples that were used."""

    base: Revision
    license: str
    datasets: tuple[str, ...] = ()
    examples: int | None = None
    dataset_revisions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FinetunePlan:
    """What to finetune on and how; ``examples`` are drawn by the training's seed, None takes all."""

    dataset: Dataset
    training: Training
    license: str
    examples: int | None = None


def offer_metadata(offer: Offer) -> dict[str, Any]:
    """The card metadata of a contribution, as `hubfusion.screen.rules` reads it."""
    declared: dict[str, Any] = {"base_revision": offer.base.sha}
    if offer.examples is not None:
        declared["examples"] = offer.examples
    if offer.dataset_revisions:
        declared["dataset_revisions"] = dict(offer.dataset_revisions)
    metadata: dict[str, Any] = {
        "license": offer.license,
        "base_model": offer.base.repo,
        "base_model_relation": "finetune",
        "tags": [TAG],
        "cold_fusion": declared,
    }
    return metadata | ({"datasets": list(offer.datasets)} if offer.datasets else {})


def with_metadata(readme: str, metadata: Mapping[str, Any]) -> str:
    """``readme`` with ``metadata`` merged into its front matter, the text below left as it is.

    Raises `FusionError` when there is a front matter that cannot be read: it would be lost.

    >>> print(with_metadata("---\\nlanguage: en\\n---\\n# Mine\\n", {"license": "mit"}))
    ---
    language: en
    license: mit
    ---
    # Mine
    <BLANKLINE>
    """
    import yaml

    old, body = front_matter(readme), readme
    if readme.lstrip("\ufeff").startswith("---"):
        if not old:
            raise FusionError("README.md: the metadata between its '---' lines cannot be read; correct it first")
        body = readme.split("---", 2)[2].lstrip("\r\n")
    matter = yaml.safe_dump(merge_metadata(old, metadata), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{matter}---\n{body}"


def tag(hub: Hub, repo: str, offer: Offer, nonce: str) -> str:
    """Add an offer's metadata to a finetune that is on the Hub already; returns the new commit's sha.

    Its own license and datasets stay unless the offer names others.
    """
    head = hub.resolve(repo)
    try:
        readme = hub.read(head, "README.md", stop=MAX_README_BYTES).decode("utf-8")
    except NotFound:
        readme = f"# {repo}\n"
    text = with_metadata(readme, offer_metadata(offer))
    if text == readme:
        return head.sha
    return hub.commit(
        repo, Change(f"Offer this model to {offer.base.repo}", head.sha, nonce, {"README.md": text.encode()})
    )


@dataclass(frozen=True, slots=True)
class PushedContribution:
    """A contribution on the Hub: its commit, the version it started from, and how the finetune went."""

    revision: Revision
    version: str
    finetuned: TrainedModel


def contribute(
    hub: Hub, repo: str, base: str, plan: FinetunePlan, work: Path, nonce: str, on_progress: OnProgress | None = None
) -> PushedContribution:
    """Finetune the current version of ``base`` as ``plan`` says and push the result to ``repo`` with its metadata.

    ``work`` keeps the base between runs; a finetune of an earlier run in it is replaced. Raises `FusionError` before
    anything is trained when the base, the dataset or the right to write to ``repo`` is missing.
    """
    from hubfusion.train.finetune import finetune

    hub.create(repo)
    release = current_release(hub, base)
    folder = fetch_release(hub, release, work / "base")
    data = load(plan.dataset)
    if plan.examples is not None:
        data = replace(data, train=data.train.take(draw(data.train, plan.training.seed, plan.examples)))
    log.info("contribute: %d examples of %s on %s %s", len(data.train), plan.dataset.repo, base, release.version)
    shutil.rmtree(work / "model", ignore_errors=True)
    tuned = finetune(folder, data, plan.training, work / "model", on_progress)
    revisions = {plan.dataset.repo: data.sha}
    offer = Offer(release.revision, plan.license, (plan.dataset.repo,), tuned.examples, revisions)
    head = hub.resolve(repo)
    files: dict[str, bytes | Path] = {path.name: path for path in sorted(tuned.folder.iterdir())}
    files["README.md"] = _card(hub, repo, release, offer, plan, (tuned, len(data.test))).encode()
    stale = [f.path for f in hub.files(head) if WEIGHTS.fullmatch(f.path) and f.path not in files]
    sha = hub.commit(repo, Change(f"Finetune {base} {release.version}", head.sha, nonce, files, stale))
    return PushedContribution(Revision(repo, sha), release.version, tuned)


def _card(
    hub: Hub, repo: str, release: Release, offer: Offer, plan: FinetunePlan, done: tuple[TrainedModel, int]
) -> str:
    """The contribution's card; the scores are also in its metadata, as a model-index."""
    tuned, test_examples = done
    value = round(tuned.test, 4)
    result = {
        "task": {"type": "text-classification"},
        "dataset": {"type": plan.dataset.repo, "name": plan.dataset.repo, "split": plan.dataset.test},
        "metrics": [{"type": str(tuned.metric), "value": value}],
    }
    metadata = offer_metadata(offer) | {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "metrics": [str(tuned.metric)],
        "model-index": [{"name": repo.split("/")[1], "results": [result]}],
    }
    t = plan.training
    return render(
        "contribution.md.j2",
        metadata,
        repo=repo,
        base=offer.base.repo,
        base_version=release.version,
        base_sha=offer.base.sha,
        dataset=plan.dataset.repo,
        dataset_sha=offer.dataset_revisions[plan.dataset.repo],
        examples=tuned.examples,
        seed=t.seed,
        metric=tuned.metric,
        split=plan.dataset.test,
        test_examples=test_examples,
        score=tuned.test,
        training=f"AdamW, learning rate {t.learning_rate:g}, batches of {t.batch_size}, {t.epochs} epochs, "
        f"at most {t.max_length} tokens, {tuned.steps} steps",
        endpoint=hub.endpoint,
    )
