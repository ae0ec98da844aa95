"""Models to evaluate: local folders, or commits on the Hub that are downloaded when needed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hubfusion.cli.access import open_hub
from hubfusion.errors import EvaluationError

if TYPE_CHECKING:
    from hubfusion.lineage import Revision


def cache() -> Path:
    """Our folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hubfusion"


@dataclass(frozen=True, slots=True)
class Model:
    """A model by the key of its content; just one of ``local`` and ``revision`` is there."""

    key: str
    local: Path | None = None
    revision: Revision | None = None

    def folder(self) -> Path:
        """Where its files are; from the Hub they are fetched on the first call, and then found in the cache."""
        if self.local is not None:
            return self.local
        assert self.revision is not None  # or it would be local
        return _download(self.revision)


def find_model(text: str) -> Model:
    """A local folder, or ``OWNER/NAME[@revision]`` at the commit that it stands for now."""
    from hubfusion.evaluate.units import content_key
    from hubfusion.lineage import REPO_ID

    if Path(text).is_dir():
        return Model(content_key(Path(text)), local=Path(text))
    repo, _, name = text.partition("@")
    if not REPO_ID.fullmatch(repo):
        raise EvaluationError(f"{text}: neither a local folder nor OWNER/NAME on the Hub")
    revision = open_hub().resolve(repo, name or "main")
    return Model(f"{revision.repo}@{revision.sha}", revision=revision)


def _download(revision: Revision) -> Path:
    from hubfusion.evaluate.units import MODEL_FILES

    folder = cache() / "models" / revision.repo.replace("/", "--") / revision.sha
    if not folder.is_dir():
        hub = open_hub()
        beside = folder.with_name(f".{revision.sha}.{os.getpid()}")
        for file in hub.files(revision):
            if file.path.endswith(MODEL_FILES) and "/" not in file.path:
                hub.download(revision, file, beside / file.path)
        try:
            os.replace(beside, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder
