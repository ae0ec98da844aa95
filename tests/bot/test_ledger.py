from __future__ import annotations

import json

import pytest

from bot.ledger import FILE, Accepted, Ledger, Promoted, Refused, read_ledger
from hubfusion.codec import to_json
from hubfusion.errors import FusionError
from hubfusion.lineage import Revision
from tests.fake_hub import FakeHub

A, B, C = (Revision(f"{name}/model", name[0] * 40) for name in ("alice", "bob", "carol"))
PROMOTED = Promoted(1, "v1", "f" * 40, (Accepted(A, 0.5), Accepted(B)))


def ledger_of(*lines: object) -> Ledger:
    hub = FakeHub()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    hub.add("ibm/ledger", {FILE: text.encode()}, "events")
    return read_ledger(hub, "ibm/ledger")


def test_what_was_promoted_or_refused_is_judged() -> None:
    events = (PROMOTED, Refused(2, Revision("ibm/base", "e" * 40), (C,), ("no.",), "..."))
    assert Ledger(events, "0" * 40).judged == {A, B, C}


def test_an_event_is_read_back_with_each_gain_beside_its_finetune() -> None:
    assert ledger_of({"event": "promoted", **to_json(PROMOTED)}).events == (PROMOTED,)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"leave_one_out": [0.5]}, "promoted: unknown key 'leave_one_out', allowed are iteration, version"),
        ({"contributions": [to_json(A)]}, r"promoted.contributions\[0\]: object missing required field finetune"),
        ({"event": "forgotten"}, r"'\{"),
    ],
)
def test_an_event_of_another_version_is_one_line_with_its_place(change: dict[str, object], says: str) -> None:
    line = {"event": "promoted", **to_json(PROMOTED)} | change
    with pytest.raises(FusionError, match=rf"ledger.jsonl:1: not an event of this version of the bot: {says}"):
        ledger_of(line)
