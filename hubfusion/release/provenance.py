"""Rebuild, check and trace a published revision, and remove a contribution from it.

`reproduce` downloads the pinned inputs of a revision and fuses them again. The same recipe over the same bytes gives
the same bytes, so anybody can check that the published weights are those of the manifest. `verify` compares a revision
with its manifest and, if a signer is given, checks its signature. `trace` and `forget` walk the manifests.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hubfusion.checkpoint import WEIGHTS_NAME
from hubfusion.checkpoint.backbone import FUSED_FILE
from hubfusion.errors import CheckpointError, Corrupt, FusionError, NotFound
from hubfusion.fuse import METHODS, fuse
from hubfusion.hub import Hub
from hubfusion.lineage import Recipe, RemoteFile, Revision
from hubfusion.release.manifest import FILE, MAX_BYTES, Manifest, read_manifest
from hubfusion.release.signature import SIGNATURE, UNSIGNED, Identity, check_signature
from hubfusion.screen import path_problem

log = logging.getLogger(__name__)
OnStep = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Checked:
    """What was looked at, and the differences as sentences; none means that all is as the manifest says."""

    revision: Revision
    version: str
    steps: tuple[str, ...]
    differences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ancestor:
    """One version on the way back to the first: ``manifest`` is None for the one that no iteration made."""

    version: str
    revision: Revision
    manifest: Manifest | None


@dataclass(frozen=True, slots=True)
class Redo:
    """One version fused again without the withdrawn inputs; ``recipe`` is None when no input is left.

    ``exact`` is True for the version that used a withdrawn contribution itself. Later versions are carried over:
    their contributions were trained from a base that contained it, and what they learned from it stays.
    """

    version: str
    recipe: Recipe | None
    withdrawn: tuple[Revision, ...]
    exact: bool


@dataclass(frozen=True, slots=True)
class Forgetting:
    """How to take a contribution out of a base: the versions it touches, oldest first, and what each becomes."""

    model: str
    newest: str
    redo: tuple[Redo, ...]


def find_version(hub: Hub, repo: str, version: str) -> Revision:
    """The pinned revision of a version tag; raises `NotFound` that lists the tags there are."""
    tags = hub.tags(repo)
    if version not in tags:
        raise NotFound(f"{repo}: no version {version}, there are {', '.join(sorted(tags)) or 'none'}")
    return Revision(repo, tags[version])


def load_manifest(hub: Hub, revision: Revision) -> Manifest | None:
    """``fusion.json`` at ``revision``, its bytes checked against the Hub's hash; None when there is none."""
    listed = {f.path: f for f in hub.files(revision)}
    if FILE not in listed:
        return None
    if listed[FILE].size > MAX_BYTES:
        raise FusionError(f"{revision} {FILE}: {listed[FILE].size} bytes, at most {MAX_BYTES} are allowed")
    return read_manifest(hub.read(revision, FILE, stop=MAX_BYTES), f"{revision} {FILE}")


def verify(hub: Hub, repo: str, version: str, work: Path, *, signed_by: Path | Identity | None = None) -> Checked:
    """Download a version into ``work`` and compare it with its manifest and, if asked, with its signature.

    ``signed_by`` is a public key's file (PEM) or an identity that signed keylessly; then a version without a signature
    and files that the signature does not cover are differences. Raises `HubError` when the Hub does not answer and
    `NotFound` when there is no such version.
    """
    revision = find_version(hub, repo, version)
    listed = {f.path: f for f in hub.files(revision)}
    steps: list[str] = []
    differences: list[str] = []
    for path, file in listed.items():
        if path not in UNSIGNED or path == SIGNATURE:
            try:
                hub.download(revision, file, _inside(work, file))
            except Corrupt as error:
                differences.append(str(error))
    if not differences:
        steps.append(f"{len(listed)} files have the hashes that the Hub lists for {revision}")
    manifest = load_manifest(hub, revision)
    if manifest is None:
        differences.append(f"{repo} {version} has no {FILE}: no iteration made it")
    else:
        differences += _compare_manifest(hub, revision, version, manifest, listed)
        steps.append(
            f"{FILE} names {len(manifest.contributions)} contributions and {len(manifest.weights)} weight files"
        )
    if signed_by is not None:
        problem = check_signature(work, signed_by) if SIGNATURE in listed else f"{repo} {version} is not signed"
        differences += [problem] if problem else []
        steps.append(f"{SIGNATURE} was checked with {signed_by.name}")
    return Checked(revision, version, tuple(steps), tuple(differences))


def _compare_manifest(
    hub: Hub, revision: Revision, version: str, manifest: Manifest, listed: Mapping[str, RemoteFile]
) -> Iterator[str]:
    """Every way in which a revision is not what its manifest says."""
    if manifest.version != version:
        yield f"{FILE} is of {manifest.version}, the tag says {version}"
    tags = hub.tags(revision.repo)
    if tags.get(manifest.parent_version) != manifest.base.sha:
        yield f"{FILE}: the base {manifest.base} is not what the tag {manifest.parent_version} points to"
    if sorted(c.revision.pinned for c in manifest.contributions) != sorted(i.model for i in manifest.recipe.inputs):
        yield f"{FILE}: recipe and contributions do not name the same inputs"
    promised = {f.path: f for f in manifest.weights}
    for path in sorted(set(promised) | {p for p in listed if WEIGHTS_NAME.fullmatch(p)}):
        if path not in listed or path not in promised:
            yield f"{path} is {'missing in the repository' if path in promised else f'not in {FILE}'}"
        elif (found := listed[path].sha256 or "no sha256") != promised[path].sha256:
            yield f"{path} has sha256 {found[:16]}, {FILE} says {str(promised[path].sha256)[:16]}"
    for file in (manifest.backbone, *manifest.report):
        if file.path not in listed or listed[file.path].blob != file.blob:
            yield f"{file.path} is not the one that {FILE} names"


def reproduce(hub: Hub, repo: str, version: str, work: Path, *, on_step: OnStep | None = None) -> Checked:
    """Fetch base and inputs of a version by their commits, fuse them again in ``work``, compare the bytes.

    Differences name the input whose bytes are not those that the manifest fused, or the output file that differs.
    Raises `NotFound` when an input was deleted since, `FusionError` when no iteration made the version.
    """
    revision = find_version(hub, repo, version)
    manifest = load_manifest(hub, revision)
    if manifest is None:
        raise FusionError(f"{repo} {version} has no {FILE}: no iteration made it, there is nothing to reproduce")
    tell = on_step or (lambda step: None)
    steps: list[str] = []
    differences: list[str] = []
    tell(f"fetching the base {manifest.base}")
    base = _fetch(hub, manifest.base, _fused_files(hub, manifest.base), work / "base", differences)
    folders: dict[str, Path] = {}
    for number, each in enumerate(manifest.contributions):
        tell(f"fetching {each.revision} ({number + 1} of {len(manifest.contributions)})")
        place = work / f"input-{number}"
        folders[each.revision.pinned] = _fetch(hub, each.revision, each.contribution.files, place, differences)
    steps.append(f"fetched the base and {len(folders)} inputs")
    if unknown := [each.model for each in manifest.recipe.inputs if each.model not in folders]:
        differences.append(f"{FILE}: the recipe has an input that is no contribution: {unknown[0]}")
    if not differences:
        tell(f"fusing by {manifest.recipe.method}")
        try:
            inputs = [folders[each.model] for each in manifest.recipe.inputs]
            written = fuse(manifest.recipe, base, inputs, work / "fused").files
        except CheckpointError as error:
            return Checked(revision, version, tuple(steps), (str(error),))
        steps.append(f"fused again by {manifest.recipe.method}")
        ours, promised = {f.name: f.sha256 for f in written}, {f.path: f.sha256 for f in manifest.weights}
        for name in sorted(set(ours) | set(promised)):
            if ours.get(name) != promised.get(name):
                rebuilt, said = str(ours.get(name, "nothing"))[:16], str(promised.get(name, "nothing"))[:16]
                differences.append(f"{name}: rebuilt {rebuilt}, {FILE} says {said}")
        differences += _compare_manifest(hub, revision, version, manifest, {f.path: f for f in hub.files(revision)})
    log.info("reproduce %s %s: %d differences", repo, version, len(differences))
    return Checked(revision, version, tuple(steps), tuple(differences))


def _fused_files(hub: Hub, revision: Revision) -> tuple[RemoteFile, ...]:
    return tuple(f for f in hub.files(revision) if FUSED_FILE.fullmatch(f.path))


def _fetch(hub: Hub, revision: Revision, files: tuple[RemoteFile, ...], folder: Path, differences: list[str]) -> Path:
    """Download by the hashes that we were told; a file that has others is a difference and is not used."""
    for file in files:
        try:
            hub.download(revision, file, _inside(folder, file))
        except Corrupt as error:
            differences.append(str(error))
    return folder


def _inside(folder: Path, file: RemoteFile) -> Path:
    """Where a file goes; a listing or a manifest that names a place outside the folder stops the work."""
    if problem := path_problem(file.path):
        raise CheckpointError(f"file name {file.path!a:.80} {problem}")
    return folder / file.path


def trace(hub: Hub, repo: str, version: str = "") -> tuple[Ancestor, ...]:
    """The versions from ``version`` (the newest by default) back to the first, by the manifests' own words."""
    tags = {name: sha for name, sha in hub.tags(repo).items() if name[:1] == "v" and name[1:].isdecimal()}
    name = version or max(tags, key=lambda tag: int(tag[1:]), default="")
    found: list[Ancestor] = []
    while name:
        revision = find_version(hub, repo, name)
        if revision in [a.revision for a in found]:
            raise FusionError(f"{repo}: the manifests go round in a circle at {name}")
        manifest = load_manifest(hub, revision)
        found.append(Ancestor(name, revision, manifest))
        if manifest is not None and tags.get(manifest.parent_version) != manifest.base.sha:
            raise FusionError(f"{repo} {name}: its base {manifest.base} is not {manifest.parent_version}")
        name = manifest.parent_version if manifest else ""
    return tuple(found)


def forget(hub: Hub, repo: str, model: str) -> Forgetting:
    """Plan how to take all contributions of the repository ``model`` (or ``model@sha``) out of the newest version.

    Raises `FusionError` when no version contains it. Nothing is written; see `Redo` for what stays.
    """
    ancestors = trace(hub, repo)
    redo: list[Redo] = []
    for ancestor in reversed(ancestors):
        if ancestor.manifest is None:
            continue
        recipe = ancestor.manifest.recipe
        out = tuple(r for r in (i.revision for i in recipe.inputs) if model in (r.repo, r.pinned))
        if out or redo:
            redo.append(Redo(ancestor.version, _leave_out(recipe, out), out, exact=bool(out) and not redo))
    if not redo:
        newest = ancestors[0].version if ancestors else "any version"
        raise FusionError(f"{model} is in no version of {repo} up to {newest}")
    return Forgetting(model, ancestors[0].version, tuple(redo))


def _leave_out(recipe: Recipe, out: tuple[Revision, ...]) -> Recipe | None:
    kept = tuple(each for each in recipe.inputs if each.revision not in out)
    if not kept:
        return None
    without, method = dataclasses.replace(recipe, inputs=kept), METHODS[recipe.method]
    times = method.divisor(without.coefficients) / method.divisor(recipe.coefficients)
    return dataclasses.replace(without, scale=recipe.scale * times)
