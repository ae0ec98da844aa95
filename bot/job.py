"""The job that a run gives to its worker, and the outcome it gets back: plain values, sent as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bot.config import Fusing
from hubfusion.data.suite import Suite
from hubfusion.evaluate.protocols import Protocol
from hubfusion.evaluate.scores import Scores
from hubfusion.lineage import Contributed, Contribution, Recipe, Rejected, RemoteFile, Revision
from hubfusion.release.gate import Decision, Margins
from hubfusion.release.isolation import Trial
from hubfusion.release.scan import Scan

OUTCOME = "outcome.json"


@dataclass(frozen=True, slots=True)
class Probe:
    """What leave-one-out gains are measured on."""

    suite: Suite
    protocols: tuple[Protocol, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Downloaded:
    """A contribution and the folder that holds exactly the files of it that were screened."""

    contribution: Contribution
    folder: str


@dataclass(frozen=True, slots=True)
class CandidateJob:
    """Make a candidate for the next version, complete; ``store`` keeps scores by content.

    ``versions`` are folders of earlier releases by tag, ``known_norms`` norms of task vectors that they accepted.
    ``minutes`` is when the job must be done: no trial is begun that would last longer.
    """

    base: Revision
    base_tag: str
    base_folder: str
    inputs: tuple[Downloaded, ...]
    fuse: Fusing
    suite: Suite
    protocols: tuple[Protocol, ...]
    seeds: tuple[int, ...]
    store: str
    gate: Margins = field(default_factory=Margins)
    minutes: float = 600.0
    versions: Mapping[str, str] = field(default_factory=dict)
    known_norms: tuple[float, ...] = ()
    probe: Probe | None = None
    triggers: Scan | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A fused model in ``folder``, whose weights files are ``weights``, with its scores and those of its base.

    ``contributions`` are those in it, ``backbone`` its declaration as a file, ``decision`` the gate's, ``report`` the
    files of the weight-space report.
    """

    folder: str
    recipe: Recipe
    contributions: tuple[Contributed, ...]
    weights: tuple[RemoteFile, ...]
    backbone: RemoteFile
    base_scores: Scores
    candidate_scores: Scores
    decision: Decision
    report: tuple[RemoteFile, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a job; no candidate when too few contributions are left. ``trials`` isolated the harmful ones."""

    contributions: tuple[Contribution, ...]
    rejected: tuple[Rejected, ...]
    candidate: Candidate | None = None
    trials: tuple[Trial, ...] = ()

    @property
    def decision(self) -> Decision | None:
        """The gate's decision on the candidate; None without one."""
        return self.candidate.decision if self.candidate else None
