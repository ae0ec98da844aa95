"""The search for a candidate: recipes of every method, that they can be rebuilt, and when it stops."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import numpy as np
import pytest

from bot.config import Fusing
from bot.job import CandidateJob, Downloaded
from bot.search import CandidateSearch
from hubfusion.codec import dumps, loads
from hubfusion.data.suite import Dataset, Suite
from hubfusion.errors import FusionError
from hubfusion.fuse import fuse
from hubfusion.fuse.clipping import can_clip
from hubfusion.fuse.methods import METHODS
from hubfusion.lineage import Contribution, Recipe
from hubfusion.release.gate import Decision
from hubfusion.release.provenance import reproduce
from hubfusion.screen import examine
from tests.bert_checkpoints import BASE, base_tensors, finetuned, weights, write_folder
from tests.published import WEIGHTS, World

SUITE = Suite("tiny", (Dataset("one", "texts/one"),))


def begin(world: World, folder: Path, fuse: Fusing, steps: tuple[float, ...], **more: Any) -> CandidateSearch:
    """A search over the base of ``world`` and a contribution a step, of norms in proportion to the steps."""
    base = write_folder(folder / "base", {WEIGHTS: world.read(world.head, WEIGHTS)})
    inputs = []
    for number, step in enumerate(steps):
        data = weights(finetuned(base_tensors(), number, step))
        pushed = world.put(f"user{number}/m", {WEIGHTS: data}, "offer")
        read = tuple(f for f in world.hub.files(pushed) if f.path == WEIGHTS)
        offered = Contribution(pushed, f"user{number}", world.head, "mit", (), None, read)
        inputs.append(Downloaded(offered, str(write_folder(folder / f"user{number}", {WEIGHTS: data}))))
    report = examine(base, [(each.contribution, Path(each.folder)) for each in inputs], tag="v0")
    job = CandidateJob(world.head, "v0", str(base), tuple(inputs), fuse, SUITE, (), (0,), "store", **more)
    return CandidateSearch(job, folder, report, time.monotonic())


def offered(made: CandidateSearch) -> tuple[Contribution, ...]:
    return tuple(each.contribution for each in made.job.inputs)


def paths(made: CandidateSearch, recipe: Recipe) -> list[Path]:
    return [made.folders[each.model] for each in recipe.inputs]


def norms_of(made: CandidateSearch) -> list[float]:
    return [made.norms[each.revision.pinned] for each in offered(made)]


def test_a_clipped_average_is_the_mean_of_the_clipped_updates_whatever_set_is_chosen(tmp_path: Path) -> None:
    made = begin(World(tmp_path / "world"), tmp_path, Fusing(), (0.001, 0.002, 0.004))
    one, two, four = norms_of(made)
    recipe = made.recipe(offered(made))
    assert (recipe.coefficients, recipe.scale) == ((1.0, 1.0, two / four), pytest.approx((2 + two / four) / 3))
    assert one < two < four and two / four == pytest.approx(0.5, rel=0.1)
    fuse(recipe, made.base, paths(made, recipe), tmp_path / "out")
    from safetensors.numpy import load_file

    theta = base_tensors()["pooler.dense.weight"].astype(float)
    tuned = [finetuned(base_tensors(), number, step) for number, step in enumerate((0.001, 0.002, 0.004))]
    taus = [tensors["bert.pooler.dense.weight"] - theta for tensors in tuned]
    exact = theta + (taus[0] + taus[1] + taus[2] * two / four) / 3
    np.testing.assert_allclose(load_file(tmp_path / "out" / WEIGHTS)["pooler.dense.weight"], exact, atol=2e-8)
    part = made.recipe(offered(made)[1:])  # the bound stays that of the whole batch
    assert (part.coefficients, part.scale) == ((1.0, two / four), pytest.approx((1 + two / four) / 2))


def test_a_clipped_sum_has_smaller_coefficients_and_its_own_scale(tmp_path: Path) -> None:
    made = begin(World(tmp_path / "world"), tmp_path, Fusing("task_arithmetic", scale=0.3), (0.001, 0.002, 0.004))
    recipe = made.recipe(offered(made))
    assert recipe.coefficients[2] == pytest.approx(0.5, rel=0.1) and recipe.scale == 0.3


def test_methods_with_a_norm_option_clip_by_it_and_only_when_asked(tmp_path: Path) -> None:
    made = begin(World(tmp_path / "world"), tmp_path, Fusing("trimmed_mean", {"trim": 0.1}), (0.001, 0.002, 0.004))
    recipe = made.recipe(offered(made))
    assert recipe.coefficients == (1.0, 1.0, 1.0) and recipe.scale == 1.0
    assert recipe.options == (("norm", "clip"), ("trim", 0.1))
    made.job = replace(made.job, fuse=Fusing("trimmed_mean", {"norm": "equal"}, clip=False))
    assert made.recipe(offered(made)).options == (("norm", "equal"),)


def test_norms_accepted_before_bound_what_half_a_batch_can_do(tmp_path: Path) -> None:
    made = begin(
        World(tmp_path / "world"), tmp_path, Fusing(), (0.002, 0.02, 0.02), known_norms=(0.08, 0.1, 0.12, 0.1, 0.1)
    )
    small, big, _ = norms_of(made)
    assert big > 0.9 > 0.15 > 1.5 * small / 2
    factors = made.recipe(offered(made)).coefficients
    assert factors[1] == pytest.approx(1.5 * 0.1 / big)
    assert factors[0] == pytest.approx(min(1.0, 0.15 / small))


@pytest.mark.parametrize("method", ["trimmed_mean", "median", "geometric_median", "multi_krum"])
def test_methods_that_clip_by_an_option_are_held_to_the_same_bound(tmp_path: Path, method: str) -> None:
    known = (0.08, 0.1, 0.12)
    made = begin(World(tmp_path / "world"), tmp_path, Fusing(method), (0.02, 0.02, 0.02, 0.02), known_norms=known)
    recipe = made.recipe(offered(made))
    norms = norms_of(made)
    middle = sorted(norms)[1] / 2 + sorted(norms)[2] / 2
    assert middle > 0.9 and recipe.scale == pytest.approx(1.5 * 0.1 / middle)  # the batch alone allows six times it
    fused = fuse(recipe, made.base, paths(made, recipe), tmp_path / "out")
    assert len(fused.inputs) == 4
    from safetensors.numpy import load_file

    theta, out = base_tensors(), load_file(tmp_path / "out" / WEIGHTS)
    moved = np.sqrt(sum(((out[n].astype(float) - v) ** 2).sum() for n, v in theta.items() if v.dtype == np.float32))
    assert 0.02 < moved < 1.5 * 0.1
    half = made.recipe(offered(made)[:2])  # the bound stays, whatever set is chosen
    assert half.scale == pytest.approx(1.5 * 0.1 / (norms[0] / 2 + norms[1] / 2))


def test_a_trial_leaves_time_for_the_examination_and_for_what_follows_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = begin(World(tmp_path / "world"), tmp_path, Fusing(at_least=1), (0.001, 0.002, 0.004), minutes=10.0)
    tried: list[int] = []

    def attempt(chosen: tuple[Contribution, ...], name: str = "candidate") -> Any:
        tried.append(len(chosen))
        return Namespace(decision=Decision(False, -1.0, (), ""))

    monkeypatch.setattr(made, "attempt", attempt)
    now = time.monotonic()
    made.longest, made.measuring = 100.0, 60.0
    made.began = now - 600 + 2 * 100 + 60 - 5  # five seconds short
    made.isolate(offered(made), {})
    assert tried == []
    made.began = now - 600 + 2 * 100 + 60 + 30
    made.isolate(offered(made), {})
    assert tried


CLIPPING = set(filter(can_clip, METHODS))


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"fisher", "regmean"}))
def test_a_version_made_by_any_method_is_rebuilt_to_the_same_bytes(tmp_path: Path, method: str) -> None:
    world = World(tmp_path / "world")
    steps = (0.001, 0.002) if method == "slerp" else (0.001, 0.002, 0.003, 0.004)
    made = begin(world, tmp_path, Fusing(method, clip=method in CLIPPING), steps)
    recipe = loads(Recipe, dumps(made.recipe(offered(made))), "recipe")
    world.publish(recipe, offered(made), paths(made, recipe))
    found = reproduce(world.hub, BASE, "v1", tmp_path / "clean")
    assert found.differences == () and found.steps[-1] == f"fused again by {method}"


def test_a_method_that_cannot_clip_is_refused_by_name() -> None:
    for method in sorted(set(METHODS) - CLIPPING):
        with pytest.raises(FusionError, match=f"fuse.clip: {method} cannot clip"):
            Fusing(method)


def test_sets_too_small_for_the_method_end_the_search_and_nobody_is_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = begin(World(tmp_path / "world"), tmp_path, Fusing("slerp", clip=False), (0.001, 0.002))
    monkeypatch.setattr(
        CandidateSearch, "score", lambda self, *rest: pytest.fail("nothing is scored that cannot be fused")
    )
    assert made.isolate(offered(made), {}) == ()
    assert made.trials == {}
