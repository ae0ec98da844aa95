"""Evaluation suites as typed data: which dataset, which columns, which splits, which metric, and the reason for each.

A suite is a TOML file. ``hubfusion/data/suites/`` has those that ship; any other path works as well. Datasets are read
from the Hub (``HF_ENDPOINT``) at a pinned commit, without a token: what is scored must be public.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from importlib import resources
from pathlib import Path

from hubfusion.codec import digest, from_json, parse_toml, to_json
from hubfusion.errors import EvaluationError, FusionError


class Metric(StrEnum):
    """What is reported; all in [0, 1] (Spearman in [-1, 1]) before they become percentages."""

    ACCURACY = "accuracy"
    MACRO_F1 = "macro_f1"
    MATTHEWS = "matthews"
    SPEARMAN = "spearman"


class Family(StrEnum):
    """The families of Model Recycling, and two more."""

    GENERAL = "general"
    TOPIC = "topic"
    SENTIMENT = "sentiment"
    TWITTER = "twitter"
    NLI = "nli"
    DIALOGUE = "dialogue"
    OTHER = "other"


class Cut(StrEnum):
    """How a validation split is cut from train when the dataset has none to spare.

    ``edges`` (Model Recycling's GLUE rule): the first and last 5 %, or 500 examples each when train has more than
    10,000. ``tenth`` (Where to start?, App. C): the smaller of 10 % and 1,000 examples, drawn at random.
    """

    EDGES = "edges"
    TENTH = "tenth"


@dataclass(frozen=True, slots=True)
class Dataset:
    """One task: where it lies on the Hub and how it is read.

    ``repo`` is a Hub id, or a local folder (``/…``, ``./…``) with a parquet, CSV or JSON lines file for each split.
    ``text``: the column(s); the first is the first segment, the others joined by a space the second. ``label``: the
    label column. Rows without a label (null, NaN, -1 in a column with class names) are left out; -1 in a column without
    class names is refused, because it may be a class. ``bins``: turn a label in [0, 1] into ``int(label * bins)``.
    ``validation`` None cuts one from train by ``cut``. A split may pool several (``a+b``). ``hold_out``: ``test`` names
    the same split as ``train``, and ``test_cap`` examples are drawn from it for the test. The caps keep a fixed random
    part of a split. ``test_size``: of the published test set; ``own_test_size``: of the one in ``repo``, where that is
    a substitute of another size. ``noisy``: small or at chance level, so its score moves by points between seeds.
    ``fold``: the fold of a cross-validation over datasets in which nobody trains on it. ``note``: why this source.
    """

    name: str
    repo: str
    text: tuple[str, ...] = ("text",)
    label: str = "label"
    config: str | None = None
    revision: str | None = None
    train: str = "train"
    validation: str | None = None
    test: str = "test"
    cut: Cut = Cut.TENTH
    metric: Metric = Metric.ACCURACY
    family: Family = Family.OTHER
    bins: int | None = None
    hold_out: bool = False
    train_cap: int | None = None
    validation_cap: int | None = None
    test_cap: int | None = None
    test_size: int | None = None
    own_test_size: int | None = None
    noisy: bool = False
    fold: int | None = None
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse a task without text columns or with empty caps."""
        if not self.text:
            raise EvaluationError(f"dataset {self.name}: at least one text column is needed, got none")
        if self.hold_out and (self.test_cap is None or self.test != self.train):
            raise EvaluationError(f"dataset {self.name}: hold_out needs test = train and a test_cap")
        if not self.hold_out and self.test in (self.train, self.validation):
            raise EvaluationError(f"dataset {self.name}: the test split {self.test} is also trained or chosen on")
        for key in ("train_cap", "validation_cap", "test_cap"):
            if (cap := getattr(self, key)) is not None and cap < 1:
                raise EvaluationError(f"dataset {self.name}: {key} must be at least 1, got {cap}")

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits to read, each once."""
        named = [s for s in (self.train, self.validation, self.test) if s is not None]
        return tuple(sorted({part for s in named for part in s.split("+")}))

    @property
    def is_local(self) -> bool:
        """Whether ``repo`` is a folder on this machine."""
        return self.repo.startswith(("/", "./", "../"))

    @property
    def is_regression(self) -> bool:
        """Whether the label is a number to be predicted rather than a class."""
        return self.metric is Metric.SPEARMAN

    def key(self, sha: str) -> str:
        """What was read: the commit and 16 digits for how; notes, folds and families do not change it."""
        spec = to_json(self)
        for name in ("repo", "family", "note", "noisy", "fold", "test_size", "own_test_size", "revision"):
            del spec[name]
        return f"{sha}+{digest(spec)}"


@dataclass(frozen=True, slots=True)
class Suite:
    """A named list of datasets; names are unique."""

    name: str
    datasets: tuple[Dataset, ...]
    description: str = ""
    representative: str | None = None

    def __post_init__(self) -> None:
        """Refuse a name that comes twice, an empty suite, and an unknown representative."""
        names = [d.name for d in self.datasets]
        if not names:
            raise EvaluationError(f"suite {self.name}: at least one dataset is needed")
        if len(set(names)) < len(names):
            raise EvaluationError(f"suite {self.name}: {next(n for n in names if names.count(n) > 1)} comes twice")
        if self.representative is not None and self.representative not in names:
            raise EvaluationError(f"suite {self.name}: representative {self.representative} is not one of its datasets")

    def get(self, name: str) -> Dataset:
        """The dataset of this name; `EvaluationError` lists the known ones."""
        for dataset in self.datasets:
            if dataset.name == name:
                return dataset
        raise EvaluationError(f"suite {self.name}: no {name}, there is {', '.join(d.name for d in self.datasets)}")

    def only(self, names: Sequence[str]) -> Suite:
        """The suite cut down to these datasets, in this order."""
        return replace(self, datasets=tuple(self.get(n) for n in names), representative=None)

    def fold(self, number: int) -> tuple[Suite, Suite]:
        """The seen datasets of a fold, to contribute with, and the unseen ones, to evaluate on as well."""
        unseen = [d.name for d in self.datasets if d.fold == number]
        if not unseen or len(unseen) == len(self.datasets):
            known = sorted({d.fold for d in self.datasets if d.fold is not None})
            raise EvaluationError(f"suite {self.name}: fold must be one of {known}, got {number}")
        return self.only([d.name for d in self.datasets if d.name not in unseen]), self.only(unseen)


def shipped_suites() -> tuple[str, ...]:
    """Names of the suites in the package."""
    folder = resources.files("hubfusion.data") / "suites"
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))


def load_suite(name: str | Path) -> Suite:
    """A shipped suite by name, or one from a TOML file by path; `EvaluationError` says what is wrong in it."""
    if str(name) in shipped_suites():
        text = (resources.files("hubfusion.data") / "suites" / f"{name}.toml").read_text(encoding="utf-8")
        folder = Path.cwd()
    else:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except OSError:
            known = ", ".join(shipped_suites())
            raise EvaluationError(f"suite {str(name)!r}: not a file, and not one of {known}") from None
        folder = Path(name).parent
    try:
        data = parse_toml(text, str(name))
        data["datasets"] = [data.get("defaults", {}) | d for d in data.get("datasets", [])]
        data.pop("defaults", None)
        suite = from_json(Suite, data, str(name))
        return replace(suite, datasets=tuple(_anchor(d, folder) for d in suite.datasets))
    except FusionError as error:
        raise EvaluationError(str(error)) from None
    except (ValueError, TypeError) as error:
        raise EvaluationError(f"{name}: not a suite: {error}") from None


def _anchor(dataset: Dataset, folder: Path) -> Dataset:
    """A local folder is meant relative to the suite's file."""
    return replace(dataset, repo=str((folder / dataset.repo).resolve())) if dataset.is_local else dataset
