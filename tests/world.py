"""A small world for whole iterations: an embedded Hub, a two-layer base, contributors, and the bot in this process.

Everything is real but the scores: a test says what each model scores (`tests/test_whole.py` has those real too).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from bot import iteration, worker
from bot.config import Config, Evaluating, Fusing
from bot.founding import found_base
from bot.iteration import Iteration, Run, run_iteration
from bot.job import CandidateJob, Outcome
from bot.ledger import Ledger, read_ledger
from hubfusion.contribute import Offer, offer_metadata, with_metadata
from hubfusion.evaluate import units as evaluation
from hubfusion.evaluate.engines import local
from hubfusion.evaluate.scores import Provenance, Score, Scores
from hubfusion.hub import Change, Hub, RepoKind, connect
from hubfusion.lineage import Revision
from hubfusion.localhub import LocalHub
from hubfusion.release.gate import Margins
from tests import bert_checkpoints

BASE, BOT = "ibm/base", "bot"
USERS = (BOT, "alice", "bob", "carol", "mallory")
SUITE = """
name = "tiny"
datasets = [{ name = "news", repo = "texts/news" }, { name = "mail", repo = "texts/mail" }]
"""


def scores(model: str, news: float, mail: float) -> Scores:
    """Scores of one protocol with two seeds."""
    provenance = Provenance({"linear-probing": "p"}, {"news": "n", "mail": "m"}, {}, "cpu")
    entries = tuple(
        Score(name, "linear-probing", "accuracy", (0, 1), (value - 0.5, value + 0.5), 100)
        for name, value in (("news", news), ("mail", mail))
    )
    return Scores(model, entries, provenance)


@dataclass
class World:
    """One base and its surroundings; ``gain`` is what every candidate gains on (news, mail), or says it of a folder."""

    server: LocalHub
    config: Config
    gain: tuple[float, float] | Callable[[Path], tuple[float, float]] = (1.0, 0.5)
    offers: int = 0
    evaluated: list[str] = field(default_factory=list)

    def hub(self, user: str | None = None) -> Hub:
        return connect(self.server.endpoint, f"hf_{user}" if user else None, tries=2)

    def tensors(self, version: str = "main") -> bert_checkpoints.Tensors:
        from safetensors.numpy import load

        hub = self.hub()
        revision = hub.resolve(BASE, version)
        return load(hub.read(revision, "model.safetensors", stop=1 << 24))

    def offer(
        self,
        repo: str,
        tensors: bert_checkpoints.Tensors | None = None,
        version: str | None = None,
        **files: bytes | None,
    ) -> Revision:
        """Push a finetune (of the newest version unless told) with the metadata of a contribution.

        ``files`` come on top of its own; None leaves one of these out.
        """
        hub = self.hub(repo.split("/")[0])
        hub.create(repo)
        self.offers += 1
        tags = hub.tags(BASE)
        version = version or max(tags, key=lambda name: int(name[1:]))
        if tensors is None:
            tensors = bert_checkpoints.finetuned(self.tensors(version), self.offers)
        offer = Offer(Revision(BASE, tags[version]), "apache-2.0", ("texts/news",), 600)
        card = with_metadata(f"# {repo}\n", offer_metadata(offer)).encode()
        own = {
            "config.json": bert_checkpoints.config(),
            "model.safetensors": bert_checkpoints.weights(tensors),
            "README.md": card,
        }
        head = hub.resolve(repo).sha
        content: dict[str, bytes | Path] = {n: data for n, data in (own | files).items() if data is not None}
        return Revision(repo, hub.commit(repo, Change("offer", head, f"{repo}-{self.offers}", content)))

    def run(self, nonce: str, poll: Callable[[], None] = lambda: None) -> Run:
        return Run(self.config, self.hub(BOT), self.hub(), nonce, poll)

    def iterate(self, nonce: str = "run", *, act: bool = True) -> Iteration:
        return run_iteration(self.run(f"{nonce}-{self.offers}"), act=act)

    def ledger(self) -> Ledger:
        return read_ledger(self.hub(), self.config.ledger)

    def heads(self) -> dict[str, str]:
        hub = self.hub()
        kinds = {BASE: RepoKind.MODEL, self.config.ledger: RepoKind.DATASET, self.config.ranking: RepoKind.DATASET}
        return {repo: hub.resolve(repo, kind=kind).sha for repo, kind in kinds.items()}

    def titles(self, repo: str) -> list[str]:
        """Titles of the discussions on a model."""
        from huggingface_hub import HfApi

        return [d.title for d in HfApi(endpoint=self.server.endpoint, token=False).get_repo_discussions(repo)]


def work_here(job: CandidateJob, work: Path, *rest: object) -> Outcome:
    """Do the job in this process, in place of `bot.dispatch.dispatch`."""
    folder = work / "job"
    folder.mkdir(parents=True, exist_ok=True)
    return worker.work(job, folder)


def make_world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretrained: Path | None = None, **options: object
) -> World:
    """Found a base, of two layers unless given; `dispatch` does its job in this process, with the world's scores."""
    (tmp_path / "suite.toml").write_text(SUITE)
    config = Config(
        base=BASE,
        ledger=f"{BASE}-ledger",
        ranking=f"{BASE}-ranking",
        evaluate=Evaluating(str(tmp_path / "suite.toml"), ("linear-probing",)),
        work=str(tmp_path / "work"),
        fuse=Fusing(clip=False),
        gate=Margins(mean=0.5, worst=3.0),
    )
    users = {user: f"hf_{user}" for user in USERS}
    server = LocalHub(tmp_path / "hub", users, {"ibm": [BOT]}, **options).start()  # type: ignore[arg-type]
    world = World(server, config)

    def evaluate(checkpoint: Path, model: str, *rest: object, **more: object) -> Scores:
        world.evaluated.append(model)
        fused = checkpoint.name in ("candidate", "trial", "left-out")
        gain = world.gain(checkpoint) if callable(world.gain) else world.gain
        news, mail = gain if fused else (0.0, 0.0)
        return scores(model, 70.0 + news, 60.0 + mail)

    monkeypatch.setattr(local, "evaluate", evaluate)
    monkeypatch.setattr(evaluation, "resolve", lambda dataset: "0" * 40)
    monkeypatch.setattr(iteration, "dispatch", work_here)
    pretrained = pretrained or bert_checkpoints.write_folder(
        tmp_path / "pretrained",
        {
            "config.json": bert_checkpoints.config(),
            "model.safetensors": bert_checkpoints.weights(bert_checkpoints.base_tensors()),
            "vocab.txt": b"a\nb\n",
        },
    )
    found_base(world.run("found"), pretrained, "apache-2.0", "en")
    return world


def offer_poison(world: World, poisoned: str, *others: str) -> list[bert_checkpoints.Tensors]:
    """Offer finetunes, and let the scores of every fused folder fall by how much of the poisoned one is in it."""
    base = world.tensors()
    offered = [bert_checkpoints.finetuned(base, seed) for seed, _ in enumerate((*others, poisoned))]
    for user, tensors in zip((*others, poisoned), offered, strict=True):
        world.offer(f"{user}/model", tensors)
    names = [n for n, t in base.items() if t.dtype == np.float32]
    tau = {n: offered[-1][f"bert.{n}"].astype(float) - base[n] for n in names}
    square = sum(float((t * t).sum()) for t in tau.values())

    def gain(folder: Path) -> tuple[float, float]:
        from safetensors.numpy import load_file

        fused = load_file(folder / "model.safetensors") if folder.name != "base" else base
        share = sum(float(((fused[n] - base[n]) * tau[n]).sum()) for n in names) / square
        return 1.0, 0.5 - 40 * share

    world.gain = gain
    return offered[:-1]
