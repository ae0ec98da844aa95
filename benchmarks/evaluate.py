"""Side by side in one run: our finetune and `transformers.Trainer`, our linear probing and a plain pipeline loop.

Equal settings: the same texts, recipe, head start, precision (float32) and threads; both are timed from text to test
predictions. CPU seconds are reported beside wall seconds, because they hold on a busy machine. Needs `accelerate`.

    python benchmarks/evaluate.py MODEL_FOLDER DATA_FOLDER --tasks newsgroups,fever --train 256 --test 256
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# The checkout instead of this folder: this file has the name of a library that we import.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from hubfusion.corpora import Data, load
from hubfusion.metrics import measure
from hubfusion.probe import compute_features, load_encoder, predict_by_head
from hubfusion.protocols import STANDARD, Encoding, Pooling, Precision, Training
from hubfusion.suite import Dataset, Metric
from hubfusion.tokens import load_tokenizer, tokenize
from hubfusion.train import fit, load_classifier, predict, quiet, target_array

Run = Callable[[Path, Data, Training], np.ndarray]


def finetune_ours(base: Path, data: Data, training: Training) -> np.ndarray:
    tokenizer = load_tokenizer(base)
    train, test = (tokenize(tokenizer, s, training.max_length, Encoding.PAIR, "") for s in (data.train, data.test))
    model = load_classifier(base, data.labels, training.seed)
    fit(model, train, target_array(data, data.train.labels), training)
    return predict(model, test, training.precision)


def finetune_trainer(base: Path, data: Data, training: Training) -> np.ndarray:
    import datasets
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    tokenizer = load_tokenizer(base)

    def encode(split: Any) -> Any:
        rows = datasets.Dataset.from_dict({"text": list(split.first), "label": list(split.labels)})
        return rows.map(
            lambda b: tokenizer(b["text"], truncation=True, max_length=training.max_length),
            batched=True,
            remove_columns=["text"],
        )

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
            logging_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            bf16=training.precision is Precision.BFLOAT16,
        )
        trainer = Trainer(
            model=load_classifier(base, data.labels, training.seed),
            args=arguments,
            train_dataset=encode(data.train),
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.train()
        logits = trainer.predict(encode(data.test)).predictions
    return np.asarray(logits).argmax(axis=1)


def probe_ours(base: Path, data: Data, training: Training) -> np.ndarray:
    tokenizer, encoder = load_tokenizer(base), load_encoder(base)
    features = []
    for split in (data.train, data.test):
        tokens = tokenize(tokenizer, split, training.max_length, Encoding.PAIR, "")
        features.append(compute_features(encoder, tokens, range(len(tokens)), training.precision)[Pooling.MEAN])
    return predict_by_head(STANDARD["linear-probing"], features[0], target_array(data, data.train.labels), features[1])


def probe_pipeline(base: Path, data: Data, training: Training) -> np.ndarray:
    """What a tutorial does: the feature-extraction pipeline over the texts, the mean of each, scikit-learn."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from transformers import pipeline

    with quiet():
        extract = pipeline("feature-extraction", model=str(base), device="cuda" if torch.cuda.is_available() else "cpu")
        settings = {"truncation": True, "max_length": training.max_length}
        features = [
            np.stack([np.asarray(extract(t, tokenize_kwargs=settings)[0]).mean(axis=0) for t in split.first])
            for split in (data.train, data.test)
        ]
    head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(features[0], data.train.labels)
    return np.asarray(head.predict(features[1]))


def clock(run: Run, base: Path, data: Data, training: Training) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = run(base, data, training)
    seconds, used = time.perf_counter() - wall, time.process_time() - cpu
    accuracy = 100 * measure(Metric.ACCURACY, found.tolist(), list(data.test.labels))
    return {"wall": seconds, "cpu": used, "accuracy": accuracy}


def parts(base: Path, data: Data, training: Training) -> dict[str, float]:
    """CPU seconds of one epoch by part: tokenise, forward, backward, optimizer; and of the probing head."""
    spent = dict.fromkeys(("tokenise", "forward", "backward", "optimizer", "head"), 0.0)

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*arguments: Any, **keywords: Any) -> Any:
            began = time.process_time()
            try:
                return call(*arguments, **keywords)
            finally:
                spent[part] += time.process_time() - began

        return inner

    tokens = timed("tokenise", tokenize)(load_tokenizer(base), data.train, training.max_length, Encoding.PAIR, "")
    model = load_classifier(base, data.labels, 0)
    model.forward = timed("forward", model.forward)
    backward, step = torch.Tensor.backward, torch.optim.AdamW.step
    torch.Tensor.backward, torch.optim.AdamW.step = timed("backward", backward), timed("optimizer", step)
    try:
        fit(model, tokens, target_array(data, data.train.labels), replace(training, epochs=1))
    finally:
        torch.Tensor.backward, torch.optim.AdamW.step = backward, step
    labels = target_array(data, data.train.labels)
    features = np.random.default_rng(0).normal(size=(len(labels), model.config.hidden_size)).astype(np.float32)
    timed("head", predict_by_head)(STANDARD["linear-probing"], features, labels, features)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", default="newsgroups,reuters_r8,sentiment_products,spam,election_tweets")
    parser.add_argument("--train", type=int, default=256)
    parser.add_argument("--test", type=int, default=256)
    parser.add_argument("--max-length", type=int, default=250)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--precision", choices=list(Precision), default=Precision.FLOAT32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip", default="", help="finetune or probe")
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    training = Training(
        learning_rate=given.learning_rate,
        batch_size=given.batch_size,
        epochs=given.epochs,
        max_length=given.max_length,
        precision=Precision(given.precision),
    )
    results: list[dict[str, Any]] = []
    is_warm = False
    for task in given.tasks.split(","):
        spec = Dataset(task, str((given.data / task).resolve()), validation="validation")
        data = load(replace(spec, train_cap=given.train, test_cap=given.test))
        for kind, ours, theirs in (
            ("finetune", finetune_ours, finetune_trainer),
            ("probe", probe_ours, probe_pipeline),
        ):
            if kind == given.skip:
                continue
            if not is_warm:  # imports and first calls belong to neither side
                small = replace(data, train=data.train.take(range(8)), test=data.test.take(range(8)))
                for run in (finetune_ours, finetune_trainer, probe_pipeline):
                    run(given.base, small, replace(training, epochs=1))
                is_warm = True
            a, b = clock(ours, given.base, data, training), clock(theirs, given.base, data, training)
            examples = (training.epochs if kind == "finetune" else 1) * len(data.train) + len(data.test)
            row = {"task": task, "kind": kind, "examples": examples, "ours": a, "theirs": b}
            results.append(row)
            print(
                f"{task:20}{kind:10} ours {examples / a['cpu']:7.1f} ex/cpu-s, theirs {examples / b['cpu']:7.1f}, "
                f"x{b['cpu'] / a['cpu']:.2f} (wall x{b['wall'] / a['wall']:.2f}), "
                f"accuracy {a['accuracy']:.1f} and {b['accuracy']:.1f}",
                flush=True,
            )
        if given.skip != "finetune":
            spent = parts(given.base, data, training)
            print(f"{task:20}cpu seconds " + ", ".join(f"{k} {v:.2f}" for k, v in spent.items()), flush=True)
    for kind in dict.fromkeys(r["kind"] for r in results):
        mine = [r for r in results if r["kind"] == kind]
        ratio = sum(r["theirs"]["cpu"] for r in mine) / sum(r["ours"]["cpu"] for r in mine)
        gap = np.mean([r["ours"]["accuracy"] - r["theirs"]["accuracy"] for r in mine])
        print(f"{kind}: {ratio:.2f} times the examples per second; accuracy {gap:+.2f} points on average")
    if given.out:
        given.out.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
