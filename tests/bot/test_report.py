from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from bot.iteration import Iteration, Verdict
from bot.report import show
from hubfusion.lineage import Contribution, Reason, Rejected, Revision
from hubfusion.release.gate import Decision
from hubfusion.release.isolation import Trial

BASE = Revision("ibm/base", "b" * 40)
ALICE = Contribution(Revision("alice/model", "a" * 40), "alice", BASE, "mit", ("texts/news",), 600, ())
DECISION = Decision(True, 0.5, (), "Mean gain +0.50 points.")


def shown(result: Iteration, *, acted: bool) -> str:
    console = Console(width=160, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    show(result, acted=acted, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_plan_names_what_would_go_in_and_what_not_and_that_nothing_was_written() -> None:
    rejected = Rejected(Revision("mallory/nan", "c" * 40), "mallory", Reason.NOT_FINITE, "w[3] is nan")
    text = shown(Iteration(3, Verdict.PLANNED, "v2", "v3", (ALICE,), (rejected,), DECISION), acted=False)
    assert "iteration 3: would be promoted" in text
    assert "alice/model@aaaaaaaaaaaa" in text and "600 examples of texts/news" in text
    assert "rejected: not-finite" in text and "w[3] is nan" in text
    assert "Mean gain +0.50 points." in text
    assert "Nothing was written. Run again with --publish" in text


def test_what_was_tried_and_the_leave_one_out_gains_are_shown() -> None:
    trials = (Trial((ALICE.revision,), DECISION), Trial((BASE,), replace(DECISION, promote=False)))
    result = Iteration(3, Verdict.PROMOTED, "v2", "v3", (ALICE,), (), DECISION, trials, {ALICE.revision: -0.75})
    text = shown(result, acted=True)
    assert "tried to isolate who is to blame: 2 sets, 1 accepted" in text
    assert "600 examples of texts/news; leave-one-out gain -0.75 points" in text


def test_what_was_done_says_where_it_went() -> None:
    text = shown(Iteration(3, Verdict.PROMOTED, "v2", "v3", (ALICE,), (), DECISION), acted=True)
    assert "in v3" in text and "Nothing was written" not in text


@pytest.mark.parametrize("hostile", ["[bold red]x[/]", "[link=http://evil]x[/link]", "\x1b]0;title\x07x"])
def test_a_strangers_text_is_text_on_the_terminal_too(hostile: str) -> None:
    rejected = Rejected(Revision("mallory/nan", "c" * 40), "mallory", Reason.BAD_FILES, hostile)
    text = shown(Iteration(3, Verdict.NOTHING_NEW, "v2", "v3", (), (rejected,)), acted=True)
    assert "\x1b]" not in text and "\x07" not in text
    assert hostile.replace("\x1b", "").replace("\x07", "") in text.replace("\x1b", "")


def test_objections_are_shown_with_a_refusal() -> None:
    refused = Decision(
        False, -2.0, ("The mean gain of -2.00 points is below the margin of -0.50.",), "Mean gain -2.00."
    )
    text = shown(Iteration(3, Verdict.REFUSED, "v2", "v3", (ALICE,), (), refused), acted=True)
    assert "objection: The mean gain of -2.00 points is below the margin of -0.50." in text


def test_an_error_is_one_line_whatever_a_stranger_put_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    from hubfusion.cli import run
    from hubfusion.errors import FusionError

    application = typer.Typer()

    @application.command()
    def fail() -> None:
        raise FusionError("bad file \x1b]0;x\x07\nsecond line")

    with pytest.raises(SystemExit) as stopped:
        run(application, [])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: bad file ?]0;x??second line\n"
