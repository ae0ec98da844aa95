"""Hundreds of benign contributions: how often is their base version inferred, and how often is one rejected?

The encoder is MiniLM cut to its first two layers and the first 8,192 words of its vocabulary; the data are real. Five
versions: v0, and each next one the average of eight contributions to the one before (ColD Fusion). Contributions
differ in task, examples, learning rate and seed.

    python benchmarks/versions.py --model MINILM_FOLDER --tasks TASKS_FOLDER [--per-version 44] [--work DIR]
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertModel

from hubfusion.lineage import Contribution, Revision
from hubfusion.screen import examine

VERSIONS = 5
LENGTH = 32
BATCH = 16
WORDS = 8192


def cut_model(source: Path, target: Path, layers: int) -> None:
    """The first ``layers`` layers of MiniLM as version 0."""
    target.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": layers, "vocab_size": WORDS}
    (target / "config.json").write_text(json.dumps(config))
    kept = {
        name: value
        for name, value in load_file(source / "model.safetensors").items()
        if not name.startswith("encoder.layer.") or int(name.split(".")[2]) < layers
    }
    kept["embeddings.word_embeddings.weight"] = kept["embeddings.word_embeddings.weight"][:WORDS].clone()
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})


class Task:
    """Texts of one task as token ids, tokenized once."""

    def __init__(self, folder: Path, tokenizer: Any, most: int = 2000, split: str = "train") -> None:
        table = pq.read_table(folder / f"{split}.parquet").slice(0, most)
        self.name = folder.name
        self.labels = np.asarray(table["label"])
        texts = [t[:300] for t in table["text"].to_pylist()]
        encoded = tokenizer(texts, truncation=True, max_length=LENGTH, padding="max_length", return_tensors="np")
        self.ids, self.mask = encoded["input_ids"], encoded["attention_mask"]
        self.ids = np.where(self.ids < WORDS, self.ids, tokenizer.unk_token_id)


def load(folder: Path) -> BertModel:
    """The encoder in a folder."""
    model = BertModel(BertConfig.from_pretrained(folder))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return model


def train(base: Path, task: Any, target: Path, *, examples: int, rate: float, seed: int) -> None:
    """Finetune encoder and a linear head; saved as BertForSequenceClassification would be."""
    torch.manual_seed(seed)
    model = load(base)
    head = torch.nn.Linear(model.config.hidden_size, int(task.labels.max()) + 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=rate)
    order = np.random.default_rng(seed).permutation(len(task.labels))[:examples]
    steps = max(1, len(order) // BATCH)
    model.train()
    for step in range(steps):
        rows = order[step * BATCH : (step + 1) * BATCH]
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        mask = torch.from_numpy(task.mask[rows])
        pooled = model(torch.from_numpy(task.ids[rows]), attention_mask=mask).pooler_output
        torch.nn.functional.cross_entropy(head(pooled), torch.from_numpy(task.labels[rows]).long()).backward()
        optimizer.step()
        optimizer.zero_grad()
    table = {f"bert.{n}": p.detach().contiguous() for n, p in model.named_parameters()}
    target.mkdir(parents=True, exist_ok=True)
    save_file(table | {"classifier.weight": head.weight.detach()}, target / "model.safetensors")


def average(base: Path, folders: list[Path], target: Path) -> None:
    """The next version: the plain mean of the contributions' encoders, in float64."""
    target.mkdir(parents=True)
    shutil.copy(base / "config.json", target)
    fused = load_file(base / "model.safetensors")
    models = [load_file(f / "model.safetensors") for f in folders]
    for name in fused:
        if fused[name].is_floating_point():
            fused[name] = torch.stack([m[f"bert.{name}"] for m in models]).double().mean(0).float()
    save_file(fused, target / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--per-version", type=int, default=44)
    parser.add_argument("--work", type=Path, help="keep what was trained here, and go on from it the next time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = arguments.work or Path(tempfile.mkdtemp(prefix="versions-"))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tasks = [Task(folder, tokenizer) for folder in sorted(arguments.tasks.iterdir())]
    rng = random.Random(0)
    versions = {"v0": work / "v0"}
    if not (work / "v0").exists():
        cut_model(arguments.model, work / "v0", layers=2)
    made: dict[str, list[tuple[Contribution, Path]]] = collections.defaultdict(list)
    begin = time.monotonic()
    for number in range(VERSIONS):
        tag, base = f"v{number}", work / f"v{number}"
        versions[tag] = base
        for i in range(arguments.per_version):
            task = tasks[i % len(tasks)]
            examples, rate, folder = (
                rng.choice([160, 320, 640, 1280]),
                rng.choice([2e-5, 5e-5, 1e-4]),
                work / f"{tag}-{i}",
            )
            if not (folder / "model.safetensors").exists():
                train(base, task, folder, examples=examples, rate=rate, seed=1000 * number + i)
            revision = Revision(f"user{i}/{task.name}-{number}", f"{number * 1000 + i:040x}")
            declared = Contribution(
                revision,
                f"user{i}",
                Revision("org/base", "0" * 40),
                "mit",
                (task.name,),
                min(examples, len(task.labels)),
                (),
            )
            made[tag].append((declared, folder))
            print(f"{time.monotonic() - begin:6.0f} s  {tag} {i} {task.name} {examples} {rate}", flush=True)
        if number + 1 < VERSIONS and not (work / f"v{number + 1}").exists():
            average(base, [folder for _, folder in made[tag][:8]], work / f"v{number + 1}")
    infer_versions(versions, made)
    count_alarms(versions, made)


def infer_versions(versions: dict[str, Path], made: dict[str, list[tuple[Contribution, Path]]]) -> None:
    """Every contribution against the newest version, told nothing: which version is nearest?"""
    newest = f"v{VERSIONS - 1}"
    earlier = {tag: path for tag, path in versions.items() if tag != newest}
    right = total = 0
    for tag, batch in made.items():
        for start in range(0, len(batch), 22):
            report = examine(versions[newest], batch[start : start + 22], tag=newest, versions=earlier, seed=1)
            nearest = collections.Counter(m.nearest for m in report.measures)
            right, total = right + nearest[tag], total + len(report.measures)
            print(tag, dict(nearest), flush=True)
    print(f"base version inferred: {right} of {total} ({100 * right / total:.1f} %)")


def count_alarms(versions: dict[str, Path], made: dict[str, list[tuple[Contribution, Path]]]) -> None:
    """Batches as an iteration sees them, against their own base: whoever is rejected is a false alarm."""
    alarms: collections.Counter[str] = collections.Counter()
    total, norms, same, other, top = 0, [], [], [], []
    for tag, batch in made.items():
        earlier = {t: path for t, path in versions.items() if t < tag}
        report = examine(versions[tag], batch, tag=tag, versions=earlier, seed=2)
        for each in report.rejected:
            alarms[each.reason] += 1
            print("false alarm", each)
        total += len(batch)
        norms += [m.norm for m in report.measures]
        top += [max(m.shares.values()) for m in report.measures]
        data = [c.datasets for c, _ in batch]
        for i in range(len(batch)):
            for j in range(i):
                (same if data[i] == data[j] else other).append(report.cosines[i][j])
    print(f"false alarms: {sum(alarms.values())} of {total} {dict(alarms)}")
    print(f"norms {min(norms):.3g} .. {max(norms):.3g}, median {np.median(norms):.3g}")
    for name, values in (("same data", same), ("other data", other), ("largest share of one tensor", top)):
        low, middle, high = min(values), np.median(values), max(values)
        print(f"{name}: min {low:.3f}, median {middle:.3f}, 99 % {np.quantile(values, 0.99):.3f}, max {high:.3f}")


if __name__ == "__main__":
    main()
