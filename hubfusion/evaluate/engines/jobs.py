"""Measure units as jobs of the Hub (Hugging Face Jobs, or local processes of the embedded Hub).

A job measures one group with ``hubfusion measure``: it downloads the model at its commit and writes results to the
results repository. The caller reads them there and starts another job for the rest of a group whose job died. The Hub
limits commits per hour, so a job commits at intervals and prints each result to its log at once; results that a dead
job had not committed are read from the log. If the caller dies, its jobs continue and the next caller reads their
results.
"""

from __future__ import annotations

import base64
import json
import secrets
import time
import zlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from hubfusion import __version__
from hubfusion.codec import dumps, loads, to_json
from hubfusion.errors import EvaluationError, FusionError, HubError
from hubfusion.evaluate.engines import Group, make_groups, refuse_lost
from hubfusion.evaluate.results import fetch_results
from hubfusion.evaluate.units import Result, Unit, parse_result
from hubfusion.hub import Hub, HubJob, RepoKind
from hubfusion.lineage import Revision

UV_IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm"
UV = ("uv", "run", "--with", f"hubfusion=={__version__}", "hubfusion")
MARK = "result"  # begins a line of the log
ORDER_BYTES = 100_000  # Linux takes 128 KiB in one argument


@dataclass(frozen=True, slots=True)
class Order:
    """The order of one job: units of one model on the Hub."""

    units: tuple[Unit, ...]


def write_order(units: Sequence[Unit]) -> str:
    """The units as one argument of a command."""
    text = base64.urlsafe_b64encode(zlib.compress(dumps(Order(tuple(units))).encode(), 9)).decode()
    if len(text) > ORDER_BYTES:
        raise EvaluationError(f"engine jobs: {len(units)} units are too many for one job, ask for fewer a worker")
    return text


def read_order(text: str) -> tuple[Unit, ...]:
    """The units of `write_order`; refuses an order of nothing or about several models."""
    try:
        plain = zlib.decompress(base64.urlsafe_b64decode(text))
    except (ValueError, zlib.error):
        raise EvaluationError(f"order: not one that this version writes: {text[:40]!r}") from None
    units = loads(Order, plain, "order").units
    if len({u.model for u in units}) != 1:
        raise EvaluationError("order: units of one model are needed")
    return units


def write_line(unit: Unit, result: Result) -> str:
    """A result as one line of a log."""
    return f"{MARK} {unit.key} {json.dumps(to_json(result))}"


def read_lines(lines: Iterable[str], units: Mapping[str, Unit]) -> Iterator[tuple[Unit, Result]]:
    """The results in a log that are about ``units`` (by key); lines of another form, or cut short, are passed over."""
    for line in lines:
        mark, _, rest = line.partition(" ")
        key, _, text = rest.partition(" ")
        if mark == MARK and key in units:
            with suppress(FusionError):
                yield units[key], parse_result(units[key], text, "log")


@dataclass(frozen=True, slots=True)
class HubJobs:
    """Which jobs, and on whose account.

    ``results``: the dataset repository that they write to, with ``hub``'s token as their secret. ``namespace`` pays.
    ``program`` starts hubfusion in ``image``; the default installs this version with uv. A job is ended after
    ``seconds``; ``at_once`` bounds how many there are at a time, ``most`` the units of one.
    It commits its results every ``push_seconds`` and at its end.
    """

    hub: Hub
    results: str
    namespace: str
    image: str = UV_IMAGE
    program: tuple[str, ...] = UV
    flavor: str = "cpu-basic"
    seconds: int = 6 * 3600
    at_once: int = 8
    most: int | None = None
    poll_seconds: float = 5.0
    push_seconds: float = 300.0
    environment: Mapping[str, str] = field(default_factory=dict)

    def measure(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Result]]:
        """Measure the units in jobs: the engine. The jobs fetch the model themselves."""
        self._refuse_local(units)
        self.hub.create(self.results, RepoKind.DATASET)
        head = None
        groups = make_groups(units, self.most)
        waiting, running = deque(groups), dict[str, Group]()
        try:
            while waiting or running:
                while waiting and len(running) < self.at_once:
                    group = waiting.popleft()
                    running[self._start(group)] = group
                time.sleep(self.poll_seconds)
                # States first: what a job had written when it was over is then read.
                states = {key: self.hub.job_state(self.namespace, key) for key in running}
                before, head = head, self.hub.resolve(self.results, kind=RepoKind.DATASET)
                if head != before or any(s.over for s in states.values()):
                    yield from self._collect(head, list(running.values()))
                for key, state in states.items():
                    if state.over:
                        group = running.pop(key)
                        last = yield from self._salvage(key, group)
                        if group.is_worth_another(f"{state.message}; {last}"):
                            waiting.append(group)
            refuse_lost(groups)
        finally:
            for key in running:
                with suppress(HubError):
                    self.hub.cancel_job(self.namespace, key)

    def _refuse_local(self, units: Sequence[Unit]) -> None:
        if "@" not in units[0].model:
            raise EvaluationError("engine jobs: the model must be on the Hub as OWNER/NAME, got a folder")
        if local := [u.dataset for u in units if u.dataset.is_local]:
            raise EvaluationError(f"engine jobs: dataset {local[0].name} must be on the Hub, got {local[0].repo}")

    def _start(self, group: Group) -> str:
        order = write_order(list(group.units.values()))
        command = (*self.program, "measure", order, "--results", self.results, "--every", str(self.push_seconds))
        nonce = secrets.token_hex(8)
        return self.hub.start_job(
            HubJob(self.namespace, self.image, command, self.flavor, self.seconds, nonce, self.environment)
        )

    def _salvage(self, key: str, group: Group) -> Generator[tuple[Unit, Result], None, str]:
        """What a job that is over said in its log and did not commit; returns the last line of the log."""
        lines: tuple[str, ...] = ()
        if group.units:
            with suppress(HubError):
                lines = self.hub.job_log(self.namespace, key)
        for unit, result in read_lines(lines, dict(group.units)):
            if group.take(unit.key) is not None:
                yield unit, result
        return lines[-1] if lines else "no log"

    def _collect(self, head: Revision, groups: Sequence[Group]) -> Iterator[tuple[Unit, Result]]:
        """What the results repository has of these groups at this commit."""
        owner = {key: group for group in groups for key in group.units}
        for unit, result in fetch_results(self.hub, head, [u for g in groups for u in g.units.values()]):
            owner[unit.key].take(unit.key)
            yield unit, result
