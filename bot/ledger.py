"""The bot's memory: what was judged, promoted, refused and said, one JSON object a line in a dataset repository.

Runs are stateless. Each event is appended to ``ledger.jsonl`` by a commit on top of the one that was read. If two bots
append at once, the slower commit is a conflict; it reads again, merges and retries. Events are never changed, and an
event that is already in the ledger is not added.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from hubfusion.codec import from_json, to_json
from hubfusion.errors import FusionError, NotFound
from hubfusion.hub import Files, Hub, RepoKind
from hubfusion.hub import append as append_to
from hubfusion.lineage import Reason, Revision
from hubfusion.release.isolation import Trial

FILE = "ledger.jsonl"
MAX_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Judged:
    """A finetune that will not be fused, and why."""

    event: ClassVar[str] = "judged"
    finetune: Revision
    author: str
    reason: Reason
    detail: str
    iteration: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """A finetune that is part of a version, with its leave-one-out gain (points) if that was measured."""

    finetune: Revision
    leave_one_out_gain: float | None = None


@dataclass(frozen=True, slots=True)
class Promoted:
    """An iteration whose candidate became version ``version`` of the base, at commit ``sha``."""

    event: ClassVar[str] = "promoted"
    iteration: int
    version: str
    sha: str
    contributions: tuple[Accepted, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """An iteration whose candidate the gate refused, with the gate's sentences and the scores it judged by.

    ``trials`` are the smaller sets that were tried without finding a harmful contribution.
    """

    event: ClassVar[str] = "refused"
    iteration: int
    base: Revision
    contributions: tuple[Revision, ...]
    objections: tuple[str, ...]
    summary: str
    trials: tuple[Trial, ...] = ()


@dataclass(frozen=True, slots=True)
class Said:
    """One answer to one finetune; ``discussion`` is its number, or None where the owner allows no discussions."""

    event: ClassVar[str] = "said"
    finetune: Revision
    discussion: int | None


Event = Judged | Promoted | Refused | Said
KINDS: dict[str, type[Event]] = {kind.event: kind for kind in (Judged, Promoted, Refused, Said)}


@dataclass(frozen=True, slots=True)
class Ledger:
    """All events, oldest first, and the commit that they were read at."""

    events: tuple[Event, ...]
    head: str

    @property
    def judged(self) -> frozenset[Revision]:
        """Every finetune commit that an iteration has dealt with: not to be looked at again."""
        done = {e.finetune for e in self.events if isinstance(e, Judged)}
        for event in self.events:
            if isinstance(event, Promoted):
                done.update(accepted.finetune for accepted in event.contributions)
            elif isinstance(event, Refused):
                done.update(event.contributions)
        return frozenset(done)

    @property
    def next_iteration(self) -> int:
        """One more than the newest iteration that came to a decision; the first is 1."""
        return 1 + max((e.iteration for e in self.events if isinstance(e, Promoted | Refused)), default=0)

    @property
    def promotions(self) -> tuple[Promoted, ...]:
        """Promoted iterations, oldest first."""
        return tuple(e for e in self.events if isinstance(e, Promoted))

    @property
    def said(self) -> frozenset[Revision]:
        """Finetunes whose owners have their answer."""
        return frozenset(e.finetune for e in self.events if isinstance(e, Said))


def read_ledger(hub: Hub, repo: str) -> Ledger:
    """Read the ledger at its newest commit; a repository without the file is an empty ledger."""
    head = hub.resolve(repo, kind=RepoKind.DATASET)
    return Ledger(_events(hub, head), head.sha)


def _events(hub: Hub, head: Revision) -> tuple[Event, ...]:
    try:
        text = hub.read(head, FILE, stop=MAX_BYTES, kind=RepoKind.DATASET).decode()
    except NotFound:
        text = ""
    where = f"{head} {FILE}"
    return tuple(_parse(line, f"{where}:{i}") for i, line in enumerate(text.splitlines(), 1))


def append(hub: Hub, repo: str, events: Iterable[Event], *, nonce: str, title: str) -> Ledger:
    """Add the events that are not there yet, in one commit; nothing new, no commit. Returns the ledger as it is now."""
    wanted, everything = tuple(dict.fromkeys(events)), tuple[Event, ...]()

    def plan(head: Revision) -> tuple[str, Files]:
        nonlocal everything
        there = _events(hub, head)
        everything = there + tuple(e for e in wanted if e not in there)
        return title, {FILE: "".join(map(_line, everything)).encode()} if everything != there else {}

    head = append_to(hub, repo, plan, nonce=nonce)
    return Ledger(everything, head)


def _line(event: Event) -> str:
    return json.dumps({"event": event.event, **to_json(event)}, sort_keys=True, ensure_ascii=False) + "\n"


def _parse(line: str, where: str) -> Event:
    try:
        data = json.loads(line)
        kind = KINDS[data.pop("event")]
    except (ValueError, KeyError, AttributeError, TypeError):
        raise FusionError(f"{where}: not an event of this version of the bot: {line[:60]!r}") from None
    try:
        return from_json(kind, data, kind.event)
    except FusionError as error:
        raise FusionError(f"{where}: not an event of this version of the bot: {error}") from None
