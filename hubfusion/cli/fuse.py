"""`hubfusion fuse` and `hubfusion methods`."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hubfusion.cli import app
from hubfusion.cli.access import ENDPOINT
from hubfusion.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from hubfusion.lineage import Option
    from hubfusion.recipes import FuseRecipe

ANY_OPTION = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=ANY_OPTION)
def fuse(
    models: Annotated[
        list[str], typer.Argument(help="RECIPE, or BASE MODEL MODEL …: folders or owner/name[@revision]")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; an older checkpoint in it is replaced whole.")],
    method: Annotated[str, typer.Option(help="See `hubfusion methods`; options follow as --density 0.2.")] = "average",
    scale: Annotated[float, typer.Option(help="λ, applied once to the fused delta.")] = 1.0,
    coefficients: Annotated[str, typer.Option(help="uniform, inverse-norm, or numbers: 1,2,0.5")] = "uniform",
    outer: Annotated[str, typer.Option(help="Outer optimizer; its options follow as --outer-lr 0.7.")] = "plain",
    state: Annotated[str | None, typer.Option(help="Folder of the outer optimizer's last state.")] = None,
    device: Annotated[str | None, typer.Option(help="Torch device; numpy on the CPU without it.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="As in transformers: 5GB, 500MB.")] = "50GB",
    threads: Annotated[int, typer.Option(min=1)] = 2,
    digest: Annotated[bool, typer.Option(help="Put the sha256 of what was written into fusion.json.")] = True,
    endpoint: Annotated[str, typer.Option(envvar="HF_ENDPOINT", help="The Hub for ids.")] = ENDPOINT,
) -> None:
    """Fuse finetunes into their base; write weights, recipe, manifest and card."""
    from hubfusion import fuse as engine
    from hubfusion.cli.progress import bar
    from hubfusion.fusion import finish
    from hubfusion.sources import fetched

    names, extra = _split(models)
    if len(names) == 1:
        recipe = _from_file(Path(names[0]), method, scale, coefficients, outer, extra)
    else:
        recipe = _from_arguments(names, method, scale, coefficients, (outer, state), extra)
    for note in recipe.notes:
        print(f"note: {note}", file=sys.stderr)
    _check_device(device)
    settings = engine.Settings(device=device, threads=threads, max_shard_bytes=_bytes(max_shard_size), digest=digest)
    with ExitStack() as stack:
        stack.enter_context(_in_one_line(out))
        with bar("download") as tell:
            found = stack.enter_context(fetched(recipe, endpoint, os.environ.get("HF_TOKEN"), tell))
        recipe = found.recipe
        if coefficients == "inverse-norm" and len(names) > 1:
            recipe = _inverse_norm(recipe, found.base, found.inputs)
        with bar(f"fuse by {recipe.plan.method}") as tell:
            fused = engine.fuse(
                recipe.plan, found.base, found.inputs, out, state=found.state,
                settings=settings, on_event=lambda e: tell(e.done, e.total),
            )  # fmt: skip
        finish(recipe, found.base, fused, out)
    print(f"{out}: {len(fused.fused)} parameters of {len(found.inputs)} finetunes fused, {len(fused.kept)} kept")


@contextmanager
def _in_one_line(out: Path) -> Iterator[None]:
    """Turn what the operating system refuses (a full disk, a folder that cannot be made) into an error of one line.

    A plain kill cleans up as Ctrl-C does.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename or out}: {error.strerror or error}") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_device(device: str | None) -> None:
    if device is None:
        return
    try:
        import torch

        torch.empty(0, device=device)
    except (ImportError, RuntimeError, AssertionError) as error:  # torch says AssertionError where it has no CUDA
        raise RecipeError(f"--device {device}: {str(error).splitlines()[0]}") from None


def _split(tokens: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Models, and the options of the method or the outer optimizer (``--density 0.2`` or ``--density=0.2``)."""
    names: list[str] = []
    extra: dict[str, str] = {}
    rest = iter(tokens)
    for token in rest:
        if not token.startswith("-"):
            names.append(token)
            continue
        if not token.startswith("--"):
            raise RecipeError(f"{token}: options begin with two dashes, as in --method ties --density 0.2")
        name, equals, value = token[2:].partition("=")
        found = value if equals else next(rest, None)
        if found is None:
            raise RecipeError(f"--{name}: a value is needed")
        extra[name.replace("-", "_")] = found
    return names, extra


def _from_file(
    path: Path, method: str, scale: float, coefficients: str, outer: str, extra: Mapping[str, str]
) -> FuseRecipe:
    from hubfusion.recipes import read_recipe

    if path.is_dir():
        raise RecipeError(f"{path}: one folder alone; name a base and at least one finetune, or a recipe file")
    if extra or (method, scale, coefficients, outer) != ("average", 1.0, "uniform", "plain"):
        raise RecipeError(f"{path}: a recipe file says everything; method, options and coefficients go into it")
    return read_recipe(path)


def _from_arguments(
    names: Sequence[str], method: str, scale: float, coefficients: str, outer: tuple[str, str | None],
    extra: Mapping[str, str],
) -> FuseRecipe:  # fmt: skip
    from hubfusion.fuse import Plan
    from hubfusion.methods import METHODS
    from hubfusion.outer import OUTERS
    from hubfusion.recipes import FuseRecipe

    places = [str(Path(n).resolve()) if Path(n).exists() else n for n in names]
    own = {k: v for k, v in extra.items() if not k.startswith("outer_")}
    steps = {k.removeprefix("outer_"): v for k, v in extra.items() if k.startswith("outer_")}
    plan = Plan(
        tuple(places[1:]),
        _coefficients(coefficients, len(places) - 1),
        method,
        _typed(own, METHODS[method].options if method in METHODS else {}, method),
        scale,
        outer[0],
        _typed(steps, OUTERS[outer[0]].options if outer[0] in OUTERS else {}, outer[0]),
    )
    return FuseRecipe(places[0], plan, outer[1])


def _coefficients(text: str, inputs: int) -> tuple[float, ...]:
    if text in ("uniform", "inverse-norm"):
        return (1.0,) * inputs
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RecipeError(f"coefficients must be uniform, inverse-norm or numbers 1,2,0.5, got {text!r}") from None


def _inverse_norm(recipe: FuseRecipe, base: Path, inputs: Sequence[Path]) -> FuseRecipe:
    from dataclasses import replace

    from hubfusion.coefficients import by_inverse_norm, delta_norms

    return replace(recipe, plan=replace(recipe.plan, coefficients=by_inverse_norm(delta_norms(base, inputs))))


def _typed(options: Mapping[str, str], known: Mapping[str, Option], where: str) -> tuple[tuple[str, Option], ...]:
    """Read option texts as the type of the option's default; unknown names are left for `Plan` to refuse."""
    typed: dict[str, Option] = {}
    for name, text in options.items():
        kind = type(known.get(name, ""))
        try:
            typed[name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise RecipeError(f"{where}: {name} must be like {known[name]!r}, got {text!r}") from None
    return tuple(sorted(typed.items()))


def _bytes(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    digits = text.rstrip("BbGgIiKkMm")
    try:
        return int(float(digits) * units[text[len(digits) :].upper()])
    except (KeyError, ValueError):
        raise RecipeError(f"max-shard-size must be like 5GB or 500MB, got {text!r}") from None


@app.command()
def methods(
    markdown: Annotated[bool, typer.Option(help="Print every formula and its departures: docs/methods.md.")] = False,
) -> None:
    """List the fuse methods and the outer optimizers, one line each."""
    from hubfusion.fusion import methods_markdown
    from hubfusion.methods import METHODS
    from hubfusion.outer import OUTERS

    if markdown:
        print(methods_markdown(), end="")
        return
    for title, table in (("method", METHODS), ("outer optimizer", OUTERS)):
        print(f"{title:16} what it does (options and defaults)")
        for name, entry in table.items():
            options = ", ".join(f"{k}={v}" for k, v in entry.options.items())
            print(f"  {name:16} {entry.summary}{f' ({options})' if options else ''}")
