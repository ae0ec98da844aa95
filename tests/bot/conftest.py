"""The embedded Hub with a founded base that tests of whole iterations use, and its faults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.test_client import Faults
from tests.world import World, make_world


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: Faults) -> Iterator[World]:
    monkeypatch.setattr("hubfusion.hub.client.time.sleep", lambda seconds: None)
    made = make_world(tmp_path, monkeypatch, faults=faults)
    yield made
    made.server.stop()
