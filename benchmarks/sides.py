"""The two sides of `benchmarks/evaluate.py` and `benchmarks/parity.py`: ours and the obvious way, from text to answers.

Each takes a model folder, a dataset and a recipe, loads the tokenizer and the model, and returns a call without
arguments that goes from the texts to the predicted class ids of the test texts: what is timed is that call.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hubfusion.data.loading import Data, Split
from hubfusion.evaluate.probing import compute_features, load_encoder, predict_by_head
from hubfusion.evaluate.protocols import STANDARD, Pooling
from hubfusion.train import Encoding, Precision, Training
from hubfusion.train.device import pick_device
from hubfusion.train.finetune import fit, load_classifier, predict, quiet, target_array
from hubfusion.train.tokens import load_tokenizer, tokenize

Answer = Callable[[], np.ndarray]
Side = Callable[[Path, Data, Training], Answer]


def finetune_ours(base: Path, data: Data, training: Training) -> Answer:
    tokenizer = load_tokenizer(base)
    model = load_classifier(base, data.labels, training.seed).to(pick_device())

    def run() -> np.ndarray:
        train, test = (tokenize(tokenizer, s, training.max_length, Encoding.PAIR, "") for s in (data.train, data.test))
        fit(model, train, target_array(data, data.train.labels), training)
        return predict(model, test, training.precision)

    return run


def finetune_trainer(base: Path, data: Data, training: Training) -> Answer:
    import datasets
    from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

    datasets.disable_progress_bars()

    tokenizer, model = load_tokenizer(base), load_classifier(base, data.labels, training.seed)

    def encode(split: Any) -> Any:
        rows = datasets.Dataset.from_dict({"text": list(split.first), "label": list(split.labels)})
        return rows.map(
            lambda b: tokenizer(b["text"], truncation=True, max_length=training.max_length),
            batched=True,
            remove_columns=["text"],
        )

    def run() -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder, quiet():
            arguments = TrainingArguments(
                output_dir=folder,
                learning_rate=training.learning_rate,
                per_device_train_batch_size=training.batch_size,
                per_device_eval_batch_size=training.batch_size,
                num_train_epochs=training.epochs,
                weight_decay=training.weight_decay,
                lr_scheduler_type="linear",
                warmup_steps=training.warmup,
                max_grad_norm=training.clip_norm,
                seed=training.seed,
                data_seed=training.seed,
                report_to=[],
                disable_tqdm=True,
                save_strategy="no",
                eval_strategy="no",
                logging_strategy="no",
                use_cpu=not torch.cuda.is_available(),
                bf16=training.precision is Precision.BFLOAT16,
            )
            trainer = Trainer(
                model=model,
                args=arguments,
                train_dataset=encode(data.train),
                processing_class=tokenizer,
                data_collator=DataCollatorWithPadding(tokenizer),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            logits = trainer.predict(encode(data.test)).predictions
        return np.asarray(logits).argmax(axis=1)

    return run


def probe_ours(base: Path, data: Data, training: Training) -> Answer:
    tokenizer, encoder = load_tokenizer(base), load_encoder(base)

    def run() -> np.ndarray:
        features = []
        for split in (data.train, data.test):
            tokens = tokenize(tokenizer, split, training.max_length, Encoding.PAIR, "")
            features.append(compute_features(encoder, tokens, range(len(tokens)), training.precision)[Pooling.MEAN])
        labels = target_array(data, data.train.labels)
        return predict_by_head(STANDARD["linear-probing"], features[0], labels, features[1])

    return run


def probe_ours_bfloat16(base: Path, data: Data, training: Training) -> Answer:
    """Ours with the encoder's forward pass in bfloat16: another setting than the loop's, told apart in the report."""
    return probe_ours(base, data, replace(training, precision=Precision.BFLOAT16))


def probe_loop(base: Path, data: Data, training: Training, batch_size: int = 1) -> Answer:
    """What a tutorial does: the feature-extraction pipeline over the texts in file order, then scikit-learn.

    ``batch_size`` 1 is the pipeline's own default: no padding at all. Above 1 its texts are padded to the longest of
    each batch; the mean is over real tokens in both.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from transformers import pipeline

    dtype = torch.bfloat16 if training.precision is Precision.BFLOAT16 else torch.float32
    with quiet():
        extract = pipeline("feature-extraction", model=str(base), device=pick_device(), dtype=dtype)
    settings = {"truncation": True, "max_length": training.max_length}

    def features(split: Split) -> np.ndarray:
        texts = list(split.first)
        found = extract(texts, tokenize_kwargs=settings, batch_size=batch_size, return_tensors=True)
        counts = [f.shape[1] for f in found]
        if batch_size > 1:
            counts = [len(ids) for ids in extract.tokenizer(texts, **settings)["input_ids"]]
        return np.stack([f[0, :n].float().mean(dim=0).cpu().numpy() for f, n in zip(found, counts, strict=True)])

    def run() -> np.ndarray:
        with quiet():
            train, test = features(data.train), features(data.test)
        head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(train, data.train.labels)
        return np.asarray(head.predict(test))

    return run


def probe_batched(base: Path, data: Data, training: Training) -> Answer:
    """The loop with the recipe's batch size."""
    return probe_loop(base, data, training, training.batch_size)


def probe_loop_bfloat16(base: Path, data: Data, training: Training) -> Answer:
    """The loop with the whole model in bfloat16, as its ``dtype`` sets it."""
    return probe_loop(base, data, replace(training, precision=Precision.BFLOAT16))


def cut_layers(base: Path, layers: int, folder: Path) -> Path:
    """A model folder with the first ``layers`` layers of ``base``, for comparisons that need many trainings."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    return folder
