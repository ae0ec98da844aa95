from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import pytest

from hubfusion.codec import digest, dumps, from_json, loads, parse_toml, to_json
from hubfusion.data.suite import load_suite
from hubfusion.errors import FusionError
from hubfusion.evaluate.protocols import STANDARD
from hubfusion.lineage import Contribution, Input, Option, Reason, Recipe, Rejected, RemoteFile, Revision

SHA = "0123456789abcdef0123456789abcdef01234567"
BASE = Revision("ibm/base", SHA)
CONTRIBUTION = Contribution(
    revision=Revision("alice/model", "a" * 40),
    author="alice",
    base=BASE,
    license="mit",
    datasets=("texts/one", "texts/zwei-ü"),
    examples=None,
    files=(RemoteFile("model.safetensors", 12, "b" * 40, "c" * 64),),
)
RECIPE = Recipe(
    BASE.pinned, (Input(CONTRIBUTION.revision.pinned),), "ties", (("density", 0.2), ("normalise", True)), 0.5
)


@dataclass(frozen=True, slots=True)
class Nested:
    tables: Mapping[str, Mapping[str, float]]
    reasons: tuple[Reason, ...] = ()
    options: Mapping[str, Option] | None = None
    recipe: Recipe | None = None
    pair: tuple[int, Reason] = (0, Reason.CAP)
    by_name: Mapping[str, Revision] = field(default_factory=dict)


@pytest.mark.parametrize("value", [CONTRIBUTION, RECIPE, Rejected(BASE, "ibm", Reason.NOT_FINITE, "w[3] is NaN")])
def test_a_value_survives_the_way_to_json_and_back(value: object) -> None:
    text = dumps(value)
    assert loads(type(value), text, "x.json") == value
    assert dumps(loads(type(value), text, "x.json")) == text
    assert text.endswith("}\n")


def test_the_text_of_a_value_is_fixed() -> None:
    value = Nested(MappingProxyType({"b": {"y": 1e-05, "ü": 1e16}, "a": {}}), (Reason.CAP,), {"z": 1, "k": True}, None)
    assert dumps(value) == (
        '{\n  "by_name": {},\n  "options": {\n    "k": true,\n    "z": 1\n  },\n  "pair": [\n    0,\n    "cap"\n  ],\n'
        '  "reasons": [\n    "cap"\n  ],\n  "recipe": null,\n  "tables": {\n    "a": {},\n    "b": {\n'
        '      "y": 1e-05,\n      "ü": 1e+16\n    }\n  }\n}\n'
    )


def test_digests_that_stored_scores_are_found_by_stay_as_they_are() -> None:
    suite = load_suite("recycling36")
    assert [p.hash for p in STANDARD.values()] == HASHES
    assert digest([d.key("a" * 40) for d in suite.datasets]) == "f408b1f5e2fb324c"
    assert digest(to_json(RECIPE)) == "6e35e43455fb0a0c"


HASHES = ["feb145a95a70023b", "069145a4638d0156", "30371cf7c82b7967", "0435594ba153414e", "c6e17cf22b8649f4"]


def test_integers_are_read_as_floats_and_floats_are_not_read_as_integers() -> None:
    data = json.loads(dumps(RECIPE)) | {"scale": 1, "inputs": [{"model": "alice/model", "coefficient": 2}]}
    recipe = from_json(Recipe, data)
    assert (recipe.scale, recipe.coefficients) == (1.0, (2.0,))
    assert isinstance(recipe.scale, float)
    for size in (12.0, True, "12"):
        with pytest.raises(FusionError, match=r"^\$\.size: expected int, got "):
            from_json(RemoteFile, {"path": "x", "size": size, "blob": "b"})


def test_an_option_keeps_the_type_that_it_was_written_in() -> None:
    options = [["a", 1], ["b", 1.0], ["c", True], ["d", "1"]]
    read = from_json(Recipe, json.loads(dumps(RECIPE)) | {"options": options}).options
    assert [type(value) for _, value in read] == [int, float, bool, str]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scala": 1}, r"^\$: unknown key 'scala', allowed are base, inputs"),
        ({"scale": "one"}, r"^\$\.scale: expected float, got 'one'$"),
        ({"scale": True}, r"^\$\.scale: expected float, got True$"),
        ({"inputs": "alice/model"}, r"^\$\.inputs: expected array, got 'alice/model'$"),
        ({"inputs": [{"coefficient": 2}]}, r"^\$\.inputs\[0\]: object missing required field model$"),
        ({"inputs": [{"model": "a/b", "x": 1}]}, r"^\$\.inputs\[0\]: unknown key 'x', allowed are model"),
        ({"base": {"repo": "ibm/base"}}, r"^\$\.base: expected str, got "),
        ({"options": [["density"]]}, r"^\$\.options\[0\]: expected array of length 2, got 1$"),
        ({"options": [["density", None]]}, r"^\$\.options\[0\]\[1\]: expected bool \| int \| float \| str, got None$"),
        ({"inputs": []}, r"at least one input is needed, got none"),
    ],
)  # fmt: skip
def test_json_that_does_not_fit_is_refused_with_its_path(change: dict[str, object], message: str) -> None:
    data = json.loads(dumps(RECIPE)) | change
    with pytest.raises(FusionError, match=message):
        from_json(Recipe, data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tables": {"a": {"b": "x"}}}, r"^f\.tables\[\.\.\.\]\[\.\.\.\]: expected float, got str$"),
        ({"reasons": ["cap", "ugly"]}, r"^f\.reasons\[1\]: must be one of not-a-finetune, .*, got 'ugly'$"),
        ({"pair": [1, "ugly"]}, r"^f\.pair\[1\]: must be one of .*gated.*, got 'ugly'$"),
        ({"recipe": 3}, r"^f\.recipe: expected object \| null, got 3$"),
        ({"by_name": {"x": {"repo": "a/b", "sha": SHA, "y": 0}}}, r"^f\.by_name\.x: unknown key 'y'"),
        ({"by_name": {"x": {"repo": "a/b"}}}, r"^f\.by_name\[\.\.\.\]: object missing required field sha$"),
    ],
)
def test_the_path_leads_through_mappings_tuples_and_unions(change: dict[str, object], message: str) -> None:
    with pytest.raises(FusionError, match=message):
        from_json(Nested, {"tables": {}} | change, "f")


def test_nan_is_neither_written_nor_read() -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        dumps(Recipe("base", (Input("one", float("nan")),)))
    with pytest.raises(FusionError, match=r"^x\.json: not JSON: NaN is not a JSON number$"):
        loads(Recipe, '{"scale": NaN}', "x.json")


def test_what_has_no_json_form_is_refused() -> None:
    with pytest.raises(TypeError, match="set has no JSON form"):
        dumps({"a": {1}})


def test_text_that_is_no_json_or_toml_names_its_file() -> None:
    with pytest.raises(FusionError, match=r"^ledger\.jsonl:3: not JSON: "):
        loads(Recipe, "{", "ledger.jsonl:3")
    with pytest.raises(FusionError, match=r"^bot\.toml: not TOML: "):
        parse_toml("base = ", "bot.toml")


def test_writing_imports_no_library_beyond_the_standard_one() -> None:
    code = "import sys; from hubfusion.codec import dumps; dumps({'a': 1}); print('msgspec' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
