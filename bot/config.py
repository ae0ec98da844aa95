"""``bot.toml`` and the environment, folded once into one frozen value; nothing else in the bot reads either."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from hubfusion.codec import from_json, parse_toml
from hubfusion.data.suite import Suite, load_suite
from hubfusion.errors import FusionError
from hubfusion.evaluate.protocols import STANDARD, Protocol, find_protocol, read_protocols
from hubfusion.fuse import METHODS
from hubfusion.fuse.clipping import can_clip
from hubfusion.lineage import Option
from hubfusion.release.gate import Margins
from hubfusion.release.scan import Scan
from hubfusion.release.signature import Keyless
from hubfusion.screen import Policy

DEFAULT_ENDPOINT = "https://huggingface.co"


@dataclass(frozen=True, slots=True)
class Fusing:
    """How contributions become a candidate; fewer than ``at_least`` sound ones wait for more.

    ``clip`` scales every task vector down to the median norm (`hubfusion.fuse.clipping`), where the method can. When
    the gate refuses a candidate, at most ``isolate`` more are fused and evaluated to find whose contribution it objects
    to; 0 refuses them all.
    """

    method: str = "average"
    options: dict[str, Option] = field(default_factory=dict)
    scale: float = 1.0
    clip: bool = True
    at_least: int = 2
    isolate: int = 8

    def __post_init__(self) -> None:
        """Refuse a clip that the method cannot do, or that its options already decide, and negative counts."""
        if self.method not in METHODS:
            raise FusionError(f"fuse.method must be one of {', '.join(sorted(METHODS))}, got {self.method!r}")
        if self.clip and not can_clip(self.method):
            able = ", ".join(sorted(filter(can_clip, METHODS)))
            raise FusionError(f"fuse.clip: {self.method} cannot clip; set clip = false or use one of {able}")
        if self.clip and "norm" in self.options:
            raise FusionError("fuse.options.norm: clip = true decides it; set clip = false to choose another")
        for name, least in (("at_least", 1), ("isolate", 0)):
            if getattr(self, name) < least:
                raise FusionError(f"fuse.{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Examining:
    """What contributions are compared with: weights of the last ``versions`` before the base, norms of ``history``.

    A version costs its download and one more pass; the norms are in the manifests of the last ``history`` versions.
    """

    versions: int = 1
    history: int = 4

    def __post_init__(self) -> None:
        """Refuse negative counts."""
        for name, value in (("versions", self.versions), ("history", self.history)):
            if value < 0:
                raise FusionError(f"examine.{name} must be at least 0, got {value}")


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
    """Everything a run needs to know; ``deadline_minutes`` bounds one fuse-and-evaluate job.

    ``leave_one_out`` names a probe suite for leave-one-out gains; None measures none.
    ``triggers`` scans candidates for backdoors before the gate; None does not.
    """

    base: str
    ledger: str
    ranking: str
    evaluate: Evaluating
    work: str = "work"
    deadline_minutes: float = 600.0
    fuse: Fusing = field(default_factory=Fusing)
    examine: Examining = field(default_factory=Examining)
    leave_one_out: Evaluating | None = None
    triggers: Scan | None = None
    screen: Policy = field(default_factory=Policy)
    gate: Margins = field(default_factory=Margins)
    schedule: Schedule = field(default_factory=Schedule)


@dataclass(frozen=True, slots=True)
class Access:
    """Where the Hub is and who we are there; the token is never written, printed or handed to the worker.

    ``signer`` is what releases are signed with, if anything: the file of a private key, or `Keyless`.
    """

    endpoint: str
    token: str | None = field(default=None, repr=False)
    signer: Path | Keyless | None = None


def read_config(path: Path) -> Config:
    """Read ``bot.toml``; an unknown key, a wrong type or a missing one is named with its path."""
    try:
        text = path.read_text()
    except OSError as error:
        raise FusionError(f"{path}: cannot be read: {error.strerror}") from None
    config = from_json(Config, parse_toml(text, str(path)), str(path))
    probe = config.leave_one_out
    evaluate = _beside(path, config.evaluate)
    return replace(config, evaluate=evaluate, leave_one_out=_beside(path, probe) if probe else None)


def _beside(path: Path, wanted: Evaluating) -> Evaluating:
    """File names relative to the settings' own folder."""
    suite = str(path.parent / wanted.suite) if wanted.suite.endswith(".toml") else wanted.suite
    return replace(wanted, suite=suite, recipes=str(path.parent / wanted.recipes) if wanted.recipes else "")


def read_plan(settings: Evaluating) -> tuple[Suite, tuple[Protocol, ...]]:
    """The suite and the protocols that the settings name, as values."""
    known = dict(STANDARD) | (read_protocols(Path(settings.recipes)) if settings.recipes else {})
    return load_suite(settings.suite), tuple(find_protocol(name, known) for name in settings.protocols)


def read_access() -> Access:
    """``HF_ENDPOINT`` and ``HF_TOKEN``, as `huggingface_hub` names them, and how to sign.

    ``HUBFUSION_SIGNING_KEY`` is a PEM file, or the word ``keyless``; the file ``HUBFUSION_TRUST`` then describes a
    Sigstore of one's own. Without a key nothing is signed.
    """
    key, trust = os.environ.get("HUBFUSION_SIGNING_KEY"), os.environ.get("HUBFUSION_TRUST")
    signer = Keyless(Path(trust) if trust else None) if key == "keyless" else Path(key) if key else None
    if trust and key != "keyless":
        raise FusionError("HUBFUSION_TRUST is for HUBFUSION_SIGNING_KEY=keyless only, and that is not set")
    endpoint, token = os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT), os.environ.get("HF_TOKEN")
    return Access(endpoint, token or None, signer)
