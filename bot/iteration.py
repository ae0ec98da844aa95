"""One iteration of the pipeline; read `run_iteration` first.

Every run starts by completing what an earlier run left unfinished (`settle`), and derives its state from the Hub: the
base and its tags, the ledger, the finetunes. A run may be killed at any point. Before the release commit nothing has
changed; after it, the next run finds the commit by its nonce, tags it, records it in the ledger, ranks it and answers
the owners. When two runs act at once, the Hub accepts only one commit on top of the parent that both started from.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from bot.config import Config, read_plan
from bot.dispatch import dispatch
from bot.job import Candidate, CandidateJob, Downloaded, Outcome, Probe
from bot.ledger import Accepted, Event, Judged, Promoted, Refused, append, read_ledger
from bot.notify import deliver, pending_answers
from hubfusion.errors import Conflict, Corrupt, HubError, NotFound
from hubfusion.evaluate.results import pull, push
from hubfusion.evaluate.units import content_key, plan_units
from hubfusion.hub import Hub
from hubfusion.hub.cards import read_card
from hubfusion.lineage import Contribution, Finetune, Reason, Rejected, Revision
from hubfusion.release.card import base_card
from hubfusion.release.gate import Decision
from hubfusion.release.isolation import Trial
from hubfusion.release.manifest import Manifest, describe_environment
from hubfusion.release.publish import (
    Release,
    current_release,
    fetch_release,
    finish_release,
    manifest_at,
    plan_release,
    publish,
    sign_release,
    weight_hashes,
)
from hubfusion.release.ranking import rank
from hubfusion.release.signature import Keyless
from hubfusion.screen import apply_caps, read_base, screen
from hubfusion.screen.crawl import crawl

log = logging.getLogger(__name__)


class Verdict(StrEnum):
    """How a run ended."""

    NOTHING_NEW = "nothing new"
    WAITING = "waiting for more contributions"
    PLANNED = "would be promoted"
    REFUSED = "refused by the gate"
    PROMOTED = "promoted"
    LOST_RACE = "lost the race: another run moved the base first, nothing was published"


@dataclass(frozen=True, slots=True)
class Run:
    """A run's surroundings: ``hub`` is ours to write to, ``reader`` has no token and reads untrusted repositories.

    ``nonce`` is unique to the run; ``poll`` is called at step boundaries and may raise to stop there. Releases are
    signed by ``signer`` (a private key's file, or keylessly) when there is one.
    """

    config: Config
    hub: Hub
    reader: Hub
    nonce: str
    poll: Callable[[], None] = lambda: None
    signer: Path | Keyless | None = None


@dataclass(frozen=True, slots=True)
class Iteration:
    """What one run read and decided; ``version`` is the base's next version until it is promoted to that.

    ``trials`` are the sets that were tried to isolate harmful contributions, ``leave_one_out_gains`` in points.
    """

    number: int
    verdict: Verdict
    parent_version: str
    version: str
    contributions: tuple[Contribution, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    decision: Decision | None = None
    trials: tuple[Trial, ...] = ()
    leave_one_out_gains: Mapping[Revision, float] = field(default_factory=dict)


def run_iteration(run: Run, *, act: bool) -> Iteration:
    """Crawl → screen → fuse → evaluate → gate → publish → rank → notify; without ``act`` the Hub is only read."""
    config = run.config
    if act:
        settle(run)
    release = current_release(run.hub, config.base)
    ledger = read_ledger(run.hub, config.ledger)
    seen = Iteration(ledger.next_iteration, Verdict.NOTHING_NEW, release.version, release.next_version)
    run.poll()
    finetunes = crawl(run.reader, config.base, ledger.judged)
    contributions, rejected = judge(run, release, finetunes)
    if not contributions and not rejected:
        return seen
    outcome, unsound = fuse_and_evaluate(run, release, contributions)
    seen = replace(seen, contributions=outcome.contributions, rejected=rejected + unsound, trials=outcome.trials)
    if act:
        remember(run, (Judged(r.revision, r.author, r.reason, r.detail, seen.number) for r in seen.rejected))
    if outcome.candidate is None:
        seen = replace(seen, verdict=Verdict.WAITING if outcome.contributions else Verdict.NOTHING_NEW)
    else:
        decision = outcome.candidate.decision
        verdict = Verdict.PLANNED if decision.promote else Verdict.REFUSED
        seen = replace(seen, decision=decision, verdict=verdict, leave_one_out_gains=gains_of(outcome.candidate))
    if act:
        seen = promote_or_refuse(run, release, seen, outcome)
        if seen.verdict is not Verdict.LOST_RACE:  # the winner settles its own release; both at once would answer twice
            settle(run)
        if outcome.candidate is not None:
            share_scores(run, outcome.candidate)
            tidy(run, outcome)
    return seen


def gains_of(candidate: Candidate) -> dict[Revision, float]:
    """The leave-one-out gains that were measured."""
    gains = {each.revision: each.leave_one_out_gain for each in candidate.contributions}
    return {revision: gain for revision, gain in gains.items() if gain is not None}


def judge(
    run: Run, release: Release, finetunes: tuple[Finetune, ...]
) -> tuple[tuple[Contribution, ...], tuple[Rejected, ...]]:
    """Screen every finetune from its metadata and headers; those beyond the caps wait or are rejected."""
    if not finetunes:
        return (), ()
    base = read_base(run.reader, release.revision, release.version, {**release.versions, release.head: release.version})
    contributions: list[Contribution] = []
    rejected: list[Rejected] = []
    for finetune in finetunes:
        run.poll()
        try:
            verdict = screen(run.reader, finetune, base, run.config.screen)
        except NotFound as error:
            log.warning("screen: %s vanished: %s", finetune.revision, error)
            continue
        if isinstance(verdict, Rejected):
            rejected.append(verdict)
        else:
            contributions.append(verdict)
    accepted, capped = apply_caps(contributions, run.config.screen)
    log.info("screen: %d contributions, %d rejected", len(accepted), len(rejected) + len(capped))
    return tuple(accepted), (*rejected, *capped)


def fuse_and_evaluate(
    run: Run, release: Release, contributions: tuple[Contribution, ...]
) -> tuple[Outcome, tuple[Rejected, ...]]:
    """Download what was screened, by its pinned commit and listed hash, and let the worker do the rest."""
    if not contributions:
        return Outcome((), ()), ()
    work = Path(run.config.work).absolute()
    base = fetch_release(run.reader, release, work / "base" / release.revision.sha)
    fetched, corrupt = [], []
    for contribution in contributions:
        run.poll()
        try:
            for file in contribution.files:
                run.reader.download(contribution.revision, file, _folder(work, contribution.revision) / file.path)
        except Corrupt as error:
            corrupt.append(Rejected(contribution.revision, contribution.author, Reason.CORRUPT, str(error)))
        except NotFound as error:
            log.warning("download: %s vanished: %s", contribution.revision, error)
        else:
            fetched.append(contribution)
    log.info("download: %d contributions, %d corrupt", len(fetched), len(corrupt))
    if len(fetched) < run.config.fuse.at_least:
        return Outcome(tuple(fetched), ()), tuple(corrupt)
    suite, protocols = read_plan(run.config.evaluate)
    units = plan_units(content_key(base), suite, protocols, run.config.evaluate.seeds)
    pull(run.reader, run.config.ranking, units, work / "scores")
    probe = run.config.leave_one_out
    job = CandidateJob(
        base=release.revision,
        base_tag=release.version,
        base_folder=str(base),
        inputs=tuple(Downloaded(c, str(_folder(work, c.revision))) for c in fetched),
        fuse=run.config.fuse,
        suite=suite,
        protocols=protocols,
        seeds=run.config.evaluate.seeds,
        store=str(work / "scores"),
        gate=run.config.gate,
        minutes=run.config.deadline_minutes,
        versions=fetch_versions(run, release, work),
        known_norms=known_norms(run, release),
        probe=Probe(*read_plan(probe), probe.seeds) if probe else None,
        triggers=run.config.triggers,
    )
    outcome = dispatch(job, work, run.config.deadline_minutes, run.poll)
    return outcome, (*corrupt, *outcome.rejected)


def fetch_versions(run: Run, release: Release, work: Path) -> dict[str, str]:
    """Folders of the weights of earlier versions, by tag, to find the version that a contribution is nearest to.

    A version with the base's own weights (it was rolled back to them) is left out.
    """
    folders = {}
    wanted = release.before(run.config.examine.versions)
    ours = weight_hashes(run.reader, release.revision) if wanted else {}
    for earlier in wanted:
        run.poll()
        if weight_hashes(run.reader, earlier.revision) == ours:
            continue
        folders[earlier.version] = str(fetch_release(run.reader, earlier, work / "earlier" / earlier.revision.sha))
    return folders


def known_norms(run: Run, release: Release) -> tuple[float, ...]:
    """Norms of the task vectors that the newest versions were made of, from their manifests alone."""
    newest = [release, *release.before(run.config.examine.history)][: run.config.examine.history]
    manifests = (manifest_at(run.reader, each.revision) for each in newest)
    return tuple(each.norm for manifest in manifests if manifest for each in manifest.contributions)


def promote_or_refuse(run: Run, release: Release, seen: Iteration, outcome: Outcome) -> Iteration:
    """Act on the gate's decision: publish the candidate, or note the refusal and leave ``main`` as it is."""
    if outcome.candidate is None:
        return seen
    decision, revisions = outcome.candidate.decision, tuple(c.revision for c in seen.contributions)
    if not decision.promote:
        said = (decision.objections, decision.summary, seen.trials)
        remember(run, [Refused(seen.number, release.revision, revisions, *said)])
        return seen
    run.poll()
    manifest = Manifest(
        iteration=seen.number,
        version=seen.version,
        parent_version=seen.parent_version,
        nonce=run.nonce,
        recipe=outcome.candidate.recipe,
        contributions=outcome.candidate.contributions,
        weights=outcome.candidate.weights,
        backbone=outcome.candidate.backbone,
        seen=seen_datasets(run, release, seen.contributions),
        base_scores=outcome.candidate.base_scores,
        candidate_scores=outcome.candidate.candidate_scores,
        decision=decision,
        environment=describe_environment(),
        trials=outcome.trials,
        report=outcome.candidate.report,
    )
    card = base_card(read_card(run.hub, release.revision), manifest, run.config.base, run.hub.endpoint)
    candidate = Path(outcome.candidate.folder)
    change = plan_release(run.hub, release, manifest, candidate, card)
    try:
        if not candidate.is_dir():
            raise Conflict(f"{run.config.work}: another run with this work folder came to its decision first")
        if run.signer:
            change = sign_release(run.hub, release, change, candidate.parent / "signed", run.signer)
        publish(run.hub, run.config.base, change, seen.version)
    except Conflict as error:
        log.warning("publish: %s", error)
        return replace(seen, verdict=Verdict.LOST_RACE)
    return replace(seen, verdict=Verdict.PROMOTED)


def seen_datasets(run: Run, release: Release, contributions: tuple[Contribution, ...]) -> tuple[str, ...]:
    """Names of the suite's datasets that these contributions, or those of an earlier version, were trained on."""
    before = manifest_at(run.hub, release.revision)
    trained_on = {dataset.lower() for c in contributions for dataset in c.datasets}
    suite, _ = read_plan(run.config.evaluate)
    now = {d.name for d in suite.datasets if d.repo.lower() in trained_on}
    return tuple(sorted(now | set(before.seen if before else ())))


def settle(run: Run) -> None:
    """Bring ledger, ranking and answers in line with what the base repository says; a settled Hub is left untouched."""
    config = run.config
    finish_release(run.hub, config.base)
    run.poll()
    release = current_release(run.hub, config.base)
    manifest = manifest_at(run.hub, release.revision)
    if manifest is not None:
        accepted = tuple(Accepted(each.revision, each.leave_one_out_gain) for each in manifest.contributions)
        remember(run, [Promoted(manifest.iteration, manifest.version, release.revision.sha, accepted)])
        rank(run.hub, config.ranking, release.revision, manifest, run.nonce)
    run.poll()
    answers = list(pending_answers(read_ledger(run.hub, config.ledger), config.base, run.hub.endpoint))
    if answers:
        remember(run, deliver(run.hub, answers))
        log.info("notify: %d contributors answered", len(answers))


def share_scores(run: Run, candidate: Candidate) -> None:
    """Store scores beside the ranking, so that the next run need not measure its base again on any machine."""
    suite, protocols = read_plan(run.config.evaluate)
    units = plan_units(candidate.base_scores.model, suite, protocols, run.config.evaluate.seeds)
    for model in (candidate.base_scores.model, candidate.candidate_scores.model):
        mine = [replace(unit, model=model) for unit in units]
        try:
            push(run.hub, run.config.ranking, mine, Path(run.config.work) / "scores")
        except HubError as error:
            log.warning("results: not written: %s", error)


def tidy(run: Run, outcome: Outcome) -> None:
    """Remove downloads, base and candidate of an iteration that came to a decision; the scores stay."""
    if outcome.candidate is not None:
        shutil.rmtree(Path(outcome.candidate.folder).parent, ignore_errors=True)
        base = Revision.parse(outcome.candidate.recipe.base)
        shutil.rmtree(Path(run.config.work) / "base" / base.sha, ignore_errors=True)
        shutil.rmtree(Path(run.config.work) / "earlier", ignore_errors=True)
    for revision in (*(c.revision for c in outcome.contributions), *(r.revision for r in outcome.rejected)):
        shutil.rmtree(_folder(Path(run.config.work), revision), ignore_errors=True)


def remember(run: Run, events: Iterable[Event]) -> None:
    """Append events to the ledger; the commit's title counts them by kind."""
    events = list(events)
    if events:
        kinds = sorted({e.event for e in events})
        title = f"{', '.join(f'{sum(e.event == k for e in events)} {k}' for k in kinds)}"
        append(run.hub, run.config.ledger, events, nonce=f"{run.nonce}-{'-'.join(kinds)}", title=title)


def _folder(work: Path, revision: Revision) -> Path:
    return work / "models" / revision.repo.replace("/", "--") / revision.sha
