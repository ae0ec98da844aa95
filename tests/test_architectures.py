"""Every architecture: ordinary finetunes of any text model are matched, and fused to the average in float64."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from hubfusion.checkpoint import open_checkpoint
from hubfusion.checkpoint.backbone import match, read_backbone
from hubfusion.checkpoint.model_types import find_model_type
from hubfusion.errors import FusionError
from hubfusion.fuse import fuse
from tests.architectures import models, task_classes, tiny_config
from tests.random_checkpoints import recipe_of

PRETRAINING = ("MaskedLM", "CausalLM", "Seq2SeqLM", "PreTraining")
DEFAULT = [
    "roberta", "bert", "mpnet", "distilbert", "deberta-v2", "electra", "albert", "xlnet", "modernbert", "bart", "t5",
    "gpt2", "xlm-roberta", "llama",
]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One task class of one model type on one kind of base; ``why`` is empty when it was fused as it should be."""

    model_type: str
    base: str
    task: str
    why: str


def jiggle(model: Any, seed: int) -> Any:
    """A finetune near to ``model``: every parameter moved a little."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moved.parameters():
            if parameter.is_floating_point():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return moved


def inner(model: Any, kind: type) -> dict[str, torch.Tensor]:
    """Parameters of the backbone inside a task model, by the names that AutoModel's class gives them."""
    found = next((m for m in model.modules() if type(m) is kind), model)
    return {n: p.detach() for n, p in found.named_parameters()}


def check(folder: Path, base: Path, kind: type, task: type, config: Any, variant: dict[str, Any]) -> None:
    """Finetune ``base`` twice as ``task``, fuse, and compare with the average in float64."""
    start = task.from_pretrained(base, config=config)  # type: ignore[attr-defined]
    finetunes = [jiggle(start, seed) for seed in (1, 2)]
    places = [folder / "one", folder / "two"]
    for model, place in zip(finetunes, places, strict=True):
        model.to(variant.get("dtype", torch.float32)).save_pretrained(place, **variant.get("save", {}))
    with open_checkpoint(base) as ours, open_checkpoint(places[0]) as theirs:
        match(read_backbone(base, ours), ours.parameters, theirs.parameters)
    fuse(recipe_of(["one", "two"]), base, places, folder / "out")
    shutil.copy(base / "config.json", folder / "out" / "config.json")
    loaded, info = AutoModel.from_pretrained(folder / "out", output_loading_info=True)
    fused = {n: p for n, p in inner(loaded, kind).items() if n not in info["missing_keys"]}  # what the base stores
    before = inner(AutoModel.from_pretrained(base), kind)
    parts = [inner(model, kind) for model in finetunes]
    shared = [n for n in fused if all(n in part for part in parts)]
    assert len(shared) >= 0.75 * len(fused), f"only {len(shared)} of {len(fused)} parameters are in the task model"
    for name in shared:
        mean = sum(part[name].double() for part in parts) / 2
        wanted = before[name].double() + (mean - before[name].double())
        np.testing.assert_allclose(fused[name].double(), wanted, rtol=1e-6, atol=3e-8, err_msg=name)


def rows(name: str, folder: Path, variant: dict[str, Any] | None = None) -> Iterator[Row]:
    """Every task class of a model type, on a bare base and on one with its pretraining head."""
    config = tiny_config(name)
    torch.manual_seed(0)
    bare = AutoModel.from_config(config)
    tasks = task_classes(name)
    whole = [cls for task, cls in tasks if task in PRETRAINING and cls.__name__ not in partial(name)]
    bases = [("bare", type(bare)), *(("pretraining", cls) for cls in whole[:1])]
    for kind, cls in bases:
        base = folder / f"{name}-{kind}"
        torch.manual_seed(0)
        (bare if kind == "bare" else cls(copy.deepcopy(config))).save_pretrained(base)
        for task, task_cls in tasks:
            place = folder / f"{name}-{kind}-{task}"
            try:
                check(place, base, type(bare), task_cls, copy.deepcopy(config), variant or {})
                why = ""
            except (FusionError, AssertionError) as error:
                why = " ".join(str(error).split())[:300]
            yield Row(name, kind, task, why)
            shutil.rmtree(place, ignore_errors=True)


def partial(name: str) -> set[str]:
    """Names of the task classes that lack a large part of the backbone (a decoder alone, say): no finetunes of it."""
    facts = find_model_type(name)
    return set(facts.partial) if facts else set()


def unexpected(name: str, found: list[Row]) -> list[Row]:
    """Rows that failed though the table does not say that the task class lacks a part of the backbone."""
    lacking = {task for task, cls in task_classes(name) if cls.__name__ in partial(name)}
    return [row for row in found if row.why and row.task not in lacking]


@pytest.mark.parametrize("name", DEFAULT)
def test_every_task_class_is_taken_and_fused_as_float64_says(name: str, tmp_path: Path) -> None:
    found = list(rows(name, tmp_path))
    assert len(found) >= 2 and unexpected(name, found) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", models())
def test_every_model_type_of_transformers_is_taken(name: str, tmp_path: Path) -> None:
    assert unexpected(name, list(rows(name, tmp_path))) == []


@pytest.mark.parametrize(
    "variant",
    [{"save": {"max_shard_size": "20kB"}}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}],
    ids=["sharded", "bfloat16", "float16"],
)
@pytest.mark.parametrize("name", ["roberta", "bart"])
def test_shards_and_half_precision_are_taken(name: str, variant: dict[str, Any], tmp_path: Path) -> None:
    assert unexpected(name, list(rows(name, tmp_path, variant))) == []


HEAD = """# Architectures

Printed by `python -m tests.test_architectures FOLDER > docs/architectures.md`. For each model type of transformers that
has a text class: tiny models with two layers; a base saved bare and one saved with its pretraining head; two finetunes
of each task class, made by `from_pretrained(base)`, every parameter moved, saved by `save_pretrained`. *Taken* means
matched by the rule that screening uses, fused by `hubfusion fuse`, loaded by `AutoModel`, and equal to the average in
float64.

| model type | taken, bare base | taken, base with pretraining head | not taken, and why |
|---|---:|---:|---|"""


def main(folder: Path, names: list[str]) -> None:
    """Print the page of all model types."""
    print(HEAD, flush=True)
    total = taken = 0
    for name in names:
        try:
            found = list(rows(name, folder))
        except Exception as error:  # a model that cannot be built here
            print(f"| `{name}` | – | – | not built: {type(error).__name__}: {str(error)[:100]} |", flush=True)
            continue
        total, taken = total + len(found), taken + sum(not r.why for r in found)
        cells = []
        for kind in ("bare", "pretraining"):
            mine = [r for r in found if r.base == kind]
            cells.append(f"{sum(not r.why for r in mine)} of {len(mine)}" if mine else "–")
        why = {r.task: r.why.replace(str(folder), "").replace("|", "/")[:160] for r in found if r.why}
        print(f"| `{name}` | {' | '.join(cells)} | {'; '.join(f'{t}: {w}' for t, w in why.items())} |", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{taken} of {total} cases are taken. A class that lacks a part of the backbone is no finetune of it.")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or models())
