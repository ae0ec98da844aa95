"""Evaluation from end to end on a two-layer model: stored, resumed, paired, equal to scikit-learn and to a trainer."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hubfusion.data.suite import Suite
from hubfusion.errors import EvaluationError
from hubfusion.evaluate.engines.local import evaluate
from hubfusion.evaluate.protocols import Protocol
from hubfusion.evaluate.scores import compare
from hubfusion.evaluate.units import Evaluated
from hubfusion.train import Mode, Training
from tests.trainable_models import make_base, make_data, write_task

QUICK = Training(learning_rate=1e-2, batch_size=16, epochs=6, max_length=16)
FINETUNE = Protocol("finetune", QUICK)
PROBE = Protocol("linear-probing", replace(QUICK, mode=Mode.HEAD))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    folder = tmp_path_factory.mktemp("tasks")
    return Suite("two", tuple(write_task(folder / n, make_data(name=n)) for n in ("mood", "again")))


def test_every_unit_is_measured_once_and_then_read(base, suite, tmp_path):
    events: list[Evaluated] = []
    first = evaluate(base, "m@1", suite, [PROBE, FINETUNE], [0, 1], tmp_path, on_event=events.append)
    assert [e.stored for e in events] == [False] * 8
    assert (events[-1].done, events[-1].total) == (8, 8)
    assert first.get("mood", "finetune").seeds == (0, 1)
    assert first.get("mood", "finetune").examples == 40
    assert first.mean("finetune") > 70  # chance is 50; over seeds this small model ends between 52 and 100
    events.clear()
    again = evaluate(base, "m@1", suite, [PROBE, FINETUNE], [0, 1], tmp_path, on_event=events.append)
    assert again == first
    assert all(e.stored for e in events)


def test_a_stored_evaluation_imports_neither_torch_nor_transformers(base, suite, tmp_path):
    evaluate(base, "m@1", suite, [PROBE], [0], tmp_path)
    code = f"""
import sys
from pathlib import Path
from hubfusion.evaluate.engines.local import evaluate
from hubfusion.train import Mode, Training
from hubfusion.evaluate.protocols import Protocol
from hubfusion.data.suite import Dataset, Suite
sets = tuple(Dataset(n, r, validation="validation") for n, r in {[(d.name, d.repo) for d in suite.datasets]!r})
quick = Training(learning_rate=1e-2, batch_size=16, epochs=6, max_length=16, mode=Mode.HEAD)
evaluate(Path("/nowhere"), "m@1", Suite("two", sets), [Protocol("linear-probing", quick)], [0], Path({str(tmp_path)!r}))
assert not {{"torch", "transformers", "datasets", "sklearn"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_that_died_goes_on_where_it_was(base, suite, tmp_path):
    def die(event: Evaluated) -> None:
        if event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(base, "m@1", suite, [PROBE], [0, 1], tmp_path, on_event=die)
    events: list[Evaluated] = []
    evaluate(base, "m@1", suite, [PROBE], [0, 1], tmp_path, on_event=events.append)
    assert [e.stored for e in events] == [True, True, False, False]


def test_the_same_seed_gives_the_same_numbers_and_another_model_the_same_pairs(base, suite, tmp_path):
    one = evaluate(base, "m@1", suite, [FINETUNE, PROBE], [3, 4], tmp_path / "a")
    twin = evaluate(base, "m@2", suite, [FINETUNE, PROBE], [3, 4], tmp_path / "b")
    gains = compare(twin, one)
    assert [g.differences for g in gains.gains] == [(0.0, 0.0)] * 4


def test_another_protocol_or_other_data_is_another_unit(base, suite, tmp_path):
    evaluate(base, "m@1", suite, [PROBE], [0], tmp_path)
    events: list[Evaluated] = []
    evaluate(base, "m@1", suite, [replace(PROBE, inverse_penalty=0.5)], [0], tmp_path, on_event=events.append)
    capped = Suite("two", tuple(replace(d, test_cap=30) for d in suite.datasets))
    evaluate(base, "m@1", capped, [PROBE], [0], tmp_path, on_event=events.append)
    assert [e.stored for e in events] == [False] * 4


def test_a_stored_result_about_something_else_is_refused(base, suite, tmp_path):
    evaluate(base, "m@1", suite, [PROBE], [0], tmp_path)
    for file in tmp_path.rglob("*.json"):
        file.write_text(file.read_text().replace('"m@1"', '"m@9"'))
    with pytest.raises(EvaluationError, match="is about m@9"):
        evaluate(base, "m@1", suite, [PROBE], [0], tmp_path)


def test_a_protocol_can_be_kept_to_some_datasets(base, suite, tmp_path):
    found = evaluate(base, "m@1", suite, [PROBE, replace(FINETUNE, datasets=("again",))], [0], tmp_path)
    assert [(s.dataset, s.protocol) for s in found] == [
        ("mood", "linear-probing"),
        ("again", "linear-probing"),
        ("again", "finetune"),
    ]
    with pytest.raises(EvaluationError, match="no typo, there is mood, again"):
        evaluate(base, "m@1", suite, [replace(FINETUNE, datasets=("typo",))], [0], tmp_path)


def test_linear_probing_is_scikit_learn_on_the_features_of_the_frozen_encoder(base, suite, tmp_path):
    """The reference goes another way: one text at a time, transformers alone, no padding, no batching."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModel.from_pretrained(base).eval()
    data = make_data()

    def features(texts: tuple[str, ...]) -> np.ndarray:
        with torch.no_grad():
            rows = [model(**tokenizer(t, return_tensors="pt")).last_hidden_state[0].mean(0).numpy() for t in texts]
        return np.stack(rows)

    reference = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    reference.fit(features(data.train.first), data.train.labels)
    wanted = 100 * float(np.mean(reference.predict(features(data.test.first)) == np.asarray(data.test.labels)))
    found = evaluate(base, "m@1", suite.only(["mood"]), [PROBE], [0], tmp_path)
    assert found.get("mood", "linear-probing").values == (pytest.approx(wanted),)
