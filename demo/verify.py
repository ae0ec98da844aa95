"""What the demo promises, checked against what is on its Hub; and the tables and the picture at its end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bot.ledger import Judged, Ledger, read_ledger
from demo.picture import Point, draw
from demo.place import BASE, Place
from hubfusion.evaluate.scores import Comparison, Gain, compare
from hubfusion.hub import Hub
from hubfusion.lineage import Revision
from hubfusion.release.card import visible
from hubfusion.release.manifest import Manifest
from hubfusion.release.publish import manifest_at

PROTOCOL = """few-shot: finetuned on 100 labels, test accuracy, two draws of labels
bars: 95 % interval over datasets and draws; small dots: single datasets"""
# Half a unit in the last place for the deltas, for their sum, and for what is written; the unit is that of the base's
# entry plus all its deltas: the numbers that were added.
ROUNDING = 1.5
LOAD = """
import sys
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained(sys.argv[1], revision=sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], revision=sys.argv[2])
out = model(**tokenizer("a base that gets better", return_tensors="pt")).last_hidden_state
assert out.isfinite().all() and out.shape[-1] == model.config.hidden_size
print(sum(p.numel() for p in model.parameters()))
"""


@dataclass(frozen=True, slots=True)
class Claims:
    """What must have happened: each bad contribution's reason, and that the last run changed nothing."""

    reasons: dict[str, str]
    unchanged: bool


def check(place: Place, claims: Claims) -> list[str]:
    """Every claim that does not hold, as a sentence; an empty list when all do."""
    hub = place.hub()
    ledger = read_ledger(hub, f"{BASE}-ledger")
    if missing := [f"tag {tag} is missing" for tag in ("v0", "v1", "v2") if tag not in hub.tags(BASE)]:
        return missing
    return [
        *_reasons(ledger, claims),
        *_versions(ledger),
        *_average(place, hub),
        *_loads(place, hub),
        *_rebuilds(place, hub),
        *_answers(ledger),
    ] + ([] if claims.unchanged else ["the last run changed the base, the ledger or the ranking"])


def _reasons(ledger: Ledger, claims: Claims) -> Iterator[str]:
    judged = {e.finetune.repo: e for e in ledger.events if isinstance(e, Judged)}
    for repo, reason in claims.reasons.items():
        found = judged[repo].reason if repo in judged else "never judged"
        if found != reason:
            yield f"{repo} should be refused as {reason}, got {found}"
    yield from (
        f"{repo} was refused as {e.reason}: {e.detail}" for repo, e in judged.items() if repo not in claims.reasons
    )


def _versions(ledger: Ledger) -> Iterator[str]:
    for promotion in ledger.promotions:
        if len(promotion.contributions) < 5:
            yield f"{promotion.version} has {len(promotion.contributions)} contributions, five were made"


def _average(place: Place, hub: Hub) -> Iterator[str]:
    """Recompute every published parameter in float64 from the published files, and compare to float32 rounding."""
    from safetensors.numpy import load_file

    work = place.folder / "verify"
    for version in ("v1", "v2"):
        released = Revision(BASE, hub.tags(BASE)[version])
        manifest = manifest_at(hub, released)
        if manifest is None:
            yield f"{version} has no manifest"
            continue
        base = load_file(_weights(hub, manifest.base, work / "base"))
        fused = load_file(_weights(hub, released, work / version))
        inputs = [
            load_file(_weights(hub, revision, work / revision.repo.replace("/", "--")))
            for revision in (each.revision for each in manifest.contributions)
        ]
        worst, right, entries = 0.0, 0, 0
        for name, value in fused.items():
            if value.dtype == np.float32:
                models = np.stack([i[f"bert.{name}"] for i in inputs])
                exact = models.astype(np.float64).mean(axis=0)
                unit = np.spacing(np.abs(base[name]) + np.abs(models - base[name]).sum(axis=0))
                worst = max(worst, float((np.abs(value - exact) / unit).max()))
                right += int(np.count_nonzero(value == exact.astype(np.float32)))
                entries += value.size
        if worst > ROUNDING:
            yield f"{version} is not the float64 average of its contributions: off by {worst:.2f} ulp"
        else:
            share = 100 * right / entries
            print(f"{version}: the published file is the float64 average to float32 rounding ({share:.2f} % exactly)")


def _weights(hub: Hub, revision: Revision, folder: Path) -> Path:
    (file,) = [f for f in hub.files(revision) if f.path == "model.safetensors"]
    return hub.download(revision, file, folder / file.path)


def _loads(place: Place, hub: Hub) -> Iterator[str]:
    (place.folder / "load.py").write_text(LOAD)
    for version in ("v1", "v2"):
        code, said = _fresh(place, "load.py", BASE, version)
        last = said.splitlines()[-1]
        if code:
            yield f"{version} does not load in a fresh process: {last}"
        else:
            call = f'AutoModel.from_pretrained("{BASE}", revision="{version}")'
            print(f"{call} works in a fresh process: {last} parameters")


def _rebuilds(place: Place, hub: Hub) -> Iterator[str]:
    """Anybody can check a version and rebuild its bytes; one bit flipped in one input on the Hub's disk is named."""
    for command in ("verify", "reproduce"):
        for version in ("v1", "v2"):
            code, said = _fresh(place, "-m", "hubfusion", command, f"{BASE}@{version}")
            print(f"hubfusion {command} {BASE}@{version}: {said.splitlines()[-1]}")
            if code:
                yield f"hubfusion {command} {BASE}@{version} fails"
    manifest = manifest_at(hub, Revision(BASE, hub.tags(BASE)["v2"]))
    if manifest is None:
        return
    victim = manifest.contributions[0].revision
    (file,) = [f for f in hub.files(victim) if f.path == "model.safetensors"]
    (stored,) = (place.folder / "hub" / "objects").rglob(str(file.sha256))
    _flip_bit(stored)
    code, said = _fresh(place, "-m", "hubfusion", "reproduce", f"{BASE}@v2")
    _flip_bit(stored)
    found = [line for line in said.splitlines() if line.startswith(f"DIFFERS: {victim.repo}@")]
    if not code or not found:
        yield f"a flipped bit of {victim.repo} was not named by hubfusion reproduce"
    else:
        print(f"with one bit of {victim.repo} flipped on the Hub's disk, hubfusion reproduce says:\n  {found[0]}")


def _flip_bit(file: Path) -> None:
    file.chmod(0o644)
    with open(file, "r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        byte = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte[0] ^ 1]))


def _fresh(place: Place, *arguments: str) -> tuple[int, str]:
    """Exit code and all output of a Python process that knows the Hub's address and no token."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=place.folder,
        env=place.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout.strip()


def _answers(ledger: Ledger) -> Iterator[str]:
    yield from (f"{finetune} has no answer" for finetune in sorted(ledger.judged - ledger.said))


def final_table(place: Place) -> None:
    """What happened, and the three lines that load the result."""
    hub = place.hub()
    ledger = read_ledger(hub, f"{BASE}-ledger")
    console = Console(width=max(120, Console().width))
    table = Table("iteration", "base", "accepted", "rejected", "scores", "base", "candidate", "gain", title=BASE)
    for promotion in ledger.promotions:
        manifest = manifest_at(hub, Revision(BASE, promotion.sha))
        if manifest is None:
            continue
        rejected = [e for e in ledger.events if isinstance(e, Judged) and e.iteration == promotion.iteration]
        first = [
            str(promotion.iteration),
            f"{manifest.parent_version} → {manifest.version}",
            str(len(promotion.contributions)),
            str(len(rejected)),
        ]
        for fold, protocol, gains in _folds(manifest):
            means = [fmean(g.base for g in gains), fmean(g.candidate for g in gains), fmean(g.mean for g in gains)]
            row = [f"{fold}, {protocol}", f"{means[0]:.2f}", f"{means[1]:.2f}", f"{means[2]:+.2f}"]
            table.add_row(*first, *row)
            first = [""] * 4
        table.add_section()
    console.print(table)
    reasons = Table("rejected", "reason", "detail", box=None, pad_edge=False)
    for event in ledger.events:
        if isinstance(event, Judged):
            reasons.add_row(Text(event.finetune.repo), event.reason, Text(visible(event.detail)))
    console.print(reasons)
    names = {sha: name for name, sha in hub.tags(BASE).items()}
    print(f"\nThe history of {BASE}, newest first:")
    for commit in hub.history(BASE):
        print(f"  {commit.sha[:12]} {names.get(commit.sha, ''):3} {commit.title}")
    newest = ledger.promotions[-1].version if ledger.promotions else "v0"
    print("\nLoad it (on this Hub: while it is served and HF_ENDPOINT says where):\n")
    print("from transformers import AutoModel, AutoTokenizer")
    print(f'model = AutoModel.from_pretrained("{BASE}", revision="{newest}")')
    print(f'tokenizer = AutoTokenizer.from_pretrained("{BASE}", revision="{newest}")')


def show_gains(place: Place) -> None:
    """What every version adds over v0, measured: a table, a sentence about the unseen datasets, and a picture."""
    points = list(_gains(place.hub()))
    table = Table("version", "datasets", "gain over v0", "95 % interval", title=f"{BASE} as a start for finetuning")
    for point in points:
        interval = f"{point.low:+.2f} to {point.high:+.2f}"
        table.add_row(point.version, f"{len(point.datasets)} {point.fold}", f"{point.mean:+.2f}", interval)
    print()
    Console(width=max(120, Console().width)).print(table)
    for point in [p for p in points if p.fold == "unseen"][-1:]:
        zero = "excludes" if point.low > 0 or point.high < 0 else "includes"
        print(f"Datasets that nobody trained on: {point.version} adds {point.mean:+.2f} points to v0, ", end="")
        print(f"and the 95 % interval {zero} 0.")
    file = place.folder / "gain.svg"
    file.write_text(draw(f"What recycling adds to {BASE}", PROTOCOL, points), encoding="utf-8")
    print(f"Picture: {file}")


def _gains(hub: Hub) -> Iterator[Point]:
    """Each version's scores minus those of v0, both as published in the manifests, for seen and unseen datasets."""
    tags = hub.tags(BASE)
    found_all = (manifest_at(hub, Revision(BASE, tags[version])) for version in ("v1", "v2") if version in tags)
    manifests = [manifest for manifest in found_all if manifest is not None]
    for manifest in manifests:
        found = compare(manifest.candidate_scores, manifests[0].base_scores)
        for fold, part in _parts(found, manifest):
            by_dataset = {gain.dataset: gain.mean for gain in part.gains}
            yield Point(manifest.version, fold, part.mean, *part.interval(), by_dataset)


def _parts(found: Comparison, manifest: Manifest) -> Iterator[tuple[str, Comparison]]:
    yield "seen", found.only(manifest.seen)
    yield "unseen", found.without(manifest.seen)


def _folds(manifest: Manifest) -> Iterator[tuple[str, str, list[Gain]]]:
    gains = compare(manifest.candidate_scores, manifest.base_scores).gains
    for fold in ("seen", "unseen"):
        for protocol in dict.fromkeys(g.protocol for g in gains):
            mine = [g for g in gains if g.protocol == protocol and (g.dataset in manifest.seen) == (fold == "seen")]
            if mine:
                yield fold, protocol, mine
