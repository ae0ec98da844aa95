"""Compare the scores of our finetune and of `transformers.Trainer`, paired over real tasks and seeds, as markdown.

Same texts, recipe, encoder and head; what differs is the order of the examples and the dropout masks. A difference
that its own interval does not tell from 0 is seed noise. A task where both sides give the largest class to every text
would show nothing: hence the column. Needs `accelerate`.

    python benchmarks/parity.py MODEL_FOLDER DATA_FOLDER --layers 2 --seeds 4
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

# The checkout instead of this folder, where a file has the name of a library that we import.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from scipy import stats

from benchmarks.sides import Side, cut_layers, finetune_ours, finetune_trainer
from hubfusion.data.loading import Data, load
from hubfusion.data.metrics import measure
from hubfusion.data.suite import Dataset, Metric
from hubfusion.train import Training


def score(side: Side, base: Path, data: Data, training: Training) -> float:
    """Accuracy on the test set in percent."""
    return 100 * measure(Metric.ACCURACY, side(base, data, training)().tolist(), list(data.test.labels))


def half_width(values: np.ndarray) -> float:
    """Half of the 95 % interval of a mean, by Student's t."""
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", default="election_tweets,intent,reuters_r8,reuters_r52,spam,sentiment_hotels")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--train", type=int, default=300)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    recipe = Training(
        learning_rate=given.learning_rate,
        batch_size=given.batch_size,
        epochs=given.epochs,
        max_length=given.max_length,
    )
    print(
        f"{given.layers} layers, {given.train} training examples, {recipe.epochs} epochs, seeds 0 to {given.seeds - 1}"
    )
    print("\n| task | test examples | largest class | ours | Trainer | ours − Trainer, 95 % interval |")
    print("|---" * 6 + "|")
    means = []
    with tempfile.TemporaryDirectory() as folder:
        base = cut_layers(given.base, given.layers, Path(folder) / "base")
        for task in given.tasks.split(","):
            spec = Dataset(task, str((given.data / task).resolve()), validation="validation")
            data = load(replace(spec, train_cap=given.train, test_cap=given.test))
            ours, theirs = (
                np.array([score(side, base, data, replace(recipe, seed=s)) for s in range(given.seeds)])
                for side in (finetune_ours, finetune_trainer)
            )
            gap = ours - theirs
            means.append(gap.mean())
            largest = 100 * np.bincount(data.test.labels).max() / len(data.test)
            print(
                f"| {task} | {len(data.test)} | {largest:.1f} | {ours.mean():.1f} ± {stats.sem(ours):.1f} "
                f"| {theirs.mean():.1f} ± {stats.sem(theirs):.1f} | {gap.mean():+.1f} ± {half_width(gap):.1f} |",
                flush=True,
            )
    print(f"| mean of {len(means)} tasks | | | | | {np.mean(means):+.2f} ± {half_width(np.array(means)):.2f} |")


if __name__ == "__main__":
    main()
