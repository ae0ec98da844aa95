from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hubfusion.checkpoint import Parameter, encode, open_checkpoint, plan_shards, write_checkpoint
from hubfusion.errors import CheckpointError
from tests.random_checkpoints import load, save

SPECS = [Parameter("a", "F32", (2, 3), Path()), Parameter("b", "BF16", (5,), Path()), Parameter("c", "I64", (), Path())]


def write(folder: Path, value: float = 1.0, specs: list[Parameter] = SPECS, **options: int):
    with write_checkpoint(folder, specs, **options) as writing:
        for spec in specs:
            if spec.is_float:
                writing.write(spec.name, 0, np.full(spec.entries, value, np.float32))
            else:
                writing.write_bytes(spec.name, 0, np.full(spec.entries, 7, np.int64).tobytes())
    return writing.written


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_float_dtype_is_read_exactly_from_one_file_and_from_shards(tmp_path, dtype, shards):
    values = np.array([0.0, -1.5, 2.0**-14, 3.140625, 65504.0], np.float64).astype(np.dtype(dtype))
    save(tmp_path, {"x": values, "y": values[:2], "z": values[1:4]}, shards)
    with open_checkpoint(tmp_path) as checkpoint:
        out = np.empty(3, np.float32)
        checkpoint.read("x", 1, out)
    assert out.tolist() == values[1:4].astype(np.float64).tolist()


def test_float64_is_read_whole_into_float64(tmp_path):
    save(tmp_path, {"x": np.array([1 + 2.0**-50])})
    out = np.empty(1, np.float64)
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.read("x", 0, out)
    assert out[0] == 1 + 2.0**-50


def test_what_is_written_is_read_back_by_the_safetensors_library(tmp_path):
    written = write(tmp_path, 0.1)
    tensors = load(tmp_path)
    assert tensors["a"].tolist() == np.full((2, 3), 0.1, np.float32).tolist()
    assert tensors["b"].astype(np.float32).tolist() == [0.10009765625] * 5
    assert tensors["c"] == 7 and tensors["c"].shape == ()
    file = tmp_path / "model.safetensors"
    assert [(f.name, f.size, f.sha256) for f in written] == [(file.name, file.stat().st_size, sha256_of(file))]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors"]


def sha256_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("told", ["all", "some", "none"])
@pytest.mark.parametrize("limit", [10**9, 5000])
def test_the_digest_is_that_of_the_file_however_its_pieces_come(tmp_path, limit, told):
    shapes = {"a": (300,), "b": (0, 4), "c": (70, 7), "d": (), "e": (1000,)}
    specs = [Parameter(n, "F16" if n == "c" else "F32", s, Path()) for n, s in shapes.items()]
    chunks = [(s, first) for s in specs for first in range(0, max(s.entries, 1), 64)]
    rng = np.random.default_rng(0)
    rng.shuffle(chunks)
    with write_checkpoint(tmp_path, specs, max_shard_bytes=limit) as writing:
        for number, (spec, first) in enumerate(chunks):
            last = min(first + 64, spec.entries)
            writing.write(spec.name, first, rng.standard_normal(last - first))
            if told == "all" or (told == "some" and number % 3):
                writing.digest(spec.name, first, last)
    assert len(writing.written) == (1 if limit == 10**9 else 2)
    assert [f.sha256 for f in writing.written] == [sha256_of(tmp_path / f.name) for f in writing.written]


def test_a_disk_without_room_is_told_before_the_work_and_holds_nothing(tmp_path, monkeypatch):
    write(tmp_path, 1.0)
    before, opened = (tmp_path / "model.safetensors").read_bytes(), len(os.listdir("/proc/self/fd"))

    def refuse(descriptor: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 2.0, max_shard_bytes=24)
    assert len(os.listdir("/proc/self/fd")) == opened
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, None])
def test_where_room_cannot_be_reserved_the_file_is_written_all_the_same(tmp_path, monkeypatch, number):
    def refuse(descriptor: int, start: int, size: int) -> None:
        raise OSError(number, os.strerror(number))

    wanted = [f.sha256 for f in write(tmp_path / "here")]
    if number is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert [f.sha256 for f in write(tmp_path / "there")] == wanted


def test_a_file_that_is_cut_off_by_another_while_it_is_written_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"model.safetensors: cut off at byte \d+ while being hashed"):
        with write_checkpoint(tmp_path, SPECS) as writing:
            os.truncate(next(iter(writing.descriptors)), 20)
            writing.digest("a", 0, 6)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", range(5))
def test_bfloat16_is_rounded_to_nearest_even_as_torch_rounds_it(seed):
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(seed).integers(0, 2**32, 10_000, np.uint32)
    values = bits.view(np.float32)
    ties = ((bits & 0xFFFF0000) | 0x8000).view(np.float32)
    for floats in (values[np.isfinite(values)], ties[np.isfinite(ties)]):
        rounded = torch.from_numpy(floats).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        assert encode(floats, "BF16").tolist() == rounded.tolist()


@pytest.mark.parametrize("dtype, value", [("F32", np.inf), ("F16", 65520.0), ("BF16", 3.4e38), ("BF16", np.nan)])
def test_what_would_not_be_finite_in_the_output_dtype_is_refused_by_name(tmp_path, dtype, value):
    spec = Parameter("layer.bias", dtype, (3,), Path())
    with pytest.raises(CheckpointError, match=rf"layer.bias: entry 1 would be .* in {dtype}"):
        with write_checkpoint(tmp_path / "out", [spec]) as writing:
            writing.write("layer.bias", 0, np.array([0, value, 0], np.float32))
    assert list((tmp_path / "out").iterdir()) == []


def test_shards_are_filled_in_canonical_order_up_to_the_limit():
    specs = [Parameter(n, d, (10,), Path()) for n, d in [("z", "F32"), ("b", "F16"), ("a", "F32"), ("i", "I64")]]
    assert [[p.name for p in shard] for shard in plan_shards(specs, 90)] == [["i"], ["a", "z"], ["b"]]
    assert [[p.name for p in shard] for shard in plan_shards(specs, 1)] == [["i"], ["a"], ["z"], ["b"]]


def test_transformers_reads_the_shards_and_index_that_we_write(tmp_path):
    pytest.importorskip("torch")
    from safetensors import safe_open

    write(tmp_path, 2.0, max_shard_bytes=24)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    with safe_open(tmp_path / "model-00001-of-00003.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"} and list(file.keys()) == ["c"]
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.parameters) == ["a", "b", "c"]


def test_a_reused_folder_never_mixes_old_and_new_weights(tmp_path):
    write(tmp_path, 1.0, max_shard_bytes=24)
    (tmp_path / "fuse.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    write(tmp_path, 2.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    write(tmp_path, 3.0, max_shard_bytes=24)
    assert "model.safetensors" not in {p.name for p in tmp_path.iterdir()}
    assert load(tmp_path)["a"][0, 0] == 3.0


def test_an_exception_while_writing_leaves_the_old_checkpoint_as_it_was(tmp_path):
    write(tmp_path, 1.0)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(RuntimeError):
        with write_checkpoint(tmp_path, SPECS) as writing:
            writing.write("a", 0, np.zeros(6, np.float32))
            raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_killed_writer_leaves_nothing_that_looks_finished_and_the_next_one_cleans_up(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from hubfusion.checkpoint import Parameter, write_checkpoint\n"
        "with write_checkpoint(Path(sys.argv[1]), [Parameter('a', 'F32', (4,), Path())]):\n"
        "    print('writing', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(CheckpointError, match="another fuse is writing here"):
        write(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    time.sleep(0.01)
    assert not (tmp_path / "model.safetensors").exists()
    write(tmp_path, 5.0)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_truncated_file_is_named(tmp_path):
    save(tmp_path, {"x": np.zeros(10, np.float32)})
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"model.safetensors: is cut off"):
        with open_checkpoint(tmp_path):
            pass


def test_a_file_cut_off_while_it_is_read_is_named(tmp_path):
    save(tmp_path, {"x": np.zeros(10, np.float32)})
    with open_checkpoint(tmp_path) as checkpoint:
        os.truncate(tmp_path / "model.safetensors", 60)
        with pytest.raises(CheckpointError, match="x: cut off at byte"):
            checkpoint.read("x", 0, np.empty(10, np.float32))


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path):
    save(tmp_path, {"x": np.zeros(1, np.float32), "y": np.zeros(1, np.float32)}, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"y"', '"z"'))
    with pytest.raises(CheckpointError, match="y: the index places it in None"):
        with open_checkpoint(tmp_path):
            pass


def test_a_folder_without_weights_says_what_it_needs(tmp_path):
    with pytest.raises(CheckpointError, match="no model.safetensors or model.safetensors.index.json in it"):
        with open_checkpoint(tmp_path):
            pass
    with pytest.raises(CheckpointError, match="no such file or folder"):
        with open_checkpoint(tmp_path / "missing"):
            pass
