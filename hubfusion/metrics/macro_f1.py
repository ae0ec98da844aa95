"""Mean over classes of F1 (harmonic mean of precision and recall); a class never predicted counts 0."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
from sklearn.metrics import f1_score


class MacroF1(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """Mean over classes of F1 (harmonic mean of precision and recall); a class never predicted counts 0."""

    def _info(self) -> Any:
        features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions and references, one class id each",
            features=datasets.Features(features),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0))}


METRIC = MacroF1
