"""The Ray engine on a cluster of two nodes on this machine, one of which is killed in the middle."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hubfusion.data.suite import Suite
from hubfusion.errors import EvaluationError
from hubfusion.evaluate.engines.local import evaluate
from hubfusion.evaluate.engines.ray import Cluster
from hubfusion.evaluate.protocols import Protocol
from hubfusion.evaluate.units import Evaluated, plan_units, score_units
from hubfusion.train import Mode, Training
from tests.trainable_models import make_base, make_data, write_task

pytest.importorskip("ray", reason="ray is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

QUICK = Training(learning_rate=1e-3, batch_size=8, epochs=10, max_length=16)
PROTOCOLS = [Protocol("linear-probing", replace(QUICK, mode=Mode.HEAD)), Protocol("finetune", QUICK)]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head node and another one, a CPU each; both find this checkout."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster as Nodes

    size = 100 << 20
    head = {"num_cpus": 1, "object_store_memory": size, "include_dashboard": False}
    nodes = Nodes(initialize_head=True, head_node_args=head)
    yield nodes
    nodes.shutdown()


def test_a_node_that_dies_costs_units_in_hand_and_none_comes_twice(
    cluster: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = make_base(tmp_path / "base")
    suite = Suite("four", tuple(write_task(tmp_path / n, make_data(name=n)) for n in ("a", "b", "c", "d")))
    units = plan_units("m@1", suite, PROTOCOLS, range(3))
    doomed = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    events: list[Evaluated] = []

    def kill(event: Evaluated) -> None:
        nonlocal doomed
        events.append(event)
        if doomed is not None and len({e.dataset for e in events}) == 2:  # each node is in the middle of a dataset
            cluster.remove_node(doomed, allow_graceful=False)
            doomed = None

    engine = Cluster(cluster.address)
    with caplog.at_level(logging.WARNING, "hubfusion"):
        scores = score_units(units, tmp_path / "ray", lambda missing: engine.measure(base, missing), on_event=kill)
    assert doomed is None
    assert len([m for m in caplog.messages if "handed out again" in m]) == 1
    assert [e.done for e in events] == list(range(1, 25))
    assert len({(e.dataset, e.protocol, e.seed) for e in events}) == 24
    here = evaluate(base, "m@1", suite, PROTOCOLS, range(3), tmp_path / "here")
    assert here.entries == scores.entries


def test_a_caller_that_stops_leaves_no_task_on_a_connection_that_it_found(cluster: Any, tmp_path: Path) -> None:
    import ray

    base = make_base(tmp_path / "base")
    suite = Suite("one", (write_task(tmp_path / "a", make_data(name="a")),))
    units = plan_units("m@1", suite, PROTOCOLS, range(200))
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        stream = Cluster().measure(base, units)
        next(stream)
        stream.close()
        assert ray.is_initialized()
        deadline = time.monotonic() + 30
        while ray.available_resources().get("CPU") != 1:
            assert time.monotonic() < deadline, "the task still runs"
            time.sleep(0.2)
    finally:
        ray.shutdown()


def test_without_a_cluster_the_error_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(EvaluationError, match="engine ray: no cluster at 'auto': Could not find any running Ray"):
        list(Cluster().measure(tmp_path, []))
