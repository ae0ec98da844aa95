"""Find a candidate that the gate accepts: fuse a set of contributions, evaluate it, and isolate harmful ones."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from bot.job import Candidate, CandidateJob, Outcome
from hubfusion.checkpoint.backbone import FILE as BACKBONE
from hubfusion.data.suite import Suite
from hubfusion.errors import RecipeError
from hubfusion.evaluate.protocols import Protocol
from hubfusion.evaluate.scores import Scores
from hubfusion.evaluate.units import Evaluated
from hubfusion.fuse.clipping import clip, clip_bound
from hubfusion.lineage import Contributed, Contribution, Input, Reason, Recipe, Rejected, RemoteFile, Revision
from hubfusion.release.founding import is_model_file
from hubfusion.release.gate import Decision, decide
from hubfusion.release.isolation import Culprit, Trial, isolate
from hubfusion.release.manifest import REPORT, describe_file
from hubfusion.screen import SoundnessReport

log = logging.getLogger(__name__)

Set = tuple[Contribution, ...]
Gains = Mapping[Revision, float]


class CandidateSearch:
    """One job's contributions, and the decisions on the sets of them that were tried.

    ``began`` is when the job began, on the monotonic clock: before the contributions were examined.
    """

    def __init__(self, job: CandidateJob, folder: Path, report: SoundnessReport, began: float) -> None:
        self.job, self.folder, self.base = job, folder, Path(job.base_folder)
        self.folders = {each.contribution.revision.pinned: Path(each.folder) for each in job.inputs}
        self.norms = {measure.revision.pinned: measure.norm for measure in report.measures}
        self.bound = clip_bound([self.norms[revision.pinned] for revision in report.accepted], job.known_norms)
        self.rejected = report.rejected
        self.trials: dict[tuple[int, ...], Decision] = {}
        self.began, self.longest, self.measuring = began, 0.0, 0.0

    def run(self, sound: Set) -> Outcome:
        """The candidate of all of them; if the gate refuses it, of those that are left without the harmful ones."""
        candidate = self.attempt(sound)
        decision = candidate.decision
        gains = self.leave_one_out_gains(sound, candidate) if decision.promote or self.job.fuse.isolate else {}
        culprits: tuple[Culprit, ...] = ()
        if not decision.promote and self.job.fuse.isolate:
            culprits = self.isolate(sound, gains)
        trials = tuple(Trial(tuple(sound[i].revision for i in chosen), d) for chosen, d in self.trials.items())
        if not culprits:
            return Outcome(sound, self.rejected, with_gains(candidate, gains), trials)
        rejected = (*self.rejected, *(self.blame(sound, each, decision) for each in culprits))
        rest = tuple(c for i, c in enumerate(sound) if i not in {each.number for each in culprits})
        if len(rest) < self.job.fuse.at_least:
            return Outcome(rest, rejected, None, trials)
        candidate = self.attempt(rest)
        candidate = with_gains(candidate, self.leave_one_out_gains(rest, candidate))
        return Outcome(rest, rejected, candidate, trials)

    def attempt(self, chosen: Set, name: str = "candidate") -> Candidate:
        """Fuse a set into the folder ``name``, score it and its base, judge it."""
        job, recipe, place = self.job, self.recipe(chosen), self.folder / name
        began = time.monotonic()
        weights = self.fuse(recipe, place)
        fused_at, base = time.monotonic(), self.base_scores
        began += time.monotonic() - fused_at  # the base is measured once: no part of what another attempt takes
        scores = self.score(place, job.suite, job.protocols, job.seeds)
        decision = decide(scores, base, job.gate, self.look_for_triggers(place))
        contributions = tuple(Contributed(c, self.norms[c.revision.pinned]) for c in chosen)
        report = tuple(describe_file(self.folder / file) for file in REPORT)
        self.longest = max(self.longest, time.monotonic() - began)
        backbone = describe_file(place / BACKBONE)
        return Candidate(str(place), recipe, contributions, weights, backbone, base, scores, decision, report)

    def recipe(self, chosen: Set) -> Recipe:
        """The recipe of the job's settings; clips to the bound of the whole batch, whatever part of it is chosen."""
        settings, inputs = self.job.fuse, tuple(Input(c.revision.pinned) for c in chosen)
        options = tuple(sorted(settings.options.items()))
        recipe = Recipe(self.job.base.pinned, inputs, settings.method, options, settings.scale)
        return clip(recipe, self.norms, self.bound) if settings.clip else recipe

    def fuse(self, recipe: Recipe, place: Path, more: Mapping[str, Path] | None = None) -> tuple[RemoteFile, ...]:
        """Fuse into ``place``, beside the base's own configuration and tokenizer; ``more`` adds folders by model."""
        from hubfusion.checkpoint import WEIGHTS_NAME, open_checkpoint
        from hubfusion.checkpoint.backbone import read_backbone, write_backbone
        from hubfusion.fuse import fuse

        folders = {**self.folders, **(more or {})}
        fused = fuse(recipe, self.base, [folders[each.model] for each in recipe.inputs], place)
        for file in self.base.rglob("*"):
            path = file.relative_to(self.base).as_posix()
            if file.is_file() and is_model_file(path) and not WEIGHTS_NAME.fullmatch(path):
                (place / path).parent.mkdir(exist_ok=True)
                (place / path).write_bytes(file.read_bytes())
        with open_checkpoint(self.base) as checkpoint:
            (place / BACKBONE).write_text(write_backbone(read_backbone(self.base, checkpoint)))
        return tuple(RemoteFile(f.name, f.size, "", f.sha256) for f in fused.files)

    def score(self, checkpoint: Path, suite: Suite, protocols: Sequence[Protocol], seeds: Sequence[int]) -> Scores:
        """Scores of a folder as a base, from the store or measured now."""
        from hubfusion.evaluate.engines.local import evaluate
        from hubfusion.evaluate.units import content_key

        key = content_key(checkpoint)
        return evaluate(checkpoint, key, suite, protocols, seeds, Path(self.job.store), on_event=log_progress)

    @cached_property
    def base_scores(self) -> Scores:
        """The base's scores: hashed and looked up once for all sets that are tried."""
        return self.score(self.base, self.job.suite, self.job.protocols, self.job.seeds)

    def look_for_triggers(self, place: Path) -> tuple[str, ...]:
        """The objections of the trigger scan, if the settings enable it."""
        if self.job.triggers is None:
            return ()
        from hubfusion.release.triggers import scan

        return scan(place, self.base, self.job.suite, self.job.triggers)

    def isolate(self, sound: Set, gains: Gains) -> tuple[Culprit, ...]:
        """Find contributions that the gate objects to, by trials within the job's limits; lowest gain first.

        A trial must leave time for what follows the last one: the candidate of the rest, and its leave-one-out gains.
        """

        def passes(chosen: tuple[int, ...]) -> bool | None:
            needed = 2 * self.longest + self.measuring
            if time.monotonic() - self.began + needed > 60 * self.job.minutes:
                log.warning("isolate: no time is left for another trial")
                return None
            try:
                decision = self.attempt(tuple(sound[i] for i in chosen), "trial").decision
            except RecipeError as error:  # too few inputs for the method
                log.warning("isolate: %d inputs cannot be tried: %s", len(chosen), error)
                return None
            self.trials[chosen] = decision
            return decision.promote

        settings = self.job.fuse
        suspicion = [-gains[c.revision] for c in sound] if gains else []
        culprits = isolate(len(sound), passes, settings.isolate, at_least=settings.at_least, suspicion=suspicion)
        shutil.rmtree(self.folder / "trial", ignore_errors=True)
        log.info("isolate: %d trials, %d contributions to blame", len(self.trials), len(culprits))
        return culprits

    def blame(self, sound: Set, culprit: Culprit, whole: Decision) -> Rejected:
        """The rejection of one: accepted without it, refused with it, and the gate's first words about that."""
        this, company = sound[culprit.number], len(culprit.company)
        refusal = self.trials.get(culprit.together, whole)
        why = " ".join(refusal.objections[:2])
        detail = f"the gate accepts {company} others without it and refuses them with it: {why}"
        return Rejected(this.revision, this.author, Reason.HARMFUL, detail)

    def leave_one_out_gains(self, chosen: Set, candidate: Candidate) -> Gains:
        """The gain of each input in points of mean score on the probe suite; empty without a probe suite."""
        from hubfusion.fuse.greedy_soup import leave_one_out_gains, left_out

        probe = self.job.probe
        if probe is None or len(chosen) < 2:
            return {}
        began, place = time.monotonic(), self.folder / "left-out"

        def mean(path: Path) -> float:
            return self.score(path, probe.suite, probe.protocols, probe.seeds).mean()

        def score(kept: Set) -> float:
            out = [c for c in chosen if c not in kept]
            if not out:
                return mean(Path(candidate.folder))
            rest = self.recipe(kept)
            short = left_out(candidate.recipe, rest, out[0].revision.pinned)
            self.fuse(short or rest, place, {"candidate": Path(candidate.folder)})
            return mean(place)

        try:
            gains = leave_one_out_gains(chosen, score)
            return {contribution.revision: gain for contribution, gain in gains.items()}
        except RecipeError as error:  # too few inputs for the method
            log.warning("leave one out: %s", error)
            return {}
        finally:
            self.measuring = time.monotonic() - began
            shutil.rmtree(place, ignore_errors=True)


def with_gains(candidate: Candidate, gains: Gains) -> Candidate:
    """The candidate with the leave-one-out gain of each contribution that has one."""
    measured = tuple(replace(c, leave_one_out_gain=gains.get(c.revision)) for c in candidate.contributions)
    return replace(candidate, contributions=measured)


def log_progress(event: Evaluated) -> None:
    """One line for each tenth of the units that had to be measured."""
    if not event.stored and event.done * 10 // event.total > (event.done - 1) * 10 // event.total:
        log.info("evaluate: %d of %d (%s by %s)", event.done, event.total, event.dataset, event.protocol)
