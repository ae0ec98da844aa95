from __future__ import annotations

import os
from pathlib import Path

import pytest

from hubfusion.errors import RecipeError
from hubfusion.fuse.coefficients import by_examples, by_inverse_norm, delta_norms, uniform
from hubfusion.fuse.recipe import MERGEKIT, ReadRecipe, read_recipe, write_recipe
from hubfusion.lineage import Input, Recipe
from tests.random_checkpoints import family, load

TOML = """
base = "acme/base@v3"
method = "ties"
scale = 0.5

[options]
density = 0.3
sign = "count"

[outer]
name = "nesterov"
lr = 0.9
state = "acme/base@v3"

[[inputs]]
model = "ann/one"
coefficient = 2

[[inputs]]
model = "bob/two@main"
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_toml_recipe_says_everything(tmp_path):
    read = read_recipe(write(tmp_path / "recipe.toml", TOML))
    inputs = (Input("ann/one", 2.0), Input("bob/two@main"))
    options = (("density", 0.3), ("sign", "count"))
    outer = ("nesterov", (("lr", 0.9),), "acme/base@v3")
    assert read.recipe == Recipe("acme/base@v3", inputs, "ties", options, 0.5, *outer)


def test_what_is_written_is_read_back_the_same(tmp_path):
    recipe = read_recipe(write(tmp_path / "recipe.toml", TOML)).recipe
    assert read_recipe(write(tmp_path / "again.toml", write_recipe(recipe))).recipe == recipe
    odd = Recipe('a "quoted" \\ path\n\x7f', (Input("é/ü", 1e-30),), scale=-1.0)
    assert read_recipe(write(tmp_path / "odd.toml", write_recipe(odd))).recipe == odd


def test_folders_beside_the_recipe_are_found_wherever_it_is_run(tmp_path):
    (tmp_path / "one").mkdir()
    recipe = read_recipe(write(tmp_path / "r.toml", 'base = "one"\n[[inputs]]\nmodel = "one"\n')).recipe
    assert recipe.base == str(tmp_path / "one") and recipe.inputs == (Input(str(tmp_path / "one")),)


@pytest.mark.parametrize(
    "text, message",
    [
        ("base = ", r"r.toml: not TOML"),
        ('base = "a/b"', r"r.toml: at least one \[\[inputs\]\] table is needed"),
        ('[[inputs]]\nmodel = "a/b"', "r.toml: key 'base' is missing"),
        ('base = "a/b"\n[[inputs]]\n', r"r.toml: inputs\[0\]: key 'model' is missing"),
        (
            'base = "a/b"\nmethods = "ties"\n[[inputs]]\nmodel = "c/d"',
            "r.toml: 'methods' is not supported",
        ),
        ('base = "a/b"\nscale = "1"\n[[inputs]]\nmodel = "c/d"', "r.toml: scale must be a number, got '1'"),
        ('base = "a/b"\n[[inputs]]\nmodel = "c/d"\nweight = 1', r"inputs\[0\]: 'weight' is not supported"),
        ('base = "a/b"\nmethod = "mean"\n[[inputs]]\nmodel = "c/d"', "method must be one of average"),
        ('base = "a/b"\n[options]\ndensity = 1.0\n[[inputs]]\nmodel = "c/d"', "average: unknown option 'density'"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_file_and_key(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(write(tmp_path / "r.toml", text))


def mergekit(tmp_path: Path, text: str) -> ReadRecipe:
    return read_recipe(write(tmp_path / "merge.yml", text))


def test_mergekits_ties_with_its_defaults_and_weights(tmp_path):
    read = mergekit(
        tmp_path,
        """
merge_method: ties
base_model: acme/base
models:
  - model: acme/base
  - model: ann/one
    parameters: {density: 0.3, weight: 0.5}
  - model: bob/two
    parameters: {density: 0.3}
parameters: {normalize: false, int8_mask: true, lambda: 0.7}
""",
    )
    options = (("combine", "sum"), ("density", 0.3), ("scope", "parameter"))
    inputs = (Input("ann/one", 0.5), Input("bob/two", 1.0))
    assert read.recipe == Recipe("acme/base", inputs, "ties", options, 0.7)


@pytest.mark.parametrize(
    "text, method, options, coefficients, base",
    [
        ("merge_method: linear\nmodels: [{model: a/a, parameters: {weight: 3}}, {model: b/b}]",
         "average", {}, (3.0, 1.0), "a/a"),
        ("merge_method: slerp\nbase_model: a/a\nmodels: [{model: a/a}, {model: b/b}]\nparameters: {t: 0.25}",
         "slerp", {}, (0.75, 0.25), "a/a"),
        ("merge_method: task_arithmetic\nbase_model: o/o\nmodels: [{model: a/a, parameters: {weight: -1}}]",
         "task_arithmetic", {}, (-1.0,), "o/o"),
        ("merge_method: dare_ties\nbase_model: o/o\nmodels: [{model: a/a}]\nparameters: {density: 0.5}",
         "dare_ties", {"combine": "sum", "density": 0.5}, (1.0,), "o/o"),
        ("merge_method: slerp\nbase_model: a/a\nmodels: [{model: b/b}, {model: a/a}]\nparameters: {t: 0.25}",
         "slerp", {}, (0.75, 0.25), "a/a"),
        ("merge_method: slerp\nbase_model: a/a\nmodels: [{model: b/b}]\nparameters: {t: 0.25}",
         "slerp", {}, (0.75, 0.25), "a/a"),
        ("merge_method: nuslerp\nmodels: [{model: a/a}, {model: b/b, parameters: {weight: 3}}]",
         "slerp", {}, (1.0, 3.0), "a/a"),
        ("merge_method: nuslerp\nbase_model: o/o\nmodels: [{model: a/a}, {model: b/b}]",
         "slerp", {"space": "deltas"}, (1.0, 1.0), "o/o"),
        ("merge_method: task_arithmetic\nbase_model: o/o\nmodels: [{model: a/a}, {model: b/b, parameters: {weight: 3}}]"
         "\nparameters: {normalize: true}", "task_arithmetic", {}, (0.25, 0.75), "o/o"),
        ("merge_method: della\nbase_model: o/o\nmodels: [{model: a/a}]\nparameters: {density: 0.5, epsilon: 0.1}",
         "della", {"combine": "mean", "density": 0.5, "epsilon": 0.2}, (1.0,), "o/o"),
        ("merge_method: breadcrumbs\nbase_model: o/o\nmodels: [{model: a/a}]",
         "breadcrumbs", {"density": 1.0, "gamma": 0.0}, (1.0,), "o/o"),
        ("merge_method: sce\nbase_model: o/o\nmodels: [{model: a/a}]\nparameters: {select_topk: 0.1}",
         "sce", {"density": 0.1}, (1.0,), "o/o"),
        ("merge_method: breadcrumbs\nbase_model: o/o\nmodels: [{model: a/a}]\nparameters: {density: 0.9, gamma: 0.02}",
         "breadcrumbs", {"density": 0.9, "gamma": 0.02}, (1.0,), "o/o"),
        ("merge_method: karcher\nmodels: [{model: a/a}, {model: b/b}]", "karcher", {}, (1.0, 1.0), "a/a"),
    ],
)  # fmt: skip
def test_mergekits_methods_have_our_names(tmp_path, text, method, options, coefficients, base):
    recipe = mergekit(tmp_path, text).recipe
    assert recipe.method == method and dict(recipe.options) == options
    assert recipe.coefficients == coefficients and recipe.base == base


def test_where_a_mergekit_file_is_followed_differently_it_says_so(tmp_path):
    text = "merge_method: dare_ties\nbase_model: o/o\nmodels: [{model: a/a}]\ndtype: bfloat16"
    draws, dtype = mergekit(tmp_path, text).notes
    assert "draws are ours" in draws and "the result has the base's own dtypes" in dtype
    assert mergekit(tmp_path, "merge_method: linear\nmodels: [{model: a/a}]").notes == ()


@pytest.mark.slow
def test_every_shared_method_gives_what_mergekit_gives(tmp_path):
    python = os.environ.get("MERGEKIT_PYTHON")
    if not python:
        pytest.skip("MERGEKIT_PYTHON must name the interpreter of an environment with mergekit in it")
    from benchmarks.agreement import CASES, compare

    found = list(compare(Path(python), tmp_path))
    assert {one.method for one in found} == set(MERGEKIT) and len(found) == len(CASES)
    assert [one for one in found if not one.is_expected] == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("merge_method: nearswap\nmodels: []", "merge_method 'nearswap' is not one we share: linear"),
        ("slices: []\nmerge_method: linear", "'slices' is not supported, allowed are merge_method"),
        ("merge_method: ties\nmodels: [{model: a/a}]", "base_model is missing; ties starts from it"),
        ("merge_method: linear\nmodels: [{model: a/a, parameters: {weight: [0, 1]}}]", "weight must be one number"),
        ("merge_method: linear\nmodels: [{model: a/a}]\ntokenizer_source: union", "tokenizer_source must be 'base'"),
        ("merge_method: linear\nmodels: [{model: a/a}]\nparameters: {rescale: true}", "'rescale' is not supported"),
        ("merge_method: linear\nmodels: [{model: a/a}, {model: b/b}]\nparameters: {normalize: false}",
         "normalize: false needs weights that sum to 1, got 2"),
        ("merge_method: karcher\nmodels: [{model: a/a, parameters: {weight: 2}}]", "'weight' is not supported"),
        ("merge_method: dare_ties\nbase_model: o/o\nmodels: [{model: a/a}]\nparameters: {rescale: false}",
         "rescale must be true for dare_ties, got False"),
        ("merge_method: nuslerp\nmodels: [{model: a/a}, {model: b/b}]\nparameters: {nuslerp_row_wise: true}",
         "nuslerp_row_wise must be false for nuslerp, got True"),
        ("merge_method: model_stock\nbase_model: o/o\nmodels: [{model: a/a}]\nparameters: {filter_wise: true}",
         "filter_wise must be false for model_stock, got True"),
        ("merge_method: slerp\nbase_model: a/a\nmodels: [{model: b/b}, {model: c/c}]\nparameters: {t: 0.5}",
         "slerp takes a base and one model, got 2"),
        ("merge_method: slerp\nbase_model: a/a\nmodels: [{model: b/b}]\nparameters: {t: [0, 1]}", "t must be one"),
        ("merge_method: ties\nbase_model: o/o\nmodels: [{model: a/a, parameters: {density: 0.1}}, {model: b/b}]",
         "density must be the same for all models"),
        ("merge_method: ties\nbase_model: o/o\nmodels: [{model: o/o}]", "no model beside the base"),
        ("a: [", "merge.yml: not YAML"),
        ("- a", "a table is needed"),
    ],
)  # fmt: skip
def test_what_mergekit_can_and_we_cannot_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        mergekit(tmp_path, text)


def test_coefficient_policies(tmp_path):
    assert uniform(3) == (1.0, 1.0, 1.0)
    assert by_examples([10, 30]) == (10.0, 30.0)
    assert by_inverse_norm([1.0, 0.0, 3.0, 2.0]) == (2.0, 1.0, 0.666667, 1.0)
    with pytest.raises(RecipeError, match="input 1 declares None, at least 1 is needed"):
        by_examples([10, None])


def test_delta_norms_are_those_of_the_whole_delta(tmp_path):
    base, inputs = family(tmp_path, 3)
    start = load(base)
    expected = []
    for path in inputs:
        tensors = load(path)
        expected.append(sum(((tensors[n].astype(float) - start[n]) ** 2).sum() for n in start) ** 0.5)
    assert delta_norms(base, inputs) == pytest.approx(expected, rel=1e-6)
