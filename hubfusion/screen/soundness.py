"""Check downloaded weights before a fuse, in one streaming pass over the base and all contributions, with numpy.

Benign task vectors of one base are small compared with it, nearly orthogonal between datasets (|cosine| ≤ 0.11, ≤ 0.28
for the same dataset) and differ up to 46-fold in norm, which grows with about the 0.45th power of the training examples
(*Knowledge is a Region in Weight Space*, arXiv 2302.04863, and its saved matrices). Contributions outside the
thresholds are rejected.
"""

from __future__ import annotations

import logging
import math
import secrets
import stat
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from hubfusion.checkpoint import INDEX, SINGLE, adapters, open_checkpoint
from hubfusion.checkpoint.backbone import read_backbone
from hubfusion.checkpoint.deltas import open_source
from hubfusion.errors import CheckpointError
from hubfusion.lineage import Contribution, Reason, Rejected, Revision
from hubfusion.screen.ancestry import Ancestry, find_ancestry
from hubfusion.screen.sketch import Signs
from hubfusion.screen.task_vectors import OnEntries, TaskVector, entries_of, kind_of, measure

log = logging.getLogger(__name__)
GROWTH = 0.45
Objection = tuple[Reason, str] | None


@dataclass(frozen=True, slots=True)
class Bounds:
    """Thresholds of the outlier checks, set outside the range measured on benign finetunes; ratios and cosines.

    ``unchanged`` and ``relative`` bound ‖τ‖/‖θ‖ of the base, ``band`` the norm against the batch's median after both
    were divided by examples^0.45, ``band_any`` without that. ``copy`` is a cosine for any two contributions,
    ``claim`` for two that declare different datasets, ``inverse`` for an opposite. ``share`` bounds the part of ‖τ‖²
    in one tensor, ``spread`` is the least effective number of moved entries, (Στ²)²/Στ⁴.
    """

    unchanged: float = 1e-7
    relative: float = 0.5
    band: float = 16.0
    band_any: float = 64.0
    copy: float = 0.9
    claim: float = 0.6
    inverse: float = -0.5
    share: float = 0.97
    spread: float = 16.0


@dataclass(frozen=True, slots=True)
class Measure:
    """What one contribution's task vector τ looks like; ``along`` is ⟨τ, θ⟩/‖θ‖², ``effective`` (Στ²)²/Στ⁴.

    ``shares`` maps each base parameter that moved to its part of ‖τ‖². ``kind`` says which part of the model was
    trained, ``nearest`` which base version is nearest, ``distances`` ‖θ_c − version‖ by tag.
    """

    revision: Revision
    author: str
    norm: float
    relative: float
    along: float
    largest: float
    effective: float
    kind: str
    shares: Mapping[str, float]
    nearest: str
    distances: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class SoundnessReport:
    """The batch: ``measures`` of those that could be read whole, oldest first, their ``cosines``, and the rejected.

    ``median`` is the median norm of the accepted (0.0 if there are none), ``entries`` the size of the base,
    ``seed`` the one that the sketches used.
    """

    measures: tuple[Measure, ...]
    cosines: tuple[tuple[float, ...], ...]
    rejected: tuple[Rejected, ...]
    median: float
    entries: int
    seed: int

    @property
    def accepted(self) -> tuple[Revision, ...]:
        """Accepted contributions, oldest first."""
        out = {r.revision for r in self.rejected}
        return tuple(m.revision for m in self.measures if m.revision not in out)


def examine(
    base: Path,
    contributions: Sequence[tuple[Contribution, Path]],
    *,
    tag: str = "current",
    versions: Mapping[str, Path] | None = None,
    known_norms: Sequence[float] = (),
    bounds: Bounds | None = None,
    seed: int | None = None,
    on_entries: OnEntries | None = None,
    screened: bool = True,
) -> SoundnessReport:
    """Measure and judge contributions (oldest first) in folders against the base in ``base``.

    ``versions`` are earlier releases by tag, ``known_norms`` norms accepted before, ``tag`` the base's own tag. The
    sketches draw a secret seed unless one is given. ``on_entries(done, all)`` reports progress. What does not match the
    base was exchanged after screening; without ``screened`` it gets the reason that screening gives. Raises
    `CheckpointError` only for the base and its versions; what is wrong with a contribution is in the report.
    """
    bounds, seed = bounds or Bounds(), secrets.randbits(63) if seed is None else seed
    vectors: dict[int, TaskVector] = {}
    earlier: dict[str, TaskVector] = {}
    objections: dict[int, tuple[Reason, str]] = {}
    with ExitStack() as stack:
        ours = stack.enter_context(open_checkpoint(base))
        backbone = read_backbone(base, ours)
        for number, (_, folder) in enumerate(contributions):
            try:
                _check_folder(folder)
                vectors[number] = TaskVector(stack.enter_context(open_source(folder, ours, backbone)))
            except CheckpointError as error:
                changed = (Reason.CORRUPT, f"not what was screened: {error}")
                objections[number] = changed if screened else (_unscreened_reason(folder), str(error))
        for name, folder in (versions or {}).items():
            earlier[name] = TaskVector(stack.enter_context(open_source(folder, ours, backbone)))
        size = measure(ours, backbone, [*vectors.values(), *earlier.values()], Signs(seed), on_entries)
        whole = {n: v for n, v in vectors.items() if not v.bad}
        origins = find_ancestry(ours, backbone, list(whole.values()), earlier, tag, seed)
    if broken := next(((n, v.bad) for n, v in earlier.items() if v.bad), None):
        raise CheckpointError(f"version {broken[0]}: {broken[1][1]}")
    objections |= {n: v.bad for n, v in vectors.items() if v.bad}
    measures = {
        n: _describe(contributions[n][0], vector, size, kind_of(vector, backbone), origin)
        for (n, vector), origin in zip(whole.items(), origins, strict=True)
    }
    entries = entries_of({n: ours.parameters[n] for n in backbone.parameters})
    for n, each in measures.items():
        if objection := _judge_one(each, entries, tag, bounds):
            objections[n] = objection
    cosines = _cosines([v.sketch for v in whole.values()])
    _judge_pairs([c for c, _ in contributions], list(whole), cosines, objections, bounds, tag)
    standing = {n: m for n, m in measures.items() if n not in objections}
    _judge_band(standing, [c for c, _ in contributions], known_norms, objections, bounds)
    left = [m.norm for n, m in measures.items() if n not in objections]
    rejected = tuple(
        Rejected(c.revision, c.author, *objections[n]) for n, (c, _) in enumerate(contributions) if n in objections
    )
    log.info("soundness: %d examined, %d rejected", len(contributions), len(rejected))
    rows = tuple(tuple(round(float(x), 6) for x in row) for row in cosines)
    return SoundnessReport(tuple(measures.values()), rows, rejected, median(left) if left else 0.0, entries, seed)


def _check_folder(folder: Path) -> None:
    """Refuse links, pipes and devices: a download must be plain files of one checkpoint."""
    for path in sorted(folder.iterdir()):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise CheckpointError(f"{path.name} is not a regular file")
    if (folder / SINGLE).exists() and (folder / INDEX).exists():
        raise CheckpointError(f"{SINGLE} and {INDEX} are both there")


def _unscreened_reason(folder: Path) -> Reason:
    """What screening calls a folder that does not match the base: its adapter's options, its weights or their names."""
    is_adapter = (folder / adapters.CONFIG).is_file()
    try:
        if is_adapter:
            adapters.parse_config((folder / adapters.CONFIG).read_bytes())
    except CheckpointError:
        return Reason.ADAPTER
    try:
        _check_folder(folder)
        with open_checkpoint(folder, adapters.WEIGHTS if is_adapter else SINGLE):
            return Reason.ARCHITECTURE
    except CheckpointError:
        return Reason.BAD_FILES


def _describe(contribution: Contribution, vector: TaskVector, size: float, kind: str, origin: Ancestry) -> Measure:
    total = math.fsum(vector.squares.values())
    return Measure(
        contribution.revision,
        contribution.author,
        norm=vector.norm,
        relative=vector.norm / math.sqrt(size) if size else math.inf,
        along=vector.along / size if size else 0.0,
        largest=vector.largest,
        effective=vector.effective,
        kind=kind,
        shares={name: square / total for name, square in vector.squares.items()},
        nearest=origin.nearest,
        distances=origin.distances,
    )


def _judge_one(each: Measure, entries: int, tag: str, bounds: Bounds) -> Objection:
    """Checks of a single task vector."""
    if each.norm == 0.0:
        return Reason.UNCHANGED, f"the backbone equals {tag}: only a head was trained, or nothing"
    if each.relative < bounds.unchanged:
        return Reason.UNCHANGED, f"‖τ‖ is {each.relative:.1e} of the base's norm: as good as unchanged"
    if each.nearest != tag:
        near = each.distances.get(each.nearest, math.inf)
        why = f"made from {each.nearest} (distance {near:.3g}), not from {tag} ({each.norm:.3g})"
        return Reason.WRONG_BASE, f"{why}; finetune {tag} again"
    if each.along < -0.5 and 0.5 < math.sqrt(max(0.0, 1 + 2 * each.along + each.relative**2)) < 2:
        return Reason.WRONG_BASE, "shares nothing with the base: finetuned from another pretraining run"
    if each.relative > bounds.relative:
        return Reason.OUTLIER, f"‖τ‖ is {each.relative:.3g} of the base's norm, at most {bounds.relative} is plausible"
    if each.effective < bounds.spread:
        return Reason.CONCENTRATED, f"about {each.effective:.1f} of {entries} entries hold the whole change"
    name, share = max(each.shares.items(), key=lambda item: item[1])
    if share > bounds.share:
        return Reason.CONCENTRATED, f"{share:.1%} of the change is in {name} alone, at most {bounds.share:.0%}"
    return None


def _judge_pairs(
    contributions: Sequence[Contribution],
    numbers: Sequence[int],
    cosines: NDArray[np.float64],
    objections: dict[int, tuple[Reason, str]],
    bounds: Bounds,
    tag: str,
) -> None:
    """Copies and opposites: the oldest stays. Compared with those that stand and with those out for their size."""
    for j, number in enumerate(numbers):
        this = contributions[number]
        for i, other in enumerate(numbers[:j]):
            if number in objections or (other in objections and objections[other][0] is not Reason.OUTLIER):
                continue
            cosine, older = float(cosines[i, j]), contributions[other]
            disjoint = bool(this.datasets and older.datasets) and not set(this.datasets) & set(older.datasets)
            if cosine > bounds.copy:
                same = (
                    "the same weights as" if cosine > 0.999999 else f"nearly the same update (cosine {cosine:.3f}) as"
                )
                objections[number] = (Reason.DUPLICATE, f"{same} {older.revision}, which was first")
            elif cosine > bounds.claim and disjoint:
                why = f"cosine {cosine:.3f} with {older.revision}, though both declare other data"
                objections[number] = (Reason.DUPLICATE, why)
            elif cosine < bounds.inverse:
                objections[number] = (Reason.INVERSE, f"undoes {older.revision} (cosine {cosine:.3f})")


def _judge_band(
    standing: Mapping[int, Measure],
    contributions: Sequence[Contribution],
    known_norms: Sequence[float],
    objections: dict[int, tuple[Reason, str]],
    bounds: Bounds,
) -> None:
    """Norms far from the batch's; needs three to speak of a median."""
    norms = [*known_norms, *(m.norm for m in standing.values())]
    if len(norms) < 3:
        return
    usual = median(norms)
    scaled = {n: m.norm / e**GROWTH for n, m in standing.items() if (e := contributions[n].examples)}
    typical = median(scaled.values()) if len(scaled) >= 3 else 0.0
    for n, each in standing.items():
        if not 1 / bounds.band_any <= each.norm / usual <= bounds.band_any:
            limit = f"the median of the batch is {usual:.3g}, {bounds.band_any:g}-fold is allowed"
            objections[n] = (Reason.OUTLIER, f"‖τ‖ is {each.norm:.3g}; {limit}")
        elif n in scaled and typical and scaled[n] / typical > bounds.band:
            expected = each.norm / scaled[n] * typical
            why = f"‖τ‖ is {each.norm:.3g}, for {contributions[n].examples} examples about {expected:.3g} is usual"
            objections[n] = (Reason.OUTLIER, f"{why}, {bounds.band:g}-fold is allowed")


def _cosines(sketches: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """All cosines (N, N), from the sketches; 0 where a vector is zero or too large."""
    if not sketches:
        return np.zeros((0, 0))
    rows = np.stack(sketches)
    with np.errstate(all="ignore"):
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    rows[~np.isfinite(rows).all(axis=1)] = 0.0
    cosines: NDArray[np.float64] = np.clip(rows @ rows.T, -1.0, 1.0)
    return cosines
