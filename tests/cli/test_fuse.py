"""The command as people run it: local folders, recipe files, and ids on the embedded Hub."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hubfusion.cli import main
from hubfusion.fuse.methods import METHODS
from hubfusion.fuse.outer import OUTERS
from tests.random_checkpoints import family, load


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return int(stop.value.code or 0)


@pytest.fixture
def models(tmp_path) -> tuple[Path, list[Path]]:
    base, inputs = family(tmp_path, 3)
    (base / "config.json").write_text('{"model_type": "bert"}')
    (base / "vocab.txt").write_text("[PAD]\n")
    (base / "secret.py").write_text("print('never copied')")
    return base, inputs


def test_methods_lists_every_method_and_outer_optimizer_with_its_options(capsys):
    assert run("methods") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(METHODS) + len(OUTERS)
    assert any(line.startswith("  ties ") and "density=0.2" in line for line in lines)


def test_the_methods_page_is_what_the_command_prints(capsys):
    assert run("methods", "--markdown") == 0
    page = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
    assert page.read_text(encoding="utf-8") == capsys.readouterr().out


def test_a_fuse_of_folders_leaves_weights_config_recipe_manifest_and_card(models, tmp_path, capsys):
    base, inputs = models
    out = tmp_path / "out"
    assert run("fuse", "--method", "ties", "--density", "0.5", base, *inputs, "--out", out) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "config.json", "fuse.json", "model.safetensors", "recipe.toml", "vocab.txt",
    ]  # fmt: skip
    manifest = json.loads((out / "fuse.json").read_text())
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    assert manifest["files"] == [
        {"name": "model.safetensors", "sha256": digest, "size": (out / "model.safetensors").stat().st_size}
    ]
    assert manifest["options"] == {"density": 0.5, "scope": "model", "sign": "mass", "combine": "mean"}
    assert [i["model"] for i in manifest["inputs"]] == [str(p) for p in inputs]
    card = (out / "README.md").read_text()
    assert "`ties` with density = 0.5" in card and str(inputs[0]) in card
    assert "5 parameters of 3 finetunes fused" in capsys.readouterr().out


def test_the_recipe_that_was_left_gives_the_same_bytes(models, tmp_path):
    base, inputs = models
    options = ["--method=dare_ties", "--density=0.4", "--seed", "3", "--coefficients", "1,2,3", "--scale", "0.7"]
    assert run("fuse", *options, base, *inputs, "--out", tmp_path / "out") == 0
    assert run("fuse", tmp_path / "out" / "recipe.toml", "--out", tmp_path / "again") == 0
    for name in ("model.safetensors", "fuse.json", "recipe.toml", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_mergekit_file_is_followed(models, tmp_path, capsys):
    base, inputs = models
    models_yaml = "\n".join(f"  - model: {json.dumps(p.name)}" for p in inputs)
    (tmp_path / "merge.yml").write_text(
        f"merge_method: linear\nbase_model: base\ndtype: float32\nmodels:\n{models_yaml}\n"
    )
    assert run("fuse", tmp_path / "merge.yml", "--out", tmp_path / "out") == 0
    assert capsys.readouterr().err.startswith("note: dtype: sums are float32")
    mean = np.mean([load(p)["encoder.layer.0.dense.bias"].astype(float) for p in inputs], axis=0)
    np.testing.assert_allclose(load(tmp_path / "out")["encoder.layer.0.dense.bias"], mean, rtol=1e-6)


def test_the_outer_optimizers_state_is_found_in_the_base_folder(models, tmp_path):
    base, inputs = models
    first = ["--outer", "momentum", "--outer-beta", "0.5"]
    assert run("fuse", *first, base, *inputs, "--out", tmp_path / "next") == 0
    assert (tmp_path / "next" / "outer.safetensors").is_file()
    assert run("fuse", *first, tmp_path / "next", *inputs, "--out", tmp_path / "third") == 0
    name = "encoder.layer.0.dense.bias"
    mean = np.mean([load(p)[name].astype(float) for p in inputs], axis=0)
    step = mean - load(base)[name]
    np.testing.assert_allclose(load(tmp_path / "third")[name], mean + 0.5 * step, atol=1e-6)


def test_inverse_norm_coefficients_are_written_into_the_recipe(models, tmp_path):
    base, inputs = models
    assert run("fuse", "--coefficients", "inverse-norm", base, *inputs, "--out", tmp_path / "out") == 0
    manifest = json.loads((tmp_path / "out" / "fuse.json").read_text())
    products = [i["coefficient"] * i["delta_norm"] for i in manifest["inputs"]]
    assert products == pytest.approx([products[0]] * 3, rel=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method", "tie"], "method must be one of average"),
        (["--method", "ties", "--densty", "0.1"], "ties: unknown option 'densty', allowed are combine, density"),
        (["--method", "ties", "--density", "few"], "ties: density must be like 0.2, got 'few'"),
        (["--method", "ties", "--density"], "argument --density: expected one argument"),
        (["--coefficients", "a,b"], "coefficients must be uniform, inverse-norm or numbers"),
        (["--coefficients", "1,2"], "one coefficient per input, got 2 for 3 inputs"),
        (["--workers", "two"], "argument --workers: invalid int value: 'two'"),
        (["--max-shard-size", "big"], "max-shard-size must be like 5GB or 500MB, got 'big'"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_1(models, tmp_path, capsys, arguments, message):
    base, inputs = models
    assert run("fuse", base, *inputs, "--out", tmp_path / "out", *arguments) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_recipe_file_takes_no_further_options(tmp_path, capsys):
    assert run("fuse", tmp_path / "recipe.toml", "--out", tmp_path / "out", "--density", "0.1") == 1
    assert "a recipe file says everything" in capsys.readouterr().err


def test_something_that_is_neither_folder_nor_id_is_named(models, tmp_path, capsys):
    base, inputs = models
    assert run("fuse", base, "no such folder", "--out", tmp_path / "out", "--endpoint", "http://127.0.0.1:9") == 1
    assert "no such folder: neither a folder here nor owner/name[@revision]" in capsys.readouterr().err


def test_shards_are_written_as_asked(models, tmp_path):
    base, inputs = models
    assert run("fuse", base, *inputs, "--out", tmp_path / "out", "--max-shard-size", "0.2KB") == 0
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert run("fuse", base, *inputs, "--out", tmp_path / "whole") == 0
    one, other = load(tmp_path / "out"), load(tmp_path / "whole")
    assert all(np.array_equal(one[n], other[n]) for n in other)


def test_a_fuse_imports_no_deep_learning_library():
    script = (
        "import sys, hubfusion.cli.fuse, hubfusion.fuse.folder, hubfusion.fuse.inputs\n"
        "heavy = {'torch', 'transformers', 'datasets', 'scipy', 'pandas', 'huggingface_hub', 'rich.progress'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert found.strip() == "[]"
