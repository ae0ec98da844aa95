"""From a candidate to a version: the gate, isolation, the manifest, publishing, the card, the ranking, provenance."""

from __future__ import annotations

from hubfusion.release.gate import Decision, Margins, decide
from hubfusion.release.isolation import Trial, isolate
from hubfusion.release.manifest import Manifest
from hubfusion.release.publish import Release, current_release, manifest_at, publish
from hubfusion.release.ranking import rank

__all__ = [
    "Decision", "Manifest", "Margins", "Release", "Trial", "current_release", "decide", "isolate", "manifest_at",
    "publish", "rank",
]  # fmt: skip
