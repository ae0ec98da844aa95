"""The bot's own iteration, crawl to answers, with every hostile repository around six honest contributions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from bot import iteration
from bot.config import Config, Evaluating
from bot.iteration import Run, Verdict, run_iteration
from bot.ledger import Judged, read_ledger
from hubfusion.evaluate import units as evaluation
from hubfusion.evaluate.engines import local
from hubfusion.lineage import Finetune
from hubfusion.release.publish import manifest_at
from hubfusion.screen import Policy
from tests.bert_checkpoints import BASE, base_tensors, card, config, finetuned, publish_base, weights
from tests.fake_hub import FakeHub, finetune
from tests.hostile.cases import CASES, WEIGHTS
from tests.hostile.test_hostile import poisoned
from tests.world import SUITE, scores, work_here


def offer_all(hub: FakeHub) -> tuple[list[Finetune], dict[str, object]]:
    """Six honest finetunes and everybody else, as a crawl finds them; and the reason that each of the others gets."""
    base = publish_base(hub)
    found: list[Finetune] = []
    expected: dict[str, object] = {}

    def offer(repo: str, tensors: dict[str, np.ndarray], dataset: str) -> None:
        pushed = hub.add(repo, {"config.json": config(), WEIGHTS: weights(tensors)})
        found.append(finetune(hub, pushed, card(base.revision.sha, datasets=[dataset])))

    for seed in range(6):
        offer(f"ann{seed}/m", finetuned(base_tensors(), seed), f"org/d{seed}")
    for number, (reason, tensors) in enumerate(poisoned().values()):
        offer(f"eve{number}/m", tensors, "org/d0")
        expected[f"eve{number}/m"] = reason
    for number, case in enumerate(case for case in CASES.values() if case.policy == Policy()):
        found.append(case.push(hub, base, f"mallory{number}/m"))
        expected[f"mallory{number}/m"] = case.reason
    return found, expected


def test_the_iteration_around_them_promotes_the_honest_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub()
    found, expected = offer_all(hub)
    assert len(expected) > 120
    for repo in ("ledger", "ranking"):
        hub.add(f"ibm/{repo}", {"README.md": b""})
    (tmp_path / "suite.toml").write_text(SUITE)
    settings = Config(
        BASE,
        "ibm/ledger",
        "ibm/ranking",
        Evaluating(str(tmp_path / "suite.toml"), ("linear-probing",)),
        work=str(tmp_path / "work"),
        screen=Policy(max_per_dataset=50),
    )

    def crawl(reader: FakeHub, base: str, judged: frozenset[object]) -> tuple[Finetune, ...]:
        return tuple(each for each in found if each.revision not in judged)

    monkeypatch.setattr(iteration, "crawl", crawl)
    monkeypatch.setattr(iteration, "dispatch", work_here)
    monkeypatch.setattr(evaluation, "resolve", lambda dataset: "0" * 40)
    monkeypatch.setattr(local, "evaluate", lambda path, model, *rest, **more: scores(model, 70.0, 60.0))
    result = run_iteration(Run(settings, hub, hub, "nonce"), act=True)
    assert result.verdict is Verdict.PROMOTED
    assert {r.revision.repo: r.reason for r in result.rejected} == expected
    release = hub.resolve(BASE, "v2")
    manifest = manifest_at(hub, release)
    assert manifest is not None
    assert [i.revision.repo for i in manifest.recipe.inputs] == [f"ann{seed}/m" for seed in range(6)]
    # Honest norms are alike, so clipping to their median moves the mean by less than a tenth of an update.
    fused = load(hub.read(release, WEIGHTS, stop=1 << 24))
    honest = [finetuned(base_tensors(), seed) for seed in range(6)]
    for name in (n for n, value in base_tensors().items() if value.dtype == np.float32):
        mean = np.mean([tensors[f"bert.{name}"].astype(float) for tensors in honest], axis=0)
        np.testing.assert_allclose(fused[name], mean, atol=2e-5)
    judged = {e.finetune.repo: e.reason for e in read_ledger(hub, "ibm/ledger").events if isinstance(e, Judged)}
    assert judged == expected
    answered = [repo for repo, _, _ in hub.discussions]
    assert sorted(answered) == sorted([*expected, *(f"ann{seed}/m" for seed in range(6))])
    assert run_iteration(Run(settings, hub, hub, "again"), act=True).verdict is Verdict.NOTHING_NEW
    assert len(hub.discussions) == len(answered)
