"""`hubfusion fuse`: the options depend on the method, so a parser is built for the chosen method."""

from __future__ import annotations

import os
import signal
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hubfusion.cli.access import ENDPOINT
from hubfusion.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from hubfusion.fuse.recipe import ReadRecipe
    from hubfusion.lineage import Option, Recipe


def fuse(args: Sequence[str] | None) -> None:
    """Fuse finetunes into their base; write weights, recipe, manifest and card."""
    from hubfusion.cli.progress import bars
    from hubfusion.fuse import engine
    from hubfusion.fuse.folder import finish
    from hubfusion.fuse.inputs import fetched

    given = parse(args)
    read = _from_file(Path(given.models[0]), given) if len(given.models) == 1 else _from_arguments(given)
    for note in read.notes:
        print(f"note: {note}", file=sys.stderr)
    _check_device(given.device)
    settings = engine.Settings(
        device=given.device, workers=given.workers, max_shard_bytes=_bytes(given.max_shard_size),
        digest=given.digest, norms=given.norms,
    )  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(_in_one_line(given.out))
        by_norm = given.coefficients == "inverse-norm" and len(given.models) > 1
        once = not by_norm and given.device is None
        bar, token = stack.enter_context(bars()), os.environ.get("HF_TOKEN")
        found = stack.enter_context(fetched(read.recipe, given.endpoint, token, bar("download"), once=once))
        recipe = found.recipe
        if by_norm:
            recipe = _inverse_norm(recipe, found.base, found.inputs)
        tell = bar(f"fuse by {recipe.method}")
        work = partial(engine.fuse, recipe, found.base, found.inputs)
        if found.arrivals:
            from hubfusion.fuse.incremental import fuse_arriving

            work = partial(fuse_arriving, recipe, found.base, found.arrivals)
        fused = work(given.out, state=found.state, settings=settings, on_event=lambda e: tell(e.done, e.total))
        finish(recipe, found.base, fused, given.out)
    print(f"{given.out}: {len(fused.fused)} parameters of {len(found.inputs)} finetunes fused, {len(fused.kept)} kept")


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


def parse(args: Sequence[str] | None) -> Namespace:
    """Read the command line; ``options`` and ``outer_options`` are texts, those of the method and outer optimizer."""
    from hubfusion.fuse.methods import METHODS
    from hubfusion.fuse.outer import OUTERS

    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", default="average")
    first.add_argument("--outer", default="plain")
    asked, _ = first.parse_known_args(args)
    for kind, name, known in (("method", asked.method, METHODS), ("outer", asked.outer, OUTERS)):
        if name not in known:
            raise RecipeError(f"{kind} must be one of {', '.join(sorted(known))}, got {name!r}")
    method, outer = METHODS[asked.method].options, OUTERS[asked.outer].options
    parser = _parser()
    for title, table, prefix in ((asked.method, method, ""), (asked.outer, outer, "outer-")):
        group = parser.add_argument_group(f"options of {title}") if table else parser
        for name, value in table.items():
            kind = type(value).__name__ if not isinstance(value, str) else "text"
            flag = f"--{prefix}{name.replace('_', '-')}"
            group.add_argument(flag, metavar=kind.upper(), dest=f"{prefix}option {name}", help=f"default {value}")
    given, unknown = parser.parse_known_intermixed_args(args)
    if unknown and len(given.models) > 1:
        allowed = ", ".join([*sorted(method), *(f"outer-{n}" for n in sorted(outer))])
        raise RecipeError(f"{asked.method}: unknown option {unknown[0].lstrip('-')!r}, allowed are {allowed}")
    given.unknown = unknown
    values = {k: v for k, v in vars(given).items() if " " in k and v is not None}
    given.options = {k.split()[1]: v for k, v in values.items() if k.startswith("option")}
    given.outer_options = {k.split()[1]: v for k, v in values.items() if k.startswith("outer-")}
    return given


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError(message)


def _parser() -> ArgumentParser:
    parser = _Parser("hubfusion fuse", description=fuse.__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("models", nargs="+", help="RECIPE, or BASE MODEL MODEL …: folders or owner/name[@revision]")
    add("--out", type=Path, required=True, help="folder to write; an older checkpoint in it is replaced whole")
    add("--method", default="average", help="see `hubfusion methods`; with --help it shows its options")
    add("--scale", type=float, default=1.0, help="λ, applied once to the fused delta")
    add("--coefficients", default="uniform", help="uniform, inverse-norm, or numbers: 1,2,0.5")
    add("--outer", default="plain", help="outer optimizer; with --help it shows its options")
    add("--state", help="folder of the outer optimizer's last state")
    add("--device", help="torch device; numpy on the CPU without it")
    add("--max-shard-size", default="50GB", help="as in transformers: 5GB, 500MB")
    add("--workers", type=int, help="processes at work (default: one for small models, else the cores, at most 4)")
    add("--digest", action=BooleanOptionalAction, default=True, help="put sha256 of the files into fuse.json")
    add("--norms", action=BooleanOptionalAction, default=True, help="put the norms of the deltas into it")
    add("--endpoint", default=os.environ.get("HF_ENDPOINT", ENDPOINT), help="the Hub for ids (HF_ENDPOINT)")
    return parser


def _from_file(path: Path, given: Namespace) -> ReadRecipe:
    from hubfusion.fuse.recipe import read_recipe

    if path.is_dir():
        raise RecipeError(f"{path}: one folder alone; name a base and at least one finetune, or a recipe file")
    extra = given.options or given.outer_options or given.state or given.unknown
    if extra or (given.method, given.scale, given.coefficients, given.outer) != ("average", 1.0, "uniform", "plain"):
        raise RecipeError(f"{path}: a recipe file says everything; method, options and coefficients go into it")
    return read_recipe(path)


def _from_arguments(given: Namespace) -> ReadRecipe:
    from hubfusion.fuse.methods import METHODS
    from hubfusion.fuse.outer import OUTERS
    from hubfusion.fuse.recipe import ReadRecipe, check_recipe
    from hubfusion.lineage import Input, Recipe

    base, *models = [str(Path(name).resolve()) if Path(name).exists() else name for name in given.models]
    coefficients = _coefficients(given.coefficients, len(models))
    recipe = Recipe(
        base,
        tuple(map(Input, models, coefficients)),
        given.method,
        _typed(given.options, METHODS[given.method].options, given.method),
        given.scale,
        given.outer,
        _typed(given.outer_options, OUTERS[given.outer].options, given.outer),
        given.state,
    )
    check_recipe(recipe)
    return ReadRecipe(recipe)


def _coefficients(text: str, inputs: int) -> tuple[float, ...]:
    if text in ("uniform", "inverse-norm"):
        return (1.0,) * inputs
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RecipeError(f"coefficients must be uniform, inverse-norm or numbers 1,2,0.5, got {text!r}") from None
    if len(numbers) != inputs:
        raise RecipeError(f"one coefficient per input, got {len(numbers)} for {inputs} inputs")
    return numbers


def _inverse_norm(recipe: Recipe, base: Path, inputs: Sequence[Path]) -> Recipe:
    from dataclasses import replace

    from hubfusion.fuse.coefficients import by_inverse_norm, delta_norms
    from hubfusion.lineage import Input

    coefficients = by_inverse_norm(delta_norms(base, inputs))
    return replace(recipe, inputs=tuple(map(Input, (each.model for each in recipe.inputs), coefficients)))


def _typed(options: Mapping[str, str], known: Mapping[str, Option], where: str) -> tuple[tuple[str, Option], ...]:
    """Read option texts as the type of the option's default."""
    typed: dict[str, Option] = {}
    for name, text in options.items():
        kind = type(known[name])
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
