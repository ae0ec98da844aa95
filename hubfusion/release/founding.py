"""What a pretrained model becomes when a base is founded: its files, its backbone, and the metadata that it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubfusion.checkpoint import SINGLE, WEIGHTS_NAME, open_checkpoint
from hubfusion.checkpoint.backbone import CONFIG, MODULE_FILE, parse_config, read_backbone, write_backbone
from hubfusion.checkpoint.backbone import FILE as BACKBONE
from hubfusion.errors import FusionError
from hubfusion.hub import Hub
from hubfusion.hub.cards import front_matter
from hubfusion.lineage import Revision
from hubfusion.release.manifest import NOT_THE_MODEL

ALLOWED = (".json", ".txt", ".model")
KEPT = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag", "library_name", "tags")


@dataclass(frozen=True, slots=True)
class Founding:
    """Version 0 before it is a commit: ``files`` by path, and the card's metadata."""

    files: Mapping[str, bytes | Path]
    metadata: Mapping[str, Any]


def is_model_file(path: str) -> bool:
    """Whether a file of a model's folder or repository becomes part of a base: no code, no pickle, not its card."""
    if "/" in path:
        return bool(MODULE_FILE.fullmatch(path))
    return bool(WEIGHTS_NAME.fullmatch(path)) or (path.endswith(ALLOWED) and path not in (*NOT_THE_MODEL, BACKBONE))


def fetch_model(hub: Hub, revision: Revision, folder: Path) -> Path:
    """Download a model at a pinned commit, safetensors only, with its card; each file's hash is checked."""
    for file in hub.files(revision):
        if is_model_file(file.path) or file.path == "README.md":
            hub.download(revision, file, folder / file.path)
    return folder


def read_founding(
    folder: Path, *, license: str | None = None, language: str | None = None, origin: Revision | None = None
) -> Founding:
    """What the model in ``folder`` becomes as version 0, with its backbone declared by transformers.

    License and language are those of the model's own card unless given; the license must be known. ``origin`` is the
    Hub's revision that the folder came from: the only model that the base's card names as its `base_model`. Raises
    `FusionError` for what cannot be a base, in one line.
    """
    paths = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    files: dict[str, bytes | Path] = {path: folder / path for path in paths if is_model_file(path)}
    if not any(WEIGHTS_NAME.fullmatch(path) for path in files):
        elsewhere = next((p for p in paths if p.endswith(f"/{SINGLE}")), "")
        hint = f"; {elsewhere} is not at the top" if elsewhere else "; save it with save_pretrained first"
        raise FusionError(f"{origin or folder}: a base needs {SINGLE}, or shards with their index{hint}")
    if CONFIG not in files:
        raise FusionError(f"{origin or folder}: a base needs {CONFIG}; save the model with save_pretrained first")
    from hubfusion.checkpoint.derive import derive  # torch and transformers: seconds

    config = parse_config((folder / CONFIG).read_bytes())
    if "auto_map" in config:
        raise FusionError(f"{origin or folder}: {CONFIG}: auto_map asks to run the model's own code")
    with open_checkpoint(folder) as checkpoint:
        backbone = read_backbone(folder, checkpoint, derive(config) if config.get("model_type") else None)
    files[BACKBONE] = write_backbone(backbone).encode()
    card = folder / "README.md"
    stated = front_matter(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else {}
    metadata = {"library_name": "transformers", **{key: stated[key] for key in KEPT if key in stated}}
    metadata |= {"license": license} if license else {}
    metadata["language"] = language or metadata.get("language", "en")
    if not isinstance(metadata.get("license"), str):
        raise FusionError(f"{origin or folder}: its card states no license; give it with --license")
    if origin:
        metadata |= {"base_model": origin.repo, "base_model_relation": "finetune"}
    return Founding(files, metadata)
