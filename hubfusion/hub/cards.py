"""Parse the YAML front matter of untrusted cards into plain JSON types."""

from __future__ import annotations

from datetime import date
from typing import Any

import yaml

from hubfusion.errors import NotFound
from hubfusion.hub.protocol import Hub
from hubfusion.lineage import Revision

TAG = "cold-fusion"
MAX_CARD_BYTES = 64 << 10
MAX_DEPTH = 8


def read_card(hub: Hub, revision: Revision) -> dict[str, Any]:
    """The front matter of ``README.md`` at a pinned commit; empty when there is none or it cannot be read."""
    try:
        text = hub.read(revision, "README.md", stop=MAX_CARD_BYTES)
    except NotFound:
        return {}
    return front_matter(text.decode("utf-8", "replace"))


def front_matter(text: str) -> dict[str, Any]:
    """The YAML block between the ``---`` lines at the top of a card, as plain JSON types; empty if it is not one.

    Anchors and aliases are refused (a few lines of them expand to gigabytes), dates become text.

    >>> front_matter("---\\nlicense: mit\\n---\\n# hello")
    {'license': 'mit'}
    >>> front_matter("no card")
    {}
    """
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in [line.rstrip() for line in lines[1:]]:
        return {}
    end = [line.rstrip() for line in lines[1:]].index("---") + 1
    block = "\n".join(lines[1:end])
    try:
        if any(isinstance(token, yaml.AliasToken | yaml.AnchorToken) for token in yaml.scan(block)):
            return {}
        data = _plain(yaml.safe_load(block), MAX_DEPTH)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _plain(value: Any, depth: int) -> Any:
    if depth == 0:
        raise ValueError("nested too deep")
    if isinstance(value, dict):
        return {str(k): _plain(v, depth - 1) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v, depth - 1) for v in value]
    if isinstance(value, date):
        return value.isoformat()
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
