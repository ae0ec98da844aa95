"""The demo's bad contributions: each has one defect and must be refused for that reason."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

Files = dict[str, bytes | Path]


def nan_weights(base: Path, folder: Path) -> Files:
    """The base with one NaN in one of its 16 million entries."""
    tensors = load_file(base / "model.safetensors")
    weight = tensors["encoder.layer.1.output.dense.weight"].copy()
    weight[7, 11] = np.nan
    return _written(base, folder, tensors | {"encoder.layer.1.output.dense.weight": weight})


def another_architecture(base: Path, folder: Path) -> Files:
    """A model of another shape that names our base all the same."""
    config: dict[str, Any] = json.loads((base / "config.json").read_text()) | {
        "hidden_size": 128,
        "num_hidden_layers": 1,
    }
    rng = np.random.default_rng(0)
    tensors = {"embeddings.word_embeddings.weight": rng.normal(size=(30522, 128)).astype(np.float32)}
    files = _written(base, folder, tensors)
    return files | {"config.json": json.dumps(config, indent=2).encode()}


def pickle_only(base: Path, folder: Path) -> Files:
    """Weights as a pickle, the format that runs code when it is opened."""
    return {"config.json": base / "config.json", "pytorch_model.bin": pickle.dumps({"weights": list(range(1000))})}


def unchanged_copy(base: Path, folder: Path) -> Files:
    """The base itself, uploaded again."""
    return _written(base, folder, load_file(base / "model.safetensors"))


def stolen(victim: Path) -> Files:
    """Another contributor's weights under one's own name."""
    return {"config.json": victim / "config.json", "model.safetensors": victim / "model.safetensors"}


def stale(base: Path, folder: Path) -> Files:
    """A sound finetune of a version of the base that is not the current one."""
    tensors = load_file(base / "model.safetensors")
    rng = np.random.default_rng(1)
    name = "encoder.layer.0.output.dense.weight"
    noise = rng.normal(0, 1e-3, tensors[name].shape).astype(np.float32)
    return _written(base, folder, tensors | {name: tensors[name] + noise})


def _written(base: Path, folder: Path, tensors: dict[str, Any]) -> Files:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return {"config.json": base / "config.json", "model.safetensors": folder / "model.safetensors"}
