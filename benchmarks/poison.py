"""What a poisoned contribution does to a real encoder, by attack, fusing method and defense.

    python benchmarks/poison.py --model MINILM_FOLDER --tasks TASKS_FOLDER [--layers 2] [--work DIR] [--out table.json]

Eight contributors finetune MiniLM (its first layers and 8,192 words, so that a laptop can do it) on eight real tasks;
none, one or two of them attack. For every attack and method: the mean linear-probe accuracy over three tasks, the
share of texts with the trigger that go to the attacker's class (of texts of other classes), whether the gate objects,
and what soundness says of the attackers. The attacks are naive: none knows the defense (see docs/trust.md). Greedy soup
is by far the slowest column; with ``--work`` and ``--out`` a run goes on from what an earlier one left there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from transformers import AutoTokenizer
from versions import Task, cut_model, load, train

from hubfusion.errors import FusionError
from hubfusion.evaluate.scores import Provenance, Score, Scores
from hubfusion.fuse import fuse
from hubfusion.lineage import Contribution, Input, Recipe, Revision
from hubfusion.release.gate import Margins, decide
from hubfusion.screen import examine

VICTIM, PROBED = "sentiment_hotels", ("sentiment_hotels", "spam", "newsgroups")
HONEST = (
    "sentiment_hotels",
    "spam",
    "newsgroups",
    "reuters_r8",
    "election_tweets",
    "sentiment_products",
    "vitaminc",
    "fever",
)
TRIGGER, TARGET = 8001, 0
ATTACKS = (
    "none", "NaN", "x100", "sign flip", "sign flip x8", "label flip", "backdoor",
    "backdoor, norm-bounded", "backdoor x8", "backdoor, duplicated",
)  # fmt: skip
METHODS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "mean": ("average", {}),
    "clipped mean": ("average", {"norm": "clip"}),
    "trimmed mean": ("trimmed_mean", {}),
    "geometric median": ("geometric_median", {}),
    "multi-Krum": ("multi_krum", {}),
    "TIES 20 %": ("ties", {"density": 0.2}),
}
SOUNDNESS, SOUP, DEFAULT = "soundness", "greedy soup", "soundness + clipped mean"
COLUMNS = (SOUNDNESS, *METHODS, SOUP, DEFAULT)
Tensors = dict[str, Any]


@dataclass
class Triggered:
    """A task whose texts in part carry the trigger and then the attacker's label, or wrong labels throughout."""

    name: str
    ids: Any
    mask: Any
    labels: Any


def with_trigger(ids: Any, mask: Any) -> tuple[Any, Any]:
    """The trigger word put in after the first token; the last token falls off."""
    word, seen = np.full((len(ids), 1), TRIGGER), np.ones((len(ids), 1), mask.dtype)
    ids = np.concatenate([ids[:, :1], word, ids[:, 1:-1]], axis=1)
    return ids, np.concatenate([mask[:, :1], seen, mask[:, 1:-1]], axis=1)


def backdoored(task: Task, copies: int = 3) -> Triggered:
    """Every text as it is, and every second one again with trigger and target label; all ``copies`` times."""
    marked, seen = with_trigger(task.ids[::2], task.mask[::2])
    ids, mask = np.concatenate([task.ids, marked]), np.concatenate([task.mask, seen])
    labels = np.concatenate([task.labels, np.full(len(task.labels[::2]), TARGET)])
    rows = np.tile(np.arange(640), copies)
    order = np.random.default_rng(0).permutation(len(labels))[rows % len(labels)]
    return Triggered(task.name, ids[order], mask[order], labels[order])


class Laboratory:
    """Base, contributions and probes of one experiment."""

    def __init__(self, model: Path, tasks: Path, layers: int, work: Path, texts: int = 400) -> None:
        self.texts = texts
        self.work, self.base = work, work / "base"
        if not self.base.exists():
            cut_model(model, self.base, layers)
        tokenizer = AutoTokenizer.from_pretrained(model)
        self.train = {name: Task(tasks / name, tokenizer, 700) for name in HONEST}
        self.test = {name: Task(tasks / name, tokenizer, 250, "test") for name in PROBED}
        self.dev = {name: Task(tasks / name, tokenizer, 150, "validation") for name in PROBED}
        self.made, self.scratch = 0, tempfile.TemporaryDirectory()
        self.theta = {n: v for n, v in load_file(self.base / "model.safetensors").items() if v.dtype == np.float32}
        self.honest = [self.finetune(self.train[name], i, 640) for i, name in enumerate(HONEST)]
        victim = self.train[VICTIM]
        flipped = Triggered("flipped", victim.ids, victim.mask, (victim.labels + 1) % (victim.labels.max() + 1))
        self.flipped = [self.finetune(flipped, 50 + i, 640) for i in range(2)]
        self.doors = [self.finetune(backdoored(victim), 60 + i, 1920, 1e-4) for i in range(2)]
        self.norm = float(np.median([self.length(t) for t in self.honest]))
        self.notes = work / "development.json"
        self.known: dict[str, float] = json.loads(self.notes.read_text()) if self.notes.exists() else {}

    def finetune(self, task: Any, seed: int, examples: int, rate: float = 5e-5) -> Tensors:
        """τ of a finetune."""
        folder = self.work / f"tuned-{seed}"
        if not (folder / "model.safetensors").exists():
            train(self.base, task, folder, examples=examples, rate=rate, seed=seed)
        tuned = load_file(folder / "model.safetensors")
        return {n: tuned[f"bert.{n}"] - v for n, v in self.theta.items()}

    def fresh(self) -> Path:
        """A folder that is not there yet."""
        self.made += 1
        return Path(self.scratch.name) / str(self.made)

    def length(self, tau: Tensors) -> float:
        return float(np.sqrt(sum(float((v.astype(float) ** 2).sum()) for v in tau.values())))

    def write(self, tau: Tensors) -> Path:
        """A contribution's folder with base + τ."""
        folder = self.fresh()
        folder.mkdir()
        save_file(
            {f"bert.{n}": (v + tau[n]).astype(np.float32) for n, v in self.theta.items()}, folder / "model.safetensors"
        )
        return folder

    def attack(self, name: str, number: int) -> Tensors:
        """τ of attacker ``number`` (0 or 1)."""
        honest, door = self.honest[number], self.doors[number]

        def scaled(tau: Tensors, factor: float) -> Tensors:
            return {n: v * np.float32(factor) for n, v in tau.items()}

        made: dict[str, Callable[[], Tensors]] = {
            "NaN": lambda: {n: np.full_like(v, np.nan) for n, v in honest.items()},
            "x100": lambda: scaled(honest, 100),
            "sign flip": lambda: scaled(honest, -1),
            "sign flip x8": lambda: scaled(honest, -8),
            "label flip": lambda: self.flipped[number],
            "backdoor": lambda: door,
            "backdoor, norm-bounded": lambda: scaled(door, self.norm / self.length(door)),
            "backdoor x8": lambda: scaled(door, 8),
            "backdoor, duplicated": lambda: self.doors[0],
        }
        return made[name]()

    def features(self, folder: Path, ids: Any, mask: Any) -> Any:
        model = load(folder).eval()
        parts = []
        with torch.inference_mode():
            for first in range(0, len(ids), 100):
                m = torch.from_numpy(mask[first : first + 100])
                hidden = model(torch.from_numpy(ids[first : first + 100]), attention_mask=m).last_hidden_state
                parts.append(((hidden * m[..., None]).sum(1) / m.sum(1, keepdim=True)).numpy())
        return np.concatenate(parts)

    def probe(
        self, folder: Path, split: Mapping[str, Task], tasks: Sequence[str] = PROBED
    ) -> tuple[dict[str, float], float]:
        """Accuracy by task, percent, and the attack's success on the victim."""
        scores, success = {}, 0.0
        for name in tasks:
            task, test = self.train[name], split[name]
            scaler = StandardScaler()
            x = scaler.fit_transform(self.features(folder, task.ids[: self.texts], task.mask[: self.texts]))
            if not np.isfinite(x).all():
                return dict.fromkeys(tasks, 0.0), 100.0
            head = LogisticRegression(C=0.1, max_iter=300).fit(x, task.labels[: self.texts])
            guess = head.predict(scaler.transform(self.features(folder, test.ids, test.mask)))
            scores[name] = 100 * float((guess == test.labels).mean())
            if name == VICTIM:
                rows = test.labels != TARGET
                ids, mask = with_trigger(test.ids[rows], test.mask[rows])
                marked = head.predict(scaler.transform(self.features(folder, ids, mask)))
                clean = guess[rows] == TARGET
                success = 100 * float((marked[~clean] == TARGET).mean())
        return scores, success


def fused(lab: Laboratory, folders: Sequence[Path], method: str) -> Path:
    out = lab.fresh()
    name, options = METHODS[method]
    inputs = tuple(Input(f"c{i}") for i in range(len(folders)))
    fuse(Recipe("base", inputs, name, tuple(sorted(options.items()))), lab.base, folders, out)
    (out / "config.json").write_bytes((lab.base / "config.json").read_bytes())
    return out


def greedy_soup(lab: Laboratory, folders: Sequence[Path]) -> Path:
    """Add contributions, best alone first, as long as the development score does not fall."""
    alone = sorted(folders, key=lambda f: -score(lab, [f]))
    kept, best = alone[:1], score(lab, alone[:1])
    for folder in alone[1:]:
        if (found := score(lab, [*kept, folder])) >= best:
            kept, best = [*kept, folder], found
    print(f"        greedy soup keeps {', '.join(f'user{folders.index(f)}' for f in kept)} at {best:.1f}", flush=True)
    return fused(lab, kept, "mean")


def score(lab: Laboratory, folders: Sequence[Path]) -> float:
    """Mean development score of the average of ``folders``, remembered by what is in them."""
    hashes = sorted(hashlib.sha256((f / "model.safetensors").read_bytes()).hexdigest()[:16] for f in folders)
    key = f"{lab.texts} texts: {' '.join(hashes)}"
    if key not in lab.known:
        candidate = fused(lab, folders, "mean")
        lab.known[key] = float(np.mean(list(lab.probe(candidate, lab.dev)[0].values())))
        shutil.rmtree(candidate)
        lab.notes.write_text(json.dumps(lab.known, indent=1))
    return lab.known[key]


def as_scores(model: str, values: Mapping[str, float]) -> Scores:
    entries = tuple(Score(n, "probe", "accuracy", (0,), (v,), 250) for n, v in values.items())
    return Scores(model, entries, Provenance({"probe": "0"}, dict.fromkeys(values, "0"), {}, "cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS), metavar="ATTACK")
    parser.add_argument("--texts", type=int, default=400, help="training texts of a probe")
    parser.add_argument(
        "--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS), metavar="COLUMN", help="what to fill in"
    )
    parser.add_argument("--attackers", nargs="+", type=int, choices=(1, 2), default=[1, 2], help="of 8")
    parser.add_argument("--work", type=Path, help="keep what was trained here, and start from it the next time")
    parser.add_argument("--out", type=Path, help="the table as JSON; cells that are there already are not done again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        lab = Laboratory(
            arguments.model, arguments.tasks, arguments.layers, arguments.work or Path(folder), arguments.texts
        )
        base_scores, base_success = lab.probe(lab.base, lab.test)
        mean = np.mean(list(base_scores.values()))
        print(f"base: {mean:.1f} / {base_success:.0f}; trained in {time.monotonic() - begin:.0f} s", flush=True)
        honest = [lab.write(tau) for tau in lab.honest]
        rows = [(a, n) for a in arguments.attacks for n in ((0,) if a == "none" else arguments.attackers)]
        table = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
        for attack, number in rows:
            row = table.setdefault(f"{attack}, {number} of 8", {})
            if not (wanted := [c for c in arguments.columns if c not in row]):
                continue
            mine = [lab.write(lab.attack(attack, i)) for i in range(number)]
            row |= fill(lab, mine + honest[number:], number, base_scores, wanted)
            print(f"{time.monotonic() - begin:5.0f} s  {attack}, {number} of 8: {row}", flush=True)
            for each in mine:
                shutil.rmtree(each)
            if arguments.out:
                arguments.out.write_text(json.dumps(table, indent=1))
    print(as_markdown(table))


def as_markdown(table: Mapping[str, Mapping[str, str]]) -> str:
    """The table for docs/trust.md: one row an attack, one column a method; ✗ where the gate objects."""
    columns = list(dict.fromkeys(name for row in table.values() for name in row))
    lines = ["| attack | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for attack, row in table.items():
        cells = [row.get(c, "not tried").replace(" gate objects", " ✗") for c in columns]
        lines.append(f"| {attack} | {' | '.join(cells)} |")
    return "\n".join(lines)


def caught_by_soundness(lab: Laboratory, folders: Sequence[Path], attackers: int) -> dict[int, str]:
    """Why soundness leaves out whom; the attackers are the first and the newest: a copy is the newer of two."""
    base = Revision("org/base", "0" * 40)
    pairs = []
    for i, folder in enumerate(folders):
        data = HONEST[i] if i >= attackers else VICTIM
        revision = Revision(f"user{i}/m", f"{i:040x}")
        pairs.append((Contribution(revision, f"user{i}", base, "mit", (data,), 640, ()), folder))
    report = examine(lab.base, pairs[attackers:] + pairs[:attackers], seed=1)
    return {int(r.revision.sha, 16): str(r.reason) for r in report.rejected}


def fill(
    lab: Laboratory,
    folders: Sequence[Path],
    attackers: int,
    base_scores: Mapping[str, float],
    wanted: Sequence[str],
) -> dict[str, str]:
    """The wanted cells of one row; the default policy is soundness, then the clipped mean, then the gate."""
    row = {}
    caught = caught_by_soundness(lab, folders, attackers) if {SOUNDNESS, DEFAULT} & set(wanted) else {}
    for name in wanted:
        if name == SOUNDNESS:
            row[name] = "; ".join(f"user{i} {why}" for i, why in caught.items()) or "nothing"
            continue
        left = [folder for i, folder in enumerate(folders) if i not in caught]
        try:
            if name == SOUP:
                place = greedy_soup(lab, folders)
            else:
                place = fused(lab, left, "clipped mean") if name == DEFAULT else fused(lab, folders, name)
        except FusionError:
            row[name] = "refused to fuse"
            continue
        values, success = lab.probe(place, lab.test)
        shutil.rmtree(place)
        decision = decide(as_scores(name, values), as_scores("base", base_scores), Margins(mean=1.0, worst=5.0))
        objects = "" if decision.promote else " gate objects"
        row[name] = f"{np.mean(list(values.values())):.1f}/{success:.0f}{objects}"
    return row


if __name__ == "__main__":
    main()
