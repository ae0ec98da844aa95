"""What is derived from one commit: card, tags, tensor counts, files. Computed once per commit and kept."""

from __future__ import annotations

import json
import struct
from datetime import UTC, datetime
from math import prod
from typing import Any

from hubfusion.localhub import cards
from hubfusion.localhub.state import Hub
from hubfusion.localhub.store.git import Entry, GitRepo, Snapshot
from hubfusion.localhub.store.repos import MAIN, Kind, Repo

_SMALL = 4 << 20
"""Bytes: README, config.json and results larger than this are not read."""
_HEADER = 64 << 20

Facts = dict[str, Any]


def when(seconds: float) -> str:
    """A time as the Hub writes it: ISO 8601, UTC, milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def facts_of(hub: Hub, repo: Repo, sha: str) -> Facts:
    """The facts of one commit; from memory, else from the database, else from git."""
    cached = hub.facts.get((repo.number, sha))
    if cached is not None:
        return cached
    row = hub.db.row("SELECT body FROM facts WHERE repo = ? AND sha = ?", repo.number, sha)
    facts: Facts = json.loads(row["body"]) if row else _derive(hub, repo, sha)
    hub.facts.put((repo.number, sha), facts)
    return facts


def _derive(hub: Hub, repo: Repo, sha: str) -> Facts:
    git = hub.repos.git(repo)
    facts = derive(hub, repo.kind, git, git.snapshot(sha))
    with hub.db.write() as connection:
        if connection.execute("SELECT 1 FROM repos WHERE number = ?", (repo.number,)).fetchone():
            if git.ref(MAIN) == sha:  # older commits are asked for rarely: one row a repository is enough
                connection.execute("DELETE FROM facts WHERE repo = ?", (repo.number,))
            connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", (repo.number, sha, json.dumps(facts)))
    return facts


def derive(hub: Hub, kind: Kind, git: GitRepo, snapshot: Snapshot) -> Facts:
    """The facts of a commit, read from its files."""
    texts = _read_small(git, snapshot)
    try:
        card = cards.parse_card(texts.get("README.md", b"").decode(errors="replace"))
    except cards.CardError:
        card = {}
    config = cards.parse_json_object(texts.get("config.json", b"{}"))
    paths = list(snapshot.files)
    facts: Facts = {
        "cardData": card,
        "siblings": [_sibling(entry) for entry in snapshot.files.values()],
        "usedStorage": sum(entry.size for entry in snapshot.files.values()),
    }
    if kind is Kind.MODEL:
        facts |= {
            "tags": cards.model_tags(card, paths, config),
            "library_name": cards.library_of(card, paths, config),
            "pipeline_tag": cards.pipeline_of(card, config),
            "config": _shown_config(config),
            "model-index": card.get("model-index"),
            "safetensors": tensor_counts(hub, git, snapshot),
            "evalResults": _eval_results(texts),
            "bases": cards.base_models(card),
            "relation": cards.relation_of(card, paths, config),
        }
    else:
        facts["tags"] = cards.dataset_tags(card, paths) if kind is Kind.DATASET else cards.space_tags(card)
    return facts


def _shown_config(config: dict[str, Any]) -> dict[str, Any]:
    """The two entries of config.json that the Hub shows, when they are what they should be."""
    names, kind = config.get("architectures"), config.get("model_type")
    shown: dict[str, Any] = {"model_type": kind} if isinstance(kind, str) else {}
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        shown["architectures"] = names
    return shown


def _read_small(git: GitRepo, snapshot: Snapshot) -> dict[str, bytes]:
    wanted = {
        path: entry.oid
        for path, entry in snapshot.files.items()
        if entry.pointer is None
        and entry.size <= _SMALL
        and (path in ("README.md", "config.json", "eval.yaml") or _is_result(path))
    }
    blobs = git.blobs(list(wanted.values()))
    return {path: blobs[oid] for path, oid in wanted.items()}


def _is_result(path: str) -> bool:
    return path.startswith(".eval_results/") and path.endswith((".yaml", ".yml"))


def _eval_results(texts: dict[str, bytes]) -> list[dict[str, Any]]:
    results = []
    for path, blob in sorted(texts.items()):
        if _is_result(path):
            try:
                entries = cards.parse_yaml(blob.decode())
            except (cards.CardError, UnicodeDecodeError):
                continue
            results += [{"filename": path, "data": x} for x in entries or [] if isinstance(x, dict)]
    return results


def _sibling(entry: Entry) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": entry.path, "size": entry.size, "blobId": entry.oid}
    if entry.pointer:
        size = len(entry.pointer.text())
        sibling["lfs"] = {"sha256": entry.pointer.sha256, "size": entry.size, "pointerSize": size}
    return sibling


def tensor_counts(hub: Hub, git: GitRepo, snapshot: Snapshot) -> dict[str, Any] | None:
    """Entries per dtype over model.safetensors, or over the shards its index names; None when there are none."""
    names = ["model.safetensors"] if "model.safetensors" in snapshot.files else []
    index = snapshot.files.get("model.safetensors.index.json")
    if not names and index and index.pointer is None and index.size <= _SMALL:
        table = cards.parse_json_object(git.blob(index.oid)).get("weight_map", {})
        names = sorted(set(map(str, table.values()))) if isinstance(table, dict) else []
    counts: dict[str, int] = {}
    for name in names:
        header = tensor_header(hub, git, snapshot.files.get(name))
        if header is None:
            return None
        for key, spec in header.items():
            if key != "__metadata__":
                counts[spec["dtype"]] = counts.get(spec["dtype"], 0) + prod(spec["shape"])
    return {"parameters": counts, "total": sum(counts.values())} if counts else None


def tensor_header(hub: Hub, git: GitRepo, entry: Entry | None) -> dict[str, Any] | None:
    """The JSON header of a safetensors file, or None when it is not one."""
    if entry is None:
        return None
    if entry.pointer:
        try:
            with hub.objects.path(entry.pointer.sha256).open("rb") as file:
                length = _length(file.read(8))
                blob = file.read(length) if length else b""
        except FileNotFoundError:  # taken away by hand: the repository stays readable without it
            return None
    else:
        whole = git.blob(entry.oid)
        length = _length(whole[:8])
        blob = whole[8 : 8 + length]
    header = cards.parse_json_object(blob)
    return header if header and all(_is_spec(key, spec) for key, spec in header.items()) else None


def _length(prefix: bytes) -> int:
    length: int = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    return length if length <= _HEADER else 0


def _is_spec(key: str, spec: Any) -> bool:
    return key == "__metadata__" or (
        isinstance(spec, dict)
        and isinstance(spec.get("dtype"), str)
        and isinstance(spec.get("shape"), list)
        and all(isinstance(n, int) and 0 <= n < 1 << 48 for n in spec["shape"])
        and len(spec["shape"]) <= 16
    )
