"""The facts of model types: the shipped table against transformers, a few checked by hand, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import CONFIG_MAPPING

from hubfusion.checkpoint.derive import auto_class, default_config, derive, read_class
from hubfusion.checkpoint.model_types import ModelType, find_model_type, known_model_types
from hubfusion.errors import CheckpointError
from tests.architectures import models, task_classes, tiny_config

COMMON = (
    "albert bart bert deberta-v2 distilbert electra gpt2 gpt_neox llama mixtral modernbert mpnet roberta t5 xlnet"
).split()


@pytest.mark.parametrize("name", COMMON)
def test_the_table_says_what_transformers_says(name: str) -> None:
    assert find_model_type(name) == derive(default_config(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", known_model_types())
def test_every_row_of_the_table_says_what_transformers_says(name: str) -> None:
    assert find_model_type(name) == derive(default_config(name))


@pytest.mark.parametrize("name", ["bart", "bert", "distilbert", "gpt2", "llama", "mixtral", "roberta", "t5", "xlnet"])
@pytest.mark.parametrize("layers", [2, 3])
def test_the_facts_do_not_depend_on_the_number_of_layers(name: str, layers: int) -> None:
    names = CONFIG_MAPPING[name].attribute_map
    config = {"model_type": name, names.get("num_hidden_layers", "num_hidden_layers"): layers}
    assert derive(config) == find_model_type(name)


def test_roberta() -> None:
    assert find_model_type("roberta") == ModelType(
        name="roberta",
        prefix="roberta",
        modules=("embeddings", "encoder", "pooler"),
        optional=("pooler",),
        buffers=("embeddings.position_ids", "embeddings.token_type_ids"),
        heads=("lm_head",),
        ties=(
            ("lm_head.decoder.bias", "lm_head.bias"),
            ("lm_head.decoder.weight", "embeddings.word_embeddings.weight"),
        ),
    )


def test_bert() -> None:
    assert find_model_type("bert") == ModelType(
        name="bert",
        prefix="bert",
        modules=("embeddings", "encoder", "pooler"),
        optional=("pooler",),
        buffers=("embeddings.position_ids", "embeddings.token_type_ids"),
        heads=("cls",),
        ties=(
            ("cls.predictions.decoder.bias", "cls.predictions.bias"),
            ("cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"),
        ),
    )


def test_t5_and_its_class_that_has_no_decoder() -> None:
    assert find_model_type("t5") == ModelType(
        name="t5",
        prefix="transformer",
        modules=("decoder", "encoder", "shared"),
        optional=(),
        buffers=("decoder.block.*.layer.*.EncDecAttention.relative_attention_bias.weight",),
        heads=("lm_head",),
        ties=(
            ("decoder.embed_tokens.weight", "shared.weight"),
            ("encoder.embed_tokens.weight", "shared.weight"),
            ("lm_head.weight", "shared.weight"),
        ),
        partial=("T5ForTokenClassification",),
    )


def test_gpt2_and_the_mask_that_older_versions_wrote() -> None:
    assert find_model_type("gpt2") == ModelType(
        name="gpt2",
        prefix="transformer",
        modules=("h", "ln_f", "wpe", "wte"),
        optional=(),
        buffers=("h.*.attn.bias",),
        heads=("lm_head",),
        ties=(("lm_head.weight", "wte.weight"),),
    )


def test_names_are_those_of_the_files_where_a_class_renames_its_tensors() -> None:
    """In memory, DeepSeek-V4 has ``embed_tokens`` and ``hc_head``; with another prefix its files have other names."""
    facts = find_model_type("deepseek_v4")
    assert facts is not None
    assert facts.modules == ("embed", "hc_head_base", "hc_head_fn", "hc_head_scale", "layers", "norm")
    assert facts.partial == ("DeepseekV4ForCausalLM",)


def test_a_class_that_does_not_save_its_sinusoids_makes_them_optional() -> None:
    facts = find_model_type("marian")
    assert facts is not None and facts.optional == ("decoder.embed_positions", "encoder.embed_positions")


def test_absolute_positions_are_optional_where_transformers_ignores_them_for_other_configs() -> None:
    facts = find_model_type("esm")
    assert facts is not None and facts.optional == ("embeddings.position_embeddings", "pooler")


def test_a_class_that_refuses_the_config_is_left_out() -> None:
    """Reformer's causal class wants ``is_decoder``, its masked class wants it to be False."""
    assert derive({"model_type": "reformer", "is_decoder": False}).heads == ("lm_head",)


def test_the_dtype_of_a_config_does_not_matter() -> None:
    """The activation of Apertus takes a dtype and no name of one."""
    assert derive({"model_type": "apertus", "dtype": "bfloat16"}) == find_model_type("apertus")


def names_saved_and_derived(cls: Any, name: str, folder: Path) -> tuple[set[str], set[str]]:
    def config() -> Any:
        whole = tiny_config(name)
        return whole if isinstance(whole, cls.config_class) else whole.get_text_config()

    cls(config()).save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "numpy") as file:
        saved = set(file.keys())
    stored = read_class(cls, config())
    return saved, set(stored.parameters | stored.persistent)


@pytest.mark.parametrize(
    "name", [*COMMON, *(pytest.param(n, marks=pytest.mark.slow) for n in models() if n not in COMMON)]
)
def test_the_names_derived_on_the_meta_device_are_those_in_a_saved_file(name: str, tmp_path: Path) -> None:
    for task, cls in [("", auto_class(tiny_config(name))), *task_classes(name)]:
        saved, derived = names_saved_and_derived(cls, name, tmp_path / cls.__name__)
        assert saved == derived, task


def test_an_unknown_model_type_is_not_in_the_table() -> None:
    assert find_model_type("no-such-type") is None


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "no-such-type"}, "model type 'no-such-type': transformers .* does not know it"),
        ({}, "model type '': transformers .* does not know it"),
        ({"model_type": "resnet"}, "model type 'resnet': transformers .* has no text class for it"),
        ({"model_type": "vit_mae"}, "model type 'vit_mae': its input is pixel_values, allowed is text"),
        ({"model_type": "bert", "num_hidden_layers": "many"}, "model type 'bert': the config is not valid: .*many"),
        ({"model_type": "bert", "hidden_size": 5}, "model type 'bert': BertModel cannot be built: .*not a multiple"),
    ],
)
def test_what_cannot_be_derived_is_refused_in_one_line(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        derive(config)
    assert "\n" not in str(caught.value)


def test_the_table_is_read_without_torch_or_transformers() -> None:
    code = (
        "import sys; from hubfusion.checkpoint.model_types import find_model_type; find_model_type('bert');"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
