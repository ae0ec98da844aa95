"""The one trainer: the gradient of a plain trainer, a head from the seed alone, files that load with transformers."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hubfusion.data.loading import Split
from hubfusion.errors import EvaluationError
from hubfusion.evaluate.probing import compute_features, load_encoder
from hubfusion.evaluate.protocols import Pooling
from hubfusion.train import Encoding, Mode, Training, device
from hubfusion.train import finetune as train
from hubfusion.train.gradient import Gradient
from hubfusion.train.tokens import by_length, load_tokenizer, tokenize
from tests.trainable_models import make_base, make_data, make_split

QUICK = Training(learning_rate=1e-2, batch_size=16, epochs=6, max_length=16)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def test_a_finetune_learns_and_loads_with_plain_transformers(base, tmp_path):
    from transformers import pipeline

    steps: list[train.TrainingProgress] = []
    result = train.finetune(base, make_data(), replace(QUICK, seed=4), tmp_path / "out", steps.append)
    assert result.test >= 90
    assert (result.metric, result.examples, result.steps) == ("accuracy", 96, 36)
    assert (steps[0].done, steps[-1].done, steps[-1].total) == (1, 36, 36)
    assert steps[-1].loss < steps[0].loss
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    classify = pipeline("text-classification", model=str(tmp_path / "out"), device="cpu")
    assert classify("the dog is happy")[0]["label"] == "positive"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(base, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train.finetune(base, make_data(32), replace(QUICK, epochs=1, seed=seed), tmp_path / name)
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b
    assert a != c


def test_an_existing_folder_is_not_overwritten(base, tmp_path):
    with pytest.raises(EvaluationError, match="exists already"):
        train.finetune(base, make_data(), QUICK, tmp_path)


def test_slices_by_length_give_the_gradient_of_the_whole_padded_batch(base, monkeypatch):
    """The reference pads all 24 examples to one length and averages their loss, as a plain trainer does."""
    split = make_split(24, 5)
    tokens = tokenize(load_tokenizer(base), split, 16, Encoding.PAIR, "mood")
    labels = np.asarray(split.labels)
    model = train.load_classifier(base, ("no", "yes"), 0).eval()
    loss = torch.nn.functional.cross_entropy(
        model(**device.as_inputs(tokens, list(range(24)), "cpu")).logits, torch.from_numpy(labels)
    )
    loss.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    monkeypatch.setitem(device.TRAINING_BUDGET, "cpu", 30)  # at most three to seven examples a slice
    monkeypatch.setitem(device.OVERHEAD, "cpu", 1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with device.Cores("cpu") as cores:
        gradient = Gradient(model, tokens, torch.from_numpy(labels), QUICK, cores)
        assert float(gradient.add(list(range(24)), 0)) == pytest.approx(loss.item(), rel=1e-5)
    assert len(wanted) > 30
    for name, gradient in wanted.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_plain_loop_with_the_same_batches_ends_at_the_same_weights(base):
    """An author's trainer without slices, budget or schedule object, over the same order of examples."""
    data = make_data(40)
    recipe = replace(QUICK, epochs=2, learning_rate=1e-3, warmup=0.0, clip_norm=1e9)
    tokens = tokenize(load_tokenizer(base), data.train, 16, Encoding.PAIR, "mood")
    labels = np.asarray(data.train.labels)
    ours = train.load_classifier(base, data.labels, 0)
    for module in ours.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ours.config.attention_probs_dropout_prob = 0.0
    for layer in ours.base_model.encoder.layer:
        layer.attention.self.dropout_prob = 0.0
    theirs = copy.deepcopy(ours)
    assert train.fit(ours, tokens, labels, recipe) == 6
    order = np.random.default_rng([7, 0])
    decayed = [p for n, p in theirs.named_parameters() if not n.endswith("bias") and "LayerNorm" not in n]
    plain = [p for n, p in theirs.named_parameters() if n.endswith("bias") or "LayerNorm" in n]
    adam = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}])
    step = 0
    theirs.train()
    for _ in range(2):
        rows = order.permutation(40)
        for start in range(0, 40, 16):
            for group in adam.param_groups:
                group["lr"] = 1e-3 * (6 - step) / 6
            batch = rows[start : start + 16].tolist()
            loss = torch.nn.functional.cross_entropy(
                theirs(**device.as_inputs(tokens, batch, "cpu")).logits, torch.from_numpy(labels[batch])
            )
            adam.zero_grad()
            loss.backward()
            adam.step()
            step += 1
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if name.endswith("key.bias"):
            continue  # softmax does not see it: its gradient is rounding noise, which Adam makes large
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5, msg=name)


def test_one_core_and_three_train_to_the_same_model_and_find_the_same_features(base):
    """With dropout: its masks belong to slices, whatever thread has them."""
    data, before, found = make_data(40), torch.get_num_threads(), []
    tokens = tokenize(load_tokenizer(base), data.train, 16, Encoding.PAIR, "mood")
    recipe = replace(QUICK, epochs=2, learning_rate=1e-3)
    encoder = load_encoder(base)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            model = train.load_classifier(base, data.labels, 0)
            assert train.fit(model, tokens, np.asarray(data.train.labels), recipe) == 6
            features = compute_features(encoder, tokens, range(40))[Pooling.MEAN]
            found.append((dict(model.named_parameters()), torch.from_numpy(features), train.predict(model, tokens)))
    finally:
        torch.set_num_threads(before)
    (one, first, a), (three, second, b) = found
    assert len(one) > 30 and all(torch.equal(parameter, three[name]) for name, parameter in one.items())
    assert torch.equal(first, second) and np.array_equal(a, b)


def test_the_head_depends_on_the_seed_and_not_on_the_encoder(base, tmp_path):
    other = make_base(tmp_path / "other", seed=9)
    first, second = (train.load_classifier(f, ("a", "b", "c"), 4) for f in (base, other))
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    assert not torch.equal(first.bert.embeddings.word_embeddings.weight, second.bert.embeddings.word_embeddings.weight)
    assert not torch.equal(train.load_classifier(base, ("a", "b", "c"), 5).classifier.weight, first.classifier.weight)


def test_a_finetune_with_its_own_head_is_a_base_like_any_other(base, tmp_path):
    train.finetune(base, make_data(32), replace(QUICK, epochs=1), tmp_path / "two")
    model = train.load_classifier(tmp_path / "two", ("a", "b", "c"), 0)
    assert model.classifier.weight.shape == (3, 16)


@pytest.mark.parametrize("damage", ["missing", "in another shape"])
def test_an_incomplete_encoder_is_never_scored(base, tmp_path, damage):
    folder = tmp_path / "broken"
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(16, 31)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvaluationError, match=f"encoder.layer.1.output.dense.weight is {damage}"):
        train.load_classifier(folder, ("a", "b"), 0)


def test_a_pickle_is_not_opened(base, tmp_path):
    folder = tmp_path / "pickle"
    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(EvaluationError, match="not a classifier we can load"):
        train.load_classifier(folder, ("a", "b"), 0)


@pytest.mark.parametrize("mode", list(Mode))
def test_only_what_the_mode_says_learns(base, mode):
    """Counted by hand: 8 biases a layer (q, k, v, out, norm, up, down, norm), of the embedding norm and the pooler."""
    model = train.load_classifier(base, ("a", "b"), 0)
    train.freeze(model, mode)
    inside = [n for n, p in model.base_model.named_parameters() if p.requires_grad]
    expected = {Mode.HEAD: 0, Mode.BITFIT: 2 * 8 + 1 + 1, Mode.FULL: 2 * 16 + 5 + 2}[mode]
    assert len(inside) == expected
    assert model.classifier.weight.requires_grad


def test_early_stopping_counts_examples_and_is_not_asked_when_it_cannot_happen(base):
    data = make_data(32)
    tokens = tokenize(load_tokenizer(base), data.train, 16, Encoding.PAIR, "mood")
    labels = np.asarray(data.train.labels)
    asked: list[int] = []

    def flat() -> float:
        asked.append(1)
        return 0.5

    recipe = replace(QUICK, epochs=50, validate_every=32, patience=96)
    steps = train.fit(train.load_classifier(base, data.labels, 0), tokens, labels, recipe, flat)
    # 2 steps an epoch of 32: first asked (and best) after step 2, over 96 examples = 6 steps later.
    assert (steps, len(asked)) == (8, 4)
    asked.clear()
    assert train.fit(train.load_classifier(base, data.labels, 0), tokens, labels, replace(recipe, epochs=3), flat) == 6
    assert not asked


def test_training_leaves_the_callers_random_numbers_alone(base, tmp_path):
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    train.finetune(base, make_data(16), replace(QUICK, epochs=1), tmp_path / "out")
    assert torch.equal(torch.rand(3), wanted)


def test_batches_keep_the_budget_and_lose_nobody():
    lengths = np.random.default_rng(0).integers(1, 50, size=200)
    batches = list(by_length(lengths, range(200), budget=128, overhead=8))
    assert sorted(r for b in batches for r in b) == list(range(200))
    assert all(len(b) * lengths[b].max() <= 128 for b in batches)
    padded = sum(len(b) * lengths[b].max() for b in batches)
    assert padded < 1.1 * lengths.sum()


@pytest.mark.parametrize("overhead", [0, 3, 10, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_no_other_cut_costs_less(seed, overhead):
    """The reference tries all 2^8 ways to cut nine sorted examples."""
    lengths = np.random.default_rng(seed).integers(1, 40, size=9)
    ordered = sorted(lengths.tolist(), reverse=True)
    wanted = np.inf
    for ways in range(2**8):
        edges = [0, *(k + 1 for k in range(8) if ways >> k & 1), 9]
        parts = [ordered[a:b] for a, b in zip(edges, edges[1:], strict=False)]
        if all(len(p) * p[0] <= 60 or len(p) == 1 for p in parts):
            wanted = min(wanted, sum(len(p) * p[0] + overhead for p in parts))
    found = list(by_length(lengths, range(9), budget=60, overhead=overhead))
    assert sum(len(b) * int(lengths[b].max()) + overhead for b in found) == wanted


def test_model_recycling_encoding_joins_texts_and_names_the_dataset(base):
    tokenizer = load_tokenizer(base)
    pair = Split(("good",), ("bad",), (1,))
    joined = tokenize(tokenizer, pair, 16, Encoding.RECYCLING, "cat")
    assert tokenizer.convert_ids_to_tokens(joined.ids[0].tolist()) == [
        *("[CLS]", "good", "[UNK]", "[UNK]", "[UNK]", "bad", "[UNK]", "cat", "[SEP]")
    ]
    apart = tokenize(tokenizer, pair, 16, Encoding.PAIR, "cat")
    assert tokenizer.convert_ids_to_tokens(apart.ids[0].tolist()) == ["[CLS]", "good", "[SEP]", "bad", "[SEP]"]
    assert apart.types is not None and apart.types[0].tolist() == [0, 0, 0, 1, 1]
