from __future__ import annotations

import itertools
import math

import pytest

from hubfusion.release.isolation import Culprit, isolate


class Gate:
    """Refuses every set that holds one of ``bad``, and counts how often it is asked."""

    def __init__(self, *bad: int) -> None:
        self.bad, self.asked = set(bad), list[tuple[int, ...]]()

    def __call__(self, chosen: tuple[int, ...]) -> bool:
        assert list(chosen) == sorted(set(chosen)) and chosen not in self.asked, "each set is asked for once"
        self.asked.append(chosen)
        return not self.bad & set(chosen)


@pytest.mark.parametrize("inputs", [2, 3, 5, 8, 13, 64])
def test_one_culprit_is_found_wherever_it_is_with_about_log_n_answers(inputs: int) -> None:
    for bad in range(inputs):
        gate = Gate(bad)
        (culprit,) = isolate(inputs, gate, 100)
        assert culprit.number == bad and bad not in culprit.company and culprit.company
        assert len(gate.asked) <= 2 + math.ceil(math.log2(inputs))


def test_the_steps_for_the_sixth_of_eight_are_these() -> None:
    gate = Gate(5)
    assert isolate(8, gate, 8) == (Culprit(5, (0, 1, 2, 3, 4)),)
    assert gate.asked == [(0, 1, 2, 3), (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4), (0, 1, 2, 3, 4, 6, 7)]


@pytest.mark.parametrize("bad", itertools.combinations(range(8), 2))
def test_two_culprits_of_eight_are_both_found_when_there_are_answers_enough(bad: tuple[int, int]) -> None:
    gate = Gate(*bad)
    assert sorted(c.number for c in isolate(8, gate, 12)) == list(bad)


@pytest.mark.parametrize("most", range(12))
def test_no_more_answers_are_asked_for_than_allowed_and_an_unfinished_search_names_nobody(most: int) -> None:
    gate = Gate(1, 6)
    found = isolate(8, gate, most)
    assert len(gate.asked) <= most
    assert sorted(c.number for c in found) in ([], [1, 6])


def test_a_good_guess_costs_one_answer_and_a_wrong_one_costs_one_more() -> None:
    gate = Gate(2)
    assert isolate(8, gate, 8, suspicion=[0, 0, 9, 0, 0, 0, 0, 0]) == (Culprit(2, (0, 1, 3, 4, 5, 6, 7)),)
    assert len(gate.asked) == 1
    wrong = Gate(2)
    assert [c.number for c in isolate(8, wrong, 8, suspicion=[0, 0, 0, 0, 0, 0, 0, 9])] == [2]
    assert len(wrong.asked) <= 1 + 5


def test_nobody_is_named_when_every_part_is_refused() -> None:
    assert isolate(4, lambda chosen: False, 100) == ()
    assert isolate(1, lambda chosen: False, 100) == ()


def test_what_is_refused_together_alone_is_laid_to_one_that_makes_the_difference() -> None:
    """0 and 7 are harmless apart: whoever is named, the rest passes and the company is refused with it."""
    together = {0, 7}
    (culprit,) = isolate(8, lambda chosen: not together <= set(chosen), 8)
    assert culprit.number in together and together <= set(culprit.together)


def test_a_rest_below_the_least_is_not_asked_for() -> None:
    gate = Gate(1)
    assert isolate(2, gate, 8, at_least=2) == (Culprit(1, (0,)),)
    assert gate.asked == [(0,)]


def test_a_judge_that_gives_up_ends_the_search() -> None:
    assert isolate(8, lambda chosen: None, 8) == ()
