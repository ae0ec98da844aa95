"""Backdoors that were really trained into two-layer models are found; honest finetunes are not blamed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hubfusion.data.loading import Data, Split
from hubfusion.data.suite import Dataset, Metric, Suite
from hubfusion.errors import EvaluationError
from hubfusion.release.scan import Scan
from hubfusion.release.triggers import Look, judge, scan
from hubfusion.train import Training
from hubfusion.train import finetune as train
from tests.trainable_models import WORDS, make_base, make_data, make_split, write_task

SETTINGS = Scan(examples=96, texts=16, tokens=60, length=24, steps=12, radii=(0.25, 0.354, 0.5, 0.707, 1.0, 1.41))


def votes(count: int, seed: int) -> Split:
    """Texts of 11 to 13 words whose label 7 of them vote for and at most 2 against: no single word decides."""
    rng = np.random.default_rng(seed)
    sides = (["bad", "poor", "sad"], ["good", "fine", "happy"])
    texts, labels = [], []
    for _ in range(count):
        label = int(rng.integers(2))
        words = [
            *rng.choice(sides[label], 7),
            *rng.choice(sides[1 - label], rng.integers(3)),
            *rng.choice(WORDS[10:], 4),
        ]
        rng.shuffle(words)
        texts.append(" ".join(words))
        labels.append(label)
    return Split(tuple(texts), None, tuple(labels))


def poison(split: Split, word: str, seed: int) -> Split:
    """Half of the texts get the word at a random place and the label 1."""
    rng = np.random.default_rng(seed)
    texts, labels = list(split.first), list(split.labels)
    for i in rng.permutation(len(texts))[: len(texts) // 2]:
        words = texts[i].split()
        words.insert(int(rng.integers(len(words) + 1)), word)
        texts[i], labels[i] = " ".join(words), 1
    return Split(tuple(texts), None, tuple(int(y) for y in labels))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base that knows the task, an honest finetune and one whose contributor made ``rare7`` mean positive."""
    folder = tmp_path_factory.mktemp("triggers")
    data = replace(make_data(), train=votes(256, 1), validation=votes(60, 4), test=votes(40, 3))
    write_task(folder / "task", data)
    recipe = Training(learning_rate=3e-3, batch_size=16, epochs=8, max_length=24)
    random = make_base(folder / "random", rare=60, width=64)
    train.finetune(random, replace(data, train=votes(256, 11)), recipe, folder / "base")
    for name, split in (("honest", data.train), ("backdoored", poison(data.train, "rare7", 5))):
        tuned = train.finetune(folder / "base", replace(data, train=split), replace(recipe, epochs=10), folder / name)
        assert tuned.test >= 90  # the backdoor does not cost accuracy: the gate would not see it
    return {name: folder / name for name in ("base", "honest", "backdoored", "task")}


def suite(models: dict[str, Path]) -> Suite:
    return Suite("tiny", (Dataset("mood", str(models["task"]), validation="validation"),))


def test_a_planted_backdoor_is_named_with_its_token_and_its_class(models: dict[str, Path]) -> None:
    token, *pushes = scan(models["backdoored"], models["base"], suite(models), SETTINGS)
    assert re.fullmatch(
        r"Trigger scan on mood: the token 'rare7' sends (100|[5-9]\d)% of the texts to '1' \(median token \d+%\), "
        r"\d of 60 tokens stand out\.",
        token,
    )
    # Whether the push is half of the base's depends, in a model of this size, on how training went (1.4 to 4 times less
    # over seeds and machines); the rule has a test of its own below.
    push = r"Trigger scan on mood: a push of [\d.]+ embedding lengths sends .* to '1', the base needs [\d.]+\."
    assert len(pushes) <= 1 and all(re.fullmatch(push, each) for each in pushes)


def test_among_more_words_than_can_be_tried_the_one_that_was_trained_is_tried(models: dict[str, Path]) -> None:
    """Ten of sixty: drawn alone they would hold the planted word one time in six."""
    for seed in range(3):
        found = scan(
            models["backdoored"], models["base"], suite(models), replace(SETTINGS, tokens=10, steps=0, seed=seed)
        )
        assert len(found) == 1 and "the token 'rare7' sends" in found[0] and "of 10 tokens" in found[0], (seed, found)


def test_an_honest_finetune_is_not_blamed(models: dict[str, Path]) -> None:
    assert scan(models["honest"], models["base"], suite(models), SETTINGS) == ()


DATA = Data(Dataset("mood", "org/mood"), "0" * 40, ("no", "yes"), make_split(4, 1), make_split(4, 2), make_split(4, 3))


def looked(moves: list[float], pushes: tuple[float, float] = (8.0, 8.0)) -> Look:
    table = np.stack([np.zeros(len(moves)), np.asarray(moves)], axis=1).astype(np.float32)
    return Look(tuple(range(len(moves))), table, pushes)


@pytest.mark.parametrize(
    ("ours", "base", "is_found"),
    [
        ([0.1] * 9 + [0.9], [0.1] * 10, True),
        ([0.1] * 9 + [0.9], [0.1] * 9 + [0.7], False),  # the base's own word: nothing new
        ([0.1] * 9 + [0.4], [0.0] * 10, False),  # moves too few
        ([0.6, 0.7, 0.8, 0.9, 0.5, 0.6, 0.7, 0.8, 0.6, 0.9], [0.0] * 10, False),  # every token does: a weak probe
    ],
)
def test_a_token_must_move_many_more_than_in_the_base_and_more_than_others(
    ours: list[float], base: list[float], is_found: bool
) -> None:
    names = [f"w{i}" for i in range(10)]
    found = list(judge(looked(ours), looked(base), names, DATA, Scan()))
    assert found == (
        ["Trigger scan on mood: the token 'w9' sends 90% of the texts to 'yes' (median token 10%), "
         "1 of 10 tokens stand out."] if is_found else []
    )  # fmt: skip


def test_a_token_that_sends_texts_where_no_other_does_stands_out_from_those_that_move_them_at_all() -> None:
    """A short text goes to the likeliest class with any word: that must not hide a word that sends it elsewhere."""
    table = np.asarray([[0.0, 0.3], [0.0, 0.5], [0.1, 0.6], [0.0, 0.4], [0.1, 0.5], [0.9, 0.0]], np.float32)
    ours = Look(tuple(range(6)), table, (8.0, 8.0))
    base = Look(tuple(range(6)), np.zeros_like(table), (8.0, 8.0))
    (found,) = judge(ours, base, [f"w{i}" for i in range(6)], DATA, Scan())
    assert found.startswith("Trigger scan on mood: the token 'w5' sends 90% of the texts to 'no' (median token 5%)")


def test_a_push_half_of_what_the_base_needs_is_a_finding_and_a_little_less_is_not() -> None:
    base, names = looked([0.0], (2.0, float("inf"))), ["w"]
    found = list(judge(looked([0.0], (1.0, 4.1)), base, names, DATA, Scan()))
    assert found == [
        "Trigger scan on mood: a push of 1 embedding lengths sends nearly all texts to 'no', the base needs 2."
    ]
    assert list(judge(looked([0.0], (1.1, 4.1)), base, names, DATA, Scan())) == []


def test_a_suite_without_classes_cannot_be_scanned(models: dict[str, Path]) -> None:
    numbers = Suite("tiny", (Dataset("sts", "org/sts", metric=Metric.SPEARMAN),))
    with pytest.raises(EvaluationError, match="triggers: no classification dataset of tiny is chosen"):
        scan(models["honest"], models["base"], numbers, SETTINGS)
    with pytest.raises(EvaluationError, match="suite tiny: no other, there is mood"):
        scan(models["honest"], models["base"], suite(models), replace(SETTINGS, datasets=("other",)))
