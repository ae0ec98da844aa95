"""Scores keyed by dataset name and protocol, never by position, and the paired comparison of two of them.

A score is a percentage (0-100; Spearman's rho times 100), a gain is candidate minus base in points. A `Scores` records
what was measured on which bytes. `compare` raises if the two were not measured in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from hubfusion.errors import EvaluationError

BOOTSTRAP_DRAWS = 10_000


def _stderr(values: tuple[float, ...]) -> float:
    """Standard error of the mean; nan for one value, which says nothing about spread."""
    if len(values) < 2:
        return math.nan
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one model on one dataset under one protocol: a value in percent for each seed.

    ``examples`` is the size of the test set, so that a reader can judge the grain of the number.

    >>> Score("rte", "finetune", "accuracy", (0, 1), (70.0, 72.0), 277).mean
    71.0
    """

    dataset: str
    protocol: str
    metric: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    examples: int

    def __post_init__(self) -> None:
        """Refuse what cannot be a score: no seeds, a seed twice, a value outside [-100, 100], an empty test set."""
        where = f"score of {self.dataset} ({self.protocol})"
        if not self.seeds or len(self.seeds) != len(self.values):
            raise EvaluationError(f"{where}: one value per seed, got {len(self.values)} for {len(self.seeds)} seeds")
        if len(set(self.seeds)) != len(self.seeds):
            raise EvaluationError(f"{where}: each seed once, got {list(self.seeds)}")
        if bad := [v for v in self.values if not -100.0 <= v <= 100.0]:
            raise EvaluationError(f"{where}: values are percentages in [-100, 100], got {bad[0]}")
        if self.examples < 1:
            raise EvaluationError(f"{where}: the test set needs at least 1 example, got {self.examples}")

    @property
    def mean(self) -> float:
        """Mean over seeds, percent."""
        return float(np.mean(self.values))

    @property
    def stderr(self) -> float:
        """Standard error over seeds, points; nan for a single seed."""
        return _stderr(self.values)


@dataclass(frozen=True, slots=True)
class Provenance:
    """How the numbers were made: protocol name to hash, dataset name to content key, package versions, device."""

    protocols: Mapping[str, str]
    datasets: Mapping[str, str]
    versions: Mapping[str, str]
    device: str


@dataclass(frozen=True, slots=True)
class Scores:
    """Everything measured on one model, looked up by name. ``model`` is ``repo@sha`` or any key of its content."""

    model: str
    entries: tuple[Score, ...]
    provenance: Provenance

    def __post_init__(self) -> None:
        """Refuse a dataset that comes twice under one protocol, and scores without provenance."""
        seen: set[tuple[str, str]] = set()
        for score in self.entries:
            key = (score.dataset, score.protocol)
            if key in seen:
                raise EvaluationError(f"scores of {self.model}: {score.dataset} ({score.protocol}) comes twice")
            seen.add(key)
            if score.dataset not in self.provenance.datasets or score.protocol not in self.provenance.protocols:
                raise EvaluationError(f"scores of {self.model}: no provenance for {score.dataset} ({score.protocol})")

    def __iter__(self) -> Iterator[Score]:
        """The scores, in the order of the suite."""
        return iter(self.entries)

    def get(self, dataset: str, protocol: str) -> Score:
        """The score of this dataset under this protocol; `EvaluationError` names what there is."""
        for score in self.entries:
            if (score.dataset, score.protocol) == (dataset, protocol):
                return score
        known = ", ".join(f"{s.dataset} ({s.protocol})" for s in self.entries) or "nothing"
        raise EvaluationError(f"scores of {self.model}: no {dataset} ({protocol}), there is {known}")

    def mean(self, protocol: str | None = None) -> float:
        """Mean over datasets of the means over seeds under one protocol (None: under all), percent."""
        means = [s.mean for s in self.entries if protocol in (None, s.protocol)]
        if not means:
            raise EvaluationError(f"scores of {self.model}: nothing under protocol {protocol}")
        return float(np.mean(means))


@dataclass(frozen=True, slots=True)
class Gain:
    """Candidate minus base on one dataset under one protocol, in points, seed by seed."""

    dataset: str
    protocol: str
    metric: str
    base: float
    candidate: float
    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean difference over seeds, points."""
        return float(np.mean(self.differences))

    @property
    def stderr(self) -> float:
        """Standard error of the mean difference over seeds, points; nan for a single seed."""
        return _stderr(self.differences)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models compared dataset by dataset, paired by seed; never empty."""

    candidate: str
    base: str
    gains: tuple[Gain, ...]

    def __post_init__(self) -> None:
        """Refuse an empty comparison: its mean would be a number about nothing."""
        if not self.gains:
            raise EvaluationError(f"comparison of {self.candidate} with {self.base}: no dataset is left")

    @property
    def mean(self) -> float:
        """Mean gain over datasets and protocols, points."""
        return float(np.mean([g.mean for g in self.gains]))

    @property
    def median(self) -> float:
        """Median gain over datasets and protocols, points: what three tiny datasets cannot move."""
        return float(np.median([g.mean for g in self.gains]))

    @property
    def wins(self) -> int:
        """On how many datasets the candidate is better."""
        return sum(g.mean > 0 for g in self.gains)

    @property
    def losses(self) -> int:
        """On how many datasets the candidate is worse."""
        return sum(g.mean < 0 for g in self.gains)

    @property
    def worst(self) -> Gain:
        """The dataset that lost most (or gained least)."""
        return min(self.gains, key=lambda g: g.mean)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Percentile bootstrap interval of `mean`, points: datasets are drawn again, then seeds within each.

        All protocols of one dataset are drawn together, because they share their test examples. Deterministic.
        """
        if not 0 < confidence < 1:
            raise EvaluationError(f"interval: confidence must be in (0, 1), got {confidence}")
        groups: dict[str, list[Gain]] = {}
        for gain in self.gains:
            groups.setdefault(gain.dataset, []).append(gain)
        rng = np.random.default_rng(0)
        sums = np.zeros((len(groups), BOOTSTRAP_DRAWS))
        for row, members in zip(sums, groups.values(), strict=True):
            for gain in members:
                values = np.asarray(gain.differences)
                row += values[rng.integers(len(values), size=(BOOTSTRAP_DRAWS, len(values)))].mean(axis=1)
        counts = np.asarray([len(members) for members in groups.values()])
        chosen = rng.integers(len(groups), size=(BOOTSTRAP_DRAWS, len(groups)))
        draws = sums[chosen, np.arange(BOOTSTRAP_DRAWS)[:, None]].sum(axis=1) / counts[chosen].sum(axis=1)
        low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
        return float(low), float(high)

    def only(self, datasets: Collection[str]) -> Comparison:
        """The comparison on these datasets alone, e.g. the unseen ones."""
        return Comparison(self.candidate, self.base, tuple(g for g in self.gains if g.dataset in datasets))

    def without(self, datasets: Collection[str]) -> Comparison:
        """The comparison without these datasets, e.g. the small ones whose score is mostly noise."""
        return Comparison(self.candidate, self.base, tuple(g for g in self.gains if g.dataset not in datasets))


def compare(candidate: Scores, base: Scores) -> Comparison:
    """Subtract base from candidate, paired by dataset, protocol and seed.

    `EvaluationError` if they were not measured alike: other datasets, dataset contents, protocols, metrics, seeds or
    test sizes. Package versions and device may differ; they are in the provenance of both.
    """
    where = f"compare {candidate.model} with {base.model}"
    theirs = {(s.dataset, s.protocol) for s in base}
    mine = {(s.dataset, s.protocol) for s in candidate}
    if mine != theirs:
        dataset, protocol = min(mine ^ theirs)
        raise EvaluationError(f"{where}: only one of them has {dataset} ({protocol})")
    gains = []
    for score in candidate:
        other = base.get(score.dataset, score.protocol)
        _refuse_unlike(where, score, other)
        for kind, name, a, b in (
            ("dataset", score.dataset, candidate.provenance.datasets, base.provenance.datasets),
            ("protocol", score.protocol, candidate.provenance.protocols, base.provenance.protocols),
        ):
            if a[name] != b[name]:
                raise EvaluationError(f"{where}: {kind} {name} is not the same, {a[name]} against {b[name]}")
        partner = dict(zip(other.seeds, other.values, strict=True))
        differences = tuple(v - partner[s] for s, v in zip(score.seeds, score.values, strict=True))
        gains.append(Gain(score.dataset, score.protocol, score.metric, other.mean, score.mean, differences))
    return Comparison(candidate.model, base.model, tuple(gains))


def _refuse_unlike(where: str, a: Score, b: Score) -> None:
    name = f"{a.dataset} ({a.protocol})"
    if set(a.seeds) != set(b.seeds):
        raise EvaluationError(f"{where}: {name} needs equal seeds, got {sorted(a.seeds)} and {sorted(b.seeds)}")
    if (a.metric, a.examples) != (b.metric, b.examples):
        ours, theirs = f"{a.metric} on {a.examples}", f"{b.metric} on {b.examples}"
        raise EvaluationError(f"{where}: {name} needs one metric and test set, got {ours} and {theirs}")
