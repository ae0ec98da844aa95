"""The worker: a process that reads strangers' weights, without a token. Soundness, fuse, evaluate; result in a file.

`python -m bot.worker JOB.json FOLDER` writes ``FOLDER/outcome.json`` last, so that its existence means that the job is
done. Whatever takes long is stored on the way (scores by content), so a worker that was killed goes on where it was.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bot.config import Fusing
from hubfusion.data.suite import Suite
from hubfusion.errors import FusionError
from hubfusion.evaluate.protocols import Protocol
from hubfusion.evaluate.scores import Scores
from hubfusion.lineage import Contribution, Recipe, Rejected, RemoteFile, Revision, dumps, loads
from hubfusion.release.gate import Margins
from hubfusion.release.isolation import Trial
from hubfusion.release.scan import Scan

log = logging.getLogger(__name__)

OUTCOME = "outcome.json"
REPORT = ("soundness.json", "weight-space.svg")


@dataclass(frozen=True, slots=True)
class Probe:
    """What leaving one out is measured on."""

    suite: Suite
    protocols: tuple[Protocol, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """What to do, complete: folders hold exactly the files that were screened; ``store`` keeps scores by content.

    ``versions`` are folders of earlier releases by tag, ``known_norms`` norms of task vectors that they accepted.
    ``minutes`` is when the job must be done: no trial is begun that would last longer.
    """

    base: Revision
    base_tag: str
    base_folder: str
    contributions: tuple[Contribution, ...]
    folders: tuple[str, ...]
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
    """A fused model in ``folder``, whose weights files are ``weights``, beside its scores and those of its base.

    ``findings`` are what other checks object to; ``norms``, ``leave_one_out`` and ``report`` as in the manifest.
    """

    folder: str
    recipe: Recipe
    weights: tuple[RemoteFile, ...]
    base_scores: Scores
    candidate_scores: Scores
    findings: tuple[str, ...] = ()
    norms: tuple[float, ...] = ()
    leave_one_out: tuple[float, ...] = ()
    report: tuple[RemoteFile, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a job; no candidate when too few contributions are left. ``trials`` isolated the harmful ones."""

    contributions: tuple[Contribution, ...]
    rejected: tuple[Rejected, ...]
    candidate: Candidate | None
    trials: tuple[Trial, ...] = ()


def work(job: Job, folder: Path) -> Outcome:
    """Examine, fuse, evaluate, isolate what the gate objects to; ``folder`` gets the candidate and the report."""
    from bot.bench import Bench
    from hubfusion.screen import examine
    from hubfusion.screen.weight_space import draw

    began = time.monotonic()
    folders = dict(zip((c.revision for c in job.contributions), map(Path, job.folders), strict=True))
    report = examine(
        Path(job.base_folder),
        [(c, folders[c.revision]) for c in job.contributions],
        tag=job.base_tag,
        versions={tag: Path(version) for tag, version in job.versions.items()},
        known_norms=job.known_norms,
    )
    (folder / REPORT[0]).write_text(dumps(report))
    (folder / REPORT[1]).write_text(draw(report))
    accepted = set(report.accepted)
    sound = tuple(c for c in job.contributions if c.revision in accepted)
    if len(sound) < job.fuse.at_least:
        return Outcome(sound, report.rejected, None)
    return Bench(job, folder, report, began).judge(sound)


def main(job_file: Path, folder: Path) -> int:
    """Read the job, do it, write the outcome beside and rename it; errors are one line on stderr."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s worker: %(message)s", datefmt="%H:%M:%S"
    )
    for name in ("hubfusion", "bot", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        outcome = work(loads(Job, job_file.read_bytes(), str(job_file)), folder)
    except FusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    part = folder / f"{OUTCOME}.{os.getpid()}"
    part.write_text(dumps(outcome))
    part.replace(folder / OUTCOME)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
