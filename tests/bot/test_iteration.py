"""Whole iterations on two-layer models: what is promoted, refused, remembered and said, and what a crash leaves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bot.iteration import Verdict, run_iteration
from bot.ledger import Judged, Promoted, Refused, Said
from hubfusion.errors import Conflict, FusionError, HubError
from hubfusion.hub import RepoKind
from hubfusion.lineage import Reason, Revision
from hubfusion.localhub import LOST, Fault, FaultRequest
from hubfusion.release.publish import current_release, manifest_at
from tests import bert_checkpoints
from tests.hub.test_client import Faults
from tests.world import BASE, BOT, World, make_world


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: Faults) -> Iterator[World]:
    monkeypatch.setattr("hubfusion.hub.client.time.sleep", lambda seconds: None)
    made = make_world(tmp_path, monkeypatch, faults=faults)
    yield made
    made.server.stop()


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


def test_two_bots_at_once_one_publishes_and_the_other_says_that_it_lost(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for user in ("alice", "bob"):
        world.offer(f"{user}/model")
    from bot import iteration

    original = iteration.promote_or_refuse

    def other_bot_first(*arguments):  # type: ignore[no-untyped-def]
        monkeypatch.setattr(iteration, "promote_or_refuse", original)
        assert world.iterate("fast").verdict is Verdict.PROMOTED
        return original(*arguments)

    monkeypatch.setattr(iteration, "promote_or_refuse", other_bot_first)
    assert world.iterate("slow").verdict is Verdict.LOST_RACE
    assert sorted(world.hub().tags(BASE)) == ["v0", "v1"]
    assert [e.version for e in world.ledger().events if isinstance(e, Promoted)] == ["v1"]
    assert len(world.titles("alice/model")) == 1


def test_a_release_whose_answer_was_lost_is_published_once(world: World, faults: Faults) -> None:
    for user in ("alice", "bob"):
        world.offer(f"{user}/model")
    fired: list[str] = []

    def rule(request: FaultRequest) -> Fault | None:
        if request.method == "POST" and request.path == f"/api/models/{BASE}/commit/main" and not fired:
            fired.append(request.path)
            return LOST
        return None

    faults.rule = rule
    assert world.iterate().verdict is Verdict.PROMOTED
    assert fired
    assert [c.title.split(":")[0] for c in world.hub().history(BASE)].count("iteration 1") == 1


WRITES = [
    (f"/api/datasets/{BASE}-ledger/commit/main", 0),
    (f"/api/models/{BASE}/commit/main", 0),
    (f"/api/models/{BASE}/tag/", 0),
    (f"/api/datasets/{BASE}-ledger/commit/main", 1),
    (f"/api/datasets/{BASE}-ranking/commit/main", 0),
    ("/api/models/alice/model/discussions", 0),
    ("/api/models/mallory/nan/discussions", 0),
    (f"/api/datasets/{BASE}-ledger/commit/main", 2),
]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(("write", "nth"), WRITES)
def test_a_crash_at_any_write_is_made_good_by_the_next_run(
    world: World, faults: Faults, write: str, nth: int, before: bool
) -> None:
    """Kill the bot just before or just after each of its writes; one more run ends where an uncrashed run ends."""

    class Killed(BaseException):
        pass

    for user in ("alice", "bob"):
        world.offer(f"{user}/model")
    world.offer(
        "mallory/nan", {n: np.full_like(t, np.nan) for n, t in bert_checkpoints.finetuned(world.tensors(), 9).items()}
    )
    seen = 0

    def rule(request: FaultRequest) -> Fault | None:
        nonlocal seen
        if request.method == "POST" and request.path.startswith(write):
            seen += 1
            if seen == nth + 1:
                return Fault(status=418) if before else Fault(land=True, status=418)
        return None

    from hubfusion.hub import client as hub_client

    original = hub_client._status

    def dying(error: Exception) -> int | None:
        status = original(error)
        if status == 418:
            raise Killed
        return status

    faults.rule = rule
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_client, "_status", dying)
        patch.setattr(hub_client.HubClient, "_landed", lambda *arguments: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            world.iterate("killed")
    faults.rule = lambda request: None
    world.iterate("next")
    hub = world.hub()
    assert sorted(hub.tags(BASE)) == ["v0", "v1"]
    assert [c.title.split(":")[0] for c in hub.history(BASE)].count("iteration 1") == 1
    ledger = world.ledger()
    assert [e.sha for e in ledger.events if isinstance(e, Promoted)] == [hub.tags(BASE)["v1"]]
    assert [e.reason for e in ledger.events if isinstance(e, Judged)] == [Reason.NOT_FINITE]
    assert len({e.finetune for e in ledger.events if isinstance(e, Said)}) == 3
    assert [len(world.titles(repo)) for repo in ("alice/model", "bob/model", "mallory/nan")] == [1, 1, 1]
    from hubfusion.release.ranking import read_rows

    rows = read_rows(hub, hub.resolve(world.config.ranking, kind=RepoKind.DATASET))
    assert [r["version"] for r in rows] == ["v0", "v0", "v1", "v1"]
    settled = world.heads()
    assert world.iterate("settled").verdict is Verdict.NOTHING_NEW
    assert world.heads() == settled


def test_an_iteration_leaves_no_weights_on_the_disk(world: World) -> None:
    for user in ("alice", "bob"):
        world.offer(f"{user}/model")
    world.iterate(act=False)
    assert list(Path(world.config.work).rglob("*.safetensors"))
    world.iterate()
    assert not list(Path(world.config.work).rglob("*.safetensors"))


def test_weights_on_main_that_no_version_covers_stop_the_bot(world: World) -> None:
    from hubfusion.hub import Change

    hub = world.hub(BOT)
    head = hub.resolve(BASE).sha
    hub.commit(
        BASE,
        Change("oops", head, "x", {"model.safetensors": bert_checkpoints.weights(bert_checkpoints.base_tensors(7))}),
    )
    with pytest.raises(HubError, match="main has other weights than v0; tag them as a version or revert them first"):
        world.iterate()


def test_a_corrected_card_on_main_does_not_make_contributions_stale(world: World) -> None:
    from hubfusion.hub import Change

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


def test_a_model_that_vanishes_between_crawl_and_download_is_left_out(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    from bot import iteration

    for user in ("alice", "bob", "carol"):
        world.offer(f"{user}/model")
    original = iteration.judge

    def judge(*arguments):  # type: ignore[no-untyped-def]
        judged = original(*arguments)
        HfApi(endpoint=world.server.endpoint, token="hf_carol").delete_repo("carol/model")
        return judged

    monkeypatch.setattr(iteration, "judge", judge)
    assert [c.author for c in world.iterate().contributions] == ["alice", "bob"]


def test_a_stop_is_honored_between_two_steps(world: World) -> None:
    class Stop(FusionError):
        pass

    world.offer("alice/model")
    world.offer("bob/model")
    before = world.heads()
    calls = 0

    def poll() -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Stop("stop")

    with pytest.raises(Stop):
        run_iteration(world.run("stopped", poll), act=True)
    assert world.heads() == before
    assert world.iterate().verdict is Verdict.PROMOTED


def test_a_ledger_appended_to_by_two_loses_nothing(world: World) -> None:
    from bot.ledger import append

    hub, repo = world.hub(BOT), world.config.ledger
    events = [Said(Revision(f"alice/m{n}", "a" * 40), n) for n in range(4)]
    append(hub, repo, events[:2], nonce="a", title="a")
    original, raced = hub.commit, []

    def raced_commit(*arguments, **more):  # type: ignore[no-untyped-def]
        if not raced:
            raced.append(1)
            append(world.hub(BOT), repo, [events[2]], nonce="b", title="b")
        return original(*arguments, **more)

    hub.commit = raced_commit  # type: ignore[method-assign]
    append(hub, repo, [events[1], events[3]], nonce="c", title="c")
    assert world.ledger().events == (events[0], events[1], events[2], events[3])


def test_a_lost_race_is_a_conflict_even_if_the_winner_has_the_same_weights(world: World) -> None:
    from hubfusion.hub import Change

    hub = world.hub(BOT)
    head = hub.resolve(BASE).sha
    hub.commit(BASE, Change("one", head, "n1", {"fusion.json": b"1"}))
    with pytest.raises(Conflict):
        hub.commit(BASE, Change("two", head, "n2", {"fusion.json": b"2"}))


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
    from dataclasses import replace

    offer_poison(world, "mallory", "alice", "bob")
    world.config = replace(world.config, fuse=replace(world.config.fuse, isolate=0))
    assert world.iterate(act=False).verdict is Verdict.REFUSED
    world.config = replace(world.config, fuse=replace(world.config.fuse, isolate=8))
    world.gain = (0.0, -8.0)
    result = world.iterate()
    assert (result.verdict, len(result.trials)) == (Verdict.REFUSED, 4)
    (refused,) = [e for e in world.ledger().events if isinstance(e, Refused)]
    assert refused.trials == result.trials and not any(t.decision.promote for t in refused.trials)


def test_a_worker_killed_between_two_trials_goes_on_to_the_same_end(world: World) -> None:
    from hubfusion.evaluate.engines import local

    class Killed(BaseException):
        pass

    offer_poison(world, "mallory", "alice", "bob", "carol")
    original, calls = local.evaluate, 0

    def dying(*arguments, **more):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Killed
        return original(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "evaluate", dying)
        with pytest.raises(Killed):
            world.iterate("killed")
    result = world.iterate("next")
    assert (result.verdict, [r.author for r in result.rejected]) == (Verdict.PROMOTED, ["mallory"])


def test_leaving_each_out_is_measured_published_and_told(world: World) -> None:
    """Scores fall by 40 points a whole share of mallory's update: she takes 10 away, each other's absence 3.3 more."""
    from dataclasses import replace

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
    from dataclasses import replace

    offer_poison(world, "mallory", "alice", "bob", "carol")
    world.config = replace(world.config, leave_one_out=replace(world.config.evaluate, seeds=(0,)))
    result = world.iterate()
    assert [(r.author, r.reason) for r in result.rejected] == [("mallory", Reason.HARMFUL)]
    assert [len(t.inputs) for t in result.trials] == [3]


def test_the_weight_space_report_is_in_the_release_and_one_changed_byte_of_it_is_found(world: World) -> None:
    import json
    from dataclasses import replace

    from hubfusion.release.provenance import _compare_manifest

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
    from dataclasses import replace

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


def test_a_release_is_signed_with_the_key_and_a_later_unsigned_one_carries_no_old_signature(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from dataclasses import replace

    from hubfusion.release.provenance import verify
    from tests.published import make_keys

    private, public = make_keys(tmp_path)
    for user in ("alice", "bob"):
        world.offer(f"{user}/one")
    with caplog.at_level("DEBUG"):
        result = run_iteration(replace(world.run("signed"), signer=private), act=True)
    assert result.verdict is Verdict.PROMOTED and "publish: signed" in caplog.text
    assert not [line for line in private.read_text().splitlines()[1:-1] if line in caplog.text]
    hub = world.hub()
    assert verify(hub, BASE, "v1", tmp_path / "a", signed_by=public).differences == ()
    _, other = make_keys(tmp_path / "other")
    (said,) = verify(hub, BASE, "v1", tmp_path / "b", signed_by=other).differences
    assert said.startswith("model.sig does not hold")
    for user in ("alice", "bob"):
        world.offer(f"{user}/two")
    assert world.iterate("unsigned").verdict is Verdict.PROMOTED
    assert "model.sig" not in [f.path for f in hub.files(hub.resolve(BASE, "v2"))]
    assert verify(hub, BASE, "v2", tmp_path / "c", signed_by=public).differences == (f"{BASE} v2 is not signed",)


def test_a_finding_of_the_trigger_scan_is_an_objection_and_its_cause_is_isolated(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from hubfusion.release import triggers
    from hubfusion.release.scan import Scan

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
    from dataclasses import replace

    offer_poison(world, "mallory", "alice", "bob")
    world.config = replace(world.config, deadline_minutes=0.0)
    result = world.iterate()
    assert (result.verdict, result.trials) == (Verdict.REFUSED, ())
    assert len(result.contributions) == 3
