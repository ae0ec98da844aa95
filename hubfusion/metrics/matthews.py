"""Matthews correlation of predicted and reference classes, in [-1, 1]."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
from sklearn.metrics import matthews_corrcoef


class Matthews(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """Matthews correlation of predicted and reference classes, in [-1, 1]."""

    def _info(self) -> Any:
        features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions and references, one class id each",
            features=datasets.Features(features),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"matthews": float(matthews_corrcoef(references, predictions))}


METRIC = Matthews
