"""Scores are keyed by name, and only what was measured alike is compared."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest

from hubfusion.codec import dumps, from_json, loads, to_json
from hubfusion.errors import EvaluationError, FusionError
from hubfusion.evaluate.scores import Comparison, Gain, Provenance, Score, Scores, compare


def scores(model: str, **values: tuple[float, ...]) -> Scores:
    entries = tuple(Score(d, "finetune", "accuracy", tuple(range(len(v))), v, 100) for d, v in values.items())
    return Scores(
        model, entries, Provenance({"finetune": "ab"}, dict.fromkeys(values, "c0ffee"), {"torch": "2"}, "cpu")
    )


def test_mean_and_standard_error_are_those_of_the_textbook():
    score = Score("rte", "finetune", "accuracy", (0, 1, 2, 3), (70.0, 72.0, 74.0, 76.0), 277)
    assert score.mean == 73.0
    assert score.stderr == pytest.approx(math.sqrt(20 / 3) / 2)


def test_one_seed_has_no_standard_error():
    assert math.isnan(Score("rte", "finetune", "accuracy", (0,), (70.0,), 277).stderr)


@pytest.mark.parametrize(
    ("seeds", "values", "examples", "message"),
    [
        ((0, 0), (1.0, 2.0), 5, "each seed once"),
        ((0, 1), (1.0,), 5, "one value per seed"),
        ((), (), 5, "one value per seed"),
        ((0,), (100.5,), 5, "percentages"),
        ((0,), (math.nan,), 5, "percentages"),
        ((0,), (50.0,), 0, "at least 1 example"),
    ],
)
def test_what_cannot_be_a_score_is_refused(seeds, values, examples, message):
    with pytest.raises(EvaluationError, match=message):
        Score("rte", "finetune", "accuracy", seeds, values, examples)


def test_scores_survive_json_and_a_stranger_key_does_not():
    value = scores("m@1", rte=(70.0, 71.5), cb=(80.0, 82.0))
    assert loads(Scores, dumps(value), "scores.json") == value
    with pytest.raises(FusionError, match=r"unknown key 'rank'"):
        from_json(Scores, to_json(value) | {"rank": 1})


def test_a_dataset_that_comes_twice_is_refused():
    one = scores("m@1", rte=(70.0,))
    with pytest.raises(EvaluationError, match="rte .finetune. comes twice"):
        replace(one, entries=one.entries * 2)


def test_a_dataset_without_provenance_is_refused():
    one = scores("m@1", rte=(70.0,))
    with pytest.raises(EvaluationError, match="no provenance for rte"):
        replace(one, provenance=replace(one.provenance, datasets={}))


def test_an_unknown_dataset_is_an_error_that_names_the_known_ones():
    with pytest.raises(EvaluationError, match="no anli .finetune., there is rte"):
        scores("m@1", rte=(70.0,)).get("anli", "finetune")


def test_gains_are_paired_by_name_and_seed_never_by_position():
    base = scores("base", rte=(70.0, 72.0), cb=(80.0, 84.0), qqp=(90.0, 90.0))
    candidate = scores("new", qqp=(91.0, 92.0), cb=(79.0, 81.0), rte=(75.0, 76.0))
    result = compare(candidate, base)
    assert {g.dataset: g.differences for g in result.gains} == {
        "qqp": (1.0, 2.0),
        "cb": (-1.0, -3.0),
        "rte": (5.0, 4.0),
    }
    assert result.mean == pytest.approx((1.5 - 2.0 + 4.5) / 3)
    assert result.median == 1.5
    assert (result.wins, result.losses) == (2, 1)
    assert result.worst.dataset == "cb"
    assert result.without({"cb"}).mean == pytest.approx(3.0)
    assert result.only(["cb"]).mean == -2.0


def test_seeds_in_another_order_are_still_the_same_pairs():
    base = scores("base", rte=(70.0, 72.0))
    turned = replace(base, model="new", entries=(replace(base.entries[0], seeds=(1, 0), values=(73.0, 70.0)),))
    assert compare(turned, base).gains[0].differences == (1.0, 0.0)


@pytest.mark.parametrize("field", ["protocols", "datasets"])
def test_other_protocols_or_other_data_are_not_compared(field):
    base = scores("base", rte=(70.0,))
    key = "finetune" if field == "protocols" else "rte"
    other = replace(base, provenance=replace(base.provenance, **{field: {key: "other"}}))
    with pytest.raises(EvaluationError, match="is not the same, other against"):
        compare(other, base)


def test_other_seeds_datasets_or_test_sets_are_not_compared():
    base = scores("base", rte=(70.0,))
    entry = base.entries[0]
    with pytest.raises(EvaluationError, match="equal seeds"):
        compare(replace(base, entries=(replace(entry, seeds=(1,)),)), base)
    with pytest.raises(EvaluationError, match="one metric and test set"):
        compare(replace(base, entries=(replace(entry, examples=99),)), base)
    with pytest.raises(EvaluationError, match="only one of them has cb"):
        compare(scores("new", rte=(70.0,), cb=(1.0,)), base)


def test_the_interval_of_equal_gains_is_that_gain():
    gains = tuple(Gain(d, "finetune", "accuracy", 50.0, 51.0, (1.0, 1.0)) for d in "abc")
    assert Comparison("c", "b", gains).interval() == (1.0, 1.0)


def test_the_interval_covers_the_mean_and_is_as_wide_as_the_normal_one():
    values = [-2.0, -1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0]
    gains = tuple(Gain(f"d{i}", "finetune", "accuracy", 50.0, 50.0 + v, (v,)) for i, v in enumerate(values))
    low, high = Comparison("c", "b", gains).interval()
    # Population sd of the ten values over sqrt(10), times 1.96, on both sides of the mean 1.4.
    half = 1.96 * math.sqrt(sum((v - 1.4) ** 2 for v in values) / 10) / math.sqrt(10)
    assert low == pytest.approx(1.4 - half, abs=0.15)
    assert high == pytest.approx(1.4 + half, abs=0.15)


def test_protocols_of_one_dataset_are_drawn_together():
    """Ten protocols on one dataset are no ten datasets: the interval must not shrink."""
    two = tuple(Gain(d, "p0", "accuracy", 50.0, 50.0 + v, (v,)) for d, v in (("a", -1.0), ("b", 1.0)))
    twenty = tuple(replace(g, protocol=f"p{i}") for g in two for i in range(10))
    assert Comparison("c", "b", twenty).interval() == Comparison("c", "b", two).interval() == (-1.0, 1.0)


def test_an_empty_comparison_is_refused():
    with pytest.raises(EvaluationError, match="no dataset is left"):
        Comparison("c", "b", ())


def test_scores_need_no_torch():
    code = "import hubfusion.evaluate, hubfusion.data, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
