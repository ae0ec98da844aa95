"""What a crash, a second bot or a vanished model leaves, and that the next run makes it good."""

from __future__ import annotations

import numpy as np
import pytest

from bot import iteration
from bot.iteration import Verdict, run_iteration
from bot.ledger import Judged, Promoted, Said, append
from hubfusion.errors import Conflict, FusionError
from hubfusion.evaluate.engines import local
from hubfusion.hub import Change, RepoKind
from hubfusion.hub import client as hub_client
from hubfusion.lineage import Reason, Revision
from hubfusion.localhub import LOST, Fault, FaultRequest
from hubfusion.release.ranking import read_rows
from tests import bert_checkpoints
from tests.hub.test_client import Faults
from tests.world import BASE, BOT, World, offer_poison


def test_two_bots_at_once_one_publishes_and_the_other_says_that_it_lost(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for user in ("alice", "bob"):
        world.offer(f"{user}/model")

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

    rows = read_rows(hub, hub.resolve(world.config.ranking, kind=RepoKind.DATASET))
    assert [r["version"] for r in rows] == ["v0", "v0", "v1", "v1"]
    settled = world.heads()
    assert world.iterate("settled").verdict is Verdict.NOTHING_NEW
    assert world.heads() == settled


def test_a_model_that_vanishes_between_crawl_and_download_is_left_out(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

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
    hub = world.hub(BOT)
    head = hub.resolve(BASE).sha
    hub.commit(BASE, Change("one", head, "n1", {"fusion.json": b"1"}))
    with pytest.raises(Conflict):
        hub.commit(BASE, Change("two", head, "n2", {"fusion.json": b"2"}))


def test_a_worker_killed_between_two_trials_goes_on_to_the_same_end(world: World) -> None:
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
