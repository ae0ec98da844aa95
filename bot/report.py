"""Print what one run read, decided and did, as tables on standard output."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bot.iteration import Iteration, Verdict
from hubfusion.release.card import visible

PLAIN_WIDTH = 160  # of output that goes to a file or a log


def show(result: Iteration, *, acted: bool, console: Console | None = None) -> None:
    """Print the plan or the result of a run; untrusted text is escaped."""
    console = console or (Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH))
    console.print(f"iteration {result.number}: {result.verdict}", style="bold", highlight=False)
    if result.contributions or result.rejected:
        console.print(_models(result))
    if result.decision is not None:
        console.print(result.decision.summary, highlight=False, markup=False)
        if result.trials:
            passed = sum(t.decision.promote for t in result.trials)
            console.print(
                f"tried to isolate who is to blame: {len(result.trials)} sets, {passed} accepted", highlight=False
            )
        for objection in result.decision.objections:
            console.print(f"objection: {objection}", highlight=False, markup=False)
    if not acted and result.verdict in (Verdict.PLANNED, Verdict.REFUSED, Verdict.WAITING):
        console.print("Nothing was written. Run again with --publish to act on this.", highlight=False)


def _models(result: Iteration) -> Table:
    table = Table("finetune", "verdict", "why", box=None, pad_edge=False)
    word = {Verdict.PROMOTED: f"in {result.version}", Verdict.REFUSED: "refused", Verdict.WAITING: "waits"}
    for contribution in result.contributions:
        examples = "?" if contribution.examples is None else contribution.examples
        why = f"{examples} examples of {', '.join(contribution.datasets) or 'undeclared data'}"
        if (gain := result.leave_one_out_gains.get(contribution.revision)) is not None:
            why += f"; leave-one-out gain {gain:+.2f} points"
        table.add_row(Text(str(contribution.revision)), word.get(result.verdict, "accepted"), Text(visible(why)))
    for rejected in result.rejected:
        table.add_row(Text(str(rejected.revision)), f"rejected: {rejected.reason}", Text(visible(rejected.detail)))
    return table
