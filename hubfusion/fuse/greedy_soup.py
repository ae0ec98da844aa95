"""Select inputs by a score that the caller measures: greedy soup and leave-one-out gains.

The caller supplies the score: a function that fuses the given inputs, evaluates the result and returns a number. Inputs
may be any hashable values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from hubfusion.errors import RecipeError
from hubfusion.fuse.engine import fuse
from hubfusion.fuse.methods import METHODS
from hubfusion.lineage import Input, Recipe

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True, slots=True)
class GreedySoup(Generic[T]):
    """Inputs that a greedy soup took, in the order taken, and the score after each was tried: (input, score, taken)."""

    taken: tuple[T, ...]
    score: float
    trials: tuple[tuple[T, float, bool], ...]


def greedy_soup(inputs: Sequence[T], score: Callable[[tuple[T, ...]], float]) -> GreedySoup[T]:
    """Take inputs from the best alone downwards, each only if the fuse with it scores no worse.

    Order the inputs by score((i,)); S ← {best}; for each next i: S ← S ∪ {i} if score(S ∪ {i}) ≥ score(S)

    Paper: Model soups, arXiv 2203.05482 (≥, as in its algorithm; its published code has >). Departures: inputs of
    equal score are tried in the order given. Cost: at most 2 k − 1 scores of sets, in the order given; raises
    `RecipeError` for a score that is not a number. A score by accuracy can let a backdoor with good accuracy in.

    >>> accuracy = {"a": 3.0, "b": 1.0, "c": 2.0}
    >>> greedy_soup("abc", lambda chosen: sum(accuracy[i] for i in chosen) / len(chosen)).taken
    ('a',)
    """
    if not inputs:
        raise RecipeError("greedy_soup: at least one input is needed, got 0")
    alone = {each: _checked(score, (each,)) for each in inputs}
    best, *others = sorted(inputs, key=lambda each: -alone[each])
    taken, highest = [best], alone[best]
    trials = [(best, highest, True)]
    for candidate in others:
        value = _checked(score, tuple(each for each in inputs if each in (*taken, candidate)))
        trials.append((candidate, value, value >= highest))
        if value >= highest:
            taken.append(candidate)
            highest = value
    return GreedySoup(tuple(taken), highest, tuple(trials))


def leave_one_out_gains(inputs: Sequence[T], score: Callable[[tuple[T, ...]], float]) -> dict[T, float]:
    """The leave-one-out gain of each input: score of all minus score of all but it, in the score's own unit.

    A clearly negative number names a contribution that harms the fuse. Needs k ≥ 2; k + 1 scores.

    >>> leave_one_out_gains("abc", lambda chosen: 10.0 * len(chosen) - 15.0 * ("b" in chosen))
    {'a': 10.0, 'b': -5.0, 'c': 10.0}
    """
    if len(inputs) < 2:
        raise RecipeError(f"leave_one_out_gains: at least 2 inputs are needed, got {len(inputs)}")
    whole = _checked(score, tuple(inputs))
    return {each: whole - _checked(score, tuple(other for other in inputs if other != each)) for each in inputs}


def left_out(whole: Recipe, rest: Recipe, model: str) -> Recipe | None:
    """How to get the fuse ``rest``, without the input ``model``, from the whole one: a recipe over (candidate, model).

    Of a weighted average with coefficients α (sum A) and scale λ, whose rest has the scale λ′:
    δ′ = λ′ A / (λ (A − α_c)) δ − λ′ α_c / (A − α_c) τ_c; for equal ones (n · mean − θ_c) / (n − 1).
    So two models are read instead of n − 1. None when ``whole`` is no plain average: then fuse ``rest``.
    """
    method = METHODS[whole.method]
    adds_up = method.is_mean and method.as_sum and method.as_sum(whole.coefficients, **dict(whole.options)) is not None
    total = math.fsum(whole.coefficients)
    own = math.fsum(each.coefficient for each in whole.inputs if each.model == model)
    if not adds_up or whole.scale == 0 or whole.outer != "plain" or total - own <= 0:
        return None
    part = rest.scale / (total - own)
    inputs = (Input("candidate", part * total / whole.scale), Input(model, -part * own))
    return Recipe(whole.base, inputs, "task_arithmetic")


def fuse_score(
    recipe: Recipe, base: Path, folders: Mapping[str, Path], place: Path, evaluate: Callable[[Path], float]
) -> Callable[[tuple[Input, ...]], float]:
    """Return a score that fuses the chosen inputs of ``recipe`` into ``place`` and evaluates that folder.

    ``folders`` are by the inputs' models.
    """

    def score(chosen: tuple[Input, ...]) -> float:
        fuse(replace(recipe, inputs=chosen), base, [folders[each.model] for each in chosen], place)
        return evaluate(place)

    return score


def _checked(score: Callable[[tuple[T, ...]], float], chosen: tuple[T, ...]) -> float:
    value = float(score(chosen))
    if math.isnan(value):
        raise RecipeError(f"the score of inputs {list(chosen)} is not a number")
    return value
