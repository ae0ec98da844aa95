from __future__ import annotations

import numpy as np
import pytest

from hubfusion.errors import RecipeError
from hubfusion.fuse import Plan, fuse
from hubfusion.fuse.greedy_soup import fuse_score, greedy_soup, leave_one_out, left_out
from tests.checkpoints import load, save


def test_a_greedy_soup_takes_what_does_not_lower_the_score():
    scores = {(0,): 70.0, (1,): 80.0, (2,): 75.0, (1, 2): 82.0, (0, 1, 2): 82.0}
    soup = greedy_soup(3, scores.__getitem__)
    assert soup.taken == (1, 2, 0) and soup.score == 82.0
    assert soup.trials == ((1, 80.0, True), (2, 82.0, True), (0, 82.0, True))


def test_a_greedy_soup_leaves_out_what_harms_and_goes_on():
    scores = {(0,): 70.0, (1,): 80.0, (2,): 75.0, (1, 2): 79.9, (0, 1): 81.0}
    soup = greedy_soup(3, scores.__getitem__)
    assert soup.taken == (1, 0) and soup.trials[1] == (2, 79.9, False)


def test_leave_one_out_names_the_input_that_harms():
    worth = [1.0, -5.0, 2.0]
    assert leave_one_out(3, lambda chosen: sum(worth[i] for i in chosen)) == (1.0, -5.0, 2.0)


def test_scores_of_real_fuses_keep_each_inputs_coefficient(tmp_path):
    base = save(tmp_path / "base", {"w": np.zeros(1, np.float32)})
    inputs = [save(tmp_path / str(i), {"w": np.array([v], np.float32)}) for i, v in enumerate((1.0, 4.0, -8.0))]
    plan = Plan(("a", "b", "c"), (3.0, 1.0, 1.0))
    score = fuse_score(plan, base, inputs, tmp_path / "out", lambda p: -abs(float(load(p)["w"][0]) - 2))
    assert score((0, 1)) == pytest.approx(-0.25)
    assert greedy_soup(3, score).taken == (0, 1)
    # all: -0.2, without a: -2, without b: -1.25, without c: 1.75; the score is minus the distance to 2
    assert leave_one_out(3, score) == pytest.approx((1.8, 1.05, -1.95))


def test_a_score_that_is_not_a_number_is_refused():
    with pytest.raises(RecipeError, match=r"the score of inputs \[0\] is not a number"):
        greedy_soup(2, lambda chosen: float("nan"))
    with pytest.raises(RecipeError, match="at least 2 inputs are needed, got 1"):
        leave_one_out(1, len)
    with pytest.raises(RecipeError, match="at least one input is needed, got 0"):
        greedy_soup(0, len)


@pytest.mark.parametrize("coefficients", [(1.0, 1.0, 1.0), (3.0, 1.0, 0.5), (1.0, 0.25, 0.0)])
def test_leaving_one_out_of_the_fused_mean_is_the_fuse_of_the_others(tmp_path, coefficients):
    rng = np.random.default_rng(0)
    base = save(tmp_path / "base", {"w": rng.normal(size=(4, 50)).astype(np.float32)})
    inputs = [save(tmp_path / str(i), {"w": rng.normal(size=(4, 50)).astype(np.float32)}) for i in range(3)]
    whole = Plan(("a", "b", "c"), coefficients, scale=0.75)
    fuse(whole, base, inputs, tmp_path / "whole")
    for out in range(3):
        kept = [i for i in range(3) if i != out]
        rest = Plan(tuple("abc"[i] for i in kept), tuple(coefficients[i] for i in kept), scale=0.5)
        fuse(rest, base, [inputs[i] for i in kept], tmp_path / "rest")
        short = left_out(whole, rest, out)
        fuse(short, base, [tmp_path / "whole", inputs[out]], tmp_path / "short")
        np.testing.assert_allclose(load(tmp_path / "short")["w"], load(tmp_path / "rest")["w"], rtol=0, atol=3e-6)


def test_the_hand_computed_mean_of_the_others_and_no_short_way_where_there_is_none():
    # n = 4, uniform: (4 δ - τ) / 3
    whole, rest = Plan(tuple("abcd"), (1.0,) * 4), Plan(tuple("abc"), (1.0,) * 3)
    assert left_out(whole, rest, 3).coefficients == pytest.approx((4 / 3, -1 / 3))
    ties = Plan(tuple("abcd"), (1.0,) * 4, "ties")
    clipped = Plan(tuple("abcd"), (1.0,) * 4, "average", (("norm", "clip"),))
    alone = Plan(("a", "b"), (1.0, 0.0))
    assert left_out(ties, rest, 3) is left_out(clipped, rest, 3) is left_out(alone, rest, 0) is None
