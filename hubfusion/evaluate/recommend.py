"""Recommend a base for the user's data, as in *Where to start?* (arXiv 2211.00107).

All models are ranked by linear probing on the suite's representative dataset, which is cheap. Then up to three of the
best, and the first model given (the one the user would have started from), are finetuned on the user's own data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hubfusion.data.suite import Dataset, Suite
from hubfusion.errors import EvaluationError
from hubfusion.evaluate.engines.local import evaluate
from hubfusion.evaluate.protocols import Protocol
from hubfusion.evaluate.scores import Comparison, compare
from hubfusion.evaluate.units import Evaluated

TRIES = 3


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model on disk and the key of its content."""

    model: str
    folder: Path


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One model in the order of what to try: its probing score (percent), and its gain on the user's data if tried."""

    model: str
    probe: float
    probe_gain: float
    tried: Comparison | None


def own_dataset(path: Path, text: Sequence[str] = ("text",), label: str = "label") -> Dataset:
    """The user's own CSV, JSON lines or parquet file; a fixed fifth of it, at most 1,000 examples, is the test set."""
    from hubfusion.data.loading import count_rows

    rows = count_rows(path)
    if rows < 10:
        raise EvaluationError(f"{path}: at least 10 examples are needed to try a model, got {rows}")
    cap = min(1000, rows // 5)
    return Dataset(path.stem, str(path.resolve()), tuple(text), label, test="train", test_cap=cap, hold_out=True)


def recommend(
    models: Sequence[KnownModel],
    suite: Suite,
    protocols: tuple[Protocol, Protocol],
    seeds: Sequence[int],
    store: Path,
    *,
    own: Dataset | None = None,
    on_event: Callable[[Evaluated], None] | None = None,
) -> list[Recommendation]:
    """Rank ``models`` by the first protocol on the representative dataset; try the best by the second on ``own``.

    The first model is the reference of every gain. Tried models come first, by mean gain, then the others by probe.
    """
    if len(models) < 2:
        raise EvaluationError(f"recommend: at least 2 models are needed, got {len(models)}")
    if suite.representative is None:
        raise EvaluationError(f"recommend: suite {suite.name} names no representative dataset")
    screen = suite.only([suite.representative])
    probe, finetune = protocols
    probes = {m: evaluate(m.folder, m.model, screen, [probe], seeds[:1], store, on_event=on_event) for m in models}
    reference = models[0]
    level = probes[reference].mean(probe.name)
    ranked = sorted(models, key=lambda m: -probes[m].mean(probe.name))
    tried: dict[KnownModel, Comparison] = {}
    if own is not None:
        mine = Suite(own.name, (own,))
        base = evaluate(reference.folder, reference.model, mine, [finetune], seeds, store, on_event=on_event)
        for model in [m for m in ranked if m is not reference][:TRIES]:
            scores = evaluate(model.folder, model.model, mine, [finetune], seeds, store, on_event=on_event)
            tried[model] = compare(scores, base)
    found = [
        Recommendation(m.model, probes[m].mean(probe.name), probes[m].mean(probe.name) - level, tried.get(m))
        for m in ranked
    ]
    return sorted(found, key=lambda r: (r.tried is None, -r.tried.mean if r.tried else -r.probe))
