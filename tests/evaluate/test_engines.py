"""Engines: groups, and jobs of the embedded Hub that are killed in the middle; most tests have a short worker."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hubfusion.codec import loads
from hubfusion.data.suite import Dataset, load_suite
from hubfusion.errors import EvaluationError
from hubfusion.evaluate.engines import TRIES, Group, make_groups, refuse_lost
from hubfusion.evaluate.engines.jobs import HubJobs, read_lines, read_order, write_line, write_order
from hubfusion.evaluate.protocols import STANDARD, read_protocols
from hubfusion.evaluate.scores import Scores
from hubfusion.evaluate.units import Evaluated, Result, Unit, score_units
from hubfusion.hub import HubJob, RepoKind, connect
from hubfusion.localhub import LocalHub
from tests.offline import MODEL, RECIPES, machine, serve

PROBE = STANDARD["linear-probing"]
UNITS = [
    Unit(f"ann/base@{'b' * 40}", Dataset(name, f"org/{name}"), "a" * 40, PROBE, seed)
    for name in "xy"
    for seed in (0, 1, 2)
]

# What a job runs in these tests: `hubfusion measure`, which notes what it measures, and kills itself when told to.
WORKER = """
import os, signal, sys
from hubfusion.evaluate import results
from hubfusion.evaluate.engines import local
from hubfusion.evaluate.units import Result
from hubfusion.cli import main
place, real_push, real_measure = {place!r}, results.push, local.measure_here

def fake(checkpoint, units):
    for unit in units:
        data = unit.dataset.key(unit.sha)
        yield unit, Result(
            unit.model, data, unit.protocol.hash, unit.seed, "accuracy", 10.0 + unit.seed, 9, 9, 0.1, {{}}, "cpu"
        )

def measure(checkpoint, units):
    for unit, result in ({source})(checkpoint, units):
        print(unit.dataset.name, unit.seed, file=open(place + "/measured", "a"), flush=True)
        if {kill_before}:
            os.kill(os.getpid(), signal.SIGKILL)
        yield unit, result

def push(*arguments):
    count = real_push(*arguments)
    if count and {kill_after}:
        os.kill(os.getpid(), signal.SIGKILL)
    return count

def first():
    try:
        return os.close(os.open(place + "/killed", os.O_CREAT | os.O_EXCL)) is None
    except FileExistsError:
        return False

local.measure_here, results.push = measure, push
main()
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with serve(tmp_path_factory.mktemp("served")) as running:
        yield running


def jobs(hub: LocalHub, place: Path, source: str = "fake", before: str = "False", after: str = "False") -> HubJobs:
    """Jobs that run `WORKER`, and commit after each unit."""
    (place / "worker.py").write_text(
        WORKER.format(place=str(place), source=source, kill_before=before, kill_after=after)
    )
    return HubJobs(
        connect(hub.endpoint, "hf_ann"),
        "ann/" + place.name[:40].strip("_-"),
        "ann",
        image="none",
        program=(sys.executable, str(place / "worker.py")),
        at_once=2,
        poll_seconds=0.1,
        push_seconds=0,
        environment={n: v for n, v in machine(hub, place / "machine").items() if n not in ("PATH", "HF_TOKEN")},
    )


def units_on(hub: LocalHub) -> list[Unit]:
    sha = connect(hub.endpoint).resolve(MODEL).sha
    return [replace(u, model=f"{MODEL}@{sha}") for u in UNITS]


def measured(place: Path) -> list[str]:
    return (place / "measured").read_text().splitlines()


def test_groups_are_the_units_of_one_dataset_at_most_so_many() -> None:
    mixed = [UNITS[i] for i in (0, 3, 1, 4, 2, 5)]
    assert [[u.dataset.name + str(u.seed) for u in g.units.values()] for g in make_groups(mixed)] == [
        ["x0", "x1", "x2"],
        ["y0", "y1", "y2"],
    ]
    assert [len(g.units) for g in make_groups(mixed, 2)] == [2, 1, 2, 1]
    with pytest.raises(EvaluationError, match="at least 1, got 0"):
        make_groups(mixed, 0)


def test_a_group_is_given_up_after_three_deaths_in_a_row_and_a_result_in_between_counts() -> None:
    group = Group({u.key: u for u in UNITS[:3]})
    assert group.is_worth_another("one") and group.is_worth_another("two")
    assert group.take(UNITS[0].key) == UNITS[0] and group.take(UNITS[0].key) is None
    assert group.is_worth_another("three") and group.is_worth_another("four")
    assert not group.is_worth_another("five")
    with pytest.raises(EvaluationError, match="2 units were given up .* x by linear-probing with seed 1: five"):
        refuse_lost([group, Group({})])


def test_an_order_is_read_as_it_was_written_and_nothing_else_is() -> None:
    assert read_order(write_order(UNITS)) == tuple(UNITS)
    assert [u.key for u in read_order(write_order(UNITS))] == [u.key for u in UNITS]
    with pytest.raises(EvaluationError, match="not one that this version writes"):
        read_order("bm90aGluZw==")
    with pytest.raises(EvaluationError, match="units of one model"):
        read_order(write_order([UNITS[0], replace(UNITS[1], model="m@2")]))


def test_a_log_is_read_for_the_units_asked_for_and_a_line_cut_short_is_passed_over() -> None:
    results = [
        Result(u.model, u.dataset.key(u.sha), PROBE.hash, u.seed, "accuracy", 50.0, 9, 9, 0.1, {}, "cpu") for u in UNITS
    ]
    lines = [write_line(u, r) for u, r in zip(UNITS, results, strict=True)]
    wanted = {u.key: u for u in UNITS[:3]}
    log = ["loading", lines[4], lines[0], lines[1][:-9], "result", ""]
    assert list(read_lines(log, wanted)) == [(UNITS[0], results[0])]


def test_jobs_refuse_what_only_this_machine_has(tmp_path: Path) -> None:
    engine = HubJobs(connect("http://127.0.0.1:1", "hf_ann"), "ann/results", "ann")
    with pytest.raises(EvaluationError, match="the model must be on the Hub"):
        list(engine.measure([replace(UNITS[0], model="sha256:0")]))
    local = replace(UNITS[0], dataset=Dataset("mine", str(tmp_path)))
    with pytest.raises(EvaluationError, match="dataset mine must be on the Hub"):
        list(engine.measure([local]))


def test_a_job_killed_in_the_middle_costs_nothing_that_it_had_written(hub: LocalHub, tmp_path: Path) -> None:
    engine, units = jobs(hub, tmp_path, after="first()"), units_on(hub)
    found = list(engine.measure(units))
    assert sorted((u.dataset.name, u.seed, r.value) for u, r in found) == [
        ("x", 0, 10.0), ("x", 1, 11.0), ("x", 2, 12.0), ("y", 0, 10.0), ("y", 1, 11.0), ("y", 2, 12.0),
    ]  # fmt: skip
    assert sorted(measured(tmp_path)) == ["x 0", "x 1", "x 2", "y 0", "y 1", "y 2"]
    assert (tmp_path / "killed").exists()
    head = engine.hub.resolve(engine.results, kind=RepoKind.DATASET)
    assert sum(f.path.startswith("results/") for f in engine.hub.files(head, RepoKind.DATASET)) == 6


def test_what_another_caller_measured_meanwhile_is_read_not_measured(hub: LocalHub, tmp_path: Path) -> None:
    engine, units = replace(jobs(hub, tmp_path), at_once=1), units_on(hub)
    stream = engine.measure(units)
    found = [next(stream)]
    list(engine.measure(units[3:]))  # before the first caller has come to this group
    found += stream
    assert len(found) == 6
    assert sorted(measured(tmp_path)) == ["x 0", "x 1", "x 2", "y 0", "y 1", "y 2"]


def test_a_job_killed_with_a_unit_in_hand_costs_that_unit(hub: LocalHub, tmp_path: Path) -> None:
    """It had committed nothing yet: what it measured before is in its log."""
    engine, units = jobs(hub, tmp_path, before='(unit.dataset.name, unit.seed) == ("y", 1) and first()'), units_on(hub)
    found = list(replace(engine, push_seconds=600).measure(units))
    assert sorted((u.dataset.name, u.seed, r.value) for u, r in found) == [
        (name, seed, 10.0 + seed) for name in "xy" for seed in (0, 1, 2)
    ]
    assert sorted(measured(tmp_path)) == ["x 0", "x 1", "x 2", "y 0", "y 1", "y 1", "y 2"]


def test_a_unit_that_kills_every_job_is_given_up_and_the_others_are_done(
    hub: LocalHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine, units = jobs(hub, tmp_path, before='(unit.dataset.name, unit.seed) == ("y", 1)'), units_on(hub)
    found = []
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(EvaluationError, match="2 units were given up .*seed 1: error"),
    ):
        for unit, _ in engine.measure(units):
            found.append((unit.dataset.name, unit.seed))
    assert sorted(found) == [("x", 0), ("x", 1), ("x", 2), ("y", 0)]
    assert measured(tmp_path).count("y 1") == TRIES
    assert sum("units left" in m for m in caplog.messages) == TRIES


def test_a_caller_that_stops_cancels_its_jobs(hub: LocalHub, tmp_path: Path) -> None:
    engine = jobs(hub, tmp_path, source="lambda *_: iter([__import__('time').sleep(600)])")
    stream = engine.measure(units_on(hub)[:3])
    before = hub.hub.jobs.running()

    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hubfusion.evaluate.engines.jobs.time.sleep", stop)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    deadline = time.monotonic() + 10
    while hub.hub.jobs.running() - before:
        assert time.monotonic() < deadline, "the job still runs"
        time.sleep(0.05)


def test_a_unit_that_comes_twice_counts_once(tmp_path: Path) -> None:
    def twice(units: list[Unit]) -> Iterator[tuple[Unit, Result]]:
        for unit in [*units, *units]:
            data = unit.dataset.key(unit.sha)
            yield unit, Result(unit.model, data, PROBE.hash, unit.seed, "accuracy", 50.0, 9, 9, 0.1, {}, "cpu")

    events: list[Evaluated] = []
    scores = score_units(UNITS, tmp_path, twice, on_event=events.append)  # type: ignore[arg-type]
    assert [e.done for e in events] == [1, 2, 3, 4, 5, 6]
    assert [s.seeds for s in scores] == [(0, 1, 2), (0, 1, 2)]


def test_a_job_is_started_once_for_a_nonce_and_one_that_is_unknown_is_over(hub: LocalHub) -> None:
    client = connect(hub.endpoint, "hf_ann")
    job = HubJob("ann", "none", ("sh", "-c", "echo $HF_TOKEN $A; exit 3"), "cpu-basic", 60, "n1", {"A": "1"})
    key = client.start_job(job)
    assert client.start_job(job) == key
    assert client.start_job(replace(job, nonce="n2")) != key
    deadline = time.monotonic() + 20
    while not (state := client.job_state("ann", key)).over:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert state.message == "error: exit code 3"
    assert client.job_log("ann", key) == ("hf_ann 1",)
    client.cancel_job("ann", key)  # is over, and stays so
    assert client.job_state("ann", key) == state
    assert client.job_state("ann", "0" * 24).over


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_jobs_give_the_numbers_of_one_process_though_one_of_them_is_killed(hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "recipes.toml").write_text(RECIPES)
    protocols = list(read_protocols(tmp_path / "recipes.toml").values())
    reader = connect(hub.endpoint)
    units = [
        Unit(
            f"{MODEL}@{reader.resolve(MODEL).sha}",
            dataset,
            reader.resolve(dataset.repo, kind=RepoKind.DATASET).sha,
            p,
            seed,
        )
        for dataset in load_suite("offline").datasets
        for p in protocols
        for seed in (0, 1)
    ]
    engine = jobs(hub, tmp_path, source="real_measure", after="first()")
    scores = score_units(units, tmp_path / "store", engine.measure)
    assert (tmp_path / "killed").exists()
    assert len(measured(tmp_path)) == len(units) == 30
    options = f"--recipes {tmp_path}/recipes.toml --seeds 0,1 --out {tmp_path}/here.json"
    words = f"evaluate {MODEL} --suite offline --protocol {','.join(p.name for p in protocols)} {options}"
    here = machine(hub, tmp_path / "here", token=None)
    subprocess.run([sys.executable, "-m", "hubfusion", *words.split()], env=here, check=True, capture_output=True)
    assert scores == loads(Scores, (tmp_path / "here.json").read_bytes(), "here.json")
