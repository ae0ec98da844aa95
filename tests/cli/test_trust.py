"""The commands, over HTTP, on versions that were published to the embedded Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner, Result

from hubfusion.cli.commands import app
from hubfusion.errors import FusionError
from hubfusion.localhub import LocalHub
from tests.bert_checkpoints import BASE
from tests.published import WEIGHTS, ServedWorld, flip

USERS = {"ann": "hf_ann", "bob": "hf_bob", "eve": "hf_eve", "ibm-bot": "hf_ibm"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedWorld]:
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch, LocalHub(folder / "hub", USERS, {"ibm": ["ibm-bot"]}) as hub:
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield ServedWorld(folder / "made", hub.endpoint, ("ann", "bob"), ("ann", "eve"))


def run(world: ServedWorld, *argv: str) -> Result:
    return CliRunner().invoke(app, list(argv), env={"HF_ENDPOINT": world.endpoint, "HF_TOKEN": None})


def test_a_published_version_is_verified_and_reproduced_by_a_stranger_without_a_token(
    world: ServedWorld, tmp_path: Path
) -> None:
    found = run(world, "verify", f"{BASE}@v2")
    assert found.exit_code == 0 and f"{BASE} v2 is as its manifest says" in found.output, found.output
    rebuilt = run(world, "reproduce", f"{BASE}@v2", "--work", str(tmp_path / "clean"))
    assert rebuilt.exit_code == 0 and "rebuilt to the same bytes" in rebuilt.output, rebuilt.output
    assert (tmp_path / "clean" / "fused" / WEIGHTS).read_bytes() == world.read(world.head, WEIGHTS)


def test_lineage_and_forget_tell_what_a_contribution_touched(world: ServedWorld, tmp_path: Path) -> None:
    text = run(world, "lineage", BASE).output
    assert [line.split()[0] for line in text.splitlines() if line.startswith("v")] == ["v2", "v1", "v0"]
    assert "bob/m@" in text and "org/news" in text
    assert "v1" not in run(world, "lineage", BASE, "--model", "eve/m").output
    plan = run(world, "forget", "bob/m", "--base", BASE, "--out", str(tmp_path / "plan.json"))
    assert "v1: fuse the other 1 inputs again (exact)" in plan.output
    assert "v2: carry its 2 inputs over" in plan.output
    assert [r["version"] for r in json.loads((tmp_path / "plan.json").read_text())["redo"]] == ["v1", "v2"]


def test_inspect_measures_models_on_the_hub(world: ServedWorld, tmp_path: Path) -> None:
    svg, data = tmp_path / "region.svg", tmp_path / "region.json"
    found = run(world, "inspect", "ann/m", "bob/m", "--base", f"{BASE}@v1", "--svg", str(svg), "--json", str(data))
    assert found.exit_code == 0 and "bob/m@" in found.output, found.output
    assert svg.read_text().startswith("<svg") and len(json.loads(data.read_text())["measures"]) == 2


def test_what_cannot_be_understood_is_one_line(world: ServedWorld, tmp_path: Path) -> None:
    for argv, says in (
        (("verify", "v1"), "a version is written OWNER/BASE@vN, got 'v1'"),
        (("inspect", "nothing", "--base", BASE), "nothing: neither a local folder nor OWNER/NAME"),
        (("forget", "x/y", "--base", BASE), "x/y is in no version"),
    ):
        found = run(world, *argv)
        assert isinstance(found.exception, FusionError) and says in str(found.exception)


def test_one_flipped_bit_on_the_hubs_disk_is_found_and_the_input_named(world: ServedWorld, tmp_path: Path) -> None:
    """Last in this file: it leaves the Hub broken."""
    pushed = world.read(world.hub.resolve("bob/m"), WEIGHTS)
    stored = next(p for p in (world.folder.parent / "hub").rglob("*") if p.is_file() and p.read_bytes() == pushed)
    stored.chmod(0o644)
    stored.write_bytes(flip(pushed, 8 * 9000))
    found = run(world, "reproduce", f"{BASE}@v1", "--work", str(tmp_path))
    assert found.exit_code == 1 and isinstance(found.exception, FusionError)
    assert "DIFFERS: bob/m@" in found.output and "do not have the hash that the Hub lists" in found.output
