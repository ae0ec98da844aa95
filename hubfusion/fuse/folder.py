"""Files written beside the fused weights: config and tokenizer of the base, recipe, manifest and card."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from pathlib import Path

import hubfusion
from hubfusion.checkpoint import MANIFEST
from hubfusion.checkpoint.backbone import MODULE_FILE
from hubfusion.codec import dumps, to_json
from hubfusion.fuse.engine import Fused
from hubfusion.fuse.methods import METHODS
from hubfusion.fuse.outer import OUTERS, STATE_FILE
from hubfusion.fuse.recipe import write_recipe
from hubfusion.lineage import Recipe

COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "tokenizer.model", "backbone.json", "LICENSE",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",  # of a SentenceTransformer
)  # fmt: skip


def finish(recipe: Recipe, base: Path, fused: Fused, out: Path) -> None:
    """Copy the base's companions, then write ``recipe.toml``, ``README.md`` and, last, ``fuse.json``.

    The manifest's existence means that the folder is whole. What an older fuse in this folder left and this one does
    not (another tokenizer's files, an outer optimizer's state) is removed.
    """
    for name in sorted({*COMPANIONS, *_modules(base), *_modules(out)}):
        if (base / name).is_file():
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(base / name, out / name)
        else:
            (out / name).unlink(missing_ok=True)
    if STATE_FILE not in {file.name for file in fused.files}:
        (out / STATE_FILE).unlink(missing_ok=True)
    _write(out / "recipe.toml", write_recipe(recipe))
    _write(out / "README.md", card_text(recipe, fused))
    _write(out / MANIFEST, manifest_text(recipe, fused))


def _modules(folder: Path) -> set[str]:
    """Files of a SentenceTransformer's further modules."""
    names = (path.relative_to(folder).as_posix() for path in folder.glob("*_*/*"))
    return {name for name in names if MODULE_FILE.fullmatch(name)}


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def manifest_text(recipe: Recipe, fused: Fused) -> str:
    """JSON of what was fused, how, and what came out; the same fuse gives the same text."""
    data = {
        "hubfusion": hubfusion.__version__,
        "base": recipe.base,
        "method": recipe.method,
        "options": {**METHODS[recipe.method].options, **dict(recipe.options)},
        "scale": recipe.scale,
        "outer": {"name": recipe.outer, "state": recipe.state, **dict(recipe.outer_options)},
        "inputs": [
            {**to_json(each.input), "delta_norm": each.norm, "dropped": list(each.dropped)} for each in fused.inputs
        ],
        "fused_parameters": len(fused.fused),
        "kept_from_base": list(fused.kept),
        "files": list(fused.files),
    }
    return dumps(data)


def methods_markdown() -> str:
    """The text of ``docs/methods.md``: what holds for all methods, then each docstring without its example."""
    parts = [METHODS_HEAD]
    for title, table in (("Methods", METHODS), ("Outer optimizers", OUTERS)):
        parts.append(f"## {title}\n")
        for name, entry in table.items():
            text = inspect.cleandoc(entry.function.__doc__ or "").split("\n>>>")[0].rstrip()
            summary, _, rest = text.partition("\n\n")
            options = ", ".join(f"`{k}` = {v}" for k, v in entry.options.items()) or "none"
            parts.append(f"### `{name}`\n\n{summary} Options: {options}.\n\n```text\n{rest}\n```\n")
    return "\n".join(parts)


METHODS_HEAD = """# Fuse methods

This page is printed by `hubfusion methods --markdown`; the text is that of the functions themselves.

τ_i (or δ_i) is the delta of input i, finetune − base, of one parameter or of the model; α_i its coefficient; k the
number of inputs; λ the recipe's `scale`, applied once to the fused delta δ. An outer optimizer then turns δ into the
step from base revision to base revision (`plain`: the base plus δ).

What holds for all of them:

- **Precision.** Deltas and sums are float32 (float64 when any file is); the result is rounded once, to nearest even, to
  the base's dtype. An average of finetunes is off by half a unit in the last place plus the rounding of the deltas' sum
  (hundredths of a unit where deltas are a hundredth of the parameters); over 99 % of entries are correctly rounded.
- **Same recipe, same bytes**, whatever the number of workers, the size of chunks, the shards or the order in which
  inputs come: inputs are added in a canonical order (by their names: `owner/name@sha`, or the path of a folder), first
  passes sum in float64 over fixed chunks, and random draws depend on the seed, the input's place in that order, the
  parameter and the entry. On a torch device the device's own rounding applies. GPU figures have not been measured.
- **Workers** are forks of the process, or threads where a fork is not safe: one for a small model, else one a core, at
  most four (`--workers`). What is written is hashed meanwhile.
- **Memory** is bounded by chunks that fit a core's cache, for each worker; it grows neither with the number of inputs
  nor with the model. Exceptions: `regmean`, `iso_c` and `tsv` hold one whole parameter, of one input at a time, with
  its float64 decomposition or sums: the largest matrix bounds them, and it does not grow with the inputs. `della` holds
  whole rows.
- **Two passes** where a method needs to know the model first: `ties` (exact thresholds by counting, no sort),
  `breadcrumbs`, `sce`, and everything that needs inner products or norms (`model_stock`, `slerp`, `karcher`,
  `geometric_median`, `multi_krum`, and `norm` other than "keep").
- **What is fused.** Parameters of the base that every input has. Task heads never; the base's own pretraining head and
  pooler are kept as they are when an input lacks them; integer buffers must equal the base's or be absent. A backbone
  parameter that is missing, foreign or of another shape is an error before anything is written. Values that are not
  finite are refused with file, parameter and entry.
- **Models on the Hub** are pinned to a commit, downloaded four files at a time into a folder of their own (in
  `TMPDIR`), checked against the listed hash, and removed when the fuse is done. `average` (with `norm` "keep") and
  `task_arithmetic` need each of them once: there the fuse does not wait for all. Each input is added, in the canonical
  order, to a sum on the disk as soon as it is there, and removed; at most four inputs lie there at a time. The sum has
  the working precision and the additions are the same, so the bytes are. All headers are read first, by range
  requests: an input that does not fit is still named before anything is added. This is done whenever it takes less
  room than all inputs together, that is from six on when they are float32 (the sum takes as much as one, or as two of
  half precision). Adapters, and what is needed elsewhere too (the base, an input named twice), come before; folders
  that were here stay. Eight inputs and a base of 52 MB from a Hub on the same machine (2 cores), side by side with
  waiting for all: at most 315 MB on the disk in place of 472 MB, and 0.8 of the wall time, whether each answer comes at
  once or 0.2 s late. Other methods, coefficients by inverse norm and a torch device begin when all are there.
- **mergekit's YAML** is followed for linear, task_arithmetic, ties, dare_linear, dare_ties, della, breadcrumbs, sce,
  model_stock, slerp, nuslerp and karcher; any other method, parameter or value is an error that names it. Compared
  with mergekit 0.1.5 on two-layer models in float32, entries and deltas of size 1 (`benchmarks/agreement.py`):
  task_arithmetic, ties, breadcrumbs, and the random methods at full density give the same numbers; the largest
  difference of any entry is 5e-7 for linear, normalized task_arithmetic, model_stock and slerp and 1e-6 for sce,
  nuslerp and karcher, which is float32's rounding. What differs on purpose, printed as a note: the draws of dare and
  della, and their kept entries divided by the probability, not scaled to the L1 norm; slerp at angles under 1.8
  degrees (exact here, a line there: 4e-5 apart for deltas of 0.01); model_stock with deltas under 1e-6 or pointing
  apart; a ties vote of exactly zero; dtype (here the base's own).
"""


def card_text(recipe: Recipe, fused: Fused) -> str:
    """Model card: what was fused, by which formula, and how to do it again."""
    sources = [recipe.base, *(each.model for each in recipe.inputs)]
    ids = [m.split("@")[0] for m in sources if not Path(m).is_absolute()]
    front = ["---", "library_name: transformers", "tags:", "- merge", "- hubfusion"]
    front += ["base_model:", *(f"- {json.dumps(i)}" for i in dict.fromkeys(ids))] if ids else []
    options = ", ".join(f"{k} = {v}" for k, v in recipe.options) or "its defaults"
    rows = [
        f"| `{each.input.model}` | {each.input.coefficient:g} | "
        f"{'not measured' if each.norm is None else f'{each.norm:.4g}'} |"
        for each in fused.inputs
    ]
    kept = f" {len(fused.kept)} more are the base's own." if fused.kept else ""
    return "\n".join(
        [
            *front, "---", "", f"# {len(recipe.inputs)} finetunes of `{recipe.base}`, fused", "",
            f"{METHODS[recipe.method].summary} (`{recipe.method}` with {options}; scale {recipe.scale:g}; "
            f"outer optimizer `{recipe.outer}`).", "",
            f"{len(fused.fused)} parameters are fused.{kept} Task heads are not fused: train a new one.", "",
            "| finetune | coefficient | norm of its delta |", "|---|---:|---:|", *rows, "",
            "`hubfusion fuse recipe.toml --out DIR` gives the same bytes; `fuse.json` has their sha256.", "",
        ]
    )  # fmt: skip
