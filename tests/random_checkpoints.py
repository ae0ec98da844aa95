"""Two-layer checkpoints made on the spot, written by the safetensors library rather than by the code under test."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes  # noqa: F401 registers bfloat16 with numpy
import numpy as np
from safetensors.numpy import load_file, save_file

from hubfusion.lineage import Input, Option, Recipe

BACKBONE = {
    "embeddings.word_embeddings.weight": (11, 4),
    "encoder.layer.0.dense.weight": (6, 4),
    "encoder.layer.0.dense.bias": (6,),
    "encoder.layer.1.dense.weight": (4, 6),
    "encoder.layer.1.dense.bias": (4,),
}


def save(folder: Path, tensors: Mapping[str, np.ndarray], shards: int = 1, model_type: str = "") -> Path:
    """Write ``tensors`` as model.safetensors, or as shards with an index; ``model_type`` goes into a config."""
    folder.mkdir(parents=True, exist_ok=True)
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    tensors = {k: np.ascontiguousarray(v).reshape(v.shape) for k, v in tensors.items()}
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors")
        return folder
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def load(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder's safetensors files, by the safetensors library."""
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def backbone(seed: int, dtype: str = "float32", prefix: str = "", shift: Mapping[str, np.ndarray] | None = None):
    """A random backbone; with ``shift`` (a backbone without prefix) near to it, as a finetune is near to its base."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in BACKBONE.items():
        value = rng.standard_normal(shape)
        if shift is not None:
            value = shift[name].astype(np.float64) + 0.01 * value
        tensors[prefix + name] = value.astype(np.dtype(dtype))
    return tensors


def family(folder: Path, k: int, dtype: str = "float32") -> tuple[Path, list[Path]]:
    """A base and k finetunes of it, in folders ``base``, ``0`` ... ``k-1``."""
    base = backbone(100, dtype)
    inputs = [save(folder / str(i), backbone(i, dtype, shift=base)) for i in range(k)]
    return save(folder / "base", base), inputs


def recipe_of(
    models: Sequence[str],
    coefficients: Sequence[float] = (),
    method: str = "average",
    options: tuple[tuple[str, Option], ...] = (),
    *,
    base: str = "base",
    **fields,
) -> Recipe:
    """A recipe over named models; coefficients are 1 unless given."""
    inputs = tuple(Input(m, c) for m, c in zip(models, coefficients or (1.0,) * len(models), strict=True))
    return Recipe(base, inputs, method, options, **fields)
