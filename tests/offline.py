"""An embedded Hub that holds a two-layer model and small stand-ins for the datasets of the suite `offline`."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hubfusion.data.suite import load_suite
from hubfusion.hub import Change, Hub, RepoKind, connect
from hubfusion.localhub import LocalHub, Rules
from tests.trainable_models import make_base, make_data

ROOT = Path(__file__).resolve().parents[1]
TOKENS = {"ann": "hf_ann", "demo": "hf_demo"}
MODEL, RESULTS = "ann/base", "ann/results"
RECIPES = """
[linear-probing]
training = { max_length = 16 }
[finetune]
training = { max_length = 16, batch_size = 16, epochs = 8, learning_rate = 0.01 }
[few-shot]
per_class = 8
training = { max_length = 16, batch_size = 8, epochs = 2, learning_rate = 0.01 }
"""


@contextmanager
def serve(folder: Path) -> Iterator[LocalHub]:
    """The Hub, with `MODEL`, five public datasets, and jobs allowed."""
    with LocalHub(folder / "hub", TOKENS, rules=Rules(allow_jobs=True)) as hub:
        make_base(folder / "base")
        files = {p.name: p for p in (folder / "base").iterdir()}
        _push(connect(hub.endpoint, "hf_ann"), MODEL, RepoKind.MODEL, files)
        for number, dataset in enumerate(load_suite("offline").datasets):
            _push(connect(hub.endpoint, "hf_demo"), dataset.repo, RepoKind.DATASET, _tables(number))
        yield hub


def _push(hub: Hub, repo: str, kind: RepoKind, files: dict[str, bytes | Path] | dict[str, Path]) -> None:
    hub.create(repo, kind)
    hub.commit(repo, Change("files", hub.resolve(repo, kind=kind).sha, repo, files), kind)


def _tables(number: int) -> dict[str, bytes | Path]:
    """Parquet files of the made-up two-class data, other rows for each number."""
    data = make_data(train=48 + number, test=20 + number)
    files: dict[str, bytes | Path] = {}
    for role in ("train", "validation", "test"):
        split, buffer = getattr(data, role), io.BytesIO()
        order = np.random.default_rng(number).permutation(len(split))
        columns = {"text": [f"{split.first[i]} {role} {i}" for i in order], "label": [split.labels[i] for i in order]}
        pq.write_table(pa.table(columns), buffer)
        files[f"data/{role}-00000-of-00001.parquet"] = buffer.getvalue()
    return files


def machine(hub: LocalHub, folder: Path, token: str | None = "hf_ann") -> dict[str, str]:
    """The environment of a machine with nothing in its caches."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "HUGGING", "XDG_"))}
    folder.mkdir(exist_ok=True)
    mine = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(folder / "hf"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "PYTHONPATH": str(ROOT),
    }
    return kept | mine | ({"HF_TOKEN": token} if token else {})
