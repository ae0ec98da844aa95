"""A base with published versions, made by the same calls as the bot makes: in memory, or on the embedded Hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hubfusion.checkpoint import open_checkpoint
from hubfusion.checkpoint.backbone import FILE as BACKBONE
from hubfusion.checkpoint.backbone import read_backbone, write_backbone
from hubfusion.codec import dumps
from hubfusion.evaluate.scores import Provenance, Score, Scores
from hubfusion.fuse import fuse
from hubfusion.hub import Change, Hub, connect
from hubfusion.lineage import Contributed, Contribution, Input, Recipe, RemoteFile, Revision
from hubfusion.release.gate import Decision
from hubfusion.release.manifest import FILE, Manifest, describe_file
from hubfusion.release.signature import SIGNATURE, Keyless, sign
from tests.bert_checkpoints import BASE, base_tensors, config, finetuned, weights, write_folder
from tests.fake_hub import FakeHub

WEIGHTS = "model.safetensors"


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def make_keys(folder: Path) -> tuple[Path, Path]:
    """A private and a public key; the test is skipped where signing is not installed."""
    pytest.importorskip("model_signing.signing", reason="the extra sign")
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / "key.pem", folder / "key.pub"
    private.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def scores(model: str) -> Scores:
    where = Provenance({"probe": "1" * 8}, {"org/news": "2" * 8}, {"torch": "2"}, "cpu")
    return Scores(model, (Score("org/news", "probe", "accuracy", (0,), (71.0,), 100),), where)


class World:
    """A base with v0 and an iteration after it for every list of contributors."""

    def __init__(self, folder: Path, *iterations: tuple[str, ...], signer: Path | Keyless | None = None) -> None:
        self.folder, self.signer = folder, signer
        self.hub: Any = self.make_hub()
        files = {"config.json": config(), "README.md": b"# base", WEIGHTS: weights(base_tensors())}
        self.head = self.put(BASE, files, "v0")
        self.hub.tag(BASE, "v0", self.head.sha)
        for number, authors in enumerate(iterations, 1):
            self.iterate(number, authors)

    def make_hub(self) -> Hub:
        return FakeHub()

    def put(self, repo: str, files: dict[str, bytes], title: str) -> Revision:
        """One more commit on main."""
        revision: Revision = self.hub.add(repo, files, title)
        return revision

    def iterate(self, number: int, authors: tuple[str, ...]) -> None:
        """Contribute, fuse, publish, tag: by the same calls as the bot."""
        at = self.folder / f"made-{number}"
        contributions, paths = [], []
        for seed, author in enumerate(authors):
            data = weights(finetuned(base_tensors(), 100 * number + seed))
            pushed = self.put(f"{author}/m", {WEIGHTS: data, "config.json": config()}, f"for v{number}")
            read = tuple(f for f in self.hub.files(pushed) if f.path == WEIGHTS)
            contributions.append(Contribution(pushed, author, self.head, "mit", ("org/news",), 600, read))
            paths.append(write_folder(at / author, {WEIGHTS: data}))
        inputs = tuple(Input(each.revision.pinned, 1.0 + i) for i, each in enumerate(contributions))
        recipe = Recipe(self.head.pinned, inputs)
        self.publish(recipe, contributions, paths, number)

    def publish(
        self, recipe: Recipe, contributions: Sequence[Contribution], paths: list[Path], number: int = 1
    ) -> None:
        """Fuse by a recipe over the newest version and make the result the next one."""
        at = self.folder / f"made-{number}"
        base = write_folder(at / "from", {WEIGHTS: self.read(self.head, WEIGHTS), "config.json": config()})
        fused = fuse(recipe, base, paths, at / "out")
        made = tuple(RemoteFile(f.name, f.size, "0" * 40, f.sha256) for f in fused.files)
        norms = {each.input.model: each.norm or 0.0 for each in fused.inputs}
        contributed = tuple(Contributed(each, norms[each.revision.pinned]) for each in contributions)
        (at / "out" / "config.json").write_bytes(config())
        with open_checkpoint(at / "out") as checkpoint:
            (at / BACKBONE).write_text(write_backbone(read_backbone(at / "out", checkpoint)))
        declared = describe_file(at / BACKBONE)
        decision, parent = Decision(True, 0.4, (), "better by 0.4"), f"v{number - 1}"
        manifest = Manifest(
            number, f"v{number}", parent, f"nonce-{number}", recipe, contributed, made, declared, ("org/news",),
            scores("base"), scores("candidate"), decision, {"python": "3.11"},
        )  # fmt: skip
        files: dict[str, bytes] = {"config.json": config(), FILE: dumps(manifest).encode()}
        files[WEIGHTS] = (at / "out" / WEIGHTS).read_bytes()
        files[BACKBONE] = (at / BACKBONE).read_bytes()
        if self.signer:
            staged = write_folder(at / "staged", files)
            files[SIGNATURE] = sign(staged, self.signer).read_bytes()
        self.head = self.put(BASE, files | {"README.md": b"# base"}, f"v{number}")
        self.hub.tag(BASE, f"v{number}", self.head.sha)

    def read(self, revision: Revision, path: str) -> bytes:
        found: bytes = self.hub.read(revision, path, stop=1 << 30)
        return found

    def tree(self, repo: str, sha: str) -> dict[str, Any]:
        return next(tree for commit, tree in self.hub.commits[repo] if commit.sha == sha)

    def rewrite(self, version: str, path: str, change: Any) -> None:
        """Change a published file in place, as a broken or hostile Hub would."""
        tree = self.tree(BASE, self.hub.tagged[BASE][version])
        tree[path] = change(tree[path])

    def edit_manifest(self, at: str, **fields: Any) -> None:
        self.rewrite(at, FILE, lambda text: json.dumps(json.loads(text) | fields).encode())


class ServedWorld(World):
    """The same on a Hub that runs, each repository pushed by its owner over HTTP; ``ibm`` is an organization."""

    def __init__(
        self, folder: Path, endpoint: str, *iterations: tuple[str, ...], signer: Path | Keyless | None = None
    ) -> None:
        self.endpoint = endpoint
        super().__init__(folder, *iterations, signer=signer)

    def make_hub(self) -> Hub:
        return connect(self.endpoint, "hf_ibm")

    def put(self, repo: str, files: dict[str, bytes], title: str) -> Revision:
        owner = repo.partition("/")[0]
        hub = self.hub if owner == "ibm" else connect(self.endpoint, f"hf_{owner}")
        hub.create(repo)
        parent = hub.resolve(repo).sha
        return Revision(repo, hub.commit(repo, Change(title, parent, f"{title}-nonce", files)))
