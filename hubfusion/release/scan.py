"""Settings of the trigger scan (`hubfusion.release.triggers`), in their own module to be read without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scan:
    """What is looked at and what is too much.

    ``datasets`` names classification tasks of the suite (empty: all of them), ``examples`` clean training texts for
    the probe, ``texts`` held-out texts to move, ``tokens`` how many unused vocabulary items are tried, ``length`` the
    longest text in tokens. A token is a finding if it moves ``moved`` of the texts of other classes to one class,
    ``above`` more than it does in the base, and ``deviations`` robust standard deviations more than the other tokens
    move there. A push is one if at most 1/``shrunk`` of what the base needs is enough. ``radii`` are its lengths, in
    median word embeddings; 0 ``steps`` of gradient leave this look out.
    """

    datasets: tuple[str, ...] = ()
    examples: int = 400
    texts: int = 32
    tokens: int = 200
    length: int = 64
    moved: float = 0.5
    above: float = 0.3
    deviations: float = 6.0
    steps: int = 30
    shrunk: float = 2.0
    radii: tuple[float, ...] = (0.125, 0.177, 0.25, 0.354, 0.5, 0.707, 1.0, 1.41, 2.0, 2.83, 4.0)
    seed: int = 0
