"""The registry's record of a method, sums of deltas, and the array functions that all formulas share.

Formulas are written once over the array API standard (https://data-apis.org/array-api): numpy on the CPU, torch
elsewhere.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import array_api_compat
import numpy as np

from hubfusion.checkpoint.deltas import Granularity
from hubfusion.errors import RecipeError

Array = Any
NORMS = ("keep", "clip", "equal")


class Need(StrEnum):
    """What a first pass over all deltas must measure before a method sees a chunk."""

    NOTHING = "nothing"
    NORMS = "norms"
    GRAM = "gram"
    SPHERE = "sphere"
    DRAWS = "draws"
    THRESHOLDS = "thresholds"
    BANDS = "bands"
    SELECTION = "selection"
    FISHERS = "fishers"
    ACTIVATIONS = "activations"


@dataclass(frozen=True, slots=True)
class Sum:
    """(Σ f_i δ_i) · times / over: k ``factors`` that are known before the deltas are, so these may come one by one."""

    factors: tuple[float, ...]
    times: float = 1.0
    over: int = 1

    def __call__(self, deltas: Iterable[Array]) -> Array:
        """Add up k deltas, each taken once; those of a generator may be overwritten."""
        return self.finish(add_up(zip(deltas, self.factors, strict=True), owned=isinstance(deltas, Generator)))

    def finish(self, total: Array) -> Array:
        """Turn Σ f_i δ_i into the result, in place."""
        if self.times != 1.0:
            total *= self.times
        if self.over != 1:
            total /= self.over
        return total


def add_up(terms: Iterable[tuple[Array, float]], total: Array = None, *, owned: bool = False) -> Array:
    """Return Σ f_i δ_i of (δ_i, f_i), added in the order given: into ``total`` if there is one.

    With ``owned`` the deltas may be overwritten, and without a total the first becomes it.
    """
    for delta, factor in terms:
        if owned and factor != 1.0:
            delta *= factor
        elif factor != 1.0 or (total is None and not owned):
            delta = delta * factor  # an array of its own
        if total is None:
            total = delta
        else:
            total += delta
    return total


@dataclass(frozen=True, slots=True)
class Method:
    """A formula and how it may be streamed.

    ``needs`` names statistics that the function takes as keywords; without them it computes them from its deltas.
    With them, a function that is ``by_row`` goes through the deltas once, in their order, and may be given any
    iterable of which an array is valid until the next but one is taken: they need not be in memory together. One that
    ``is_sum`` only adds multiples of them, so what is not finite in a delta shows in the result. ``as_sum`` takes the
    coefficients and the options, and gives that sum when it is known before any delta is. One that ``is_mean`` gives
    Σ α_i τ_i / Σ α_i whenever it has such a sum.
    """

    function: Callable[..., Array]
    granularity: Granularity = Granularity.ENTRIES
    needs: Need = Need.NOTHING
    by_row: bool = False
    is_sum: bool = False
    as_sum: Callable[..., Sum | None] | None = None
    is_mean: bool = False

    def divisor(self, coefficients: Sequence[float]) -> float:
        """What the method divides Σ α_i τ_i by beyond the number of inputs: the mean α of a mean, else 1.

        A recipe whose coefficients change keeps the size of its step when its scale is multiplied by this.
        """
        return sum(coefficients) / len(coefficients) if self.is_mean else 1.0

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (self.function.__doc__ or "").strip().splitlines()[0]

    @property
    def options(self) -> Mapping[str, bool | int | float | str]:
        """Keywords that a recipe may set, with their defaults."""
        keywords = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in keywords if p.kind is p.KEYWORD_ONLY and p.default is not None}


def namespace(array: Array) -> Any:
    """Return the array API namespace of an array: numpy's or torch's."""
    return _numpy() if type(array) is np.ndarray else array_api_compat.array_namespace(array)


@functools.cache
def _numpy() -> Any:
    """What every array of numpy has; found once, but not when nobody asks: it imports for 11 MB."""
    return array_api_compat.array_namespace(np.empty(0))


def to_numpy(array: Array) -> Any:
    """Copy an array of any kind to numpy on the host (numpy arrays are returned as they are)."""
    return array if isinstance(array, np.ndarray | np.generic) else array.cpu().numpy()


def share(coefficients: Array, where: str) -> list[float]:
    """Coefficients divided by their sum, as Python floats; the sum must be finite and positive.

    >>> share([1, 3], "average")
    [0.25, 0.75]
    """
    values = [float(c) for c in coefficients]
    total = math.fsum(values)
    if not (math.isfinite(total) and total > 0):
        raise RecipeError(f"{where}: coefficients must have a positive sum, got {total:g} from {values}")
    return [v / total for v in values]


def in_range(
    where: str, name: str, value: float, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> None:
    """Refuse an option outside its range with the sentence ``ties: density must be in (0, 1], got 0``."""
    above = low < value if open_low else low <= value
    below = value < high if open_high or high == math.inf else value <= high
    if not (above and below) or isinstance(value, bool):
        left, right = "(" if open_low else "[", ")" if open_high or high == math.inf else "]"
        raise RecipeError(f"{where}: {name} must be in {left}{low:g}, {high:g}{right}, got {value:g}")


def one_of(where: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse an option that is not one of the allowed words."""
    if value not in allowed:
        raise RecipeError(f"{where}: {name} must be one of {', '.join(allowed)}, got {value!r}")


def norm_factors(norms: Sequence[float], treatment: str) -> list[float]:
    """Factor of each delta under a norm treatment; the median is over the deltas that are not zero.

    >>> norm_factors([1.0, 2.0, 8.0], "clip"), norm_factors([1.0, 2.0, 8.0], "equal")
    ([1.0, 1.0, 0.25], [2.0, 1.0, 0.25])
    """
    one_of("norm", "norm", treatment, NORMS)
    longer = [n for n in norms if n > 0]
    if treatment == "keep" or not longer:
        return [1.0] * len(norms)
    median = float(np.median(longer))
    scale = [median / n if n > 0 else 1.0 for n in norms]
    return [min(1.0, s) for s in scale] if treatment == "clip" else scale
