"""``fusion.json``: the record of a published revision, enough to check it, rebuild it and withdraw it."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hubfusion.checkpoint import MANIFEST as FUSE_MANIFEST
from hubfusion.codec import from_json, loads
from hubfusion.errors import FusionError
from hubfusion.evaluate.scores import Scores
from hubfusion.lineage import Contributed, Recipe, RemoteFile, Revision
from hubfusion.release.gate import Decision
from hubfusion.release.isolation import Trial

FILE = "fusion.json"
SCHEMA = 2
REPORT = ("soundness.json", "weight-space.svg")
NOT_THE_MODEL = ("README.md", FILE, "model.sig", ".gitattributes", *REPORT, FUSE_MANIFEST, "recipe.toml")
MAX_BYTES = 32 << 20
PACKAGES = ("hubfusion", "numpy", "torch", "transformers", "datasets", "huggingface_hub", "scikit-learn")


@dataclass(frozen=True, slots=True)
class Manifest:
    """One promoted iteration.

    ``recipe`` names the base and the inputs by commit; ``contributions`` say what each input is and what was measured
    of it; ``weights`` are the files that the recipe produced, ``backbone`` the base's declaration of which of their
    tensors finetunes share (`hubfusion.checkpoint.backbone`); ``seen`` names the evaluation datasets that this version
    or one before it was trained on; ``nonce`` is also in the commit's message, so that the commit is found again after
    a crash.

    ``trials`` are the sets that were fused and judged to isolate whom the gate objected to. ``report`` are the files of
    the weight-space report (`hubfusion.screen.soundness`), published beside the weights.
    """

    iteration: int
    version: str
    parent_version: str
    nonce: str
    recipe: Recipe
    contributions: tuple[Contributed, ...]
    weights: tuple[RemoteFile, ...]
    backbone: RemoteFile
    seen: tuple[str, ...]
    base_scores: Scores
    candidate_scores: Scores
    decision: Decision
    environment: Mapping[str, str]
    schema: int = SCHEMA
    trials: tuple[Trial, ...] = ()
    report: tuple[RemoteFile, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a recipe that does not name a commit for each model."""
        state = [self.recipe.state] if self.recipe.state is not None else []
        for model in (self.recipe.base, *(each.model for each in self.recipe.inputs), *state):
            Revision.parse(model)

    @property
    def base(self) -> Revision:
        """The base revision that the contributions were finetuned from."""
        return Revision.parse(self.recipe.base)


def read_manifest(text: bytes, where: str) -> Manifest:
    """Parse ``fusion.json`` strictly; raises `hubfusion.errors.FusionError` naming the key that does not fit."""
    data = loads(dict[str, Any], text, where)
    if data.get("schema") != SCHEMA:
        raise FusionError(f"{where}: schema must be {SCHEMA}, got {data.get('schema')!r:.20}")
    return from_json(Manifest, data, where)


def describe_file(path: Path) -> RemoteFile:
    """A small file of ours as a manifest lists it, with git's own hash."""
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return RemoteFile(path.name, len(content), blob, hashlib.sha256(content).hexdigest())


def describe_environment() -> dict[str, str]:
    """Versions of Python and of the packages that the result depends on; imports none of them."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
