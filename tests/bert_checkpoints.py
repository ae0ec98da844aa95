"""Two-layer BERT checkpoints as bytes, without torch: the names, shapes and dtypes that transformers writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from hubfusion.hub import Hub
from hubfusion.lineage import Revision
from hubfusion.screen import Base, read_base
from tests.fake_hub import FakeHub

HIDDEN, INNER, VOCABULARY, POSITIONS, LAYERS = 16, 32, 50, 20, 2
BASE = "ibm/ColD-Fusion"
CONFIG: dict[str, Any] = {
    "architectures": ["BertModel"], "model_type": "bert", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
    "num_attention_heads": 2, "intermediate_size": INNER, "vocab_size": VOCABULARY, "type_vocab_size": 2,
    "max_position_embeddings": POSITIONS, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0,
}  # fmt: skip
Tensors = dict[str, NDArray[Any]]


def shapes() -> dict[str, tuple[int, ...]]:
    """Parameters of a bare BertModel."""
    table: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (VOCABULARY, HIDDEN),
        "embeddings.position_embeddings.weight": (POSITIONS, HIDDEN),
        "embeddings.token_type_embeddings.weight": (2, HIDDEN),
        "embeddings.LayerNorm.weight": (HIDDEN,),
        "embeddings.LayerNorm.bias": (HIDDEN,),
        "pooler.dense.weight": (HIDDEN, HIDDEN),
        "pooler.dense.bias": (HIDDEN,),
    }
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}."
        for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            table |= {f"{at}{part}.weight": (HIDDEN, HIDDEN), f"{at}{part}.bias": (HIDDEN,)}
        for part in ("attention.output.LayerNorm", "output.LayerNorm"):
            table |= {f"{at}{part}.weight": (HIDDEN,), f"{at}{part}.bias": (HIDDEN,)}
        table |= {f"{at}intermediate.dense.weight": (INNER, HIDDEN), f"{at}intermediate.dense.bias": (INNER,)}
        table |= {f"{at}output.dense.weight": (HIDDEN, INNER), f"{at}output.dense.bias": (HIDDEN,)}
    return table


def base_tensors(seed: int = 0) -> Tensors:
    """Random parameters of norm about 8, and the integer buffer that old checkpoints carry."""
    rng = np.random.default_rng(seed)
    table: Tensors = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes().items()}
    table["embeddings.position_ids"] = np.arange(POSITIONS, dtype=np.int64)[None]
    return table


def finetuned(base: Tensors, seed: int, step: float = 0.002, labels: int = 3) -> Tensors:
    """As AutoModelForSequenceClassification saves it: prefix, head, no buffer; every parameter moved at random."""
    rng = np.random.default_rng(1000 + seed)
    table: Tensors = {
        f"bert.{name}": (value + rng.normal(0, step, value.shape)).astype(np.float32)
        for name, value in base.items()
        if value.dtype == np.float32
    }
    table["classifier.weight"] = rng.normal(0, 0.1, (labels, HIDDEN)).astype(np.float32)
    table["classifier.bias"] = np.zeros(labels, np.float32)
    return table


def weights(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """One safetensors file."""
    return save(dict(tensors), metadata={"format": "pt"})


def sharded(tensors: Mapping[str, NDArray[Any]], count: int = 2) -> dict[str, bytes]:
    """The same as ``count`` shards and their index."""
    names = sorted(tensors)
    parts = [names[i::count] for i in range(count)]
    files = {f"model-{i + 1:05}-of-{count:05}.safetensors": {n: tensors[n] for n in p} for i, p in enumerate(parts)}
    index = {"metadata": {}, "weight_map": {name: file for file, table in files.items() for name in table}}
    return {file: weights(table) for file, table in files.items()} | {
        "model.safetensors.index.json": json.dumps(index).encode()
    }


def config(**changes: Any) -> bytes:
    """``config.json`` with fields changed or, when None, left out."""
    return json.dumps({k: v for k, v in (CONFIG | changes).items() if v is not None}).encode()


def card(base_sha: str, **changes: Any) -> dict[str, Any]:
    """The metadata that `hubfusion contribute` writes, with fields changed or, when None, left out."""
    fields: dict[str, Any] = {
        "base_model": BASE, "base_model_relation": "finetune", "license": "apache-2.0", "tags": ["cold-fusion"],
        "datasets": ["org/news"],
        "cold_fusion": {"base_revision": base_sha, "examples": 600, "dataset_revisions": {"org/news": "1" * 40}},
    }  # fmt: skip
    return {k: v for k, v in (fields | changes).items() if v is not None}


def publish_base(hub: FakeHub, versions: int = 2, repo: str = BASE) -> Base:
    """``versions`` releases v0, v1, … of a base in ``hub``; the last one, as the screen sees it."""
    for number in range(versions):
        files = {"config.json": config(), "README.md": b"---\nlicense: apache-2.0\n---\n# base\n"}
        revision = hub.add(repo, files | {"model.safetensors": weights(base_tensors(0))}, f"v{number}")
        hub.tag(repo, f"v{number}", revision.sha)
    return current_base(hub, revision)


def current_base(hub: Hub, revision: Revision) -> Base:
    """`read_base` with all the tags there are."""
    versions = {sha: tag for tag, sha in hub.tags(revision.repo).items()}
    return read_base(hub, revision, versions[revision.sha], versions)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    """The files in a fresh folder."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
