"""Reading a suite's datasets into plain splits: texts, label ids, label names, and the sha of what was read.

The only network here is `datasets.load_dataset` and the question which commit a revision is (``HF_ENDPOINT``); never
with a token, because what is scored must be public, and never running a dataset's code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hubfusion.data.suite import Cut, Dataset
from hubfusion.errors import EvaluationError
from hubfusion.lineage import COMMIT_SHA

PARQUET_CONVERSION = "refs/convert/parquet"
FORMATS = (".parquet", ".csv", ".jsonl")


@dataclass(frozen=True, slots=True)
class Split:
    """Plain examples: ``first`` texts, ``second`` texts for pairs (None otherwise), ``labels`` (ids, or numbers)."""

    first: tuple[str, ...]
    second: tuple[str, ...] | None
    labels: tuple[int, ...] | tuple[float, ...]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.labels)

    def take(self, rows: Sequence[int]) -> Split:
        """These examples, in this order."""
        second = None if self.second is None else tuple(self.second[i] for i in rows)
        return Split(tuple(self.first[i] for i in rows), second, tuple(self.labels[i] for i in rows))

    def head(self, cap: int | None) -> Split:
        """A fixed random part of at most ``cap`` examples, in the original order; all of it when None."""
        if cap is None or cap >= len(self):
            return self
        return self.take(sorted(np.random.default_rng(0).permutation(len(self))[:cap].tolist()))


@dataclass(frozen=True, slots=True)
class Data:
    """A dataset that was read: its commit sha (or a hash of the files), label names in id order, and the splits."""

    dataset: Dataset
    sha: str
    labels: tuple[str, ...]
    train: Split
    validation: Split
    test: Split

    @property
    def key(self) -> str:
        """Names exactly what was read, for results and provenance."""
        return self.dataset.key(self.sha)


def resolve(dataset: Dataset) -> str:
    """The commit sha that ``dataset.revision`` (or the default branch) stands for now; no token is sent.

    For a local folder: 40 digits of the sha256 of its files.
    """
    if dataset.is_local:
        return _fingerprint(dataset)
    if dataset.revision is not None and COMMIT_SHA.fullmatch(dataset.revision):
        return dataset.revision
    from huggingface_hub import HfApi

    try:
        sha = HfApi(token=False).dataset_info(dataset.repo, revision=dataset.revision, timeout=30).sha
    except Exception as error:  # huggingface_hub raises its own, requests' and httpx's errors
        raise EvaluationError(f"dataset {dataset.name} ({dataset.repo}): {_first_line(error)}") from None
    if sha is None:
        raise EvaluationError(f"dataset {dataset.name} ({dataset.repo}): the Hub named no commit")
    return str(sha)


def _fingerprint(dataset: Dataset) -> str:
    hasher = hashlib.sha256()
    for split in dataset.splits:
        hasher.update(_local_file(dataset, split).read_bytes())
    return hasher.hexdigest()[:40]


def _local_file(dataset: Dataset, split: str) -> Path:
    if dataset.hold_out and Path(dataset.repo).suffix in FORMATS:
        return Path(dataset.repo)
    for suffix in FORMATS:
        if (path := Path(dataset.repo) / f"{split}{suffix}").is_file():
            return path
    raise EvaluationError(f"dataset {dataset.name}: {dataset.repo} has no {split} with one of {', '.join(FORMATS)}")


def _read_file(path: Path) -> Any:
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    readers = {".parquet": pyarrow.parquet.read_table, ".csv": pyarrow.csv.read_csv, ".jsonl": pyarrow.json.read_json}
    if path.suffix not in readers:
        raise EvaluationError(f"{path}: must be one of {', '.join(FORMATS)}")
    try:
        return readers[path.suffix](path)
    except (OSError, ValueError) as error:  # pyarrow's errors are both
        raise EvaluationError(f"{path}: {_first_line(error)}") from None


def count_rows(path: Path) -> int:
    """Number of examples in a local parquet, CSV or JSON lines file."""
    return int(_read_file(path).num_rows)


def _read_local(dataset: Dataset) -> Mapping[str, Any]:
    import datasets

    return {split: datasets.Dataset(_read_file(_local_file(dataset, split))) for split in dataset.splits}


def load(dataset: Dataset, sha: str | None = None) -> Data:
    """Read a dataset from the Hub at ``sha`` (resolved now when None) into plain splits; no code is run."""
    sha = sha or resolve(dataset)
    if dataset.is_local:
        return build_data(dataset, sha, _read_local(dataset))
    from datasets import load_dataset

    arguments: dict[str, Any] = {"name": dataset.config}
    if dataset.revision == PARQUET_CONVERSION:  # its folders are config/split; it has no metadata to name them
        arguments = {"data_files": {s: f"{dataset.config or 'default'}/{s}/*.parquet" for s in dataset.splits}}
    try:
        table = load_dataset(dataset.repo, revision=sha, token=False, **arguments)
    except Exception as error:  # datasets raises its own and the errors of five libraries below it
        raise EvaluationError(f"dataset {dataset.name} ({dataset.repo}): {_first_line(error)}") from None
    return build_data(dataset, sha, table)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def build_data(dataset: Dataset, sha: str, table: Any) -> Data:
    """Splits, label ids and names from a mapping of split name to `datasets.Dataset` (columns as ``dataset`` says)."""
    wanted = {"train": dataset.train, "test": dataset.test}
    if dataset.validation is not None:
        wanted["validation"] = dataset.validation
    raw = {role: _columns(dataset, table, split) for role, split in wanted.items()}
    names = () if dataset.is_regression else _label_names(dataset, table, [r[2] for r in raw.values()])
    ids = {name: i for i, name in enumerate(names)}
    splits = {}
    for role, (first, second, values) in raw.items():
        labels = tuple(float(v) for v in values) if dataset.is_regression else tuple(ids[v] for v in values)
        splits[role] = Split(first, second, labels)
    if dataset.hold_out:
        splits["train"], splits["test"] = _hold_out(splits["train"], dataset.test_cap or 0)
    if "validation" not in splits:
        splits["train"], splits["validation"] = cut_validation(splits["train"], dataset.cut)
    for role, split in splits.items():
        if not len(split):
            raise EvaluationError(f"dataset {dataset.name}: the {role} split is empty")
    return Data(
        dataset,
        sha,
        names,
        splits["train"].head(dataset.train_cap),
        splits["validation"].head(dataset.validation_cap),
        splits["test"].head(dataset.test_cap),
    )


def _columns(dataset: Dataset, table: Any, split: str) -> tuple[tuple[str, ...], tuple[str, ...] | None, list[Any]]:
    where = f"dataset {dataset.name} ({dataset.repo})"
    first: list[str] = []
    second: list[str] = []
    labels: list[Any] = []
    for part in split.split("+"):
        if part not in table:
            raise EvaluationError(f"{where}: no split {part!r}, there is {', '.join(table)}")
        texts, values = _rows(dataset, table[part])
        first += texts[0]
        second += [" ".join(t) for t in zip(*texts[1:], strict=True)]
        labels += values
    keep = [i for i, v in enumerate(labels) if v is not None]
    pairs = tuple(second[i] for i in keep) if len(dataset.text) > 1 else None
    return tuple(first[i] for i in keep), pairs, [labels[i] for i in keep]


def _rows(dataset: Dataset, rows: Any) -> tuple[list[list[str]], list[Any]]:
    """The text columns and the labels (None where there is none) of one split as it is on the Hub."""
    where = f"dataset {dataset.name} ({dataset.repo})"
    for column in (*dataset.text, dataset.label):
        if column not in rows.column_names:
            raise EvaluationError(f"{where}: no column {column!r}, there is {', '.join(rows.column_names)}")
    texts = [["" if t is None else str(t) for t in rows[c]] for c in dataset.text]
    return texts, [_label(dataset, v) for v in _decoded(rows, dataset.label)]


def _decoded(rows: Any, column: str) -> list[Any]:
    """Label values; class ids become their names, -1 (an unlabelled example) becomes None."""
    names = getattr(rows.features[column], "names", None)
    values = list(rows[column])
    return values if names is None else [None if v is None or v < 0 else names[v] for v in values]


def _label(dataset: Dataset, value: Any) -> Any:
    if value is None or dataset.is_regression:
        return value
    return str(int(float(value) * dataset.bins)) if dataset.bins is not None else str(value)


def _label_names(dataset: Dataset, table: Any, values: list[list[str]]) -> tuple[str, ...]:
    found = {v for split in values for v in split}
    names = getattr(table[dataset.train.split("+")[0]].features[dataset.label], "names", None)
    if names is not None and dataset.bins is None and found <= set(names):
        return tuple(names)
    if all(v.lstrip("-").isdigit() for v in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))


def cut_validation(train: Split, cut: Cut) -> tuple[Split, Split]:
    """Train without its validation part, and that part, by the rule ``cut``."""
    n = len(train)
    if cut is Cut.EDGES:
        low, high = (500, n - 500) if n > 10_000 else (round(0.05 * n), round(0.95 * n))
        inside, outside = [*range(low, high)], [*range(low), *range(high, n)]
    else:
        order = np.random.default_rng(0).permutation(n).tolist()
        size = min(1000, n // 10)
        inside, outside = sorted(order[size:]), sorted(order[:size])
    return train.take(inside), train.take(outside)


def _hold_out(split: Split, size: int) -> tuple[Split, Split]:
    """The split without ``size`` examples, and those, drawn at random once and for all."""
    order = np.random.default_rng(36).permutation(len(split)).tolist()
    return split.take(sorted(order[size:])), split.take(sorted(order[:size]))


def draw(split: Split, seed: int, examples: int | None = None, per_class: int | None = None) -> list[int]:
    """Rows of the training examples of one seed: ``examples`` at random, ``per_class`` of each label, or all.

    The same seed draws the same rows for every model, so that two models can be compared in pairs.
    """
    if examples is None and per_class is None:
        return list(range(len(split)))
    order: list[int] = np.random.default_rng([20, seed]).permutation(len(split)).tolist()
    if per_class is None:
        return sorted(order[:examples])
    counts: dict[float, int] = {}
    chosen = []
    for row in order:
        counts[split.labels[row]] = counts.get(split.labels[row], 0) + 1
        if counts[split.labels[row]] <= per_class:
            chosen.append(row)
    return sorted(chosen)
