"""PEFT adapters against peft's own merge_and_unload, on two-layer models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hubfusion.errors import CheckpointError
from hubfusion.fuse import Settings, fuse
from tests.random_checkpoints import load, recipe_of, save

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ATTENTION = ["query", "value"]


def bert(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12, hidden_dropout_prob=0.0,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def gpt2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=12)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, auto: str, **options) -> Path:
    """Train-less adapter with random matrices, and what peft merges it to, saved beside."""
    model = getattr(transformers, auto).from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 10, **options}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.rand_like(parameter) * 0.2 + 0.1)
            elif parameter.requires_grad:
                parameter.add_(0.01)
    model.save_pretrained(folder)
    model.merge_and_unload().save_pretrained(folder.with_name(folder.name + "-merged"))
    return folder


def merged(folder: Path) -> dict[str, np.ndarray]:
    tensors = load(folder.with_name(folder.name + "-merged"))
    return {n.removeprefix("bert.").removeprefix("transformer."): v for n, v in tensors.items()}


def fused(base: Path, inputs: list[Path], out: Path, **settings) -> dict[str, np.ndarray]:
    plan = recipe_of(tuple(map(str, range(len(inputs)))), (1.0,) * len(inputs))
    fuse(plan, base, inputs, out, settings=Settings(**settings))
    return {n.removeprefix("transformer."): v for n, v in load(out).items()}


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ATTENTION},
        {"target_modules": ATTENTION, "use_rslora": True},
        {"target_modules": ATTENTION, "use_dora": True},
        {"target_modules": ["dense", "word_embeddings"]},
        {"target_modules": [*ATTENTION, "dense"], "rank_pattern": {"query": 2}, "alpha_pattern": {"query": 3}},
        {"target_modules": ATTENTION, "rank_pattern": {"layer.1.attention.self.query": 2}, "use_rslora": True},
        {"target_modules": ATTENTION, "use_rslora": True, "use_dora": True, "alpha_pattern": {"value": 20}},
        {"target_modules": ATTENTION, "bias": "lora_only"},
        {"target_modules": ATTENTION, "bias": "all", "layers_to_transform": [1]},
        {"target_modules": ATTENTION, "modules_to_save": ["pooler", "intermediate"]},
        {"target_modules": "all-linear", "init_lora_weights": "orthogonal"},
    ],
    ids=[
        "lora",
        "rslora",
        "dora",
        "embeddings",
        "patterns",
        "rslora-patterns",
        "rslora-dora",
        "bias-lora",
        "bias-all",
        "saved",
        "all-linear",
    ],
)
@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForSequenceClassification"])
def test_one_adapter_gives_what_peft_merges(tmp_path, options, auto):
    base = bert(tmp_path / "base")
    task = {"task_type": "SEQ_CLS"} if "Sequence" in auto else {}
    one = adapter(base, tmp_path / "one", auto, **options, **task)
    out, wanted, start = fused(base, [one], tmp_path / "out"), merged(one), load(base)
    changed = 0
    for name, value in out.items():
        if name in wanted:
            np.testing.assert_allclose(value, wanted[name], rtol=2e-6, atol=1e-6, err_msg=name)
            changed += not np.array_equal(value, start[name])
    assert changed >= 4


def test_an_adapter_of_conv1d_weights_and_one_full_finetune_are_averaged(tmp_path):
    base = gpt2(tmp_path / "base")
    one = adapter(base, tmp_path / "one", "AutoModelForCausalLM", target_modules=["c_attn"], fan_in_fan_out=True)
    other = Path(str(one) + "-merged")
    out, wanted = fused(base, [one, other], tmp_path / "out"), merged(one)
    for name, value in out.items():
        np.testing.assert_allclose(value, wanted[name], rtol=2e-6, atol=1e-6, err_msg=name)


def test_a_delta_has_the_same_bits_in_whatever_pieces_it_is_read(tmp_path):
    base = bert(tmp_path / "base")
    one = adapter(base, tmp_path / "one", "AutoModel", target_modules=[*ATTENTION, "dense"], use_dora=True)
    from hubfusion.checkpoint.deltas import Chunk, open_models

    with open_models(base, [one]) as models:
        name = "encoder.layer.0.attention.self.query.weight"
        spec = models.base.parameters[name]
        whole = models.read(Chunk(spec, 0, 256), np.empty((2, 256), np.float32)).deltas[0].copy()
        for first, last in ((0, 1), (5, 40), (100, 256)):
            part = models.read(Chunk(spec, first, last), np.empty((2, 256), np.float32)).deltas[0]
            assert part.tolist() == whole[first:last].tolist()
    assert whole.any()


def change(folder: Path, **fields) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' cannot be fused exactly, allowed are 'LORA'"),
        ({"bias": "some"}, "bias 'some' cannot be fused exactly, allowed are 'none', 'all', 'lora_only'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' cannot be fused exactly, allowed"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq' cannot be fused exactly"),
        ({"kasa_config": {"beta": 1}}, r"kasa_config \{'beta': 1\} cannot be fused exactly: merge it with peft first"),
        ({"lora_bias": True}, "lora_bias True cannot be fused exactly"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices \[3\] cannot be fused exactly"),
        ({"what_comes_next_year": 1}, "what_comes_next_year 1 cannot be fused exactly"),
        ({"r": 5}, "r is 5, its matrices have 4"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number, got '8'"),
        ({"alpha_pattern": {"query|value": 3}}, r"pattern 'query\|value': only plain module names"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ],
)
def test_an_adapter_that_is_not_exactly_computable_is_refused_by_name(tmp_path, fields, message):
    base = bert(tmp_path / "base")
    one = adapter(base, tmp_path / "one", "AutoModel", target_modules=ATTENTION)
    change(one, **fields)
    with pytest.raises(CheckpointError, match=message):
        fused(base, [one], tmp_path / "out")


def test_an_adapter_of_another_architecture_is_refused(tmp_path):
    one = adapter(bert(tmp_path / "bert"), tmp_path / "one", "AutoModel", target_modules=ATTENTION)
    with pytest.raises(CheckpointError, match="adapts nothing of the backbone"):
        fused(gpt2(tmp_path / "gpt2"), [one], tmp_path / "out")


def test_an_adapter_of_a_tied_embedding_changes_both_places_of_a_base_that_stores_it_twice(tmp_path):
    base = gpt2(tmp_path / "base")
    one = adapter(base, tmp_path / "one", "AutoModelForCausalLM", target_modules=["wte"])
    tensors = load(base)
    twice = save(
        tmp_path / "twice", {**tensors, "lm_head.weight": tensors["transformer.wte.weight"]}, model_type="gpt2"
    )
    out, wanted = fused(twice, [one], tmp_path / "out"), merged(one)
    np.testing.assert_allclose(out["wte.weight"], wanted["wte.weight"], rtol=2e-6, atol=1e-6)
    assert np.array_equal(out["lm_head.weight"], out["wte.weight"])
    assert not np.array_equal(out["wte.weight"], tensors["transformer.wte.weight"])


@pytest.mark.parametrize("modules", [["word_embeddings"], ["query", "word_embeddings"]])
def test_dora_of_an_embedding_is_refused_by_name(tmp_path, modules):
    base = bert(tmp_path / "base")
    one = adapter(base, tmp_path / "one", "AutoModel", target_modules=modules, use_dora=True)
    with pytest.raises(CheckpointError, match="word_embeddings: DoRA on embeddings or Conv1D: merge it with peft"):
        fused(base, [one], tmp_path / "out")


def test_a_missing_half_or_another_shape_is_named(tmp_path):
    from safetensors.numpy import load_file, save_file

    base = bert(tmp_path / "base")
    one = adapter(base, tmp_path / "one", "AutoModel", target_modules=ATTENTION)
    file = one / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.encoder.layer.0.attention.self.query.lora_B.weight"
    save_file({n: v for n, v in tensors.items() if n != name}, file)
    with pytest.raises(CheckpointError, match="encoder.layer.0.attention.self.query: lora_B is missing"):
        fused(base, [one], tmp_path / "out")
    save_file({**tensors, name: tensors[name][:8].copy()}, file)
    with pytest.raises(CheckpointError, match=r"self.query: shape \[8, 16\], the base has \[16, 16\]"):
        fused(base, [one], tmp_path / "out")
