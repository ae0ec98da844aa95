"""`hubfusion evaluate`, `suite check`, `audit` and `recommend` as a user runs them, on two-layer models."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hubfusion.cli.commands import app
from hubfusion.codec import loads
from hubfusion.evaluate.scores import Scores
from tests.trainable_models import make_base, make_data, make_split, write_task

RUNNER = CliRunner(env={"COLUMNS": "200"})
RECIPES = """
[linear-probing]
examples = 60
training = { max_length = 16 }
[finetune]
examples = 60
training = { max_length = 16, batch_size = 16, epochs = 15, learning_rate = 0.01 }
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    make_base(folder / "base")
    make_base(folder / "other", seed=1)
    write_task(folder / "mood", make_data())
    (folder / "suite.toml").write_text(
        'name = "small"\nrepresentative = "mood"\n'
        '[[datasets]]\nname = "mood"\nrepo = "./mood"\nvalidation = "validation"\n'
    )
    (folder / "recipes.toml").write_text(RECIPES)
    split = make_split(60, 8)
    rows = [f"{text},{label}" for text, label in zip(split.first, split.labels, strict=True)]
    (folder / "own.csv").write_text("\n".join(["text,label", *rows]))
    return folder


def command(place: Path, *words: str) -> list[str]:
    shared = ["--suite", str(place / "suite.toml"), "--recipes", str(place / "recipes.toml")]
    return [*words, *shared, "--store", str(place / "store")]


def test_evaluate_prints_a_table_and_a_second_run_is_quick_and_without_torch(place):
    protocols = ["--protocol", "linear-probing,finetune", "--seeds", "0,1", "--out", str(place / "scores.json")]
    words = command(place, "evaluate", str(place / "base"), *protocols)
    result = RUNNER.invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "mood" in result.output and "±" in result.output and "mean" in result.output
    scores = loads(Scores, (place / "scores.json").read_bytes(), "scores.json")
    assert scores.get("mood", "finetune").mean > 80
    code = (
        "import sys; from hubfusion.cli.commands import app; app(sys.argv[1:], standalone_mode=False); "
        "sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    began = time.process_time()
    children = _child_seconds()
    again = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("(stored)") == 4
    assert _child_seconds() - children + time.process_time() - began < 3
    assert loads(Scores, (place / "scores.json").read_bytes(), "scores.json") == scores


def _child_seconds() -> float:
    """CPU seconds of finished children: what a quiet machine would show on the clock."""
    import resource

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_recommend_ranks_by_probing_and_tries_on_own_data(place):
    models = [str(place / "base"), str(place / "other")]
    words = command(place, "recommend", *models, "--data", str(place / "own.csv"), "--seeds", "0,1")
    result = RUNNER.invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "gain on your data" in result.output
    assert result.output.count("sha256:") == 2
    assert " to " in result.output


def test_jobs_need_a_place_for_their_results(place):
    words = command(place, "evaluate", str(place / "base"), "--engine", "jobs")
    result = subprocess.run([sys.executable, "-m", "hubfusion", *words], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "error: --engine jobs needs --results OWNER/NAME, where the jobs write\n"


def test_suite_check_passes_sound_data_and_fails_leaked_data(place):
    data = make_data()
    leaky = make_data(train=8)
    result = RUNNER.invoke(app, ["suite", "check", str(place / "suite.toml")])
    assert "mood" in result.output
    write_task(place / "leaky", leaky)
    (place / "leaky" / "test.jsonl").write_text((place / "leaky" / "train.jsonl").read_text())
    (place / "leaky.toml").write_text(
        'name = "leaky"\n[[datasets]]\nname = "leaky"\nrepo = "./leaky"\nvalidation = "validation"\n'
    )
    result = RUNNER.invoke(app, ["suite", "check", str(place / "leaky.toml"), "--against", str(place / "suite.toml")])
    assert result.exit_code == 1
    assert "leaky: 8 of 8 test texts are in train or validation" in result.output
    assert f"{place / 'suite.toml'}: mood" in result.output.replace("\n", "")
    assert len(data.train) == 96


def test_audit_of_an_honest_table_ends_well_and_of_a_wrong_one_does_not(place):
    rows = [[80 + i % 3, 60 + i % 2, 90 + i % 4] for i in range(7)]
    write = (place / "scores.csv").write_text
    write("model,a,b,c\n" + "".join(f"m{i},{a},{b},{c}\n" for i, (a, b, c) in enumerate(rows)))
    assert RUNNER.invoke(app, ["audit", str(place / "scores.csv")]).exit_code == 0
    rows[4] = [60, 91, 91]
    write("model,a,b,c\n" + "".join(f"m{i},{a},{b},{c}\n" for i, (a, b, c) in enumerate(rows)))
    result = RUNNER.invoke(app, ["audit", str(place / "scores.csv"), "--out", str(place / "findings.json")])
    assert result.exit_code == 1
    assert "b and its neighbor c are both 91.0000; fits when moved right from a" in result.output
    assert '"kind": "shifted"' in (place / "findings.json").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "/nowhere"], "neither a local folder"),
        (["evaluate", ".", "--suite", "glue"], "not a file, and not one of"),
        (["evaluate", ".", "--protocol", "magic"], "allowed are finetune"),
        (["audit", "/nowhere.csv"], "not a CSV file"),
    ],
)
def test_errors_are_one_line_with_the_way_out(words, message):
    result = subprocess.run([sys.executable, "-m", "hubfusion", *words], capture_output=True, text=True)
    assert result.returncode == 1
    assert message in result.stderr and "Traceback" not in result.stderr
