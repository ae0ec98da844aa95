"""Find the contributions that the gate objects to, by bisection over sets that are fused, evaluated and judged.

This is the bisection of merge queues with one difference: a half is not judged alone. Each set that is tried is a part
that the gate accepts plus half of the suspects, because a benign finetune alone may be a worse base than the one it
started from, and because some methods need several inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hubfusion.lineage import Revision
from hubfusion.release.gate import Decision


@dataclass(frozen=True, slots=True)
class Trial:
    """One set of inputs that was fused and evaluated to find out whom the gate objects to, and its decision."""

    inputs: tuple[Revision, ...]
    decision: Decision


@dataclass(frozen=True, slots=True)
class Culprit:
    """Input number ``number``: the gate accepts the fuse of ``company`` and refuses it with this one added."""

    number: int
    company: tuple[int, ...]

    @property
    def together(self) -> tuple[int, ...]:
        """The refused set, ascending."""
        return tuple(sorted((*self.company, self.number)))


class _Spent(Exception):
    pass


def isolate(
    inputs: int,
    passes: Callable[[tuple[int, ...]], bool | None],
    most: int,
    *,
    at_least: int = 1,
    suspicion: Sequence[float] = (),
) -> tuple[Culprit, ...]:
    """Find who must go so that the rest passes, knowing that all ``inputs`` together do not; empty when not found.

    ``passes`` judges a set of positions (ascending); it is asked at most ``most`` times and may answer None to stop.
    One culprit of n costs at most 2 + log₂ n answers, the rest's own among them. ``suspicion`` (n,), higher is worse,
    decides whom to try first: if leaving the most suspect one out is enough, one answer is all it costs. A rest below
    ``at_least`` is not asked for. Nobody is named who was not seen to make an accepted set a refused one.

    >>> isolate(8, lambda chosen: 5 not in chosen, 8)
    (Culprit(number=5, company=(0, 1, 2, 3, 4)),)
    """
    left, order = most, list(range(inputs))
    if suspicion:
        order.sort(key=lambda i: suspicion[i])

    def ask(chosen: Sequence[int]) -> bool:
        nonlocal left
        answer = passes(tuple(sorted(chosen))) if left > 0 else None
        left -= 1
        if answer is None:
            raise _Spent
        return answer

    found: list[Culprit] = []
    company: list[int] = []
    try:
        if suspicion and inputs > 1 and ask(order[:-1]):
            return (Culprit(order[-1], tuple(sorted(order[:-1]))),)
        while True:
            rest = [i for i in order if i not in {c.number for c in found}]
            if found and (len(rest) < max(1, at_least) or set(rest) == set(company) or ask(rest)):
                return tuple(found)
            culprit, company = _find_one([i for i in rest if i not in company], company, ask)
            found.append(Culprit(culprit, tuple(sorted(company))))
    except _Spent:
        return ()


def _find_one(suspects: list[int], company: list[int], ask: Callable[[Sequence[int]], bool]) -> tuple[int, list[int]]:
    """One input that makes ``company`` (which passes, or is empty) a refused set; company ∪ suspects is refused."""
    while len(suspects) > 1:
        half, others = suspects[: (len(suspects) + 1) // 2], suspects[(len(suspects) + 1) // 2 :]
        if ask([*company, *half]):
            company, suspects = [*company, *half], others
        elif not company and ask(others):
            company, suspects = others, half
        else:
            suspects = half
    if not company:
        raise _Spent  # every part is refused: not the doing of one
    return suspects[0], company
