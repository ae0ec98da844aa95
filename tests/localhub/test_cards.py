"""Cards: metadata, tags and relations, from hand-made and from hostile files."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubfusion.localhub import cards
from hubfusion.localhub.store.repos import Kind


def parse(lines: str) -> dict:
    return cards.parse_card(f"---\n{lines}\n---\ntext\n---\nnot: this\n---\n")


def test_metadata_is_the_first_block_and_nothing_else() -> None:
    assert parse("license: mit\ntags: [a, b]") == {"license": "mit", "tags": ["a", "b"]}
    assert cards.parse_card("---\r\nlicense: mit\r\n---\r\n# x") == {"license": "mit"}
    assert cards.parse_card("# no metadata\n---\nlicense: mit\n---\n") == {}
    assert cards.parse_card("---\n---\n# empty") == {}


def test_values_become_json() -> None:
    data = parse("date: 2024-01-02\nnot_a_number: .nan\nnested: {1: [true, null, 1.5]}")
    assert data == {"date": "2024-01-02", "not_a_number": "nan", "nested": {"1": [True, None, 1.5]}}
    assert json.loads(json.dumps(data)) == data


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 10)}]" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    "lines",
    [
        "a: [",
        "- just\n- a list",
        BOMB,
        "a: !!python/object/apply:os.system [id]",
        "a: 0x" + "f" * 6000,
        "a: 99999999999999999999",
        "d: 2024-99-99",
        "? [a]\n: b",
        "[" * 3000,
        "x: " + "y" * (3 << 20),
    ],
)
def test_metadata_that_cannot_be_or_must_not_be_read_is_an_error_in_one_line(lines: str) -> None:
    with pytest.raises(cards.CardError) as error:
        cards.parse_metadata(lines)
    assert "\n" not in str(error.value)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.sampled_from("abc012 :-[]{}&*!|>'\"#\n\t,?.~\\ux\ud800é"), max_size=80))
def test_any_card_gives_tags_that_are_json_or_a_card_error(lines: str) -> None:
    try:
        card = cards.parse_card(f"---\n{lines}\n---\n")
    except cards.CardError:
        return
    tags = cards.model_tags(card, ["README.md"], {}) + cards.dataset_tags(card, []) + cards.space_tags(card)
    json.dumps([card, tags])
    assert all(isinstance(tag, str) for tag in tags)
    cards.check_metadata(Kind.MODEL, card)


@pytest.mark.parametrize(
    ("lines", "paths", "config", "relation"),
    [
        ("base_model: a/b", [], {}, "finetune"),
        ("base_model: [a/b, c/d]", [], {}, "merge"),
        ("base_model: [a/b, a/b]", [], {}, "finetune"),
        ("base_model: a/b", ["adapter_config.json"], {}, "adapter"),
        ("base_model: a/b", ["model.gguf"], {}, "quantized"),
        ("base_model: a/b", [], {"quantization_config": {}}, "quantized"),
        ("base_model: [a/b, c/d]\nbase_model_relation: finetune", [], {}, "finetune"),
        ("base_model: a/b\nbase_model_relation: nonsense", [], {}, "finetune"),
    ],
)
def test_a_relation_is_said_or_follows_from_the_files(
    lines: str, paths: list[str], config: dict, relation: str
) -> None:
    assert cards.relation_of(parse(lines), paths, config) == relation
    assert f"base_model:{relation}:a/b" in cards.model_tags(parse(lines), paths, config)


def test_the_tags_of_a_model() -> None:
    card = parse("license: mit\nlanguage: en\ntags: [cold-fusion]\ndatasets: [u/d]\nbase_model: u/b")
    config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
    assert cards.model_tags(card, ["config.json", "model.safetensors"], config) == [
        "transformers", "safetensors", "bert", "text-classification", "cold-fusion", "en", "dataset:u/d",
        "license:mit", "region:us", "base_model:u/b", "base_model:finetune:u/b",
    ]  # fmt: skip


def test_errors_and_warnings_read_as_the_hubs() -> None:
    errors, warnings = cards.check_metadata(
        Kind.MODEL, {"license": "nope", "base_model": "no such id", "tags": {"a": 1}}
    )
    assert [error.split(" ")[0] for error in errors] == ['"license"', '"tags"', '"base_model"']
    assert warnings == []
    assert cards.check_metadata(Kind.MODEL, {})[1] == ["empty or missing yaml metadata in repo card"]
