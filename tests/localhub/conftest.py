"""A Hub for each test module, and the real client of each of its users."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
from huggingface_hub import HfApi, constants

from hubfusion.localhub import LocalHub

USERS = {"ann": "hf_ann", "bob": "hf_bob", "ibm-bot": "hf_ibm"}
ORGS = {"ibm": ["ibm-bot"]}


@dataclass
class World:
    """A running Hub with clients for ann, bob, the bot of an organization, and nobody."""

    hub: LocalHub
    ann: HfApi
    bob: HfApi
    bot: HfApi
    anon: HfApi

    @property
    def endpoint(self) -> str:
        return self.hub.endpoint


def clients(hub: LocalHub) -> World:
    ann, bob, bot = (HfApi(endpoint=hub.endpoint, token=token) for token in USERS.values())
    return World(hub, ann, bob, bot, HfApi(endpoint=hub.endpoint, token=False))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with LocalHub(tmp_path_factory.mktemp("hub"), USERS, ORGS) as hub:
        yield clients(hub)


@pytest.fixture(autouse=True)
def _no_xet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads go as LFS; tests of Xet run the client in its own process."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "store"
