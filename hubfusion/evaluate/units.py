"""checkpoint + suite + protocols + seeds -> Scores, reusing stored results.

The unit of work is (model, dataset, protocol, seed). Its result is one JSON file, named by the digest of its inputs and
written atomically, so a run that dies loses at most one unit. Heavy packages are imported only if a unit is missing, so
a second call takes the time of reading a few files. An engine measures missing units: in this process, or one of
`hubfusion.evaluate.engines`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hubfusion.codec import digest, dumps, loads
from hubfusion.data.loading import resolve
from hubfusion.data.suite import Dataset, Suite
from hubfusion.errors import EvaluationError
from hubfusion.evaluate.protocols import Protocol
from hubfusion.evaluate.scores import Provenance, Score, Scores

log = logging.getLogger(__name__)
MODEL_FILES = (".safetensors", ".json", ".txt", ".model")  # what a model is loaded from, by suffix
CONTENT = ("config.json", "tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model")


@dataclass(frozen=True, slots=True)
class Unit:
    """One thing to be measured: this model on this dataset (at this commit) under this protocol with this seed."""

    model: str
    dataset: Dataset
    sha: str
    protocol: Protocol
    seed: int

    @property
    def key(self) -> str:
        """Digest of everything the number depends on; the file's name in the store."""
        return digest([self.model, self.dataset.key(self.sha), self.protocol.hash, self.seed])


@dataclass(frozen=True, slots=True)
class Result:
    """One measured number (percent) and how it was made: test and training examples, seconds, versions, device."""

    model: str
    data: str
    recipe: str
    seed: int
    metric: str
    value: float
    examples: int
    train_examples: int
    seconds: float
    versions: Mapping[str, str]
    device: str


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Progress: one more unit is known. ``stored`` if it came from the store; ``done`` of ``total`` so far."""

    dataset: str
    protocol: str
    seed: int
    value: float
    stored: bool
    done: int
    total: int


# Measures units: yields each with its result as it becomes known, in any order.
Engine = Callable[[Sequence[Unit]], Iterator[tuple[Unit, Result]]]


def content_key(checkpoint: Path) -> str:
    """``sha256:…`` over the weights, config and tokenizer of a folder: the model key of one that is not on the Hub."""
    hasher = hashlib.sha256()
    files = sorted(p for p in checkpoint.iterdir() if p.suffix == ".safetensors" or p.name in CONTENT)
    if not any(p.suffix == ".safetensors" for p in files):
        raise EvaluationError(f"{checkpoint}: no safetensors file")
    for path in files:
        with path.open("rb") as file:
            hasher.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{hasher.hexdigest()}"


def plan_units(model: str, suite: Suite, protocols: Sequence[Protocol], seeds: Sequence[int]) -> tuple[Unit, ...]:
    """Everything that `evaluate` measures, each dataset at the commit that its revision stands for now."""
    names = [p.name for p in protocols]
    if not names or not seeds or len(set(names)) < len(names) or len(set(seeds)) < len(seeds):
        raise EvaluationError(f"evaluate: protocols and seeds must be given once each, got {names} and {list(seeds)}")
    for protocol in protocols:
        for name in protocol.datasets or ():
            suite.get(name)  # refuses a dataset that the suite lacks
    with ThreadPoolExecutor(8) as pool:
        shas = list(pool.map(resolve, suite.datasets))
    units = tuple(
        Unit(model, d, sha, p, s)
        for d, sha in zip(suite.datasets, shas, strict=True)
        for p in protocols
        if p.datasets is None or d.name in p.datasets
        for s in seeds
    )
    if not units:
        raise EvaluationError(f"evaluate: the protocols {names} are kept from every dataset of suite {suite.name}")
    return units


def score_units(
    units: Sequence[Unit], store: Path, engine: Engine, *, on_event: Callable[[Evaluated], None] | None = None
) -> Scores:
    """Gather the units of one model from the store; what is missing is measured by ``engine`` and stored.

    A unit that comes twice (its worker was thought dead, and was not) counts once.
    """
    results: dict[str, Result] = {}
    for unit in units:
        if (stored := read_result(store, unit)) is not None:
            results[unit.key] = stored
            _tell(on_event, unit, stored, True, len(results), len(units))
    missing = [u for u in units if u.key not in results]
    log.info("evaluate %s: %d units, %d in the store", units[0].model, len(units), len(results))
    if missing:
        for unit, result in engine(missing):
            if unit.key not in results:
                write_result(store, unit, result)
                results[unit.key] = result
                _tell(on_event, unit, result, False, len(results), len(units))
    return collect(units[0].model, units, results)


def collect(model: str, units: Sequence[Unit], results: Mapping[str, Result]) -> Scores:
    """Gather the results of all ``units`` (by key) into one `Scores`."""
    groups: dict[tuple[str, str], list[tuple[int, Result]]] = {}
    for unit in units:
        groups.setdefault((unit.dataset.name, unit.protocol.name), []).append((unit.seed, results[unit.key]))
    entries = []
    for (dataset, protocol), found in groups.items():
        first = found[0][1]
        entries.append(
            Score(
                dataset,
                protocol,
                first.metric,
                tuple(s for s, _ in found),
                tuple(r.value for _, r in found),
                first.examples,
            )
        )
    devices = sorted({r.device for r in results.values()})
    versions: dict[str, str] = {}
    for result in results.values():
        for package, version in result.versions.items():
            versions[package] = ", ".join(sorted({version, *filter(None, versions.get(package, "").split(", "))}))
    provenance = Provenance(
        {u.protocol.name: u.protocol.hash for u in units},
        {u.dataset.name: u.dataset.key(u.sha) for u in units},
        versions,
        ", ".join(devices),
    )
    return Scores(model, tuple(entries), provenance)


def path_of(unit: Unit) -> str:
    """Where the unit's result lies in a store, relative to its root."""
    return f"{unit.key[:2]}/{unit.key}.json"


def read_result(store: Path, unit: Unit) -> Result | None:
    """The stored result of this unit, None if there is none; one that is about something else is an error."""
    path = store / path_of(unit)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    return parse_result(unit, text, str(path))


def parse_result(unit: Unit, text: str | bytes, where: str) -> Result:
    """The result in this JSON text; `EvaluationError` if it is about anything but ``unit``."""
    result = loads(Result, text, where)
    if (result.model, result.data, result.recipe, result.seed) != (
        unit.model,
        unit.dataset.key(unit.sha),
        unit.protocol.hash,
        unit.seed,
    ):
        raise EvaluationError(f"{where}: is about {result.model}, seed {result.seed}; delete it to measure again")
    return result


def write_result(store: Path, unit: Unit, result: Result) -> None:
    """Store a result: written beside and renamed, so a reader sees all of it or none."""
    path = store / path_of(unit)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(dumps(result))
    os.replace(file.name, path)


def _tell(
    on_event: Callable[[Evaluated], None] | None, unit: Unit, result: Result, stored: bool, done: int, total: int
) -> None:
    if on_event:
        on_event(Evaluated(unit.dataset.name, unit.protocol.name, unit.seed, result.value, stored, done, total))
