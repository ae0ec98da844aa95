"""Two-layer models and small datasets made on the spot, for the tests of training and evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from hubfusion.data.loading import Data, Split
from hubfusion.data.suite import Dataset

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"good bad fine poor happy sad cat dog tree house the a is was".split()]


def make_base(folder: Path, seed: int = 0, rare: int = 0, width: int = 16) -> Path:
    """A BERT of 2 layers with a word-level tokenizer of 18 words and ``rare`` that no text contains."""
    words = [*WORDS, *(f"rare{i}" for i in range(rare))]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=32,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
    )
    torch.set_num_threads(1)  # such small products only wait for each other on more
    torch.manual_seed(seed)
    BertModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_max_length=32,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    return folder


def make_split(n: int, seed: int) -> Split:
    """Texts of 2 to 9 words with one word that decides the label: good, fine, happy are 1; bad, poor, sad are 0."""
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    for _ in range(n):
        label = int(rng.integers(2))
        word = rng.choice(["bad", "poor", "sad"] if label == 0 else ["good", "fine", "happy"])
        rest = rng.choice(WORDS[10:], size=rng.integers(1, 9)).tolist()
        rest.insert(int(rng.integers(len(rest) + 1)), str(word))
        texts.append(" ".join(rest))
        labels.append(label)
    return Split(tuple(texts), None, tuple(labels))


def make_data(train: int = 96, test: int = 40, name: str = "mood") -> Data:
    """A two-class dataset whose label one word decides."""
    dataset = Dataset(name, f"org/{name}", validation="validation")
    return Data(
        dataset, "0" * 40, ("negative", "positive"), make_split(train, 1), make_split(20, 2), make_split(test, 3)
    )


def write_task(folder: Path, data: Data) -> Dataset:
    """The dataset as JSON lines files in a folder, and the `Dataset` that reads them."""
    folder.mkdir(parents=True)
    for role in ("train", "validation", "test"):
        split: Split = getattr(data, role)
        rows = [{"text": t, "label": y} for t, y in zip(split.first, split.labels, strict=True)]
        (folder / f"{role}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return Dataset(data.dataset.name, str(folder), validation="validation")
