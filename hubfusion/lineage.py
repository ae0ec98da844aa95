"""The frozen values between the stages.

`crawl` yields `Finetune`s, `screen` turns each into a `Contribution` or a `Rejected`, `fuse` follows a `Recipe`, and
`publish` writes a `Manifest` (``fusion.json``) with the measurements of each `Contributed` beside the weights.
`hubfusion.codec` reads and writes them as JSON.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from hubfusion.errors import FusionError

REPO_ID = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
COMMIT_SHA = re.compile(r"[0-9a-f]{40}")

Option = str | int | float | bool


@dataclass(frozen=True, slots=True, order=True)
class Revision:
    """One commit of one repository: branches and tags are resolved to a commit first."""

    repo: str
    sha: str

    def __post_init__(self) -> None:
        """Refuse anything but ``owner/name`` and a full commit sha: a branch name here would be a moving target."""
        if not REPO_ID.fullmatch(self.repo):
            raise FusionError(f"revision: repository must be owner/name, got {self.repo!r}")
        if not COMMIT_SHA.fullmatch(self.sha):
            raise FusionError(f"revision of {self.repo}: sha must be 40 hexadecimal digits, got {self.sha!r}")

    def __str__(self) -> str:
        """``owner/name@0123456789ab``: enough for people; `pinned` is for machines."""
        return f"{self.repo}@{self.sha[:12]}"

    @property
    def pinned(self) -> str:
        """``owner/name@<40 hexadecimal digits>``: how a recipe names this commit."""
        return f"{self.repo}@{self.sha}"

    @classmethod
    def parse(cls, pinned: str) -> Revision:
        """Read a `pinned` name; raises `FusionError` for a folder, or a name without a full commit sha.

        >>> Revision.parse("ann/news@" + "a" * 40).repo
        'ann/news'
        """
        repo, _, sha = pinned.rpartition("@")
        if not (REPO_ID.fullmatch(repo) and COMMIT_SHA.fullmatch(sha)):
            raise FusionError(f"a model must be pinned as owner/name@<40 hexadecimal digits>, got {pinned!r:.120}")
        return cls(repo, sha)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as the Hub lists it at a pinned commit; ``sha256`` is there for LFS files, ``blob`` (git sha1) always."""

    path: str
    size: int
    blob: str
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Finetune:
    """A model on the Hub that names our base, pinned: what `crawl` found, before anybody judged it.

    ``card`` is the YAML front matter as the Hub parsed it: untrusted data.
    ``modified`` is the Hub's ISO 8601 time of the last change, the order in which finetunes are judged.
    """

    revision: Revision
    author: str
    modified: str
    tags: tuple[str, ...]
    card: Mapping[str, Any]
    files: tuple[RemoteFile, ...]
    gated: bool = False


class Reason(StrEnum):
    """Why a finetune was not fused; closed, so that every reason has its answer to the contributor."""

    NOT_A_FINETUNE = "not-a-finetune"
    BAD_CARD = "bad-card"
    UNDECLARED_BASE = "undeclared-base"
    STALE_BASE = "stale-base"
    UNKNOWN_BASE = "unknown-base"
    LICENSE = "license"
    GATED = "gated"
    GONE = "gone"
    FLAGGED = "flagged-by-hub"
    CUSTOM_CODE = "custom-code"
    NO_SAFETENSORS = "no-safetensors"
    BAD_FILES = "bad-files"
    TOO_LARGE = "too-large"
    BAD_HEADER = "bad-header"
    BAD_INDEX = "bad-index"
    BAD_CONFIG = "bad-config"
    ARCHITECTURE = "architecture"
    ADAPTER = "adapter"
    BLOCKED = "blocked"
    OPTED_OUT = "opted-out"
    CAP = "cap"
    CORRUPT = "corrupt"
    NOT_FINITE = "not-finite"
    UNCHANGED = "unchanged"
    BUFFERS = "buffers-changed"
    DUPLICATE = "duplicate"
    INVERSE = "inverse"
    WRONG_BASE = "wrong-base"
    OUTLIER = "outlier"
    CONCENTRATED = "concentrated"
    HARMFUL = "harmful"
    REFUSED = "refused-by-gate"


@dataclass(frozen=True, slots=True)
class Rejected:
    """A finetune that will not be fused, and why: a value, counted and told to its owner."""

    revision: Revision
    author: str
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Contribution:
    """A finetune that passed screening: everything that download and fuse need, pinned.

    ``files`` are just those that will be read (weights, index), ``examples`` the declared number of training
    examples (None when the card does not say), ``datasets`` the declared Hub ids.
    """

    revision: Revision
    author: str
    base: Revision
    license: str
    datasets: tuple[str, ...]
    examples: int | None
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True, slots=True)
class Contributed:
    """One contribution to a candidate, with what was measured of it.

    ``norm`` is ‖τ‖ before any clipping. ``leave_one_out_gain`` is the mean score of the candidate minus that of the
    same fuse without this contribution, in points on the probe suite; None when that was not measured.
    """

    contribution: Contribution
    norm: float
    leave_one_out_gain: float | None = None

    @property
    def revision(self) -> Revision:
        """The contribution's commit."""
        return self.contribution.revision


@dataclass(frozen=True, slots=True, order=True)
class Input:
    """One input of a fuse: ``model`` is a folder, ``owner/name``, ``owner/name@revision``, or pinned to a commit.

    Coefficients are relative (1, 1, 1 is uniform); each method says how it normalizes them.
    """

    model: str
    coefficient: float = 1.0

    @property
    def revision(self) -> Revision:
        """The commit that ``model`` is pinned to; raises `FusionError` when it is not."""
        return Revision.parse(self.model)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a candidate is made: the same recipe over the same bytes gives the same bytes.

    ``base`` and ``state`` are named like an input's model; a release has all of them pinned. ``options`` are sorted
    keywords of the method, ``scale`` is λ, applied once to the fused delta. ``outer`` names the outer optimizer that
    turns the fused delta into the step, with its own options; its last state is read from ``state``, or from the base
    when that is None. `hubfusion.fuse.recipe.check_recipe` checks names and numbers.
    """

    base: str
    inputs: tuple[Input, ...]
    method: str = "average"
    options: tuple[tuple[str, Option], ...] = ()
    scale: float = 1.0
    outer: str = "plain"
    outer_options: tuple[tuple[str, Option], ...] = ()
    state: str | None = None

    def __post_init__(self) -> None:
        """Refuse a recipe of nothing."""
        if not self.inputs:
            raise FusionError("recipe: at least one input is needed, got none")

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The coefficient of each input, in the recipe's order."""
        return tuple(each.coefficient for each in self.inputs)

    @property
    def order(self) -> list[int]:
        """Positions of the inputs in the canonical order of every sum: by name, then by coefficient."""
        return sorted(range(len(self.inputs)), key=self.inputs.__getitem__)
