"""The repositories that `recycling36` reads, as `hub_schemas.toml` describes them: replicas, and a check of the table.

``python -m tests.hub_schemas`` lists them. With ``--live`` it compares the table with the Hub at ``HF_ENDPOINT``:
files, columns, class names and sizes, from file lists, cards and the ends of parquet files. The rows of CSV and JSON
lines are not counted; ``hubfusion suite check``, which reads them, does that. It exits with 1 on a difference.
"""

from __future__ import annotations

import argparse
import io
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import datasets
import pyarrow.csv as csv
import pyarrow.parquet as pq
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, HfFileSystem

from hubfusion.data.loading import PARQUET_CONVERSION
from hubfusion.data.suite import load_suite

TABLE = Path(__file__).with_suffix(".toml")
ROWS = 20
"""Rows of a split in a replica; a train split has more where that takes three of each class, or more are held out."""


class Layout(StrEnum):
    """How a repository holds its files; see the head of the table."""

    CONFIGS = "configs"
    PARQUET = "parquet"
    CONVERSION = "conversion"
    CSV = "csv"
    JSONL = "jsonl"


@dataclass(frozen=True, slots=True)
class Config:
    """One configuration; ``features`` are a type, class names, or a struct by column."""

    files: str | Mapping[str, str]
    sizes: Mapping[str, int]
    features: Mapping[str, Any]

    def pattern(self, split: str) -> str:
        """Which files hold a split."""
        return self.files.format(split=split) if isinstance(self.files, str) else self.files[split]


@dataclass(frozen=True, slots=True)
class Repo:
    """One repository of the table."""

    id: str
    layout: Layout
    source: str
    from_memory: tuple[str, ...]
    configs: Mapping[str, Config]
    hidden: tuple[str, ...] = ()
    classes: Mapping[str, int] | None = None

    @property
    def revision(self) -> str | None:
        """Where the files are; None is main."""
        return PARQUET_CONVERSION if self.layout is Layout.CONVERSION else None


def read_table() -> dict[str, Repo]:
    """The table by repository id."""
    repos = {}
    for entry in tomllib.loads(TABLE.read_text(encoding="utf-8"))["repos"]:
        configs = {name: Config(**config) for name, config in entry.pop("configs").items()}
        lists = {key: tuple(entry.pop(key, ())) for key in ("from_memory", "hidden")}
        repo = Repo(**entry | lists | {"configs": configs, "layout": Layout(entry["layout"])})
        repos[repo.id] = repo
    return repos


def features_of(config: Config) -> datasets.Features:
    """The columns of a configuration as `datasets` has them."""
    return datasets.Features({name: _feature(kind) for name, kind in config.features.items()})


def _feature(kind: Any) -> Any:
    if isinstance(kind, list):
        return datasets.ClassLabel(names=kind)
    if isinstance(kind, dict):
        return {name: _feature(inner) for name, inner in kind.items()}
    return datasets.Value(kind)


# Replicas


def replica_sizes(repo: Repo) -> Repo:
    """The same repository with as many rows as its replica has."""
    return replace(repo, configs={n: replace(c, sizes=_sizes(repo, c)) for n, c in repo.configs.items()})


def _sizes(repo: Repo, config: Config) -> dict[str, int]:
    classes = [len(kind) for kind in config.features.values() if isinstance(kind, list)]
    most = max([0, *classes, *(repo.classes or {}).values()])
    held_out = sum(d.test_cap or 0 for d in load_suite("recycling36").datasets if d.repo == repo.id and d.hold_out)
    train = max(ROWS, 3 * most) + held_out
    return {split: train if split.startswith("train") else ROWS for split in config.sizes}


def publish_replicas(repos: Mapping[str, Repo], api: HfApi) -> None:
    """Write a replica of each repository under its own id; whoever `api` stands for owns their namespaces."""
    for repo in map(replica_sizes, repos.values()):
        api.create_repo(repo.id, repo_type="dataset")
        files = dict(_data_files(repo))
        main = {"README.md": _card(repo).encode()}
        if repo.layout is Layout.CONVERSION:
            main[f"{repo.id.split('/')[1]}.py"] = b"raise SystemExit('a loading script that nothing may run')\n"
            api.create_branch(repo.id, branch=PARQUET_CONVERSION, repo_type="dataset")
            _commit(api, repo.id, files, PARQUET_CONVERSION)
        _commit(api, repo.id, main if repo.layout is Layout.CONVERSION else main | files, None)


def _commit(api: HfApi, repo: str, files: Mapping[str, bytes], revision: str | None) -> None:
    added = [CommitOperationAdd(path, content) for path, content in files.items()]
    api.create_commit(repo, added, commit_message="replica", repo_type="dataset", revision=revision)


def _data_files(repo: Repo) -> Iterator[tuple[str, bytes]]:
    star = {Layout.CONVERSION: "0000", Layout.PARQUET: "00000-of-00001-41c7ea948573445f"}
    write: dict[Layout, Callable[..., Any]] = {
        Layout.CSV: datasets.Dataset.to_csv,
        Layout.JSONL: datasets.Dataset.to_json,
    }
    for name, config in repo.configs.items():
        for split, size in config.sizes.items():
            rows = [_row(repo, name, config, split, i, size) for i in range(size)]
            table = datasets.Dataset.from_list(rows, features=features_of(config))
            buffer = io.BytesIO()
            write.get(repo.layout, datasets.Dataset.to_parquet)(table, buffer)
            path = config.pattern(split).replace("*", star.get(repo.layout, "00000-of-00001"))
            yield path, buffer.getvalue()


def _row(repo: Repo, name: str, config: Config, split: str, i: int, size: int) -> dict[str, Any]:
    """Texts that come once in all replicas; labels that go around, with both ends of a scale among the numbers."""
    row = {}
    for column, kind in config.features.items():
        if column in (repo.classes or {}):
            place = i % (repo.classes or {})[column]
            row[column] = f"class {place}" if kind == "string" else place
        elif isinstance(kind, list):
            row[column] = -1 if split in repo.hidden else i % len(kind)
        else:
            row[column] = _value(kind, f"{column} {i} of {size} in {split}, {name}, {repo.id}", i)
    return row


def _value(kind: Any, text: str, i: int) -> Any:
    if isinstance(kind, dict):
        return {name: _value(inner, text, i) for name, inner in kind.items()}
    return {"string": text, "float32": i % 6 / 5}.get(kind, i)


def _card(repo: Repo) -> str:
    infos, configs = [], []
    for name, config in repo.configs.items():
        splits = [{"name": s, "num_bytes": 0, "num_examples": n} for s, n in config.sizes.items()]
        features = features_of(config)._to_yaml_list()
        infos.append({"config_name": name, "features": features, "splits": splits, "dataset_size": 0})
        paths = [{"split": s, "path": config.pattern(s).removesuffix(".parquet")} for s in config.sizes]
        configs.append({"config_name": name, "data_files": paths})
    data: dict[str, Any] = {"language": ["en"], "license": "unknown"}
    if repo.layout not in (Layout.CSV, Layout.JSONL):
        data["dataset_info"] = infos if len(infos) > 1 else infos[0]
    if repo.layout is Layout.CONFIGS:
        data["configs"] = configs
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n# A replica for tests\n"


# The comparison


def differences(repo: Repo, api: HfApi) -> Iterator[str]:
    """Where a repository on the Hub is not as the table says; `datasets` must have the same endpoint as ``api``."""
    try:
        info = api.dataset_info(repo.id, revision=repo.revision)
    except Exception as error:
        yield f"{repo.id} at {repo.revision or 'main'}: {error}".replace("\n", " ")
        return
    paths = sorted(file.rfilename for file in info.siblings or ())
    files = HfFileSystem(endpoint=api.endpoint, token=False)
    for name, config in repo.configs.items():
        where = f"{repo.id}, {name}"
        for split, size in config.sizes.items():
            found = [path for path in paths if fnmatch(path, config.pattern(split))]
            if not found:
                yield f"{where}, {split}: no {config.pattern(split)}"
                continue
            opened = [files.open(f"datasets/{repo.id}@{info.sha}/{path}") for path in found]
            if repo.layout in (Layout.CSV, Layout.JSONL):
                yield from _compare_names(f"{where}, {split}", config, opened[0].readline(), repo.layout)
            else:
                yield from _compare_parquet(f"{where}, {split}", config, size, [pq.ParquetFile(f) for f in opened])
        if repo.layout is not Layout.CONVERSION:
            yield from _compare_splits(where, repo, name, str(info.sha))


def _compare_names(where: str, config: Config, line: bytes, layout: Layout) -> Iterator[str]:
    if layout is Layout.CSV:
        names = csv.read_csv(io.BytesIO(line)).column_names
    else:
        names = list(json.loads(line))
    if sorted(names) != sorted(config.features):
        yield f"{where}: columns {', '.join(names)}, the table has {', '.join(config.features)}"


def _compare_parquet(where: str, config: Config, size: int, parts: list[pq.ParquetFile]) -> Iterator[str]:
    there, here = datasets.Features.from_arrow_schema(parts[0].schema_arrow), features_of(config)
    for column in {**here, **there}:
        if (a := there.get(column)) != (b := here.get(column)):
            yield f"{where}, {column}: {a}, the table has {b}"
    rows = sum(part.metadata.num_rows for part in parts)
    if rows != size:
        yield f"{where}: {rows} rows, the table has {size}"


def _compare_splits(where: str, repo: Repo, name: str, sha: str) -> Iterator[str]:
    """What `datasets` itself finds, which is how the suite reads it."""
    chosen = None if len(repo.configs) == 1 and name == "default" else name
    try:
        builder = datasets.load_dataset_builder(repo.id, chosen, revision=sha, token=False)
    except Exception as error:
        yield f"{where}: {error}".replace("\n", " ")
        return
    missing = sorted(set(repo.configs[name].sizes) - set(builder.config.data_files))
    if missing:
        yield f"{where}: datasets finds no split {', '.join(missing)}, only {', '.join(builder.config.data_files)}"


def main() -> int:
    """List the table, or compare it with the Hub."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--live", action="store_true", help="compare with the Hub at HF_ENDPOINT; needs the network")
    live = parser.parse_args().live
    count = 0
    for repo in read_table().values():
        memory = f"; from memory: {', '.join(repo.from_memory)}" if repo.from_memory else ""
        print(f"{repo.id} ({repo.layout}): {', '.join(repo.configs)}{memory}")
        for difference in differences(repo, HfApi(token=False)) if live else ():
            count += 1
            print(f"  {difference}")
    if live:
        print(f"{count} differences")
    return int(count > 0)


if __name__ == "__main__":
    raise SystemExit(main())
