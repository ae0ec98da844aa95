"""Sound contributions on the bench: fuse a set, evaluate it, judge it, and find out whose fault a refusal is."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import median

from bot.worker import REPORT, Candidate, Job, Outcome
from hubfusion.data.suite import Suite
from hubfusion.errors import RecipeError
from hubfusion.evaluate.protocols import Protocol
from hubfusion.evaluate.scores import Scores
from hubfusion.evaluate.units import Evaluated
from hubfusion.lineage import Contribution, Reason, Recipe, Rejected, RemoteFile, divided_by
from hubfusion.release.gate import Decision, decide
from hubfusion.release.isolation import Culprit, Trial, isolate
from hubfusion.screen import Report, clip_bound, clip_factors

log = logging.getLogger(__name__)

NOT_THE_MODEL = ("README.md", "fusion.json", "model.sig", ".gitattributes", *REPORT)
Set = tuple[Contribution, ...]


class Bench:
    """One job's contributions and what was found out about sets of them.

    ``began`` is when the job began, on the monotonic clock: before the contributions were examined.
    """

    def __init__(self, job: Job, folder: Path, report: Report, began: float) -> None:
        self.job, self.folder, self.base = job, folder, Path(job.base_folder)
        self.folders = dict(zip((c.revision for c in job.contributions), map(Path, job.folders), strict=True))
        self.norms = {m.revision: m.norm for m in report.measures}
        factors = (1.0,) * len(report.accepted)
        self.bound = clip_bound(report, job.known_norms)
        if job.fuse.clip and job.fuse.clips_by_coefficients:
            factors = clip_factors(report, self.bound)
        self.factors = dict(zip(report.accepted, factors, strict=True))
        self.rejected = report.rejected
        self.trials: dict[tuple[int, ...], Decision] = {}
        self.began, self.longest, self.measuring = began, 0.0, 0.0

    def judge(self, sound: Set) -> Outcome:
        """The candidate of all of them; if the gate refuses it, of those that are left without the harmful ones."""
        candidate, decision = self.attempt(sound)
        worth = self.leave_one_out(sound, candidate) if decision.promote or self.job.fuse.isolate else ()
        culprits: tuple[Culprit, ...] = ()
        if not decision.promote and self.job.fuse.isolate:
            culprits = self.isolate(sound, worth)
        trials = tuple(Trial(tuple(sound[i].revision for i in chosen), d) for chosen, d in self.trials.items())
        if not culprits:
            return Outcome(sound, self.rejected, replace(candidate, leave_one_out=worth), trials)
        harmful = tuple(self.blame(sound, each, decision) for each in culprits)
        rest = tuple(c for i, c in enumerate(sound) if i not in {each.number for each in culprits})
        if len(rest) < self.job.fuse.at_least:
            return Outcome(rest, (*self.rejected, *harmful), None, trials)
        candidate, _ = self.attempt(rest)
        candidate = replace(candidate, leave_one_out=self.leave_one_out(rest, candidate))
        return Outcome(rest, (*self.rejected, *harmful), candidate, trials)

    def attempt(self, chosen: Set, name: str = "candidate") -> tuple[Candidate, Decision]:
        """Fuse a set into the folder ``name``, score it and its base, judge it."""
        from hubfusion.fuse import fuse

        job, recipe, place = self.job, self.recipe(chosen), self.folder / name
        began = time.monotonic()
        fused = fuse(recipe, self.base, [self.folders[r] for r in recipe.inputs], place)
        weights = tuple(RemoteFile(f.name, f.size, "", f.sha256) for f in fused.files)
        self.complete(place)
        fused_at, base = time.monotonic(), self.base_scores
        began += time.monotonic() - fused_at  # the base is measured once: no part of what another attempt takes
        scores = self.score(place, job.suite, job.protocols, job.seeds)
        candidate = Candidate(str(place), recipe, weights, base, scores, self.look_for_triggers(place))
        norms = tuple(self.norms[r] for r in recipe.inputs)
        report = tuple(describe_file(self.folder / file) for file in REPORT)
        candidate = replace(candidate, norms=norms, report=report)
        self.longest = max(self.longest, time.monotonic() - began)
        return candidate, decide(scores, base, job.gate, candidate.findings)

    def recipe(self, chosen: Set) -> Recipe:
        """The recipe of the job's policy; clipping to the bound of the whole batch, whatever part of it is chosen.

        A method that clips by its option does so to the median of what it is given. Where that is above the bound, the
        scale makes up for it: these methods give c times the result for c times the updates.
        """
        settings = self.job.fuse
        coefficients = tuple(self.factors[c.revision] for c in chosen)
        scale = settings.scale * divided_by(settings.method, coefficients)  # (1/k) Σ factor·τ is wanted
        options = dict(settings.options)
        if settings.clip and not settings.clips_by_coefficients:
            options["norm"] = "clip"
            scale *= min(1.0, self.bound / median(self.norms[c.revision] for c in chosen))
        inputs = tuple(c.revision for c in chosen)
        return Recipe(self.job.base, inputs, coefficients, settings.method, tuple(sorted(options.items())), scale)

    def complete(self, place: Path) -> None:
        """Put the base's own configuration and tokenizer beside the weights; nothing of a contribution."""
        for file in self.base.iterdir():
            if file.suffix not in (".safetensors", ".bin") and not file.name.endswith(".index.json"):
                if file.name not in NOT_THE_MODEL:
                    (place / file.name).write_bytes(file.read_bytes())

    def score(self, checkpoint: Path, suite: Suite, protocols: Sequence[Protocol], seeds: Sequence[int]) -> Scores:
        """Scores of a folder as a base, from the store or measured now."""
        from hubfusion.evaluate.units import content_key, evaluate

        key = content_key(checkpoint)
        return evaluate(checkpoint, key, suite, protocols, seeds, Path(self.job.store), on_event=log_progress)

    @cached_property
    def base_scores(self) -> Scores:
        """The base's scores: hashed and looked up once for all sets that are tried."""
        return self.score(self.base, self.job.suite, self.job.protocols, self.job.seeds)

    def look_for_triggers(self, place: Path) -> tuple[str, ...]:
        """What the trigger scan objects to, when the settings ask for it."""
        if self.job.triggers is None:
            return ()
        from hubfusion.release.triggers import scan

        return scan(place, self.base, self.job.suite, self.job.triggers)

    def isolate(self, sound: Set, worth: Sequence[float]) -> tuple[Culprit, ...]:
        """Whom the gate objects to, by trials within the job's number and time; the best guess is tried first.

        A trial must leave time for what follows the last one: the candidate of the rest, and what each of them adds.
        """

        def passes(chosen: tuple[int, ...]) -> bool | None:
            needed = 2 * self.longest + self.measuring
            if time.monotonic() - self.began + needed > 60 * self.job.minutes:
                log.warning("isolate: no time is left for another trial")
                return None
            try:
                _, decision = self.attempt(tuple(sound[i] for i in chosen), "trial")
            except RecipeError as error:  # too few inputs for the method
                log.warning("isolate: %d inputs cannot be tried: %s", len(chosen), error)
                return None
            self.trials[chosen] = decision
            return decision.promote

        settings = self.job.fuse
        suspicion = [-points for points in worth]
        found = isolate(len(sound), passes, settings.isolate, at_least=settings.at_least, suspicion=suspicion)
        shutil.rmtree(self.folder / "trial", ignore_errors=True)
        log.info("isolate: %d trials, %d contributions to blame", len(self.trials), len(found))
        return found

    def blame(self, sound: Set, culprit: Culprit, whole: Decision) -> Rejected:
        """The rejection of one: accepted without it, refused with it, and the gate's first words about that."""
        this, company = sound[culprit.number], len(culprit.company)
        refusal = self.trials.get(culprit.together, whole)
        why = " ".join(refusal.objections[:2])
        detail = f"the gate accepts {company} others without it and refuses them with it: {why}"
        return Rejected(this.revision, this.author, Reason.HARMFUL, detail)

    def leave_one_out(self, chosen: Set, candidate: Candidate) -> tuple[float, ...]:
        """Mean score of the candidate minus that without each input, in points; empty without a probe suite."""
        from hubfusion.fuse import Plan, fuse
        from hubfusion.fuse.greedy_soup import leave_one_out, left_out

        probe = self.job.probe
        if probe is None or len(chosen) < 2:
            return ()
        whole, began = Plan.of(candidate.recipe), time.monotonic()

        def mean(path: Path) -> float:
            scores = self.score(path, probe.suite, probe.protocols, probe.seeds)
            return sum(s.mean for s in scores) / len(scores.entries)

        def score(numbers: tuple[int, ...]) -> float:
            out = [i for i in range(len(chosen)) if i not in numbers]
            if not out:
                return mean(Path(candidate.folder))
            place = self.folder / "left-out"
            rest = Plan.of(self.recipe(tuple(chosen[i] for i in numbers)))
            inputs = [self.folders[c.revision] for c in chosen]
            short = left_out(whole, rest, out[0])
            if short is not None:
                fuse(short, self.base, [Path(candidate.folder), inputs[out[0]]], place)
            else:
                fuse(rest, self.base, [inputs[i] for i in numbers], place)
            self.complete(place)
            return mean(place)

        try:
            return leave_one_out(len(chosen), score)
        except RecipeError as error:  # too few inputs for the method
            log.warning("leave one out: %s", error)
            return ()
        finally:
            self.measuring = time.monotonic() - began
            shutil.rmtree(self.folder / "left-out", ignore_errors=True)


def describe_file(path: Path) -> RemoteFile:
    """A small file of ours as a manifest lists it, with git's own hash."""
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return RemoteFile(path.name, len(content), blob, hashlib.sha256(content).hexdigest())


def log_progress(event: Evaluated) -> None:
    """One line for each tenth of the units that had to be measured."""
    if not event.stored and event.done * 10 // event.total > (event.done - 1) * 10 // event.total:
        log.info("evaluate: %d of %d (%s by %s)", event.done, event.total, event.dataset, event.protocol)
