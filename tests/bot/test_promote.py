"""Whole iterations on two-layer models: what is promoted, refused, remembered and said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bot.iteration import Verdict
from bot.ledger import Refused
from hubfusion.errors import HubError
from hubfusion.hub import Change
from hubfusion.lineage import Reason, Revision
from hubfusion.release.provenance import _compare_manifest
from hubfusion.release.publish import current_release, manifest_at
from tests import bert_checkpoints
from tests.world import BASE, BOT, World


def test_sound_contributions_become_the_next_version(world: World) -> None:
    base = world.tensors()
    tuned = [bert_checkpoints.finetuned(base, seed) for seed in (1, 2, 3)]
    for user, tensors in zip(("alice", "bob", "carol"), tuned, strict=True):
        world.offer(f"{user}/model", tensors)
    result = world.iterate()
    assert (result.number, result.verdict, result.version) == (1, Verdict.PROMOTED, "v1")
    assert [c.author for c in result.contributions] == ["alice", "bob", "carol"]
    fused = world.tensors("v1")
    assert set(fused) == set(base)
    for name, value in fused.items():
        if value.dtype == np.float32:
            models = np.stack([base[name], *(t[f"bert.{name}"] for t in tuned)])
            exact = models[1:].astype(np.float64).mean(axis=0)
            assert np.all(np.abs(value - exact) <= np.spacing(np.abs(models).sum(axis=0)))
    hub = world.hub()
    release = current_release(hub, BASE)
    assert release.head == hub.tags(BASE)["v1"]
    assert next(hub.history(BASE)).title == "iteration 1: 3 contributions, average, mean gain +0.75, promoted"


def test_the_published_revision_says_what_is_in_it(world: World) -> None:
    for user in ("alice", "bob"):
        world.offer(f"{user}/model")
    result = world.iterate()
    hub = world.hub()
    manifest = manifest_at(hub, hub.resolve(BASE, "v1"))
    assert manifest is not None
    assert [each.revision for each in manifest.recipe.inputs] == [c.revision for c in result.contributions]
    assert [each.contribution for each in manifest.contributions] == list(result.contributions)
    assert manifest.base == Revision(BASE, hub.tags(BASE)["v0"])
    assert manifest.seen == ("news",)
    assert [f.sha256 for f in hub.files(hub.resolve(BASE, "v1")) if f.path == "model.safetensors"] == [
        manifest.weights[0].sha256
    ]
    card = hub.read(hub.resolve(BASE, "v1"), "README.md", stop=1 << 20).decode()
    assert "| news | seen | linear-probing | accuracy | 70.00 | 71.00 | +1.00 ± 0.00 |" in card
    assert "| mail | unseen | linear-probing | accuracy | 60.00 | 60.50 | +0.50 ± 0.00 |" in card
    assert "alice/model" in card and "license: apache-2.0" in card and "cold-fusion" in card


def test_the_same_command_again_finds_nothing_and_changes_nothing(world: World) -> None:
    for user in ("alice", "bob"):
        world.offer(f"{user}/model")
    world.offer(
        "mallory/nan", {n: np.full_like(t, np.nan) for n, t in bert_checkpoints.finetuned(world.tensors(), 9).items()}
    )
    world.iterate()
    before, titles = world.heads(), world.titles("alice/model") + world.titles("mallory/nan")
    result = world.iterate("again")
    assert result.verdict is Verdict.NOTHING_NEW
    assert world.heads() == before
    assert world.titles("alice/model") + world.titles("mallory/nan") == titles
    assert len(titles) == 2


def test_a_dry_run_plans_and_writes_nothing(world: World) -> None:
    for user in ("alice", "bob"):
        world.offer(f"{user}/model")
    before = world.heads()
    result = world.iterate(act=False)
    assert (result.verdict, result.version) == (Verdict.PLANNED, "v1")
    assert result.decision is not None and result.decision.mean_gain == pytest.approx(0.75)
    assert world.heads() == before
    assert world.titles("alice/model") == []


def test_two_iterations_follow_each_other_and_a_contribution_to_the_old_base_is_stale(world: World) -> None:
    for user in ("alice", "bob"):
        world.offer(f"{user}/one")
    world.iterate()
    for user in ("alice", "bob"):
        world.offer(f"{user}/two")
    world.offer("carol/late", version="v0")
    result = world.iterate()
    assert (result.number, result.version, result.verdict) == (2, "v2", Verdict.PROMOTED)
    assert [(r.author, r.reason) for r in result.rejected] == [("carol", Reason.STALE_BASE)]
    assert "v0" in result.rejected[0].detail and "v1" in result.rejected[0].detail
    assert sorted(world.hub().tags(BASE)) == ["v0", "v1", "v2"]


def test_each_bad_contribution_is_rejected_for_its_own_reason_and_told_once(world: World) -> None:
    base = world.tensors()
    good = bert_checkpoints.finetuned(base, 1)
    world.offer("alice/good", good)
    world.offer("bob/good")
    world.offer("mallory/copy", good)
    world.offer("mallory/unchanged", {f"bert.{n}": t for n, t in base.items() if t.dtype == np.float32})
    world.offer(
        "carol/shape", bert_checkpoints.finetuned(base, 4) | {"bert.pooler.dense.bias": np.zeros(17, np.float32)}
    )
    result = world.iterate()
    assert {r.revision.repo: r.reason for r in result.rejected} == {
        "mallory/copy": Reason.DUPLICATE,
        "mallory/unchanged": Reason.UNCHANGED,
        "carol/shape": Reason.ARCHITECTURE,
    }
    assert result.verdict is Verdict.PROMOTED
    for repo, reason in (("mallory/copy", "duplicate"), ("carol/shape", "architecture")):
        (title,) = world.titles(repo)
        assert title.startswith(f"Not fused into {BASE}: {reason} (commit ")
    (title,) = world.titles("alice/good")
    assert title.startswith(f"Part of {BASE} v1 (commit ")


def test_a_refused_candidate_leaves_main_untouched_and_is_remembered(world: World) -> None:
    world.gain = (1.0, -8.0)
    for user in ("alice", "bob"):
        world.offer(f"{user}/model")
    head = world.hub().resolve(BASE)
    result = world.iterate()
    assert result.verdict is Verdict.REFUSED
    assert world.hub().resolve(BASE) == head and list(world.hub().tags(BASE)) == ["v0"]
    (refused,) = [e for e in world.ledger().events if isinstance(e, Refused)]
    assert refused.objections == result.decision.objections  # type: ignore[union-attr]
    assert any(
        "mail by linear-probing loses 8.00 points (60.00 to 52.00), more than 3.00" in o for o in refused.objections
    )
    (title,) = world.titles("bob/model")
    assert "refused-by-gate" in title
    assert world.iterate("again").verdict is Verdict.NOTHING_NEW


def test_too_few_wait_and_are_taken_when_more_come(world: World) -> None:
    world.offer("alice/model")
    before = world.heads()
    assert world.iterate().verdict is Verdict.WAITING
    assert world.heads() == before
    world.offer("bob/model")
    assert [c.author for c in world.iterate().contributions] == ["alice", "bob"]


def test_a_new_commit_of_a_rejected_model_is_looked_at_again(world: World) -> None:
    world.offer("alice/model", {"bert.nothing": np.zeros(3, np.float32)})
    world.offer("bob/model")
    assert [r.revision.repo for r in world.iterate().rejected] == ["alice/model"]
    world.offer("alice/model")
    assert world.iterate().verdict is Verdict.PROMOTED


def test_an_iteration_leaves_no_weights_on_the_disk(world: World) -> None:
    for user in ("alice", "bob"):
        world.offer(f"{user}/model")
    world.iterate(act=False)
    assert list(Path(world.config.work).rglob("*.safetensors"))
    world.iterate()
    assert not list(Path(world.config.work).rglob("*.safetensors"))


def test_weights_on_main_that_no_version_covers_stop_the_bot(world: World) -> None:
    hub = world.hub(BOT)
    head = hub.resolve(BASE).sha
    hub.commit(
        BASE,
        Change("oops", head, "x", {"model.safetensors": bert_checkpoints.weights(bert_checkpoints.base_tensors(7))}),
    )
    with pytest.raises(HubError, match="main has other weights than v0; tag them as a version or revert them first"):
        world.iterate()


def test_a_corrected_card_on_main_does_not_make_contributions_stale(world: World) -> None:
    for user in ("alice", "bob"):
        world.offer(f"{user}/model")
    hub = world.hub(BOT)
    hub.commit(
        BASE, Change("fix a typo", hub.resolve(BASE).sha, "x", {"README.md": b"---\nlicense: apache-2.0\n---\n# x\n"})
    )
    assert world.iterate().verdict is Verdict.PROMOTED


def test_a_base_without_v0_is_one_line(world: World) -> None:
    from huggingface_hub import HfApi

    HfApi(endpoint=world.server.endpoint, token=f"hf_{BOT}").delete_tag(BASE, tag="v0")
    with pytest.raises(HubError, match="a base needs a tag v0 on its first revision, found no tag"):
        world.iterate()


def test_the_weight_space_report_is_in_the_release_and_one_changed_byte_of_it_is_found(world: World) -> None:
    world.offer(
        "mallory/nan", {n: np.full_like(t, np.nan) for n, t in bert_checkpoints.finetuned(world.tensors(), 9).items()}
    )
    for user in ("alice", "bob"):
        world.offer(f"{user}/model")
    world.iterate()
    hub = world.hub()
    release = hub.resolve(BASE, "v1")
    report = json.loads(hub.read(release, "soundness.json", stop=1 << 20))
    assert [m["author"] for m in report["measures"]] == ["alice", "bob"]
    assert [r["reason"] for r in report["rejected"]] == ["not-finite"]
    assert hub.read(release, "weight-space.svg", stop=1 << 20).startswith(b"<svg ")
    card = hub.read(release, "README.md", stop=1 << 20).decode()
    assert "[picture](weight-space.svg), [data](soundness.json)" in card
    manifest = manifest_at(hub, release)
    assert manifest is not None
    listed = {f.path: f for f in hub.files(release)}
    assert list(_compare_manifest(hub, release, "v1", manifest, listed)) == []
    listed["weight-space.svg"] = replace(listed["weight-space.svg"], blob="0" * 40)
    said = "weight-space.svg is not the one that fusion.json names"
    assert list(_compare_manifest(hub, release, "v1", manifest, listed)) == [said]


def test_contributions_are_compared_with_the_version_before_and_with_norms_accepted_before(world: World) -> None:
    """A finetune of v0 that says it is one of v1 is named; two thousandfold updates do not set their own norm."""
    first = world.tensors()
    for user in ("alice", "bob", "carol"):
        world.offer(f"{user}/one", bert_checkpoints.finetuned(first, world.offers, step=0.02))
    assert world.iterate().verdict is Verdict.PROMOTED
    second = world.tensors()
    world.offer("mallory/old", bert_checkpoints.finetuned(first, 20), version="v1")
    for user in ("alice", "bob"):
        world.offer(f"{user}/two", bert_checkpoints.finetuned(second, world.offers, step=0.02))
    world.config = replace(world.config, fuse=replace(world.config.fuse, clip=True))
    result = world.iterate(act=False)
    assert [(r.author, r.reason) for r in result.rejected] == [("mallory", Reason.WRONG_BASE)]
    assert "made from v0" in result.rejected[0].detail
    world.offer("alice/two", bert_checkpoints.finetuned(second, 30, step=0.02 / 100))
    world.offer("bob/two", bert_checkpoints.finetuned(second, 31, step=0.02 / 100))
    found = {r.revision.repo: r.reason for r in world.iterate("norms", act=False).rejected}
    assert found == {"mallory/old": Reason.WRONG_BASE, "alice/two": Reason.OUTLIER, "bob/two": Reason.OUTLIER}
