from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hubfusion.codec import dumps
from hubfusion.errors import CheckpointError, Corrupt, FusionError, NotFound
from hubfusion.lineage import Revision
from hubfusion.release.manifest import FILE
from hubfusion.release.provenance import Redo, forget, reproduce, trace, verify
from hubfusion.release.signature import SIGNATURE, check_signature, sign
from tests.bert_checkpoints import BASE, write_folder
from tests.published import WEIGHTS, World, flip, make_keys

REPORT = {"path": "soundness.json", "size": 2, "blob": "0" * 40, "sha256": "0" * 64}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "world", ("ann", "bob", "eve"), ("ann", "cat"), ("dan",))


def test_a_published_version_is_rebuilt_to_the_same_bytes_from_a_clean_directory(world: World, tmp_path: Path) -> None:
    said: list[str] = []
    found = reproduce(world.hub, BASE, "v1", tmp_path / "clean", on_step=said.append)
    assert found.differences == () and found.version == "v1"
    assert (tmp_path / "clean" / "fused" / WEIGHTS).read_bytes() == world.read(found.revision, WEIGHTS)
    assert said[0].startswith("fetching the base ibm/ColD-Fusion@") and said[-1] == "fusing by average"
    assert reproduce(world.hub, BASE, "v3", tmp_path / "other").differences == ()


@pytest.mark.parametrize("bit", [8 * 5000, 8 * 20_000 + 3, -1])
def test_one_flipped_bit_in_one_input_is_found_and_the_input_named(world: World, tmp_path: Path, bit: int) -> None:
    tree = world.hub.commits["bob/m"][0][1]
    tree[WEIGHTS] = flip(tree[WEIGHTS], bit if bit > 0 else 8 * len(tree[WEIGHTS]) - 1)
    found = reproduce(world.hub, BASE, "v1", tmp_path / "clean")
    assert len(found.differences) == 1
    assert (
        found.differences[0].startswith("bob/m@") and "model.safetensors: the bytes do not have" in found.differences[0]
    )


def test_a_changed_coefficient_in_the_manifest_gives_other_bytes_and_says_so(world: World, tmp_path: Path) -> None:
    recipe = json.loads(world.read(Revision(BASE, world.hub.tagged[BASE]["v1"]), FILE))["recipe"]
    recipe["inputs"][2]["coefficient"] = 3.5
    world.edit_manifest("v1", recipe=recipe)
    (difference,) = reproduce(world.hub, BASE, "v1", tmp_path / "clean").differences
    assert difference.startswith("model.safetensors: rebuilt ") and "fusion.json says" in difference


def test_every_flipped_bit_in_the_hash_that_the_manifest_promises_is_found(world: World, tmp_path: Path) -> None:
    text = world.read(Revision(BASE, world.hub.tagged[BASE]["v1"]), FILE)
    made = json.loads(text)["weights"]
    wrong = ("0" if made[0]["sha256"][0] != "0" else "1") + made[0]["sha256"][1:]
    world.edit_manifest("v1", weights=[made[0] | {"sha256": wrong}])
    assert "model.safetensors has sha256" in verify(world.hub, BASE, "v1", tmp_path / "a").differences[0]
    assert any("rebuilt" in d for d in reproduce(world.hub, BASE, "v1", tmp_path / "b").differences)


def test_a_manifest_that_is_not_one_is_an_error_with_its_place(world: World, tmp_path: Path) -> None:
    world.edit_manifest("v1", iteration="one")
    with pytest.raises(FusionError, match=r"ibm/ColD-Fusion@\w+ fusion.json.iteration: expected int"):
        verify(world.hub, BASE, "v1", tmp_path)


@pytest.mark.parametrize("schema", [1, None])
def test_a_manifest_of_another_schema_is_one_line(world: World, tmp_path: Path, schema: int | None) -> None:
    """A manifest of schema 1 has other keys, too: the schema is the first thing that is said."""
    world.edit_manifest("v1", schema=schema, norms=[1.0])
    with pytest.raises(FusionError, match=rf"ibm/ColD-Fusion@\w+ fusion.json: schema must be 2, got {schema}$"):
        verify(world.hub, BASE, "v1", tmp_path)


def test_a_manifest_that_names_no_commit_is_refused(world: World, tmp_path: Path) -> None:
    text = world.read(Revision(BASE, world.hub.tagged[BASE]["v1"]), FILE)
    recipe = json.loads(text)["recipe"]
    recipe["inputs"][0]["model"] = "ann/m@main"
    world.edit_manifest("v1", recipe=recipe)
    with pytest.raises(FusionError, match="a model must be pinned as owner/name@<40 .* got 'ann/m@main'"):
        verify(world.hub, BASE, "v1", tmp_path)


def test_contributions_are_joined_with_the_recipe_by_name_whatever_their_order(world: World, tmp_path: Path) -> None:
    text = world.read(Revision(BASE, world.hub.tagged[BASE]["v1"]), FILE)
    world.edit_manifest("v1", contributions=json.loads(text)["contributions"][::-1])
    assert reproduce(world.hub, BASE, "v1", tmp_path).differences == ()


def test_an_input_that_is_no_contribution_is_named_and_nothing_is_fused(world: World, tmp_path: Path) -> None:
    text = world.read(Revision(BASE, world.hub.tagged[BASE]["v1"]), FILE)
    world.edit_manifest("v1", contributions=json.loads(text)["contributions"][1:])
    found = reproduce(world.hub, BASE, "v1", tmp_path)
    assert found.differences[0].startswith("fusion.json: the recipe has an input that is no contribution: ann/m@")
    assert not (tmp_path / "fused").exists()


def test_verify_finds_nothing_wrong_with_what_was_published(world: World, tmp_path: Path) -> None:
    found = verify(world.hub, BASE, "v2", tmp_path)
    assert found.differences == ()
    assert found.steps[-1] == "fusion.json names 2 contributions and 1 weight files"


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"version": "v7"}, "fusion.json is of v7, the tag says v2"),
        ({"parent_version": "v0"}, "is not what the tag v0 points to"),
        ({"contributions": []}, "do not name the same inputs"),
        ({"weights": []}, "model.safetensors is not in fusion.json"),
        ({"report": [REPORT]}, "soundness.json is not the one that fusion.json names"),
        ({"report": [REPORT | {"path": "config.json"}]}, "config.json is not the one that fusion.json names"),
    ],
)
def test_verify_names_what_the_manifest_gets_wrong(world: World, tmp_path: Path, fields: Any, says: str) -> None:
    world.edit_manifest("v2", **fields)
    (difference,) = verify(world.hub, BASE, "v2", tmp_path).differences
    assert says in difference


def test_verify_names_weights_that_are_missing_or_other_than_promised(world: World, tmp_path: Path) -> None:
    world.rewrite("v2", WEIGHTS, lambda data: flip(data, 80_000))
    assert "model.safetensors has sha256" in verify(world.hub, BASE, "v2", tmp_path / "a").differences[0]
    world.tree(BASE, world.hub.tagged[BASE]["v2"]).pop(WEIGHTS)
    assert "model.safetensors is missing" in verify(world.hub, BASE, "v2", tmp_path / "b").differences[0]


def test_the_first_version_has_no_manifest_and_unknown_ones_are_listed(world: World, tmp_path: Path) -> None:
    assert "no iteration made it" in verify(world.hub, BASE, "v0", tmp_path).differences[0]
    with pytest.raises(FusionError, match="nothing to reproduce"):
        reproduce(world.hub, BASE, "v0", tmp_path)
    with pytest.raises(NotFound, match="no version v9, there are v0, v1, v2, v3"):
        verify(world.hub, BASE, "v9", tmp_path)


def test_a_manifest_that_names_a_file_outside_the_folder_writes_nothing_there(world: World, tmp_path: Path) -> None:
    contributions = json.loads(world.read(Revision(BASE, world.hub.tagged[BASE]["v1"]), FILE))["contributions"]
    contributions[0]["contribution"]["files"][0]["path"] = "../../escaped"
    world.edit_manifest("v1", contributions=contributions)
    with pytest.raises(CheckpointError, match="points outside its folder"):
        reproduce(world.hub, BASE, "v1", tmp_path / "deep" / "er" / "clean")
    assert not list(tmp_path.rglob("escaped"))


def test_an_input_that_was_deleted_since_is_said(world: World, tmp_path: Path) -> None:
    world.hub.commits.pop("eve/m")
    with pytest.raises(NotFound, match="eve/m@"):
        reproduce(world.hub, BASE, "v1", tmp_path)


def test_lineage_goes_back_to_the_first_version(world: World) -> None:
    ancestors = trace(world.hub, BASE)
    assert [a.version for a in ancestors] == ["v3", "v2", "v1", "v0"]
    assert ancestors[-1].manifest is None and ancestors[2].manifest is not None
    assert [c.contribution.author for c in ancestors[2].manifest.contributions] == ["ann", "bob", "eve"]
    assert [a.version for a in trace(world.hub, BASE, "v1")] == ["v1", "v0"]


def test_lineage_does_not_believe_a_manifest_that_names_another_parent(world: World) -> None:
    world.edit_manifest("v3", parent_version="v1")
    with pytest.raises(FusionError, match="v3: its base .* is not v1"):
        trace(world.hub, BASE)


def test_a_withdrawn_contribution_is_planned_out_of_each_version_that_it_touches(world: World) -> None:
    plan = forget(world.hub, BASE, "ann/m")
    assert [r.version for r in plan.redo] == ["v1", "v2", "v3"] and plan.newest == "v3"
    first, second, third = plan.redo
    assert first.recipe is not None and [i.revision.repo for i in first.recipe.inputs] == ["bob/m", "eve/m"]
    assert first.recipe.coefficients == (2.0, 3.0) and first.exact
    assert (
        first.recipe.scale == 1.25
    )  # Σ c τ / k stays what each of the others added: mean of (2, 3) over mean of (1, 2, 3)
    assert second.recipe is not None and not second.exact
    assert [i.revision.repo for i in second.recipe.inputs] == ["cat/m"]
    assert third.withdrawn == () and not third.exact and third.recipe is not None
    assert json.loads(dumps(plan))["redo"][0]["version"] == "v1"


def test_a_version_of_one_contribution_alone_falls_away_without_it(world: World) -> None:
    plan = forget(world.hub, BASE, "dan/m")
    sha = world.hub.commits["dan/m"][0][0].sha
    assert plan.redo == (Redo("v3", None, (Revision("dan/m", sha),), exact=True),)
    assert forget(world.hub, BASE, f"dan/m@{sha}").redo == plan.redo


def test_what_was_never_used_cannot_be_forgotten(world: World) -> None:
    with pytest.raises(FusionError, match="mallory/m is in no version of ibm/ColD-Fusion up to v3"):
        forget(world.hub, BASE, "mallory/m")


def test_lineage_that_goes_round_in_a_circle_ends(world: World) -> None:
    recipe = json.loads(world.read(Revision(BASE, world.hub.tagged[BASE]["v1"]), FILE))["recipe"]
    base = Revision(BASE, world.hub.tagged[BASE]["v2"])
    world.edit_manifest("v1", parent_version="v2", recipe=recipe | {"base": base.pinned})
    with pytest.raises(FusionError, match="go round in a circle at v2"):
        trace(world.hub, BASE)


def test_weights_that_are_not_what_the_manifest_rebuilds_are_a_difference(world: World, tmp_path: Path) -> None:
    world.rewrite("v1", WEIGHTS, lambda data: flip(data, 80_000))
    (difference,) = reproduce(world.hub, BASE, "v1", tmp_path / "clean").differences
    assert difference.startswith("model.safetensors has sha256") and "fusion.json says" in difference


def test_a_manifest_too_large_to_be_one_is_not_read(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    import hubfusion.release.provenance as module

    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    with pytest.raises(FusionError, match="fusion.json: .* bytes, at most 1000 are allowed"):
        trace(world.hub, BASE)


def test_a_download_with_other_bytes_than_listed_is_a_difference_of_verify(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def corrupt(revision: Revision, file: Any, target: Path, *_: Any, **__: Any) -> Path:
        raise Corrupt(f"{revision} {file.path}: the bytes do not have the hash that the Hub lists, twice")

    monkeypatch.setattr(world.hub, "download", corrupt)
    found = verify(world.hub, BASE, "v1", tmp_path).differences
    assert len(found) == 4 and any("model.safetensors: the bytes" in d for d in found)


# -- signatures: only where model-signing is installed ------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return make_keys(tmp_path)


def test_a_signed_version_verifies_and_one_flipped_bit_anywhere_does_not(
    tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    private, public = keys
    world = World(tmp_path / "world", ("ann", "bob"), signer=private)
    assert verify(world.hub, BASE, "v1", tmp_path / "good", signed_by=public).differences == ()
    for path in (WEIGHTS, FILE, "config.json", SIGNATURE):
        tree = world.tree(BASE, world.hub.tagged[BASE]["v1"])
        kept = tree[path]
        # A space more at the end, or a bit in the middle: for JSON the first, so that only the signature can tell.
        tree[path] = kept + b" " if path in (FILE, "config.json") else flip(kept, 4 * len(kept))
        found = verify(world.hub, BASE, "v1", tmp_path / path.replace(".", "-"), signed_by=public).differences
        assert any(d.startswith("model.sig does not hold") for d in found), (path, found)
        tree[path] = kept


def test_an_unsigned_version_and_a_file_too_many_do_not_pass_with_a_key(
    tmp_path: Path, world: World, keys: tuple[Path, Path]
) -> None:
    assert verify(world.hub, BASE, "v1", tmp_path / "a", signed_by=keys[1]).differences == (f"{BASE} v1 is not signed",)
    signed = World(tmp_path / "signed", ("ann", "bob"), signer=keys[0])
    signed.tree(BASE, signed.hub.tagged[BASE]["v1"])["tokenizer.json"] = b"{}"
    (difference,) = verify(signed.hub, BASE, "v1", tmp_path / "b", signed_by=keys[1]).differences
    assert "tokenizer.json" in difference


def test_a_key_that_is_none_is_one_line(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    folder = write_folder(tmp_path / "folder", {"a": b"1"})
    (tmp_path / "bad.pem").write_bytes(b"-----BEGIN NONSENSE-----")
    with pytest.raises(FusionError, match="private key .*bad.pem: ValueError"):
        sign(folder, tmp_path / "bad.pem")
    with pytest.raises(FusionError, match="public key .*bad.pem: ValueError"):
        check_signature(folder, tmp_path / "bad.pem")


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hubfusion.release.signature as module

    def missing(name: str) -> Any:
        raise ImportError(f"no module {name}")

    monkeypatch.setattr(module, "import_module", missing)
    with pytest.raises(FusionError, match=r"pip install '\.\[sign\]'"):
        sign(tmp_path, tmp_path / "key.pem")


def test_the_fake_world_is_what_the_manifest_type_says(world: World) -> None:
    manifest = trace(world.hub, BASE)[0].manifest
    assert manifest is not None and manifest.base == trace(world.hub, BASE)[1].revision
    assert dataclasses.replace(manifest, version="v3") == manifest
