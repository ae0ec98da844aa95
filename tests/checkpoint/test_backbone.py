from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubfusion.checkpoint import open_checkpoint
from hubfusion.checkpoint.backbone import (
    FILE,
    Backbone,
    declare,
    match,
    parse_backbone,
    parse_config,
    read_backbone,
    write_backbone,
)
from hubfusion.errors import CheckpointError
from tests.random_checkpoints import save


@dataclass(frozen=True)
class Spec:
    """A tensor of a header."""

    name: str
    shape: tuple[int, ...] = (2, 2)
    dtype: str = "F32"

    @property
    def entries(self) -> int:
        return int(np.prod(self.shape))


def specs(*names: str, prefix: str = "", dtype: str = "F32") -> dict[str, Spec]:
    return {prefix + n: Spec(prefix + n, dtype=dtype) for n in names}


WORDS, LAYER, POOLER = "embeddings.word_embeddings.weight", "encoder.layer.0.x", "pooler.dense.weight"
ROBERTA = {"model_type": "roberta"}


def base(*more: str, prefix: str = "") -> tuple[Backbone, dict[str, Spec]]:
    tensors = specs(WORDS, LAYER, prefix=prefix) | specs(*more)
    return declare(ROBERTA, tensors), tensors


def test_a_pooler_is_optional_and_a_pretraining_head_lies_outside() -> None:
    backbone, _ = base("roberta." + POOLER, "lm_head.bias", "classifier.weight", prefix="roberta.")
    assert (backbone.prefix, backbone.required, backbone.optional) == ("roberta.", (WORDS, LAYER), (POOLER,))
    assert backbone.heads == ("lm_head.bias",) and backbone.absent == ()


def test_a_base_without_a_pooler_knows_that_finetunes_may_have_one() -> None:
    backbone, tensors = base()
    assert backbone.absent == ("pooler",)
    found = match(backbone, tensors, specs(WORDS, LAYER, POOLER, prefix="roberta."))
    assert found.heads == ("roberta." + POOLER,)


@pytest.mark.parametrize("own", ["", "roberta."])
@pytest.mark.parametrize("prefix", ["", "roberta.", "model.", "encoder.", "backbone.", "module.", "model.roberta."])
@pytest.mark.parametrize("head", ["classifier", "regressor", "head", "mlp_head", "fc", "lm_head", "score.0.net"])
def test_any_single_prefix_and_any_head_are_taken(own: str, prefix: str, head: str) -> None:
    backbone, tensors = base(prefix=own)
    found = match(backbone, tensors, specs(WORDS, LAYER, prefix=prefix) | specs(f"{head}.weight"))
    assert found.names == {own + WORDS: prefix + WORDS, own + LAYER: prefix + LAYER}
    assert (found.prefix, found.heads) == (prefix, (f"{head}.weight",))


def test_optional_tensors_and_the_pretraining_head_are_matched_when_they_are_there() -> None:
    backbone, tensors = base("roberta." + POOLER, "lm_head.bias", prefix="roberta.")
    whole = match(backbone, tensors, tensors)
    assert set(whole.names) == set(tensors) and whole.absent == ()
    bare = match(backbone, tensors, specs(WORDS, LAYER))
    assert bare.absent == ("roberta." + POOLER, "lm_head.bias")
    wrapped = match(backbone, tensors, {f"model.{n}": Spec(f"model.{n}") for n in tensors})
    assert wrapped.names["lm_head.bias"] == "model.lm_head.bias"


def test_a_tied_parameter_is_found_under_its_other_names() -> None:
    tensors = specs("shared.weight", "encoder.layers.0.x", "decoder.layers.0.x")
    backbone = declare({"model_type": "bart"}, tensors)
    other = specs("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", prefix="model.")
    found = match(backbone, tensors, other | specs("encoder.layers.0.x", "decoder.layers.0.x", prefix="model."))
    assert found.names["shared.weight"] in other


@pytest.mark.parametrize(
    "tensors, says",
    [
        (specs(WORDS, prefix="roberta."), "encoder.layer.0.x of the base is missing"),
        ({}, "of the base is missing"),
        (specs(WORDS, LAYER, "backdoor", prefix="roberta."), "roberta.backdoor lies in the backbone"),
        (specs(WORDS, LAYER, "encoder.layer.1.x"), "encoder.layer.1.x lies in the backbone"),
        (specs(WORDS, LAYER, prefix="a.") | specs(WORDS, LAYER, prefix="b."), "there twice, as a.*and as b"),
        (specs(WORDS, LAYER, prefix="roberta.") | specs(WORDS), "is a second copy"),
        (specs(WORDS, LAYER) | {LAYER: Spec(LAYER, (3, 2))}, r"has shape \[3, 2\], the base has \[2, 2\]"),
        (specs(WORDS, LAYER) | {LAYER: Spec(LAYER, dtype="I8")}, "has dtype I8, a float dtype is needed"),
    ],
)
def test_what_breaks_the_rule_is_named(tensors: dict[str, Spec], says: str) -> None:
    backbone, ours = base()
    with pytest.raises(CheckpointError, match=says):
        match(backbone, ours, tensors)


def test_constants_that_transformers_knows_are_no_parameters_whatever_their_dtype() -> None:
    mask, bias = "h.0.attn.c_attn.weight", "h.0.attn.bias"
    tensors = specs("wte.weight", mask) | {bias: Spec(bias, (1, 1, 4, 4))}
    backbone = declare({"model_type": "gpt2"}, tensors)
    assert bias not in backbone.required
    newer = match(backbone, tensors, specs("wte.weight", mask, prefix="transformer."))
    assert newer.constants == {}
    older = match(backbone, tensors, {**specs("wte.weight", mask), bias: Spec(bias, (1, 1, 4, 4))})
    assert older.constants == {bias: bias} and bias not in older.names


def test_half_precision_is_matched_unless_the_bases_own_dtype_is_asked_for() -> None:
    backbone, tensors = base()
    half = specs(WORDS, LAYER, dtype="BF16")
    assert len(match(backbone, tensors, half).names) == 2
    with pytest.raises(CheckpointError, match="dtype BF16, the base has F32"):
        match(backbone, tensors, half, any_float=False)


def test_without_a_config_every_float_tensor_of_the_base_is_its_backbone() -> None:
    tensors = specs("a.x", "b.y") | {"steps": Spec("steps", (), "I64")}
    backbone = declare({}, tensors)
    assert (backbone.required, backbone.constants) == (("a.x", "b.y"), ("steps",))


def test_tensors_of_another_model_type_are_refused_in_one_line() -> None:
    with pytest.raises(CheckpointError, match="no tensor of the base belongs to a roberta backbone"):
        declare(ROBERTA, specs("transformer.h.0.x"))


def test_a_declaration_is_read_as_it_was_written_and_from_beside_the_weights(tmp_path: Path) -> None:
    backbone, tensors = base(POOLER)
    text = write_backbone(backbone)
    assert parse_backbone(text.encode(), "here", tensors) == backbone
    marked = replace(backbone, absent=("marked",))
    folder = save(tmp_path / "base", {n: np.zeros((2, 2), np.float32) for n in tensors}, model_type="roberta")
    with open_checkpoint(folder) as checkpoint:
        assert read_backbone(folder, checkpoint) == backbone
        (folder / FILE).write_text(write_backbone(marked))
        assert read_backbone(folder, checkpoint) == marked
    with pytest.raises(CheckpointError, match="pooler.dense.weight is not in the base's files"):
        parse_backbone(text.encode(), "here", specs(WORDS, LAYER))
    with pytest.raises(CheckpointError, match="schema 2, this version reads 1"):
        parse_backbone(json.dumps(json.loads(text) | {"schema": 2}).encode(), "here", tensors)


NAMES = st.sampled_from(
    [WORDS, LAYER, POOLER, "embeddings.position_ids", "lm_head.bias", "classifier.weight", "encoder.layer.1.x", "x"]
)


@settings(max_examples=300, deadline=None)
@given(
    names=st.dictionaries(
        st.tuples(st.sampled_from(["", "roberta.", "model."]), NAMES),
        st.tuples(st.sampled_from([(2, 2), (3,)]), st.sampled_from(["F32", "F16", "I64"])),
    ),
    own=st.sampled_from(["", "roberta."]),
)
def test_what_is_matched_fits_and_every_tensor_of_a_finetune_has_one_place(
    names: dict[tuple[str, str], tuple[tuple[int, ...], str]], own: str
) -> None:
    tensors = {p + n: Spec(p + n, *spec) for (p, n), spec in names.items()}
    backbone, ours = base(own + POOLER, "lm_head.bias", prefix=own)
    try:
        found = match(backbone, ours, tensors)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    assert {own + WORDS, own + LAYER} <= set(found.names)
    for mine, theirs in found.names.items():
        assert tensors[theirs].shape == ours[mine].shape and tensors[theirs].dtype in ("F32", "F16")
    assert not set(found.names.values()) & set(found.heads)
    assert not set(found.names) & set(found.absent)


@pytest.mark.parametrize(
    ("text", "says"), [(b"[1]", r"config.json must be an object, got \[1\]"), (b"{", "config.json is not JSON: ")]
)
def test_a_config_that_is_no_object_is_refused(text: bytes, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        parse_config(text)
