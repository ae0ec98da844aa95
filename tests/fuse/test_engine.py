from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from hubfusion.checkpoint.deltas import open_models
from hubfusion.errors import CheckpointError, RecipeError
from hubfusion.fuse import FuseProgress, Settings, fuse
from hubfusion.fuse.first_pass import grams
from hubfusion.lineage import Input, Recipe, Revision
from tests.random_checkpoints import BACKBONE, backbone, family, load, recipe_of, save


def plan(k: int, **fields) -> Recipe:
    coefficients = fields.pop("coefficients", (1.0,) * k)
    return recipe_of(tuple(f"{i:02d}" for i in range(k)), coefficients, **fields)


def average(base: Path, inputs: list[Path], out: Path, **fields):
    return fuse(plan(len(inputs), **fields), base, inputs, out)


def test_the_average_of_two_finetunes_is_the_mean_of_every_parameter(tmp_path):
    base = save(tmp_path / "base", {"w": np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)})
    one = save(tmp_path / "one", {"w": np.array([[1.0, 4.0], [3.0, 0.0]], np.float32)})
    two = save(tmp_path / "two", {"w": np.array([[2.0, 2.0], [5.0, 0.0]], np.float32)})
    fused = average(base, [one, two], tmp_path / "out")
    assert load(tmp_path / "out")["w"].tolist() == [[1.5, 3.0], [4.0, 0.0]]
    assert [i.norm for i in fused.inputs] == [pytest.approx(20**0.5, rel=1e-5), pytest.approx(21**0.5, rel=1e-5)]
    assert [f.name for f in fused.files] == ["model.safetensors"]


def test_coefficients_are_shares_and_scale_multiplies_the_fused_delta(tmp_path):
    base = save(tmp_path / "base", {"w": np.array([1.0], np.float32)})
    one = save(tmp_path / "one", {"w": np.array([2.0], np.float32)})
    two = save(tmp_path / "two", {"w": np.array([6.0], np.float32)})
    average(base, [one, two], tmp_path / "out", coefficients=(3.0, 1.0), scale=0.5)
    assert load(tmp_path / "out")["w"].tolist() == [1 + 0.5 * (0.75 * 1 + 0.25 * 5)]


def test_coefficients_follow_their_inputs_into_the_canonical_order(tmp_path):
    base = save(tmp_path / "base", {"w": np.array([0.0], np.float32)})
    one = save(tmp_path / "one", {"w": np.array([8.0], np.float32)})
    two = save(tmp_path / "two", {"w": np.array([16.0], np.float32)})
    recipe = recipe_of(("z", "a"), (3.0, 1.0))
    fused = fuse(recipe, base, [one, two], tmp_path / "out")
    assert load(tmp_path / "out")["w"].tolist() == [10.0]
    assert [(i.input.model, i.norm) for i in fused.inputs] == [("z", 8.0), ("a", 16.0)]


@pytest.mark.parametrize("dtype, ulp", [("float32", 2.0**-23), ("float16", 2.0**-10), ("bfloat16", 2.0**-7)])
def test_the_average_is_correctly_rounded_but_for_near_ties(tmp_path, dtype, ulp):
    base, inputs = family(tmp_path, 5, dtype)
    average(base, inputs, tmp_path / "out")
    models = [load(p) for p in inputs]
    right = total = 0
    for name, value in load(tmp_path / "out").items():
        assert value.dtype == np.dtype(dtype)
        for index in np.ndindex(value.shape):
            exact = sum(Fraction(float(m[name][index])) for m in models) / 5
            error = abs(Fraction(float(value[index])) - exact)
            assert error <= Fraction(0.5001) * Fraction(ulp) * max(abs(exact), Fraction(2.0**-14))
            right += float(value[index]) == float(np.float64(float(exact)).astype(np.dtype(dtype)))
            total += 1
    assert right >= 0.99 * total


def test_float64_checkpoints_are_fused_in_float64(tmp_path):
    base = save(tmp_path / "base", {"w": np.array([1.0])})
    one = save(tmp_path / "one", {"w": np.array([1 + 2.0**-40])})
    average(base, [one, one], tmp_path / "out")
    assert load(tmp_path / "out")["w"].tolist() == [1 + 2.0**-40]


def test_finetunes_with_a_prefix_and_different_heads_are_fused_into_a_bare_base(tmp_path):
    names = backbone(100)
    base = save(tmp_path / "base", {**names, "embeddings.position_ids": np.arange(5)[None]})
    inputs = []
    for i, classes in enumerate((2, 3)):
        head = {"classifier.weight": np.ones((classes, 4), np.float32)}
        inputs.append(save(tmp_path / str(i), {**backbone(i, shift=names, prefix="bert."), **head}))
    fused = average(base, inputs, tmp_path / "out")
    out = load(tmp_path / "out")
    assert set(out) == {*BACKBONE, "embeddings.position_ids"}
    assert out["embeddings.position_ids"].tolist() == [[0, 1, 2, 3, 4]]
    assert fused.kept == ("embeddings.position_ids",)
    assert [i.dropped for i in fused.inputs] == [("classifier.weight",), ("classifier.weight",)]
    for name in BACKBONE:
        models = [load(p)["bert." + name].astype(np.float64) for p in inputs]
        np.testing.assert_allclose(out[name], np.mean(models, axis=0), rtol=1.2e-7)


def test_the_bases_pretraining_head_and_pooler_are_kept_when_an_input_lacks_them(tmp_path):
    names = backbone(100)
    extra = {"bert.pooler.dense.weight": np.full((4, 4), 3, np.float32), "cls.bias": np.full(9, 4, np.float32)}
    prefixed = {"bert." + n: v for n, v in names.items()}
    base = save(tmp_path / "base", {**prefixed, **extra}, model_type="bert")
    one = save(tmp_path / "one", {**backbone(1, shift=names, prefix="bert."), **{n: v + 1 for n, v in extra.items()}})
    two = save(tmp_path / "two", backbone(2, shift=names))
    fused = average(base, [one, two], tmp_path / "out")
    out = load(tmp_path / "out")
    assert fused.kept == ("bert.pooler.dense.weight", "cls.bias")
    assert out["cls.bias"].tolist() == [4] * 9 and out["bert.pooler.dense.weight"][0, 0] == 3
    average(base, [one, one], tmp_path / "both")
    assert load(tmp_path / "both")["cls.bias"].tolist() == [5] * 9


def test_a_task_head_of_the_base_is_never_fused(tmp_path):
    head = {"classifier.bias": np.zeros(2, np.float32)}
    base = save(tmp_path / "base", {**backbone(100, prefix="bert."), **head}, model_type="bert")
    one = save(tmp_path / "one", {**backbone(1, prefix="bert."), "classifier.bias": np.ones(2, np.float32)})
    two = save(tmp_path / "two", {**backbone(2, prefix="bert."), "classifier.bias": np.ones(3, np.float32)})
    fused = average(base, [one, two], tmp_path / "out")
    assert fused.kept == ("classifier.bias",) and load(tmp_path / "out")["classifier.bias"].tolist() == [0, 0]


def test_a_tied_parameter_that_the_base_stores_twice_is_fused_in_both_places(tmp_path):
    words = np.arange(8, dtype=np.float32).reshape(4, 2)
    name, alias = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    base = save(tmp_path / "base", {name: words, "bert.encoder.x": words[0], alias: words}, model_type="bert")
    one = save(tmp_path / "one", {name: words + 2, "bert.encoder.x": words[0]})
    fused = average(base, [one], tmp_path / "out")
    assert fused.kept == () and load(tmp_path / "out")[alias][0].tolist() == [2, 3]


def test_what_a_base_stores_under_two_tied_names_with_other_values_is_not_tied(tmp_path):
    words = np.arange(8, dtype=np.float32).reshape(4, 2)
    name, alias = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    base = save(tmp_path / "base", {name: words, "bert.encoder.x": words[0], alias: words + 1}, model_type="bert")
    one = save(tmp_path / "one", {name: words + 2, "bert.encoder.x": words[0]})
    fused = average(base, [one], tmp_path / "out")
    assert fused.kept == (alias,) and load(tmp_path / "out")[alias][0].tolist() == [1, 2]


def test_an_input_that_stores_a_tied_parameter_twice_is_accepted(tmp_path):
    words = np.arange(8, dtype=np.float32).reshape(4, 2)
    rest = {"encoder.w": np.ones((2, 2), np.float32), "shared.weight": words}
    base = save(tmp_path / "base", rest, model_type="bart")
    one = save(tmp_path / "one", {**rest, "decoder.embed_tokens.weight": words})
    assert average(base, [one], tmp_path / "out").inputs[0].dropped == ("decoder.embed_tokens.weight",)


def broken(change) -> dict[str, np.ndarray]:
    tensors = backbone(1)
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("encoder.layer.1.dense.bias"), r"one: encoder.layer.1.dense.bias of the base is missing"),
        (
            lambda t: t.update({"encoder.layer.2.x": np.ones(2, np.float32)}),
            r"one: encoder.layer.2.x lies in the backbone, but the base has no",
        ),
        (
            lambda t: t.update({"embeddings.word_embeddings.weight": np.ones((12, 4), np.float32)}),
            r"embeddings.word_embeddings.weight has shape \[12, 4\], the base has \[11, 4\]",
        ),
        (
            lambda t: t.update({"encoder.layer.1.dense.bias": np.ones(4, np.int32)}),
            "dtype I32, a float dtype is needed",
        ),
        (lambda t: t.update({"position_ids": np.arange(4)}), r"position_ids has shape \[4\], the base has \[3\]"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_written(tmp_path, change, message):
    base = save(tmp_path / "base", {**backbone(100), "position_ids": np.arange(3)})
    one = save(tmp_path / "one", broken(change))
    with pytest.raises(CheckpointError, match=message):
        average(base, [one], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_input_that_is_not_finite_is_refused_with_its_file_and_parameter(tmp_path, value):
    base, inputs = family(tmp_path, 3)
    tensors = load(inputs[1])
    tensors["encoder.layer.0.dense.weight"][1, 2] = value
    save(inputs[1], tensors)
    with pytest.raises(CheckpointError, match=rf"{inputs[1]}: encoder.layer.0.dense.weight: entry 6 minus"):
        average(base, inputs, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_large_finite_delta_is_not_mistaken_for_an_overflow(tmp_path):
    base = save(tmp_path / "base", {"w": np.zeros(2, np.float32)})
    one = save(tmp_path / "one", {"w": np.array([1e30, 0], np.float32)})
    assert average(base, [one], tmp_path / "out").inputs[0].norm == 1e30


def test_half_precision_overflow_is_refused(tmp_path):
    base = save(tmp_path / "base", {"w": np.array([60000.0], np.float16)})
    one = save(tmp_path / "one", {"w": np.array([65000.0], np.float16)})
    with pytest.raises(CheckpointError, match="w: entry 0 would be 69984.0 in F16"):
        average(base, [one], tmp_path / "out", scale=2.0)


def test_the_output_is_never_the_base_or_an_input(tmp_path):
    base, inputs = family(tmp_path, 2)
    for place in (base, inputs[1]):
        with pytest.raises(CheckpointError, match="must be neither the base nor an input"):
            average(base, inputs, place)


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_same_bytes_whatever_workers_pieces_shards_and_order(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("hubfusion.parallel.may_fork", lambda: kind == "processes")
    rng = np.random.default_rng(0)
    tensors = [{n: rng.standard_normal((300, 130)).astype(np.float32) for n in ("a", "b", "c")} for _ in range(5)]
    base, *inputs = [save(tmp_path / str(i), t) for i, t in enumerate(tensors)]
    sharded = [save(tmp_path / f"s{i}", t, shards=2) for i, t in enumerate(tensors)]
    recipe = plan(4, coefficients=(0.1, 0.7, 0.3, 0.2))
    wanted = fuse(recipe, base, inputs, tmp_path / "out").files
    for workers, chunk in ((1, None), (3, 8192), (2, 16384), (5, 1)):
        settings = Settings(workers=workers, chunk_entries=chunk)
        assert fuse(recipe, base, inputs, tmp_path / "out", settings=settings).files == wanted
    assert fuse(recipe, sharded[0], sharded[1:], tmp_path / "out").files == wanted
    turned = replace(recipe, inputs=recipe.inputs[::-1])
    assert fuse(turned, base, inputs[::-1], tmp_path / "out").files == wanted


def test_a_lineage_recipe_is_followed(tmp_path):
    base, inputs = family(tmp_path, 2)
    revisions = tuple(Revision(f"someone/{i}", f"{i}" * 40) for i in range(2))
    recipe = Recipe(f"someone/base@{'a' * 40}", tuple(Input(r.pinned) for r in revisions))
    assert fuse(recipe, base, inputs, tmp_path / "a").files == average(base, inputs, tmp_path / "b").files


def test_progress_counts_every_entry_once(tmp_path):
    base, inputs = family(tmp_path, 2)
    events: list[FuseProgress] = []
    fuse(plan(2), base, inputs, tmp_path / "out", on_event=events.append)
    entries = sum(int(np.prod(s)) for s in BACKBONE.values())
    assert [e.done for e in events] == sorted(e.done for e in events)
    assert events[-1] == FuseProgress(entries, entries)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"method": "mean"}, "method must be one of average, .* got 'mean'"),
        ({"options": (("density", 0.2),)}, "average: unknown option 'density', allowed are norm"),
        ({"options": (("norm", 3),)}, "average: norm must be a text, got 3"),
        ({"method": "ties", "options": (("density", "a"),)}, "ties: density must be a number, got 'a'"),
        ({"method": "ties", "options": (("density", 0),)}, r"ties: density must be in \(0, 1\], got 0"),
        ({"scale": float("nan")}, "coefficients and scale must be finite, got nan"),
        ({"coefficients": (1.0, -1.0)}, "average: coefficients must have a positive sum, got 0"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused_in_one_line(tmp_path, fields, message):
    base, inputs = family(tmp_path, 2)
    with pytest.raises(RecipeError, match=message):
        average(base, inputs, tmp_path / "out", **fields)
    assert not any((tmp_path / "out").glob("*"))


def test_the_pieces_of_open_models_cover_every_entry_in_order(tmp_path):
    base, inputs = family(tmp_path, 2)
    with open_models(base, inputs) as models:
        for loaded in models.loaded_chunks():
            name = loaded.chunk.parameter.name
            expected = [load(p)[name].ravel() - load(base)[name].ravel() for p in inputs]
            assert np.array_equal(loaded.deltas, expected)
            assert np.array_equal(loaded.base, load(base)[name].ravel())


def test_inner_products_of_very_many_inputs_are_exact_and_summed_in_order(tmp_path):
    rng = np.random.default_rng(0)
    values = {"a": rng.standard_normal(30_000, np.float32), "b": rng.standard_normal((5, 7), np.float32)}
    deltas = [{n: rng.standard_normal(v.shape, np.float32) for n, v in values.items()} for _ in range(140)]
    base = save(tmp_path / "base", values)
    inputs = [save(tmp_path / str(i), {n: values[n] + d[n] for n in values}) for i, d in enumerate(deltas)]
    with open_models(base, inputs) as models:
        once, again = grams(models, 1), grams(models, 3)
    for name, value in values.items():
        rows = np.stack([value, *(load(p)[name] - value for p in inputs)]).reshape(141, -1).astype(np.float64)
        np.testing.assert_allclose(once[name], rows @ rows.T, rtol=1e-12, atol=1e-9)
        assert np.array_equal(once[name], again[name])
