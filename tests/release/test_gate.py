from __future__ import annotations

import pytest

from hubfusion.errors import EvaluationError, FusionError
from hubfusion.evaluate.scores import Provenance, Score, Scores
from hubfusion.release.gate import Margins, decide


def scores(model: str, **values: tuple[float, ...]) -> Scores:
    entries = tuple(Score(n, "finetune", "accuracy", tuple(range(len(v))), v, 100) for n, v in values.items())
    return Scores(model, entries, Provenance({"finetune": "p"}, {n: "d" for n in values}, {}, "cpu"))


BASE = scores("base", news=(70.0, 72.0), mail=(50.0, 50.0), talk=(60.0, 60.0))


def test_a_candidate_that_is_better_is_promoted() -> None:
    decision = decide(scores("new", news=(72.0, 74.0), mail=(51.0, 51.0), talk=(60.0, 60.0)), BASE, Margins())
    assert (decision.promote, decision.objections) == (True, ())
    assert decision.mean_gain == pytest.approx(1.0)
    assert "Mean gain +1.00 points" in decision.summary
    assert "2 better and 0 worse, worst talk by finetune +0.00." in decision.summary


def test_a_candidate_that_is_a_little_worse_is_not_inferior() -> None:
    candidate = scores("new", news=(69.0, 71.0), mail=(50.0, 50.0), talk=(60.0, 60.0))
    assert decide(candidate, BASE, Margins(mean=0.5, worst=3.0)).promote


def test_a_mean_loss_beyond_the_margin_is_named_with_its_size() -> None:
    candidate = scores("new", news=(69.0, 71.0), mail=(49.0, 49.0), talk=(59.0, 59.0))
    decision = decide(candidate, BASE, Margins(mean=0.5, worst=3.0))
    assert not decision.promote
    assert decision.objections == ("The mean gain of -1.00 points is below the margin of -0.50.",)


def test_one_dataset_that_breaks_down_is_named_even_if_the_mean_rises() -> None:
    candidate = scores("new", news=(90.0, 92.0), mail=(46.0, 46.0), talk=(60.0, 60.0))
    decision = decide(candidate, BASE, Margins(mean=0.5, worst=3.0))
    assert decision.objections == ("mail by finetune loses 4.00 points (50.00 to 46.00), more than 3.00.",)


def test_a_loss_within_twice_its_own_noise_is_no_objection() -> None:
    candidate = scores("new", news=(75.0, 77.0), mail=(40.0, 52.0), talk=(60.0, 60.0))
    assert decide(candidate, BASE, Margins(mean=5.0, worst=3.0)).promote  # -4 ± 6 over the two seeds


def test_single_seeds_are_judged_by_the_margin_alone() -> None:
    base, candidate = scores("base", news=(70.0,)), scores("new", news=(66.0,))
    assert len(decide(candidate, base, Margins(mean=5.0, worst=3.0)).objections) == 1


def test_scores_that_were_not_made_alike_are_not_compared() -> None:
    with pytest.raises(EvaluationError, match="only one of them has talk"):
        decide(scores("new", news=(70.0, 72.0), mail=(50.0, 50.0)), BASE, Margins())


@pytest.mark.parametrize("margins", [{"mean": -0.1}, {"worst": -1.0}, {"mean": float("nan")}])
def test_margins_that_demand_a_gain_are_refused(margins: dict[str, float]) -> None:
    with pytest.raises(FusionError, match=r"gate\.\w+ must be at least 0 points"):
        Margins(**margins)


def test_what_another_check_finds_is_an_objection_of_its_own() -> None:
    decision = decide(BASE, BASE, Margins(), ("Trigger scan on news: x.",))
    assert (decision.promote, decision.objections) == (False, ("Trigger scan on news: x.",))
