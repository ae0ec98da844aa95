"""What a fuse leaves beside the weights: the base's config and tokenizer, the recipe, the manifest and a card."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import hubfusion
from hubfusion.fuse import Fused
from hubfusion.lineage import dumps
from hubfusion.methods import METHODS
from hubfusion.recipes import FuseRecipe, write_recipe
from hubfusion.weights import MANIFEST

COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "tokenizer.model", "LICENSE",
)  # fmt: skip


def finish(recipe: FuseRecipe, base: Path, fused: Fused, out: Path) -> None:
    """Copy the base's companions, then write ``recipe.toml``, ``README.md`` and, last, ``fusion.json``.

    The manifest's existence means that the folder is whole.
    """
    for name in COMPANIONS:
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)
    _write(out / "recipe.toml", write_recipe(recipe))
    _write(out / "README.md", card_text(recipe, fused))
    _write(out / MANIFEST, manifest_text(recipe, fused))


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def manifest_text(recipe: FuseRecipe, fused: Fused) -> str:
    """JSON of what was fused, how, and what came out; the same fuse gives the same text."""
    plan = recipe.plan
    rows = zip(plan.labels, plan.coefficients, fused.norms, fused.dropped, strict=True)
    data = {
        "hubfusion": hubfusion.__version__,
        "base": recipe.base,
        "method": plan.method,
        "options": {**METHODS[plan.method].options, **dict(plan.options)},
        "scale": plan.scale,
        "outer": {"name": plan.outer, "state": recipe.state, **dict(plan.outer_options)},
        "inputs": [{"model": m, "coefficient": c, "delta_norm": n, "dropped": list(d)} for m, c, n, d in rows],
        "fused_parameters": len(fused.fused),
        "kept_from_base": list(fused.kept),
        "files": list(fused.files),
    }
    return dumps(data)


def card_text(recipe: FuseRecipe, fused: Fused) -> str:
    """Model card: what was fused, by which formula, and how to do it again."""
    plan = recipe.plan
    sources = [recipe.base, *plan.labels]
    ids = [m.split("@")[0] for m in sources if not Path(m).is_absolute()]
    front = ["---", "library_name: transformers", "tags:", "- merge", "- hubfusion"]
    front += ["base_model:", *(f"- {json.dumps(i)}" for i in dict.fromkeys(ids))] if ids else []
    options = ", ".join(f"{k} = {v}" for k, v in plan.options) or "its defaults"
    rows = [f"| `{m}` | {c:g} | {n:.4g} |" for m, c, n in zip(plan.labels, plan.coefficients, fused.norms, strict=True)]
    kept = f" {len(fused.kept)} more are the base's own." if fused.kept else ""
    return "\n".join(
        [
            *front, "---", "", f"# {len(plan.labels)} finetunes of `{recipe.base}`, fused", "",
            f"{METHODS[plan.method].summary} (`{plan.method}` with {options}; scale {plan.scale:g}; outer optimizer "
            f"`{plan.outer}`).", "",
            f"{len(fused.fused)} parameters are fused.{kept} Task heads are not fused: train a new one.", "",
            "| finetune | coefficient | norm of its delta |", "|---|---:|---:|", *rows, "",
            "`hubfusion fuse recipe.toml --out DIR` gives the same bytes; `fusion.json` has their sha256.", "",
        ]
    )  # fmt: skip
