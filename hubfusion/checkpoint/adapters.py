"""PEFT adapters as finetunes: the delta that ``merge_and_unload`` would add, computed from the small matrices.

LoRA (arXiv 2106.09685): ΔW = s B A, s = α / r;  rsLoRA (arXiv 2312.03732): s = α / √r
DoRA (arXiv 2402.09353): ΔW = m (W + s B A) / |W + s B A| − W, the norm over each output's row

Only the rows that are asked for are computed, entry by entry in float64, so a delta has the same bits in whatever
chunks it is read. Checked against peft's own merge. Biases and modules that were trained whole are taken as they are.
Other adapters, and options that we do not know, are refused by name, from the configuration and the header alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hubfusion.checkpoint.backbone import Backbone, Tensor, find_in_base, is_head, name_in_base, prefix_of
from hubfusion.checkpoint.backbone import parse_config as parse_object
from hubfusion.checkpoint.reader import FLOATS, Array, Checkpoint, open_checkpoint
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
class Pair:
    """The matrices of one adapted parameter, by the names of their tensors.

    ``down`` is (r, columns), ``up`` (rows, r), to be multiplied by ``scale``; ``magnitude`` (rows,) is DoRA's.
    ``is_transposed`` when the base stores (in, out), as GPT-2's Conv1D does, or an embedding.
    """

    down: str
    up: str
    magnitude: str | None
    scale: float
    is_transposed: bool


@dataclass(frozen=True, slots=True)
class AdapterMatch:
    """How an adapter fits a base. Keys are names in the base's file.

    ``pairs`` are low-rank updates, ``saved`` parameters that were trained whole, by their own names; ``heads`` are its
    own tensors outside the backbone.
    """

    pairs: Mapping[str, Pair]
    saved: Mapping[str, str]
    heads: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LowRank:
    """A `Pair` read: ``up`` (rows, r) with the scale inside, ``down`` (r, columns), ``magnitude`` (rows,); float64."""

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

    def dtype_of(self, name: str) -> str:
        """The dtype of a parameter that was trained whole; deltas of others are computed in float64."""
        return self.checkpoint.parameters[self.saved[name]].dtype if name in self.saved else "F64"

    def own_name(self, name: str) -> str:
        """The adapter's tensor, where it has one of the whole parameter."""
        return self.saved.get(name, name)

    def changed_constant(self, base: Checkpoint) -> str:
        """An adapter has no buffers."""
        return ""

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
def open_adapter(path: Path, base: Checkpoint, backbone: Backbone) -> Iterator[Adapter]:
    """Open an adapter folder and match it to the base; raises `CheckpointError` for what is not exactly computable."""
    file = path / CONFIG
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{file}: {file.stat().st_size} bytes, at most {MAX_CONFIG_BYTES} are allowed")
    with open_checkpoint(path, WEIGHTS) as checkpoint:
        try:
            matched = match_adapter(parse_config(file.read_bytes()), backbone, base.parameters, checkpoint.parameters)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        low_rank = {name: _read(checkpoint, pair) for name, pair in matched.pairs.items()}
        names = {n: n for n in (*backbone.parameters, *backbone.heads, *matched.pairs, *matched.saved)}
        yield Adapter(path, names, low_rank, matched.saved, checkpoint, base, matched.heads)


def _read(checkpoint: Checkpoint, pair: Pair) -> LowRank:
    def matrix(name: str) -> Array:
        spec = checkpoint.parameters[name]
        values = np.empty(spec.entries)
        checkpoint.read(name, 0, values)
        return values.reshape(spec.shape)

    magnitude = None if pair.magnitude is None else matrix(pair.magnitude).reshape(-1)
    return LowRank(matrix(pair.up) * pair.scale, matrix(pair.down), magnitude, pair.is_transposed)


def parse_config(text: bytes) -> dict[str, Any]:
    """The content of ``adapter_config.json``; raises `CheckpointError` for options that cannot be fused exactly."""
    config = parse_object(text, CONFIG)
    for option, value in config.items():
        if option in ALLOWED:
            if not any(value is v or (type(value) is type(v) and value == v) for v in ALLOWED[option]):
                words = ", ".join(map(repr, ALLOWED[option]))
                raise CheckpointError(f"{CONFIG}: {option} {value!r:.60} cannot be fused exactly, allowed are {words}")
        elif value and option not in HARMLESS:
            raise CheckpointError(
                f"{CONFIG}: {option:.60} {value!r:.60} cannot be fused exactly: merge it with peft first"
            )
    return config


def match_adapter(
    config: Mapping[str, Any], backbone: Backbone, base: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> AdapterMatch:
    """Find the base's parameters that an adapter changes, from its configuration and header alone.

    Module names are found by the backbone's rule: under one prefix, what lies outside is a head. Raises
    `CheckpointError` naming the tensor that does not fit.
    """
    modules: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    heads: list[str] = []
    for name in tensors:
        module, kind = _split(name)
        if kind:
            modules.setdefault(module, {})[kind] = name
    whole = {name: _split(name)[0] for name in tensors if not _split(name)[1]}
    prefix = prefix_of(backbone, [*(f"{m}.weight" for m in modules), *whole.values()])
    for name, own in whole.items():
        target = find_in_base(backbone, prefix, own)
        if target is None:
            if not is_head(backbone, prefix, own):
                raise CheckpointError(f"{name}: the base has no {own}")
            heads.append(name)
        else:
            _check_shape(name, tensors[name].shape, base[target].shape)
            _check_float(tensors[name])
            saved[target] = name
    pairs: dict[str, Pair] = {}
    for module, parts in modules.items():
        target = find_in_base(backbone, prefix, f"{module}.weight")
        if target is not None:
            pairs[target] = _pair(config, module, parts, tensors, base[target].shape)
        elif is_head(backbone, prefix, f"{module}.weight"):
            heads += parts.values()
        else:
            raise CheckpointError(f"{next(iter(parts.values()))}: the base has no {module}.weight")
    for alias, name in backbone.ties:  # a base that stores a tied parameter twice changes in both places
        again, first = name_in_base(backbone, alias), name_in_base(backbone, name)
        if again in base and first in pairs:
            pairs.setdefault(again, pairs[first])
        if again in base and first in saved:
            saved.setdefault(again, saved[first])
    if not pairs and not saved:
        raise CheckpointError(f"{WEIGHTS}: adapts nothing of the backbone")
    return AdapterMatch(pairs, saved, tuple(sorted(heads)))


KINDS = re.compile(r"(.*)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?")


def _split(name: str) -> tuple[str, str]:
    """Module and kind of an adapter tensor; kind is empty for a tensor saved whole (modules_to_save)."""
    own = name.removeprefix(ROOT)
    kind = KINDS.fullmatch(own)
    if kind:
        return kind[1], kind[2]
    return own.replace(".modules_to_save.default", "").replace(".base_layer", ""), ""


def _pair(
    config: Mapping[str, Any],
    module: str,
    parts: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...],
) -> Pair:
    is_embedding = "lora_embedding_A" in parts
    infix = "embedding_" if is_embedding else ""
    for kind in (f"lora_{infix}A", f"lora_{infix}B"):
        if kind not in parts:
            raise CheckpointError(f"{module}: {kind} is missing")
    down, up = tensors[parts[f"lora_{infix}A"]], tensors[parts[f"lora_{infix}B"]]
    if len(down.shape) != 2 or len(up.shape) != 2 or up.shape[1] != down.shape[0]:
        raise CheckpointError(f"{module}: A {down.shape} and B {up.shape} are no low-rank pair")
    # peft keeps an embedding's delta as (B A)ᵀ, and Conv1D weights as (in, out).
    is_transposed = is_embedding or bool(config.get("fan_in_fan_out"))
    product = (up.shape[0], down.shape[1])
    _check_shape(module, product[::-1] if is_transposed else product, shape)
    if down.shape[0] > min(shape):
        raise CheckpointError(f"{module}: rank {down.shape[0]} of a matrix {list(shape)}: merge it with peft first")
    magnitude = None
    if config.get("use_dora"):
        if is_transposed:
            raise CheckpointError(f"{module}: DoRA on embeddings or Conv1D: merge it with peft first")
        if (magnitude := parts.get("lora_magnitude_vector")) is None:
            raise CheckpointError(f"{module}: lora_magnitude_vector is missing")
        if tensors[magnitude].entries != shape[0]:
            raise CheckpointError(f"{magnitude}: {tensors[magnitude].entries} entries, the base has {shape[0]} rows")
    for name in parts.values():
        _check_float(tensors[name])
    return Pair(down.name, up.name, magnitude, _scale(config, module, down.shape[0]), is_transposed)


def _check_shape(name: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> None:
    if theirs != ours:
        raise CheckpointError(f"{name}: shape {list(theirs)}, the base has {list(ours)}")


def _check_float(tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise CheckpointError(f"{tensor.name}: dtype {tensor.dtype}, a float dtype is needed")


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """α / r or α / √r, with the patterns by module that peft allows."""
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    stated = _pattern(config.get("rank_pattern"), module, config.get("r"))
    if stated != rank:
        raise CheckpointError(f"{CONFIG}: {module}: r is {stated!r:.40}, its matrices have {rank}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"{CONFIG}: {module}: lora_alpha must be a number, got {alpha!r:.40}")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: Any, module: str, default: Any) -> Any:
    """The first pattern that a module's name ends with, as peft reads them: plain names, never a regex."""
    if not isinstance(patterns or {}, dict):
        raise CheckpointError(f"{CONFIG}: patterns must be an object, got {patterns!r:.60}")
    for pattern, value in (patterns or {}).items():
        if not re.fullmatch(r"[\w.]+", pattern):
            raise CheckpointError(f"{CONFIG}: pattern {pattern!r:.60}: only plain module names can be fused")
        if module == pattern or module.endswith(f".{pattern}"):
            return value
    return default
