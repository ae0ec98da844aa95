"""The formulas: one function a method, ``method(deltas (k, *shape), coefficients (k,), *, option) -> delta``.

Every docstring gives the formula, the paper and every departure from it. `METHODS` is the whole list.
"""

from __future__ import annotations

from collections.abc import Mapping

from hubfusion.methods.kinds import Method, Need, Unit
from hubfusion.methods.linear import average, task_arithmetic

__all__ = ["METHODS", "Method", "Need", "Unit", "average", "task_arithmetic"]

METHODS: Mapping[str, Method] = {
    "average": Method(average),
    "task_arithmetic": Method(task_arithmetic),
}
