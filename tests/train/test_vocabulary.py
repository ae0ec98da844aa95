"""A narrow embedding trains to the same parameters as the whole one: rows no text uses are only decayed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hubfusion.data.loading import Split
from hubfusion.train import Encoding, Mode, Training
from hubfusion.train import finetune as train
from hubfusion.train.tokens import Tokens, load_tokenizer, tokenize
from hubfusion.train.vocabulary import UsedRows
from tests.trainable_models import WORDS, make_base

RECIPE = Training(learning_rate=1e-2, batch_size=4, epochs=3, max_length=16, weight_decay=0.5)
TEXTS = ("good cat", "bad cat", "the good", "bad the", "cat good the", "bad", "good", "the bad cat bad")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def tokens(base: Path) -> Tokens:
    split = Split(TEXTS, None, tuple(int("good" in t) for t in TEXTS))
    return tokenize(load_tokenizer(base), split, 16, Encoding.PAIR, "")


LABELS = np.asarray([int("good" in t) for t in TEXTS])
UNUSED = [i for i, w in enumerate(WORDS) if w not in {"[PAD]", "[CLS]", "[SEP]", "good", "bad", "cat", "the"}]


def still(base: Path) -> object:
    """A classifier without dropout, whose random numbers would differ between the two ways."""
    model = train.load_classifier(base, ("no", "yes"), 0)
    for layer in model.base_model.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    return model


def test_the_narrow_table_ends_where_the_whole_one_does(base, tokens, monkeypatch):
    narrow, whole = still(base), still(base)
    start = whole.bert.embeddings.word_embeddings.weight.detach().clone()
    assert train.fit(narrow, tokens, LABELS, RECIPE) == 6
    monkeypatch.setattr(UsedRows, "narrow", lambda self: None)
    train.fit(whole, tokens, LABELS, RECIPE)
    for (name, a), (other, b) in zip(narrow.named_parameters(), whole.named_parameters(), strict=True):
        assert name == other
        if not name.endswith("key.bias"):  # its gradient is rounding noise, which Adam makes large
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    # six steps, learning rate falling from 0.01 by a sixth each, decay 0.5, by hand:
    factor = float(np.prod([1 - 0.5 * 0.01 * (6 - k) / 6 for k in range(6)]))
    found = narrow.bert.embeddings.word_embeddings.weight
    torch.testing.assert_close(found[UNUSED], start[UNUSED] * factor, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(found[WORDS.index("good")], start[WORDS.index("good")] * factor, rtol=1e-3)


def test_only_the_used_rows_are_in_the_optimizer(base, tokens):
    model = still(base)
    embedding = UsedRows(model, tokens)
    embedding.narrow()
    assert embedding.is_narrow
    assert model.bert.embeddings.word_embeddings.weight.shape == (7, 16)
    sizes = [p.shape for g in train._optimizer(model, RECIPE).param_groups for p in g["params"]]
    assert (7, 16) in sizes and (18, 16) not in sizes
    ids = torch.from_numpy(tokens.ids[0])[None]
    model.eval()
    small = model(input_ids=ids).logits
    embedding.widen()
    assert torch.equal(model(input_ids=ids).logits, small)


def test_validation_in_the_middle_sees_words_that_no_training_text_has(base, tokens):
    model = still(base)
    other = torch.tensor([[1, WORDS.index("house"), 2]])

    def validate() -> float:
        model.eval()
        assert model.get_input_embeddings().weight.shape == (18, 16)
        return float(model(input_ids=other).logits.isfinite().all())

    recipe = replace(RECIPE, validate_every=4, patience=8)
    assert train.fit(model, tokens, LABELS, recipe, validate) == 3  # best at once, over two batches later


@pytest.mark.parametrize("mode", [Mode.HEAD, Mode.BITFIT])
def test_a_frozen_table_stays_as_it_is(base, tokens, mode):
    model = still(base)
    train.freeze(model, mode)
    embedding = UsedRows(model, tokens)
    embedding.narrow()
    assert not embedding.is_narrow


def test_a_table_that_another_module_shares_stays_as_it_is(base, tokens):
    model = still(base)
    model.decoder = torch.nn.Linear(16, 18, bias=False)
    model.decoder.weight = model.bert.embeddings.word_embeddings.weight
    embedding = UsedRows(model, tokens)
    embedding.narrow()
    assert not embedding.is_narrow
