"""Choose which inputs to fuse by a score that the caller measures: greedy soup and leave-one-out.

Both work on positions of inputs, so the caller decides what a score is: fuse these, evaluate, return a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hubfusion.errors import RecipeError
from hubfusion.fuse.engine import Plan, fuse

Score = Callable[[tuple[int, ...]], float]


@dataclass(frozen=True, slots=True)
class Soup:
    """Inputs that a greedy soup took, in the order taken, and the score after each was tried: (input, score, taken)."""

    taken: tuple[int, ...]
    score: float
    trials: tuple[tuple[int, float, bool], ...]


def greedy_soup(inputs: int, score: Score) -> Soup:
    """Take inputs from the best alone downwards, each only if the fuse with it scores no worse.

    Order the inputs by score((i,)); S ← {best}; for each next i: S ← S ∪ {i} if score(S ∪ {i}) ≥ score(S)

    Paper: Model soups, arXiv 2203.05482 (≥, as in its algorithm; its published code has >). Departures: inputs of
    equal score are tried in the order given. Cost: at most 2 k − 1 scores of sets of positions, ascending; raises
    `RecipeError` for a score that is not a number. A score by accuracy can let a backdoor with good accuracy in.

    >>> worth = [3.0, 1.0, 2.0]
    >>> greedy_soup(3, lambda chosen: sum(worth[i] for i in chosen) / len(chosen)).taken
    (0,)
    """
    if inputs < 1:
        raise RecipeError(f"greedy_soup: at least one input is needed, got {inputs}")
    alone = [_checked(score, (i,)) for i in range(inputs)]
    order = sorted(range(inputs), key=lambda i: (-alone[i], i))
    taken, best = [order[0]], alone[order[0]]
    trials = [(order[0], best, True)]
    for candidate in order[1:]:
        value = _checked(score, tuple(sorted([*taken, candidate])))
        trials.append((candidate, value, value >= best))
        if value >= best:
            taken.append(candidate)
            best = value
    return Soup(tuple(taken), best, tuple(trials))


def leave_one_out(inputs: int, score: Score) -> tuple[float, ...]:
    """What each input adds: score of all inputs minus score of all but it, in the score's own unit.

    A clearly negative number names a contribution that harms the fuse. Needs k ≥ 2; k + 1 scores.

    >>> leave_one_out(3, lambda chosen: 10.0 * len(chosen) - 15.0 * (1 in chosen))
    (10.0, -5.0, 10.0)
    """
    if inputs < 2:
        raise RecipeError(f"leave_one_out: at least 2 inputs are needed, got {inputs}")
    everything = tuple(range(inputs))
    whole = _checked(score, everything)
    return tuple(whole - _checked(score, tuple(j for j in everything if j != i)) for i in everything)


def left_out(whole: Plan, rest: Plan, number: int) -> Plan | None:
    """How to get the fuse without input ``number`` from the whole one: a plan over (candidate, that input).

    Of a weighted average with coefficients α (sum A) and scale λ, whose rest has the scale λ′:
    δ′ = λ′ A / (λ (A − α_c)) δ − λ′ α_c / (A − α_c) τ_c; for equal ones (n · mean − θ_c) / (n − 1).
    So two models are read instead of n − 1. None when ``whole`` is no plain average: then fuse ``rest``.
    """
    is_plain = whole.method == "average" and dict(whole.options).get("norm", "keep") == "keep" and whole.scale != 0
    total, own = math.fsum(whole.coefficients), whole.coefficients[number]
    if not is_plain or whole.outer != "plain" or total - own <= 0:
        return None
    part = rest.scale / (total - own)
    return Plan(("candidate", "left out"), (part * total / whole.scale, -part * own), "task_arithmetic")


def _checked(score: Score, chosen: tuple[int, ...]) -> float:
    value = float(score(chosen))
    if math.isnan(value):
        raise RecipeError(f"the score of inputs {list(chosen)} is not a number")
    return value


def fuse_score(plan: Plan, base: Path, inputs: Sequence[Path], place: Path, evaluate: Callable[[Path], float]) -> Score:
    """Return a score that fuses the chosen inputs into ``place`` by ``plan`` and evaluates that folder."""

    def score(chosen: tuple[int, ...]) -> float:
        labels = tuple(plan.labels[i] for i in chosen)
        coefficients = tuple(plan.coefficients[i] for i in chosen)
        part = Plan(labels, coefficients, plan.method, plan.options, plan.scale)
        fuse(part, base, [inputs[i] for i in chosen], place)
        return evaluate(place)

    return score
