from __future__ import annotations

import pytest
import yaml
from jinja2 import UndefinedError

from hubfusion.lineage import Revision
from hubfusion.release.card import escape, merge_metadata, render

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![](http://tracker/x.png)",
    "http://tracker/x.png",
    "@everyone look",
    "a | b | c",
    "line\n\n# heading\n---\nlicense: mit\n---",
    "`code` *bold* _em_ ~~gone~~",
    "&lt;b&gt;",
    "\u202egnp.exe\u2066\u200b\x00\x1b[31m",
    "{{ 7 * 7 }} {% raw %}",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_strangers_text_becomes_inert_and_stays_on_one_line(text: str) -> None:
    shown = escape(text)
    assert "\n" not in shown
    assert "<" not in shown and ">" not in shown
    assert "://" not in shown
    assert not any(c in shown for c in "\u202e\u2066\x00\x1b")
    for special in "`*_[]()|!#":
        assert all(shown[i - 1] == "\\" for i, c in enumerate(shown) if c == special)


@pytest.mark.parametrize("detail", HOSTILE)
def test_a_template_escapes_what_it_inserts(detail: str) -> None:
    finetune = Revision("mallory/model", "a" * 40)
    page = render(
        "rejected.md.j2", finetune=finetune, base="ibm/b", endpoint="http://hub", reason="x", detail=detail, fix="y"
    )
    assert f"> {escape(detail)}\n" in page
    assert "<script" not in page and "<img" not in page
    assert "49" not in page


def test_a_missing_value_is_an_error_and_not_an_empty_place() -> None:
    with pytest.raises(UndefinedError):
        render("rejected.md.j2", base="ibm/b")


def test_metadata_is_yaml_whatever_it_holds() -> None:
    metadata = {"license": "mit", "tags": ["a: b", "- c", "'\"", "---", "ü"], "n": None}
    page = render("ledger.md.j2", metadata, base="ibm/b", endpoint="http://hub")
    assert yaml.safe_load(page.split("---\n")[1]) == metadata


def test_lists_of_metadata_are_joined_and_other_values_replaced() -> None:
    assert merge_metadata({"tags": ["a", "b"], "license": "mit"}, {"tags": ["b", "c"], "license": "apache-2.0"}) == {
        "tags": ["a", "b", "c"],
        "license": "apache-2.0",
    }
