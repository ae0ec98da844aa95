from __future__ import annotations

import pytest

from hubfusion.errors import FusionError
from hubfusion.lineage import Input, Recipe, Revision

SHA = "0123456789abcdef0123456789abcdef01234567"
BASE = Revision("ibm/base", SHA)


def test_a_recipe_without_inputs_is_refused() -> None:
    with pytest.raises(FusionError, match="at least one input is needed, got none"):
        Recipe("base", ())


def test_revisions_order_by_repository_then_commit_and_print_short() -> None:
    later, other = Revision("ibm/base", "f" * 40), Revision("alice/model", "a" * 40)
    assert sorted([later, other, BASE]) == [other, BASE, later]
    assert str(BASE) == "ibm/base@0123456789ab"


def test_a_pinned_name_is_read_back_and_nothing_else_is() -> None:
    assert BASE.pinned == f"ibm/base@{SHA}" and Revision.parse(BASE.pinned) == BASE == Input(BASE.pinned).revision
    for name in ("ibm/base", "ibm/base@main", f"/folder/ibm/base@{SHA}", f"../passwd@{SHA}", f"ibm/base@{SHA}0", SHA):
        with pytest.raises(FusionError, match="a model must be pinned as owner/name@<40 hexadecimal digits>, got "):
            assert Input(name).revision is None


def test_the_canonical_order_is_by_name_then_coefficient_whatever_the_order_given() -> None:
    recipe = Recipe("base", (Input("b", 2.0), Input("a", 3.0), Input("b", 1.0)))
    assert recipe.order == [1, 2, 0] and recipe.coefficients == (2.0, 3.0, 1.0)
