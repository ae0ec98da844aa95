from __future__ import annotations

import numpy as np
import pytest

from hubfusion.errors import RecipeError
from hubfusion.fuse import Plan
from hubfusion.soup import fuse_score, greedy_soup, leave_one_out
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
