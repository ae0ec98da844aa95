"""Which parameter of a finetune is which parameter of the base: prefixes, heads, tied parameters and buffers.

Names decide, never positions. The *trunk* is what every finetune must have; beside it stand a *task head* (never
fused: tasks differ), the base's own *pretraining head* and *pooler* (fused when every input has them, kept as they
are otherwise), and *buffers* (integers; equal to the base's or absent).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from hubfusion.checkpoint.reader import Checkpoint, Parameter
from hubfusion.errors import CheckpointError

TASK_HEADS = frozenset({
    "classification_head", "classifier", "dense_final", "logits_proj", "pre_classifier", "qa_outputs", "score",
    "seq_relationship", "sequence_summary", "summary",
})  # fmt: skip
PRETRAINING_HEADS = frozenset({
    "cls", "discriminator_predictions", "embed_out", "generator_lm_head", "generator_predictions", "lm_head",
    "lm_predictions", "mask_predictions", "output_projection", "predictions", "vocab_layer_norm", "vocab_projector",
    "vocab_transform",
})  # fmt: skip
OPTIONAL_IN_TRUNK = frozenset({"pooler"})
TIED_PROBE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Match:
    """How one input fits the base: ``names`` maps the base's name to the input's, for every shared float parameter.

    ``absent`` are base parameters outside the trunk that the input lacks; ``dropped`` are the input's own heads.
    """

    names: Mapping[str, str]
    absent: tuple[str, ...]
    dropped: tuple[str, ...]


def is_task_head(name: str, prefix: str) -> bool:
    """Whether a parameter belongs to a task's head, given the trunk's prefix (``"bert."`` or empty)."""
    return not (prefix and name.startswith(prefix)) and name.split(".")[0] in TASK_HEADS


def trunk_prefix(names: Iterable[str]) -> str:
    """Return the prefix under which a checkpoint keeps its trunk: ``"roberta."``, or empty when there is none.

    >>> trunk_prefix(["bert.embeddings.w", "bert.encoder.0.w", "classifier.weight"])
    'bert.'
    >>> trunk_prefix(["embeddings.w", "encoder.0.w", "pooler.dense.weight"])
    ''
    """
    firsts = {n.split(".")[0] for n in names} - TASK_HEADS - PRETRAINING_HEADS
    if len(firsts) != 1:
        return ""
    first = firsts.pop()
    seconds = {n.split(".")[1] for n in names if n.startswith(f"{first}.")}
    return "" if first in {"encoder", "decoder", "embeddings", "layers", "h"} or not seconds else f"{first}."


def match(base: Checkpoint, model: Checkpoint, tied: Mapping[str, str]) -> Match:
    """Match an input to the base by name, after its prefix is mapped; ``tied`` comes from `tied_names`.

    Raises `CheckpointError` naming the file and the parameter when a trunk parameter is missing, has another shape,
    is not float, is not known to the base, or when a buffer differs from the base's.
    """
    ours, theirs = trunk_prefix(base.parameters), trunk_prefix(model.parameters)
    rename = _renaming(base.parameters, model.parameters, ours, theirs)
    names: dict[str, str] = {}
    absent: list[str] = []
    for name, spec in base.parameters.items():
        found = next((n for n in (rename(name), rename(tied.get(name, name))) if n in model.parameters), None)
        if is_task_head(name, ours):
            continue
        if not spec.is_float:
            _check_buffer(base, model, spec, found)
        elif found is None:
            if _in_trunk(name, ours):
                raise CheckpointError(
                    f"{model.path}: {rename(name)} is missing; every parameter of the base's trunk is needed "
                    f"({len(base.parameters)} in {base.path})"
                )
            absent.append(name)
        else:
            _check_shape(model.parameters[found], spec)
            names[name] = found
    known = {rename(n) for n in base.parameters}
    extra = [n for n, p in model.parameters.items() if n not in known]
    foreign = [n for n in extra if model.parameters[n].is_float and _in_trunk(n, theirs)]
    if foreign and (foreign := _not_tied(foreign, known, tied_names(model))):
        raise CheckpointError(f"{model.path}: {foreign[0]} is not a parameter of the base {base.path}")
    heads = [n for n in model.parameters if n in known and is_task_head(n, theirs)]
    return Match(names, tuple(absent), tuple(sorted({*extra, *heads})))


def _not_tied(foreign: list[str], known: set[str], tied: Mapping[str, str]) -> list[str]:
    """Return those foreign names whose value the input does not also store under a known name."""
    firsts = {tied.get(n, n) for n in known}
    return [n for n in foreign if tied.get(n, n) not in firsts]


def _in_trunk(name: str, prefix: str) -> bool:
    if not name.startswith(prefix):
        return False
    first = name[len(prefix) :].split(".")[0]
    if first in OPTIONAL_IN_TRUNK:
        return False
    return bool(prefix) or first not in TASK_HEADS | PRETRAINING_HEADS


def _renaming(
    base: Mapping[str, Parameter], model: Mapping[str, Parameter], ours: str, theirs: str
) -> Callable[[str], str]:
    """Choose between names as they are and names with the prefix exchanged: whichever finds more of the trunk."""

    def exchange(name: str) -> str:
        return theirs + name[len(ours) :] if name.startswith(ours) and not is_outside(name) else name

    def is_outside(name: str) -> bool:
        return not ours and name.split(".")[0] in TASK_HEADS | PRETRAINING_HEADS

    def keep(name: str) -> str:
        return name

    return max((keep, exchange), key=lambda rename: sum(rename(n) in model for n in base))


def _check_shape(theirs: Parameter, ours: Parameter) -> None:
    if not theirs.is_float:
        raise CheckpointError(f"{theirs.file}: {theirs.name}: dtype {theirs.dtype}, a float dtype is needed")
    if theirs.shape != ours.shape:
        raise CheckpointError(
            f"{theirs.file}: {theirs.name}: shape {list(theirs.shape)}, the base has {list(ours.shape)}"
        )


def _check_buffer(base: Checkpoint, model: Checkpoint, spec: Parameter, found: str | None) -> None:
    if found is None:
        return
    theirs = model.parameters[found]
    same = (theirs.dtype, theirs.shape) == (spec.dtype, spec.shape)
    if not same or base.read_bytes(spec.name) != model.read_bytes(found):
        raise CheckpointError(
            f"{theirs.file}: {found}: buffer ({theirs.dtype} {list(theirs.shape)}) differs from the base's "
            f"({spec.dtype} {list(spec.shape)}); buffers must be equal or absent"
        )


def tied_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Parameters that a checkpoint stores twice: each later name to the first (an embedding and its decoder).

    Tied parameters have two or more axes, one shape and dtype, and equal bytes; transformers stores them once, older
    files twice. Equal layer norms are not ties. The name in the trunk comes first.
    """
    prefix = trunk_prefix(checkpoint.parameters)
    groups: dict[tuple[object, ...], list[str]] = {}
    for spec in checkpoint.parameters.values():
        if spec.is_float and len(spec.shape) >= 2 and spec.size and not is_task_head(spec.name, prefix):
            probe = checkpoint.read_bytes(spec.name, 0, min(TIED_PROBE_BYTES, spec.size))
            groups.setdefault((spec.dtype, spec.shape, probe), []).append(spec.name)
    tied: dict[str, str] = {}
    for names in groups.values():
        first, *rest = sorted(names, key=lambda n: (not _in_trunk(n, prefix), n))
        tied.update({name: first for name in rest if _same_bytes(checkpoint, first, name)})
    return tied


def _same_bytes(base: Checkpoint, one: str, other: str, step: int = 1 << 20) -> bool:
    size = base.parameters[one].size
    return all(
        base.read_bytes(one, at, min(at + step, size)) == base.read_bytes(other, at, min(at + step, size))
        for at in range(0, size, step)
    )
