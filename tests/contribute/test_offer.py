from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hubfusion.contribute import Offer, offer_metadata, tag, with_metadata
from hubfusion.errors import Conflict, FusionError
from hubfusion.hub import Change, Hub, connect
from hubfusion.hub.cards import front_matter
from hubfusion.lineage import Revision
from hubfusion.localhub import LocalHub
from hubfusion.screen.crawl import crawl

BASE = Revision("ibm/base", "b" * 40)
OFFER = Offer(BASE, "mit", ("texts/news",), 600, {"texts/news": "d" * 40})


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with LocalHub(tmp_path / "hub", {"ann": "hf_ann"}).start() as server:
        made = connect(server.endpoint, "hf_ann", tries=2)
        made.create("ann/model")
        yield made


def readme(hub: Hub) -> str:
    return hub.read(hub.resolve("ann/model"), "README.md", stop=1 << 20).decode()


def test_an_offer_carries_everything_that_screening_reads() -> None:
    assert offer_metadata(OFFER) == {
        "license": "mit",
        "base_model": "ibm/base",
        "base_model_relation": "finetune",
        "tags": ["cold-fusion"],
        "cold_fusion": {"base_revision": "b" * 40, "examples": 600, "dataset_revisions": {"texts/news": "d" * 40}},
        "datasets": ["texts/news"],
    }
    assert "datasets" not in offer_metadata(Offer(BASE, "mit"))


def test_tagging_adds_metadata_and_leaves_the_text_and_the_other_files_alone(hub: Hub) -> None:
    old = "---\nlanguage: en\ntags:\n- mine\n---\n# My model\n\n---\n\nIt has a line.\n"
    head = hub.resolve("ann/model").sha
    hub.commit("ann/model", Change("mine", head, "1", {"README.md": old.encode(), "config.json": b"{}"}))
    files = {f.path: f.blob for f in hub.files(hub.resolve("ann/model")) if f.path != "README.md"}
    tag(hub, "ann/model", OFFER, "2")
    new = readme(hub)
    assert front_matter(new)["tags"] == ["mine", "cold-fusion"]
    assert front_matter(new)["language"] == "en"
    assert new.endswith("---\n# My model\n\n---\n\nIt has a line.\n")
    assert {f.path: f.blob for f in hub.files(hub.resolve("ann/model")) if f.path != "README.md"} == files


def test_tagging_twice_makes_one_commit(hub: Hub) -> None:
    first = tag(hub, "ann/model", OFFER, "1")
    assert tag(hub, "ann/model", OFFER, "2") == first


def test_a_tagged_model_is_found_by_the_crawl_with_its_card(hub: Hub) -> None:
    sha = tag(hub, "ann/model", OFFER, "1")
    (found,) = crawl(connect(hub.endpoint), "ibm/base")
    assert found.revision == Revision("ann/model", sha)
    assert found.card["cold_fusion"]["base_revision"] == "b" * 40
    assert not list(crawl(connect(hub.endpoint), "ibm/other"))


def test_metadata_that_cannot_be_read_is_not_overwritten() -> None:
    with pytest.raises(FusionError, match=r"README\.md: the metadata between its '---' lines cannot be read"):
        with_metadata("---\n: : :\n---\n# x\n", offer_metadata(OFFER))


def test_a_card_that_changes_while_it_is_tagged_is_a_conflict(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    original = hub.commit

    def commit(repo: str, change: Change) -> str:
        monkeypatch.setattr(hub, "commit", original)
        original(repo, Change("theirs", hub.resolve(repo).sha, "x", {"README.md": b"# theirs\n"}))
        return original(repo, change)

    monkeypatch.setattr(hub, "commit", commit)
    with pytest.raises(Conflict):
        tag(hub, "ann/model", OFFER, "1")
    assert readme(hub) == "# theirs\n"
