"""``bot.toml`` and the environment, folded once into one frozen value; nothing else in the bot reads either."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path

from hubfusion.errors import FusionError
from hubfusion.gate import Margins
from hubfusion.lineage import Option, from_json
from hubfusion.policy import Policy
from hubfusion.protocols import STANDARD, Protocol, find_protocol, read_protocols
from hubfusion.suite import Suite, load_suite

DEFAULT_ENDPOINT = "https://huggingface.co"


@dataclass(frozen=True, slots=True)
class Fusing:
    """How contributions become a candidate; fewer than ``at_least`` sound ones wait for more.

    ``clip`` scales every task vector down to the median norm before the method sees it.
    """

    method: str = "average"
    options: dict[str, Option] = field(default_factory=dict)
    scale: float = 1.0
    clip: bool = True
    at_least: int = 2


@dataclass(frozen=True, slots=True)
class Evaluating:
    """What a candidate is judged by: a suite (shipped name or TOML file), protocols by name, paired seeds.

    ``recipes`` is a TOML file that defines or changes protocols; file names are relative to ``bot.toml``.
    """

    suite: str
    protocols: tuple[str, ...] = ("linear-probing", "finetune")
    seeds: tuple[int, ...] = (0, 1)
    recipes: str = ""


@dataclass(frozen=True, slots=True)
class Schedule:
    """When `serve` runs an iteration: a cron line (UTC), else every ``minutes``."""

    cron: str = ""
    minutes: int = 60


@dataclass(frozen=True, slots=True)
class Config:
    """Everything a run needs to know; ``deadline_minutes`` bounds one fuse-and-evaluate job."""

    base: str
    ledger: str
    ranking: str
    evaluate: Evaluating
    work: str = "work"
    deadline_minutes: float = 600.0
    fuse: Fusing = field(default_factory=Fusing)
    screen: Policy = field(default_factory=Policy)
    gate: Margins = field(default_factory=Margins)
    schedule: Schedule = field(default_factory=Schedule)


@dataclass(frozen=True, slots=True)
class Access:
    """Where the Hub is and who we are there; the token is never written, printed or handed to the worker."""

    endpoint: str
    token: str | None = field(default=None, repr=False)


def read_config(path: Path) -> Config:
    """Read ``bot.toml``; an unknown key, a wrong type or a missing one is named with its path."""
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise FusionError(f"{path}: cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise FusionError(f"{path}: not TOML: {error}") from None
    config = from_json(Config, data, str(path))
    wanted = config.evaluate
    suite = str(path.parent / wanted.suite) if wanted.suite.endswith(".toml") else wanted.suite
    recipes = str(path.parent / wanted.recipes) if wanted.recipes else ""
    return replace(config, evaluate=replace(wanted, suite=suite, recipes=recipes))


def read_plan(settings: Evaluating) -> tuple[Suite, tuple[Protocol, ...]]:
    """The suite and the protocols that the settings name, as values."""
    known = dict(STANDARD) | (read_protocols(Path(settings.recipes)) if settings.recipes else {})
    return load_suite(settings.suite), tuple(find_protocol(name, known) for name in settings.protocols)


def read_access() -> Access:
    """``HF_ENDPOINT`` and ``HF_TOKEN`` from the environment, as `huggingface_hub` names them."""
    return Access(os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT), os.environ.get("HF_TOKEN") or None)
