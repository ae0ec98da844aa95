"""Recipes as people write them: ``recipe.toml``, and mergekit's YAML for the methods that both have.

A recipe names a base, inputs with coefficients, a method with options, a scale and an outer optimizer. Models are
local folders or Hub ids (``owner/name`` or ``owner/name@revision``).
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubfusion.errors import RecipeError
from hubfusion.fuse import Plan
from hubfusion.lineage import Option

MODEL_KEYS = ("model", "coefficient")
TOP_KEYS = ("base", "method", "scale", "options", "outer", "inputs")


@dataclass(frozen=True, slots=True)
class FuseRecipe:
    """A recipe with its models as they were named: ``plan.labels`` are the inputs, in the order given."""

    base: str
    plan: Plan
    state: str | None = None


def read_recipe(path: Path) -> FuseRecipe:
    """Read ``.toml`` as our recipe and ``.yml`` or ``.yaml`` as mergekit's; local folders are relative to the file.

    Raises `RecipeError` naming the file and the key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    if path.suffix == ".toml":
        return _read_toml(text, path)
    if path.suffix in (".yml", ".yaml"):
        return _read_mergekit(text, path)
    raise RecipeError(f"{path}: a recipe ends with .toml, .yml or .yaml")


def _read_toml(text: str, path: Path) -> FuseRecipe:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not TOML: {error}") from None
    _only(data, TOP_KEYS, str(path))
    inputs = data.get("inputs")
    if not isinstance(inputs, list) or not inputs:
        raise RecipeError(f"{path}: at least one [[inputs]] table is needed")
    labels, coefficients = [], []
    for number, entry in enumerate(inputs):
        _only(entry, MODEL_KEYS, f"{path}: inputs[{number}]")
        labels.append(_place(_get(entry, "model", str, f"{path}: inputs[{number}]"), path))
        coefficients.append(_get(entry, "coefficient", float, f"{path}: inputs[{number}]", 1.0))
    outer = dict(_get(data, "outer", dict, str(path), {}))
    name, state = outer.pop("name", "plain"), outer.pop("state", None)
    plan = Plan(
        tuple(labels),
        tuple(coefficients),
        _get(data, "method", str, str(path), "average"),
        tuple(sorted(_get(data, "options", dict, str(path), {}).items())),
        _get(data, "scale", float, str(path), 1.0),
        name,
        tuple(sorted(outer.items())),
    )
    return FuseRecipe(_place(_get(data, "base", str, str(path)), path), plan, _place(state, path) if state else None)


def write_recipe(recipe: FuseRecipe) -> str:
    """Return the TOML text of a recipe; reading it gives the same recipe."""
    plan = recipe.plan
    lines = [f"base = {_toml(recipe.base)}", f"method = {_toml(plan.method)}", f"scale = {_toml(plan.scale)}"]
    if plan.options:
        lines += ["", "[options]", *(f"{k} = {_toml(v)}" for k, v in plan.options)]
    if plan.outer != "plain" or plan.outer_options:
        lines += ["", "[outer]", f"name = {_toml(plan.outer)}", *(f"{k} = {_toml(v)}" for k, v in plan.outer_options)]
        lines += [f"state = {_toml(recipe.state)}"] if recipe.state else []
    for label, coefficient in zip(plan.labels, plan.coefficients, strict=True):
        lines += ["", "[[inputs]]", f"model = {_toml(label)}", f"coefficient = {_toml(coefficient)}"]
    return "\n".join(lines) + "\n"


def _toml(value: Option) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)


def _place(model: str, recipe: Path) -> str:
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
        words = {str: "a text", float: "a number", dict: "a table", list: "a list", bool: "true or false"}
        raise RecipeError(f"{where}: {key} must be {words[kind]}, got {value!r:.60}")
    return value


# --------------------------------------------------------------------------------------- mergekit's YAML
# Its names for what both have: method -> (ours, fixed options, parameters that we know and our names for them).
_DENSITY = {"density": "density"}
MERGEKIT: Mapping[str, tuple[str, Mapping[str, Option], Mapping[str, str]]] = {
    "linear": ("average", {}, {}),
    "task_arithmetic": ("task_arithmetic", {}, {}),
    "ties": ("ties", {"scope": "parameter", "density": 1.0}, _DENSITY),
    "dare_linear": ("dare", {"density": 1.0}, _DENSITY),
    "dare_ties": ("dare_ties", {"density": 1.0, "combine": "sum"}, _DENSITY),
    "della": ("della", {"density": 1.0, "epsilon": 0.0, "combine": "sum"}, {**_DENSITY, "epsilon": "epsilon"}),
    "breadcrumbs": ("breadcrumbs", {"density": 0.99}, {**_DENSITY, "gamma": "gamma"}),
    "sce": ("sce", {"density": 1.0}, {"select_topk": "density"}),
    "model_stock": ("model_stock", {}, {}),
    "slerp": ("slerp", {}, {}),
    "karcher": ("karcher", {}, {}),
}
YAML_KEYS = ("merge_method", "base_model", "models", "parameters", "dtype", "tokenizer_source")
BASELESS = ("linear", "slerp", "karcher")
NO_EFFECT = ("int8_mask",)


def _read_mergekit(text: str, path: Path) -> FuseRecipe:
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
    if "dtype" in data:
        raise RecipeError(f"{path}: dtype is not supported; the output has the base's dtypes, with float32 sums")
    base, models = data.get("base_model"), _get(data, "models", list, str(path))
    names = []
    for number, entry in enumerate(models):
        _only(entry, ("model", "parameters"), f"{path}: models[{number}]")
        names.append(_get(entry, "model", str, f"{path}: models[{number}]"))
    if base is None and method not in BASELESS:
        raise RecipeError(f"{path}: base_model is missing; {method} works on deltas to it")
    keep = [i for i, name in enumerate(names) if name != base or method in BASELESS]
    if not keep:
        raise RecipeError(f"{path}: no model beside the base")
    shared = data.get("parameters") or {}
    own = [models[i].get("parameters") or {} for i in keep]
    plan = _plan_of_mergekit(method, [_place(names[i], path) for i in keep], shared, own, str(path))
    return FuseRecipe(_place(base or names[keep[0]], path), plan)


def _plan_of_mergekit(
    method: str, labels: list[str], shared: Mapping[str, Any], own: list[Mapping[str, Any]], where: str
) -> Plan:
    ours, fixed, renamed = MERGEKIT[method]
    options, known = dict(fixed), {"weight", "normalize", "lambda", "t", *renamed, *NO_EFFECT}
    for table in (shared, *own):
        if unknown := sorted(set(table) - known):
            raise RecipeError(f"{where}: parameter {unknown[0]!r} is not supported for {method}")
    for theirs, name in renamed.items():
        values = {_number(t.get(theirs, shared.get(theirs, options.get(name))), theirs, where) for t in own}
        if len(values) > 1:
            raise RecipeError(f"{where}: {theirs} must be the same for all models, got {sorted(map(str, values))}")
        if (value := values.pop()) is not None:
            options[name] = value
    weights = [_number(t.get("weight", shared.get("weight", 1.0)), "weight", where) or 0.0 for t in own]
    if method == "slerp":
        t = _number(shared.get("t", own[0].get("t")), "t", where)
        if t is None or not 0 <= t <= 1:
            raise RecipeError(f"{where}: slerp needs t in [0, 1], got {t}")
        weights = [1 - t, t]
    _apply_normalize(method, shared.get("normalize"), options, where)
    scale = _number(shared.get("lambda", 1.0), "lambda", where) or 0.0
    coefficients = tuple(weights) if len(weights) == len(labels) else (1.0,) * len(labels)
    return Plan(tuple(labels), coefficients, ours, tuple(sorted(options.items())), scale)


def _apply_normalize(method: str, normalize: Any, options: dict[str, Option], where: str) -> None:
    """``normalize`` is our ``combine`` for methods that elect signs; elsewhere only mergekit's default is ours."""
    if normalize is None:
        return
    if method in ("ties", "dare_ties", "della"):
        options["combine"] = "mean" if normalize else "sum"
    elif bool(normalize) is not (method in ("linear", "sce", "model_stock", "karcher")):
        raise RecipeError(f"{where}: normalize: {normalize} is not supported for {method}")


def _number(value: Any, name: str, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeError(f"{where}: {name} must be one number (no gradients or filters), got {value!r:.60}")
    return float(value)


MODEL_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95})(@(?P<name>[\w./-]{1,200}))?", re.ASCII
)
