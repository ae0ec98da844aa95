"""List the finetunes of a base on the Hub, oldest first, each pinned to a commit."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator

from hubfusion.errors import NotFound
from hubfusion.hub import Hub, Listing
from hubfusion.hub.cards import TAG, read_card
from hubfusion.lineage import Finetune, Revision

log = logging.getLogger(__name__)


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
