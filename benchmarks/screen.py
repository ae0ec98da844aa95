"""What trust costs: all checks of the weights against a plain fuse, and the headers of 500 models over HTTP.

    python benchmarks/screen.py --model MINILM_FOLDER [--inputs 8] [--repeats 7] [--models 500]

The fuse and the checks read the same files, page cache warm, in alternation; medians of whole calls. The 500 models
have MiniLM's names and header length with few bytes of data, each in a repository of its own on the embedded Hub.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
from safetensors.numpy import load_file, save, save_file

from hubfusion.fuse import fuse
from hubfusion.hub import Change, Hub, connect
from hubfusion.lineage import Contribution, Input, Recipe, Revision
from hubfusion.localhub import LocalHub
from hubfusion.screen import Policy, apply_caps, examine, read_base, screen
from hubfusion.screen.crawl import crawl

BASE = Revision("ibm/base", "0" * 40)


def measured(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    call()
    return time.perf_counter() - wall, sum(os.times()[:4]) - cpu


def compare_with_fuse(model: Path, work: Path, inputs: int, repeats: int) -> None:
    rng = np.random.default_rng(0)
    base = load_file(model / "model.safetensors")
    (work / "base").mkdir()
    save_file(base, work / "base" / "model.safetensors")
    batch = []
    for i in range(inputs):
        (work / f"c{i}").mkdir()
        moved = {
            f"bert.{n}": v + rng.standard_normal(v.shape, np.float32) * np.float32(1e-3)
            for n, v in base.items()
            if v.dtype == np.float32
        }
        save_file(moved, work / f"c{i}" / "model.safetensors")
        revision = Revision(f"user{i}/m", f"{i:040x}")
        batch.append((Contribution(revision, f"user{i}", BASE, "mit", (f"org/d{i}",), 600, ()), work / f"c{i}"))
    recipe = Recipe(BASE.pinned, tuple(Input(c.revision.pinned) for c, _ in batch))
    entries = sum(v.size for v in base.values() if v.dtype == np.float32)

    def plain() -> None:
        shutil.rmtree(work / "out", ignore_errors=True)
        fuse(recipe, work / "base", [p for _, p in batch], work / "out")

    times: dict[str, list[tuple[float, float]]] = {"fuse": [], "checks": []}
    for _ in range(repeats):
        times["fuse"].append(measured(plain))
        times["checks"].append(measured(lambda: examine(work / "base", batch)))
    wall = {name: statistics.median(w for w, _ in values) for name, values in times.items()}
    cpu = {name: statistics.median(c for _, c in values) for name, values in times.items()}
    print(f"{inputs} contributions of {entries / 1e6:.1f} M parameters, medians of {repeats}")
    for name in times:
        print(f"  {name:7} {wall[name]:.3f} s wall, {cpu[name]:.3f} s CPU")
    ratios = wall["checks"] / wall["fuse"], cpu["checks"] / cpu["fuse"]
    print(f"  checks / fuse: {ratios[0]:.2f} wall, {ratios[1]:.2f} CPU (at most 1.5)")


def screen_many(model: Path, work: Path, count: int) -> None:
    names = load_file(model / "model.safetensors")
    small = {n: np.zeros([min(s, 2) for s in v.shape], v.dtype) for n, v in names.items()}
    config = (model / "config.json").read_bytes()
    users = {f"user{i}": f"hf_{i}" for i in range(count)} | {"ibm": "hf_ibm"}
    with LocalHub(work / "hub", users) as server:
        hub = connect(server.endpoint, "hf_ibm")
        base = push(hub, "ibm/base", {"config.json": config, "model.safetensors": save(small)}, "license: apache-2.0")
        current = read_base(hub, base, "v0", {base.sha: "v0"})
        begin = time.perf_counter()
        for i in range(count):
            tuned = {f"bert.{n}": v for n, v in small.items() if v.dtype == np.float32}
            tuned["classifier.bias"] = np.full(3, i, np.float32)
            card = (
                "base_model: ibm/base\nbase_model_relation: finetune\ntags: [cold-fusion]\nlicense: mit\n"
                f"datasets: [org/d{i}]\ncold_fusion: {{base_revision: '{base.sha}', examples: 600}}"
            )
            files = {"config.json": config, "model.safetensors": save(tuned)}
            push(connect(server.endpoint, f"hf_{i}"), f"user{i}/m", files, card)
        print(f"{count} models pushed in {time.perf_counter() - begin:.0f} s")
        reader = connect(server.endpoint)
        begin = time.perf_counter()
        found = crawl(reader, "ibm/base")
        crawled = time.perf_counter() - begin
        begin = time.perf_counter()
        verdicts = [screen(reader, each, current, Policy()) for each in found]
        screened = time.perf_counter() - begin
        good = [v for v in verdicts if isinstance(v, Contribution)]
        kept, _ = apply_caps(good, Policy(max_contributions=count))
        print(f"{len(found)} models crawled in {crawled:.1f} s, screened in {screened:.1f} s (at most 60 s)")
        print(f"  {1000 * screened / max(1, len(found)):.1f} ms a model; {len(kept)} accepted")


def push(hub: Hub, repo: str, files: dict[str, bytes], card: str) -> Revision:
    hub.create(repo)
    readme = f"---\n{card}\n---\n# {repo}\n".encode()
    change = Change("push", hub.resolve(repo).sha, f"{repo}-nonce", files | {"README.md": readme})
    return Revision(repo, hub.commit(repo, change))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--inputs", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--models", type=int, default=500)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare_with_fuse(arguments.model, Path(folder), arguments.inputs, arguments.repeats)
        screen_many(arguments.model, Path(folder), arguments.models)


if __name__ == "__main__":
    main()
