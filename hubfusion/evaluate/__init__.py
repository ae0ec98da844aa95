"""How good is a model as a base? Protocols, units of work with a store, engines that measure them, and scores."""

from __future__ import annotations

from hubfusion.evaluate.engines.local import evaluate
from hubfusion.evaluate.protocols import STANDARD, Protocol, find_protocol, read_protocols
from hubfusion.evaluate.scores import Score, Scores
from hubfusion.evaluate.units import Evaluated, Result, Unit, content_key, plan_units, score_units

__all__ = [
    "STANDARD", "Evaluated", "Protocol", "Result", "Score", "Scores", "Unit", "content_key", "evaluate",
    "find_protocol", "plan_units", "read_protocols", "score_units",
]  # fmt: skip
