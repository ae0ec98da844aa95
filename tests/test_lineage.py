from __future__ import annotations

import json

import pytest

from hubfusion.errors import FusionError
from hubfusion.lineage import (
    Contribution,
    Input,
    Reason,
    Recipe,
    Rejected,
    RemoteFile,
    Revision,
    dumps,
    from_json,
    loads,
)

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
INPUT = Input(CONTRIBUTION.revision.pinned)
RECIPE = Recipe(BASE.pinned, (INPUT,), "ties", (("density", 0.2), ("normalise", True)), 0.5)


@pytest.mark.parametrize("value", [CONTRIBUTION, RECIPE, Rejected(BASE, "ibm", Reason.NOT_FINITE, "w[3] is NaN")])
def test_a_value_survives_the_way_to_json_and_back(value: object) -> None:
    text = dumps(value)
    assert loads(type(value), text, "x.json") == value
    assert dumps(loads(type(value), text, "x.json")) == text
    assert text.endswith("}\n")


def test_whole_numbers_are_read_as_the_floats_that_they_stand_for() -> None:
    data = json.loads(dumps(RECIPE)) | {"scale": 1, "inputs": [{"model": "alice/model", "coefficient": 2}]}
    recipe = from_json(Recipe, data)
    assert (recipe.scale, recipe.coefficients) == (1.0, (2.0,))
    assert isinstance(recipe.scale, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scala": 1}, r"^\$: unknown key 'scala', allowed are base, inputs"),
        ({"scale": "one"}, r"^\$\.scale: a number is needed, got 'one'$"),
        ({"scale": True}, r"^\$\.scale: a number is needed, got True$"),
        ({"inputs": "alice/model"}, r"^\$\.inputs: a list is needed"),
        ({"inputs": [{"coefficient": 2}]}, r"^\$\.inputs\[0\]: key 'model' is missing$"),
        ({"base": {"repo": "ibm/base"}}, r"^\$\.base: a text is needed"),
        ({"options": [["density"]]}, r"^\$\.options\[0\]: 2 entries are needed, got 1$"),
        ({"inputs": []}, r"at least one input is needed, got none"),
    ],
)
def test_json_that_does_not_fit_is_refused_with_its_path(change: dict[str, object], message: str) -> None:
    data = json.loads(dumps(RECIPE)) | change
    with pytest.raises(FusionError, match=message):
        from_json(Recipe, data)


def test_an_unknown_reason_is_refused_with_those_that_there_are() -> None:
    data = json.loads(dumps(Rejected(BASE, "ibm", Reason.GATED, "x"))) | {"reason": "ugly"}
    with pytest.raises(FusionError, match=r"\$\.reason: must be one of .*gated.*, got 'ugly'"):
        from_json(Rejected, data)


def test_nan_never_gets_into_json() -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        dumps(Recipe("base", (Input("one", float("nan")),)))


def test_text_that_is_no_json_names_its_file() -> None:
    with pytest.raises(FusionError, match=r"^ledger\.jsonl:3: not JSON: "):
        loads(Recipe, "{", "ledger.jsonl:3")


def test_a_recipe_without_inputs_is_refused() -> None:
    with pytest.raises(FusionError, match="at least one input is needed, got none"):
        Recipe("base", ())


def test_revisions_order_by_repository_then_commit_and_print_short() -> None:
    later = Revision("ibm/base", "f" * 40)
    assert sorted([later, CONTRIBUTION.revision, BASE]) == [CONTRIBUTION.revision, BASE, later]
    assert str(BASE) == "ibm/base@0123456789ab"


def test_a_pinned_name_is_read_back_and_nothing_else_is() -> None:
    assert BASE.pinned == f"ibm/base@{SHA}" and Revision.parse(BASE.pinned) == BASE == Input(BASE.pinned).revision
    for name in ("ibm/base", "ibm/base@main", f"/folder/ibm/base@{SHA}", f"../passwd@{SHA}", f"ibm/base@{SHA}0", SHA):
        with pytest.raises(FusionError, match="a model must be pinned as owner/name@<40 hexadecimal digits>, got "):
            assert Input(name).revision is None


def test_the_canonical_order_is_by_name_then_coefficient_whatever_the_order_given() -> None:
    recipe = Recipe("base", (Input("b", 2.0), Input("a", 3.0), Input("b", 1.0)))
    assert recipe.order == [1, 2, 0] and recipe.coefficients == (2.0, 3.0, 1.0)
