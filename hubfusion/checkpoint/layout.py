"""Where a checkpoint keeps the parameters of the base: the same encoder under another prefix, heads beside it.

``BertModel`` saves ``embeddings.…``, ``BertForSequenceClassification`` saves ``bert.embeddings.…`` and
``classifier.…``. Everything that belongs to the base must be there with the same shape and dtype, what lies outside
is a head, and nothing may hide between the two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from hubfusion.errors import CheckpointError

FLOATS = ("F64", "F32", "F16", "BF16")
# What transformers calls base_model_prefix, for encoders and decoders that people share.
PREFIXES = frozenset(
    "albert bert camembert convbert deberta distilbert electra ernie esm longformer mobilebert model mpnet "
    "nystromformer roberta transformer xlm xlnet".split()
)
# Buffers of constants that some versions of transformers write and others do not; never fused.
CONSTANTS = (".position_ids", ".token_type_ids")


class Tensor(Protocol):
    """What is asked of a tensor: one of a header (`TensorSpec`) or of an open checkpoint."""

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


T = TypeVar("T", bound=Tensor)


@dataclass(frozen=True, slots=True)
class Layout:
    """``names`` maps each tensor of the encoder, as the base calls it without prefix, to its name in the checkpoint.

    ``heads`` are the tensors outside the encoder, in the order of their names.
    """

    prefix: str
    names: Mapping[str, str]
    heads: tuple[str, ...]


def is_parameter(spec: Tensor) -> bool:
    """Whether training can move the tensor; integers and booleans are buffers."""
    return spec.dtype in FLOATS


def encoder_of(tensors: Mapping[str, T]) -> dict[str, T]:
    """The base's tensors without its prefix and without its own heads: what a finetune has to bring.

    A first name that `PREFIXES` knows, that holds an embedding and at least half of all tensors, is a prefix.
    """
    first, count = Counter(name.partition(".")[0] for name in tensors).most_common(1)[0] if tensors else ("", 0)
    inside = [name for name in tensors if name.startswith(first + ".")]
    if first in PREFIXES and 2 * count >= len(tensors) and any("embed" in n or ".wte" in n for n in inside):
        return {name[len(first) + 1 :]: tensors[name] for name in inside}
    return dict(tensors)


def match(base: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, any_float: bool = False) -> Layout:
    """Find the encoder of ``base`` in a checkpoint's ``tensors``.

    Dtypes must be equal, or just floating with ``any_float``. Raises `CheckpointError` that names the first parameter
    that is missing, has another shape or dtype, is there twice, or is neither the base's nor a head's.
    """
    encoder = encoder_of(base)
    prefix = _find_prefix(encoder, tensors)
    names: dict[str, str] = {}
    for name, spec in encoder.items():
        if found := tensors.get(prefix + name):
            _check_spec(spec, found, any_float)
            names[name] = found.name
        elif is_parameter(spec):
            raise CheckpointError(f"{prefix}{name} of the base is missing")
    heads = sorted(set(tensors) - set(names.values()))
    inside = {name.partition(".")[0] for name in encoder}
    for name in heads:
        _check_head(name, prefix, inside, encoder)
    size = sum(encoder[n].entries for n in names)
    extra = sum(tensors[n].entries for n in heads)
    if extra > size:
        raise CheckpointError(f"heads of {extra} entries beside an encoder of {size}: more head than model")
    return Layout(prefix, names, tuple(heads))


def _find_prefix(encoder: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """The prefix under which most of the encoder is found; none when nothing is."""
    present = {name.partition(".")[0] for name in tensors} & PREFIXES
    candidates = ["", *sorted(p + "." for p in present)]
    return max(candidates, key=lambda prefix: sum(prefix + name in tensors for name in encoder))


def _check_spec(spec: Tensor, found: Tensor, any_float: bool) -> None:
    if found.shape != spec.shape:
        raise CheckpointError(f"{found.name} has shape {list(found.shape)}, the base has {list(spec.shape)}")
    if found.dtype != spec.dtype and not (any_float and is_parameter(found) and is_parameter(spec)):
        raise CheckpointError(f"{found.name} has dtype {found.dtype}, the base has {spec.dtype}")


def _check_head(name: str, prefix: str, inside: set[str], encoder: Mapping[str, Tensor]) -> None:
    """Refuse a tensor that sits inside the encoder but that the base does not know, or a second copy of one it does."""
    own = name[len(prefix) :] if name.startswith(prefix) else None
    if own is not None and own.endswith(CONSTANTS):
        return
    first, _, rest = name.partition(".")
    if name in encoder or (first in PREFIXES and rest in encoder):
        raise CheckpointError(f"{name} is a second copy of a parameter of the base")
    if own is None or own.startswith("pooler.") and "pooler.dense.weight" not in encoder:
        return
    if prefix or own.partition(".")[0] in inside:
        raise CheckpointError(f"{name} belongs to the encoder, but the base has no such parameter")
