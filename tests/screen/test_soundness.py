from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hubfusion.codec import dumps
from hubfusion.errors import CheckpointError
from hubfusion.lineage import Contribution, Reason, Revision
from hubfusion.screen import Bounds, SoundnessReport, examine
from tests.bert_checkpoints import Tensors, base_tensors, finetuned, sharded, weights, write_folder

WORDS = "bert.embeddings.word_embeddings.weight"


class Batch:
    """Contributions on disk, in the order in which they were added."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = write_folder(folder / "base", {"model.safetensors": weights(base_tensors())})
        self.entries: list[tuple[Contribution, Path]] = []

    def add(self, files: Tensors | dict[str, bytes], examples: int | None = 600, data: str = "") -> Batch:
        number = len(self.entries)
        is_files = all(isinstance(v, bytes) for v in files.values())
        content: Any = files if is_files else {"model.safetensors": weights(files)}  # type: ignore[arg-type]
        folder = write_folder(self.folder / f"c{number}", content)
        revision = Revision(f"user{number}/model", f"{number:040x}")
        base = Revision("ibm/ColD-Fusion", "0" * 40)
        datasets = (data or f"org/data{number}",)
        self.entries.append((Contribution(revision, f"user{number}", base, "mit", datasets, examples, ()), folder))
        return self

    def honest(self, *seeds: int) -> Batch:
        for seed in seeds:
            self.add(finetuned(base_tensors(), seed))
        return self

    def examine(self, **options: Any) -> SoundnessReport:
        return examine(self.base, self.entries, seed=7, **options)


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return Batch(tmp_path)


def reasons(report: SoundnessReport) -> dict[str, Reason]:
    return {r.revision.repo.partition("/")[0]: r.reason for r in report.rejected}


def detail(report: SoundnessReport) -> str:
    assert len(report.rejected) == 1, report.rejected
    return report.rejected[0].detail


def task_vector(tensors: Tensors) -> np.ndarray[Any, Any]:
    """τ in float64, flat, in the order of names: the reference, with the whole model in memory."""
    base = base_tensors()
    names = sorted(n for n in base if base[n].dtype == np.float32)
    return np.concatenate([(tensors[f"bert.{n}"].astype(float) - base[n].astype(float)).ravel() for n in names])


def test_honest_contributions_all_stay_and_are_measured_as_numpy_in_double_measures_them(batch: Batch) -> None:
    steps = (0.001, 0.002, 0.004)
    made = [finetuned(base_tensors(), i, step) for i, step in enumerate(steps)]
    for tensors in made:
        batch.add(tensors)
    report = batch.examine()
    assert report.rejected == () and len(report.accepted) == 3
    base = np.concatenate([v.ravel().astype(float) for _, v in sorted(base_tensors().items()) if v.dtype == np.float32])
    for tensors, measured in zip(made, report.measures, strict=True):
        tau = task_vector(tensors)
        assert measured.norm == pytest.approx(np.linalg.norm(tau), rel=1e-5)
        assert measured.relative == pytest.approx(np.linalg.norm(tau) / np.linalg.norm(base), rel=1e-5)
        assert measured.along == pytest.approx(tau @ base / (base @ base), rel=1e-3)
        assert measured.largest == pytest.approx(np.abs(tau).max(), rel=1e-6)
        assert measured.effective == pytest.approx((tau**2).sum() ** 2 / (tau**4).sum(), rel=1e-4)
        assert measured.kind == "whole backbone" and sum(measured.shares.values()) == pytest.approx(1)
    assert report.median == report.measures[1].norm
    for i, a in enumerate(made):
        for j, b in enumerate(made):
            x, y = task_vector(a), task_vector(b)
            exact = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
            assert report.cosines[i][j] == pytest.approx(exact, abs=0.04)
    assert dumps(report).startswith("{")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named_with_its_place(batch: Batch, value: float) -> None:
    bad = finetuned(base_tensors(), 1)
    bad[WORDS][31, 5] = value
    report = batch.honest(0).add(bad).honest(2).examine()
    assert reasons(report) == {"user1": Reason.NOT_FINITE}
    assert detail(report) == f"{WORDS}[31, 5] is {value}; train again and check the loss"


def test_a_value_that_is_not_finite_in_the_head_alone_does_no_harm(batch: Batch) -> None:
    tensors = finetuned(base_tensors(), 1)
    tensors["classifier.weight"][0, 0] = math.nan
    assert batch.honest(0, 2).add(tensors).examine().rejected == ()


def test_the_unchanged_base_and_a_new_head_on_it_are_refused(batch: Batch) -> None:
    report = batch.honest(0, 2).add(base_tensors()).add(finetuned(base_tensors(), 1, step=0.0)).examine()
    assert reasons(report) == {"user2": Reason.UNCHANGED, "user3": Reason.UNCHANGED}
    assert "only a head was trained" in report.rejected[0].detail


def test_a_change_too_small_to_be_training_is_refused(batch: Batch) -> None:
    tiny = finetuned(base_tensors(), 1, step=0.0)
    tiny[WORDS] = np.nextafter(tiny[WORDS], np.float32(np.inf), dtype=np.float32)
    report = batch.honest(0, 2).add(tiny).examine(bounds=Bounds(unchanged=1e-6))
    assert reasons(report) == {"user2": Reason.UNCHANGED} and "as good as unchanged" in detail(report)


def test_the_same_weights_twice_keep_the_oldest_whatever_head_prefix_or_sharding_they_come_with(batch: Batch) -> None:
    first = finetuned(base_tensors(), 0)
    other_head = first | {"classifier.weight": np.ones((7, 16), np.float32)}
    bare = {k.removeprefix("bert."): v for k, v in first.items() if k.startswith("bert.")}
    report = batch.add(first).honest(5).add(other_head).add(bare).add(sharded(first)).examine()
    assert reasons(report) == {f"user{i}": Reason.DUPLICATE for i in (2, 3, 4)}
    assert report.rejected[0].detail == "the same weights as user0/model@000000000000, which was first"


def test_a_copy_with_a_little_noise_is_a_duplicate(batch: Batch) -> None:
    first = finetuned(base_tensors(), 0)
    noise = np.random.default_rng(5)
    copy = {k: (v + noise.normal(0, 0.0005, v.shape)).astype(np.float32) for k, v in first.items()}
    report = batch.add(first).honest(5).add(copy).examine()
    assert reasons(report) == {"user2": Reason.DUPLICATE} and "nearly the same update" in detail(report)


def blend(first: Tensors, second: Tensors, share: float) -> Tensors:
    return {k: (share * first[k] + (1 - share) * second[k]).astype(np.float32) for k in first}


def test_a_half_copy_is_refused_only_when_it_claims_other_data(batch: Batch) -> None:
    first, second = finetuned(base_tensors(), 0), finetuned(base_tensors(), 1)
    half = blend(first, second, 0.55)  # cosine 0.55 / sqrt(0.55² + 0.45²) = 0.77
    report = batch.add(first, data="org/a").add(half, data="org/b").add(half | {}, data="org/a").examine()
    assert (
        reasons(report)["user1"] is Reason.DUPLICATE and "though both declare other data" in report.rejected[0].detail
    )
    assert "user2" not in reasons(report)


def test_an_update_that_undoes_another_is_refused(batch: Batch) -> None:
    first, base = finetuned(base_tensors(), 0), finetuned(base_tensors(), 0, step=0.0)
    inverse = {k: (2 * base[k] - v).astype(np.float32) for k, v in first.items()}
    report = batch.add(first).honest(5).add(inverse).examine()
    assert reasons(report) == {"user2": Reason.INVERSE} and "undoes user0/model@" in detail(report)


def boosted(seed: int, factor: float) -> Tensors:
    base, tensors = finetuned(base_tensors(), seed, step=0.0), finetuned(base_tensors(), seed)
    return {k: (base[k] + factor * (v - base[k])).astype(np.float32) for k, v in tensors.items()}


def test_an_update_a_hundred_times_too_long_is_an_outlier(batch: Batch) -> None:
    report = batch.honest(0, 1, 2).add(boosted(3, 100)).examine()
    assert reasons(report) == {"user3": Reason.OUTLIER} and "of the base's norm, at most 0.5" in detail(report)


def test_a_norm_far_from_the_batch_is_an_outlier_in_both_directions(batch: Batch) -> None:
    for seed in range(3):
        batch.add(finetuned(base_tensors(), seed, step=0.0005), examples=None)
    batch.add(finetuned(base_tensors(), 3, step=0.0005 * 70), examples=None)
    batch.add(finetuned(base_tensors(), 4, step=0.0005 / 70), examples=None)
    report = batch.examine()
    assert reasons(report) == {"user3": Reason.OUTLIER, "user4": Reason.OUTLIER}
    assert "64-fold is allowed" in report.rejected[0].detail


def test_a_norm_is_measured_by_the_declared_examples(batch: Batch) -> None:
    # 362,846 examples explain 600^0.45 : 362,846^0.45 = 1 : 17.9 times the norm, 600 do not.
    for seed in range(3):
        batch.add(finetuned(base_tensors(), seed, step=0.0008), examples=600)
    batch.add(finetuned(base_tensors(), 3, step=0.0008 * 20), examples=362_846)
    batch.add(finetuned(base_tensors(), 4, step=0.0008 * 20), examples=600)
    report = batch.examine()
    assert reasons(report) == {"user4": Reason.OUTLIER} and "for 600 examples about" in detail(report)


def test_two_contributions_alone_have_no_usual_norm_but_earlier_iterations_know_one(batch: Batch) -> None:
    batch.add(finetuned(base_tensors(), 0, step=0.0001)).add(finetuned(base_tensors(), 1, step=0.02))
    assert batch.examine().rejected == ()
    report = batch.examine(known_norms=[0.01, 0.012, 0.011, 0.009])
    assert reasons(report) == {"user1": Reason.OUTLIER}


def test_one_entry_that_holds_the_whole_change_is_named(batch: Batch) -> None:
    flipped = finetuned(base_tensors(), 1)
    flipped[WORDS][3, 3] += 2.0
    report = batch.honest(0, 2).add(flipped).examine()
    assert reasons(report) == {"user2": Reason.CONCENTRATED} and "entries hold the whole change" in detail(report)


def test_a_change_in_one_matrix_alone_is_named(batch: Batch) -> None:
    name = "bert.encoder.layer.1.output.dense.weight"
    edited = finetuned(base_tensors(), 1, step=0.0)
    edited[name] = finetuned(base_tensors(), 1)[name]
    report = batch.honest(0, 2).add(edited).examine()
    assert reasons(report) == {"user2": Reason.CONCENTRATED}
    assert detail(report).startswith("100.0% of the change is in encoder.layer.1.output.dense.weight alone")


def test_biases_alone_and_the_upper_layer_alone_are_fine_and_named(batch: Batch) -> None:
    whole, frozen = finetuned(base_tensors(), 1), finetuned(base_tensors(), 1, step=0.0)
    batch.add({k: whole[k] if k.endswith("bias") else v for k, v in frozen.items()})
    batch.add({k: whole[k] if "layer.1." in k else v for k, v in frozen.items()})
    batch.add({k: whole[k] if "LayerNorm" in k else v for k, v in frozen.items()})
    batch.add({k: whole[k] if "embeddings" in k else v for k, v in frozen.items()})
    report = batch.examine(bounds=Bounds(copy=1.1, claim=1.1))
    kinds = ["biases only", "layers 1 only", "normalization only", "embeddings only"]
    assert [m.kind for m in report.measures] == kinds
    assert report.rejected == ()


def test_a_changed_integer_buffer_is_refused(batch: Batch) -> None:
    odd = finetuned(base_tensors(), 1)
    odd["bert.embeddings.position_ids"] = np.arange(20, dtype=np.int64)[None] + 1
    report = batch.honest(0, 2).add(odd).examine()
    assert reasons(report) == {"user2": Reason.BUFFERS}
    assert "bert.embeddings.position_ids differs" in detail(report)


def test_a_finetune_of_an_earlier_version_is_named_with_the_version(batch: Batch, tmp_path: Path) -> None:
    old = {k.removeprefix("bert."): v for k, v in finetuned(base_tensors(), 77, step=0.01).items() if "bert" in k}
    v1 = write_folder(tmp_path / "v1", {"model.safetensors": weights(base_tensors() | old)})
    stale = finetuned(base_tensors() | old, 3)
    report = batch.honest(0, 1).add(stale).examine(tag="v2", versions={"v1": v1})
    assert reasons(report) == {"user2": Reason.WRONG_BASE}
    assert detail(report).startswith("made from v1 (distance")
    assert [m.nearest for m in report.measures] == ["v2", "v2", "v1"]


def test_words_that_training_did_not_touch_tell_the_version_even_when_the_next_one_is_nearer(
    batch: Batch, tmp_path: Path
) -> None:
    # v1 = v0 + τ/2: a contribution that dominated the fuse is as near to v1 as to v0, and the noise of others makes
    # it nearer. Its untouched rows (20 … 49) shrank by weight decay and are v0's all the same.
    v0, tau = base_tensors(), finetuned(base_tensors(), 1)
    moved = {k.removeprefix("bert."): v for k, v in tau.items() if k.startswith("bert.")}
    other = {
        k.removeprefix("bert."): v for k, v in finetuned(base_tensors(), 2, 0.0005).items() if k.startswith("bert.")
    }
    v1 = {k: (v + 0.7 * (moved[k] - v) + (other[k] - v)).astype(np.float32) if k in moved else v for k, v in v0.items()}
    moved["embeddings.word_embeddings.weight"][20:] = v0["embeddings.word_embeddings.weight"][20:] * 0.9999
    current = write_folder(tmp_path / "current", {"model.safetensors": weights(v1)})
    old = write_folder(tmp_path / "old", {"model.safetensors": weights(v0)})
    batch.add(v0 | moved)
    report = examine(current, batch.entries, tag="v1", versions={"v0": old}, seed=3)
    (measured,) = report.measures
    assert measured.distances["v1"] < measured.distances["v0"]
    assert measured.nearest == "v0" and reasons(report) == {"user0": Reason.WRONG_BASE}


def test_a_finetune_of_another_pretraining_run_is_named(batch: Batch) -> None:
    report = batch.honest(0, 1).add(finetuned(base_tensors(seed=9), 3)).examine()
    assert reasons(report) == {"user2": Reason.WRONG_BASE} and "another pretraining run" in detail(report)


def test_a_file_that_is_not_what_was_screened_is_refused_and_the_others_go_on(batch: Batch) -> None:
    good = weights(finetuned(base_tensors(), 1))
    other = finetuned(base_tensors(), 1)
    other[WORDS] = other[WORDS][:40]
    batch.add({"model.safetensors": good[:-4]}).add(other).add({}).honest(3)
    batch.add({"model.safetensors": good} | sharded(finetuned(base_tensors(), 1)))
    report = batch.examine()
    assert set(reasons(report).values()) == {Reason.CORRUPT} and len(report.rejected) == 4
    assert [str(r) for r in report.accepted] == ["user3/model@000000000000"]


def test_links_pipes_and_folders_in_place_of_weights_are_not_opened(batch: Batch, tmp_path: Path) -> None:
    import os

    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(weights(finetuned(base_tensors(), 1)))
    batch.add({}).add({}).add({}).honest(1)
    (batch.entries[0][1] / "model.safetensors").symlink_to(secret)
    os.mkfifo(batch.entries[1][1] / "model.safetensors")
    (batch.entries[2][1] / "model.safetensors").mkdir()
    report = batch.examine()
    assert reasons(report) == {f"user{i}": Reason.CORRUPT for i in range(3)}
    assert "not a regular file" in report.rejected[1].detail


def test_a_file_cut_short_while_it_is_read_is_corrupt_and_the_others_go_on(batch: Batch) -> None:
    batch.honest(1, 2)
    target = batch.entries[0][1] / "model.safetensors"

    def cut(done: int, total: int) -> None:
        with open(target, "r+b") as handle:
            handle.truncate(9000)

    report = batch.examine(on_entries=cut)
    assert reasons(report) == {"user0": Reason.CORRUPT} and "cut off" in detail(report)


def test_an_earlier_version_that_is_not_finite_is_an_error(batch: Batch, tmp_path: Path) -> None:
    bad = base_tensors()
    bad["pooler.dense.bias"][0] = math.nan
    folder = write_folder(tmp_path / "v0", {"model.safetensors": weights(bad)})
    with pytest.raises(CheckpointError, match="version v0: pooler.dense.bias.0. is nan"):
        examine(batch.base, batch.honest(1).entries, versions={"v0": folder})


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_float_types_are_measured_as_float32(batch: Batch, dtype: str) -> None:
    plain = finetuned(base_tensors(), 1, step=0.01)
    batch.add({k: v.astype(dtype) for k, v in plain.items()}).honest(2, 3)
    measured = batch.examine().measures[0]
    assert measured.norm == pytest.approx(np.linalg.norm(task_vector(plain)), rel=1e-2)


def test_brain_floats_are_measured_too(batch: Batch) -> None:
    import ml_dtypes

    plain = finetuned(base_tensors(), 1, step=0.05)
    raw = {k: v.astype(ml_dtypes.bfloat16) for k, v in plain.items()}
    batch.add(raw).honest(2)
    exact = np.linalg.norm(task_vector({k: v.astype(np.float32) for k, v in raw.items()}))
    assert batch.examine().measures[0].norm == pytest.approx(exact, rel=1e-5)


def test_half_precision_that_overflows_is_not_finite(batch: Batch) -> None:
    raw = finetuned(base_tensors(), 1)
    raw[WORDS][0, 0] = 70_000.0
    with np.errstate(over="ignore"):
        half = {k: v.astype(np.float16) for k, v in raw.items()}
    assert reasons(batch.honest(0).add(half).examine()) == {"user1": Reason.NOT_FINITE}


def test_finite_values_whose_square_overflows_are_an_outlier_and_no_crash(batch: Batch) -> None:
    huge = finetuned(base_tensors(), 1)
    huge[WORDS][0, 0] = 3e38
    report = batch.honest(0).add(huge).examine()
    assert reasons(report) == {"user1": Reason.OUTLIER}
    assert dumps(report)


def test_a_base_that_is_not_finite_is_an_error(batch: Batch, tmp_path: Path) -> None:
    bad = base_tensors()
    bad["pooler.dense.bias"][0] = math.nan
    folder = write_folder(tmp_path / "bad", {"model.safetensors": weights(bad)})
    with pytest.raises(CheckpointError, match="pooler.dense.bias is not finite"):
        examine(folder, batch.honest(1).entries)


def test_nobody_is_a_batch_too(batch: Batch) -> None:
    report = batch.examine()
    assert report.measures == report.rejected == report.accepted == () and report.median == 0.0


def test_progress_ends_at_all_entries(batch: Batch) -> None:
    calls: list[tuple[int, int]] = []
    report = batch.honest(1).examine(on_entries=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (report.entries, report.entries)
    assert [d for d, _ in calls] == sorted(d for d, _ in calls)
