from __future__ import annotations

import math

import numpy as np
import pytest

from hubfusion.errors import CheckpointError, RecipeError
from hubfusion.fuse import fuse
from hubfusion.fuse.outer import OUTERS
from tests.random_checkpoints import load, recipe_of, save


def iterate(tmp_path, outer: str, options: dict, targets: list[float], start: float = 1.0):
    """Bases after each iteration, when contribution i moves every base to ``base + targets[i]``."""
    bases, state = [start], None
    for i, move in enumerate(targets):
        base = save(tmp_path / f"base{i}", {"w": np.array([bases[-1]], np.float32)})
        one = save(tmp_path / f"one{i}", {"w": np.array([bases[-1] + move], np.float32)})
        plan = recipe_of(("one",), (1.0,), outer=outer, outer_options=tuple(sorted(options.items())))
        out = tmp_path / f"out{i}"
        fuse(plan, base, [one], out, state=state)
        bases.append(float(load(out)["w"][0]))
        state = out
    return bases


def by_hand(outer: str, moves: list[float], start: float = 1.0, **o: float) -> list[float]:
    """The published update rules on one number, in plain floats."""
    bases, m, v, e = [start], 0.0, 0.0, start
    for g in moves:
        x = bases[-1]
        if outer == "plain":
            x += o["lr"] * g
        elif outer == "momentum":
            m = o["beta"] * m + g
            x += o["lr"] * m
        elif outer == "nesterov":
            m = o["beta"] * m + g
            x += o["lr"] * (g + o["beta"] * m)
        elif outer == "fedadam":
            m = o["beta1"] * m + (1 - o["beta1"]) * g
            v = o["beta2"] * v + (1 - o["beta2"]) * g * g
            x += o["lr"] * m / (math.sqrt(v) + o["tau"])
        elif outer == "ema":
            e = o["decay"] * e + (1 - o["decay"]) * (x + g)
            x = e if o.get("deploy") else x + g
        elif outer == "liti":
            x = (1 - o["eta"]) * start + o["eta"] * (x + g)
        bases.append(x)
    return bases


@pytest.mark.parametrize(
    "outer, options",
    [
        ("plain", {"lr": 0.5}),
        ("momentum", {"lr": 0.8, "beta": 0.6}),
        ("nesterov", {"lr": 0.7, "beta": 0.9}),
        ("fedadam", {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "tau": 0.01}),
        ("ema", {"decay": 0.75}),
        ("ema", {"decay": 0.75, "deploy": True}),
        ("liti", {"eta": 0.3}),
    ],
)
def test_three_iterations_follow_the_published_rule_through_the_stored_state(tmp_path, outer, options):
    moves = [0.5, -0.25, 1.0]
    assert iterate(tmp_path, outer, options, moves) == pytest.approx(by_hand(outer, moves, **options), rel=1e-6)


def test_torch_sgd_with_nesterov_takes_the_same_steps(tmp_path):
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    sgd = torch.optim.SGD([weight], lr=0.7, momentum=0.9, nesterov=True)
    bases = [1.0]
    for move in (0.5, -0.25, 1.0):
        weight.grad = torch.tensor([-move])
        sgd.step()
        bases.append(float(weight.detach()))
    assert iterate(tmp_path, "nesterov", {}, [0.5, -0.25, 1.0]) == pytest.approx(bases, rel=1e-6)


@pytest.mark.parametrize("outer, options", [("plain", {}), ("momentum", {"beta": 0.0}), ("liti", {"eta": 1.0})])
def test_the_neutral_setting_is_cold_fusion_itself(tmp_path, outer, options):
    assert iterate(tmp_path, outer, options, [0.5, 0.25]) == [1.0, 1.5, 1.75]


def test_the_state_is_a_safetensors_file_beside_the_weights_and_in_the_manifest_files(tmp_path):
    base = save(tmp_path / "base", {"w": np.zeros(3, np.float16), "steps": np.array(7)})
    one = save(tmp_path / "one", {"w": np.ones(3, np.float16)})
    plan = recipe_of(("one",), (1.0,), outer="fedadam")
    first = fuse(plan, base, [one], tmp_path / "out")
    assert [f.name for f in first.files] == ["model.safetensors", "outer.safetensors"]
    from safetensors.numpy import load_file

    state = load_file(tmp_path / "out" / "outer.safetensors")
    assert {n: (v.dtype.name, v.tolist()) for n, v in state.items()} == {
        "m.w": ("float32", pytest.approx([0.1] * 3)),
        "v.w": ("float32", pytest.approx([0.01] * 3)),
    }
    assert fuse(plan, base, [one], tmp_path / "again").files == first.files


def test_a_state_of_another_optimizer_or_shape_is_refused(tmp_path):
    base = save(tmp_path / "base", {"w": np.zeros(3, np.float32)})
    one = save(tmp_path / "one", {"w": np.ones(3, np.float32)})
    fuse(recipe_of(("one",), (1.0,), outer="momentum"), base, [one], tmp_path / "out")
    with pytest.raises(CheckpointError, match="fedadam keeps m, v; this state has momentum"):
        fuse(recipe_of(("one",), (1.0,), outer="fedadam"), base, [one], tmp_path / "next", state=tmp_path / "out")
    other = save(tmp_path / "other", {"w": np.zeros(4, np.float32)})
    with pytest.raises(CheckpointError, match=r"momentum.w: F32 \[3\], a float \[4\] is needed"):
        fuse(recipe_of(("one",), (1.0,), outer="momentum"), other, [other], tmp_path / "next", state=tmp_path / "out")


@pytest.mark.parametrize(
    "outer, options, message",
    [
        ("sgd", {}, "outer must be one of ema, fedadam, liti, momentum, nesterov, plain, got 'sgd'"),
        ("plain", {"lr": 0.0}, r"plain: lr must be in \(0, inf\), got 0"),
        ("nesterov", {"beta": 1.0}, r"nesterov: beta must be in \[0, 1\), got 1"),
        ("liti", {"eta": 0.0}, r"liti: eta must be in \(0, 1\], got 0"),
        ("ema", {"deploy": 1}, "ema: deploy must be true or false, got 1"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, outer, options, message):
    with pytest.raises(RecipeError, match=message):
        iterate(tmp_path, outer, options, [1.0])


def test_every_outer_optimizer_names_its_paper_and_departures():
    for name, outer in OUTERS.items():
        text = outer.function.__doc__ or ""
        assert "arXiv" in text and outer.summary.endswith("."), name
