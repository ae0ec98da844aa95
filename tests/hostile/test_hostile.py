"""Each hostile repository is refused for exactly its reason, quickly, within 100 kB, and harms nobody else."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from hubfusion.fuse import fuse
from hubfusion.lineage import Contribution, Input, Reason, Recipe, Rejected
from hubfusion.screen import Policy, apply_caps, examine, screen
from tests.bert_checkpoints import Tensors, base_tensors, card, config, finetuned, publish_base, weights
from tests.fake_hub import FakeHub, finetune
from tests.hostile.cases import CASES, WEIGHTS, WORDS


@pytest.mark.parametrize("name", CASES)
def test_screening_refuses(name: str) -> None:
    case = CASES[name]
    hub = FakeHub()
    base = publish_base(hub)
    found = case.push(hub, base, "eve/model")
    hub.traffic = 0
    tracemalloc.start()
    begin = time.process_time()
    verdict = screen(hub, found, base, case.policy)
    seconds, memory = time.process_time() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(verdict, Rejected), verdict
    assert verdict.reason is case.reason, verdict
    assert case.says in verdict.detail, verdict
    assert verdict.detail.isascii() and verdict.detail.isprintable() and len(verdict.detail) < 400, verdict
    assert hub.traffic < 100_000
    assert seconds < 1 and memory < 16 << 20


def test_there_are_more_than_eighty_and_every_screening_reason_is_among_them() -> None:
    assert len(CASES) >= 120
    only_weights_tell = {
        Reason.CORRUPT, Reason.NOT_FINITE, Reason.UNCHANGED, Reason.BUFFERS, Reason.DUPLICATE, Reason.INVERSE,
        Reason.WRONG_BASE, Reason.OUTLIER, Reason.CONCENTRATED, Reason.HARMFUL, Reason.REFUSED,
    }  # fmt: skip
    elsewhere = {Reason.STALE_BASE, Reason.GONE, Reason.CAP, Reason.FLAGGED}  # tests/test_screen.py
    assert {case.reason for case in CASES.values()} == set(Reason) - only_weights_tell - elsewhere


def test_the_untouched_push_that_all_cases_start_from_is_accepted() -> None:
    hub = FakeHub()
    base = publish_base(hub)
    pushed = hub.add("ann/m", {"config.json": config(), WEIGHTS: weights(finetuned(base_tensors(), 1))})
    assert isinstance(screen(hub, finetune(hub, pushed, card(base.revision.sha)), base, Policy()), Contribution)


def poisoned() -> dict[str, tuple[Reason, Tensors]]:
    """Well-formed files whose weights must not be fused; user 0, whose update is seed 0, is honest."""
    base, honest = finetuned(base_tensors(), 0, step=0.0), finetuned(base_tensors(), 0)

    def scaled(seed: int, factor: float) -> Tensors:
        return {
            k: (base[k] + factor * (v - base[k])).astype(np.float32) for k, v in finetuned(base_tensors(), seed).items()
        }

    def edited(name: str, where: Any, value: float) -> Tensors:
        tensors = {k: v.copy() for k, v in finetuned(base_tensors(), 50).items()}
        tensors[name][where] = value
        return tensors

    noise = np.random.default_rng(1)
    return {
        "one NaN": (Reason.NOT_FINITE, edited(WORDS, (7, 7), float("nan"))),
        "one infinity": (Reason.NOT_FINITE, edited(WORDS, (7, 7), float("inf"))),
        "all NaN": (Reason.NOT_FINITE, edited(WORDS, slice(None), float("nan"))),
        "a flipped exponent bit": (Reason.OUTLIER, edited(WORDS, (7, 7), 1e30)),
        "one planted entry": (Reason.CONCENTRATED, edited(WORDS, (7, 7), 3.0)),
        "the base again": (Reason.UNCHANGED, {k: v for k, v in base.items() if not k.startswith("classifier")}),
        "the base with a new head": (Reason.UNCHANGED, base),
        "a copy": (Reason.DUPLICATE, honest),
        "a copy with noise": (
            Reason.DUPLICATE,
            {k: (v + noise.normal(0, 5e-4, v.shape)).astype(np.float32) for k, v in honest.items()},
        ),
        "a copy three times as long": (Reason.DUPLICATE, scaled(0, 3)),
        "the opposite": (Reason.INVERSE, scaled(0, -1)),
        "the opposite eight times as long": (Reason.INVERSE, scaled(0, -8)),
        "a hundredfold update": (Reason.OUTLIER, scaled(51, 100)),
        "another pretraining run": (Reason.WRONG_BASE, finetuned(base_tensors(seed=3), 52)),
        "zeros": (Reason.OUTLIER, {k: v * 0 for k, v in base.items()}),
        "shifted positions": (
            Reason.BUFFERS,
            finetuned(base_tensors(), 53) | {"bert.embeddings.position_ids": np.ones((1, 20), np.int64)},
        ),
    }


def test_an_iteration_with_all_of_them_keeps_just_the_honest(tmp_path: Path) -> None:
    hub = FakeHub()
    base = publish_base(hub)
    honest, expected = set(), {}
    finetunes = []
    for seed in range(6):
        pushed = hub.add(f"ann{seed}/m", {"config.json": config(), WEIGHTS: weights(finetuned(base_tensors(), seed))})
        honest.add(pushed.repo)
        finetunes.append(finetune(hub, pushed, card(base.revision.sha, datasets=[f"org/d{seed}"])))
    for number, (name, (reason, tensors)) in enumerate(poisoned().items()):
        pushed = hub.add(f"eve{number}/m", {"config.json": config(), WEIGHTS: weights(tensors)})
        expected[pushed.repo] = (name, reason)
        finetunes.append(finetune(hub, pushed, card(base.revision.sha, datasets=["org/d0"])))
    plain = [(name, case) for name, case in CASES.items() if case.policy == Policy()]
    for number, (name, case) in enumerate(plain):
        found = case.push(hub, base, f"mallory{number}/m")
        expected[found.revision.repo] = (name, case.reason)
        finetunes.append(found)
    policy = Policy(max_per_dataset=50)
    verdicts = [screen(hub, found, base, policy) for found in finetunes]
    kept, capped = apply_caps([v for v in verdicts if isinstance(v, Contribution)], policy)
    folder = tmp_path / "base"
    hub.download(base.revision, hub.files(base.revision)[2], folder / WEIGHTS)
    paths = []
    for number, contribution in enumerate(kept):
        for file in contribution.files:
            hub.download(contribution.revision, file, tmp_path / str(number) / file.path)
        paths.append((contribution, tmp_path / str(number)))
    report = examine(folder, paths, tag=base.tag)
    rejected = [v for v in verdicts if isinstance(v, Rejected)] + list(capped) + list(report.rejected)
    assert {r.revision.repo: r.reason for r in rejected} == {repo: reason for repo, (_, reason) in expected.items()}
    assert {r.repo for r in report.accepted} == honest
    inputs = [path for contribution, path in paths if contribution.revision in report.accepted]
    recipe = Recipe(base.revision.pinned, tuple(Input(revision.pinned) for revision in report.accepted))
    fuse(recipe, folder, inputs, tmp_path / "fused")
    fused = load_file(tmp_path / "fused" / WEIGHTS)
    made = [finetuned(base_tensors(), seed) for seed in range(6)]
    for name in (n for n, value in base_tensors().items() if value.dtype == np.float32):
        mean = np.mean([tensors[f"bert.{name}"].astype(float) for tensors in made], axis=0)
        np.testing.assert_allclose(fused[name], mean, rtol=1e-6, atol=1e-8)
