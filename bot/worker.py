"""The worker: a process that reads strangers' weights, without a token. Soundness, fuse, evaluate; result in a file.

`python -m bot.worker JOB.json FOLDER` writes ``FOLDER/outcome.json`` last, so that its existence means that the job is
done. Whatever takes long is stored on the way (scores by content), so a worker that was killed goes on where it was.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from bot.config import Fusing
from hubfusion.errors import FusionError
from hubfusion.evaluate import Evaluated
from hubfusion.lineage import Contribution, Recipe, Rejected, RemoteFile, Revision, dumps, loads
from hubfusion.protocols import Protocol
from hubfusion.scores import Scores
from hubfusion.suite import Suite

log = logging.getLogger(__name__)

OUTCOME = "outcome.json"
NOT_THE_MODEL = ("README.md", "fusion.json", ".gitattributes")


@dataclass(frozen=True, slots=True)
class Job:
    """What to do, complete: folders hold exactly the files that were screened; ``store`` keeps scores by content."""

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


@dataclass(frozen=True, slots=True)
class Candidate:
    """A fused model in ``folder``, whose weights files are ``weights``, beside its scores and those of its base."""

    folder: str
    recipe: Recipe
    weights: tuple[RemoteFile, ...]
    base_scores: Scores
    candidate_scores: Scores


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a job; no candidate when too few contributions are sound."""

    contributions: tuple[Contribution, ...]
    rejected: tuple[Rejected, ...]
    candidate: Candidate | None


def work(job: Job, folder: Path) -> Outcome:
    """Examine, fuse and evaluate; ``folder`` gets the candidate."""
    from hubfusion.region import draw
    from hubfusion.soundness import clip_factors, examine

    folders = dict(zip((c.revision for c in job.contributions), map(Path, job.folders), strict=True))
    pairs = [(c, folders[c.revision]) for c in job.contributions]
    report = examine(Path(job.base_folder), pairs, tag=job.base_tag)
    (folder / "soundness.json").write_text(dumps(report))
    (folder / "weight-space.svg").write_text(draw(report))
    accepted = set(report.accepted)
    sound = tuple(c for c in job.contributions if c.revision in accepted)
    if len(sound) < job.fuse.at_least:
        return Outcome(sound, report.rejected, None)
    factors = clip_factors(report) if job.fuse.clip else (1.0,) * len(sound)
    recipe = make_recipe(job, sound, dict(zip(report.accepted, factors, strict=True)))
    return Outcome(sound, report.rejected, make_candidate(job, recipe, [folders[r] for r in recipe.inputs], folder))


def make_recipe(job: Job, sound: tuple[Contribution, ...], factors: dict[Revision, float]) -> Recipe:
    """The recipe of the job's policy. Clipping is in the coefficients and, as methods divide by their sum, in λ."""
    coefficients = tuple(factors[c.revision] for c in sound)
    scale = job.fuse.scale * sum(coefficients) / len(coefficients)
    options = tuple(sorted(job.fuse.options.items()))
    return Recipe(job.base, tuple(c.revision for c in sound), coefficients, job.fuse.method, options, scale)


def make_candidate(job: Job, recipe: Recipe, inputs: list[Path], folder: Path) -> Candidate:
    """Fuse into ``folder/candidate``, add the base's own configuration and tokenizer, and score both as bases."""
    from hubfusion.evaluate import content_key, evaluate
    from hubfusion.fuse import fuse

    base, candidate = Path(job.base_folder), folder / "candidate"
    fused = fuse(recipe, base, inputs, candidate)
    weights = tuple(RemoteFile(f.name, f.size, "", f.sha256) for f in fused.files)
    for file in base.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json") and file.name not in NOT_THE_MODEL:
            (candidate / file.name).write_bytes(file.read_bytes())
    scores = [
        evaluate(path, content_key(path), job.suite, job.protocols, job.seeds, Path(job.store), on_event=log_progress)
        for path in (base, candidate)
    ]
    return Candidate(str(candidate), recipe, weights, *scores)


def log_progress(event: Evaluated) -> None:
    """One line for each tenth of the units that had to be measured."""
    if not event.stored and event.done * 10 // event.total > (event.done - 1) * 10 // event.total:
        log.info("evaluate: %d of %d (%s by %s)", event.done, event.total, event.dataset, event.protocol)


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
