"""Settings that must stand before any client library is imported, and the embedded Hub that tests talk to."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator

import pytest

for _name in [n for n in os.environ if n.startswith(("HF_", "HUGGING"))]:
    del os.environ[_name]
os.environ |= {
    "HF_HOME": tempfile.mkdtemp(prefix="hubfusion-tests-"),
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@pytest.fixture(autouse=True)
def forget_token_homes() -> Iterator[None]:
    """Tests share token texts but not servers: what one connected to must not keep another's token off its requests."""
    yield
    if client := sys.modules.get("hubfusion.hub.client"):
        client._homes.clear()
