"""Clip task vectors to a common norm by what a recipe says: coefficients, options and scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from hubfusion.errors import RecipeError
from hubfusion.fuse.methods import METHODS
from hubfusion.lineage import Input, Recipe

KNOWN_FACTOR = 1.5
ENOUGH_KNOWN = 3


def clip_bound(norms: Sequence[float], known_norms: Sequence[float] = ()) -> float:
    """The norm to clip to: the median of the batch, at most 1.5 times that of norms accepted before, if 3 are known.

    The second keeps whoever holds half of one batch from setting the bound alone. 0 for an empty batch.

    >>> clip_bound([1.0, 2.0, 9.0]), clip_bound([1.0, 9.0, 9.0], [1.0, 1.0, 2.0])
    (2.0, 1.5)
    """
    batch = median(norms) if norms else 0.0
    return min(batch, KNOWN_FACTOR * median(known_norms)) if len(known_norms) >= ENOUGH_KNOWN else batch


def clip_factor(norm: float, bound: float) -> float:
    """min(1, bound/‖τ‖), and 1 for a task vector of zero.

    >>> clip_factor(4.0, 1.0), clip_factor(0.5, 1.0)
    (0.25, 1.0)
    """
    return min(1.0, bound / norm) if norm > 0 else 1.0


def can_clip(method: str) -> bool:
    """Whether `clip` works with a method: its sum is known before the deltas, or it has the option ``norm``."""
    return METHODS[method].as_sum is not None or "norm" in METHODS[method].options


def clip(recipe: Recipe, norms: Mapping[str, float], bound: float) -> Recipe:
    """The recipe over task vectors that are clipped to ``bound``; ``norms`` are ‖τ‖ by the inputs' models.

    A sum of task vectors has each coefficient times `clip_factor`, and a scale that gives back what the method then
    divides away: clipped, `average` is base + λ (1/k) Σ f_i τ_i. A method with the option ``norm`` clips by it to the
    median of what it is given; where that is above the bound, the scale makes up for it, because these methods give c
    times the result for c times the updates. Raises `RecipeError` for a method that can do neither.
    """
    method = METHODS[recipe.method]
    if method.as_sum is not None:
        inputs = tuple(Input(i.model, i.coefficient * clip_factor(norms[i.model], bound)) for i in recipe.inputs)
        clipped = replace(recipe, inputs=inputs)
        times = method.divisor(clipped.coefficients) / method.divisor(recipe.coefficients)
        return replace(clipped, scale=recipe.scale * times)
    if "norm" not in method.options:
        raise RecipeError(f"{recipe.method} cannot clip, these can: {', '.join(sorted(filter(can_clip, METHODS)))}")
    options = tuple(sorted({**dict(recipe.options), "norm": "clip"}.items()))
    middle = median(norms[each.model] for each in recipe.inputs)
    return replace(recipe, options=options, scale=recipe.scale * clip_factor(middle, bound))
