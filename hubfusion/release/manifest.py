"""``fusion.json``: what a published revision says of itself, enough to check it, rebuild it and take it back."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from hubfusion.evaluate.scores import Scores
from hubfusion.lineage import Contribution, Recipe, RemoteFile, Revision, loads
from hubfusion.release.gate import Decision
from hubfusion.release.isolation import Trial

FILE = "fusion.json"
MAX_BYTES = 32 << 20
PACKAGES = ("hubfusion", "numpy", "torch", "transformers", "datasets", "huggingface_hub", "scikit-learn")


@dataclass(frozen=True, slots=True)
class Manifest:
    """One promoted iteration.

    ``recipe`` names the base and the inputs by commit, in the order of ``contributions``; ``weights`` are the files
    it produced; ``seen`` names the evaluation datasets that this version or one before it was trained on; ``nonce``
    is also in the commit's message, so that the commit is found again after a crash.

    ``trials`` are the sets that were fused and judged to isolate whom the gate objected to. In the order of
    ``recipe.inputs``, empty in manifests that lack them: ``norms`` ‖τ‖ of each input before any clipping,
    ``leave_one_out`` the points that it adds on the probe suite (the candidate's mean score minus that without it).
    ``report`` are the files of the weight-space report (`hubfusion.screen.soundness`), published beside the weights.
    """

    iteration: int
    version: str
    parent_version: str
    nonce: str
    recipe: Recipe
    contributions: tuple[Contribution, ...]
    weights: tuple[RemoteFile, ...]
    seen: tuple[str, ...]
    base_scores: Scores
    candidate_scores: Scores
    decision: Decision
    environment: Mapping[str, str]
    schema: int = 1
    trials: tuple[Trial, ...] = ()
    norms: tuple[float, ...] = ()
    leave_one_out: tuple[float, ...] = ()
    report: tuple[RemoteFile, ...] = ()

    @property
    def base(self) -> Revision:
        """The base revision that the contributions were finetuned from."""
        return self.recipe.base


def read_manifest(text: bytes, where: str) -> Manifest:
    """Parse ``fusion.json`` strictly; raises `hubfusion.errors.FusionError` naming the key that does not fit."""
    return loads(Manifest, text, where)


def describe_environment() -> dict[str, str]:
    """Versions of Python and of the packages that the result depends on; imports none of them."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
