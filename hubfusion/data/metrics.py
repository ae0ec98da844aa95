"""The metrics of the suites as `evaluate.Metric`s: shipped and offline, no code is downloaded to score a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import f1_score, matthews_corrcoef

from hubfusion.data.suite import Metric
from hubfusion.errors import EvaluationError


def accuracy(predictions: Any, references: Any) -> float:
    """Share of examples whose predicted class is the reference class."""
    return float(np.mean(np.asarray(predictions) == np.asarray(references)))


def macro_f1(predictions: Any, references: Any) -> float:
    """Mean over classes of F1 (harmonic mean of precision and recall); a class never predicted counts 0."""
    return float(f1_score(references, predictions, average="macro", zero_division=0))


def matthews(predictions: Any, references: Any) -> float:
    """Matthews correlation of predicted and reference classes, in [-1, 1]."""
    return float(matthews_corrcoef(references, predictions))


def spearman(predictions: Any, references: Any) -> float:
    """Spearman's rank correlation in [-1, 1]; ties get their mean rank; nan when one side is constant."""
    x, y = (rankdata(side) - (len(side) + 1) / 2 for side in (predictions, references))
    scale = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / scale) if scale else math.nan


FUNCTIONS: Mapping[Metric, Callable[[Any, Any], float]] = {
    Metric.ACCURACY: accuracy,
    Metric.MACRO_F1: macro_f1,
    Metric.MATTHEWS: matthews,
    Metric.SPEARMAN: spearman,
}


class SuiteMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """One of `FUNCTIONS` as an `evaluate.Metric`; ``config_name`` is the metric's name."""

    def _info(self) -> Any:
        kind = "float64" if self.config_name == Metric.SPEARMAN else "int64"
        features = {"predictions": datasets.Value(kind), "references": datasets.Value(kind)}
        return evaluate.MetricInfo(
            description=FUNCTIONS[Metric(self.config_name)].__doc__ or "",
            citation="",
            inputs_description="predictions and references, one class id (Spearman: one number) each",
            features=datasets.Features(features),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {self.config_name: FUNCTIONS[Metric(self.config_name)](predictions, references)}


def measure(metric: Metric, predictions: Sequence[float], references: Sequence[float]) -> float:
    """The metric of predictions against references (class ids, or numbers for Spearman), as a fraction.

    A constant prediction has no rank correlation (nan); here it scores 0, because it ranks nothing.
    """
    if len(predictions) != len(references) or not len(references):
        raise EvaluationError(
            f"{metric}: one prediction per reference and at least one, got {len(predictions)} for {len(references)}"
        )
    module = SuiteMetric(config_name=metric.value)
    value = module.compute(predictions=list(predictions), references=list(references))[metric.value]
    if math.isnan(value):
        if metric is Metric.SPEARMAN:
            return 0.0
        raise EvaluationError(f"{metric}: not a number on {len(references)} examples")
    return float(value)
