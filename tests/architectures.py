"""Tiny models of the model types that transformers has a text class for: two layers, 32 wide, 60 words."""

from __future__ import annotations

import re
from typing import Any

from transformers import CONFIG_MAPPING

from hubfusion.checkpoint import derive
from hubfusion.checkpoint.model_types import known_model_types

VOCABULARY, WIDTH, LAYERS, HEADS, POSITIONS = 60, 32, 2, 2, 64

# What a number in a config becomes, by the first expression that its name matches; the others stay.
SIZES: tuple[tuple[str, int], ...] = (
    (r"(^|_)vocab(ulary)?_size.*|.*vocab_size|num_embeddings|n_vocab", VOCABULARY),
    (r"(num_)?(experts_per_tok\w*|.*top_?k(_experts)?)|num_selected_experts|num_experts_per_token", 2),
    (r"(n|num)_.*experts?|num_experts|moe_num_experts|num_local_experts", 4),
    (r"n_group|topk_group|num_expert_groups|n_groups?", 1),
    (r".*(num_hidden_layers|num_layers|n_layers?|_layers)|n_layer|num_block\w*|depth", LAYERS),
    (r".*head_dim|d_kv|d_head|attention_head_size|.*_lora_rank", WIDTH // HEADS),
    (r".*(num_\w*heads|n_heads?|_heads)|n_head", HEADS),
    (r".*(hidden_size|embedding_size|intermediate_size|dim|d_model|n_embd|d_ff|d_inner|dim_ff|lru_width)", WIDTH),
    (r".*(max_(position_embedding|source_position|target_position)s|n_positions|n_ctx|max_seq_len\w*)", POSITIONS),
)

# What has to agree with another size of the same type.
CONSISTENT: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": WIDTH},  # heads x their size is twice the width
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "dots3_note_text": {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8},  # together the size of a head
    "falcon_h1": {"mamba_d_head": WIDTH, "mamba_d_ssm": 2 * WIDTH},
    "gemma3n_text": {"num_kv_shared_layers": 0},  # two layers of two kinds have nothing to share
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},  # one of each kind for two layers
    "granitemoehybrid": {"mamba_d_head": WIDTH},
    "mamba2": {"head_dim": WIDTH},
    "reformer": {"axial_pos_embds_dim": [WIDTH // 2, WIDTH // 2]},  # together the width
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]},  # two that share a block
}

# Model types of the table for which there is no tiny model, and why.
NOT_BUILT: dict[str, str] = {
    "dots3_note": "its text config must agree with itself in sizes that its vision config gives other values",
    "fun_asr_nano": "the sizes of its audio adaptor and its text model must agree",
    "janus": "its image codebook has 70 million parameters",
    "vibevoice_asr": "its audio tokenizers have 680 million parameters",
}

# Task classes that no config of their type builds together with its others.
REFUSED = {"ReformerModelWithLMHead": "wants is_decoder, which ReformerForMaskedLM does not allow"}


def tiny_config(name: str) -> Any:
    """A config of the model type with small sizes, made from its defaults. A model is ``cls(tiny_config(name))``.

    A class of text alone in a type with images (`Llama4ForCausalLM`) takes ``tiny_config(name).get_text_config()``.
    """
    cls = CONFIG_MAPPING[name]
    return cls.from_dict(_shrink(cls(**derive.NEEDED.get(name, {})).to_dict()) | CONSISTENT.get(name, {}))


def _shrink(config: dict[str, Any]) -> dict[str, Any]:
    layers = next((config[key] for key in ("num_hidden_layers", "num_layers", "n_layer") if config.get(key)), 0)
    return {key: _small(key, value, layers) for key, value in config.items()}


def _small(key: str, value: Any, layers: Any) -> Any:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not str(k).isdigit() or int(k) < LAYERS}  # some are by layer
        return _shrink(kept)
    if isinstance(value, list) and len(value) == layers:
        kinds = list(dict.fromkeys(map(str, value)))
        value = [kinds[0], kinds[-1]] if all(isinstance(item, str) for item in value) else value[:LAYERS]
    if isinstance(value, list):
        return [_small(key, item, layers) for item in value]
    if type(value) is not int:
        return value
    if key.endswith(("token_id", "token_index")):
        return value if value < VOCABULARY else VOCABULARY - 1
    return next((min(value, size) for names, size in SIZES if re.fullmatch(names, key)), value)


def task_classes(name: str) -> list[tuple[str, Any]]:
    """The task classes of a model type, each once, with the first task that it is for; without the `REFUSED`."""
    config = CONFIG_MAPPING[name](**derive.NEEDED.get(name, {}))
    found: dict[Any, str] = {}
    for task, cls in derive.task_classes(config).items():
        found.setdefault(cls, task)
    return [(task, cls) for cls, task in found.items() if cls.__name__ not in REFUSED]


def models() -> list[str]:
    """The model types that can be made tiny."""
    return [name for name in known_model_types() if name not in NOT_BUILT]
