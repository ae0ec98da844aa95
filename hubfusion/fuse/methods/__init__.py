"""The formulas: one function a method, ``method(deltas (k, *shape), coefficients (k,), *, option) -> delta``.

Every docstring gives the formula, the paper and every departure from it. `METHODS` is the whole list. Keywords whose
default is None are statistics of the whole model or parameter: `hubfusion.fuse.first_pass` computes them when a method
is streamed, and the function computes them from its deltas when called without. Deltas are never modified.
"""

from __future__ import annotations

from collections.abc import Mapping

from hubfusion.checkpoint.deltas import Granularity
from hubfusion.fuse.methods.geometry import karcher, model_stock, slerp
from hubfusion.fuse.methods.kinds import Method, Need
from hubfusion.fuse.methods.linear import average, average_sum, task_arithmetic, task_arithmetic_sum
from hubfusion.fuse.methods.robust import geometric_median, median, multi_krum, trimmed_mean
from hubfusion.fuse.methods.sparse import breadcrumbs, dare, dare_ties, della, sce, ties
from hubfusion.fuse.methods.spectral import iso_c, tsv
from hubfusion.fuse.methods.statistics import fisher, regmean

__all__ = ["METHODS", "Method", "Need", "Granularity"]

METHODS: Mapping[str, Method] = {
    "average": Method(average, needs=Need.NORMS, by_row=True, is_sum=True, as_sum=average_sum, is_mean=True),
    "task_arithmetic": Method(task_arithmetic, by_row=True, is_sum=True, as_sum=task_arithmetic_sum),
    "ties": Method(ties, needs=Need.THRESHOLDS, by_row=True),
    "dare": Method(dare, needs=Need.DRAWS, by_row=True),
    "dare_ties": Method(dare_ties, needs=Need.DRAWS, by_row=True),
    "della": Method(della, granularity=Granularity.ROWS, needs=Need.DRAWS, by_row=True),
    "breadcrumbs": Method(breadcrumbs, needs=Need.BANDS, by_row=True),
    "sce": Method(sce, needs=Need.SELECTION),
    "fisher": Method(fisher, needs=Need.FISHERS),
    "regmean": Method(regmean, granularity=Granularity.PARAMETER, needs=Need.ACTIVATIONS, by_row=True),
    "slerp": Method(slerp, needs=Need.SPHERE, by_row=True, is_sum=True),
    "karcher": Method(karcher, needs=Need.SPHERE, by_row=True, is_sum=True),
    "model_stock": Method(model_stock, needs=Need.GRAM, by_row=True, is_sum=True),
    "iso_c": Method(iso_c, granularity=Granularity.PARAMETER, by_row=True),
    "tsv": Method(tsv, granularity=Granularity.PARAMETER, by_row=True),
    "trimmed_mean": Method(trimmed_mean, needs=Need.NORMS),
    "median": Method(median, needs=Need.NORMS),
    "geometric_median": Method(geometric_median, needs=Need.GRAM, by_row=True, is_sum=True),
    "multi_krum": Method(multi_krum, needs=Need.GRAM, by_row=True, is_sum=True),
}
