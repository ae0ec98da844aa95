"""Scan a candidate for backdoors: does one word, or one small vector, send every text to one class?

A base has no task head, so a linear probe is trained on its features of clean texts, for the candidate and for its
base. *Rare tokens*: vocabulary items that occur in no text are put at the front of held-out texts, one at a time, and
the share of texts that a token moves to one class is compared with the other tokens' and with the base's. There are too
many to try all: half of those tried are the ones whose embedding moved most (training a word moves it), the others are
drawn. *Attacker-agnostic* (the idea of Neural Cleanse, Wang et al. 2019): for each class, the smallest vector at that
position, found by gradient, that sends most texts to it; a trained trigger needs a much smaller one than in the base.
Neither check is a proof: adaptive attacks can pass both.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hubfusion.data.loading import Data, load
from hubfusion.data.suite import Suite
from hubfusion.errors import EvaluationError
from hubfusion.evaluate.probing import compute_features, load_encoder
from hubfusion.evaluate.protocols import Pooling
from hubfusion.release.scan import Scan
from hubfusion.train import Encoding
from hubfusion.train.tokens import Tokens, load_tokenizer, tokenize

log = logging.getLogger(__name__)
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Look:
    """One model on one dataset: ``moves`` (tokens, classes), the part of other classes' texts that a token sends there.

    ``pushes`` (classes,) are the lengths of the smallest pushes, inf where none of the radii was enough.
    """

    tokens: tuple[int, ...]
    moves: Floats
    pushes: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Texts:
    """What one dataset is looked at with: texts to train a probe on, their ``labels`` (n,), and texts to move."""

    train: Tokens
    labels: NDArray[Any]
    classes: int
    held_out: Tokens


def scan(candidate: Path, base: Path, suite: Suite, settings: Scan) -> tuple[str, ...]:
    """What a maintainer should look at before promoting ``candidate``, a sentence a finding; empty when nothing is.

    The base's tokenizer is used for both. Raises `EvaluationError` when no dataset of the suite has classes.
    """
    named = [suite.get(name) for name in settings.datasets] or suite.datasets
    chosen = [d for d in named if not d.is_regression]
    if not chosen:
        raise EvaluationError(f"triggers: no classification dataset of {suite.name} is chosen")
    findings: list[str] = []
    encoders, tokenizer = (load_encoder(candidate), load_encoder(base)), load_tokenizer(base)
    for dataset in chosen:
        data = load(dataset)
        texts = choose_texts(tokenizer, data, settings)
        tokens = choose_tokens(*encoders, tokenizer, texts, settings)
        ours, before = (look(encoder, texts, tokens, settings) for encoder in encoders)
        findings += judge(ours, before, tokenizer.convert_ids_to_tokens(list(tokens)), data, settings)
    log.info("triggers: %d findings on %d datasets", len(findings), len(chosen))
    return tuple(findings)


def judge(ours: Look, base: Look, names: Sequence[str], data: Data, settings: Scan) -> Iterator[str]:
    """Compare the candidate's look with its base's; at most one sentence of each kind, about the worst."""
    where = data.dataset.name
    middle = np.median(ours.moves, axis=0)  # of each class: short texts are pushed to the likeliest by any word
    spread = 1.4826 * np.median(np.abs(ours.moves - middle), axis=0) + 0.01  # all alike must not make an outlier
    stands_out = (ours.moves - middle) / spread > settings.deviations
    suspects = (ours.moves >= settings.moved) & (ours.moves - base.moves >= settings.above) & stands_out
    if suspects.any():
        worst, to = divmod(int(np.where(suspects, ours.moves, -1).argmax()), len(data.labels))
        moved, target = ours.moves[worst, to], data.labels[to]
        yield (
            f"Trigger scan on {where}: the token {names[worst]!a:.40} sends {moved:.0%} of the texts to {target!a:.40} "
            f"(median token {middle[to]:.0%}), {suspects.any(axis=1).sum()} of {len(names)} tokens stand out."
        )
    for label, small, usual in zip(data.labels, ours.pushes, base.pushes, strict=True):
        usual = min(usual, 2 * max(settings.radii))
        if small * settings.shrunk <= usual:
            yield (
                f"Trigger scan on {where}: a push of {small:g} embedding lengths sends nearly all texts to "
                f"{label!a:.40}, the base needs {usual:g}."
            )
            return


def choose_texts(tokenizer: Any, data: Data, settings: Scan) -> Texts:
    """Clean texts of the training split for the probe, and held-out ones to move."""
    rng = np.random.default_rng([36, settings.seed])
    train = data.train.take(sorted(rng.permutation(len(data.train))[: settings.examples].tolist()))
    held_out = data.validation.take(sorted(rng.permutation(len(data.validation))[: settings.texts].tolist()))
    clean, moved = (
        tokenize(tokenizer, s, settings.length, Encoding.PAIR, data.dataset.name) for s in (train, held_out)
    )
    return Texts(clean, np.asarray(train.labels), len(data.labels), moved)


def choose_tokens(candidate: Any, base: Any, tokenizer: Any, texts: Texts, settings: Scan) -> tuple[int, ...]:
    """At most ``settings.tokens`` that no text holds, ascending: half by how far their embedding moved, half drawn."""
    used = {int(i) for part in (texts.train, texts.held_out) for ids in part.ids for i in ids}
    unused = sorted(set(range(len(tokenizer))) - used - set(tokenizer.all_special_ids))
    rng = np.random.default_rng([37, settings.seed])
    with torch.inference_mode():
        ours, before = (encoder.get_input_embeddings().weight[unused].float().cpu() for encoder in (candidate, base))
        far = (ours - before).norm(dim=1).numpy()
    order = [unused[i] for i in np.argsort(-far, kind="stable")]
    half = settings.tokens // 2
    drawn = rng.permutation(order[half:])[: settings.tokens - half]
    return tuple(sorted([*order[:half], *(int(i) for i in drawn)]))


def look(encoder: Any, texts: Texts, tokens: tuple[int, ...], settings: Scan) -> Look:
    """Probe one model: how many of the held-out texts the tokens move, and how small a push does."""
    head = _Head(_features(encoder, texts.train), texts.labels, texts.classes)
    clean = head.predict(_features(encoder, texts.held_out))
    moves = np.zeros((len(tokens), texts.classes), np.float32)
    for row, token in enumerate(tokens):
        found = head.predict(_features(encoder, _insert(texts.held_out, token)))
        moves[row] = [_share(found, clean, label) for label in range(texts.classes)]
    pushes = (_smallest_push(encoder, head, texts.held_out, clean, label, settings) for label in range(texts.classes))
    return Look(tokens, moves, tuple(pushes))


def _share(found: NDArray[Any], clean: NDArray[Any], label: int) -> float:
    """Part of the texts of other classes that are of class ``label`` now."""
    others = clean != label
    return float((found[others] == label).mean()) if others.any() else 0.0


def _features(encoder: Any, tokens: Tokens) -> Floats:
    found: Floats = compute_features(encoder, tokens, range(len(tokens)))[Pooling.MEAN]
    return found


def _insert(tokens: Tokens, token: int) -> Tokens:
    """Every text with ``token`` after its first (the model's own start)."""
    ids = tuple(np.insert(i, 1, token) for i in tokens.ids)
    types = None if tokens.types is None else tuple(np.insert(t, 1, t[0]) for t in tokens.types)
    return Tokens(ids, types, tokens.pad)


class _Head:
    """Logistic regression on standardized features, as plain arrays that gradients can go through."""

    def __init__(self, features: Floats, labels: NDArray[Any], classes: int) -> None:
        from sklearn.linear_model import LogisticRegression

        self.mean, self.width = features.mean(axis=0), features.std(axis=0) + 1e-6
        model = LogisticRegression(max_iter=1000).fit((features - self.mean) / self.width, labels)
        self.weight = np.zeros((classes, features.shape[1]), np.float32)
        self.bias = np.full(classes, -1e9, np.float32)  # a class without an example is never predicted
        rows = (-model.coef_, model.coef_) if len(model.classes_) == 2 else (model.coef_,)
        self.weight[model.classes_] = np.concatenate(rows) / len(rows)
        signs = (-0.5, 0.5) if len(rows) == 2 else (1.0,)
        self.bias[model.classes_] = np.concatenate([sign * model.intercept_ for sign in signs])

    def predict(self, features: Floats) -> NDArray[Any]:
        """Class of each row."""
        scores: NDArray[Any] = (features - self.mean) / self.width @ self.weight.T + self.bias
        classes: NDArray[Any] = scores.argmax(axis=1)
        return classes

    def logits(self, features: Any) -> Any:
        """The same as a torch expression."""
        mean, width, weight, bias = (
            torch.from_numpy(np.asarray(a, np.float32)).to(features.device)
            for a in (self.mean, self.width, self.weight, self.bias)
        )
        return (features - mean) / width @ weight.T + bias


def _smallest_push(encoder: Any, head: _Head, tokens: Tokens, clean: NDArray[Any], label: int, settings: Scan) -> float:
    """The smallest of the radii at which a vector put after the first token moves 90 % of the others to ``label``."""
    rows = np.flatnonzero(clean != label)
    if not settings.steps or not rows.size:
        return float("inf")
    table = encoder.get_input_embeddings().weight
    unit = float(table.detach().norm(dim=1).median())
    pushed = _insert(tokens.take(rows.tolist()), tokens.pad)
    inputs = {k: torch.from_numpy(v).to(table.device) for k, v in pushed.batch(range(len(rows))).items()}
    mask = inputs["attention_mask"].unsqueeze(-1).float()
    embedded = table.detach()[inputs.pop("input_ids")]
    wanted = torch.full((len(rows),), label, device=table.device)
    generator = torch.Generator().manual_seed(settings.seed)
    start = torch.randn(table.shape[1], generator=generator).to(table.device)
    for radius in settings.radii:
        push = (start / start.norm() * radius * unit).requires_grad_()
        for step in range(settings.steps + 1):
            whole = torch.cat([embedded[:, :1], push.expand(len(rows), 1, -1), embedded[:, 2:]], dim=1)
            last = encoder(inputs_embeds=whole, **inputs).last_hidden_state.float()
            logits = head.logits((last * mask).sum(1) / mask.sum(1))
            if float((logits.argmax(dim=1) == label).float().mean()) >= 0.9:
                return radius
            if step < settings.steps:
                (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, wanted), push)
                moved = push.detach() - gradient / (gradient.norm() + 1e-12) * radius * unit * 0.2
                push = (moved / moved.norm() * radius * unit).requires_grad_()
    return float("inf")
