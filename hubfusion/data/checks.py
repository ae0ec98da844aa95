"""Check a suite's data: sizes, labels, duplicates, and test texts that occur in training data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hubfusion.data.loading import Data, Split, load
from hubfusion.data.suite import Dataset, Suite
from hubfusion.errors import EvaluationError


@dataclass(frozen=True, slots=True)
class DataReport:
    """What one dataset looks like. Shares are percent; ``majority`` is what the most frequent training label scores.

    ``repeated`` counts training examples whose text came before, ``contradicted`` those among them with another
    label; ``leaked`` counts test examples whose text is in train or validation. ``problems`` are sentences; a
    dataset that cannot be read has only those.
    """

    dataset: str
    sha: str
    train: int
    validation: int
    test: int
    labels: int
    majority: float
    repeated: int
    contradicted: int
    leaked: int
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Contamination:
    """``count`` test texts of ``test`` are in the training data of ``train``."""

    test: str
    train: str
    count: int


def fingerprints(split: Split) -> list[str]:
    """One text for each example by which to know it again: case and white space do not count."""
    second = split.second or ("",) * len(split)
    return [" ".join(f"{a} {b}".casefold().split()) for a, b in zip(split.first, second, strict=True)]


def inspect(data: Data) -> DataReport:
    """Report on one dataset that was read."""
    train, test = fingerprints(data.train), fingerprints(data.test)
    first: dict[str, int | float] = {}
    repeated = contradicted = 0
    for text, label in zip(train, data.train.labels, strict=True):
        if text in first:
            repeated += 1
            contradicted += first[text] != label
        first.setdefault(text, label)
    known = set(train) | set(fingerprints(data.validation))
    leaked = sum(t in known for t in test)
    majority = 0.0
    if not data.dataset.is_regression:
        most = Counter(data.train.labels).most_common(1)[0][0]
        majority = 100 * sum(y == most for y in data.test.labels) / len(data.test)
    sizes = (len(data.train), len(data.validation), len(data.test))
    problems = tuple(_problems(data, leaked, contradicted))
    return DataReport(
        data.dataset.name, data.sha, *sizes, len(data.labels), majority, repeated, contradicted, leaked, problems
    )


def _problems(data: Data, leaked: int, contradicted: int) -> Iterator[str]:
    published, own = data.dataset.test_size, data.dataset.own_test_size
    expected = published if own is None else own
    if expected is not None and expected != len(data.test):
        kind = "the published one" if own is None else "this substitute's"
        yield f"the test set has {len(data.test)} examples, {kind} {expected}"
    if not data.dataset.is_regression:
        missing = {*data.test.labels} - {*data.train.labels}
        if missing:
            yield f"{len(missing)} labels of the test set are never trained on, e.g. {data.labels[int(min(missing))]}"
        if len(data.labels) < 2:
            yield "there is only one label"
    if leaked:
        yield f"{leaked} of {len(data.test)} test texts are in train or validation"
    if contradicted:
        yield f"{contradicted} training texts come again with another label"
    if blank := sum(not t for t in fingerprints(data.test)):
        yield f"{blank} test texts are empty"


def check_suite(suite: Suite) -> Iterator[tuple[DataReport, Data | None]]:
    """Read each dataset and report; one that cannot be read is a report with its problem, and the others go on."""
    for dataset in suite.datasets:
        try:
            data = load(dataset)
        except EvaluationError as error:
            yield _unread(dataset, str(error)), None
        else:
            yield inspect(data), data


def _unread(dataset: Dataset, problem: str) -> DataReport:
    return DataReport(dataset.name, "", 0, 0, 0, 0, 0.0, 0, 0, 0, (problem,))


def find_contamination(tests: Mapping[str, Split], trains: Mapping[str, Split]) -> list[Contamination]:
    """Test texts of one dataset that occur in the training data of another, most first."""
    where: dict[str, list[str]] = {}
    for name, split in trains.items():
        for text in set(fingerprints(split)):
            where.setdefault(text, []).append(name)
    counts: Counter[tuple[str, str]] = Counter()
    for name, split in tests.items():
        for text in fingerprints(split):
            counts.update((name, other) for other in where.get(text, ()) if other != name and text)
    return [Contamination(test, train, n) for (test, train), n in counts.most_common()]
