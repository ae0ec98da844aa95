"""Engines measure the units that the store does not have. Each is a `hubfusion.evaluate.units.Engine`.

`engines.local` runs in this process, `engines.ray` on a cluster, `engines.jobs` on the Hub's machines. The last two
distribute groups of units. A worker yields unit by unit; if it dies, the rest of its group goes to another worker.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hubfusion.errors import EvaluationError
from hubfusion.evaluate.units import Unit

log = logging.getLogger(__name__)

TRIES = 3


@dataclass(slots=True)
class Group:
    """What one worker is given: units of one dataset by key, in order, those that are left of them.

    A dataset is read and tokenised once for its group, and its features are computed once. ``failures`` counts
    workers that died in a row without a result, ``reason`` is how the last one did.
    """

    units: dict[str, Unit]
    failures: int = 0
    reason: str = ""

    def take(self, key: str) -> Unit | None:
        """The unit of this key, which is done now; None if it was done before."""
        self.failures = 0
        return self.units.pop(key, None)

    def is_worth_another(self, reason: str) -> bool:
        """Note that a worker died; whether what is left should go to another one."""
        self.failures += 1
        self.reason = " ".join(reason.split())[:500]
        again = bool(self.units) and self.failures < TRIES
        if self.units:
            name = next(iter(self.units.values())).dataset.name
            word = "handed out again" if again else "given up"
            log.warning("%s: %d units left, %s: %s", name, len(self.units), word, self.reason)
        return again


def make_groups(units: Sequence[Unit], most: int | None = None) -> list[Group]:
    """The units by dataset, in groups of at most ``most`` (all of a dataset together when None)."""
    if most is not None and most < 1:
        raise EvaluationError(f"units per worker must be at least 1, got {most}")
    groups = []
    for name in dict.fromkeys(u.dataset.name for u in units):
        mine = [u for u in units if u.dataset.name == name]
        size = most or len(mine)
        groups += [Group({u.key: u for u in mine[i : i + size]}) for i in range(0, len(mine), size)]
    return groups


def refuse_lost(groups: Iterable[Group]) -> None:
    """Raise `EvaluationError` about the groups that were given up, if any; all the others are done by then."""
    lost = [g for g in groups if g.units]
    if lost:
        first = next(iter(lost[0].units.values()))
        raise EvaluationError(
            f"{sum(len(g.units) for g in lost)} units were given up after {TRIES} workers each, the first is "
            f"{first.dataset.name} by {first.protocol.name} with seed {first.seed}: {lost[0].reason}"
        )
