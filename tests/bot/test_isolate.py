"""Whose contribution the gate objects to, what each one adds, and what the trigger scan finds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bot.iteration import Verdict
from bot.ledger import Promoted, Refused
from hubfusion.lineage import Reason
from hubfusion.release.publish import manifest_at
from hubfusion.release.scan import Scan
from tests.world import BASE, World, offer_poison


def test_the_contribution_that_the_gate_objects_to_is_isolated_and_the_rest_promoted(world: World) -> None:
    models = offer_poison(world, "mallory", "alice", "bob", "carol")
    result = world.iterate()
    assert result.verdict is Verdict.PROMOTED
    assert [c.author for c in result.contributions] == ["alice", "bob", "carol"]
    (rejected,) = result.rejected
    assert (rejected.author, rejected.reason) == ("mallory", Reason.HARMFUL)
    assert rejected.detail.startswith(
        "the gate accepts 3 others without it and refuses them with it: The mean gain of -4."
    )
    assert "mail by linear-probing loses" in rejected.detail
    hub = world.hub()
    manifest = manifest_at(hub, hub.resolve(BASE, "v1"))
    assert manifest is not None and manifest.decision == result.decision
    assert [each.revision.repo for each in manifest.recipe.inputs] == ["alice/model", "bob/model", "carol/model"]
    tried = [([r.repo.split("/")[0] for r in t.inputs], t.decision.promote) for t in manifest.trials]
    assert tried == [(["alice", "bob"], True), (["alice", "bob", "carol"], True)]
    exact = np.mean([m["bert.pooler.dense.weight"].astype(float) for m in models], axis=0)
    np.testing.assert_allclose(world.tensors("v1")["pooler.dense.weight"], exact, atol=1e-7)
    (title,) = world.titles("mallory/model")
    assert title.startswith(f"Not fused into {BASE}: harmful (commit ")
    assert world.iterate("again").verdict is Verdict.NOTHING_NEW


def test_a_rest_too_small_waits_without_the_harmful_one(world: World) -> None:
    offer_poison(world, "mallory", "alice")
    result = world.iterate()
    assert result.verdict is Verdict.WAITING
    assert [c.author for c in result.contributions] == ["alice"]
    assert [(r.author, r.reason) for r in result.rejected] == [("mallory", Reason.HARMFUL)]
    world.offer("bob/model")
    assert [c.author for c in world.iterate().contributions] == ["alice", "bob"]


def test_without_isolation_or_without_a_culprit_the_whole_candidate_is_refused(world: World) -> None:
    offer_poison(world, "mallory", "alice", "bob")
    world.config = replace(world.config, fuse=replace(world.config.fuse, isolate=0))
    assert world.iterate(act=False).verdict is Verdict.REFUSED
    world.config = replace(world.config, fuse=replace(world.config.fuse, isolate=8))
    world.gain = (0.0, -8.0)
    result = world.iterate()
    assert (result.verdict, len(result.trials)) == (Verdict.REFUSED, 4)
    (refused,) = [e for e in world.ledger().events if isinstance(e, Refused)]
    assert refused.trials == result.trials and not any(t.decision.promote for t in refused.trials)


def test_leaving_each_out_is_measured_published_and_told(world: World) -> None:
    """Scores fall by 40 points a whole share of mallory's update: she takes 10 away, each other's absence 3.3 more."""
    offer_poison(world, "mallory", "alice", "bob", "carol")
    suite = replace(world.config.evaluate, seeds=(0,))
    margins = replace(world.config.gate, mean=50, worst=100)
    world.config = replace(world.config, leave_one_out=suite, gate=margins)
    result = world.iterate()
    assert result.verdict is Verdict.PROMOTED
    # Mean over news and mail: half of what mail loses; sketches of shares are not exact, the updates not orthogonal.
    gains = {revision.repo.split("/")[0]: gain for revision, gain in result.leave_one_out_gains.items()}
    assert gains == pytest.approx({"alice": 1.67, "bob": 1.67, "carol": 1.67, "mallory": -5}, abs=0.5)
    hub = world.hub()
    release = hub.resolve(BASE, "v1")
    manifest = manifest_at(hub, release)
    assert manifest is not None
    assert {each.revision: each.leave_one_out_gain for each in manifest.contributions} == result.leave_one_out_gains
    card = hub.read(release, "README.md", stop=1 << 20).decode()
    assert f"| 1.00 | {gains['mallory']:+.2f} |" in card and "| coefficient | leave-one-out gain |" in card
    (promoted,) = [e for e in world.ledger().events if isinstance(e, Promoted)]
    assert {each.finetune: each.leave_one_out_gain for each in promoted.contributions} == result.leave_one_out_gains


def test_leaving_one_out_first_makes_isolation_one_trial(world: World) -> None:
    offer_poison(world, "mallory", "alice", "bob", "carol")
    world.config = replace(world.config, leave_one_out=replace(world.config.evaluate, seeds=(0,)))
    result = world.iterate()
    assert [(r.author, r.reason) for r in result.rejected] == [("mallory", Reason.HARMFUL)]
    assert [len(t.inputs) for t in result.trials] == [3]


def test_a_finding_of_the_trigger_scan_is_an_objection_and_its_cause_is_isolated(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hubfusion.release import triggers

    offer_poison(world, "mallory", "alice", "bob", "carol")
    gain = world.gain
    assert callable(gain)
    world.gain = (1.0, 0.5)  # accuracy shows nothing

    def scan(candidate: Path, base: Path, suite: object, settings: Scan) -> tuple[str, ...]:
        return ("Trigger scan on news: x.",) * (gain(candidate)[1] < -5)

    monkeypatch.setattr(triggers, "scan", scan)
    assert world.iterate(act=False).verdict is Verdict.PLANNED
    world.config = replace(world.config, triggers=Scan())
    result = world.iterate()
    assert result.verdict is Verdict.PROMOTED
    (rejected,) = result.rejected
    assert (rejected.author, rejected.reason) == ("mallory", Reason.HARMFUL)
    assert rejected.detail.endswith("refuses them with it: Trigger scan on news: x.")


def test_no_trial_is_begun_that_would_end_after_the_deadline(world: World) -> None:
    offer_poison(world, "mallory", "alice", "bob")
    world.config = replace(world.config, deadline_minutes=0.0)
    result = world.iterate()
    assert (result.verdict, result.trials) == (Verdict.REFUSED, ())
    assert len(result.contributions) == 3
