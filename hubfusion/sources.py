"""Where the models of a recipe lie: local folders as they are, Hub ids pinned to a commit and fetched for the fuse."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hubfusion.errors import RecipeError
from hubfusion.fusion import COMPANIONS
from hubfusion.recipes import MODEL_ID, FuseRecipe

FETCHED = re.compile(
    r"(model(-\d{5}-of-\d{5})?|adapter_model|fisher|regmean)\.safetensors|(model\.safetensors\.index|adapter_config)\.json",
    re.ASCII,
)


@contextmanager
def fetched(recipe: FuseRecipe, endpoint: str, token: str | None) -> Iterator[tuple[FuseRecipe, Path, list[Path]]]:
    """Yield the recipe with every Hub id pinned (``owner/name@sha``), the base's folder and the inputs' folders.

    Only safetensors weights, adapter configurations, statistics and, of the base, config and tokenizer are fetched;
    each file's hash is checked. What was fetched is removed when the block ends.
    """
    names = [recipe.base, *recipe.plan.labels]
    if all(Path(n).exists() for n in names):
        yield recipe, Path(recipe.base), [Path(n) for n in recipe.plan.labels]
        return
    for name in names:
        if not Path(name).exists() and not MODEL_ID.fullmatch(name):
            raise RecipeError(f"{name}: neither a folder here nor owner/name[@revision]")
    from hubfusion.hub import connect

    hub = connect(endpoint, token)
    with tempfile.TemporaryDirectory(prefix="hubfusion-") as root:
        pinned, places = [], []
        for number, name in enumerate(names):
            found = MODEL_ID.fullmatch(name)
            if Path(name).exists() or found is None:
                pinned.append(name)
                places.append(Path(name))
                continue
            revision = hub.resolve(found["repo"], found["name"] or "main")
            folder = Path(root) / str(number)
            folder.mkdir()
            for file in hub.files(revision):
                if FETCHED.fullmatch(file.path) or (number == 0 and file.path in COMPANIONS):
                    hub.download(revision, file, folder / file.path)
            pinned.append(f"{revision.repo}@{revision.sha}")
            places.append(folder)
        plan = replace(recipe.plan, labels=tuple(pinned[1:]))
        yield replace(recipe, base=pinned[0], plan=plan), places[0], places[1:]
