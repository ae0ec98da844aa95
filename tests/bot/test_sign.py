"""Releases of the bot with and without a signature."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bot.iteration import Verdict, run_iteration
from hubfusion.release.provenance import verify
from tests.published import make_keys
from tests.world import BASE, World


def test_a_release_is_signed_with_the_key_and_a_later_unsigned_one_carries_no_old_signature(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    private, public = make_keys(tmp_path)
    for user in ("alice", "bob"):
        world.offer(f"{user}/one")
    with caplog.at_level("DEBUG"):
        result = run_iteration(replace(world.run("signed"), signer=private), act=True)
    assert result.verdict is Verdict.PROMOTED and "publish: signed" in caplog.text
    assert not [line for line in private.read_text().splitlines()[1:-1] if line in caplog.text]
    hub = world.hub()
    assert verify(hub, BASE, "v1", tmp_path / "a", signed_by=public).differences == ()
    _, other = make_keys(tmp_path / "other")
    (said,) = verify(hub, BASE, "v1", tmp_path / "b", signed_by=other).differences
    assert said.startswith("model.sig does not hold")
    for user in ("alice", "bob"):
        world.offer(f"{user}/two")
    assert world.iterate("unsigned").verdict is Verdict.PROMOTED
    assert "model.sig" not in [f.path for f in hub.files(hub.resolve(BASE, "v2"))]
    assert verify(hub, BASE, "v2", tmp_path / "c", signed_by=public).differences == (f"{BASE} v2 is not signed",)
