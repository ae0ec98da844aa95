"""Publish a candidate as a version of the base, or finish a release that was interrupted.

The commit has weights, card and ``fusion.json``, and its parent is the commit that was evaluated against. If the base
moved in between, `Conflict` is raised and nothing is written. The tag is created last: its existence means that the
version is complete. If the run dies before the tag, `finish_release` of the next run finds the commit by its nonce.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hubfusion.codec import dumps
from hubfusion.errors import HubError, NotFound
from hubfusion.hub import Change, Hub
from hubfusion.lineage import Revision
from hubfusion.release.manifest import FILE, MAX_BYTES, Manifest, read_manifest
from hubfusion.release.signature import SIGNATURE, UNSIGNED, Keyless, sign

log = logging.getLogger(__name__)

VERSION = re.compile(r"v(0|[1-9][0-9]*)")
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|pytorch_model.*\.bin")


@dataclass(frozen=True, slots=True)
class Release:
    """A version of the base: ``revision`` is the tagged commit, ``head`` the commit that ``main`` is at."""

    version: str
    revision: Revision
    head: str
    versions: Mapping[str, str]

    @property
    def next_version(self) -> str:
        """The name of the version after this one."""
        return f"v{int(self.version[1:]) + 1}"

    def before(self, most: int) -> list[Release]:
        """At most ``most`` releases before this one, newest first."""
        numbers = {int(name[1:]): sha for sha, name in self.versions.items()}
        earlier = sorted((n for n in numbers if n < int(self.version[1:])), reverse=True)[:most]
        return [replace(self, version=f"v{n}", revision=replace(self.revision, sha=numbers[n])) for n in earlier]


def current_release(hub: Hub, repo: str) -> Release:
    """The newest version of a base; raises `HubError` when it has no tag ``v0`` or its weights changed after it.

    ``main`` may be ahead of the tag by commits that leave the weights alone, such as a corrected card.
    """
    tags = hub.tags(repo)
    versions = {sha: name for name, sha in tags.items() if VERSION.fullmatch(name)}
    if not versions:
        raise HubError(f"{repo}: a base needs a tag v0 on its first revision, found {', '.join(tags) or 'no tag'}")
    newest = max(versions.values(), key=lambda name: int(name[1:]))
    release = Release(newest, Revision(repo, tags[newest]), hub.resolve(repo).sha, versions)
    if release.head != release.revision.sha:
        tagged, now = (weight_hashes(hub, Revision(repo, sha)) for sha in (release.revision.sha, release.head))
        if tagged != now:
            raise HubError(f"{repo}: main has other weights than {newest}; tag them as a version or revert them first")
    return release


def fetch_release(hub: Hub, release: Release, folder: Path) -> Path:
    """Download a base revision (weights, config, tokenizer) into ``folder``, each file checked against its hash."""
    for file in hub.files(release.revision):
        hub.download(release.revision, file, folder / file.path)
    return folder


def weight_hashes(hub: Hub, revision: Revision) -> dict[str, str]:
    """The Hub's hash of every weight file at a revision, by path."""
    return {f.path: f.sha256 or f.blob for f in hub.files(revision) if WEIGHTS.fullmatch(f.path)}


def plan_release(hub: Hub, release: Release, manifest: Manifest, weights: Path, card: str) -> Change:
    """The commit that makes ``manifest``'s candidate (in the folder ``weights``) the head of the base.

    The report's files lie beside that folder.
    """
    files: dict[str, bytes | Path] = {file.path: weights / file.path for file in manifest.weights}
    head = Revision(release.revision.repo, release.head)
    old = {*weight_hashes(hub, head), *(f.path for f in hub.files(head) if f.path == SIGNATURE)}
    files[manifest.backbone.path] = weights / manifest.backbone.path
    files |= {file.path: weights.parent / file.path for file in manifest.report}
    files["README.md"] = card.encode()
    files[FILE] = dumps(manifest).encode()
    title = (
        f"iteration {manifest.iteration}: {len(manifest.contributions)} contributions, {manifest.recipe.method}, "
        f"mean gain {manifest.decision.mean_gain:+.2f}, promoted"
    )
    return Change(title, release.head, manifest.nonce, files, sorted(old - set(files)))


def sign_release(hub: Hub, release: Release, change: Change, staging: Path, signer: Path | Keyless) -> Change:
    """``change`` with a signature over every file that the revision will have; ``staging`` gets just these files."""
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    head = Revision(release.revision.repo, release.head)
    for file in hub.files(head):
        if file.path not in (*change.files, *change.delete, *UNSIGNED):
            hub.download(head, file, staging / file.path)
    for path, content in change.files.items():
        if isinstance(content, Path):
            os.link(content, staging / path)
        elif path not in UNSIGNED:
            (staging / path).write_bytes(content)
    signed = {**change.files, SIGNATURE: sign(staging, signer)}
    log.info("publish: signed %d files", len(list(staging.rglob("*"))) - 1)
    return replace(change, files=signed, delete=[path for path in change.delete if path not in signed])


def publish(hub: Hub, repo: str, change: Change, version: str) -> Revision:
    """Commit and tag; raises `Conflict` when the base moved since the plan was made, and then nothing was written."""
    sha = hub.commit(repo, change)
    hub.tag(repo, version, sha)
    log.info("publish: %s %s is %s", repo, version, sha)
    return Revision(repo, sha)


def finish_release(hub: Hub, repo: str) -> None:
    """Tag the release commit that a run left untagged when it died; does nothing when all is whole."""
    head = hub.resolve(repo)
    manifest = manifest_at(hub, head)
    if manifest is None or manifest.version in hub.tags(repo):
        return
    for commit in hub.history(repo):
        if f"Nonce: {manifest.nonce}" in commit.message:
            log.warning("publish: finishing %s %s, which an earlier run left without its tag", repo, manifest.version)
            hub.tag(repo, manifest.version, commit.sha)
            return
    raise HubError(f"{head}: {FILE} speaks of {manifest.version}, but no commit carries its nonce {manifest.nonce}")


def manifest_at(hub: Hub, revision: Revision) -> Manifest | None:
    """The manifest of one revision of a base; None for a revision that no iteration made, such as v0."""
    try:
        text = hub.read(revision, FILE, stop=MAX_BYTES)
    except NotFound:
        return None
    return read_manifest(text, f"{revision} {FILE}")
