"""Listings: filters, order, pages, and what is derived from cards."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session

from hubfusion.localhub import LocalHub
from hubfusion.localhub.store.git import GitRepo
from hubfusion.localhub.store.repos import Kind
from tests.localhub.conftest import USERS, World, clients

BASE = "ibm/base"


def card(lines: str) -> bytes:
    return f"---\n{lines}\n---\n# card\n".encode()


CARDS = {
    "ann/fine": f"license: mit\nbase_model: {BASE}\ntags: [cold-fusion, x]\n"
    "datasets: [ann/data]\npipeline_tag: fill-mask",
    "ann/said": f"license: apache-2.0\nbase_model: [{BASE}]\nbase_model_relation: quantized",
    "ann/merged": f"base_model: [{BASE}, other/base]\ntags: cold-fusion",
    "bob/fine": f"license: mit\nbase_model: {BASE}\ntags: [cold-fusion]\nlibrary_name: transformers",
    "bob/plain": "license: mit",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with LocalHub(tmp_path_factory.mktemp("hub"), USERS) as hub:
        made = clients(hub)
        for name, lines in CARDS.items():
            owner = made.ann if name.startswith("ann") else made.bob
            owner.create_repo(name)
            owner.create_commit(name, [CommitOperationAdd("README.md", card(lines))], commit_message="card")
        made.ann.create_repo("ann/adapter")
        files = {"README.md": card(f"base_model: {BASE}"), "adapter_config.json": b"{}"}
        made.ann.create_commit(
            "ann/adapter", [CommitOperationAdd(*item) for item in files.items()], commit_message="adapter"
        )
        yield made


def ids(world: World, **wanted: object) -> set[str]:
    return {model.id for model in world.anon.list_models(**wanted)}


def test_filters_narrow_each_other(world: World) -> None:
    assert ids(world, filter="cold-fusion") == {"ann/fine", "ann/merged", "bob/fine"}
    assert ids(world, filter=["cold-fusion", "license:mit"]) == {"ann/fine", "bob/fine"}
    assert ids(world, filter=["cold-fusion", "license:mit"], author="bob") == {"bob/fine"}
    assert ids(world, filter="dataset:ann/data") == {"ann/fine"}
    assert ids(world, pipeline_tag="fill-mask") == {"ann/fine"}
    assert ids(world, search="ANN fi") == {"ann/fine"}
    assert ids(world, filter="no-such-tag") == set()


def test_relations_to_a_base_are_said_or_inferred(world: World) -> None:
    assert ids(world, filter=f"base_model:{BASE}") == {"ann/fine", "ann/said", "ann/merged", "bob/fine", "ann/adapter"}
    assert ids(world, filter=f"base_model:finetune:{BASE}") == {"ann/fine", "bob/fine"}
    assert ids(world, filter=f"base_model:quantized:{BASE}") == {"ann/said"}
    assert (
        ids(world, filter=f"base_model:merge:{BASE}")
        == ids(world, filter="base_model:merge:other/base")
        == {"ann/merged"}
    )
    assert ids(world, filter=f"base_model:adapter:{BASE}") == {"ann/adapter"}


def test_a_changed_card_changes_the_listing_at_once(world: World) -> None:
    world.bob.create_repo("bob/changing")
    for tag in ("one", "two"):
        content = card(f"tags: [changing-{tag}]")
        world.bob.upload_file(path_or_fileobj=content, path_in_repo="README.md", repo_id="bob/changing")
        assert ids(world, filter=f"changing-{tag}") == {"bob/changing"}
    assert ids(world, filter="changing-one") == set()
    world.bob.delete_repo("bob/changing")
    assert ids(world, filter="changing-two") == set()


def test_order_is_newest_first_by_time_of_making_or_of_change(world: World) -> None:
    names = [f"ann/order{n}" for n in range(4)]
    for name in names:
        world.ann.create_repo(name)
    world.ann.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=names[1])
    made = [m.id for m in world.anon.list_models(search="order", sort="created_at")]
    changed = [m.id for m in world.anon.list_models(search="order", sort="last_modified")]
    assert made == names[::-1]
    assert changed == [names[1], names[3], names[2], names[0]]
    info = world.anon.model_info(names[1])
    assert info.created_at < info.last_modified


def test_pages_hold_every_repository_once_even_when_some_change_meanwhile(world: World) -> None:
    for n in range(7):
        world.bob.create_repo(f"bob/page{n}")
    url, seen = f"{world.endpoint}/api/models?search=page&limit=2&sort=createdAt&full=true", []
    while url:
        answer = get_session().get(url)
        seen += [model["id"] for model in answer.json()]
        url = answer.links.get("next", {}).get("url")
        world.bob.upload_file(path_or_fileobj=b"%d" % len(seen), path_in_repo="a", repo_id="bob/page0")
    assert seen == [f"bob/page{n}" for n in range(6, -1, -1)]
    assert len(list(world.anon.list_models(search="page", limit=3))) == 3


@pytest.mark.parametrize("query", ["cursor=nonsense", "limit=x", "limit=-1", "sort=size", "expand=everything"])
def test_a_query_that_makes_no_sense_is_refused(world: World, query: str) -> None:
    answer = get_session().get(f"{world.endpoint}/api/models?{query}")
    assert answer.status_code == 400 and answer.json()["error"]


def test_info_has_what_is_expanded_and_nothing_else(world: World) -> None:
    answer = get_session().get(f"{world.endpoint}/api/models/ann/fine?expand=sha&expand=cardData").json()
    assert set(answer) == {"_id", "id", "modelId", "sha", "cardData"}
    assert answer["cardData"]["base_model"] == BASE
    info = world.anon.model_info("ann/fine", expand=["baseModels", "tags", "downloads"])
    assert info.base_models["relation"] == "finetune" and info.base_models["models"][0]["id"] == BASE
    assert info.downloads == 0


def test_a_base_counts_its_children_and_a_dataset_ranks_its_models(world: World) -> None:
    world.ann.create_repo("ann/root")
    world.ann.create_repo("ann/bench", repo_type="dataset")
    for name, value in (("ann/low", 0.25), ("ann/high", 0.75)):
        world.ann.create_repo(name)
        result = f"- dataset: {{id: ann/bench, task_id: default}}\n  value: {value}\n"
        files = {"README.md": card("base_model: ann/root"), ".eval_results/bench.yaml": result.encode()}
        world.ann.create_commit(name, [CommitOperationAdd(*item) for item in files.items()], commit_message="x")
    assert world.anon.model_info("ann/root", expand=["childrenModelCount"]).children_model_count == 2
    board = world.anon.get_dataset_leaderboard("ann/bench")
    assert [(entry.rank, entry.model_id, entry.value) for entry in board] == [
        (1, "ann/high", 0.75),
        (2, "ann/low", 0.25),
    ]
    assert world.anon.model_info("ann/high", expand=["evalResults"]).eval_results[0].value == 0.75


@pytest.mark.parametrize("count", [30, pytest.param(500, marks=pytest.mark.slow)])
def test_a_listing_costs_no_git_once_the_facts_are_known(tmp_path: Path, count: int, monkeypatch) -> None:
    with LocalHub(tmp_path, USERS) as hub:
        for n in range(count):
            hub.hub.repos.create(Kind.MODEL, "ann", f"m{n}", "ann", False, "")
        assert len(list(clients(hub).ann.list_models(author="ann"))) == count
    with LocalHub(tmp_path, USERS) as hub:  # after a restart the facts come from the database

        def never(*_: object, **__: object) -> None:
            raise AssertionError("a listing ran git")

        monkeypatch.setattr(GitRepo, "run", never)
        start = time.perf_counter()
        assert len(list(clients(hub).ann.list_models(author="ann", full=True))) == count
        assert time.perf_counter() - start < 3.0


def test_strangers_do_not_see_private_repositories_in_any_listing(world: World) -> None:
    world.ann.create_repo("ann/closed", private=True)
    world.ann.upload_file(path_or_fileobj=card("tags: [closed-tag]"), path_in_repo="README.md", repo_id="ann/closed")
    assert ids(world, filter="closed-tag") == set()
    assert {model.id for model in world.ann.list_models(filter="closed-tag")} == {"ann/closed"}
    assert "closed-tag" not in str(world.anon.get_model_tags())
    with pytest.raises(HfHubHTTPError):
        world.bob.model_info("ann/closed")
