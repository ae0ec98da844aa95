"""The 36 datasets of `recycling36`, read from replicas on an embedded Hub, and what can go wrong on a Hub."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

from hubfusion.data.loading import PARQUET_CONVERSION, load, resolve
from hubfusion.data.suite import Dataset, load_suite
from hubfusion.errors import EvaluationError
from hubfusion.localhub import LocalHub
from tests.hub_schemas import differences, publish_replicas, read_table, replica_sizes
from tests.offline import machine

SUITE = load_suite("recycling36")
TABLE = read_table()


class Served(NamedTuple):
    """A Hub with the replicas, its owner's client, and an empty folder."""

    hub: LocalHub
    api: HfApi
    folder: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    namespaces = {repo.split("/")[0]: ["keeper"] for repo in TABLE}
    with (
        LocalHub(folder / "hub", {"keeper": "hf_keeper"}, namespaces) as hub,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        api = HfApi(endpoint=hub.endpoint, token="hf_keeper")
        publish_replicas(TABLE, api)
        yield Served(hub, api, folder)


@pytest.fixture
def here(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HfApi:
    """This process reads from the Hub, as if it had been started with its address, and has nothing in its cache."""
    endpoint = served.hub.endpoint
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return served.api


def config_of(dataset: Dataset) -> str:
    configs = TABLE[dataset.repo].configs
    return dataset.config or next(iter(configs))


@pytest.mark.parametrize("dataset", SUITE.datasets, ids=lambda d: d.name)
def test_the_suite_asks_for_what_the_table_has(dataset: Dataset) -> None:
    repo = TABLE[dataset.repo]
    config = repo.configs[config_of(dataset)]
    assert len(repo.configs) == 1 or dataset.config in repo.configs
    assert dataset.revision == repo.revision
    assert {*dataset.text, dataset.label} <= set(config.features)
    assert set(dataset.splits) <= set(config.sizes) - set(repo.hidden)
    test = sum(config.sizes[split] for split in dataset.test.split("+"))
    assert min(test, dataset.test_cap or test) == (dataset.own_test_size or dataset.test_size)


def expected(dataset: Dataset) -> tuple[int, int, int, int]:
    """Train, validation, test and labels of a replica, by the suite's rules."""
    repo = replica_sizes(TABLE[dataset.repo])
    config = repo.configs[config_of(dataset)]
    train, test = (sum(config.sizes[s] for s in split.split("+")) for split in (dataset.train, dataset.test))
    validation = sum(config.sizes[s] for s in dataset.validation.split("+")) if dataset.validation else 0
    test = min(test, dataset.test_cap or test)
    train -= test if dataset.hold_out else 0
    if not validation:
        validation = train - round(0.95 * train) + round(0.05 * train) if dataset.cut == "edges" else train // 10
        train -= validation
    kind = config.features[dataset.label]
    labels = len(kind) if isinstance(kind, list) else (repo.classes or {}).get(dataset.label, 0)
    return train, validation, test, {"stsb": 0, "sst_5bins": 6}.get(dataset.name, labels)


def test_suite_check_reads_all_36_datasets_from_a_hub(served: Served) -> None:
    command = [sys.executable, "-m", "hubfusion", "suite", "check", "recycling36"]
    environment = machine(served.hub, served.folder / "machine", token=None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    cells = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in lines]
    rows = {row[0]: tuple(map(int, row[1:5])) for row in cells if len(row) > 1}
    assert rows == {d.name: expected(d) for d in SUITE.datasets}, done.stderr
    sizes = {d.name: f"the published one {d.test_size}" for d in SUITE.datasets}
    sizes["isear"] = "this substitute's 2000"
    del sizes["financial_phrasebank"]  # 1,000 are held out of its replica as well
    problems = [f"{n}: the test set has {expected(SUITE.get(n))[2]} examples, {size}" for n, size in sizes.items()]
    assert [line for line in lines if ": " in line] == problems  # replicas are small, and that is all
    assert done.returncode == 1


def test_the_table_is_compared_with_a_hub(here: HfApi) -> None:
    for repo in map(replica_sizes, TABLE.values()):
        assert list(differences(repo, here)) == []


@pytest.mark.parametrize(
    ("name", "config", "change", "message"),
    [
        ("CogComp/trec", "default", {"sizes": {"train": 150, "test": 21}}, "default, test: 20 rows, the table has 21"),
        ("stanfordnlp/imdb", "plain_text", {"sizes": {"dev": 20}}, "dev: no plain_text/dev-[*].parquet"),
        ("stanfordnlp/imdb", "plain_text", {"files": "{split}.parquet"}, "no train.parquet"),
        ("DeveloperOats/DBPedia_Classes", "default", {"features": {"text": "string"}}, "columns text, l1, l2, l3, the"),
        ("nyu-mll/glue", "rte", {"features": {"label": ["no", "yes"]}}, r"rte, train, label: ClassLabel\(names=\['ent"),
    ],
)
def test_what_differs_from_the_table_is_said(here: HfApi, name: str, config: str, change: Any, message: str) -> None:
    repo = replica_sizes(TABLE[name])
    wrong = replace(repo, configs=repo.configs | {config: replace(repo.configs[config], **change)})
    found = list(differences(wrong, here))
    assert found and any(re.search(message, line) for line in found), found


def test_a_repository_that_is_gone_is_a_difference(here: HfApi) -> None:
    assert "keeper/gone at main" in next(differences(replace(TABLE["stanfordnlp/imdb"], id="keeper/gone"), here))


def make(api: HfApi, name: str, files: dict[str, bytes]) -> Dataset:
    """A new dataset of the owner with these files."""
    api.create_repo(name, repo_type="dataset")
    commit(api, name, files)
    return Dataset("mine", name)


def commit(api: HfApi, name: str, files: dict[str, bytes], without: tuple[str, ...] = ()) -> None:
    put = [CommitOperationAdd(path, content) for path, content in files.items()]
    gone = [CommitOperationDelete(path) for path in without]
    api.create_commit(name, [*put, *gone], commit_message="files", repo_type="dataset")


def lines(word: str) -> dict[str, bytes]:
    rows = "".join(f'{{"text": "{word} {i}", "label": {i % 2}}}\n' for i in range(20)).encode()
    return {"train.jsonl": rows, "test.jsonl": rows}


@pytest.mark.parametrize(
    ("repo", "revision", "message"),
    [
        (
            "keeper/script",
            None,
            r"keeper/script at main \([0-9a-f]{12}\): Dataset scripts are no longer supported, but found script.py; "
            "if it has a parquet conversion, set revision = 'refs/convert/parquet'",
        ),
        ("keeper/script", PARQUET_CONVERSION, "keeper/script at refs/convert/parquet: there is no such revision"),
        ("keeper/script", "v9", "keeper/script at v9: there is no such revision"),
        ("keeper/gone", None, "keeper/gone at main: there is no such public dataset"),
        ("keeper/gone", "0" * 40, "keeper/gone at 0{40}: Dataset 'keeper/gone' doesn't exist on the Hub.*"),
    ],
)
def test_errors_name_the_repository_and_the_revision(here: HfApi, repo: str, revision: str, message: str) -> None:
    here.create_repo("keeper/script", repo_type="dataset", exist_ok=True)
    commit(here, "keeper/script", {"script.py": b"print('run me')\n"})
    with pytest.raises(EvaluationError) as error:
        load(Dataset("mine", repo, revision=revision))
    assert re.fullmatch(f"dataset mine: {message}", str(error.value)), str(error.value)


def old_layout(cache: Path) -> None:
    """Move what is in the cache to where releases of `datasets` before 2.14 put it, with no commit in the path."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    new = next(cache.glob("keeper___*/default/0.0.0/*/dataset_info.json")).parent
    old = new.parents[2] / new.parents[2].name.replace("___", "--") / "0.0.0" / _PACKAGED_DATASETS_MODULES["json"][1]
    old.parent.mkdir(parents=True)
    new.rename(old)
    for part in old.glob("*.arrow"):
        part.rename(old / f"json-{part.name.split('-', 1)[1]}")


def test_an_old_cache_is_not_read_for_a_new_commit(here: HfApi) -> None:
    spec = make(here, "keeper/moving", lines("old"))
    datasets.load_dataset(spec.repo, token=False)
    old_layout(datasets.config.HF_DATASETS_CACHE)
    commit(here, spec.repo, lines("new"))
    assert datasets.load_dataset(spec.repo, revision=resolve(spec))["test"][0]["text"] == "old 0"  # what `load` avoids
    assert load(spec).test.first[0] == "new 0"


def test_an_unreadable_commit_is_not_replaced_by_a_cached_one(here: HfApi) -> None:
    spec = make(here, "keeper/breaking", lines("old"))
    datasets.load_dataset(spec.repo, token=False)
    assert load(spec).test.first[0] == "old 0"
    commit(here, spec.repo, {"breaking.py": b""}, without=("train.jsonl", "test.jsonl"))
    assert datasets.load_dataset(spec.repo, revision=resolve(spec))["test"][0]["text"] == "old 0"  # what `load` avoids
    with pytest.raises(EvaluationError, match="Dataset scripts are no longer supported"):
        load(spec)
