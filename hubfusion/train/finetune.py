"""Finetune a checkpoint on one dataset; contributors and evaluation use the same code.

An optimizer step sees exactly the ``batch_size`` examples that a plain trainer would draw; `gradient` computes their
gradient without padding. The head depends on the seed alone: two checkpoints scored with one seed get the same head,
data order and schedule.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hubfusion.data.loading import Data
from hubfusion.data.metrics import measure
from hubfusion.errors import EvaluationError
from hubfusion.train.device import INFERENCE_BUDGET, OVERHEAD, Cores, as_inputs, autocast, pick_device
from hubfusion.train.gradient import Gradient
from hubfusion.train.recipe import Mode, Precision, Training
from hubfusion.train.tokens import Tokens, by_length, load_tokenizer, tokenize
from hubfusion.train.vocabulary import UsedRows


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """How far a training is: optimizer steps made and planned (early stopping may end sooner), loss of the last."""

    done: int
    total: int
    loss: float


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A finetune on disk and how good it is: percent of ``metric``; ``examples`` trained on, ``seconds`` spent."""

    folder: Path
    metric: str
    validation: float
    test: float
    examples: int
    steps: int
    seconds: float


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing bars and load reports while we use it; its settings come back afterwards."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's generators start at ``seed`` inside and go on where they were afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def load_classifier(folder: Path, labels: tuple[str, ...], seed: int) -> Any:
    """The encoder in ``folder`` under a new head for ``labels`` (none: one number), in float32 on the CPU.

    safetensors only, no code from the folder. Encoder parameters that the folder lacks, or has in another shape,
    raise `EvaluationError`: a randomly initialized encoder must not be scored as if it were the checkpoint.
    """
    from transformers import AutoModelForSequenceClassification

    names = labels or ("value",)
    problem = "single_label_classification" if labels else "regression"
    with quiet(), seeded(seed):
        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder,
                num_labels=len(names),
                id2label=dict(enumerate(names)),
                label2id={n: i for i, n in enumerate(names)},
                problem_type=problem,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # a finetune's own head; what matters is refused below
                dtype=torch.float32,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise EvaluationError(f"{folder}: not a classifier we can load: {line}") from None
    refuse_incomplete(folder, model, report)
    reset_head(model, seed)
    return model


def refuse_incomplete(folder: Path, model: Any, report: Any) -> None:
    """Raise unless every encoder parameter came from the folder; a pooler may be new (some bases have none)."""
    prefix = model.base_model_prefix + "."
    mismatched = [m[0] for m in report["mismatched_keys"]]
    for name in (*report["missing_keys"], *mismatched):
        inside = name.startswith(prefix) or not any(name == n for n, _ in model.named_parameters())
        if inside and "pooler" not in name:
            how = "in another shape" if name in mismatched else "missing"
            raise EvaluationError(f"{folder}: encoder parameter {name} is {how}")


def reset_head(model: Any, seed: int) -> None:
    """Draw the head anew, from ``seed`` and nothing else: normal weights of the config's width, zero biases."""
    generator = torch.Generator().manual_seed(seed)
    width = float(getattr(model.config, "initializer_range", 0.02))
    base = {id(p) for p in model.base_model.parameters()}
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if id(parameter) in base:
                continue
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * width)
            elif name.endswith("bias"):
                parameter.zero_()


def freeze(model: Any, mode: Mode) -> None:
    """Leave trainable what ``mode`` says; the head always is."""
    for name, parameter in model.base_model.named_parameters():
        parameter.requires_grad_(mode is Mode.FULL or (mode is Mode.BITFIT and name.endswith(".bias")))


def predict(model: Any, tokens: Tokens, precision: Precision = Precision.FLOAT32) -> np.ndarray:
    """Predicted class ids (n,), or numbers when the model has one output; dropout off."""
    device = model.device.type
    model.eval()

    def work(rows: list[int]) -> tuple[list[int], np.ndarray]:
        with torch.inference_mode(), autocast(device, precision):
            logits = model(**as_inputs(tokens, rows, device)).logits.float()
        values = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(dim=1)
        return rows, values.cpu().numpy()

    found = np.zeros(len(tokens))
    batches = by_length(tokens.lengths, range(len(tokens)), INFERENCE_BUDGET[device], OVERHEAD[device])
    with Cores(device) as cores:
        for rows, values in cores.map(work, batches):
            found[rows] = values
    return found


def fit(
    model: Any,
    tokens: Tokens,
    labels: np.ndarray,
    training: Training,
    validate: Callable[[], float] | None = None,
    on_progress: Callable[[TrainingProgress], None] | None = None,
) -> int:
    """Train in place and return the optimizer steps made. ``labels``: (n,), integers for classes, floats for numbers.

    ``validate`` gives the validation metric (a fraction); it is asked only if early stopping could still happen.
    """
    freeze(model, training.mode)
    embedding = UsedRows(model, tokens)
    embedding.narrow()
    try:
        with Cores(model.device.type) as cores:
            gradient = Gradient(model, tokens, torch.from_numpy(labels), training, cores)
            return _fit(model, embedding, gradient, training, (validate, on_progress))
    finally:
        embedding.widen()


def _fit(
    model: Any,
    embedding: UsedRows,
    gradient: Gradient,
    training: Training,
    calls: tuple[Callable[[], float] | None, Callable[[TrainingProgress], None] | None],
) -> int:
    validate, on_progress = calls
    optimizer, examples = _optimizer(model, training), gradient.examples
    steps_an_epoch = -(-examples // training.batch_size)
    total = steps_an_epoch * training.epochs
    warm = round(training.warmup * total)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (warm + 1), (total - step) / (total - warm))
    )
    stopping = _Stopping(training, total * training.batch_size) if validate else None
    order = np.random.default_rng([7, training.seed])
    step = 0
    with seeded(training.seed):
        for _ in range(training.epochs):
            rows = order.permutation(examples).tolist()
            for start in range(0, len(rows), training.batch_size):
                with gradient.cores.alone():
                    loss = gradient.add(rows[start : start + training.batch_size], step)
                    torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
                    embedding.decay(1 - schedule.get_last_lr()[0] * training.weight_decay)
                    optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                if on_progress:
                    on_progress(TrainingProgress(step, total, float(loss)))
                if stopping and validate and stopping.is_due(step):
                    embedding.widen()
                    is_over = stopping.is_over(validate())
                    embedding.narrow()
                    if is_over:
                        return step
    return step


def _optimizer(model: Any, training: Training) -> Any:
    """AdamW; no decay on biases and normalization, as `transformers.Trainer` does it."""
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[not (name.endswith("bias") or "norm" in name.lower())].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": training.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=training.learning_rate,
        fused=True,
    )


class _Stopping:
    """Early stopping counted in training examples; never due when the whole training is within the patience."""

    def __init__(self, training: Training, examples: int) -> None:
        self.every = max(1, training.validate_every // training.batch_size)
        self.patience = training.patience // training.batch_size
        self.epsilon = training.epsilon
        self.possible = examples > training.patience
        self.best, self.best_step, self.step = -np.inf, 0, 0

    def is_due(self, step: int) -> bool:
        self.step = step
        return self.possible and step % self.every == 0

    def is_over(self, value: float) -> bool:
        if value >= self.best + self.epsilon:
            self.best, self.best_step = value, self.step
        return self.step - self.best_step >= self.patience


def target_array(data: Data, labels: tuple[Any, ...]) -> np.ndarray:
    """Labels as an array (n,): int64 for classes, float32 for numbers."""
    return np.asarray(labels, dtype=np.float32 if data.dataset.is_regression else np.int64)


def finetune(
    base: Path, data: Data, training: Training, out: Path, on_progress: Callable[[TrainingProgress], None] | None = None
) -> TrainedModel:
    """Finetune ``base`` on one dataset and leave config, tokenizer and safetensors in the new folder ``out``.

    The config names the labels. ``out`` appears when it is whole: it is written beside and renamed.
    """
    if out.exists():
        raise EvaluationError(f"{out}: exists already; a finetune needs a new folder")
    began = time.monotonic()
    tokenizer = load_tokenizer(base)
    model = load_classifier(base, data.labels, training.seed).to(pick_device())
    name = data.dataset.name
    parts = {
        role: tokenize(tokenizer, split, training.max_length, training.encoding, name)
        for role, split in (("train", data.train), ("validation", data.validation), ("test", data.test))
    }

    def score(role: str, labels: tuple[Any, ...]) -> float:
        found = predict(model, parts[role], training.precision)
        return measure(data.dataset.metric, found.tolist(), list(labels))

    steps = fit(
        model,
        parts["train"],
        target_array(data, data.train.labels),
        training,
        lambda: score("validation", data.validation.labels),
        on_progress,
    )
    validation, test = score("validation", data.validation.labels), score("test", data.test.labels)
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    with quiet():
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    os.replace(beside, out)
    seconds = time.monotonic() - began
    return TrainedModel(out, data.dataset.metric, 100 * validation, 100 * test, len(data.train), steps, seconds)
