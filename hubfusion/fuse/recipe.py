"""Check recipes, and read them from files: ``recipe.toml``, and the part of mergekit's YAML that both support.

Models are local folders or Hub ids (``owner/name`` or ``owner/name@revision``).
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubfusion.errors import RecipeError
from hubfusion.fuse.methods import METHODS
from hubfusion.fuse.outer import OUTERS
from hubfusion.lineage import Input, Option, Recipe

MODEL_KEYS = ("model", "coefficient")
TOP_KEYS = ("base", "method", "scale", "options", "outer", "inputs")


KIND_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def check_recipe(recipe: Recipe) -> None:
    """Raise `RecipeError` for unknown methods, outer optimizers and options, and for numbers that are not finite."""
    if recipe.method not in METHODS:
        raise RecipeError(f"method must be one of {', '.join(sorted(METHODS))}, got {recipe.method!r}")
    if recipe.outer not in OUTERS:
        raise RecipeError(f"outer must be one of {', '.join(sorted(OUTERS))}, got {recipe.outer!r}")
    _check_options(recipe.method, METHODS[recipe.method].options, recipe.options)
    _check_options(recipe.outer, OUTERS[recipe.outer].options, recipe.outer_options)
    for number in (*recipe.coefficients, recipe.scale):
        if not math.isfinite(number):
            raise RecipeError(f"{recipe.method}: coefficients and scale must be finite, got {number}")


def _check_options(where: str, known: Mapping[str, Option], options: Sequence[tuple[str, Option]]) -> None:
    for name, value in options:
        if name not in known:
            allowed = ", ".join(sorted(known)) or "none"
            raise RecipeError(f"{where}: unknown option {name!r}, allowed are {allowed}")
        kind = type(known[name])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise RecipeError(f"{where}: {name} must be {KIND_WORDS[kind]}, got {value!r:.60}")


@dataclass(frozen=True, slots=True)
class ReadRecipe:
    """A recipe from a file; ``notes`` say where one that was written for another tool is followed differently."""

    recipe: Recipe
    notes: tuple[str, ...] = ()


def read_recipe(path: Path) -> ReadRecipe:
    """Read ``.toml`` as our recipe and ``.yml`` or ``.yaml`` as mergekit's; local folders are relative to the file.

    Raises `RecipeError` naming the file and the key, and for what `check_recipe` refuses.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    if path.suffix == ".toml":
        read = ReadRecipe(_read_toml(text, path))
    elif path.suffix in (".yml", ".yaml"):
        read = _read_mergekit(text, path)
    else:
        raise RecipeError(f"{path}: a recipe ends with .toml, .yml or .yaml")
    check_recipe(read.recipe)
    return read


def _read_toml(text: str, path: Path) -> Recipe:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not TOML: {error}") from None
    _only(data, TOP_KEYS, str(path))
    entries = data.get("inputs")
    if not isinstance(entries, list) or not entries:
        raise RecipeError(f"{path}: at least one [[inputs]] table is needed")
    inputs = []
    for number, entry in enumerate(entries):
        where = f"{path}: inputs[{number}]"
        _only(entry, MODEL_KEYS, where)
        model = _model_path(_get(entry, "model", str, where), path)
        inputs.append(Input(model, _get(entry, "coefficient", float, where, 1.0)))
    outer = dict(_get(data, "outer", dict, str(path), {}))
    name, state = outer.pop("name", "plain"), outer.pop("state", None)
    return Recipe(
        _model_path(_get(data, "base", str, str(path)), path),
        tuple(inputs),
        _get(data, "method", str, str(path), "average"),
        tuple(sorted(_get(data, "options", dict, str(path), {}).items())),
        _get(data, "scale", float, str(path), 1.0),
        name,
        tuple(sorted(outer.items())),
        _model_path(state, path) if state else None,
    )


def write_recipe(recipe: Recipe) -> str:
    """Return the TOML text of a recipe; reading it gives the same recipe."""
    import tomli_w

    data: dict[str, Any] = {"base": recipe.base, "method": recipe.method, "scale": recipe.scale}
    if recipe.options:
        data["options"] = dict(recipe.options)
    if recipe.outer != "plain" or recipe.outer_options:
        state = {"state": recipe.state} if recipe.state else {}
        data["outer"] = {"name": recipe.outer, **dict(recipe.outer_options), **state}
    data["inputs"] = [{"model": each.model, "coefficient": each.coefficient} for each in recipe.inputs]
    return tomli_w.dumps(data)


def _model_path(model: str, recipe: Path) -> str:
    """A folder beside the recipe, when there is one; otherwise the name as it is."""
    beside = recipe.parent / model
    return str(beside.resolve()) if beside.exists() else model


def _only(data: Any, allowed: tuple[str, ...], where: str) -> None:
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: a table is needed, got {data!r:.60}")
    if unknown := sorted(map(str, set(data) - set(allowed))):
        raise RecipeError(f"{where}: {unknown[0]!r} is not supported, allowed are {', '.join(allowed)}")


def _get(data: Mapping[str, Any], key: str, kind: type, where: str, default: Any = None) -> Any:
    value = data.get(key, default)
    if value is None:
        raise RecipeError(f"{where}: key {key!r} is missing")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        words = {**KIND_WORDS, dict: "a table", list: "a list"}
        raise RecipeError(f"{where}: {key} must be {words[kind]}, got {value!r:.60}")
    return value


# --------------------------------------------------------------------------------------- mergekit's YAML
@dataclass(frozen=True, slots=True)
class _Shared:
    """A method that both have: our name and fixed options, their parameters by our option, others that we follow.

    ``normalizes`` and ``rescales`` are their defaults; ``note`` says where the two differ.
    """

    ours: str
    fixed: Mapping[str, Option] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    takes: tuple[str, ...] = ()
    normalizes: bool = False
    rescales: bool = False
    note: str = ""


_DENSITY = {"density": "density"}
_DELTAS = ("weight", "normalize", "lambda", "rescale")
_RANDOM = "draws are ours, from the seed, and kept entries are divided by their probability, not scaled to the L1 norm"
MERGEKIT: Mapping[str, _Shared] = {
    "linear": _Shared("average", takes=("weight", "normalize"), normalizes=True),
    "task_arithmetic": _Shared("task_arithmetic", takes=_DELTAS),
    "ties": _Shared(
        "ties", {"scope": "parameter", "density": 1.0}, _DENSITY, _DELTAS, normalizes=True,
        note="a vote of exactly zero gives nothing here, and the entries to keep are rounded, not cut off",
    ),
    "dare_linear": _Shared("dare", {"density": 1.0}, _DENSITY, _DELTAS, rescales=True, note=_RANDOM),
    "dare_ties": _Shared("dare_ties", {"density": 1.0}, _DENSITY, _DELTAS, rescales=True, note=_RANDOM),
    "della": _Shared(
        "della", {"density": 1.0, "epsilon": 0.15}, {**_DENSITY, "epsilon": "epsilon"}, _DELTAS, True, True, _RANDOM
    ),
    "breadcrumbs": _Shared("breadcrumbs", {"density": 1.0, "gamma": 0.01}, {**_DENSITY, "gamma": "gamma"}, _DELTAS),
    "sce": _Shared("sce", {"density": 1.0}, {"select_topk": "density"}),
    "model_stock": _Shared("model_stock", note="no floor of 1e-6 under small deltas, and never a step backwards"),
    "slerp": _Shared("slerp", takes=("t",), note="an exact arc at every angle: mergekit's is a line below 1.8 degrees"),
    "nuslerp": _Shared("slerp", takes=("weight",)),
    "karcher": _Shared("karcher", note="iterated until it settles, whatever max_iter and tol say"),
}  # fmt: skip
YAML_KEYS = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "tokenizer_source")
BASELESS = ("linear", "slerp", "nuslerp", "karcher")
ELECTING = ("ties", "dare_ties", "della")
ONLY: Mapping[str, Mapping[str, object]] = {  # parameters that we know with one value only
    "nuslerp": {"nuslerp_row_wise": False, "nuslerp_flatten": True},
    "model_stock": {"filter_wise": False},
}
NO_EFFECT = {"karcher": ("max_iter", "tol")}


def _read_mergekit(text: str, path: Path) -> ReadRecipe:
    import yaml

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    _only(data, YAML_KEYS, str(path))
    method = _get(data, "merge_method", str, str(path))
    if method not in MERGEKIT:
        raise RecipeError(f"{path}: merge_method {method!r} is not one we share: {', '.join(MERGEKIT)}")
    if data.get("tokenizer_source") not in (None, "base"):
        raise RecipeError(f"{path}: tokenizer_source must be 'base' or absent; the base's own tokenizer is kept")
    base, models = data.get("base_model"), _get(data, "models", list, str(path))
    if base is not None and not isinstance(base, str):
        raise RecipeError(f"{path}: base_model must be a text, got {base!r:.60}")
    own: dict[str, Mapping[str, Any]] = {}
    for number, entry in enumerate(models):
        where = f"{path}: models[{number}]"
        _only(entry, ("model", "parameters"), where)
        own[_get(entry, "model", str, where)] = _get(entry, "parameters", dict, where, {})
    if base is None and (method not in BASELESS or method == "slerp"):
        raise RecipeError(f"{path}: base_model is missing; {method} starts from it")
    if base is None or method in ("linear", "karcher"):
        names = list(own)
    else:
        names = [*([base] if method == "slerp" else []), *(n for n in own if n != base)]
    if not names:
        raise RecipeError(f"{path}: no model beside the base")
    tables = [own.get(name, {}) for name in names]
    shared = _get(data, "parameters", dict, str(path), {})
    weights, options, scale = _numbers_of_mergekit(method, shared, tables, str(path))
    if method == "nuslerp" and base is not None:
        options["space"] = "deltas"
    inputs = tuple(Input(_model_path(name, path), weight) for name, weight in zip(names, weights, strict=True))
    ours = MERGEKIT[method].ours
    recipe = Recipe(_model_path(base or names[0], path), inputs, ours, tuple(sorted(options.items())), scale)
    notes = [f"{method}: {MERGEKIT[method].note}"] if MERGEKIT[method].note else []
    if "dtype" in data or "out_dtype" in data:
        notes.append("dtype: sums are float32 (float64 for float64 files) and the result has the base's own dtypes")
    return ReadRecipe(recipe, tuple(notes))


def _numbers_of_mergekit(
    method: str, shared: Mapping[str, Any], own: list[Mapping[str, Any]], where: str
) -> tuple[list[float], dict[str, Option], float]:
    """Coefficients of the models (whose own parameters are ``own``), options and scale."""
    known = MERGEKIT[method]
    _check_parameters(method, known, (shared, *own), where)
    options: dict[str, Option] = dict(known.fixed)
    for theirs, name in known.renamed.items():
        values = {_number(t.get(theirs, shared.get(theirs, options.get(name))), theirs, where) for t in own}
        if len(values) > 1:
            raise RecipeError(f"{where}: {theirs} must be the same for all models, got {sorted(map(str, values))}")
        if (value := values.pop()) is not None:
            options[name] = value
    if method == "della":  # theirs is half of the span of keep probabilities, and none at full density
        options["epsilon"] = 2 * float(options["epsilon"]) if float(options["density"]) < 1 else 0.0
    if method == "breadcrumbs":  # the density goes before the outliers
        options["gamma"] = min(float(options["gamma"]), 1 - float(options["density"]))
    weights = [_number(t.get("weight", shared.get("weight", 1.0)), "weight", where) or 0.0 for t in own]
    normalize = bool(shared.get("normalize", known.normalizes))
    if method in ELECTING:
        options["combine"] = "mean" if normalize else "sum"
    elif method == "linear" and not normalize and abs(sum(weights) - 1) > 1e-9:
        raise RecipeError(f"{where}: normalize: false needs weights that sum to 1, got {sum(weights):g}")
    elif normalize and not known.normalizes and abs(sum(weights)) >= 1e-8:
        weights = [w / sum(weights) for w in weights]
    if method == "slerp":
        weights = _slerp_shares(shared.get("t", next((t["t"] for t in own if "t" in t), None)), where)
    if len(weights) != len(own):
        raise RecipeError(f"{where}: {method} takes a base and one model, got {len(own) - 1}")
    scale = _number(shared.get("lambda", 1.0), "lambda", where) or 0.0
    return weights, options, scale


def _slerp_shares(t: Any, where: str) -> list[float]:
    t_value = _number(t, "t", where)
    if t_value is None or not 0 <= t_value <= 1:
        raise RecipeError(f"{where}: slerp needs t in [0, 1], got {t_value}")
    return [1 - t_value, t_value]


def _check_parameters(method: str, known: _Shared, tables: tuple[Mapping[str, Any], ...], where: str) -> None:
    """Refuse what we would have to ignore: parameters we do not know, and values that we cannot follow."""
    only = {"rescale": known.rescales, **ONLY.get(method, {})}
    allowed = {*known.takes, *known.renamed, *ONLY.get(method, {}), *NO_EFFECT.get(method, ()), "int8_mask"}
    for table in tables:
        for name, value in table.items():
            if name not in allowed:
                raise RecipeError(f"{where}: parameter {name!r} is not supported for {method}")
            if name in only and value is not only[name]:
                raise RecipeError(f"{where}: {name} must be {str(only[name]).lower()} for {method}, got {value!r:.60}")


def _number(value: Any, name: str, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeError(f"{where}: {name} must be one number (no gradients or filters), got {value!r:.60}")
    return float(value)


MODEL_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95})(@(?P<name>[\w./-]{1,200}))?", re.ASCII
)
