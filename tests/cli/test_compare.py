"""`hubfusion compare` and the folds of a suite: what was trained on and what was not, reported apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hubfusion.cli.commands import app
from hubfusion.codec import dumps
from hubfusion.data.suite import Family, load_suite
from hubfusion.errors import EvaluationError
from hubfusion.evaluate.scores import Provenance, Score, Scores

RUNNER = CliRunner(env={"COLUMNS": "200"})


def write(path: Path, **values: tuple[float, float]) -> str:
    entries = tuple(Score(d, "finetune", "accuracy", (0, 1), v, 200) for d, v in values.items())
    where = Provenance({"finetune": "1" * 16}, {d: f"{d}+key" for d in values}, {}, "cpu")
    path.write_text(dumps(Scores(path.stem, entries, where)))
    return str(path)


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    """Gains: rte +4, mnli +1, cb -10, sst2 +3."""
    return [
        write(tmp_path / "new.json", rte=(74, 74), mnli=(86, 88), cb=(60, 60), sst2=(95, 97)),
        write(tmp_path / "old.json", rte=(70, 70), mnli=(85, 87), cb=(70, 70), sst2=(92, 94)),
    ]


def lines(output: str) -> dict[str, list[str]]:
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    return {row[0]: row[1:] for row in cells}


def test_seen_and_unseen_are_reported_apart_and_the_noisy_left_out(pair: list[str]) -> None:
    done = RUNNER.invoke(app, ["compare", *pair, "--suite", "recycling36", "--seen", "rte,mnli"])
    assert done.exit_code == 0, done.output
    found = lines(done.output)
    assert found["all"][:2] == ["4", "-0.50"] and found["all"][4:] == ["3", "1", "cb by finetune -10.00"]
    assert found["all but the noisy"][:4:3] == ["3", "+3.00"]  # without cb: 4, 1 and 3
    assert found["seen"][:2] == ["2", "+2.50"]
    assert found["unseen"][:2] == ["2", "-3.50"]


def test_a_fold_says_what_is_unseen(pair: list[str]) -> None:
    found = lines(RUNNER.invoke(app, ["compare", *pair, "--suite", "recycling36", "--fold", "3"]).output)
    assert found["unseen"][:2] == ["2", "-3.00"]  # rte and cb
    assert found["seen"][:2] == ["2", "+2.00"]


def test_without_anything_said_there_is_one_line(pair: list[str]) -> None:
    assert set(lines(RUNNER.invoke(app, ["compare", *pair]).output)) == {"all"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fold", "1"], "--fold needs --suite"),
        (["--suite", "recycling36", "--fold", "4"], r"one of \[1, 2, 3\], got 4"),
        (["--suite", "offline", "--fold", "1"], r"one of \[\], got 1"),
        (["--seen", "qnli"], "--seen qnli was not measured"),
    ],
)
def test_what_cannot_be_compared_is_refused(pair: list[str], options: list[str], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        RUNNER.invoke(app, ["compare", *pair, *options], catch_exceptions=False)


def test_recycling36_has_three_folds_of_12_with_every_family_and_no_shared_texts() -> None:
    suite = load_suite("recycling36")
    folds = [suite.fold(n) for n in (1, 2, 3)]
    assert [(len(seen.datasets), len(unseen.datasets)) for seen, unseen in folds] == [(24, 12)] * 3
    assert len({d.name for _, unseen in folds for d in unseen.datasets}) == 36
    for _, unseen in folds:
        assert {d.family for d in unseen.datasets} >= set(Family) - {Family.DIALOGUE, Family.OTHER}
    for together in (("trec_fine", "trec_coarse"), ("sst2", "sst_5bins", "rotten_tomatoes"), ("wsc", "wnli")):
        assert len({suite.get(name).fold for name in together}) == 1


def test_a_fold_does_not_change_what_a_result_is_about() -> None:
    dataset = load_suite("recycling36").get("rte")
    assert replace(dataset, fold=None).key("a" * 40) == dataset.key("a" * 40)
