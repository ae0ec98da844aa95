from __future__ import annotations

from dataclasses import replace

import pytest

from bot.ledger import Accepted, Judged, Ledger, Promoted, Refused, Said
from bot.notify import FIX, deliver, pending_answers
from hubfusion.errors import Forbidden, HubError
from hubfusion.lineage import Reason, Revision
from hubfusion.release.gate import Decision
from hubfusion.release.isolation import Trial

A, B, C = (Revision(f"{name}/model", name[0] * 40) for name in ("alice", "bob", "carol"))
HUB = "http://hub"


def test_every_reason_has_an_answer_that_says_what_to_do() -> None:
    assert set(FIX) == set(Reason)
    assert all(fix.endswith(".") and len(fix) > 20 for fix in FIX.values())


def test_each_finetune_that_was_dealt_with_is_answered_once() -> None:
    events = (
        Judged(A, "alice", Reason.NOT_FINITE, "w[7, 11] is NaN", 1),
        Promoted(1, "v1", "f" * 40, (Accepted(B, 0.5), Accepted(C, -1.25))),
        Said(B, 3),
    )
    answers = list(pending_answers(Ledger(events, "0" * 40), "ibm/base", HUB))
    assert [a.finetune for a in answers] == [A, C]
    assert answers[0].title == f"Not fused into ibm/base: not-finite (commit {A.sha[:12]})"
    assert "w\\[7, 11\\] is NaN" in answers[0].body
    assert answers[1].title == f"Part of ibm/base v1 (commit {C.sha[:12]})"
    assert 'revision="v1"' in answers[1].body
    said = "leave-one-out gain on the bot's probe suite is -1.25 points: the score of v1 minus that of the same fuse"
    assert said in answers[1].body


def test_a_refused_candidate_is_told_to_all_who_were_in_it() -> None:
    refused = Refused(4, Revision("ibm/base", "e" * 40), (A, B), ("mean gain -1.20 is below -0.50.",), "…")
    answers = list(pending_answers(Ledger((refused,), "0" * 40), "ibm/base", HUB))
    assert [a.finetune for a in answers] == [A, B]
    assert "iteration 4: mean gain -1.20 is below -0.50." in answers[0].body
    assert "sets were tried" not in answers[0].body
    trial = Trial((A,), Decision(False, -3.0, ("no.",), "..."))
    (answer, _) = pending_answers(Ledger((replace(refused, trials=(trial,)),), "0" * 40), "ibm/base", HUB)
    assert "1 smaller sets were tried; no single model is to blame." in answer.body


def test_who_allows_no_discussion_is_noted_and_who_cannot_be_reached_waits_for_the_next_run() -> None:
    class Grumpy:
        def discuss(self, repo: str, title: str, body: str) -> int:
            if repo == "alice/model":
                raise Forbidden("discussion on alice/model: HTTP 403: discussions are disabled")
            if repo == "bob/model":
                raise HubError("discussion on bob/model: HTTP 503: busy")
            return 12

    events = (Promoted(1, "v1", "f" * 40, tuple(map(Accepted, (A, B, C)))),)
    answers = list(pending_answers(Ledger(events, "0" * 40), "ibm/base", HUB))
    assert deliver(Grumpy(), answers) == (Said(A, None), Said(C, 12))  # type: ignore[arg-type]


@pytest.mark.parametrize("reason", list(Reason))
def test_every_answer_says_that_a_bot_wrote_it(reason: Reason) -> None:
    ledger = Ledger((Judged(A, "alice", reason, "because", 1),), "0" * 40)
    (answer,) = pending_answers(ledger, "ibm/base", HUB)
    assert "written by a bot" in answer.body and str(reason) in answer.title
