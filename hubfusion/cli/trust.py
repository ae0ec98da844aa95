"""`hubfusion inspect`, `verify`, `reproduce`, `lineage`, `forget`: checks before and after a fuse."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hubfusion.cli.access import open_hub
from hubfusion.cli.app import app
from hubfusion.errors import FusionError

if TYPE_CHECKING:
    from hubfusion.hub import Hub
    from hubfusion.lineage import Contribution
    from hubfusion.release.provenance import Checked

Work = Annotated[Path | None, typer.Option("--work", help="Folder to download into; a temporary one by default.")]
VERSION = re.compile(r"(?P<repo>[^@]+/[^@]+)@(?P<version>[^@]+)")


def _version(text: str) -> tuple[str, str]:
    if not (found := VERSION.fullmatch(text)):
        raise FusionError(f"a version is written OWNER/BASE@vN, got {text!r}")
    return found["repo"], found["version"]


def _fetch(text: str, hub: Hub | None, folder: Path) -> tuple[Contribution, Path]:
    """A local folder as it is, or the weights of ``owner/name[@revision]`` downloaded into ``folder``."""
    from hubfusion.checkpoint.backbone import FUSED_FILE
    from hubfusion.lineage import Contribution, Revision

    if Path(text).is_dir():
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", Path(text).resolve().name).lstrip(".-") or "folder"
        revision = Revision(f"local/{name[:90]}", "0" * 40)
        return Contribution(revision, "local", revision, "", (), None, ()), Path(text)
    if hub is None or text.count("/") != 1:
        raise FusionError(f"{text}: neither a local folder nor OWNER/NAME on the Hub")
    repo, _, name = text.partition("@")
    revision = hub.resolve(repo, name or "main")
    files = tuple(f for f in hub.files(revision) if FUSED_FILE.fullmatch(f.path))
    for file in files:
        hub.download(revision, file, folder / file.path)
    return Contribution(revision, repo.partition("/")[0], revision, "", (), None, files), folder


@app.command()
def inspect(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL…", help="Finetunes: folders or OWNER/NAME, with @revision if need be.")
    ],
    base: Annotated[str, typer.Option(help="The base: a folder or OWNER/NAME, with @revision if need be.")],
    version: Annotated[list[str] | None, typer.Option(help="Earlier versions to compare with, NAME=FOLDER.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Write the picture here.")] = None,
    data: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
    work: Work = None,
) -> None:
    """Say where finetunes lie in weight space, and what the bot would reject them for.

    Example: hubfusion inspect ann/news bob/mail --base ibm/ColD-Fusion@v3 --svg region.svg
    """
    from hubfusion.codec import dumps
    from hubfusion.screen import examine
    from hubfusion.screen.weight_space import draw, lines

    hub = None if all(Path(m).is_dir() for m in (*models, base)) else open_hub()
    earlier = {name: Path(folder) for name, _, folder in (v.partition("=") for v in version or [])}
    with tempfile.TemporaryDirectory() as temporary:
        folder = work or Path(temporary)
        fetched = [_fetch(model, hub, folder / f"model-{i}") for i, model in enumerate(models)]
        ours = _fetch(base, hub, folder / "base")[1]
        report = examine(ours, fetched, tag="base", versions=earlier, screened=False)
    for line in lines(report):
        print(line)
    if svg:
        svg.write_text(draw(report))
    if data:
        data.write_text(dumps(report))


@app.command()
def verify(
    revision: Annotated[str, typer.Argument(metavar="OWNER/BASE@vN")],
    key: Annotated[Path | None, typer.Option(help="Public key (PEM); then the version must be signed with it.")] = None,
    identity: Annotated[
        str | None, typer.Option(help="Who must have signed it keylessly: the URL of a workflow, an address.")
    ] = None,
    identity_provider: Annotated[
        str | None, typer.Option(help="Issuer that vouched for the identity; GitHub Actions by default.")
    ] = None,
    trust: Annotated[
        Path | None, typer.Option(help="File that describes another Sigstore than the public one (for --identity).")
    ] = None,
    work: Work = None,
) -> None:
    """Compare a published version with its manifest and, told who signed it, with its signature; exit 1 if they differ.

    Example: hubfusion verify ibm/ColD-Fusion@v3 --key maintainers.pub
    """
    from hubfusion.release.provenance import verify as check
    from hubfusion.release.signature import ACTIONS, Identity

    repo, version = _version(revision)
    if identity is None and (identity_provider or trust):
        raise FusionError("--identity-provider and --trust say more about --identity, which is missing")
    if identity is not None and key is not None:
        raise FusionError("--key and --identity: a version has one signature, by a key or by an identity")
    keyless = Identity(identity, identity_provider or ACTIONS, trust) if identity is not None else None
    with tempfile.TemporaryDirectory() as temporary:
        place = work or Path(temporary)
        _say(check(open_hub(), repo, version, place, signed_by=keyless or key), "as its manifest says")


@app.command()
def reproduce(revision: Annotated[str, typer.Argument(metavar="OWNER/BASE@vN")], work: Work = None) -> None:
    """Fetch the pinned inputs of a version, fuse them again, compare the bytes; exit code 1 if they differ.

    Example: hubfusion reproduce ibm/ColD-Fusion@v3 --work rebuilt
    """
    from hubfusion.release.provenance import reproduce as rebuild

    repo, version = _version(revision)
    with tempfile.TemporaryDirectory() as temporary:
        _say(rebuild(open_hub(), repo, version, work or Path(temporary), on_step=print), "rebuilt to the same bytes")


def _say(found: Checked, good: str) -> None:
    for step in found.steps:
        print(step)
    for difference in found.differences:
        print(f"DIFFERS: {difference}")
    if found.differences:
        count = f"{len(found.differences)} difference{'s' if len(found.differences) > 1 else ''}"
        raise FusionError(f"{found.revision.repo} {found.version}: {count}")
    print(f"{found.revision.repo} {found.version} is {good}")


@app.command()
def lineage(
    revision: Annotated[str, typer.Argument(metavar="OWNER/BASE[@vN]")],
    model: Annotated[str | None, typer.Option(help="Only the versions that this USER/MODEL touches.")] = None,
) -> None:
    """Print which contributions a version contains, back to the first version.

    Example: hubfusion lineage ibm/ColD-Fusion --model ann/news
    """
    from hubfusion.release.provenance import forget, trace

    repo, _, version = revision.partition("@")
    hub = open_hub()
    touched = {redo.version for redo in forget(hub, repo, model).redo} if model else None
    for ancestor in trace(hub, repo, version):
        if touched is not None and ancestor.version not in touched:
            continue
        manifest = ancestor.manifest
        made = f"{manifest.recipe.method} of {len(manifest.contributions)}" if manifest else "no manifest: the start"
        print(f"{ancestor.version}  {ancestor.revision}  {made}")
        for each in manifest.contributions if manifest else ():
            print(f"    {each.revision}  {each.contribution.license}  {', '.join(each.contribution.datasets)}")


@app.command()
def forget(
    model: Annotated[str, typer.Argument(metavar="USER/MODEL[@sha]")],
    base: Annotated[str, typer.Option(help="The base that contains it.")],
    out: Annotated[Path | None, typer.Option(help="Write the plan with its recipes here, as JSON.")] = None,
) -> None:
    """Plan the versions without a withdrawn contribution; changes nothing.

    Example: hubfusion forget ann/news --base ibm/ColD-Fusion --out plan.json
    """
    from hubfusion.codec import dumps
    from hubfusion.release.provenance import forget as plan

    found = plan(open_hub(), base, model)
    for redo in found.redo:
        left = (
            f"fuse the other {len(redo.recipe.inputs)} inputs again" if redo.recipe else "falls away, no input is left"
        )
        if not redo.withdrawn:
            left = f"carry its {len(redo.recipe.inputs) if redo.recipe else 0} inputs over to the version before it"
        kind = "exact" if redo.exact else "its inputs were trained from a version that contained it; that stays"
        print(f"{redo.version}: {left} ({kind})")
    if out:
        out.write_text(dumps(found))
