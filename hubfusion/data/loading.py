"""Reading a suite's datasets into plain splits: texts, label ids, label names, and the sha of what was read.

The only network here is `datasets.load_dataset` and the question which commit a revision is (``HF_ENDPOINT``); never
with a token, because what is scored must be public, and never running a dataset's code.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hubfusion.data.suite import Cut, Dataset
from hubfusion.errors import EvaluationError
from hubfusion.lineage import COMMIT_SHA

PARQUET_CONVERSION = "refs/convert/parquet"
FORMATS = (".parquet", ".csv", ".jsonl")
BATCH = 10_000
"""Rows of text that are looked at together."""


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
        raise EvaluationError(f"{_where(dataset)}: {_reason(error)}") from None
    if sha is None:
        raise EvaluationError(f"{_where(dataset)}: the Hub named no commit")
    return str(sha)


def _fingerprint(dataset: Dataset) -> str:
    hasher = hashlib.sha256()
    for split in dataset.splits:
        with _local_file(dataset, split).open("rb") as file:
            while chunk := file.read(1 << 20):
                hasher.update(chunk)
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

    def read(split: str) -> Any:
        # with a fingerprint of ours, because `datasets` would make one by pickling the whole table
        return datasets.Dataset(_read_file(_local_file(dataset, split)), fingerprint=split)

    return {split: read(split) for split in dataset.splits}


def load(dataset: Dataset, sha: str | None = None) -> Data:
    """Read a dataset from the Hub at ``sha`` (resolved now when None) into plain splits; no code is run."""
    sha = sha or resolve(dataset)
    if dataset.is_local:
        return build_data(dataset, sha, _read_local(dataset))
    import datasets

    # A cache for each commit: when anything fails, `datasets` falls back to the newest files that its cache has of this
    # repository, whatever their commit, and it also takes those of its releases before 3.0, which did not record one.
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "hubfusion" / sha
    try:
        table = datasets.load_dataset(dataset.repo, revision=sha, token=False, cache_dir=str(cache), **_source(dataset))
    except Exception as error:  # datasets raises its own and the errors of five libraries below it
        raise EvaluationError(f"{_where(dataset, sha)}: {_reason(error)}") from None
    return build_data(dataset, sha, table)


def _source(dataset: Dataset) -> dict[str, Any]:
    """Which files of the repository are read, as arguments of `datasets.load_dataset`."""
    if dataset.revision == PARQUET_CONVERSION:  # its folders are config/split; it has no metadata to name them
        return {"data_files": {s: f"{dataset.config or 'default'}/{s}/*.parquet" for s in dataset.splits}}
    return {"name": dataset.config}


def _where(dataset: Dataset, sha: str | None = None) -> str:
    """The dataset, its repository, and the revision that was asked for, for errors."""
    revision = dataset.revision or "main"
    commit = "" if sha is None or sha == revision else f" ({sha[:12]})"
    return f"dataset {dataset.name}: {dataset.repo} at {revision}{commit}"


def _reason(error: Exception) -> str:
    """What went wrong, in one line; the Hub's own errors begin with one that says "404 Client Error" and no more."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return "access needs its owner's consent; datasets must be public"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such public dataset"
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision"
    if isinstance(error, HfHubHTTPError):
        return f"the Hub answered {error.response.status_code} {error.server_message or ''}".strip()
    if str(error).startswith("Dataset scripts are no longer supported"):
        return f"{_first_line(error)}; if it has a parquet conversion, set revision = {PARQUET_CONVERSION!r}"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


Rows = NDArray[np.int64]
"""Row numbers of a split, ascending."""


@dataclass(frozen=True, slots=True)
class _Pool:
    """One split or several in a row: the tables, whose texts are not read yet, and the label of each row.

    ``codes`` are places in ``values``, or -1 for a row without a label.
    """

    tables: tuple[Any, ...]
    values: tuple[str | float, ...]
    codes: Rows

    @property
    def labeled(self) -> Rows:
        """The rows that have a label."""
        return np.flatnonzero(self.codes >= 0)

    def read(self, dataset: Dataset, ids: Mapping[str | float, int], rows: Rows) -> Split:
        """The examples of these rows; only their texts are read."""
        columns: list[list[str]] = [[] for _ in dataset.text]
        first = 0
        for table in self.tables:
            low, high = np.searchsorted(rows, [first, first + len(table)])
            for whole, part in zip(columns, _texts(dataset, table, rows[low:high] - first), strict=True):
                whole += part
            first += len(table)
        second = tuple(" ".join(t) for t in zip(*columns[1:], strict=True)) if len(columns) > 1 else None
        codes = self.codes[rows].tolist()
        if dataset.is_regression:
            return Split(tuple(columns[0]), second, tuple(float(self.values[c]) for c in codes))
        known = [ids[v] for v in self.values]
        return Split(tuple(columns[0]), second, tuple(known[c] for c in codes))


def _texts(dataset: Dataset, table: Any, rows: Rows) -> list[list[str]]:
    """The text columns at these rows of one table, read in batches of which only the rows themselves are kept."""
    columns: list[list[str]] = [[] for _ in dataset.text]
    lazy = table.select_columns(list(dict.fromkeys(dataset.text))).with_format("arrow")
    for start in range(0, len(table), BATCH):
        low, high = np.searchsorted(rows, [start, start + BATCH])
        if low < high:
            batch = lazy[start : start + BATCH].take(rows[low:high] - start)
            for whole, name in zip(columns, dataset.text, strict=True):
                whole += ["" if t is None else str(t) for t in batch[name].to_pylist()]
    return columns


def build_data(dataset: Dataset, sha: str, table: Any) -> Data:
    """Splits, label ids and names from a mapping of split name to `datasets.Dataset` (columns as ``dataset`` says).

    Rows are held out, cut and capped by number; only then are the texts of the rows that are left read.
    """
    wanted = {"train": dataset.train, "test": dataset.test}
    if dataset.validation is not None:
        wanted["validation"] = dataset.validation
    pools = {role: _pool(dataset, table, split) for role, split in wanted.items()}
    rows = {role: pool.labeled for role, pool in pools.items()}
    if dataset.hold_out:
        rows["train"], rows["test"] = hold_out(rows["train"], dataset.test_cap or 0)
    if dataset.validation is None:
        pools["validation"] = pools["train"]
        rows["train"], rows["validation"] = cut_validation(rows["train"], dataset.cut)
    for role, left in rows.items():
        if not len(left):
            whole = len(pools[role].codes)
            why = f": none of its {whole} rows has a label" if whole and not len(pools[role].labeled) else ""
            raise EvaluationError(f"dataset {dataset.name}: the {role} split is empty{why}")
    names = () if dataset.is_regression else _label_names(dataset, table, list(pools.values()))
    ids: dict[str | float, int] = {name: i for i, name in enumerate(names)}
    caps = {"train": dataset.train_cap, "validation": dataset.validation_cap, "test": dataset.test_cap}
    splits = {role: pools[role].read(dataset, ids, cap_rows(rows[role], cap)) for role, cap in caps.items()}
    return Data(dataset, sha, names, splits["train"], splits["validation"], splits["test"])


def _pool(dataset: Dataset, table: Any, split: str) -> _Pool:
    """The labels of a split (``a+b`` pools two); its texts stay where they are."""
    known: dict[str | float, int] = {}
    tables, codes = [], []
    for part in split.split("+"):
        if part not in table:
            raise EvaluationError(f"{_named(dataset)}: no split {part!r}, there is {', '.join(table)}")
        for column in (*dataset.text, dataset.label):
            if column not in table[part].column_names:
                there = ", ".join(table[part].column_names)
                raise EvaluationError(f"{_named(dataset)}: no column {column!r}, there is {there}")
        labels, places = _labels(dataset, table[part], part)
        new = [-1 if v is None else known.setdefault(v, len(known)) for v in labels]
        codes.append(np.array([*new, -1], dtype=np.int64)[places])
        tables.append(table[part])
    return _Pool(tuple(tables), tuple(known), np.concatenate(codes))


def _named(dataset: Dataset) -> str:
    return f"dataset {dataset.name} ({dataset.repo})"


def _labels(dataset: Dataset, rows: Any, split: str) -> tuple[list[str | float | None], Rows]:
    """The distinct labels of one table as they are compared, None for "no label", and each row's place among them.

    A class id becomes the name of its class; the id -1 is an example without a label.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    column = rows.select_columns([dataset.label]).with_format("arrow")[:][dataset.label]
    try:
        distinct = pc.unique(column).drop_null()
        places = pc.index_in(column, value_set=distinct).fill_null(-1).to_numpy().astype(np.int64)
    except pa.ArrowNotImplementedError:
        kind = f"column {dataset.label!r} holds {column.type}"
        raise EvaluationError(f"{_named(dataset)}: {kind}, a label must be a number, a text or a truth value") from None
    names = getattr(rows.features[dataset.label], "names", None)
    labels: list[str | float | None] = []
    for place, value in enumerate(distinct.to_pylist()):
        if names is not None:
            if value >= len(names):
                raise EvaluationError(f"{_named(dataset)}: class {value} in {split!r}, there are {len(names)} names")
            labels.append(None if value < 0 else names[value])
        elif isinstance(value, float) and math.isnan(value):
            labels.append(None)
        elif value in (-1, "-1") and not dataset.is_regression:
            # Most often it marks rows without a label, but where the labels are -1, 0, 1 it is a class: no guess.
            count = int((places == place).sum())
            raise EvaluationError(
                f"{_named(dataset)}: {count} rows of {split!r} are labeled -1 in a column without class names, a class "
                "or no label; allowed are other labels, or a ClassLabel column, where -1 means no label"
            )
        else:
            labels.append(_label(dataset, value))
    return labels, places


def _label(dataset: Dataset, value: Any) -> str | float:
    if not dataset.is_regression and dataset.bins is None:
        return str(value)
    try:
        number = float(value)
    except ValueError:
        raise EvaluationError(f"{_named(dataset)}: label {value!r} is not a number") from None
    return number if dataset.bins is None else str(int(number * dataset.bins))


def _label_names(dataset: Dataset, table: Any, pools: Sequence[_Pool]) -> tuple[str, ...]:
    found = {str(v) for pool in pools for v in pool.values}
    names = getattr(table[dataset.train.split("+")[0]].features[dataset.label], "names", None)
    if names is not None and dataset.bins is None and found <= set(names):
        return tuple(names)
    if all(v.lstrip("-").isdigit() for v in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))


def cut_validation(rows: Rows, cut: Cut) -> tuple[Rows, Rows]:
    """The rows of train without its validation part, and that part, by the rule ``cut``."""
    n = len(rows)
    if cut is Cut.EDGES:
        low, high = (500, n - 500) if n > 10_000 else (round(0.05 * n), round(0.95 * n))
        return rows[low:high], np.concatenate([rows[:low], rows[high:]])
    order = np.random.default_rng(0).permutation(n)
    size = min(1000, n // 10)
    return rows[np.sort(order[size:])], rows[np.sort(order[:size])]


def hold_out(rows: Rows, size: int) -> tuple[Rows, Rows]:
    """The rows without ``size`` of them, and those, drawn at random once and for all."""
    order = np.random.default_rng(36).permutation(len(rows))
    return rows[np.sort(order[size:])], rows[np.sort(order[:size])]


def cap_rows(rows: Rows, cap: int | None) -> Rows:
    """A fixed random part of at most ``cap`` rows, in the original order; all of them when None."""
    if cap is None or cap >= len(rows):
        return rows
    return rows[np.sort(np.random.default_rng(0).permutation(len(rows))[:cap])]


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
