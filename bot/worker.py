"""The worker process, which has no token: check the weights (soundness), fuse, evaluate, and write the outcome.

`python -m bot.worker JOB.json FOLDER` writes ``FOLDER/outcome.json`` last, so its existence means that the job is done.
Scores are stored by content as they are measured, so a worker that is started again continues after the last one.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

from bot.job import OUTCOME, CandidateJob, Outcome
from bot.search import CandidateSearch
from hubfusion.codec import dumps, loads
from hubfusion.errors import FusionError
from hubfusion.release.manifest import REPORT

log = logging.getLogger(__name__)


def work(job: CandidateJob, folder: Path) -> Outcome:
    """Examine, fuse, evaluate, isolate what the gate objects to; ``folder`` gets the candidate and the report."""
    from hubfusion.screen import examine
    from hubfusion.screen.weight_space import draw

    began = time.monotonic()
    report = examine(
        Path(job.base_folder),
        [(each.contribution, Path(each.folder)) for each in job.inputs],
        tag=job.base_tag,
        versions={tag: Path(version) for tag, version in job.versions.items()},
        known_norms=job.known_norms,
    )
    (folder / REPORT[0]).write_text(dumps(report))
    (folder / REPORT[1]).write_text(draw(report))
    accepted = set(report.accepted)
    sound = tuple(each.contribution for each in job.inputs if each.contribution.revision in accepted)
    if len(sound) < job.fuse.at_least:
        return Outcome(sound, report.rejected)
    return CandidateSearch(job, folder, report, began).run(sound)


def main(job_file: Path, folder: Path) -> int:
    """Read the job, do it, write the outcome beside and rename it; errors are one line on stderr."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s worker: %(message)s", datefmt="%H:%M:%S"
    )
    for name in ("hubfusion", "bot", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        outcome = work(loads(CandidateJob, job_file.read_bytes(), str(job_file)), folder)
    except FusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    part = folder / f"{OUTCOME}.{os.getpid()}"
    part.write_text(dumps(outcome))
    part.replace(folder / OUTCOME)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
