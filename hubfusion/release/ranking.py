"""The ranking: a parquet file with every score of every version, and a table in Markdown.

The file is in long form, one row a (version, dataset, protocol), so no score depends on a column order. It is rewritten
from the existing rows plus one version; a version that is already in it is not changed.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterable, Iterator
from statistics import fmean, stdev
from typing import Any

from hubfusion.errors import NotFound
from hubfusion.evaluate.scores import Scores
from hubfusion.hub import Files, Hub, RepoKind, append
from hubfusion.lineage import Revision
from hubfusion.release.card import render
from hubfusion.release.manifest import Manifest

log = logging.getLogger(__name__)

FILE = "data/ranking.parquet"
MAX_BYTES = 256 << 20


def rank(hub: Hub, repo: str, revision: Revision, manifest: Manifest, nonce: str) -> None:
    """Add the version at ``revision`` to the ranking, unless it is there."""

    def plan(head: Revision) -> tuple[str, Files]:
        title, rows = f"rank {manifest.version}", read_rows(hub, head)
        if any(row["version"] == manifest.version for row in rows):
            return title, {}
        if not rows:
            rows = list(_rows(manifest.parent_version, manifest.base.sha, 0, 0, manifest.base_scores))
        count = len(manifest.contributions)
        rows += _rows(manifest.version, revision.sha, manifest.iteration, count, manifest.candidate_scores)
        return title, {FILE: _to_parquet(rows), "README.md": page(rows, revision.repo)}

    append(hub, repo, plan, nonce=nonce)
    log.info("rank: %s is in %s", manifest.version, repo)


def read_rows(hub: Hub, head: Revision) -> list[dict[str, Any]]:
    """Every row of the ranking at a pinned commit; none when nothing was ranked yet."""
    import pyarrow.parquet as pq

    try:
        data = hub.read(head, FILE, stop=MAX_BYTES, kind=RepoKind.DATASET)
    except NotFound:
        return []
    return list(pq.read_table(io.BytesIO(data)).to_pylist())


def _rows(version: str, sha: str, iteration: int, contributions: int, scores: Scores) -> Iterator[dict[str, Any]]:
    for entry in scores:
        yield {
            "version": version,
            "sha": sha,
            "iteration": iteration,
            "contributions": contributions,
            "dataset": entry.dataset,
            "dataset_key": scores.provenance.datasets[entry.dataset],
            "protocol": entry.protocol,
            "protocol_hash": scores.provenance.protocols[entry.protocol],
            "metric": entry.metric,
            "seeds": list(entry.seeds),
            "values": list(entry.values),
            "mean": entry.mean,
            "examples": entry.examples,
        }


def _to_parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def page(rows: list[dict[str, Any]], base: str) -> bytes:
    """The ranking's README: one line a version and protocol, newest first."""
    metadata = {"pretty_name": f"Ranking of {base}", "configs": [{"config_name": "default", "data_files": FILE}]}
    lines = sorted(summarise(rows), key=lambda line: (-int(line["version"][1:]), line["protocol"]))
    return render("ranking.md.j2", metadata, base=base, rows=lines).encode()


def summarise(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Mean score of each (version, protocol), and the gain over the version before on the scores that both have."""
    table: dict[str, dict[str, dict[tuple[str, ...], dict[str, Any]]]] = {}
    for row in rows:
        key = (row["dataset"], row["dataset_key"], row["protocol_hash"], str(row["seeds"]))
        table.setdefault(row["protocol"], {}).setdefault(row["version"], {})[key] = row
    for protocol, versions in table.items():
        for version, entries in versions.items():
            before = versions.get(f"v{int(version[1:]) - 1}", {})
            gains = [entries[key]["mean"] - before[key]["mean"] for key in entries if key in before]
            first = next(iter(entries.values()))
            yield {name: first[name] for name in ("version", "sha", "iteration", "contributions")} | {
                "protocol": protocol,
                "datasets": len(entries),
                "mean": fmean(row["mean"] for row in entries.values()),
                "gain": fmean(gains) if gains else None,
                "stderr": stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0,
            }
