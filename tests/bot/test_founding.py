"""A base may be founded from any folder of a model: what else lies in it does not become part of the base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from bot.founding import found_base
from bot.iteration import Verdict
from hubfusion.cli import main
from hubfusion.errors import FusionError
from hubfusion.hub import Change
from hubfusion.hub.cards import read_card
from hubfusion.lineage import Revision
from hubfusion.release.publish import manifest_at
from tests import bert_checkpoints
from tests.world import BASE, BOT, World, make_world


def fused_folder(folder: Path) -> Path:
    """What `hubfusion fuse` makes of a pretrained model and two finetunes."""
    base = bert_checkpoints.base_tensors()
    pretrained = {
        "config.json": bert_checkpoints.config(),
        "model.safetensors": bert_checkpoints.weights(base),
        "vocab.txt": b"a\nb\n",
    }
    models = [bert_checkpoints.write_folder(folder / "pretrained", pretrained)]
    for seed in (1, 2):
        files = {
            "config.json": bert_checkpoints.config(),
            "model.safetensors": bert_checkpoints.weights(bert_checkpoints.finetuned(base, seed)),
        }
        models.append(bert_checkpoints.write_folder(folder / f"tuned-{seed}", files))
    with pytest.raises(SystemExit) as stopped:
        main(["fuse", *map(str, models), "--out", str(folder / "fused")])
    assert not stopped.value.code
    return folder / "fused"


def test_a_base_founded_from_a_fused_folder_goes_through_iterations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fused_folder(tmp_path)
    assert (folder / "fuse.json").is_file() and not (folder / "fusion.json").exists()
    world = make_world(tmp_path, monkeypatch, folder)
    try:
        hub = world.hub()
        founded = hub.resolve(BASE, "v0")
        assert {file.path for file in hub.files(founded)} >= {"config.json", "model.safetensors", "vocab.txt"}
        assert not {file.path for file in hub.files(founded)} & {"fuse.json", "recipe.toml", "fusion.json"}
        assert manifest_at(hub, founded) is None
        for name, value in load_file(folder / "model.safetensors").items():
            assert np.array_equal(world.tensors("v0")[name], value)
        for version in ("v1", "v2"):
            for user in ("alice", "bob"):
                world.offer(f"{user}/model-{version}")
            result = world.iterate(version)
            assert (result.verdict, result.version) == (Verdict.PROMOTED, version)
        manifest = manifest_at(hub, hub.resolve(BASE, "v1"))
        assert manifest is not None and manifest.base == founded
    finally:
        world.server.stop()


def test_the_manifest_and_report_of_another_base_stay_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of one base, downloaded, may found another: its ``fusion.json`` speaks of commits that are not here."""
    files = {
        "config.json": bert_checkpoints.config(),
        "model.safetensors": bert_checkpoints.weights(bert_checkpoints.base_tensors()),
    }
    left = ("fusion.json", "soundness.json")
    folder = bert_checkpoints.write_folder(tmp_path / "downloaded", files | dict.fromkeys(left, b"{}"))
    world = make_world(tmp_path, monkeypatch, folder)
    try:
        assert not {file.path for file in world.hub().files(world.hub().resolve(BASE, "v0"))} & set(left)
        for user in ("alice", "bob"):
            world.offer(f"{user}/model")
        assert world.iterate().verdict is Verdict.PROMOTED
    finally:
        world.server.stop()


CARD = """---
license: mit
language: de
datasets:
- wikipedia
tags:
- exbert
base_model: somebody/older
---
# A pretrained model
"""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A Hub on which one more base, ``ibm/second``, is not founded yet."""
    made = make_world(tmp_path, monkeypatch)
    names = {"base": "ibm/second", "ledger": "ibm/second-ledger", "ranking": "ibm/second-ranking"}
    made.config = replace(made.config, **names)
    yield made
    made.server.stop()


def push(world: World, **changes: bytes | None) -> Revision:
    """``alice/pretrained`` on the Hub, with files changed or, when None, left out."""
    hub, repo = world.hub("alice"), "alice/pretrained"
    hub.create(repo)
    files: dict[str, bytes | None] = {
        "config.json": bert_checkpoints.config(),
        "model.safetensors": bert_checkpoints.weights(bert_checkpoints.base_tensors(3)),
        "vocab.txt": b"a\nb\n",
        "pytorch_model.bin": b"not read",
        "README.md": CARD.encode(),
        **changes,
    }
    content: dict[str, bytes | Path] = {name: data for name, data in files.items() if data is not None}
    return Revision(repo, hub.commit(repo, Change("push", hub.resolve(repo).sha, f"{sorted(content)}", content)))


def test_the_command_founds_a_base_from_a_model_on_the_hub_pinned_and_with_its_card(
    world: World, tmp_path: Path
) -> None:
    pinned = push(world)
    later = push(world, **{"model.safetensors": bert_checkpoints.weights(bert_checkpoints.base_tensors(4))})
    settings = tmp_path / "bot.toml"
    settings.write_text(
        "".join(f"{key} = {json.dumps(getattr(world.config, key))}\n" for key in ("base", "ledger", "ranking", "work"))
        + f"[evaluate]\nsuite = {json.dumps(world.config.evaluate.suite)}\n"
    )
    command = [sys.executable, "-m", "bot", "found", f"{pinned.repo}@{pinned.sha}", "--config", str(settings)]
    environment = os.environ | {"HF_ENDPOINT": world.server.endpoint, "HF_TOKEN": f"hf_{BOT}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    hub = world.hub()
    founded = hub.resolve("ibm/second", "v0")
    assert done.stdout == f"ibm/second v0 is {founded.sha}\n"
    assert hub.read(founded, "model.safetensors", stop=1 << 20) == hub.read(pinned, "model.safetensors", stop=1 << 20)
    assert {file.path for file in hub.files(founded)} == {
        ".gitattributes", "README.md", "backbone.json", "config.json", "model.safetensors", "vocab.txt",
    }  # fmt: skip
    metadata = read_card(hub, founded)
    assert metadata["base_model"] == pinned.repo
    assert (metadata["license"], metadata["language"], metadata["datasets"]) == ("mit", "de", ["wikipedia"])
    assert set(metadata["tags"]) == {"exbert", "cold-fusion"}
    card = hub.read(founded, "README.md", stop=1 << 20).decode()
    assert pinned.sha in card and later.sha not in card
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert hub.resolve("ibm/second").sha == founded.sha


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.safetensors": None}, "a base needs model.safetensors, or shards with their index"),
        ({"config.json": None}, "a base needs config.json"),
        ({"README.md": None}, "its card states no license; give it with --license"),
        ({"README.md": b"---\nlanguage: de\n---\n"}, "its card states no license; give it with --license"),
        (
            {"config.json": bert_checkpoints.config(auto_map={"AutoModel": "m.M"})},
            "auto_map asks to run the model's own code",
        ),
    ],
    ids=["pickle-only", "no-config", "no-card", "no-license", "own-code"],
)
def test_a_model_that_cannot_be_a_base_is_refused_before_anything_is_made(
    world: World, changes: dict[str, bytes | None], says: str
) -> None:
    pushed = push(world, **changes)
    with pytest.raises(FusionError, match=f"alice/pretrained@{pushed.sha[:12]}: .*{says}"):
        found_base(world.run("found"), pushed.repo, None, None)
    from huggingface_hub import HfApi

    api = HfApi(endpoint=world.server.endpoint, token=f"hf_{BOT}")
    assert not api.repo_exists("ibm/second") and not api.repo_exists("ibm/second-ledger", repo_type="dataset")


MODULES = {
    "modules.json": json.dumps(
        [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        ]
    ).encode(),
    "sentence_bert_config.json": b'{"max_seq_length": 20, "do_lower_case": false}',
    "config_sentence_transformers.json": b'{"similarity_fn_name": "cosine"}',
    "1_Pooling/config.json": b'{"word_embedding_dimension": 16, "pooling_mode_mean_tokens": true}',
    "2_Dense/config.json": b'{"in_features": 16, "out_features": 2}',
    "2_Dense/model.safetensors": bert_checkpoints.weights({"linear.weight": np.eye(2, 16, dtype=np.float32)}),
}


def sentence_folder(folder: Path, tensors: bert_checkpoints.Tensors) -> Path:
    """A SentenceTransformer as it is saved: further modules in folders of their own."""
    for path, content in {
        **MODULES,
        "config.json": bert_checkpoints.config(),
        "model.safetensors": bert_checkpoints.weights(tensors),
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def test_a_sentence_transformer_stays_one_through_an_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = bert_checkpoints.base_tensors()
    world = make_world(tmp_path, monkeypatch, sentence_folder(tmp_path / "sentences", base))
    try:
        tuned = [
            {n.removeprefix("bert."): v for n, v in bert_checkpoints.finetuned(base, seed).items()} for seed in (1, 2)
        ]
        backbones = [{n: v for n, v in t.items() if not n.startswith("classifier.")} for t in tuned]
        for user, tensors in zip(("alice", "bob"), backbones, strict=True):
            world.offer(f"{user}/sentences", tensors, **MODULES)
        assert world.iterate().verdict is Verdict.PROMOTED
        hub = world.hub()
        for version in ("v0", "v1"):
            for path, content in MODULES.items():
                assert hub.read(hub.resolve(BASE, version), path, stop=1 << 20) == content
        fused = world.tensors("v1")
        for name in (n for n, value in base.items() if value.dtype == np.float32):
            exact = np.mean([t[name].astype(float) for t in backbones], axis=0)
            np.testing.assert_allclose(fused[name], exact, rtol=0, atol=1e-7)
    finally:
        world.server.stop()


def test_a_fuse_of_sentence_transformer_folders_is_one(tmp_path: Path) -> None:
    base = bert_checkpoints.base_tensors()
    tuned = [{n.removeprefix("bert."): v for n, v in bert_checkpoints.finetuned(base, seed).items()} for seed in (1, 2)]
    models = [sentence_folder(tmp_path / f"model-{i}", tensors) for i, tensors in enumerate((base, *tuned))]
    with pytest.raises(SystemExit) as stopped:
        main(["fuse", *map(str, models), "--out", str(tmp_path / "fused")])
    assert not stopped.value.code
    for path, content in MODULES.items():
        assert (tmp_path / "fused" / path).read_bytes() == content
    fused = load_file(tmp_path / "fused" / "model.safetensors")
    assert set(fused) == set(base)
    name = "encoder.layer.0.output.dense.weight"
    exact = np.mean([t[name].astype(float) for t in tuned], axis=0)
    np.testing.assert_allclose(fused[name], exact, rtol=0, atol=1e-7)
