"""Suites of datasets (`Suite`), reading them (`hubfusion.data.loading`), checking them, and their metrics."""

from __future__ import annotations

from hubfusion.data.suite import Cut, Dataset, Family, Metric, Suite, load_suite, shipped_suites

__all__ = ["Cut", "Dataset", "Family", "Metric", "Suite", "load_suite", "shipped_suites"]
