"""Units on an existing Ray cluster (the extra ``ray`` on every node, the same version).

A task measures one group and streams its results; Ray places tasks by free CPUs and (fractions of) GPUs. When a node
dies, what is left of its groups goes to other nodes. The checkpoint travels through Ray's object store, once to each
node, so no shared folder is needed; datasets are read by the workers from the Hub (``HF_ENDPOINT`` is handed on), or
from a folder that must then be at the same path on every node.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hubfusion import install_command
from hubfusion.errors import EvaluationError
from hubfusion.evaluate.engines import make_groups, refuse_lost
from hubfusion.evaluate.units import MODEL_FILES, Result, Unit

log = logging.getLogger(__name__)

Files = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Cluster:
    """Which cluster, and what of it a group gets.

    ``address``: as `ray.init` takes it; ``auto`` finds ``RAY_ADDRESS`` or the cluster of this machine. ``gpus`` a
    group, may be a fraction (groups then share a GPU and its memory); None: one if the cluster has any. ``most``:
    units a group. ``environment``: variables of the workers.
    """

    address: str = "auto"
    gpus: float | None = None
    most: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def measure(self, checkpoint: Path, units: Sequence[Unit]) -> Iterator[tuple[Unit, Result]]:
        """Measure the units on the cluster; the engine, once it has its checkpoint."""
        with _connected(self) as ray:
            there = ray.cluster_resources().get("GPU", 0)
            gpus = self.gpus if self.gpus is not None else min(1, there)
            if gpus > there:
                log.warning("engine ray: %g GPUs a group, the cluster has %g; waiting until it has grown", gpus, there)
            task = ray.remote(_measure).options(
                num_cpus=1, num_gpus=gpus, num_returns="streaming", max_retries=0, scheduling_strategy="SPREAD"
            )
            files = ray.put(_pack(checkpoint))
            groups = make_groups(units, self.most)
            running = {task.remote(files, list(g.units.values())): g for g in groups}
            try:
                while running:
                    (stream,), _ = ray.wait(list(running), num_returns=1, fetch_local=False)
                    group = running[stream]
                    try:
                        key, result = ray.get(next(stream))
                    except (StopIteration, ray.exceptions.RayError) as error:
                        del running[stream]
                        if group.is_worth_another(_reason(error)):
                            running[task.remote(files, list(group.units.values()))] = group
                    else:
                        if (unit := group.take(key)) is not None:
                            yield unit, result
            finally:
                for stream in running:  # of a caller that stopped
                    ray.cancel(stream)
            refuse_lost(groups)


def _reason(error: Exception) -> str:
    if isinstance(error, StopIteration):
        return "the worker ended early"
    cause = getattr(error, "cause", None)  # what our own code raised on the worker
    return f"{type(cause).__name__}: {cause}" if cause else f"{type(error).__name__}: {error}"


@contextmanager
def _connected(cluster: Cluster) -> Iterator[Any]:
    """Ray, connected; a connection that was there already is used and kept."""
    try:
        import ray
    except ImportError:
        raise EvaluationError(f"engine ray: not installed, {install_command('ray')}") from None
    mine = not ray.is_initialized()
    if mine:
        try:
            environment = {"env_vars": dict(cluster.environment)}
            ray.init(address=cluster.address, runtime_env=environment, log_to_driver=False, logging_level="warning")
        except (ConnectionError, ValueError, RuntimeError) as error:
            line = " ".join(str(error).split())[:300]
            raise EvaluationError(f"engine ray: no cluster at {cluster.address!r}: {line}") from None
    try:
        yield ray
    finally:
        if mine:
            ray.shutdown()  # ends what still runs


def _pack(checkpoint: Path) -> Files:
    """The model's files as bytes; as arrays, the workers of one node read them without a copy each."""
    found = sorted(p for p in checkpoint.iterdir() if p.is_file() and p.name.endswith(MODEL_FILES))
    return {p.name: np.fromfile(p, dtype=np.uint8) for p in found}


def _measure(files: Files, units: list[Unit]) -> Iterator[tuple[str, Result]]:
    """Runs on a worker: unpack the checkpoint, measure, yield each unit's key and result."""
    from hubfusion.evaluate.measure import measure_units

    with tempfile.TemporaryDirectory(prefix="hubfusion-") as folder:
        for name, content in files.items():
            content.tofile(Path(folder) / name)
        for unit, result in measure_units(Path(folder), units):
            yield unit.key, result
