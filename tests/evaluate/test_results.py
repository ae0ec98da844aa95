"""Results on the Hub: pulled before, pushed after, by several writers, and an evaluation that another machine reads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hubfusion.codec import loads
from hubfusion.data.suite import Dataset
from hubfusion.errors import Conflict, EvaluationError, HubError
from hubfusion.evaluate.protocols import STANDARD
from hubfusion.evaluate.results import pull, push, shared
from hubfusion.evaluate.scores import Scores
from hubfusion.evaluate.units import Evaluated, Result, Unit, path_of, read_result, write_result
from hubfusion.hub import Change, RepoKind, connect
from hubfusion.localhub import LocalHub
from tests.fake_hub import FakeHub
from tests.offline import MODEL, RECIPES, RESULTS, machine, serve

UNITS = [Unit("m@1", Dataset(name, f"org/{name}"), "a" * 40, STANDARD["finetune"], s) for name in "xy" for s in (0, 1)]


def result(unit: Unit, value: float) -> Result:
    key = unit.dataset.key(unit.sha)
    return Result(
        unit.model, key, unit.protocol.hash, unit.seed, "accuracy", value, 50, 100, 1.0, {"torch": "2"}, "cpu"
    )


def test_what_one_machine_pushed_another_pulls_and_nothing_is_pushed_twice(tmp_path: Path) -> None:
    hub = FakeHub()
    for number, unit in enumerate(UNITS[:3]):
        write_result(tmp_path / "a", unit, result(unit, 60.0 + number))
    assert push(hub, "ann/results", UNITS, tmp_path / "a") == 3
    assert push(hub, "ann/results", UNITS, tmp_path / "a") == 0
    assert [commit.title for commit in hub.history("ann/results")] == ["3 results of m@1", "initial commit"]
    assert pull(hub, "ann/results", UNITS, tmp_path / "b") == 3
    found = [read_result(tmp_path / "b", unit) for unit in UNITS]
    assert [r and r.value for r in found] == [60.0, 61.0, 62.0, None]


def test_a_full_store_asks_the_hub_for_nothing(tmp_path: Path) -> None:
    hub = FakeHub()
    for unit in UNITS:
        write_result(tmp_path, unit, result(unit, 1.0))
    assert pull(hub, "ann/nowhere", UNITS, tmp_path) == 0
    assert hub.requests == 0


def test_a_missing_repository_is_an_empty_one_and_a_foreign_result_is_refused(tmp_path: Path) -> None:
    hub = FakeHub()
    assert pull(hub, "ann/results", UNITS, tmp_path) == 0
    write_result(tmp_path / "a", UNITS[0], replace(result(UNITS[0], 1.0), model="m@2"))
    file = (tmp_path / "a" / path_of(UNITS[0])).read_bytes()
    hub.add("ann/results", {f"results/{path_of(UNITS[0])}": file})
    with pytest.raises(EvaluationError, match="is about m@2"):
        pull(hub, "ann/results", UNITS, tmp_path)


class Raced(FakeHub):
    """A Hub where somebody else commits first, a few times."""

    races = 2

    def commit(self, repo: str, change: Change, kind: RepoKind = RepoKind.MODEL) -> str:
        if self.races:
            self.races -= 1
            tree = self.commits[repo][-1][1]
            self.add(repo, tree | {f"theirs-{self.races}": b""}, f"theirs {self.races}")
            raise Conflict(f"{repo}: main moved")
        return super().commit(repo, change, kind)


def test_a_lost_race_is_run_again_and_both_writers_results_are_there(tmp_path: Path) -> None:
    hub = Raced()
    write_result(tmp_path, UNITS[0], result(UNITS[0], 1.0))
    assert push(hub, "ann/results", UNITS, tmp_path) == 1
    head = hub.resolve("ann/results")
    assert {f.path for f in hub.files(head)} == {"theirs-0", "theirs-1", f"results/{path_of(UNITS[0])}"}


def test_a_run_that_fails_has_pushed_what_it_measured(tmp_path: Path) -> None:
    hub, seen = FakeHub(), []
    with pytest.raises(KeyboardInterrupt), shared(hub, "ann/results", UNITS, tmp_path, every=0) as note:
        for unit in UNITS[:2]:
            write_result(tmp_path, unit, result(unit, 1.0))
            note(Evaluated(unit.dataset.name, "finetune", unit.seed, 1.0, False, 1, 4))
            seen.append(len(hub.files(hub.resolve("ann/results"))))
        write_result(tmp_path, UNITS[2], result(UNITS[2], 1.0))
        raise KeyboardInterrupt
    assert seen == [1, 2]
    assert len(hub.files(hub.resolve("ann/results"))) == 3


class Closed(FakeHub):
    """A Hub that takes no commits for a while."""

    closed = True

    def commit(self, repo: str, change: Change, kind: RepoKind = RepoKind.MODEL) -> str:
        if self.closed:
            raise HubError("HTTP 503")
        return super().commit(repo, change, kind)


def test_a_hub_that_takes_nothing_in_between_gets_all_at_the_end(tmp_path: Path) -> None:
    hub = Closed()
    with shared(hub, "ann/results", UNITS, tmp_path, every=0) as note:
        write_result(tmp_path, UNITS[0], result(UNITS[0], 1.0))
        note(Evaluated("x", "finetune", 0, 1.0, False, 1, 4))
        hub.closed = False
    assert len(hub.files(hub.resolve("ann/results"))) == 1


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with serve(tmp_path_factory.mktemp("served")) as running:
        yield running


def test_the_files_that_are_there_are_found_among_many_paths(hub: LocalHub) -> None:
    client = connect(hub.endpoint)
    head = client.resolve(MODEL)
    paths = [*(f"results/{i}" for i in range(1200)), "config.json", "results"]
    assert client.present(head, paths) == {"config.json"}


CODE = """
import sys
from hubfusion.cli.commands import app
app(sys.argv[1:], standalone_mode=False)
sys.exit(", ".join(sorted({"torch", "transformers", "datasets", "sklearn"} & set(sys.modules))) or 0)
"""


def test_a_model_on_the_hub_is_scored_once_for_all_machines(hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "recipes.toml").write_text(RECIPES)
    words = f"evaluate {MODEL} --suite offline --protocol linear-probing,finetune,few-shot --results {RESULTS}"
    command = [*words.split(), "--recipes", str(tmp_path / "recipes.toml"), "--out"]
    first = subprocess.run(
        [sys.executable, "-m", "hubfusion", *command, str(tmp_path / "first.json")],
        env=machine(hub, tmp_path / "one"), capture_output=True, text=True,
    )  # fmt: skip
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("(measured)") == 15
    for word in ("newsgroups", "reuters_r8", "reuters_r52", "election_tweets", "friends", "few-shot", "mean"):
        assert word in first.stdout
    again = subprocess.run(
        [sys.executable, "-c", CODE, *command, str(tmp_path / "again.json")],
        env=machine(hub, tmp_path / "two", token=None), capture_output=True, text=True,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("(stored)") == 15
    assert not (tmp_path / "two" / "cache" / "hubfusion" / "models").exists()  # nor was the model downloaded
    scores = [loads(Scores, (tmp_path / f"{name}.json").read_bytes(), name) for name in ("first", "again")]
    assert scores[0] == scores[1]
    assert scores[0].mean("finetune") > 60


def test_the_offline_suite_is_checked_from_the_hub(hub: LocalHub, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hubfusion", "suite", "check", "offline"],
        env=machine(hub, tmp_path / "one", token=None), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reuters_r52" in done.stdout
