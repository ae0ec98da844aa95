"""PEFT adapters as inputs of a fuse: the delta that ``merge_and_unload`` would add, computed from the small matrices.

LoRA (arXiv 2106.09685): ΔW = s B A, s = α / r;  rsLoRA (arXiv 2312.03732): s = α / √r
DoRA (arXiv 2402.09353): ΔW = m (W + s B A) / |W + s B A| − W, the norm over each output's row

Only the rows that are asked for are computed, entry by entry in float64, so a delta has the same bits in whatever
pieces it is read. Checked against peft's own merge. Biases and modules that were trained whole are taken as they are.
Other adapters, and options that we do not know, are refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hubfusion.checkpoint import align
from hubfusion.checkpoint.reader import Array, Checkpoint, open_checkpoint
from hubfusion.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
ROOT = "base_model.model."
# What a configuration may say. Some ways to begin change the base itself (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA): then
# the matrices are no delta to the base that we have.
ALLOWED: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none", "all", "lora_only"),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}  # fmt: skip
HARMLESS = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "target_modules", "task_type", "use_dora", "use_rslora",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class LowRank:
    """The matrices of one adapted parameter: ``up`` (rows, r), ``down`` (r, columns), both with the scale inside up.

    ``magnitude`` (rows,) is DoRA's; ``is_transposed`` when the base stores (in, out), as GPT-2's Conv1D does.
    """

    up: Array
    down: Array
    magnitude: Array | None
    is_transposed: bool


@dataclass(frozen=True, slots=True)
class Adapter:
    """A PEFT adapter as a `hubfusion.checkpoint.deltas.Source`: zero wherever it adapts nothing."""

    path: Path
    names: Mapping[str, str]
    low_rank: Mapping[str, LowRank]
    saved: Mapping[str, str]
    checkpoint: Checkpoint
    base: Checkpoint
    dropped: tuple[str, ...] = ()
    is_wide: bool = field(default=False)

    def read_delta(self, name: str, first: int, base: Array, out: Array) -> None:
        """Fill ``out`` with the adapter's delta of entries ``first …`` of the base's parameter ``name``."""
        if name in self.saved:
            self.checkpoint.read(self.saved[name], first, out)
            np.subtract(out, base, out=out)
        elif name in self.low_rank:
            columns = self.base.parameters[name].shape[1]
            low, high = first // columns, -(-(first + out.size) // columns)
            rows = self._rows(name, low, high).reshape(-1)
            out[:] = rows[first - low * columns : first - low * columns + out.size]
        else:
            out[:] = 0

    def _rows(self, name: str, low: int, high: int) -> Array:
        """Rows ``low … high`` of the delta, in the base's layout, float64."""
        parts = self.low_rank[name]
        up, down = (parts.down.T, parts.up.T) if parts.is_transposed else (parts.up, parts.down)
        delta = np.zeros((high - low, down.shape[1]))
        for rank in range(down.shape[0]):
            delta += up[low:high, rank, None] * down[rank]
        if parts.magnitude is None:
            return delta
        columns = down.shape[1]
        own = np.empty((high - low) * columns)
        self.base.read(name, low * columns, own)
        merged = own.reshape(-1, columns) + delta
        norms = np.sqrt(np.add.reduce(merged * merged, axis=1))
        merged *= (parts.magnitude[low:high] / norms)[:, None]
        return merged - own.reshape(-1, columns)


@contextmanager
def open_adapter(path: Path, base: Checkpoint) -> Iterator[Adapter]:
    """Open an adapter folder and match it to the base; raises `CheckpointError` for what is not exactly computable."""
    config = _read_config(path / CONFIG)
    with open_checkpoint(path, WEIGHTS) as checkpoint:
        yield _match(path, config, checkpoint, base)


def _read_config(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{file}: {file.stat().st_size} bytes, at most {MAX_CONFIG_BYTES} are allowed")
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: an object is needed")
    for option, value in config.items():
        if option in ALLOWED:
            if value not in ALLOWED[option]:
                words = ", ".join(map(repr, ALLOWED[option]))
                raise CheckpointError(f"{file}: {option} {value!r:.60} cannot be fused exactly, allowed are {words}")
        elif value and option not in HARMLESS:
            raise CheckpointError(f"{file}: {option} {value!r:.60} cannot be fused exactly: merge it with peft first")
    return config


def _match(path: Path, config: Mapping[str, Any], checkpoint: Checkpoint, base: Checkpoint) -> Adapter:
    modules: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    dropped: list[str] = []
    finder = _Finder(base, checkpoint)
    for name in checkpoint.parameters:
        module, kind = _split(name)
        if kind:
            modules.setdefault(module, {})[kind] = name
            continue
        target = finder.find(module)
        if target is None:
            dropped.append(name)
        else:
            saved[target] = name
            _check_shape(path, name, checkpoint.parameters[name].shape, base.parameters[target].shape)
    low_rank: dict[str, LowRank] = {}
    for module, found in modules.items():
        target = finder.find(f"{module}.weight")
        if target is None and finder.is_head(module):
            dropped += found.values()
        elif target is None:
            raise CheckpointError(f"{path / WEIGHTS}: {next(iter(found.values()))}: the base has no {module}.weight")
        else:
            low_rank[target] = _read_low_rank(path, config, checkpoint, module, found, base.parameters[target].shape)
    for name, first in align.tied_names(base).items():  # an older base that stores a tied parameter twice
        if first in low_rank and name not in saved:
            low_rank.setdefault(name, low_rank[first])
        if first in saved and name not in low_rank:
            saved.setdefault(name, saved[first])
    names = {n: n for n, p in base.parameters.items() if p.is_float and not align.is_task_head(n, finder.prefix)}
    return Adapter(path, names, low_rank, saved, checkpoint, base, tuple(sorted(dropped)))


KINDS = re.compile(r"(.*)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?")


def _split(name: str) -> tuple[str, str]:
    """Module and kind of an adapter tensor; kind is empty for a tensor saved whole (modules_to_save)."""
    own = name.removeprefix(ROOT)
    found = KINDS.fullmatch(own)
    if found:
        return found[1], found[2]
    return own.replace(".modules_to_save.default", "").replace(".base_layer", ""), ""


class _Finder:
    """The base's name of a module that the adapter names under the model it was trained on."""

    def __init__(self, base: Checkpoint, checkpoint: Checkpoint) -> None:
        self.base, self.prefix = base, align.trunk_prefix(base.parameters)
        names = [_split(n)[0] + ".x" for n in checkpoint.parameters]
        self.theirs = align.trunk_prefix(names)

    def find(self, name: str) -> str | None:
        stripped = name.removeprefix(self.theirs) if self.theirs else name
        for candidate in (name, self.prefix + stripped):
            if candidate in self.base.parameters and not align.is_task_head(candidate, self.prefix):
                return candidate
        return None

    def is_head(self, module: str) -> bool:
        return module.split(".")[0] in align.TASK_HEADS | align.PRETRAINING_HEADS


def _read_low_rank(
    path: Path,
    config: Mapping[str, Any],
    checkpoint: Checkpoint,
    module: str,
    found: Mapping[str, str],
    shape: tuple[int, ...],
) -> LowRank:
    def read(kind: str) -> Array:
        if kind not in found:
            raise CheckpointError(f"{path / WEIGHTS}: {module}: {kind} is missing")
        spec = checkpoint.parameters[found[kind]]
        values = np.empty(spec.entries)
        checkpoint.read(spec.name, 0, values)
        return values.reshape(spec.shape)

    is_embedding = "lora_embedding_A" in found
    infix = "embedding_" if is_embedding else ""
    down, up = read(f"lora_{infix}A"), read(f"lora_{infix}B")
    if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0]:
        raise CheckpointError(f"{path / WEIGHTS}: {module}: A {down.shape} and B {up.shape} are no low-rank pair")
    scale = _scale(path, config, module, down.shape[0])
    # peft keeps an embedding's delta as (B A)ᵀ, and Conv1D weights as (in, out).
    is_transposed = is_embedding or bool(config.get("fan_in_fan_out"))
    product = (up.shape[0], down.shape[1])
    _check_shape(path, module, product[::-1] if is_transposed else product, shape)
    magnitude = None
    if config.get("use_dora"):
        if is_transposed:
            raise CheckpointError(f"{path}: {module}: DoRA on embeddings or Conv1D: merge it with peft first")
        magnitude = read("lora_magnitude_vector").reshape(-1)
    return LowRank(up * scale, down, magnitude, is_transposed)


def _check_shape(path: Path, name: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> None:
    if theirs != ours:
        raise CheckpointError(f"{path / WEIGHTS}: {name}: shape {list(theirs)}, the base has {list(ours)}")


def _scale(path: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    """α / r or α / √r, with the patterns by module that peft allows."""
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    stated = _pattern(config.get("rank_pattern"), module, config.get("r"))
    if stated != rank:
        raise CheckpointError(f"{path / CONFIG}: {module}: r is {stated!r:.40}, its matrices have {rank}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"{path / CONFIG}: {module}: lora_alpha must be a number, got {alpha!r:.40}")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: Any, module: str, default: Any) -> Any:
    """The first pattern that a module's name ends with, as peft reads them: plain names, never a stranger's regex."""
    for pattern, value in (patterns or {}).items():
        if not re.fullmatch(r"[\w.]+", pattern):
            raise CheckpointError(f"{CONFIG}: pattern {pattern!r:.60}: only plain module names can be fused")
        if module == pattern or module.endswith(f".{pattern}"):
            return value
    return default
