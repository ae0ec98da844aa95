"""The gate: decide whether a candidate may become the next version of the base.

The test is non-inferiority, not superiority: the first fuse of ColD Fusion need not beat its base, and late gains are
smaller than the noise of one evaluation, so a test for superiority would stop the loop. Margins are in points of score
(0-100) and are set by the maintainer. Every objection is a sentence with the measured and the allowed value.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from hubfusion.errors import FusionError
from hubfusion.evaluate.scores import Comparison, Scores, compare

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Margins:
    """How much worse a candidate may be, in points: on average over datasets, and on any single one."""

    mean: float = 0.5
    worst: float = 3.0

    def __post_init__(self) -> None:
        """Refuse negative margins: they would demand a gain that noise alone decides."""
        for name, value in (("mean", self.mean), ("worst", self.worst)):
            if not value >= 0:
                raise FusionError(f"gate.{name} must be at least 0 points, got {value}")


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to promote, the objections if not, and the comparison in one sentence; ``mean_gain`` in points."""

    promote: bool
    mean_gain: float
    objections: tuple[str, ...]
    summary: str


def decide(candidate: Scores, base: Scores, margins: Margins, findings: Sequence[str] = ()) -> Decision:
    """Compare pair by pair and object to what is worse than the margins allow.

    The worst dataset is one whose loss exceeds ``margins.worst`` and twice its own standard error over seeds, so that
    one noisy dataset with few examples does not stop the loop by itself. ``findings`` of other checks of the candidate
    (`hubfusion.release.triggers`), a sentence each, are objections as they are.
    """
    found = compare(candidate, base)
    objections: list[str] = []
    if found.mean < -margins.mean:
        objections.append(f"The mean gain of {found.mean:+.2f} points is below the margin of {-margins.mean:+.2f}.")
    for gain in found.gains:
        noise = 0.0 if math.isnan(gain.stderr) else gain.stderr
        if gain.mean < -max(margins.worst, 2 * noise):
            objections.append(
                f"{gain.dataset} by {gain.protocol} loses {-gain.mean:.2f} points ({gain.base:.2f} to "
                f"{gain.candidate:.2f}), more than {margins.worst:.2f}."
            )
    objections += findings
    log.info("gate: %s", "promote" if not objections else f"refuse, {len(objections)} objections")
    return Decision(not objections, found.mean, tuple(objections), summarise(found))


def summarise(found: Comparison) -> str:
    """One sentence: mean with its interval, median, wins, worst."""
    low, high = found.interval()
    worst = found.worst
    return (
        f"Mean gain {found.mean:+.2f} points (95 % interval {low:+.2f} to {high:+.2f}) over {len(found.gains)} scores, "
        f"median {found.median:+.2f}, {found.wins} better and {found.losses} worse, "
        f"worst {worst.dataset} by {worst.protocol} {worst.mean:+.2f}."
    )
