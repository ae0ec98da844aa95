"""How far our result is from mergekit's for the same merge.yml: two-layer Llama models, float32, every shared method.

    python benchmarks/agreement.py --mergekit /path/to/its/python

mergekit (LGPL-3.0, from PyPI) runs in its own environment. Prints a table of the largest difference of any entry from
mergekit's, and the largest step that the merge takes from its base, to compare it with. Exits with 1 where a method
that should agree does not: `EXPECTED` says which, and why the others do not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load_file, save_file

from hubfusion.fuse import fuse
from hubfusion.fuse.recipe import MERGEKIT, read_recipe

ROUNDING = 2e-6
EXPECTED: Mapping[str, str] = {
    # why a method is not equal up to rounding; the others must be
    "dare_linear": "random draws of its own, scaled to the L1 norm",
    "dare_ties": "random draws of its own, scaled to the L1 norm",
    "della": "random draws of its own, scaled to the L1 norm",
}
ALIKE: tuple[Mapping[str, Any], ...] = ({"weight": 0.5},) * 3
CASES: Mapping[str, tuple[str, Mapping[str, Any], tuple[Mapping[str, Any], ...]]] = {
    # name: (method, parameters, parameters of each model)
    "linear": ("linear", {}, ({"weight": 1}, {"weight": 2}, {"weight": 0.5})),
    "task_arithmetic": ("task_arithmetic", {"lambda": 0.5}, ({"weight": 1}, {"weight": -0.5}, {"weight": 0.3})),
    "task_arithmetic, normalize": ("task_arithmetic", {"normalize": True}, ({"weight": 1}, {"weight": 3}, ALIKE[0])),
    "ties": ("ties", {"density": 0.25}, ({"weight": 1}, {"weight": 0.5}, {"weight": 0.7})),
    "ties, not normalized": ("ties", {"density": 0.25, "normalize": False}, ALIKE),
    "dare_linear": ("dare_linear", {"density": 0.5}, ALIKE),
    "dare_linear, all kept": ("dare_linear", {"density": 1.0}, ({"weight": 0.5}, {"weight": 0.25}, {"weight": 0.1})),
    "dare_ties": ("dare_ties", {"density": 0.5}, ALIKE),
    "dare_ties, all kept": ("dare_ties", {"density": 1.0}, ALIKE),
    "della": ("della", {"density": 0.5, "epsilon": 0.1}, ALIKE),
    "della, all kept": ("della", {"density": 1.0}, ALIKE),
    "breadcrumbs, all kept": ("breadcrumbs", {}, ALIKE),
    "breadcrumbs": ("breadcrumbs", {"density": 0.75, "gamma": 0.125}, ALIKE),
    "sce": ("sce", {"select_topk": 0.25}, ({}, {}, {})),
    "sce, all kept": ("sce", {}, ({}, {}, {})),
    "model_stock": ("model_stock", {}, ({}, {}, {})),
    "slerp": ("slerp", {"t": 0.3}, ({},)),
    "nuslerp": ("nuslerp", {}, ({"weight": 1}, {"weight": 3})),
    "karcher": ("karcher", {"max_iter": 100, "tol": 1e-12}, ({}, {}, {})),
}  # fmt: skip
DRIVER = """
import sys
from pathlib import Path
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for place in map(Path, sys.argv[1:]):
    config = MergeConfiguration.model_validate(yaml.safe_load((place / "merge.yml").read_text()))
    run_merge(config, str(place / "theirs"), MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True))
"""


@dataclass(frozen=True, slots=True)
class Agreement:
    """One case: its method, the largest |ours − mergekit's| and the largest step from the base, over all entries."""

    case: str
    method: str
    difference: float
    step: float

    @property
    def is_expected(self) -> bool:
        """Whether the two agree as far as they should."""
        return self.case in EXPECTED or self.difference <= ROUNDING * max(1.0, self.step)


def llama(folder: Path, seed: int, base: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """Write a Llama of two layers of random numbers; with ``base`` its deltas have the base's size and share a part."""
    rng, common = np.random.default_rng(seed), np.random.default_rng(99)
    width, inner, words = 32, 48, 64
    shapes = {"model.embed_tokens.weight": (words, width), "model.norm.weight": (width,)}
    shapes["lm_head.weight"] = (words, width)
    for layer in ("model.layers.0.", "model.layers.1."):
        shapes.update({f"{layer}self_attn.{part}_proj.weight": (width, width) for part in "qkvo"})
        shapes.update({f"{layer}mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")})
        shapes[f"{layer}mlp.down_proj.weight"] = (width, inner)
        shapes.update({f"{layer}{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")})
    tensors = {}
    for name, shape in shapes.items():
        values = 0.8 * rng.standard_normal(shape) + 0.6 * common.standard_normal(shape)
        tensors[name] = (values if base is None else base[name] + values).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width,
        "intermediate_size": inner, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "vocab_size": words, "tie_word_embeddings": False, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def compare(mergekit: Path, folder: Path) -> Iterator[Agreement]:
    """Merge every case with both tools in ``folder``."""
    base = llama(folder / "base", 100)
    for number in range(3):
        llama(folder / f"m{number}", number, base)
    places = []
    for case, (method, parameters, own) in CASES.items():
        place = folder / case.replace(", ", "-").replace(" ", "-")
        place.mkdir()
        models = [{"model": str(folder / f"m{i}"), "parameters": dict(p)} for i, p in enumerate(own)]
        recipe = {"merge_method": method, "models": models, "parameters": dict(parameters), "dtype": "float32"}
        if method not in ("linear", "nuslerp", "karcher"):
            recipe["base_model"] = str(folder / "base")
        (place / "merge.yml").write_text(yaml.safe_dump(recipe))
        places.append(place)
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [str(mergekit), "-c", DRIVER, *map(str, places)]
    done = subprocess.run(command, capture_output=True, text=True, env=quiet)
    if done.returncode:
        raise RuntimeError(f"mergekit: {done.stderr.strip().splitlines()[-1]}")
    for place, (case, (method, _, _)) in zip(places, CASES.items(), strict=True):
        recipe = read_recipe(place / "merge.yml").recipe
        fuse(recipe, Path(recipe.base), [Path(each.model) for each in recipe.inputs], place / "ours")
        start = load_file(Path(recipe.base) / "model.safetensors")
        ours, theirs = (load_file(place / whose / "model.safetensors") for whose in ("ours", "theirs"))
        difference = max(float(np.abs(ours[n] - theirs[n]).max()) for n in start)
        step = max(float(np.abs(ours[n] - start[n]).max()) for n in start)
        yield Agreement(case, method, difference, step)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, required=True, help="interpreter of an environment with mergekit")
    arguments = parser.parse_args()
    print("| merge.yml | our method | largest difference | largest step from the base | |\n|---|---|---:|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        found = list(compare(arguments.mergekit, Path(folder)))
    for one in found:
        why = EXPECTED.get(one.case, "equal" if one.is_expected else "NOT EQUAL")
        ours = MERGEKIT[one.method].ours
        print(f"| {one.case} | `{ours}` | {one.difference:.2g} | {one.step:.2g} | {why} |")
    return 0 if all(one.is_expected for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
