from __future__ import annotations

import numpy as np
import pytest

from hubfusion.errors import RecipeError
from hubfusion.fuse import fuse
from hubfusion.fuse.greedy_soup import fuse_score, greedy_soup, leave_one_out_gains, left_out
from hubfusion.lineage import Input
from tests.random_checkpoints import load, recipe_of, save


def test_a_greedy_soup_takes_what_does_not_lower_the_score():
    scores = {(0,): 70.0, (1,): 80.0, (2,): 75.0, (1, 2): 82.0, (0, 1, 2): 82.0}
    soup = greedy_soup(range(3), scores.__getitem__)
    assert soup.taken == (1, 2, 0) and soup.score == 82.0
    assert soup.trials == ((1, 80.0, True), (2, 82.0, True), (0, 82.0, True))


def test_a_greedy_soup_leaves_out_what_harms_and_goes_on():
    scores = {(0,): 70.0, (1,): 80.0, (2,): 75.0, (1, 2): 79.9, (0, 1): 81.0}
    soup = greedy_soup(range(3), scores.__getitem__)
    assert soup.taken == (1, 0) and soup.trials[1] == (2, 79.9, False)


def test_a_leave_one_out_gain_names_the_input_that_harms():
    scores = {"a": 1.0, "b": -5.0, "c": 2.0}
    assert leave_one_out_gains("abc", lambda chosen: sum(scores[i] for i in chosen)) == scores


def test_scores_of_real_fuses_keep_each_inputs_coefficient(tmp_path):
    base = save(tmp_path / "base", {"w": np.zeros(1, np.float32)})
    values = {"a": 1.0, "b": 4.0, "c": -8.0}
    folders = {name: save(tmp_path / name, {"w": np.array([v], np.float32)}) for name, v in values.items()}
    recipe = recipe_of("abc", (3.0, 1.0, 1.0))
    one, two, three = recipe.inputs
    score = fuse_score(recipe, base, folders, tmp_path / "out", lambda p: -abs(float(load(p)["w"][0]) - 2))
    assert score((one, two)) == pytest.approx(-0.25)
    assert greedy_soup(recipe.inputs, score).taken == (one, two)
    # all: -0.2, without a: -2, without b: -1.25, without c: 1.75; the score is minus the distance to 2
    assert leave_one_out_gains(recipe.inputs, score) == pytest.approx({one: 1.8, two: 1.05, three: -1.95})


def test_a_score_that_is_not_a_number_is_refused():
    with pytest.raises(RecipeError, match=r"the score of inputs \['a'\] is not a number"):
        greedy_soup("ab", lambda chosen: float("nan"))
    with pytest.raises(RecipeError, match="at least 2 inputs are needed, got 1"):
        leave_one_out_gains("a", len)
    with pytest.raises(RecipeError, match="at least one input is needed, got 0"):
        greedy_soup("", len)


@pytest.mark.parametrize("coefficients", [(1.0, 1.0, 1.0), (3.0, 1.0, 0.5), (1.0, 0.25, 0.0)])
def test_leaving_one_out_of_the_fused_mean_is_the_fuse_of_the_others(tmp_path, coefficients):
    rng = np.random.default_rng(0)
    base = save(tmp_path / "base", {"w": rng.normal(size=(4, 50)).astype(np.float32)})
    inputs = [save(tmp_path / str(i), {"w": rng.normal(size=(4, 50)).astype(np.float32)}) for i in range(3)]
    whole = recipe_of("abc", coefficients, scale=0.75)
    fuse(whole, base, inputs, tmp_path / "whole")
    for out, model in enumerate("abc"):
        kept = [i for i in range(3) if i != out]
        rest = recipe_of(["abc"[i] for i in kept], [coefficients[i] for i in kept], scale=0.5)
        fuse(rest, base, [inputs[i] for i in kept], tmp_path / "rest")
        short = left_out(whole, rest, model)
        assert [each.model for each in short.inputs] == ["candidate", model]
        fuse(short, base, [tmp_path / "whole", inputs[out]], tmp_path / "short")
        np.testing.assert_allclose(load(tmp_path / "short")["w"], load(tmp_path / "rest")["w"], rtol=0, atol=3e-6)


def test_the_hand_computed_mean_of_the_others_and_no_short_way_where_there_is_none():
    # n = 4, uniform: (4 δ - τ) / 3
    whole, rest = recipe_of("abcd"), recipe_of("abc")
    assert left_out(whole, rest, "d").inputs == (Input("candidate", 4 / 3), Input("d", pytest.approx(-1 / 3)))
    added, ties = recipe_of("abcd", method="task_arithmetic"), recipe_of("abcd", method="ties")
    clipped = recipe_of("abcd", options=(("norm", "clip"),))
    alone, momentum = recipe_of("ab", (1.0, 0.0)), recipe_of("abcd", outer="momentum")
    assert [left_out(each, rest, "d") for each in (added, ties, clipped, momentum)] == [None] * 4
    assert left_out(alone, rest, "a") is None
