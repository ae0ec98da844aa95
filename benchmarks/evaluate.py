"""Side by side in one run: our finetune and `transformers.Trainer`, our linear probing and a plain pipeline loop.

Equal settings: the same texts, recipe, head start, precision (float32 unless told) and threads; timed from text to test
predictions with tokenizer and model loaded, sides taking turns, medians of the repeats. Prints a markdown report.
Needs `accelerate`.

    python benchmarks/evaluate.py MODEL_FOLDER DATA_FOLDER [--tasks newsgroups,fever] [--device cuda --peak 989]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# The checkout instead of this folder: this file has the name of a library that we import.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import sklearn
import torch
import transformers

from benchmarks.sides import (
    Side,
    finetune_ours,
    finetune_trainer,
    probe_batched,
    probe_loop,
    probe_loop_bfloat16,
    probe_ours,
    probe_ours_bfloat16,
)
from hubfusion.data.loading import Data, load
from hubfusion.data.metrics import measure
from hubfusion.data.suite import Dataset, Metric
from hubfusion.evaluate.probing import predict_by_head
from hubfusion.evaluate.protocols import STANDARD
from hubfusion.train import Encoding, Precision, Training
from hubfusion.train.device import pick_device
from hubfusion.train.finetune import fit, load_classifier, target_array
from hubfusion.train.tokens import load_tokenizer, tokenize

KINDS: dict[str, tuple[Side, ...]] = {
    "finetune": (finetune_ours, finetune_trainer),
    "probe": (probe_ours, probe_loop, probe_batched, probe_ours_bfloat16, probe_loop_bfloat16),
}


@dataclass(slots=True)
class Timing:
    """Wall seconds of each repeat, and the accuracy in percent (the same in all of them)."""

    seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def clock(side: Side, base: Path, data: Data, training: Training, timing: Timing) -> None:
    run = side(base, data, training)
    _wait()
    began = time.perf_counter()
    found = run()
    _wait()
    timing.seconds.append(time.perf_counter() - began)
    timing.accuracy = 100 * measure(Metric.ACCURACY, found.tolist(), list(data.test.labels))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(kind: str, base: Path, tasks: list[Data], training: Training, repeats: int) -> None:
    """Print one table: examples a second of every side on every task, and ours against each other side."""
    sides = KINDS[kind]
    names = [s.__name__.replace("_", " ") for s in sides]
    print(f"\n## {kind}\n\n| task | examples | {' | '.join(f'{n}, ex/s (accuracy)' for n in names)} |")
    print("|---" * (len(sides) + 2) + "|", flush=True)
    medians = np.zeros((len(tasks), len(sides)))
    for row, data in enumerate(tasks):
        timings = [Timing() for _ in sides]
        for repeat in range(repeats):
            turn = list(zip(sides, timings, strict=True))
            for side, timing in turn if repeat % 2 == 0 else turn[::-1]:
                clock(side, base, data, training, timing)
        medians[row] = [t.median for t in timings]
        examples = (training.epochs if kind == "finetune" else 1) * len(data.train) + len(data.test)
        cells = [f"{examples / t.median:.1f} ({t.accuracy:.1f})" for t in timings]
        print(f"| {data.dataset.name} | {examples} | {' | '.join(cells)} |", flush=True)
    print()
    for a in (k for k, n in enumerate(names) if "ours" in n):
        for b in (k for k, n in enumerate(names) if "ours" not in n):
            if "bfloat16" in names[b] and "bfloat16" not in names[a]:
                continue
            note = "" if ("bfloat16" in names[a]) == ("bfloat16" in names[b]) else ", another precision"
            found = medians[:, b] / medians[:, a]
            mean = np.exp(np.log(found).mean())
            print(
                f"- {names[a]} against {names[b]}{note}: {mean:.2f} times the examples a second "
                f"(geometric mean over tasks; {found.min():.2f} to {found.max():.2f}; all tasks together "
                f"{medians[:, b].sum() / medians[:, a].sum():.2f})",
                flush=True,
            )


def parts(base: Path, data: Data, training: Training) -> dict[str, float]:
    """Seconds of one epoch by part: tokenise, forward and backward (of all cores together), optimizer; probing head."""
    spent = dict.fromkeys(("tokenise", "forward", "backward", "optimizer", "head"), 0.0)

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*arguments: Any, **keywords: Any) -> Any:
            _wait()
            began = time.perf_counter()
            try:
                return call(*arguments, **keywords)
            finally:
                _wait()
                spent[part] += time.perf_counter() - began

        return inner

    tokens = timed("tokenise", tokenize)(load_tokenizer(base), data.train, training.max_length, Encoding.PAIR, "")
    model = load_classifier(base, data.labels, 0).to(pick_device())
    kind = type(model)
    forward, backward, step = kind.forward, torch.Tensor.backward, torch.optim.AdamW.step
    kind.forward = timed("forward", forward)
    torch.Tensor.backward, torch.optim.AdamW.step = timed("backward", backward), timed("optimizer", step)
    try:
        fit(model, tokens, target_array(data, data.train.labels), replace(training, epochs=1))
    finally:
        kind.forward, torch.Tensor.backward, torch.optim.AdamW.step = forward, backward, step
    labels = target_array(data, data.train.labels)
    features = np.random.default_rng(0).normal(size=(len(labels), model.config.hidden_size)).astype(np.float32)
    timed("head", predict_by_head)(STANDARD["linear-probing"], features, labels, features)
    return spent


def share_of_peak(base: Path, data: Data, training: Training, peak: float) -> str:
    """Counted FLOPs of one epoch of our finetune over its time, against ``peak`` in TFLOP/s."""
    from torch.utils.flop_counter import FlopCounterMode

    tokens = tokenize(load_tokenizer(base), data.train, training.max_length, Encoding.PAIR, "")
    labels, once = target_array(data, data.train.labels), replace(training, epochs=1)

    def epoch() -> float:
        model = load_classifier(base, data.labels, 0).to(pick_device())
        _wait()
        began = time.perf_counter()
        fit(model, tokens, labels, once)
        _wait()
        return time.perf_counter() - began

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the counter sees the thread that it was entered in
    with FlopCounterMode(display=False) as counter:
        epoch()
    torch.set_num_threads(threads)
    rate = counter.get_total_flops() / min(epoch() for _ in range(3)) / 1e12
    return f"{rate:.2f} TFLOP/s, {100 * rate / peak:.1f} % of {peak:g}"


def train_seed(base: Path, data: Data, training: Training) -> float:
    """Seconds of one finetune in this process, loading and first calls left out."""
    small = replace(data, train=data.train.take(range(16)), test=data.test.take(range(8)))
    finetune_ours(base, small, training)()
    run = finetune_ours(base, data, training)
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def seeds_side_by_side(base: Path, data: Data, training: Training, threads: int) -> str:
    """Seconds of as many seeds as there are threads: one after another on all, or at once on one thread each."""
    runs = [replace(training, seed=s) for s in range(threads)]
    one_by_one = sum(train_seed(base, data, r) for r in runs)
    with ProcessPoolExecutor(threads, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        at_once = max(pool.map(train_seed, [base] * threads, [data] * threads, runs))
    return f"{threads} seeds: {one_by_one:.1f} s one by one, {at_once:.1f} s at once, x{one_by_one / at_once:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", default="election_tweets,sentiment_products,vitaminc,reuters_r8,newsgroups")
    parser.add_argument("--train", type=int, default=128)
    parser.add_argument("--test", type=int, default=128)
    parser.add_argument("--max-length", type=int, default=250)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--precision", choices=list(Precision), default=Precision.FLOAT32)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peak", type=float, default=None, help="the device's peak in TFLOP/s: report the share of it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip", choices=("finetune", "probe"), default=None)
    given = parser.parse_args()
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    torch.set_num_threads(given.threads)
    training = Training(
        learning_rate=given.learning_rate,
        batch_size=given.batch_size,
        epochs=given.epochs,
        max_length=given.max_length,
        precision=Precision(given.precision),
    )
    tasks = []
    for task in given.tasks.split(","):
        spec = Dataset(task, str((given.data / task).resolve()), validation="validation")
        tasks.append(load(replace(spec, train_cap=given.train, test_cap=given.test)))
    kinds = [k for k in KINDS if k != given.skip]
    small = replace(tasks[0], train=tasks[0].train.take(range(16)), test=tasks[0].test.take(range(8)))
    for side in (s for k in kinds for s in KINDS[k]):  # imports and first calls belong to no side
        side(given.base, small, replace(training, epochs=1))()
    where = torch.cuda.get_device_name() if given.device == "cuda" else f"{given.threads} threads, {platform.machine()}"
    print(f"# Evaluating: {where}, {given.precision}\n")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, ")
    print(f"scikit-learn {sklearn.__version__}; {given.base.name}, batch {training.batch_size}, at most")
    print(
        f"{training.max_length} tokens, median of {given.repeats}, load average {os.getloadavg()[0]:.1f} at the start, "
        f"OMP_WAIT_POLICY {os.environ.get('OMP_WAIT_POLICY', 'as it comes')}."
    )
    for kind in kinds:
        compare(kind, given.base, tasks, training, given.repeats)
    print("\n## Cost by part: seconds of one epoch, all cores together\n")
    print("| task | tokenise | forward | backward | optimizer | head |\n|---|---|---|---|---|---|")
    for data in tasks:
        spent = parts(given.base, data, training)
        print(f"| {data.dataset.name} | {' | '.join(f'{s:.2f}' for s in spent.values())} |", flush=True)
    if given.peak:
        for data in tasks:
            print(f"\n{data.dataset.name}: {share_of_peak(given.base, data, training, given.peak)}", flush=True)
    if given.device == "cpu" and given.threads > 1 and given.skip != "finetune":
        print(f"\n{seeds_side_by_side(given.base, tasks[0], training, given.threads)}")


if __name__ == "__main__":
    main()
