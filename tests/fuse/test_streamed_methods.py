"""Every method streamed over files equals its slow author on the whole model, with the same bytes however it runs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hubfusion.errors import CheckpointError
from hubfusion.fuse import Settings, fuse
from hubfusion.fuse import first_pass as survey
from hubfusion.fuse.methods import METHODS
from hubfusion.lineage import Recipe
from tests import reference
from tests.random_checkpoints import load, recipe_of, save

SHAPES = {"a": (150, 130), "b": (130,), "c": (64, 20), "d": (20_000,), "e": (), "f": (3, 4, 5)}
WHOLE_MODEL = ("ties", "trimmed_mean", "median", "geometric_median", "multi_krum")
UNEQUAL = [n for n in METHODS if n not in ("trimmed_mean", "median")]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(0)
    base = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    inputs = []
    for i in range(5):
        size = 0.01 * 2.0**i
        tensors = {n: (v + size * rng.standard_normal(v.shape)).astype(np.float32) for n, v in base.items()}
        inputs.append(save(folder / str(i), tensors))
        fishers = {n: rng.random(v.shape).astype(np.float32) for n, v in base.items()}
        save_file({n: np.asarray(v) for n, v in fishers.items()}, inputs[-1] / "fisher.safetensors")
        x = rng.standard_normal((200, 130)).astype(np.float32)
        save_file({"a": x.T @ x}, inputs[-1] / "regmean.safetensors")
    return save(folder / "base", base), inputs


def plan_for(name: str, k: int, **options) -> Recipe:
    coefficients = tuple(1.0 + 0.5 * i for i in range(k)) if name in UNEQUAL else (1.0,) * k
    return recipe_of(tuple(map(str, range(k))), coefficients, name, tuple(sorted(options.items())))


def inputs_of(name: str, inputs: list[Path]) -> list[Path]:
    return inputs[:2] if name == "slerp" else inputs


def split(vector: np.ndarray, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    sizes = np.cumsum([v.size for v in like.values()])[:-1]
    return {n: part.reshape(v.shape) for (n, v), part in zip(like.items(), np.split(vector, sizes), strict=True)}


def expected(name: str, base: Path, inputs: list[Path], coefficients) -> dict[str, np.ndarray]:
    """The fused deltas by the slow author: over one long vector where a method looks at the whole model."""
    start = {n: v.astype(np.float64) for n, v in load(base).items() if v.size}
    deltas = [{n: v.astype(np.float64) - start[n] for n, v in load(p).items() if v.size} for p in inputs]
    slow = getattr(reference, name)
    if name in WHOLE_MODEL:
        return split(slow([np.concatenate([d[n].ravel() for n in start]) for d in deltas], coefficients), start)
    out = {}
    for n in start:
        parts = [d[n] for d in deltas]
        if name in ("slerp", "karcher"):
            out[n] = slow([p + start[n] for p in parts], coefficients) - start[n]
        elif name == "fisher":
            from safetensors.numpy import load_file

            fishers = [load_file(p / "fisher.safetensors")[n].astype(np.float64) for p in inputs]
            out[n] = slow(parts, coefficients, fishers)
        elif name == "regmean":
            from safetensors.numpy import load_file

            grams = [load_file(p / "regmean.safetensors")["a"].astype(np.float64) for p in inputs]
            out[n] = slow(parts, coefficients, grams) if n == "a" else reference.average(parts, coefficients)
        else:
            out[n] = slow(parts, coefficients)
    return out


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("dare", "dare_ties", "della")])
def test_a_streamed_fuse_equals_the_slow_author(models, tmp_path, name):
    base, inputs = models[0], inputs_of(name, models[1])
    plan = plan_for(name, len(inputs))
    fuse(plan, base, inputs, tmp_path / "out")
    out, start = load(tmp_path / "out"), load(base)
    size = {n: np.abs(load(inputs[-1])[n] - start[n]).max() for n in SHAPES}
    for n, delta in expected(name, base, inputs, plan.coefficients).items():
        rounding = 1.2e-7 * max(1.0, float(np.abs(start[n]).max()))
        tolerance = rounding + float(size[n]) * 1e-5
        np.testing.assert_allclose(out[n].astype(float), start[n].astype(float) + delta, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["processes", "threads"])
@pytest.mark.parametrize("name", METHODS)
def test_the_same_bytes_for_any_workers_and_pieces(models, tmp_path, monkeypatch, name, kind):
    monkeypatch.setattr("hubfusion.parallel.may_fork", lambda: kind == "processes")
    base, inputs = models[0], inputs_of(name, models[1])
    plan = plan_for(name, len(inputs))
    wanted = fuse(plan, base, inputs, tmp_path / "out").files
    for workers, chunk in ((1, 8192), (3, 16384)):
        settings = Settings(workers=workers, chunk_entries=chunk)
        assert fuse(plan, base, inputs, tmp_path / "out", settings=settings).files == wanted
    turned = replace(plan, inputs=plan.inputs[::-1])
    assert fuse(turned, base, inputs[::-1], tmp_path / "out").files == wanted


@pytest.mark.parametrize("name", METHODS)
def test_torch_tensors_take_the_same_path(models, tmp_path, name):
    pytest.importorskip("torch")
    base, inputs = models[0], inputs_of(name, models[1])
    plan = plan_for(name, len(inputs))
    fuse(plan, base, inputs, tmp_path / "numpy")
    fuse(plan, base, inputs, tmp_path / "torch", settings=Settings(device="cpu"))
    here, there = load(tmp_path / "numpy"), load(tmp_path / "torch")
    for n in SHAPES:
        np.testing.assert_allclose(there[n], here[n], rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("norms, where, entry", [(True, "d", 12_345), (False, "d", 12_345), (True, "a", 260)])
@pytest.mark.parametrize("name", METHODS)
def test_a_not_finite_input_never_passes(models, tmp_path, name, norms, where, entry):
    base, inputs = models[0], list(inputs_of(name, models[1]))
    tensors = load(inputs[1])
    tensors[where].flat[entry] = np.inf
    inputs[1] = save(tmp_path / "bad", tensors)
    for extra in ("fisher.safetensors", "regmean.safetensors"):
        (inputs[1] / extra).write_bytes((inputs[0] / extra).read_bytes())
    with pytest.raises(CheckpointError, match=rf"bad: {where}: entry {entry} minus the base's is inf; only"):
        fuse(plan_for(name, len(inputs)), base, inputs, tmp_path / "out", settings=Settings(norms=norms))
    assert not any((tmp_path / "out").glob("*"))


def test_norms_that_nobody_asked_for_are_none_and_change_no_byte(models, tmp_path):
    for name in ("average", "ties"):
        measured = fuse(plan_for(name, 5), *models, tmp_path / "a")
        bare = fuse(plan_for(name, 5), *models, tmp_path / "b", settings=Settings(norms=False))
        assert all(one.norm is None for one in bare.inputs) and all(one.norm is not None for one in measured.inputs)
        assert bare.files == measured.files


def test_ties_trimmed_by_parameter_differs_from_the_whole_model_and_equals_its_author(models, tmp_path):
    base, inputs = models
    fuse(plan_for("ties", 5), base, inputs, tmp_path / "model")
    fuse(plan_for("ties", 5, scope="parameter"), base, inputs, tmp_path / "parameter")
    start, out = load(base), load(tmp_path / "parameter")
    for n in SHAPES:
        deltas = [load(p)[n].astype(np.float64) - start[n] for p in inputs]
        delta = reference.ties(deltas, plan_for("ties", 5).coefficients)
        np.testing.assert_allclose(out[n], start[n] + delta, atol=1e-6)
    assert not np.array_equal(out["a"], load(tmp_path / "model")["a"])


def test_ties_finds_its_thresholds_exactly_when_the_model_is_larger_than_its_sample(models, tmp_path, monkeypatch):
    base, inputs = models
    wanted = fuse(plan_for("ties", 5), base, inputs, tmp_path / "a").files
    monkeypatch.setattr("hubfusion.fuse.selection.MAX_HELD", 999)
    assert fuse(plan_for("ties", 5), base, inputs, tmp_path / "b").files == wanted


def test_dare_masks_differ_between_parameters_and_inputs_and_follow_the_seed(models, tmp_path):
    base, inputs = models[0], [models[1][0]] * 2
    plan = recipe_of(("x", "y"), (1.0, 0.0), "dare", (("density", 0.5),))
    fuse(plan, base, inputs, tmp_path / "x")
    fuse(recipe_of(("x", "y"), (0.0, 1.0), "dare", (("density", 0.5),)), base, inputs, tmp_path / "y")
    fuse(recipe_of(("x", "y"), (1.0, 0.0), "dare", (("density", 0.5), ("seed", 1))), base, inputs, tmp_path / "s")
    start = load(base)["d"]
    masks = [load(tmp_path / n)["d"] != start for n in "xys"]
    for one, two in ((0, 1), (0, 2)):
        assert 0.45 < (masks[one] == masks[two]).mean() < 0.55
    assert fuse(plan, base, inputs, tmp_path / "again").files == fuse(plan, base, inputs, tmp_path / "x").files


def test_fisher_without_its_file_or_with_a_negative_entry_is_refused(models, tmp_path):
    base, inputs = models[0], list(models[1])
    bare = save(tmp_path / "bare", load(inputs[0]))
    with pytest.raises(CheckpointError, match=r"bare: no fisher.safetensors in it"):
        fuse(plan_for("fisher", 5), base, [bare, *inputs[1:]], tmp_path / "out")
    save_file({n: np.full(s, -1, np.float32) for n, s in SHAPES.items()}, bare / survey.FISHER_FILE)
    with pytest.raises(CheckpointError, match="Fisher information must be at least 0 and finite"):
        fuse(plan_for("fisher", 5), base, [bare, *inputs[1:]], tmp_path / "out")


def test_regmean_refuses_a_matrix_of_another_layers_size(models, tmp_path):
    base, inputs = models
    bad = save(tmp_path / "bad", load(inputs[0]))
    save_file({"a": np.eye(7, dtype=np.float32)}, bad / survey.ACTIVATIONS_FILE)
    with pytest.raises(CheckpointError, match=r"a: shape \[7, 7\], a linear layer of shape \[150, 130\] needs"):
        fuse(plan_for("regmean", 5), base, [bad, *inputs[1:]], tmp_path / "out")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of peak memory")
def test_memory_does_not_grow_with_inputs_or_model(tmp_path):
    import subprocess
    import sys

    rng = np.random.default_rng(0)
    script = (
        "import sys; from pathlib import Path; from hubfusion.fuse import fuse\n"
        "from hubfusion.lineage import Input, Recipe\n"
        "k = int(sys.argv[3]); base, one = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "recipe = Recipe('base', tuple(Input(str(i)) for i in range(k)), sys.argv[4])\n"
        "fuse(recipe, base, [one] * k, base.parent / 'out')\n"
        "status = Path('/proc/self/status').read_text().split()\n"
        "print(int(status[status.index('VmHWM:') + 1]) / 1024)"
    )

    def peak(shape: int | tuple[int, int], k: int, method: str) -> float:
        folder = tmp_path / str(shape)
        if not folder.exists():
            value = rng.standard_normal(shape, dtype=np.float32)
            save(folder / "base", {"w": value})
            save(folder / "one", {"w": value + np.float32(0.1)})
            if isinstance(shape, tuple):
                save_file({"w": np.eye(shape[1], dtype=np.float32)}, folder / "one" / "regmean.safetensors")
        command = [sys.executable, "-c", script, str(folder / "base"), str(folder / "one"), str(k), method]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    for method in ("average", "dare_ties"):
        small, wide, large = peak(4 << 20, 2, method), peak(4 << 20, 24, method), peak(12 << 20, 2, method)
        assert wide < small + 12 and large < small + 8
    for method in ("iso_c", "regmean"):  # a matrix of 4 MiB whole, but not all inputs' at once
        assert peak((4096, 256), 16, method) < peak((4096, 256), 2, method) + 12


def test_ties_of_a_finetune_with_frozen_layers_keeps_every_change(models, tmp_path, monkeypatch):
    monkeypatch.setattr("hubfusion.fuse.selection.MAX_HELD", 999)
    base = models[0]
    start = load(base)
    changed = {**start, "b": start["b"] + np.float32(0.5)}  # 130 of 40 thousand entries; density 0.2 asks for more
    fuse(plan_for("ties", 1), base, [save(tmp_path / "frozen", changed)], tmp_path / "out")
    out = load(tmp_path / "out")
    assert all(np.array_equal(out[n], changed[n]) for n in SHAPES)


FULL = {  # options at which a method keeps everything, and the slow author that says the same
    "dare": ("task_arithmetic", {"density": 1.0}),
    "dare_ties": ("ties_of_all", {"density": 1.0}),
    "della": ("ties_of_all", {"density": 1.0, "epsilon": 0.0}),
    "breadcrumbs": ("task_arithmetic", {"density": 1.0, "gamma": 0.0}),
}
DTYPES = {"float64": 1e-14, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}  # spacing at 1
SMALL = {"a": (12, 9), "b": (9,), "c": (), "d": (2, 3, 4), "e": (40, 6)}


@pytest.fixture(scope="module")
def typed(tmp_path_factory) -> dict[str, tuple[Path, list[Path]]]:
    """A base and five finetunes in each float dtype, in two shards each, with statistics and an empty parameter."""
    found = {}
    for dtype in DTYPES:
        folder, rng = tmp_path_factory.mktemp(dtype), np.random.default_rng(5)
        base = {n: rng.standard_normal(s).astype(dtype) for n, s in SMALL.items()} | {"z": np.zeros((0, 3), dtype)}
        inputs = []
        for i in range(5):
            tensors = {n: (v + 0.1 * rng.standard_normal(v.shape)).astype(dtype) for n, v in base.items()}
            inputs.append(save(folder / str(i), tensors, shards=2))
            fishers = {n: np.asarray(rng.random(v.shape), np.float32) for n, v in base.items()}
            save_file(fishers, inputs[-1] / "fisher.safetensors")
            x = rng.standard_normal((30, 9)).astype(np.float32)
            save_file({"a": x.T @ x}, inputs[-1] / "regmean.safetensors")
        found[dtype] = save(folder / "base", base, shards=2), inputs
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_in_every_dtype_is_its_slow_author_rounded_once(typed, tmp_path, monkeypatch, name, dtype):
    monkeypatch.setattr(reference, "ties_of_all", lambda d, a: reference.ties(d, a, density=1.0), raising=False)
    author, options = FULL.get(name, (name, {"density": 1.0} if name == "sce" else {}))
    if name == "sce":
        monkeypatch.setattr(reference, "sce", partial(reference.sce, density=1.0))
    base, inputs = typed[dtype][0], inputs_of(name, typed[dtype][1])
    plan = plan_for(name, len(inputs), **options)
    fuse(plan, base, inputs, tmp_path / "out")
    out, start = load(tmp_path / "out"), load(base)
    assert out["z"].shape == (0, 3)
    for n, delta in expected(author, base, inputs, plan.coefficients).items():
        exact = start[n].astype(np.float64) + delta
        assert out[n].dtype == np.dtype(dtype) and out[n].shape == exact.shape
        steps = max(float(np.abs(load(p)[n].astype(float) - start[n].astype(float)).max()) for p in inputs)
        working = (1e-12 if dtype == "float64" else 2e-6) * steps
        smoothing = 1e-5 * steps if name == "geometric_median" else 0.0
        allowed = 0.5 * DTYPES[dtype] * np.maximum(np.abs(exact), 1e-4) * (1 + 1e-6) + working * 5 + smoothing
        assert (np.abs(out[n].astype(np.float64) - exact) <= allowed).all(), n
