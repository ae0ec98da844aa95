from __future__ import annotations

import pytest

from hubfusion.errors import NotFound
from hubfusion.hub import Listing
from hubfusion.hub.cards import front_matter
from hubfusion.lineage import RemoteFile, Revision
from hubfusion.screen.crawl import crawl

BASE = "ibm/base"


def listing(repo: str, day: int, sha: str = "a", tags: tuple[str, ...] = ()) -> Listing:
    return Listing(Revision(repo, sha * 40), f"2026-11-{day:02d}T00:00:00+00:00", tags, gated=False)


class Listed:
    """A Hub that lists what it is given per filter, and forgets the repositories in ``gone``."""

    endpoint = "http://127.0.0.1"

    def __init__(self, by_filter: dict[tuple[str, ...], list[Listing]], gone: tuple[str, ...] = ()) -> None:
        self.by_filter, self.gone = by_filter, gone

    def models(self, *filters: str) -> list[Listing]:
        return self.by_filter.get(filters, [])

    def files(self, revision: Revision) -> tuple[RemoteFile, ...]:
        if revision.repo in self.gone:
            raise NotFound(f"{revision}: gone")
        return (RemoteFile("README.md", 10, "b" * 40),)

    def read(self, revision: Revision, path: str, *, stop: int) -> bytes:
        return f"---\nlicense: mit\nname: {revision.repo}\n---\n".encode()


TAGGED, RELATED = ("cold-fusion", "base_model:ibm/base"), ("base_model:finetune:ibm/base",)


def test_offered_finetunes_come_oldest_first() -> None:
    hub = Listed({TAGGED: [listing("z/new", 3), listing("a/old", 1), listing("m/mid", 2)]})
    found = crawl(hub, BASE)  # type: ignore[arg-type]
    assert [f.revision.repo for f in found] == ["a/old", "m/mid", "z/new"]
    assert found[0].card == {"license": "mit", "name": "a/old"}
    assert found[0].author == "a"


def test_a_finetune_whose_owner_did_not_tag_it_is_counted_and_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    hub = Listed({TAGGED: [listing("a/one", 1)], RELATED: [listing("a/one", 1), listing("b/shy", 2), listing(BASE, 3)]})
    assert [f.revision.repo for f in crawl(hub, BASE)] == ["a/one"]  # type: ignore[arg-type]
    assert "1 finetunes offered to ibm/base, 1 of them new; 1 more are not tagged" in caplog.text


def test_a_judged_commit_is_skipped_and_a_new_commit_of_it_is_not() -> None:
    hub = Listed({TAGGED: [listing("a/one", 1, "a"), listing("b/two", 2, "b")]})
    judged = {Revision("a/one", "a" * 40), Revision("b/two", "c" * 40)}
    assert [f.revision.repo for f in crawl(hub, BASE, judged)] == ["b/two"]  # type: ignore[arg-type]


def test_the_base_itself_is_no_finetune_and_a_vanished_repository_is_left_out() -> None:
    hub = Listed({TAGGED: [listing(BASE, 1), listing("a/gone", 2), listing("b/here", 3)]}, gone=("a/gone",))
    assert [f.revision.repo for f in crawl(hub, BASE)] == ["b/here"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# no front matter",
        "---\nlicense: mit\n",  # never closed
        "---\n- a\n- list\n---\n",
        "---\na: &x [1]\nb: *x\n---\n",  # aliases, the seed of a billion laughs
        "---\na: !!python/object/apply:os.system ['true']\n---\n",
        "---\n: : :\n---\n",
        "---\na: " + "[" * 3000 + "]" * 3000 + "\n---\n",
        "---\n" + "\n".join("  " * i + f"k{i}:" for i in range(12)) + " 1\n---\n",
    ],
)
def test_a_card_that_is_no_plain_mapping_is_empty(text: str) -> None:
    assert front_matter(text) == {}


def test_card_values_are_plain_json_types() -> None:
    text = "---\r\ndate: 2026-11-01\r\nnumbers:\r\n- 1\r\n- 2.5\r\n1: one\r\nnothing:\r\n---\r\n# Title\r\n---\r\n"
    assert front_matter(text) == {"date": "2026-11-01", "numbers": [1, 2.5], "1": "one", "nothing": None}
