"""Outer optimizers: the fused delta of an iteration as a pseudo-gradient step from base revision to base revision.

ColD Fusion is the plain step of length 1. The others keep a state beside the weights (``outer.safetensors``), read
from the last revision and written with the next, so that every step can be reproduced from what is published.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hubfusion.checkpoint import Checkpoint, Parameter, Writing, WrittenFile, open_checkpoint, write_checkpoint
from hubfusion.errors import CheckpointError
from hubfusion.fuse.methods.kinds import Array, in_range, namespace

STATE_FILE = "outer.safetensors"
State = Mapping[str, Array]


def plain(delta: Array, base: Array, state: State, *, lr: float = 1.0) -> tuple[Array, dict[str, Array]]:
    """Take the fused delta as it is, times a step length.

    θ ← θ + η δ; η = 1 is ColD Fusion, arXiv 2212.01378. Range: η > 0.

    >>> plain(np.asarray([2.0]), np.asarray([0.0]), {}, lr=0.5)[0].tolist()
    [1.0]
    """
    in_range("plain", "lr", lr, 0, float("inf"), open_low=True)
    return (delta if lr == 1.0 else delta * lr), {}


def momentum(
    delta: Array, base: Array, state: State, *, lr: float = 1.0, beta: float = 0.9
) -> tuple[Array, dict[str, Array]]:
    """Heavy-ball momentum over iterations (FedAvgM).

    m ← β m + δ;  θ ← θ + η m. Paper: FedAvgM, arXiv 1909.06335. Departures: none. Ranges: η > 0, β in [0, 1).

    >>> momentum(np.asarray([1.0]), np.asarray([0.0]), {"momentum": np.asarray([2.0])}, beta=0.5)[0].tolist()
    [2.0]
    """
    _check_step("momentum", lr, beta)
    moved = state["momentum"] * beta + delta
    return moved * lr, {"momentum": moved}


def nesterov(
    delta: Array, base: Array, state: State, *, lr: float = 0.7, beta: float = 0.9
) -> tuple[Array, dict[str, Array]]:
    """Nesterov momentum over iterations: DiLoCo's outer optimizer.

    m ← β m + δ;  θ ← θ + η (δ + β m). Paper: DiLoCo, arXiv 2311.08105 (η = 0.7, β = 0.9), in the form of
    torch.optim.SGD. Departures: none. Ranges: η > 0, β in [0, 1).

    >>> nesterov(np.asarray([1.0]), np.asarray([0.0]), {"momentum": np.asarray([0.0])}, lr=1.0, beta=0.5)[0].tolist()
    [1.5]
    """
    _check_step("nesterov", lr, beta)
    moved = state["momentum"] * beta + delta
    return (moved * beta + delta) * lr, {"momentum": moved}


def fedadam(
    delta: Array,
    base: Array,
    state: State,
    *,
    lr: float = 1e-4,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-4,
) -> tuple[Array, dict[str, Array]]:
    """FedAdam: every entry's step is divided by the root of its mean square.

    m ← β1 m + (1 − β1) δ;  v ← β2 v + (1 − β2) δ²;  θ ← θ + η m / (√v + τ)

    Paper: Adaptive Federated Optimization, arXiv 2003.00295. Departures: v starts at 0 (τ² in the paper); no bias
    correction, as there; η and τ default to the size of a finetune's deltas (1e-4 an entry), for which the usual
    0.1 and 1e-3 are far too large. Ranges: η, τ > 0, β1 and β2 in [0, 1).

    >>> zero = np.asarray([0.0])
    >>> fedadam(np.asarray([2.0]), zero, {"m": zero, "v": zero}, lr=1.0, beta1=0.5, beta2=0.75, tau=1.0)[0].tolist()
    [0.5]
    """
    _check_step("fedadam", lr, beta1)
    in_range("fedadam", "beta2", beta2, 0, 1, open_high=True)
    in_range("fedadam", "tau", tau, 0, float("inf"), open_low=True)
    m = state["m"] * beta1 + delta * (1 - beta1)
    v = state["v"] * beta2 + delta * delta * (1 - beta2)
    return m / (namespace(delta).sqrt(v) + tau) * lr, {"m": m, "v": v}


def ema(
    delta: Array, base: Array, state: State, *, decay: float = 0.9, deploy: bool = False
) -> tuple[Array, dict[str, Array]]:
    """Exponential moving average of the bases: a stable model beside the latest, or in its place.

    e ← γ e + (1 − γ) (θ + δ), e starts at θ;  θ ← θ + δ, or θ ← e with ``deploy`` (contributors then start from e)

    Paper: the EMA of TIME, arXiv 2412.06712. Departures: none. Range: γ in [0, 1).

    >>> ema(np.asarray([2.0]), np.asarray([1.0]), {"ema": np.asarray([0.0])}, decay=0.5, deploy=True)[0].tolist()
    [0.5]
    """
    in_range("ema", "decay", decay, 0, 1, open_high=True)
    mean = state["ema"] * decay + (base + delta) * (1 - decay)
    return (mean - base if deploy else delta), {"ema": mean}


def liti(delta: Array, base: Array, state: State, *, eta: float = 0.3) -> tuple[Array, dict[str, Array]]:
    """LITI: after each fuse, interpolate linearly towards the first base of all, the anchor.

    θ ← (1 − η) θ_0 + η (θ + δ), θ_0 the base of the first iteration. Paper: WARP, arXiv 2406.16768 (η = 0.3).
    Departures: none. Range: η in (0, 1]; 1 is the plain step.

    >>> liti(np.asarray([2.0]), np.asarray([1.0]), {"anchor": np.asarray([0.0])}, eta=0.5)[0].tolist()
    [0.5]
    """
    in_range("liti", "eta", eta, 0, 1, open_low=True)
    return (state["anchor"] - base) * (1 - eta) + delta * eta, {"anchor": state["anchor"]}


def _check_step(where: str, lr: float, beta: float) -> None:
    in_range(where, "lr", lr, 0, float("inf"), open_low=True)
    in_range(where, "beta" if where != "fedadam" else "beta1", beta, 0, 1, open_high=True)


@dataclass(frozen=True, slots=True)
class Outer:
    """An outer optimizer and the names of its state; ``from_base`` are those that start at the base, not at zero."""

    function: Callable[..., tuple[Array, dict[str, Array]]]
    slots: tuple[str, ...] = ()
    from_base: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (self.function.__doc__ or "").strip().splitlines()[0]

    @property
    def options(self) -> Mapping[str, bool | int | float | str]:
        """Keywords that a recipe may set, with their defaults."""
        keywords = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in keywords if p.kind is p.KEYWORD_ONLY}


OUTERS: Mapping[str, Outer] = {
    "plain": Outer(plain),
    "momentum": Outer(momentum, ("momentum",)),
    "nesterov": Outer(nesterov, ("momentum",)),
    "fedadam": Outer(fedadam, ("m", "v")),
    "ema": Outer(ema, ("ema",), ("ema",)),
    "liti": Outer(liti, ("anchor",), ("anchor",)),
}


@dataclass(frozen=True, slots=True)
class Stepping:
    """One outer step in progress: the last state open for reading, the next one being written."""

    outer: Outer
    options: Mapping[str, Any]
    last: Checkpoint | None
    next: Writing | None

    def step(self, name: str, first: int, base: Array, delta: Array) -> Array:
        """Turn a fused delta (n,) into the update, and write the state of these entries."""
        state = {slot: self._read(slot, name, first, base) for slot in self.outer.slots}
        update, after = self.outer.function(delta, base, state, **self.options)
        for slot, values in after.items():
            assert self.next is not None  # open_stepping opens it for every optimizer with slots
            self.next.write(f"{slot}.{name}", first, values)
        return update

    def digest(self, name: str, first: int, last: int) -> None:
        """Take these entries of the state, which are written, into its sha256 (`Writing.digest`)."""
        for slot in self.outer.slots:
            assert self.next is not None
            self.next.digest(f"{slot}.{name}", first, last)

    def _read(self, slot: str, name: str, first: int, base: Array) -> Array:
        own = f"{slot}.{name}"
        if self.last is not None and own in self.last.parameters:
            out = np.empty_like(base)
            self.last.read(own, first, out)
            return out
        return base.copy() if slot in self.outer.from_base else np.zeros_like(base)

    @property
    def written(self) -> tuple[WrittenFile, ...]:
        """The state file, once the step is whole."""
        return self.next.written if self.next is not None else ()


@contextmanager
def open_stepping(
    name: str, options: Mapping[str, Any], last: Path | None, out: Path, parameters: Sequence[Parameter], digest: bool
) -> Iterator[Stepping]:
    """Open the last state (None: the first iteration) and write the next to ``out``, whole or not at all.

    ``parameters`` are those that are fused, with the dtype that the state shall have. A parameter that the last state
    lacks starts afresh. Raises `CheckpointError` for a state of another optimizer or of other shapes.
    """
    outer = OUTERS[name]
    with ExitStack() as stack:
        state = stack.enter_context(open_checkpoint(last, STATE_FILE)) if last and outer.slots else None
        specs = [Parameter(f"{s}.{p.name}", p.dtype, p.shape, p.file) for s in outer.slots for p in parameters]
        if state is not None:
            _check_state(name, outer, state, specs)
        writing = stack.enter_context(write_checkpoint(out, specs, single=STATE_FILE, digest=digest)) if specs else None
        yield Stepping(outer, options, state, writing)


def _check_state(name: str, outer: Outer, state: Checkpoint, specs: Sequence[Parameter]) -> None:
    slots = {n.split(".")[0] for n in state.parameters}
    if slots != set(outer.slots):
        raise CheckpointError(
            f"{state.path}: {name} keeps {', '.join(outer.slots)}; this state has {', '.join(sorted(slots)) or 'none'}"
        )
    for spec in specs:
        stored = state.parameters.get(spec.name)
        if stored is not None and (stored.shape != spec.shape or not stored.is_float):
            raise CheckpointError(
                f"{state.path}: {spec.name}: {stored.dtype} {list(stored.shape)}, a float {list(spec.shape)} is needed"
            )
