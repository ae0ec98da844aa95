"""How a model is scored: frozen recipes (`Protocol`), the standard ones, and the hash that identifies each.

Imports no heavy package, so that stored results can be looked up by the hash of their protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from hubfusion.codec import digest, from_json, parse_toml, to_json
from hubfusion.errors import EvaluationError, FusionError
from hubfusion.train import Mode, Training

# Part of every protocol hash: raised when the code changes what an unchanged recipe computes.
MEANING = 3


class Head(StrEnum):
    """The head of linear probing: logistic (ridge) regression, or RoBERTa's dense, tanh, dense."""

    LINEAR = "linear"
    TWO_LAYER = "two-layer"


class Pooling(StrEnum):
    """What linear probing reads from the last layer: the mean over tokens, or the first token."""

    MEAN = "mean"
    FIRST = "first"


@dataclass(frozen=True, slots=True)
class Protocol:
    """A way to score a model as a base.

    ``examples`` training examples are drawn anew for every seed (all of them when None), or ``per_class`` for each
    label. With ``mode = "head"`` the features of the frozen encoder are computed once and ``head`` and ``pooling``
    say what is trained on them; ``inverse_penalty`` is C of the logistic regression (features standardized on the
    training examples). ``datasets`` names those it is worth its time on (all of the suite when None).
    """

    name: str
    training: Training = field(default_factory=Training)
    examples: int | None = None
    per_class: int | None = None
    head: Head = Head.LINEAR
    pooling: Pooling = Pooling.MEAN
    inverse_penalty: float = 1.0
    datasets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse a draw that says two things, or nothing."""
        if self.examples is not None and self.per_class is not None:
            raise EvaluationError(f"protocol {self.name}: examples or per_class, not both")
        for key in ("examples", "per_class"):
            if (count := getattr(self, key)) is not None and count < 1:
                raise EvaluationError(f"protocol {self.name}: {key} must be at least 1, got {count}")
        if not self.inverse_penalty > 0:
            raise EvaluationError(f"protocol {self.name}: inverse_penalty must be above 0, got {self.inverse_penalty}")

    @property
    def hash(self) -> str:
        """16 hexadecimal digits for everything but the name, the datasets and the seed: equal recipes, equal hash."""
        recipe = to_json(replace(self, name="", datasets=None, training=replace(self.training, seed=0)))
        return digest({"meaning": MEANING, "recipe": recipe})


_HEAD = Training(mode=Mode.HEAD, learning_rate=1e-3)
STANDARD: Mapping[str, Protocol] = {
    p.name: p
    for p in (
        Protocol("finetune"),
        Protocol("linear-probing", _HEAD),
        Protocol("two-layer-probing", _HEAD, head=Head.TWO_LAYER, pooling=Pooling.FIRST),
        Protocol("few-shot", Training(batch_size=16, epochs=10), examples=100),
        Protocol("bitfit", Training(mode=Mode.BITFIT, learning_rate=1e-3)),
    )
}


def read_protocols(path: Path) -> dict[str, Protocol]:
    """Protocols from a TOML file: ``[name]`` tables, each starting from a standard one named by ``like``.

    ``[finetune] like = "finetune"`` is implied when the table has a standard name; ``training`` is a nested table.
    """
    try:
        tables = parse_toml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: not a protocol file: {error}") from None
    return {name: _read_protocol(f"{path}: {name}", name, table) for name, table in tables.items()}


def _read_protocol(where: str, name: str, table: Any) -> Protocol:
    if not isinstance(table, dict):
        raise EvaluationError(f"{where}: a table is needed, got {table!r:.60}")
    table = dict(table)
    start = find_protocol(str(table.pop("like", name)))
    data = to_json(replace(start, name=name))
    data["training"] |= table.pop("training", {})
    if table.get("per_class") is not None:
        data["examples"] = None
    try:
        return from_json(Protocol, data | table, where)
    except EvaluationError as error:
        raise EvaluationError(f"{where}: {error}") from None
    except FusionError as error:
        raise EvaluationError(str(error)) from None


def find_protocol(name: str, known: Mapping[str, Protocol] = STANDARD) -> Protocol:
    """The protocol of this name; `EvaluationError` lists the known ones."""
    if name not in known:
        raise EvaluationError(f"protocol {name!r}: allowed are {', '.join(known)}")
    return known[name]
