"""Found a base: publish a pretrained model as ``v0`` of a repository and create an empty ledger and ranking."""

from __future__ import annotations

import logging
from pathlib import Path

from markupsafe import Markup

from bot.iteration import Run
from bot.ledger import FILE as LEDGER_FILE
from hubfusion.errors import FusionError, NotFound
from hubfusion.hub import Change, Hub, RepoKind
from hubfusion.hub.cards import TAG
from hubfusion.lineage import REPO_ID, Revision
from hubfusion.release.card import merge_metadata, render
from hubfusion.release.founding import fetch_model, read_founding

log = logging.getLogger(__name__)


def found_base(run: Run, model: str, license: str | None, language: str | None) -> Revision:
    """Push ``model`` as ``v0`` and make ledger and ranking; what is there already is left as it is.

    ``model`` is a folder, or ``owner/name[@revision]`` on the Hub, which is pinned to a commit and named in the card.
    """
    hub, config = run.hub, run.config
    origin = None
    if not (folder := Path(model)).is_dir():
        repo, _, name = model.partition("@")
        if not REPO_ID.fullmatch(repo):
            raise FusionError(f"{model}: neither a folder here nor owner/name[@revision] on the Hub")
        origin = run.reader.resolve(repo, name or "main")
        folder = fetch_model(run.reader, origin, Path(config.work) / "founding" / origin.sha)
        log.info("found: %s fetched", origin)
    founding = read_founding(folder, license=license, language=language, origin=origin)
    matter = {
        "pretty_name": f"Ledger of {config.base}",
        "configs": [{"config_name": "default", "data_files": LEDGER_FILE}],
    }
    page = render("ledger.md.j2", matter, base=config.base, endpoint=hub.endpoint)
    _begin(run, config.ledger, RepoKind.DATASET, {"README.md": page.encode(), LEDGER_FILE: b""}, "begin the ledger")
    begun = f"---\npretty_name: Ranking of {config.base}\n---\n# Ranking of {config.base}\n"
    _begin(run, config.ranking, RepoKind.DATASET, {"README.md": begun.encode()}, "begin the ranking")
    hub.create(config.base)
    tags = hub.tags(config.base)
    if "v0" in tags:
        return Revision(config.base, tags["v0"])
    metadata = merge_metadata(founding.metadata, {"tags": [TAG]})
    card = render("v0.md.j2", metadata, repo=config.base, code_repo=Markup(config.base), origin=origin)
    sha = hub.resolve(config.base).sha
    if not _has(hub, Revision(config.base, sha), "config.json"):
        change = Change("v0: the pretrained model", sha, run.nonce, {**founding.files, "README.md": card.encode()})
        sha = hub.commit(config.base, change)
    hub.tag(config.base, "v0", sha)
    return Revision(config.base, sha)


def _begin(run: Run, repo: str, kind: RepoKind, files: dict[str, bytes | Path], title: str) -> None:
    run.hub.create(repo, kind)
    head = run.hub.resolve(repo, kind=kind)
    if not _has(run.hub, head, "README.md", kind):
        run.hub.commit(repo, Change(title, head.sha, f"{run.nonce}-{repo}", files), kind)


def _has(hub: Hub, revision: Revision, path: str, kind: RepoKind = RepoKind.MODEL) -> bool:
    try:
        hub.read(revision, path, stop=1, kind=kind)
    except NotFound:
        return False
    return True
