"""The metrics of the suites as `evaluate.Metric` modules: shipped and offline, no code is downloaded to score a model.

Each file also loads on its own: ``evaluate.load("hubfusion/metrics/accuracy.py")``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module

from hubfusion.errors import EvaluationError
from hubfusion.suite import Metric


def measure(metric: Metric, predictions: Sequence[float], references: Sequence[float]) -> float:
    """The metric of predictions against references (class ids, or numbers for Spearman), as a fraction.

    A constant prediction has no rank correlation (scipy: nan); here it scores 0, because it ranks nothing.
    """
    if len(predictions) != len(references) or not len(references):
        raise EvaluationError(
            f"{metric}: one prediction per reference and at least one, got {len(predictions)} for {len(references)}"
        )
    module = import_module(f"hubfusion.metrics.{metric.value}")
    value = module.METRIC().compute(predictions=list(predictions), references=list(references))[metric.value]
    if math.isnan(value):
        if metric is Metric.SPEARMAN:
            return 0.0
        raise EvaluationError(f"{metric}: not a number on {len(references)} examples")
    return float(value)
