"""Finetunes of every shape in one iteration: the one rule takes or refuses each, and the rest is promoted.

A head may have any name, a module any single prefix, the weights any float dtype, and a LoRA adapter counts as the
model that it would be merged into. What hides in the backbone is refused with a reason, and the next run is clean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bot.iteration import Verdict
from bot.ledger import Judged
from hubfusion.cli import main
from hubfusion.lineage import Reason
from hubfusion.release.publish import manifest_at
from hubfusion.screen import Policy
from tests import bert_checkpoints
from tests.bert_checkpoints import HIDDEN, Tensors
from tests.world import BASE, World, make_world

PREFIX = "bert."


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = make_world(tmp_path, monkeypatch)
    made.config = replace(made.config, screen=Policy(max_per_author=20, max_per_dataset=20))
    yield made
    made.server.stop()


def plus(**more: np.ndarray) -> Callable[[Tensors], Tensors]:
    """Tensors beside the others; ``__`` in a name stands for a dot."""
    return lambda tensors: tensors | {name.replace("__", "."): value for name, value in more.items()}


def with_head(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n.replace("classifier.", f"{name}."): value for n, value in tensors.items()}


def with_prefix(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n.replace(PREFIX, prefix): value for n, value in tensors.items()}


def without_pooler(tensors: Tensors) -> Tensors:
    return {n: value for n, value in tensors.items() if ".pooler." not in n}


def in_float16(tensors: Tensors) -> Tensors:
    return {n: value.astype(np.float16) for n, value in tensors.items()}


BUFFER = np.linspace(0, 1, bert_checkpoints.POSITIONS, dtype=np.float32)[None]
TAKEN: dict[str, Callable[[Tensors], Tensors]] = {
    "regressor": with_head("regressor"),
    "head": with_head("head"),
    "mlp-head": with_head("mlp_head"),
    "fc": with_head("fc"),
    "no-pooler": without_pooler,
    "module": with_prefix("module."),
    "no-prefix": with_prefix(""),
    "float16": in_float16,
    "known-buffer": plus(bert__embeddings__token_type_ids=BUFFER),  # transformers knows it, this base has none
    "outer-buffer": plus(temperature=np.ones(1, np.float32)),  # beside the backbone: part of the head
}
REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "extra-layer": (
        plus(bert__encoder__layer__2__x=np.zeros(3, np.float32)),
        "bert.encoder.layer.2.x lies in the backbone, but the base has no such parameter",
    ),
    "unknown-buffer": (
        plus(bert__encoder__layer__0__attention__inv_freq=BUFFER),
        "bert.encoder.layer.0.attention.inv_freq lies in the backbone, but the base has no such parameter",
    ),
    "buffer-of-floats": (
        plus(bert__embeddings__position_ids=BUFFER),
        "bert.embeddings.position_ids has dtype F32, the base has I64",
    ),
}


def lora_files(seed: int, modules: tuple[str, ...] = (), **options: object) -> dict[str, bytes | None]:
    """A LoRA adapter of rank 2 and scale 2, as peft pushes it: no ``config.json``."""
    stated = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query", "value"], **options}
    pairs = {
        f"base_model.model.{PREFIX}{module}.lora_{kind}.weight": matrix
        for module in modules or ADAPTED
        for kind, matrix in zip("AB", lora_pair(seed, module), strict=True)
    }
    files = {
        "adapter_config.json": json.dumps(stated).encode(),
        "adapter_model.safetensors": bert_checkpoints.weights(pairs),
    }
    return {"config.json": None, "model.safetensors": None, **files}


ADAPTED = tuple(
    f"encoder.layer.{n}.attention.self.{part}" for n in range(bert_checkpoints.LAYERS) for part in ("query", "value")
)


def lora_pair(seed: int, module: str) -> tuple[np.ndarray, np.ndarray]:
    """The matrices A (2, in) and B (out, 2) of one module."""
    rng = np.random.default_rng([seed, *module.encode()])
    return tuple(rng.normal(0, 0.05, shape).astype(np.float32) for shape in ((2, HIDDEN), (HIDDEN, 2)))  # type: ignore[return-value]


def merged(base: Tensors, seed: int) -> Tensors:
    """The backbone that the adapter stands for: W + (alpha / r) B A."""
    found = {name: value.astype(np.float64) for name, value in base.items()}
    for module in ADAPTED:
        down, up = lora_pair(seed, module)
        found[f"{module}.weight"] += 2 * up.astype(np.float64) @ down
    return found


def backbone(tensors: Tensors, base: Tensors) -> Tensors:
    """Parameters by their names in the base, under whatever prefix they are, in float64."""
    prefix = next(n for n in tensors if n.endswith("embeddings.LayerNorm.bias")).removesuffix(
        "embeddings.LayerNorm.bias"
    )
    return {name: tensors[prefix + name].astype(np.float64) for name in base if prefix + name in tensors}


def check_average(base: Tensors, models: list[Tensors], fused: Tensors) -> None:
    """Each parameter that all models have is their float64 average to float32's rounding, all else the base's own."""
    assert set(fused) == set(base)
    for name, value in fused.items():
        if base[name].dtype != np.float32 or any(name not in model for model in models):
            assert np.array_equal(value, base[name]), name
            continue
        exact = np.mean([model[name] for model in models], axis=0)
        room = np.spacing(np.abs([base[name], *(model[name] for model in models)]).sum(axis=0).astype(np.float32))
        assert np.all(np.abs(value - exact) <= room), name


def test_heads_of_any_name_prefixes_dtypes_and_an_adapter_are_averaged_and_the_rest_is_answered(world: World) -> None:
    base, models = world.tensors(), []
    users = ("alice", "bob", "carol")
    for number, (name, change) in enumerate(TAKEN.items()):
        tensors = change(bert_checkpoints.finetuned(base, number))
        models.append(backbone(tensors, base))
        world.offer(f"{users[number % 3]}/{name}", tensors)
    world.offer("alice/lora", **lora_files(7))
    models.append(merged(base, 7))
    for number, (name, (change, _)) in enumerate(REFUSED.items()):
        world.offer(f"mallory/{name}", change(bert_checkpoints.finetuned(base, 50 + number)))
    world.offer("mallory/lora", **lora_files(8, ("encoder.layer.7.attention.self.query",)))

    result = world.iterate()
    assert (result.verdict, result.version) == (Verdict.PROMOTED, "v1")
    expected = {f"mallory/{name}" for name in (*REFUSED, "lora")}
    assert {r.revision.repo: r.reason for r in result.rejected} == dict.fromkeys(expected, Reason.ARCHITECTURE)
    details = {r.revision.repo: r.detail for r in result.rejected}
    for name, (_, says) in REFUSED.items():
        assert details[f"mallory/{name}"].startswith(says)
    assert "adapts nothing" in details["mallory/lora"]
    taken = {c.revision.repo.split("/")[1] for c in result.contributions}
    assert taken == {*TAKEN, "lora"}
    hub = world.hub()
    manifest = manifest_at(hub, hub.resolve(BASE, "v1"))
    assert manifest is not None and len(manifest.recipe.inputs) == len(models)
    fused = world.tensors("v1")
    check_average(base, models, fused)
    for name in ("pooler.dense.weight", "pooler.dense.bias"):  # not every finetune has it
        assert np.array_equal(fused[name], base[name])

    for repo in sorted(expected):
        (title,) = world.titles(repo)
        assert title.startswith(f"Not fused into {BASE}: architecture (commit ")
    for contribution in result.contributions:
        (title,) = world.titles(contribution.revision.repo)
        assert title.startswith(f"Part of {BASE} v1 (commit ")
    assert {e.finetune.repo for e in world.ledger().events if isinstance(e, Judged)} == expected
    settled = world.heads()
    assert world.iterate("again").verdict is Verdict.NOTHING_NEW
    assert world.heads() == settled
    assert len(world.titles("mallory/extra-layer")) == 1


def test_a_pooler_that_every_finetune_has_is_averaged(world: World) -> None:
    base = world.tensors()
    tuned = [bert_checkpoints.finetuned(base, seed) for seed in (1, 2)]
    for user, tensors in zip(("alice", "bob"), tuned, strict=True):
        world.offer(f"{user}/model", tensors)
    assert world.iterate().verdict is Verdict.PROMOTED
    fused = world.tensors("v1")
    check_average(base, [backbone(t, base) for t in tuned], fused)
    assert not np.array_equal(fused["pooler.dense.weight"], base["pooler.dense.weight"])


def test_a_float_buffer_of_the_base_is_kept_and_one_with_other_values_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bert_checkpoints.base_tensors() | {"embeddings.position_ids": BUFFER}
    files = {"config.json": bert_checkpoints.config(), "model.safetensors": bert_checkpoints.weights(base)}
    world = make_world(tmp_path, monkeypatch, bert_checkpoints.write_folder(tmp_path / "pretrained-floats", files))
    name = f"{PREFIX}embeddings.position_ids"
    try:
        own = [bert_checkpoints.finetuned(bert_checkpoints.base_tensors(), seed) for seed in (1, 2, 3)]
        world.offer("alice/same", own[0] | {name: BUFFER})
        world.offer("bob/none", own[1])
        world.offer("mallory/other", own[2] | {name: BUFFER + 1})
        result = world.iterate()
        assert [c.author for c in result.contributions] == ["alice", "bob"]
        assert [(r.author, r.reason) for r in result.rejected] == [("mallory", Reason.BUFFERS)]
        fused = world.tensors("v1")
        assert np.array_equal(fused["embeddings.position_ids"], BUFFER)
        models = [{n: v for n, v in backbone(t, base).items() if n != "embeddings.position_ids"} for t in own[:2]]
        check_average(base, models, fused)
        assert world.iterate("again").verdict is Verdict.NOTHING_NEW
    finally:
        world.server.stop()


def test_inspect_says_of_an_adapter_what_the_bot_says(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", world.server.endpoint)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    offers = {
        "alice/lora": lora_files(7),
        "bob/lora": lora_files(9),
        "mallory/nothing": lora_files(8, ("encoder.layer.7.attention.self.query",)),
        "mallory/kind": lora_files(8, peft_type="IA3"),
    }
    folders = {repo: tmp_path / "local" / repo.replace("/", "-") for repo in offers}
    for repo, files in offers.items():
        world.offer(repo, **files)
        bert_checkpoints.write_folder(folders[repo], {name: data for name, data in files.items() if data is not None})

    def inspected(*models: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", *models, "--base", BASE])
        assert not stopped.value.code
        return capsys.readouterr().out

    remote, local = inspected(*offers), inspected(*map(str, folders.values()))
    result = world.iterate()
    assert [c.author for c in result.contributions] == ["alice", "bob"]
    reasons = {r.revision.repo: r.reason for r in result.rejected}
    assert reasons == {"mallory/nothing": Reason.ARCHITECTURE, "mallory/kind": Reason.ADAPTER}
    for said in (remote, local):
        assert len(re.findall(", ok$", said, re.MULTILINE)) == 2
        out = [line for line in said.splitlines() if line.startswith("out: ")]
        assert len(out) == 2
        for rejected in result.rejected:
            what = rejected.detail.split("; finetune")[0]
            assert [line for line in out if f": {rejected.reason}: " in line and line.endswith(what)], (what, out)
