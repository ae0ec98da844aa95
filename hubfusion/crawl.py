"""Which finetunes of this base are out there, oldest first, each pinned to a commit."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator
from datetime import date
from typing import Any

import yaml

from hubfusion.errors import NotFound
from hubfusion.hub import Hub, Listing
from hubfusion.lineage import Finetune, Revision

log = logging.getLogger(__name__)

TAG = "cold-fusion"
MAX_CARD_BYTES = 64 << 10
MAX_DEPTH = 8


def crawl(hub: Hub, base: str, judged: Container[Revision] = ()) -> tuple[Finetune, ...]:
    """Every finetune offered to ``base`` whose head commit is not in ``judged``, the one that waits longest first.

    Offered means that its owner put our tag on it and named ``base`` as its base model; finetunes that the Hub's own
    relation knows and that carry no tag are counted and left alone, as are those offered to another base. A repository
    that vanishes while we look is left out. Costs one listing per page of models, two small requests a new finetune.
    """
    offered = {i.revision.repo: i for i in hub.models(TAG, f"base_model:{base}") if i.revision.repo != base}
    related = {i.revision.repo for i in hub.models(f"base_model:finetune:{base}")} - {base}
    new = [item for item in offered.values() if item.revision not in judged]
    log.info(
        "crawl: %d finetunes offered to %s, %d of them new; %d more are not tagged %s",
        len(offered), base, len(new), len(related - set(offered)), TAG,
    )  # fmt: skip
    return tuple(_pinned(hub, sorted(new, key=lambda item: (item.modified, item.revision))))


def _pinned(hub: Hub, listings: list[Listing]) -> Iterator[Finetune]:
    for item in listings:
        try:
            files = hub.files(item.revision)
            card = read_card(hub, item.revision)
        except NotFound as error:
            log.warning("crawl: %s is gone: %s", item.revision, error)
            continue
        author = item.revision.repo.split("/")[0]
        yield Finetune(item.revision, author, item.modified, item.tags, card, files, item.gated)


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
