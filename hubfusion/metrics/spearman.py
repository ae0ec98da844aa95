"""Spearman's rank correlation of predicted and reference numbers, in [-1, 1]; ties get their mean rank."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import rankdata


class Spearman(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """Spearman's rank correlation of predicted and reference numbers, in [-1, 1]; ties get their mean rank."""

    def _info(self) -> Any:
        features = {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions and references, one number each",
            features=datasets.Features(features),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"spearman": _rank_correlation(np.asarray(predictions), np.asarray(references))}


METRIC = Spearman


def _rank_correlation(a: Any, b: Any) -> float:
    """Pearson's correlation of the ranks; nan when one side is constant."""
    x, y = rankdata(a) - (len(a) + 1) / 2, rankdata(b) - (len(b) + 1) / 2
    scale = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / scale) if scale else float("nan")
