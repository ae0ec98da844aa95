"""Measure units that are not in the store yet, sharing work between them.

A dataset is read and tokenized once; its features are computed once for all heads, draws and seeds.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hubfusion import __version__
from hubfusion.data.loading import Data, Split, draw, load
from hubfusion.data.metrics import measure
from hubfusion.evaluate.probing import Features, compute_features, load_encoder, predict_by_head
from hubfusion.evaluate.units import Result, Unit
from hubfusion.train import Encoding, Mode, Precision
from hubfusion.train.device import pick_device
from hubfusion.train.finetune import fit, load_classifier, predict, target_array
from hubfusion.train.tokens import Tokens, load_tokenizer, tokenize

PACKAGES = ("torch", "transformers", "scikit-learn", "numpy")
Shape = tuple[int, Encoding, Precision]


class _Bench:
    """One dataset set up for one checkpoint: tokens and features by how they were made, computed on first need."""

    def __init__(self, checkpoint: Path, tokenizer: Any, data: Data, units: Sequence[Unit]) -> None:
        self.checkpoint, self.tokenizer, self.data = checkpoint, tokenizer, data
        self.rows = {u: draw(data.train, u.seed, u.protocol.examples, u.protocol.per_class) for u in units}
        self.tokens: dict[tuple[str, int, Encoding], Tokens] = {}
        self.features: dict[tuple[str, Shape], Features] = {}

    def tokenized(self, role: str, length: int, encoding: Encoding) -> Tokens:
        key = (role, length, encoding)
        if key not in self.tokens:
            split: Split = getattr(self.data, role)
            self.tokens[key] = tokenize(self.tokenizer, split, length, encoding, self.data.dataset.name)
        return self.tokens[key]

    def featured(self, encoder: Any, role: str, shape: Shape) -> Features:
        """Features of the test split, or of those training examples that any probing unit draws (other rows are 0)."""
        key = (role, shape)
        if key not in self.features:
            drawn = {r for u, rows in self.rows.items() if _shape(u) == shape for r in rows}
            tokens = self.tokenized(role, shape[0], shape[1])
            rows = sorted(drawn) if role == "train" else list(range(len(tokens)))
            self.features[key] = compute_features(encoder, tokens, rows, shape[2])
        return self.features[key]


def measure_units(checkpoint: Path, units: Sequence[Unit]) -> Iterator[tuple[Unit, Result]]:
    """Measure each unit and yield it with its result, dataset by dataset, in the order given within each."""
    tokenizer = load_tokenizer(checkpoint)
    encoder = None
    for name in dict.fromkeys(u.dataset.name for u in units):
        mine = [u for u in units if u.dataset.name == name]
        bench = _Bench(checkpoint, tokenizer, load(mine[0].dataset, mine[0].sha), mine)
        for unit in mine:
            began = time.monotonic()
            if unit.protocol.training.mode is Mode.HEAD:
                encoder = encoder if encoder is not None else load_encoder(checkpoint)
                found, examples = _probe(bench, encoder, unit)
            else:
                found, examples = _finetune(bench, unit)
            yield unit, _result(unit, bench.data, found, examples, time.monotonic() - began)


def _shape(unit: Unit) -> Shape | None:
    """What its features depend on, apart from model and text; None for a unit that does not probe."""
    training = unit.protocol.training
    if training.mode is not Mode.HEAD:
        return None
    return training.max_length, training.encoding, training.precision


def _probe(bench: _Bench, encoder: Any, unit: Unit) -> tuple[np.ndarray, int]:
    protocol = replace(unit.protocol, training=replace(unit.protocol.training, seed=unit.seed))
    shape = (protocol.training.max_length, protocol.training.encoding, protocol.training.precision)
    train = bench.featured(encoder, "train", shape)[protocol.pooling]
    test = bench.featured(encoder, "test", shape)[protocol.pooling]
    rows = bench.rows[unit]
    labels = target_array(bench.data, bench.data.train.labels)[rows]
    return predict_by_head(protocol, train[rows], labels, test), len(rows)


def _finetune(bench: _Bench, unit: Unit) -> tuple[np.ndarray, int]:
    training, data = replace(unit.protocol.training, seed=unit.seed), bench.data
    rows = bench.rows[unit]
    tokens = bench.tokenized("train", training.max_length, training.encoding).take(rows)
    model = load_classifier(bench.checkpoint, data.labels, unit.seed).to(pick_device())

    def validate() -> float:
        held_out = bench.tokenized("validation", training.max_length, training.encoding)
        found = predict(model, held_out, training.precision)
        return measure(data.dataset.metric, found.tolist(), list(data.validation.labels))

    fit(model, tokens, target_array(data, data.train.labels)[rows], training, validate)
    test = bench.tokenized("test", training.max_length, training.encoding)
    return predict(model, test, training.precision), len(rows)


def _result(unit: Unit, data: Data, found: np.ndarray, examples: int, seconds: float) -> Result:
    value = 100 * measure(data.dataset.metric, found.tolist(), list(data.test.labels))
    return Result(
        model=unit.model,
        data=data.key,
        recipe=unit.protocol.hash,
        seed=unit.seed,
        metric=data.dataset.metric.value,
        value=value,
        examples=len(data.test),
        train_examples=examples,
        seconds=round(seconds, 3),
        versions={p: version(p) for p in PACKAGES} | {"hubfusion": __version__, "python": platform.python_version()},
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})",
    )
