"""Derive the layout of a model type from transformers: build its classes on the meta device and compare the names.

The names are those of the files that ``save_pretrained`` writes, which differ from the names of the modules where
transformers converts checkpoints (mixtures of experts). This module imports torch and transformers;
`hubfusion.checkpoint.backbone` imports it only for a type that the table lacks. It also writes the shipped table:
``python -m hubfusion.checkpoint.derive > hubfusion/checkpoint/model_types.json``.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Set
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hubfusion.checkpoint.model_types import ModelType, format_table
from hubfusion.errors import CheckpointError

# The task classes of text models and the mappings that list them, in transformers.models.auto.modeling_auto.
TASKS = {
    "SequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "QuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "MultipleChoice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING",
    "MaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "CausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "Seq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "PreTraining": "MODEL_FOR_PRETRAINING_MAPPING",
}
PRETRAINING = ("MaskedLM", "CausalLM", "Seq2SeqLM", "PreTraining")
PARTIAL = 0.25  # a class that lacks more than this share of the backbone's patterns is another model
# What the config classes of these types leave empty and their models need.
NEEDED: dict[str, dict[str, Any]] = {
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": 33},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}


def pattern(name: str) -> str:
    """The name with each number that is a component of its own written ``*``.

    >>> pattern("encoder.layer.11.output.dense.weight")
    'encoder.layer.*.output.dense.weight'
    """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


@dataclass(frozen=True, slots=True)
class Stored:
    """Names of one class's tensors as ``save_pretrained`` writes them.

    ``aliases`` map each name that is tied to another one, or would be with ``tie_word_embeddings``, to that one.
    ``modules`` map the path of a module to the name of its class, ``members`` are the names of parameters in the model.
    ``ignored`` are the regular expressions of tensors that transformers ignores.
    """

    name: str
    parameters: frozenset[str]
    buffers: frozenset[str]
    persistent: frozenset[str]
    aliases: dict[str, str]
    modules: dict[str, str]
    members: frozenset[str]
    ignored: frozenset[str]

    @property
    def tensors(self) -> frozenset[str]:
        """Names that a file of this class may hold."""
        return self.parameters | self.persistent | frozenset(self.aliases)


def task_classes(config: Any) -> dict[str, Any]:
    """The text task classes of the config's model type by task; of several classes for one task, the first."""
    models = {}
    for task, mapping in TASKS.items():
        classes = getattr(auto, mapping)
        if type(config) in classes:
            models[task] = _first(classes[type(config)])
    return models


def auto_class(config: Any) -> Any:
    """The class of `transformers.AutoModel` for this config, or None."""
    return _first(auto.MODEL_MAPPING[type(config)]) if type(config) in auto.MODEL_MAPPING else None


def _first(classes: Any) -> Any:
    return classes[0] if isinstance(classes, (tuple, list)) else classes


def read_class(cls: Any, config: Any) -> Stored:
    """Build a class on the meta device and read the names of its tensors.

    A class of text alone in a type with images takes the part of the config that is about text, as in transformers.
    """
    if not isinstance(config, cls.config_class):
        config = config.get_text_config()
    with torch.device("meta"):
        model = cls(deepcopy(config))
    unsaved = set(model._keys_to_ignore_on_save or ())
    state = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in unsaved}
    aliases, tied = _ties(model, state)
    files = _file_names(model, [name for name in state if name not in tied])
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}

    def renamed(name: str) -> str:
        return files[name] if name in files else name

    return Stored(
        name=cls.__name__,
        parameters=frozenset(files.values()) - {renamed(name) for name in buffers},
        buffers=frozenset(map(renamed, buffers)),
        persistent=frozenset(renamed(name) for name in buffers if name in state),
        aliases={renamed(alias): renamed(name) for alias, name in aliases.items()},
        modules={name: type(module).__name__ for name, module in model.named_modules()},
        members=frozenset(state.keys() - buffers),
        ignored=frozenset(model._keys_to_ignore_on_load_unexpected or ()),
    )


def _ties(model: Any, state: dict[str, Any]) -> tuple[dict[str, str], set[str]]:
    """The names that are or may be tied, each with the name that it is tied to; and those that are tied now."""
    groups = defaultdict(list)
    for name, tensor in state.items():
        groups[id(tensor)].append(name)
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "tie_word_embeddings"):
            module.config.tie_word_embeddings = True
    aliases = dict(model.get_expanded_tied_weights_keys(all_submodels=True))
    tied = set()
    for names in groups.values():
        kept = next((name for name in names if name not in aliases), names[0])
        aliases |= {name: kept for name in names if name != kept}
        tied |= {name for name in names if name != kept}
    return {alias: _end(aliases, name) for alias, name in aliases.items()}, tied


def _end(aliases: dict[str, str], name: str) -> str:
    """Follow a chain of ties to the name that is not tied to another."""
    seen = set()
    while name in aliases and name not in seen:
        seen.add(name)
        name = aliases[name]
    return name


def _file_names(model: Any, names: list[str]) -> dict[str, str]:
    """What `save_pretrained` calls each tensor; of one that it splits or joins, each part maps to itself."""
    state = model.state_dict()
    tensors = {name: torch.empty_like(state[name]) for name in names}  # one object for each name
    written = revert_weight_conversion(model, dict(tensors))
    origin = {id(tensor): name for name, tensor in tensors.items()}
    return {origin.get(id(tensor), file): file for file, tensor in written.items()}


def derive(config: Mapping[str, Any]) -> ModelType:
    """Derive the facts of the model type in ``config`` (the content of a config.json) from transformers.

    Builds the class of AutoModel and every text task class with this config on the meta device, which takes about a
    second. Raises `CheckpointError` when transformers does not know the type, cannot build AutoModel's class, or has
    no text task class for it.
    """
    name = str(config.get("model_type", ""))
    if name not in CONFIG_MAPPING:
        raise CheckpointError(f"model type {name!r}: transformers {transformers.__version__} does not know it")
    fields = {
        key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")
    }  # names are all we read
    try:
        loaded = CONFIG_MAPPING[name].from_dict(fields)
    except Exception as error:  # whatever its checks raise
        raise CheckpointError(f"model type {name!r}: the config is not valid: {_line(error)}") from error
    cls, tasks = auto_class(loaded), task_classes(loaded)
    if cls is None or not tasks:
        raise CheckpointError(f"model type {name!r}: transformers {transformers.__version__} has no text class for it")
    if cls.main_input_name != "input_ids":
        raise CheckpointError(f"model type {name!r}: its input is {cls.main_input_name}, allowed is text (input_ids)")
    backbone = _build(name, cls, loaded)
    return _compare(name, cls.base_model_prefix, backbone, _build_tasks(name, backbone, tasks, loaded))


def _compare(name: str, prefix: str, backbone: Stored, parts: list[_Task]) -> ModelType:
    whole = [part for part in parts if not part.is_partial]
    inside = {pattern(parameter) for parameter in backbone.parameters}
    sometimes = {pattern(parameter) for part in whole for parameter in (*part.lacking, *part.added)}
    optional = sometimes | _sometimes(backbone, inside)
    outside = {pattern(n) for part in whole if part.task in PRETRAINING for n in part.outside}
    pairs = {pair for ties in (backbone.aliases.items(), *(part.ties for part in whole)) for pair in ties}
    ties = {(pattern(alias), pattern(name)) for alias, name in pairs}
    return ModelType(
        name=name,
        prefix=prefix,
        modules=_sorted(n.partition(".")[0] for n in backbone.tensors),
        optional=_sorted(_shortest(optional, inside - optional)),
        buffers=_sorted({pattern(buffer) for buffer in backbone.buffers} | set(_older(backbone)) - inside),
        heads=_sorted(_shortest(outside, inside)),
        ties=_sorted((alias, name) for alias, name in ties if alias != name),  # equal where layers share a tensor
        partial=_sorted(part.stored.name for part in parts if part.is_partial),
    )


def _sorted(items: Any) -> tuple[Any, ...]:
    return tuple(sorted(set(items)))


def _build(name: str, cls: Any, config: Any) -> Stored:
    try:
        return read_class(cls, config)
    except Exception as error:  # whatever its __init__ raises for this config
        raise CheckpointError(f"model type {name!r}: {cls.__name__} cannot be built: {_line(error)}") from error


def _build_tasks(name: str, backbone: Stored, tasks: Mapping[str, Any], config: Any) -> list[_Task]:
    """The task classes, without those that refuse this config and so have no finetunes (one of Reformer's)."""
    parts, errors = [], []
    for task, cls in tasks.items():
        try:
            parts.append(_Task(backbone, task, _build(name, cls, config)))
        except CheckpointError as error:
            errors.append(error)
    if not parts:
        raise errors[0]
    return parts


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class _Task:
    """A task class beside the backbone: under which prefix it stores it, what it lacks and what it adds."""

    def __init__(self, backbone: Stored, task: str, stored: Stored) -> None:
        self.task = task
        self.stored = stored
        prefix = _prefix(backbone.parameters, stored.tensors)
        known = backbone.tensors
        names = {n.removeprefix(prefix) if n.removeprefix(prefix) in known else n: n for n in stored.tensors}
        self.lacking = backbone.parameters - names.keys()
        self.outside = frozenset(n.removeprefix(prefix) for n in names.keys() - known)
        under = (n.removeprefix(prefix) for n in stored.tensors if prefix and n.startswith(prefix))
        self.added = frozenset(n for n in under if n not in known)
        relative = {full: n for n, full in names.items()}
        self.ties = frozenset((relative[a], relative[b]) for a, b in stored.aliases.items() if b in relative)
        share = len({pattern(n) for n in self.lacking}) / len({pattern(n) for n in backbone.parameters})
        at = _prefix(backbone.members, stored.members)
        is_renamed = bool(self.lacking) and all(at + n in stored.members for n in backbone.members)
        self.is_partial = share > PARTIAL or is_renamed


def _prefix(parameters: Set[str], names: Set[str]) -> str:
    """The prefix under which most of the parameters are among the names; it ends with a dot or is empty."""
    counts: Counter[str] = Counter({"": 0})
    for name in names:
        at = 0
        while at >= 0:
            counts[name[:at]] += name[at:] in parameters
            at = name.find(".", at) + 1 or -1
    return counts.most_common(1)[0][0]


def _shortest(patterns: Set[str], others: Set[str]) -> Iterator[str]:
    """Each pattern cut after the fewest components that no other pattern begins with."""
    taken = {".".join(parts[:n]) for parts in (other.split(".") for other in others) for n in range(1, len(parts) + 1)}
    for parts in (name.split(".") for name in patterns):
        yield next((cut for n in range(1, len(parts)) if (cut := ".".join(parts[:n])) not in taken), ".".join(parts))


def _sometimes(backbone: Stored, parameters: Set[str]) -> set[str]:
    """Parameters that transformers ignores in other configs of the type, such as absolute positions beside rotary."""
    whole = [rf"(^|\.)({regex.strip('^$')})(\.|$)" for regex in backbone.ignored]
    return {name for name in parameters if any(re.search(regex, name) for regex in whole)}


def _older(backbone: Stored) -> Iterator[str]:
    """Patterns of tensors that older versions wrote and transformers ignores, from its regular expressions.

    A literal expression that begins with the name of a module is completed to the module's path: ``attn.bias`` to
    ``h.*.attn.bias``. Rotary frequencies were once kept in each attention module.
    """
    modules = {pattern(path) for path in backbone.modules if path}
    for regex in backbone.ignored:
        literal = regex.strip("^$").replace(r"\.", ".").replace(r"\d+", "*")
        if re.fullmatch(r"[\w*]+(\.[\w*]+)+", literal):
            parts = pattern(literal).split(".")
            yield from _complete(parts, modules)
    if any(buffer.endswith("rotary_emb.inv_freq") for buffer in backbone.buffers):
        attention = {pattern(path) for path, cls in backbone.modules.items() if cls.endswith("Attention")}
        yield from (f"{path}.rotary_emb.inv_freq" for path in attention)


def _complete(parts: list[str], modules: Set[str]) -> Iterator[str]:
    for n in range(len(parts) - 1, 0, -1):
        end, rest = ".".join(parts[:n]), ".".join(parts[n:])
        matching = [path for path in modules if path == end or path.endswith("." + end)]
        if matching:
            yield from (f"{path}.{rest}" for path in matching)
            return


def derive_table() -> tuple[list[ModelType], dict[str, str]]:
    """The facts of all model types by their default configs, and why the others have none."""
    mappings = [getattr(auto, name + "_NAMES") for name in TASKS.values()]
    names = sorted({name for mapping in mappings for name in mapping if name in CONFIG_MAPPING})
    types, reasons = [], {}
    for name in names:
        try:
            types.append(derive(default_config(name)))
        except CheckpointError as error:
            reasons[name] = str(error)
    return types, reasons


def default_config(name: str) -> dict[str, Any]:
    """A config of a model type that leaves all to its class but what `NEEDED` adds."""
    return {"model_type": name, **NEEDED.get(name, {})}


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    table, left_out = derive_table()
    sys.stdout.write(format_table(table, transformers.__version__))
    sys.stderr.writelines(f"{reason}\n" for reason in left_out.values())
