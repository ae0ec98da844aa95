"""Measure units in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from hubfusion.data.suite import Suite
from hubfusion.evaluate.protocols import Protocol
from hubfusion.evaluate.scores import Scores
from hubfusion.evaluate.units import Evaluated, Result, Unit, plan_units, score_units


def evaluate(
    checkpoint: Path,
    model: str,
    suite: Suite,
    protocols: Sequence[Protocol],
    seeds: Sequence[int],
    store: Path,
    *,
    on_event: Callable[[Evaluated], None] | None = None,
) -> Scores:
    """Score the checkpoint folder as a base: every dataset of the suite under every protocol with every seed.

    ``model`` names the checkpoint's content (``repo@sha``, or any digest of it) and is what results are stored
    under; the caller vouches for it. The same seeds give the same draws, data order and heads for every model, so
    two `Scores` made with them can be compared in pairs.
    """
    here = partial(measure_here, checkpoint)
    return score_units(plan_units(model, suite, protocols, seeds), store, here, on_event=on_event)


def measure_here(checkpoint: Path, units: Sequence[Unit]) -> Iterator[tuple[Unit, Result]]:
    """Measure in this process, which imports torch only now; with its checkpoint given, the engine `evaluate` uses."""
    from hubfusion.evaluate.measure import measure_units  # only here: it imports torch

    return measure_units(checkpoint, units)
