"""Inputs that come while the fuse is at work: the same bytes as with all of them there, and less on the disk."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hubfusion.errors import CheckpointError, NotFound, RecipeError
from hubfusion.fuse import FuseProgress, Settings, fuse
from hubfusion.fuse import inputs as sources
from hubfusion.fuse.folder import finish
from hubfusion.fuse.incremental import fuse_arriving
from hubfusion.fuse.inputs import fetched
from hubfusion.fuse.methods import METHODS
from hubfusion.fuse.methods.kinds import add_up
from hubfusion.hub import OnBytes, RepoKind
from hubfusion.lineage import Recipe, RemoteFile, Revision
from tests.fake_hub import FakeHub
from tests.random_checkpoints import backbone, load, recipe_of, save

BASE = backbone(100)
IDS = tuple(f"ann/m{i}" for i in range(1, 9))


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@dataclass
class WatchedHub(FakeHub):
    """A Hub that says what lies in the temporary folder after each download, and fails where it is told to."""

    room: Path = Path()
    fail: str = ""
    downloaded: list[str] = field(default_factory=list)
    seen: list[tuple[set[str], int]] = field(default_factory=list)

    def look(self) -> None:
        names, used = set(), 0
        for place, _, files in os.walk(self.room):  # from several threads, while folders go
            sizes = [size_of(Path(place, f)) for f in files if f.endswith(".safetensors")]
            used += sum(sizes)
            names |= {Path(place).name} if sum(sizes) and "@m" in place else set()
        self.seen.append((names, used))

    def download(
        self,
        revision: Revision,
        file: RemoteFile,
        target: Path,
        kind: RepoKind = RepoKind.MODEL,
        on_bytes: OnBytes | None = None,
    ) -> Path:
        if revision.repo == self.fail:
            raise NotFound(f"{revision} {file.path}: gone")
        found = super().download(revision, file, target, kind)
        self.downloaded.append(revision.repo)
        self.look()
        if on_bytes:
            on_bytes(file.size)
        return found


def push(hub: FakeHub, repo: str, folder: Path) -> Path:
    hub.add(repo, {p.name: p for p in folder.iterdir()})
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch) -> WatchedHub:
    """A Hub of our own behind `fetched`, and an empty temporary folder for what it fetches."""
    made = WatchedHub(room=tmp_path / "tmp")
    made.room.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(made.room))
    monkeypatch.setattr("hubfusion.hub.connect", lambda endpoint, token: made)
    return made


def publish(hub: FakeHub, place: Path, dtype: str = "float32") -> tuple[Path, list[Path]]:
    """ann/base with a state, and ann/m1 ... ann/m8, each of them another kind of finetune."""
    extra = {"pooler.dense.weight": np.eye(4), "pooler.dense.bias": np.ones(4)}
    positions = {"embeddings.position_ids": np.arange(5)}
    extra = {n: v.astype(np.dtype(dtype)) for n, v in extra.items()}
    base = save(place / "base", backbone(100, dtype) | extra | positions)
    save_file({f"momentum.{n}": np.ones(v.shape, np.float32) for n, v in BASE.items()}, base / "outer.safetensors")
    (base / "config.json").write_text('{"model_type": "bert"}')
    folders = []
    for i, name in enumerate(IDS, 1):
        moved = {n: (v * 1.5).astype(v.dtype) for n, v in extra.items()}
        whole = backbone(i, dtype, shift=BASE) | moved | positions
        folder = place / f"up{i}"
        if i == 2:
            whole = {f"bert.{n}": v for n, v in whole.items()}
        elif i == 4:
            whole["classifier.weight"] = np.ones((2, 4), np.dtype(dtype))
        elif i == 5:
            del whole["pooler.dense.weight"]
        elif i == 6:
            folder.mkdir()
            options = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["dense"]}
            (folder / "adapter_config.json").write_text(json.dumps(options))
            low = {"lora_A.weight": np.full((1, 6), 0.1, np.float32), "lora_B.weight": np.full((4, 1), 0.3, np.float32)}
            own = {f"base_model.model.encoder.layer.1.dense.{n}": v for n, v in low.items()}
            save_file(own, folder / "adapter_model.safetensors")
        elif i == 7:
            del whole["embeddings.position_ids"]
        if i != 6:
            save(folder, whole, shards=2 if i == 3 else 1)
        folders.append(push(hub, name, folder))
    push(hub, "ann/base", base)
    return base, folders


def recipe(*labels: str, coefficients: tuple[float, ...] = (), **fields) -> Recipe:
    return recipe_of(labels, coefficients, base="ann/base", **fields)


def on_arrival(given: Recipe, out: Path, on_event=None, **settings) -> None:
    with fetched(given, "", None, once=True) as found:
        assert found.arrivals is not None
        done = fuse_arriving(
            found.recipe, found.base, found.arrivals, out, settings=Settings(**settings), on_event=on_event
        )
        finish(found.recipe, found.base, done, out)


def all_there(given: Recipe, out: Path, **settings) -> None:
    with fetched(given, "", None) as found:
        assert found.arrivals is None
        done = fuse(found.recipe, found.base, found.inputs, out, settings=Settings(**settings))
        finish(found.recipe, found.base, done, out)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


UNEQUAL = (1.0, 2.5, 0.5, 1.0, 3.0, 0.3, 1.7, 1.0)


@pytest.mark.parametrize(
    "dtype, fields, settings",
    [
        ("float32", {}, {}),
        ("float32", {"coefficients": UNEQUAL}, {"norms": False}),
        ("float32", {"coefficients": (0.3,) * 8, "method": "task_arithmetic"}, {"workers": 1}),
        ("float32", {"coefficients": (-1.0, *UNEQUAL[1:]), "method": "task_arithmetic", "scale": 0.7}, {"workers": 3}),
        ("float32", {"outer": "nesterov", "scale": 0.3}, {"max_shard_bytes": 300}),
        ("float32", {"outer": "momentum", "outer_options": (("beta", 0.5),)}, {"digest": False}),
        ("float16", {"coefficients": UNEQUAL}, {}),
        ("bfloat16", {}, {}),
        ("float64", {"coefficients": UNEQUAL}, {}),
    ],
)
def test_the_files_are_those_of_a_fuse_of_all_inputs_together(hub, tmp_path, dtype, fields, settings):
    publish(hub, tmp_path, dtype)
    given = recipe(*reversed(IDS), **fields)  # not the canonical order
    on_arrival(given, tmp_path / "one by one", **settings)
    all_there(given, tmp_path / "together", **settings)
    assert contents(tmp_path / "one by one") == contents(tmp_path / "together")
    manifest = json.loads((tmp_path / "together" / "fuse.json").read_text())
    assert manifest["kept_from_base"] == ["embeddings.position_ids", "pooler.dense.weight"]  # which ann/m5 lacks
    assert list(hub.room.iterdir()) == []


@pytest.mark.parametrize("cut", [1, 2, 4])
@pytest.mark.parametrize(
    "method, coefficients",
    [
        ("average", (1.0,) * 5),
        ("average", (1.0, 2.0, 0.1, 3.0, 0.7)),
        ("task_arithmetic", (0.3,) * 5),
        ("task_arithmetic", (0.3, 0.3, 0.3, 0.3, -1.0)),  # equal in a part, not in the whole
    ],
)
def test_a_sum_in_two_parts_has_the_bits_of_the_whole(method, coefficients, cut):
    deltas = np.random.default_rng(0).standard_normal((5, 1000)).astype(np.float32)
    whole = METHODS[method].function(deltas, coefficients)
    total = METHODS[method].as_sum(coefficients)
    part = add_up(zip(deltas[:cut], total.factors[:cut], strict=True))
    parts = total.finish(add_up(zip(deltas[cut:], total.factors[cut:], strict=True), part))
    assert parts.tobytes() == whole.tobytes()
    share = sum(coefficients) if method == "average" else 1
    np.testing.assert_allclose(whole, np.array(coefficients) @ deltas.astype(float) / share, atol=1e-6)


def test_the_sum_is_what_an_independent_mean_says(hub, tmp_path):
    _, folders = publish(hub, tmp_path)
    on_arrival(recipe(*IDS), tmp_path / "out")
    name = "encoder.layer.0.dense.weight"
    whole = [load(f) for i, f in enumerate(folders, 1) if i != 6]
    mean = sum((t.get(name, t.get(f"bert.{name}")).astype(float) for t in whole), BASE[name].astype(float)) / 8
    np.testing.assert_allclose(load(tmp_path / "out")[name], mean, rtol=1e-6)  # the adapter leaves it at the base's


def test_one_wide_input_that_comes_last_makes_the_whole_sum_wide(hub, tmp_path):
    publish(hub, tmp_path)
    push(hub, "zoe/wide", save(tmp_path / "wide", backbone(9, "float64", shift=BASE)))
    given = recipe("zoe/wide", *IDS)
    on_arrival(given, tmp_path / "one by one")
    all_there(given, tmp_path / "together")
    assert contents(tmp_path / "one by one") == contents(tmp_path / "together")


def test_at_most_four_inputs_and_the_sum_lie_on_the_disk(hub, tmp_path):
    for i, name in enumerate(("ann/base", *IDS)):
        tensors = backbone(i, shift=BASE if i else None) | {"big": np.full(50_000, float(i), np.float32)}
        push(hub, name, save(tmp_path / f"up{i}", tensors))
    on_arrival(recipe(*IDS), tmp_path / "out", lambda event: hub.look())
    size = (tmp_path / "up1" / "model.safetensors").stat().st_size
    assert sorted(hub.downloaded) == ["ann/base", *IDS]
    assert 1 < max(len(names) for names, _ in hub.seen) <= 4
    assert max(used for _, used in hub.seen) <= (1 + 1 + 4) * size + 1000  # base, sum, four inputs, not all eight
    assert hub.seen[-1][0] == set()  # the last one is gone while the result is written
    assert list(hub.room.iterdir()) == []


def test_others_come_while_one_is_added(hub, tmp_path):
    publish(hub, tmp_path)
    waiting, seen_by = threading.Event(), []
    real = WatchedHub.download

    def download(self, revision, file, target, kind=RepoKind.MODEL, on_bytes=None):
        if revision.repo == "ann/m2":
            assert waiting.wait(20)
        return real(self, revision, file, target, kind, on_bytes)

    def on_event(event: FuseProgress) -> None:
        seen_by.append(event.done)
        waiting.set()

    hub.download = download.__get__(hub)
    on_arrival(recipe(*IDS), tmp_path / "out", on_event)
    entries = sum(v.size for v in BASE.values()) + 4
    assert seen_by[0] <= entries  # the first event is of ann/m1 alone: ann/m2 came only after it
    assert seen_by == sorted(seen_by) and seen_by[-1] == 9 * entries


def test_local_folders_and_inputs_that_are_needed_elsewhere_stay(hub, tmp_path):
    base, folders = publish(hub, tmp_path)
    local = str(folders[0])
    given = recipe("ann/base", local, *IDS, IDS[6])
    on_arrival(given, tmp_path / "one by one")
    all_there(given, tmp_path / "together")
    assert contents(tmp_path / "one by one") == contents(tmp_path / "together")
    assert (folders[0] / "model.safetensors").is_file()


def test_bytes_are_counted_to_the_end(hub, tmp_path):
    base, folders = publish(hub, tmp_path)
    told: list[tuple[int, int]] = []
    with fetched(recipe(*IDS), "", None, lambda *event: told.append(event), once=True) as found:
        fuse_arriving(found.recipe, found.base, found.arrivals, tmp_path / "out")
    sizes = sum(p.stat().st_size for f in folders for p in f.iterdir()) + (base / "config.json").stat().st_size
    sizes += (base / "model.safetensors").stat().st_size
    assert told[-1] == (sizes, sizes) and [d for d, _ in told] == sorted(d for d, _ in told)


# ------------------------------------------------------------------------------------------------ what goes wrong
def arrives_badly(hub: WatchedHub, tmp_path: Path, error: type[Exception], match: str) -> list[FuseProgress]:
    """Fuse into a folder with an older checkpoint; nothing of it changes, and nothing fetched stays."""
    events: list[FuseProgress] = []
    older = contents(save(tmp_path / "out", backbone(50)))
    with pytest.raises(error, match=match):
        on_arrival(recipe(*IDS), tmp_path / "out", events.append)
    assert contents(tmp_path / "out") == older
    assert list(hub.room.iterdir()) == []
    return events


@pytest.mark.parametrize(
    "change, match",
    [
        ({"encoder.layer.0.dense.bias": np.ones(7, np.float32)}, r"m7@.*bias has shape \[7\], the base has \[6\]"),
        ({"encoder.layer.9.dense.bias": np.ones(6, np.float32)}, "m7@.*layer.9.dense.bias lies in the backbone"),
        ({"encoder.layer.9.w": np.ones((6, 4), np.float32)}, "m7@.*layer.9.w lies in the backbone"),
        ({"encoder.layer.0.dense.bias": None}, "m7@.*bias of the base is missing"),
        ({"embeddings.position_ids": np.arange(5)[::-1]}, "m7@.*position_ids: buffer differs from the base's"),
    ],
)
def test_a_misfit_is_named_before_anything_is_added(hub, tmp_path, change, match):
    publish(hub, tmp_path)
    tensors = {n: v for n, v in (backbone(7, shift=BASE) | change).items() if v is not None}
    push(hub, "ann/m7", save(tmp_path / "misfit", tensors))
    assert arrives_badly(hub, tmp_path, CheckpointError, match) == []
    assert "ann/m7" not in hub.downloaded


def test_an_input_that_is_not_finite_is_named_with_its_entry(hub, tmp_path):
    publish(hub, tmp_path)
    tensors = backbone(7, shift=BASE)
    tensors["encoder.layer.0.dense.weight"][2, 1] = np.nan
    push(hub, "ann/m7", save(tmp_path / "nan", tensors))
    assert arrives_badly(hub, tmp_path, CheckpointError, "m7@.*layer.0.dense.weight: entry 9 minus the base's is nan")


def test_a_sum_that_overflows_names_the_parameter(hub, tmp_path):
    publish(hub, tmp_path)
    for name in ("ann/m1", "ann/m7"):
        tensors = backbone(7, shift=BASE)
        tensors["encoder.layer.0.dense.bias"][3] = 3e38
        push(hub, name, save(tmp_path / f"huge {name[-1]}", tensors))
    assert arrives_badly(hub, tmp_path, CheckpointError, "layer.0.dense.bias: entry 3 would be inf in F32")


def test_an_input_that_fails_on_the_way_is_named(hub, tmp_path):
    publish(hub, tmp_path)
    hub.fail = "ann/m7"
    arrives_badly(hub, tmp_path, NotFound, "ann/m7@.*model.safetensors: gone")


def test_an_input_that_is_not_what_its_header_said_is_refused(hub, tmp_path):
    publish(hub, tmp_path)
    real = hub.read
    hub.read = lambda *what, **where: real(*what, **where).replace(b"classifier", b"qa_outputs")  # ann/m4 has that head
    arrives_badly(hub, tmp_path, CheckpointError, "m4@.*not those of the headers that were read before")


def test_a_state_of_another_optimizer_is_named_before_anything_is_added(hub, tmp_path):
    publish(hub, tmp_path)
    events: list[FuseProgress] = []
    with pytest.raises(CheckpointError, match="ema keeps ema; this state has momentum"):
        on_arrival(recipe(*IDS, outer="ema"), tmp_path / "out", events.append)
    assert events == []


def test_an_interrupted_fuse_leaves_nothing(hub, tmp_path):
    publish(hub, tmp_path)

    def on_event(event: FuseProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        on_arrival(recipe(*IDS), tmp_path / "out", on_event)
    assert list(hub.room.iterdir()) == [] and list((tmp_path / "out").iterdir()) == []


def test_the_output_may_not_be_an_input(hub, tmp_path):
    _, folders = publish(hub, tmp_path)
    before = contents(folders[0])
    with pytest.raises(CheckpointError, match="the output folder must be neither the base nor an input"):
        on_arrival(recipe(str(folders[0]), *IDS), folders[0])
    assert contents(folders[0]) == before


# ------------------------------------------------------------------------------------------------- when it is done
@pytest.mark.parametrize(
    "fields, labels, once, comes",
    [
        ({}, IDS, True, True),
        ({}, IDS, False, False),
        ({"options": (("norm", "clip"),)}, IDS, True, False),  # needs all norms first
        ({"method": "ties"}, IDS, True, False),
        ({}, IDS[:4], True, False),  # no more than may be on the disk together
    ],
)
def test_inputs_come_during_the_fuse_only_when_each_is_needed_once(hub, tmp_path, fields, labels, once, comes):
    publish(hub, tmp_path)
    with fetched(recipe(*labels, **fields), "", None, once=once) as found:
        assert (found.arrivals is not None) is comes
        if not comes:
            assert all(path.is_dir() for path in found.inputs)


def test_a_sum_that_takes_more_room_than_it_saves_is_not_begun(hub, tmp_path):
    for i, name in enumerate(("ann/base", *IDS)):
        push(hub, name, save(tmp_path / f"up{i}", {"encoder.weight": np.ones(50_000, np.dtype("bfloat16"))}))
    for count, comes in (
        (5, False),
        (6, False),
        (7, True),
    ):  # a sum in float32 is two of these, and four lie there anyway
        with fetched(recipe(*IDS[:count]), "", None, once=True) as found:
            assert (found.arrivals is not None) is comes


def test_the_room_that_is_asked_for_is_what_lies_on_the_disk_together(hub, tmp_path, monkeypatch):
    for i, name in enumerate(("ann/base", *IDS)):
        push(hub, name, save(tmp_path / f"up{i}", {"encoder.weight": np.ones(50_000, np.float32)}))
    size = (tmp_path / "up1" / "model.safetensors").stat().st_size
    for free, fits in ((6 * size, True), (6 * size - 1000, False)):
        monkeypatch.setattr(sources.shutil, "disk_usage", lambda path, free=free: type("Usage", (), {"free": free})())
        if fits:
            on_arrival(recipe(*IDS), tmp_path / "out")
        else:
            with pytest.raises(RecipeError, match=f"bytes are needed, {free} are free"):
                on_arrival(recipe(*IDS), tmp_path / "out")
