"""The backbone: the parameters of a base that every finetune shares.

A declaration (`Backbone`) is made once, when a base is founded, and stored beside its weights as ``backbone.json``. It
lists the tensors that every finetune must have, those that some task classes lack (a pooler), the constants, and those
of the base's own pretraining head. It is derived from transformers' definition of the model type
(`hubfusion.checkpoint.model_types`), without guessing from names.

`match` is the only rule that matches a finetune's tensors to the backbone, by name and never by position. Screening
applies it to headers read by range requests; soundness, fuse, inspect and provenance apply it to files.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hubfusion.checkpoint.model_types import ModelType, find_model_type
from hubfusion.checkpoint.reader import FLOATS, WEIGHTS_NAME, Checkpoint
from hubfusion.codec import dumps, loads
from hubfusion.errors import CheckpointError

FILE = "backbone.json"
CONFIG = "config.json"
MAX_BYTES = 4 << 20
# What is read of a base or of a finetune to fuse it: weights, an adapter, and what says where the backbone is.
FUSED_FILE = re.compile(
    rf"{WEIGHTS_NAME.pattern}|adapter_model\.safetensors|adapter_config\.json|config\.json|backbone\.json"
)
# Further modules of a SentenceTransformer, which come with its base: ``1_Pooling/config.json``.
MODULE_FILE = re.compile(r"\d+_[A-Za-z]\w*/(config\.json|model\.safetensors)", re.ASCII)
SCHEMA = 1


class Tensor(Protocol):
    """What matching reads of a tensor of a header (`TensorSpec`) or an open checkpoint (`Parameter`)."""

    @property
    def name(self) -> str:
        """Name in its file."""

    @property
    def dtype(self) -> str:
        """As safetensors writes it: ``F32``, ``I64``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""

    @property
    def entries(self) -> int:
        """Number of entries."""


@dataclass(frozen=True, slots=True)
class Backbone:
    """The part of one base that its finetunes share.

    Names of backbone tensors are relative to ``prefix``, under which the base's own file keeps them ("" or
    ``"roberta."``). A pattern is a name, or the beginning of one up to a dot, in which ``*`` stands for a number.

    - ``model_type``: of transformers; "" when the base has no config.
    - ``model_prefix``: under which the task classes of this model type keep the backbone (``"roberta."``), or "".
    - ``modules``: first components of the names of the architecture's backbone, also of those that the base lacks.
    - ``required``: tensors that every finetune must have, with the base's shape.
    - ``optional``: tensors of the base that some task class lacks: fused if every input has them, else kept.
    - ``constants``: patterns of buffers. They are never fused; a finetune has the base's own values or none.
    - ``absent``: patterns of optional tensors that the base lacks: in a finetune they belong to its head.
    - ``heads``: full names of the base's own pretraining head, treated as optional tensors are.
    - ``ties``: other names of a required, optional or head tensor, as (other name, name in the base). Both relative to
      the backbone, or full where they lie outside.
    """

    model_type: str
    prefix: str
    model_prefix: str
    modules: tuple[str, ...]
    required: tuple[str, ...]
    optional: tuple[str, ...]
    constants: tuple[str, ...]
    absent: tuple[str, ...]
    heads: tuple[str, ...]
    ties: tuple[tuple[str, str], ...]
    schema: int = SCHEMA

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names in the base's file of all tensors of the backbone: required and optional ones, sorted."""
        return tuple(sorted(self.prefix + name for name in (*self.required, *self.optional)))


@dataclass(frozen=True, slots=True)
class Match:
    """How a checkpoint fits a base. Keys are names in the base's file, values names in the checkpoint.

    ``names`` has every tensor that can be fused, ``constants`` the buffers that both have. ``absent`` are optional
    tensors of the base that the checkpoint lacks, ``heads`` its own tensors outside the backbone (and second copies of
    tied ones), in order.
    """

    prefix: str
    names: Mapping[str, str]
    constants: Mapping[str, str]
    absent: tuple[str, ...]
    heads: tuple[str, ...]


# ------------------------------------------------------------------------------------------------- the declaration
def declare(config: Mapping[str, Any], tensors: Mapping[str, Tensor], facts: ModelType | None = None) -> Backbone:
    """The backbone of a base with this ``config.json`` and these tensors.

    ``facts`` are what transformers says of the model type: by default those of the shipped table, and what the table
    lacks is derived now. Raises `CheckpointError` when transformers
    does not know it either, and when the tensors are not those of such a model. Without a ``model_type`` all float
    tensors of the base are its backbone, because nobody can say which are not.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        return _undeclared(tensors)
    facts = facts or find_model_type(kind)
    if facts is None:
        from hubfusion.checkpoint.derive import derive  # torch and transformers: seconds

        facts = derive(config)
    prefix = _own_prefix(facts, tensors)
    inside = [n[len(prefix) :] for n in tensors if _is_inside(n, prefix, facts.modules, facts.heads)]
    if not inside:
        raise CheckpointError(f"no tensor of the base belongs to a {kind} backbone ({', '.join(facts.modules)})")
    floats = [n for n in inside if tensors[prefix + n].dtype in FLOATS and not _fits(n, facts.buffers)]
    outside = [n for n in tensors if n[: len(prefix)] != prefix or n[len(prefix) :] not in set(inside)]
    heads = [n for n in outside if tensors[n].dtype in FLOATS and _fits(n, facts.heads)]
    ties = dict(_ties(facts, config, floats, heads))
    present = {n for n in floats if n not in ties}
    return Backbone(
        model_type=kind,
        prefix=prefix,
        model_prefix=f"{facts.prefix}." if facts.prefix else "",
        modules=facts.modules,
        required=tuple(sorted(n for n in present if not _fits(n, facts.optional))),
        optional=tuple(sorted(n for n in present if _fits(n, facts.optional))),
        constants=tuple(sorted({*facts.buffers, *(n for n in inside if n not in floats)})),
        absent=tuple(p for p in facts.optional if not any(_fits(n, [p]) for n in floats)),
        heads=tuple(sorted(n for n in heads if n not in ties)),
        ties=tuple(sorted(ties.items())),
    )


def _undeclared(tensors: Mapping[str, Tensor]) -> Backbone:
    floats = tuple(sorted(n for n, t in tensors.items() if t.dtype in FLOATS))
    constants = tuple(sorted(n for n, t in tensors.items() if t.dtype not in FLOATS))
    modules = tuple(sorted({n.partition(".")[0] for n in tensors}))
    return Backbone("", "", "", modules, floats, (), constants, (), (), ())


def _own_prefix(facts: ModelType, tensors: Mapping[str, Tensor]) -> str:
    """The prefix under which a base keeps its backbone: the one that holds most of it, the shortest of equals."""
    votes = Counter({"": sum(_is_inside(n, "", facts.modules, facts.heads) for n in tensors)})
    for name in tensors:
        parts = name.split(".")
        votes.update("".join(f"{p}." for p in parts[:at]) for at in range(1, len(parts)) if parts[at] in facts.modules)
    return min(votes, key=lambda prefix: (-votes[prefix], len(prefix), prefix))


def _is_inside(name: str, prefix: str, modules: Iterable[str], heads: Iterable[str]) -> bool:
    """Whether a tensor's name lies in a backbone under ``prefix``."""
    if not name.startswith(prefix) or name[len(prefix) :].partition(".")[0] not in modules:
        return False
    return bool(prefix) or not _fits(name, heads)


def _ties(
    facts: ModelType, config: Mapping[str, Any], floats: Iterable[str], heads: Iterable[str]
) -> Iterable[tuple[str, str]]:
    """(other name, name in the base) of every group of tied tensors that the base has.

    When the base stores several of a group, the config says whether they are one parameter.
    """
    groups: dict[str, set[str]] = {}
    for alias, name in facts.ties:
        if "*" in alias:  # layers that share their parameters: each file stores them in the same place
            continue
        groups.setdefault(name, {name}).add(alias)
    for first, group in groups.items():
        stored = sorted(group & {*floats, *heads}, key=lambda n: (n != first, n not in floats, n))
        if stored and (len(stored) == 1 or config.get("tie_word_embeddings", True)):
            yield from ((other, stored[0]) for other in sorted(group) if other != stored[0])


def _fits(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name is one of the patterns, or lies below one."""
    return any(_pattern(p).fullmatch(name) for p in patterns)


_compiled: dict[str, re.Pattern[str]] = {}


def _pattern(text: str) -> re.Pattern[str]:
    if text not in _compiled:
        parts = (r"\d+" if part == "*" else re.escape(part) for part in text.split("."))
        _compiled[text] = re.compile(r"\.".join(parts) + r"(\..*)?")
    return _compiled[text]


def read_backbone(path: Path, checkpoint: Checkpoint, facts: ModelType | None = None) -> Backbone:
    """The backbone of a base on this disk: as it is declared beside the weights, else `declare`d now.

    ``path`` is the base's folder or weights file. With ``facts``, as in `declare`, nothing that is declared beside it
    is read. Where it stores tied tensors several times, ties whose bytes differ are no ties. Raises `CheckpointError`
    naming the file.
    """
    folder = path if path.is_dir() else path.parent
    if facts is None and (folder / FILE).is_file():
        return parse_backbone((folder / FILE).read_bytes(), str(folder / FILE), checkpoint.parameters)
    try:
        config = parse_config((folder / CONFIG).read_bytes()) if (folder / CONFIG).is_file() else {}
        backbone = declare(config, checkpoint.parameters, facts)
        ties = [(name_in_base(backbone, alias), name_in_base(backbone, name)) for alias, name in backbone.ties]
        if not all(_same_bytes(checkpoint, alias, name) for alias, name in ties if alias in checkpoint.parameters):
            backbone = declare({**config, "tie_word_embeddings": False}, checkpoint.parameters, facts)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return backbone


def parse_config(text: bytes, where: str = CONFIG) -> dict[str, Any]:
    """The content of a ``config.json``, or of another file ``where``; `CheckpointError` when it is no JSON object."""
    try:
        config = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {str(error)[:80]}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{where} must be an object, got {config!r:.60}")
    return config


def parse_backbone(text: bytes, where: str, tensors: Mapping[str, Tensor]) -> Backbone:
    """Read ``backbone.json`` of a base with these tensors; raises `CheckpointError` naming what does not fit."""
    backbone = loads(Backbone, text, where)
    if backbone.schema != SCHEMA:
        raise CheckpointError(f"{where}: schema {backbone.schema}, this version reads {SCHEMA}")
    for name in (*backbone.parameters, *backbone.heads):
        if name not in tensors:
            raise CheckpointError(f"{where}: {name} is not in the base's files")
    return backbone


def write_backbone(backbone: Backbone) -> str:
    """The text of ``backbone.json``."""
    return dumps(backbone)


def _same_bytes(base: Checkpoint, one: str, other: str, step: int = 1 << 20) -> bool:
    """Whether two tensors are stored with equal bytes."""
    ours, theirs = base.parameters[one], base.parameters[other]
    return (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and all(
        base.read_bytes(one, at, min(at + step, ours.size)) == base.read_bytes(other, at, min(at + step, ours.size))
        for at in range(0, ours.size, step)
    )


# ------------------------------------------------------------------------------------------------- the one rule
def match(
    backbone: Backbone, base: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, any_float: bool = True
) -> Match:
    """Find the backbone of ``base`` in a checkpoint's ``tensors``.

    Every required tensor is there under one prefix (none, the model type's or any other), with the base's shape and a
    float dtype (the base's own unless ``any_float``). Optional ones have the base's shape. All that lies outside is a
    head, whatever its name; what lies inside is the base's or a constant that transformers knows. Raises
    `CheckpointError` that names the first tensor that breaks the rule.
    """
    prefix = _find_prefix(backbone, tensors)
    names: dict[str, str] = {}
    constants: dict[str, str] = {}
    absent: list[str] = []
    others = _other_names(backbone)
    for name in (*backbone.required, *backbone.optional):
        ours, theirs = backbone.prefix + name, _stored(name, prefix, others, tensors)
        if theirs is not None:
            _check(base[ours], tensors[theirs], any_float)
            names[ours] = theirs
        else:  # `_find_prefix` has seen to what is required
            absent.append(ours)
    for name in backbone.heads:
        outer = prefix.removesuffix(backbone.model_prefix) if backbone.model_prefix else prefix
        theirs = next((n for n in (outer + name, *(outer + o for o in others.get(name, ()))) if n in tensors), None)
        if theirs is not None and _is_alike(base[name], tensors[theirs]):
            names[name] = theirs
        else:
            absent.append(name)
    for alias, name in backbone.ties:  # a base that stores a tied tensor twice gets the fused values in both places
        if (again := name_in_base(backbone, alias)) in base and (first := name_in_base(backbone, name)) in names:
            names[again] = names[first]
    used, aliases = set(names.values()), {alias for alias, _ in backbone.ties}
    heads: list[str] = []
    for name in sorted(set(tensors) - used):
        relative = _inside(backbone, prefix, name)
        if relative is None or relative in aliases or _fits(relative, backbone.absent):
            heads.append(name)
        elif _fits(relative, backbone.constants):
            if (ours := backbone.prefix + relative) in base:
                _check_constant(base[ours], tensors[name])
                constants[ours] = name
        else:
            raise CheckpointError(f"{name} lies in the backbone, but the base has no such parameter")
    _check_one_copy(backbone, prefix, tensors)
    return Match(prefix, names, constants, tuple(absent), tuple(heads))


def _other_names(backbone: Backbone) -> dict[str, list[str]]:
    others: dict[str, list[str]] = {}
    for alias, name in backbone.ties:
        others.setdefault(name, []).append(alias)
    return others


def _stored(name: str, prefix: str, others: Mapping[str, Iterable[str]], tensors: Mapping[str, Tensor]) -> str | None:
    """The name under which a checkpoint stores a backbone tensor: its own or a tied one, inside or outside."""
    candidates = (prefix + name, *(p + other for other in others.get(name, ()) for p in (prefix, "")))
    return next((n for n in candidates if n in tensors), None)


def _find_prefix(backbone: Backbone, tensors: Mapping[str, Tensor]) -> str:
    """The one prefix under which every required tensor is there; raises when none or several are."""
    others = _other_names(backbone)
    anchor = max((n for n in backbone.required if n not in others), key=lambda n: (n.count("."), len(n), n), default="")
    prefixes = sorted(
        (n[: -len(anchor)] for n in tensors if n == anchor or n.endswith(f".{anchor}")), key=lambda p: (len(p), p)
    )
    lacking = {
        prefix: next((n for n in backbone.required if _stored(n, prefix, others, tensors) is None), None)
        for prefix in prefixes
    }
    whole = [prefix for prefix, missing in lacking.items() if missing is None]
    if len(whole) > 1:
        raise CheckpointError(f"the backbone is there twice, as {whole[0]}{anchor} and as {whole[1]}{anchor}")
    if whole:
        return whole[0]
    prefix, missing = next(iter(lacking.items()), ("", anchor))
    raise CheckpointError(f"{prefix}{missing} of the base is missing")


def _inside(backbone: Backbone, prefix: str, name: str) -> str | None:
    """The name relative to the backbone of a tensor that lies in it; None for one that lies outside.

    Under the model type's own prefix nothing else has a place; elsewhere a head may be a neighbor of the backbone.
    """
    if prefix and prefix == backbone.model_prefix:
        return name[len(prefix) :] if name.startswith(prefix) else None
    if not name.startswith(prefix) or name in backbone.heads:
        return None
    relative = name[len(prefix) :]
    return relative if relative.partition(".")[0] in backbone.modules else None


def _check_one_copy(backbone: Backbone, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a second copy of a parameter where a reader would look for it: with and without the model's prefix."""
    for other in {"", backbone.model_prefix} - {prefix}:
        for name in (*backbone.required, *backbone.optional):
            if other + name in tensors and prefix in ("", backbone.model_prefix):
                raise CheckpointError(f"{other}{name} is a second copy of a parameter of the base")


# ------------------------------------------------------------------------------- single names, for adapters' modules
def prefix_of(backbone: Backbone, names: Iterable[str]) -> str:
    """The prefix under which most of some model's parameter ``names`` are the backbone's; the shortest of equals."""
    known = {*backbone.required, *backbone.optional, *(alias for alias, _ in backbone.ties)}
    votes: dict[str, int] = {"": 0, backbone.model_prefix: 0}
    for name in names:
        parts = name.split(".")
        for at in range(len(parts)):
            if ".".join(parts[at:]) in known:
                prefix = "".join(f"{part}." for part in parts[:at])
                votes[prefix] = votes.get(prefix, 0) + 1
    return min(votes, key=lambda prefix: (-votes[prefix], len(prefix), prefix))


def find_in_base(backbone: Backbone, prefix: str, name: str) -> str | None:
    """The base's name of a parameter that a model with this ``prefix`` calls ``name``; None when it has none.

    A tied parameter has the name of the one that the base stores.
    """
    relative = name[len(prefix) :] if name.startswith(prefix) else None
    ties = dict(backbone.ties)
    for candidate in (relative, name):
        target = ties.get(candidate, candidate) if candidate is not None else None
        if target in backbone.required or target in backbone.optional:
            return f"{backbone.prefix}{target}"
        if target in backbone.heads:
            return target
    return None


def is_head(backbone: Backbone, prefix: str, name: str) -> bool:
    """Whether a parameter lies outside the backbone of a model with this ``prefix``."""
    relative = _inside(backbone, prefix, name)
    return relative is None or _fits(relative, backbone.absent)


def name_in_base(backbone: Backbone, name: str) -> str:
    """The full name, in the base's file, of a tensor in `Backbone.ties`: it lies in the backbone or outside."""
    is_inside = name.partition(".")[0] in backbone.modules and name not in backbone.heads
    return backbone.prefix + name if is_inside else name


def _is_alike(ours: Tensor, theirs: Tensor) -> bool:
    return theirs.shape == ours.shape and theirs.dtype in FLOATS


def _check_constant(ours: Tensor, theirs: Tensor) -> None:
    _check_shape(ours, theirs)
    if theirs.dtype != ours.dtype and not {ours.dtype, theirs.dtype} <= set(FLOATS):
        raise CheckpointError(f"{theirs.name} has dtype {theirs.dtype}, the base has {ours.dtype}")


def _check_shape(ours: Tensor, theirs: Tensor) -> None:
    if theirs.shape != ours.shape:
        raise CheckpointError(f"{theirs.name} has shape {list(theirs.shape)}, the base has {list(ours.shape)}")


def _check(ours: Tensor, theirs: Tensor, any_float: bool) -> None:
    _check_shape(ours, theirs)
    if theirs.dtype not in FLOATS:
        raise CheckpointError(f"{theirs.name} has dtype {theirs.dtype}, a float dtype is needed")
    if theirs.dtype != ours.dtype and not any_float:
        raise CheckpointError(f"{theirs.name} has dtype {theirs.dtype}, the base has {ours.dtype}")
