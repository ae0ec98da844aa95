"""Statistics of Model Recycling's published tables, computed anew, with plots: what a single average is worth.

    python benchmarks/leaderboard.py FOLDER_OF_CSVS docs/images

Reads `models_tested.csv`, `baseline_roberta_base_mean_std.csv`, `coldfusion_iterations_*.csv` as published by
IBM/model-recycling (Apache-2.0). Plots need `matplotlib`; without it the numbers are printed alone.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from scipy.stats import pearsonr, spearmanr

from hubfusion.data.suite import load_suite
from hubfusion.evaluate.audit import FindingKind, Table, audit, read_table

TINY = ("cb", "copa", "rte")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


WRONG = (FindingKind.SHIFTED, FindingKind.COPIED, FindingKind.OFF_GRID)


def audit_published(folder: Path) -> tuple[Table, set[int]]:
    """The published table, and its rows that hold values of other columns."""
    datasets = load_suite("recycling36").datasets
    sizes = {d.name: d.test_size for d in datasets if d.test_size and d.metric == "accuracy"}
    table = read_table(folder / "models_tested.csv", [d.name for d in datasets])
    findings = audit(table, sizes)
    tested = int((~np.isnan(table.values).any(axis=1)).sum())
    for kind in FindingKind:
        rows = {f.row for f in findings if f.kind is kind}
        print(f"{kind}: {len(rows)} rows of {len(table.models)} ({tested} fully tested)")
    ends = {f.row for f in findings if f.kind is FindingKind.SHIFTED and f.datasets == ("esnli", "anli")}
    fits = {f.row for f in findings if f.row in ends and f.realignment is not None}
    wrong = {f.row for f in findings if f.kind in WRONG}
    print(
        f"shifted up to anli: {len(ends)} rows, of which {len(fits)} fit after moving; any of the three: {len(wrong)}"
    )
    return table, wrong


def probing_against_gain(folder: Path, table: Table, wrong: set[int], images: Path | None) -> None:
    rows = read(folder / "models_tested.csv")
    base = np.mean([float(r["mean"]) for r in read(folder / "baseline_roberta_base_mean_std.csv")])
    full = ~np.isnan(table.values).any(axis=1)
    chosen = [
        i
        for i, row in enumerate(rows)
        if row["base_model"] == "roberta-base" and full[i] and i not in wrong and row["mnli_lp"]
    ]
    cold = np.array(["cold-fusion" in rows[i]["model_name"].casefold() for i in chosen])
    probe = 100 * np.array([float(rows[i]["mnli_lp"]) for i in chosen])
    gain = table.values[chosen].mean(axis=1) - base
    sound = gain > -5
    for name, keep in (
        ("all", np.ones(len(chosen), bool)),
        ("without ColD Fusion's", ~cold),
        ("and without one that collapsed", ~cold & sound),
    ):
        pearson, spearman = pearsonr(probe[keep], gain[keep])[0], spearmanr(probe[keep], gain[keep])[0]
        better = 100 * float((gain[keep] > 0).mean())
        print(
            f"{name}: n={keep.sum()}, Pearson {pearson:.2f}, Spearman {spearman:.2f}, better than base {better:.0f} %"
        )
    if images:
        draw_probing(probe, gain, cold, images)


def winners_curse(folder: Path, images: Path | None) -> None:
    rows = read(folder / "coldfusion_iterations_bert_uncased.csv")
    itr = np.array([int(r["itr"]) for r in rows])
    average = np.array([float(r["avg"]) for r in rows])
    plateau = average[itr >= 14]
    best = int(itr[average.argmax()])
    print(
        f"BERT: best of {len(rows)} is iteration {best} with {average.max():.2f}; "
        f"plateau (from 14) {plateau.mean():.2f} with sd {plateau.std(ddof=1):.2f}; "
        f"curse {average.max() - plateau.mean():+.2f}"
    )
    draws = np.random.default_rng(0).normal(0, plateau.std(ddof=1), size=(20_000, len(plateau))).max(axis=1)
    print(f"expected curse of the best of {len(plateau)} equal models with that sd: {draws.mean():+.2f}")
    if images:
        draw_curve(itr, average, plateau.mean(), images)


def tiny_datasets(folder: Path) -> None:
    rows = {
        r["key"]: float(r["cold"]) - float(r["finetune"])
        for r in read(folder / "coldfusion_paper_table1_realigned.csv")
    }
    gains = np.array(list(rows.values()))
    few = sum(rows[d] for d in TINY) / len(rows)
    rest = np.mean([g for d, g in rows.items() if d not in TINY])
    print(
        f"paper: mean gain {gains.mean():.2f} of {len(rows)}, of which {few:.2f} from {', '.join(TINY)}; "
        f"without them {rest:.2f}; median {np.median(gains):.2f}"
    )


def draw_probing(probe: np.ndarray, gain: np.ndarray, cold: np.ndarray, images: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.scatter(probe[~cold], gain[~cold], s=9, label="other finetunes")
    axes.scatter(probe[cold], gain[cold], s=9, label="ColD Fusion iterations")
    axes.set(xlabel="linear probing on MNLI, %", ylabel="average gain over roberta-base, points")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(images / "probing.svg")


def draw_curve(itr: np.ndarray, average: np.ndarray, plateau: float, images: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot(itr, average, marker="o", markersize=3)
    axes.axhline(plateau, color="gray", linewidth=0.8, label="mean from 14 on")
    axes.scatter([itr[average.argmax()]], [average.max()], color="red", zorder=3, label="the published best")
    axes.set(xlabel="iteration", ylabel="average of 36 datasets, %")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(images / "curse.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("images", type=Path, nargs="?")
    given = parser.parse_args()
    if given.images:
        given.images.mkdir(parents=True, exist_ok=True)
    table, wrong = audit_published(given.folder)
    tiny_datasets(given.folder)
    probing_against_gain(given.folder, table, wrong, given.images)
    winners_curse(given.folder, given.images)


if __name__ == "__main__":
    main()
