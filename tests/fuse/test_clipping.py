from __future__ import annotations

import numpy as np
import pytest

from hubfusion.errors import RecipeError
from hubfusion.fuse import METHODS, fuse
from hubfusion.fuse.clipping import can_clip, clip, clip_bound, clip_factor
from hubfusion.lineage import Input
from tests.random_checkpoints import load, recipe_of, save

NORMS = {"a": 1.0, "b": 2.0, "c": 8.0}


def test_a_bound_is_the_median_and_at_most_one_and_a_half_times_that_of_enough_known_norms():
    assert clip_bound([1.0, 2.0, 8.0]) == clip_bound([1.0, 2.0, 8.0], [0.1, 0.1]) == 2.0
    assert clip_bound([1.0, 2.0, 8.0], [0.1, 0.1, 9.0]) == pytest.approx(0.15)
    assert clip_bound([1.0, 2.0, 8.0], [9.0, 9.0, 9.0]) == 2.0
    assert clip_bound([]) == 0.0


def test_a_factor_never_lengthens():
    assert [clip_factor(norm, 2.0) for norm in (0.0, 1.0, 2.0, 8.0)] == [1.0, 1.0, 1.0, 0.25]


def test_a_clipped_average_divides_by_the_number_of_inputs_and_keeps_its_coefficients():
    clipped = clip(recipe_of("abc", scale=0.5), NORMS, 2.0)
    assert clipped.inputs == (Input("a", 1.0), Input("b", 1.0), Input("c", 0.25))
    assert clipped.scale == 0.5 * 2.25 / 3
    weighted = clip(recipe_of("abc", (1.0, 1.0, 2.0)), NORMS, 2.0)
    assert weighted.coefficients == (1.0, 1.0, 0.5) and weighted.scale == pytest.approx(2.5 / 4)


def test_a_clipped_average_is_the_mean_of_the_clipped_deltas(tmp_path):
    base = save(tmp_path / "base", {"w": np.zeros(1, np.float32)})
    folders = [save(tmp_path / name, {"w": np.array([norm], np.float32)}) for name, norm in NORMS.items()]
    fuse(clip(recipe_of("abc"), NORMS, 2.0), base, folders, tmp_path / "out")
    assert load(tmp_path / "out")["w"][0] == pytest.approx((1 + 2 + 2) / 3)


def test_a_clipped_sum_has_smaller_coefficients_and_its_own_scale():
    clipped = clip(recipe_of("abc", method="task_arithmetic", scale=0.3), NORMS, 2.0)
    assert (clipped.coefficients, clipped.scale) == ((1.0, 1.0, 0.25), 0.3)


def test_a_method_with_the_option_norm_clips_by_it_and_its_scale_makes_up_for_a_lower_bound():
    recipe = recipe_of("abc", method="trimmed_mean", options=(("trim", 0.1),))
    clipped = clip(recipe, NORMS, 0.5)
    assert clipped.options == (("norm", "clip"), ("trim", 0.1))
    assert (clipped.inputs, clipped.scale) == (recipe.inputs, 0.25)
    assert clip(recipe, NORMS, 3.0).scale == 1.0


def test_a_method_that_cannot_clip_says_which_can():
    assert can_clip("average") and can_clip("median") and not can_clip("ties")
    with pytest.raises(RecipeError, match="ties cannot clip, these can: average, .*task_arithmetic"):
        clip(recipe_of("abc", method="ties"), NORMS, 2.0)


def test_only_a_mean_divides_by_its_coefficients():
    assert METHODS["average"].divisor((1.0, 0.5)) == 0.75
    assert METHODS["task_arithmetic"].divisor((1.0, 0.5)) == METHODS["ties"].divisor((1.0, 0.5)) == 1.0
