"""Which Hub a command talks to and as whom: ``HF_ENDPOINT`` and ``HF_TOKEN``, as `huggingface_hub` names them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hubfusion.hub import Hub

ENDPOINT = "https://huggingface.co"


def open_hub() -> Hub:
    """The Hub of the environment; without a token it reads as anybody may."""
    from hubfusion.hub import connect

    return connect(os.environ.get("HF_ENDPOINT", ENDPOINT), os.environ.get("HF_TOKEN"))
