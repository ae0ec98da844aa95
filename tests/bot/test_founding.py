"""A base may be founded from any folder of a model: what else lies in it does not become part of the base."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from bot.iteration import Verdict
from hubfusion.cli import main
from hubfusion.release.publish import manifest_at
from tests import bert_checkpoints
from tests.world import BASE, make_world


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
