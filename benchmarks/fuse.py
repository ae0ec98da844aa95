"""Fuse RoBERTa-base-shaped checkpoints and compare, side by side, with the machine's floor and with other tools.

    python benchmarks/fuse.py --folder /tmp/fuse-bench --runs 5 --markdown docs/fuse-benchmark.md
        [--mergekit /path/to/its/python] [--methods average,ties,…] [--inputs 2,4,8,16] [--keep]

Every figure is of a whole command. Wall and CPU seconds are medians of the runs; contenders take turns within each
round, in another order each time, so that noise hits all of them alike. Peak anonymous and file-backed memory is summed
over the processes of the command and sampled from /proc every 10 ms in a round before (mergekit, which takes minutes:
every 100 ms while timed).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hubfusion.checkpoint import Parameter, write_checkpoint  # noqa: E402

TORCH_LOOP = """
import sys, torch
from safetensors import safe_open
from safetensors.torch import save_file
out, *models = sys.argv[1:]
files = [safe_open(m + "/model.safetensors", "pt") for m in models]
fused = {}
for name in files[0].keys():
    total = files[0].get_tensor(name)
    for file in files[1:]:
        total += file.get_tensor(name)
    fused[name] = total / len(files)
save_file(fused, out + "/model.safetensors", {"format": "pt"})
"""
# hubfusion's method and options, and mergekit's method and parameters for the nearest thing it has.
DENSE = {"density": 0.2}
CONTESTS: Mapping[str, tuple[Sequence[str], str, Mapping[str, float], float]] = {
    # method: (our options, mergekit's name, its parameters, target ratio hubfusion / mergekit)
    # sha256 of the output and norms of the deltas are left out, as nobody else computes them; a row of its own shows
    # what they cost
    "average": ((), "linear", {}, 1 / 5),
    "ties": (("--density", "0.2"), "ties", DENSE, 1 / 25),
    "della": (("--density", "0.5"), "della", {"density": 0.5, "epsilon": 0.05}, 1 / 15),
    "sce": (("--density", "0.1"), "sce", {"select_topk": 0.1}, 1 / 10),
    "dare_ties": (("--density", "0.5"), "dare_ties", {"density": 0.5}, 1 / 6),
    "model_stock": ((), "model_stock", {}, 1 / 4),
    "task_arithmetic": ((), "task_arithmetic", {}, 1 / 4),
    "karcher": ((), "karcher", {}, 1 / 4),
}
MEMORY_TARGETS = {"average": 64, "ties": 100}


@dataclass(frozen=True)
class Run:
    """One whole process."""

    wall: float
    cpu: float
    anonymous: float
    file: float


def shapes(hidden: int, layers: int, words: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of RobertaForMaskedLM: 202 tensors and 124.7M entries at 768 × 12 × 50265.

    With its head, since mergekit refuses a bare encoder.
    """
    wide = hidden * 4
    yield "roberta.embeddings.word_embeddings.weight", (words, hidden)
    yield "roberta.embeddings.position_embeddings.weight", (514, hidden)
    yield "roberta.embeddings.token_type_embeddings.weight", (1, hidden)
    for part in ("weight", "bias"):
        yield f"roberta.embeddings.LayerNorm.{part}", (hidden,)
        yield f"lm_head.layer_norm.{part}", (hidden,)
    for layer in range(layers):
        at = f"roberta.encoder.layer.{layer}."
        for name, shape in (
            ("attention.self.query", (hidden, hidden)), ("attention.self.key", (hidden, hidden)),
            ("attention.self.value", (hidden, hidden)), ("attention.output.dense", (hidden, hidden)),
            ("intermediate.dense", (wide, hidden)), ("output.dense", (hidden, wide)),
        ):  # fmt: skip
            yield f"{at}{name}.weight", shape
            yield f"{at}{name}.bias", shape[:1]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            yield f"{at}{name}.weight", (hidden,)
            yield f"{at}{name}.bias", (hidden,)
    yield "lm_head.dense.weight", (hidden, hidden)
    yield "lm_head.dense.bias", (hidden,)
    yield "lm_head.bias", (words,)


def build(folder: Path, count: int, size: tuple[int, int, int]) -> list[Path]:
    """Write a base and ``count`` finetunes with deltas of a finetune's size; returns their folders, the base first."""
    specs = [Parameter(n, "F32", s, folder) for n, s in shapes(*size)]
    hidden, layers, words = size
    config = {
        "architectures": ["RobertaForMaskedLM"], "model_type": "roberta", "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 64, "intermediate_size": hidden * 4,
        "vocab_size": words, "max_position_embeddings": 514, "type_vocab_size": 1, "torch_dtype": "float32",
    }  # fmt: skip
    models = []
    for number in range(count + 1):
        place = folder / f"model{number}"
        models.append(place)
        if (place / "model.safetensors").exists():
            continue
        with write_checkpoint(place, specs, digest=False) as writing:
            for position, spec in enumerate(specs):
                values = np.random.default_rng([0, position]).standard_normal(spec.entries, np.float32) * 0.04
                if number:
                    delta = np.random.default_rng([number, position]).standard_normal(spec.entries, np.float32)
                    values += delta * np.float32(3e-4 * (1 + number % 4))
                writing.write(spec.name, 0, values.astype(np.float32))
        (place / "config.json").write_text(json.dumps(config))
        # mergekit wants a tokenizer; the smallest that it accepts
        (place / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        (place / "tokenizer.json").write_text(TOKENIZER)
    return models


TOKENIZER = json.dumps({
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1}, "unk_token": "<unk>"},
})  # fmt: skip


def measure(command: Sequence[str], cwd: Path, every: float | None = None) -> Run:
    """Run a command to its end and account for it and its children; sample its memory ``every`` so many seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # installed packages are compiled once, not at each start
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    peak = {"RssAnon:": 0, "RssFile:": 0}

    def watch(every: float) -> None:
        while process.poll() is None:
            for key, value in held(process.pid).items():
                peak[key] = max(peak[key], value)
            time.sleep(every)

    if every:
        threading.Thread(target=watch, args=(every,)).start()
    errors = process.communicate()[1]
    wall = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))[:200]} failed:\n{errors[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(wall, cpu, peak["RssAnon:"] / 1024, peak["RssFile:"] / 1024)


def held(pid: int) -> dict[str, int]:
    """KiB in memory of a process and its children; what a fork shares with its parent is counted in both."""
    total = {"RssAnon:": 0, "RssFile:": 0}
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in (pid, *children):
            for line in Path(f"/proc/{each}/status").read_text().splitlines():
                key, _, value = line.partition("\t")
                if key in total:
                    total[key] += int(value.split()[0])
    except (OSError, ValueError, IndexError):
        pass  # it has just ended
    return total


def contenders(
    folder: Path, models: Sequence[Path], methods: Sequence[str], mergekit: Path | None
) -> Iterator[tuple[str, list[str]]]:
    """Name and command of everything that takes part, for one number of inputs."""
    base, *inputs = models
    out = folder / "out"
    files = " ".join(str(m / "model.safetensors") for m in inputs)
    yield "floor", ["sh", "-c", f"cat {files} > /dev/null; cat {inputs[0]}/model.safetensors > {out}/floor"]
    yield "torch loop", [sys.executable, "-c", TORCH_LOOP, str(out), *map(str, inputs)]
    command = [sys.executable, "-m", "hubfusion", "fuse", "--out", str(out)]
    for method in methods:
        options, theirs, parameters, _ = CONTESTS[method]
        ours = [*command, "--method", method, *options, str(base), *map(str, inputs)]
        yield f"hubfusion {method}", [*ours, "--no-digest", "--no-norms"]
        if method == "average":
            yield "hubfusion average, with norms and sha256", ours
        if mergekit is not None:
            recipe = folder / f"{theirs}-{len(inputs)}.yml"
            text = {"merge_method": theirs, "dtype": "float32", "models": [
                {"model": str(m), "parameters": {"weight": 1.0, **parameters}} for m in inputs
            ]}  # fmt: skip
            if theirs not in ("linear", "karcher"):
                text["base_model"] = str(base)
            if theirs == "sce":
                text["parameters"] = dict(parameters)
                text["models"] = [{"model": str(m)} for m in inputs]
            recipe.write_text(json.dumps(text))
            yield f"mergekit {theirs}", [str(mergekit), "-m", MERGEKIT_MAIN, str(recipe), str(out)]


MERGEKIT_MAIN = "mergekit.scripts.run_yaml"


def bandwidth() -> float:
    """GB/s of copying memory on one core: what moving bytes costs here."""
    source, target = np.ones(1 << 25, np.uint8), np.empty(1 << 25, np.uint8)
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        target[:] = source
        best = max(best, source.size / (time.perf_counter() - start) / 1e9)
    return best


def compare(folder: Path, arguments: argparse.Namespace, models: Sequence[Path]) -> dict[int, dict[str, list[Run]]]:
    """All rounds for each number of inputs; contenders take turns."""
    results: dict[int, dict[str, list[Run]]] = {}
    for count in arguments.inputs:
        mergekit = arguments.mergekit if count == arguments.against else None
        commands = list(contenders(folder, models[: count + 1], arguments.methods, mergekit))
        table: dict[str, list[Run]] = {name: [] for name, _ in commands}
        memory: dict[str, dict[str, float]] = {}
        for number in range(arguments.runs + 1):
            # In another order each time: what ran just before leaves the machine warm, or its memory dirty.
            for name, command in random.Random(number).sample(commands, len(commands)):
                slow = name.startswith("mergekit")
                if slow and not 0 < number <= arguments.mergekit_runs:
                    continue
                shutil.rmtree(folder / "out", ignore_errors=True)
                (folder / "out").mkdir()
                # The first round warms the page cache and looks at memory, which takes time; the others are timed.
                run = measure(command, folder, 0.1 if slow else None if number else 0.01)
                if number:
                    table[name].append(run if slow else replace(run, **memory[name]))
                else:
                    memory[name] = {"anonymous": run.anonymous, "file": run.file}
                print(f"N={count} round {number} {name}: {run.wall:.2f} s", file=sys.stderr, flush=True)
        results[count] = table
    return results


def middle(runs: Sequence[Run], field: str) -> float:
    """Median of one figure."""
    return statistics.median(getattr(run, field) for run in runs)


def report(results: Mapping[int, Mapping[str, Sequence[Run]]], arguments: argparse.Namespace, gigabyte: float) -> str:
    """Return the markdown: a table for each number of inputs, the targets, the fit in N and a plan for 7B."""
    lines = [
        "# Fuse benchmark", "",
        f"Whole processes, medians of {arguments.runs} rounds (mergekit: {arguments.mergekit_runs}) in "
        "which the contenders "
        "take turns; page cache warm; "
        f"{os.cpu_count()} cores; a file has {gigabyte:.3f} GB; one core copies memory at {bandwidth():.1f} GB/s. "
        "No GPU figures: none were measured.", "",
    ]  # fmt: skip
    for count, table in results.items():
        floor = middle(table["floor"], "wall")
        lines += [f"## {count} finetunes", "", "| what | wall s | CPU s | anonymous MiB | file MiB | × floor | GB/s |"]
        lines += ["|---|---:|---:|---:|---:|---:|---:|"]
        for name, runs in table.items():
            if runs:
                wall = middle(runs, "wall")
                figures = [f"{middle(runs, f):.0f}" for f in ("anonymous", "file")]
                moved = gigabyte * (count + (name.startswith("hubfusion")) + 1)
                lines.append(
                    f"| {name} | {wall:.2f} | {middle(runs, 'cpu'):.2f} | {' | '.join(figures)} | {wall / floor:.2f} | "
                    f"{moved / wall:.1f} |"
                )
        lines.append("")
    lines += [
        "## Targets",
        "",
        "| target | measured | allowed | |",
        "|---|---:|---:|---|",
        *targets(results, arguments),
    ]
    return "\n".join([*lines, "", *scaling(results, gigabyte), "", NOTES])


NOTES = """## Reading these figures

The floor is `cat` of the finetunes to nowhere and of one of them to a new file: one core, no arithmetic. A fuse reads
the base as well, subtracts it from every finetune (so that sums lose no digits), checks that everything is finite,
and starts an interpreter.

"average" and all other rows leave out the sha256 of the output and the norms of the deltas (`--no-digest
--no-norms`), which mergekit does not compute; the row that has both is what the command does by default.
"""


def targets(results: Mapping[int, Mapping[str, Sequence[Run]]], arguments: argparse.Namespace) -> Iterator[str]:
    """Rows that compare measured ratios with what was asked for."""

    def row(what: str, value: float, allowed: float) -> str:
        return f"| {what} | {value:.3g} | {allowed:.3g} | {'met' if value <= allowed else 'MISSED'} |"

    table = results.get(arguments.against, {})
    if "hubfusion average" in table:
        yield row("average / floor", middle(table["hubfusion average"], "wall") / middle(table["floor"], "wall"), 1.0)
    for method in arguments.methods:
        theirs, allowed = f"mergekit {CONTESTS[method][1]}", CONTESTS[method][3]
        if table.get(theirs):
            ratio = middle(table[f"hubfusion {method}"], "wall") / middle(table[theirs], "wall")
            yield row(f"{method} / {theirs}", ratio, allowed)
    for count, contest in results.items():
        for method, mebibytes in MEMORY_TARGETS.items():
            if contest.get(f"hubfusion {method}"):
                yield row(f"{method}, N = {count}: anonymous MiB", middle(contest[f"hubfusion {method}"], "anonymous"),
                          mebibytes)  # fmt: skip


def scaling(results: Mapping[int, Mapping[str, Sequence[Run]]], gigabyte: float) -> Iterator[str]:
    """Fit wall time = start + cost · N for each method, and what it says about a 7B model in bfloat16."""
    if len(results) < 2:
        return
    yield "## Cost in N"
    yield ""
    yield "| method | start s | s for each finetune | largest miss of the line | a 7B model in bfloat16, N = 8 |"
    yield "|---|---:|---:|---:|---:|"
    counts = np.array(list(results), float)
    names = [n for n in next(iter(results.values())) if n.startswith(("hubfusion", "floor"))]
    for name in names:
        walls = np.array([middle(results[n][name], "wall") for n in results])
        cost, start = np.polyfit(counts, walls, 1)
        miss = float(np.abs(walls - start - cost * counts).max() / walls.max())
        # a parameter costs what it costs here; reading half the bytes only helps
        planned = (start + 8 * cost) * 7e9 / (gigabyte * 1e9 / 4)
        yield f"| {name} | {start:.2f} | {cost:.3f} | {miss:.0%} | {planned / 60:.1f} min |"


def main() -> None:
    """Build the models, run the rounds, print the report, clean up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the models are built (0.5 GB each)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--mergekit-runs", type=int, default=5, help="mergekit's share of the rounds")
    parser.add_argument("--inputs", type=lambda t: [int(n) for n in t.split(",")], default=[2, 4, 8, 16])
    parser.add_argument("--against", type=int, default=8, help="number of inputs at which mergekit takes part")
    parser.add_argument("--methods", type=lambda t: t.split(","), default=list(CONTESTS))
    parser.add_argument("--mergekit", type=Path, help="interpreter of an environment with mergekit in it")
    parser.add_argument("--size", type=lambda t: tuple(int(n) for n in t.split("x")), default=(768, 12, 50265),
                        help="hidden x layers x words; 2048x16x50265 has about 1B entries")  # fmt: skip
    parser.add_argument("--markdown", type=Path, help="write the report here as well")
    parser.add_argument("--keep", action="store_true", help="keep the models for another run")
    arguments = parser.parse_args()
    if unknown := set(arguments.methods) - set(CONTESTS):
        parser.error(f"methods are {', '.join(CONTESTS)}; not {', '.join(unknown)}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    models = build(arguments.folder, max(arguments.inputs), arguments.size)
    try:
        results = compare(arguments.folder, arguments, models)
        gigabyte = (models[0] / "model.safetensors").stat().st_size / 1e9
        text = report(results, arguments, gigabyte)
        print(text)
        if arguments.markdown:
            arguments.markdown.write_text(text, encoding="utf-8")
    finally:
        shutil.rmtree(arguments.folder / "out", ignore_errors=True)
        if not arguments.keep:
            for place in models:
                shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
