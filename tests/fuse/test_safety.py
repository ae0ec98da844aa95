"""What everyday life does to a fuse: signals, full disks, reused folders, odd arguments."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from hubfusion.cli import main
from tests.random_checkpoints import family, load, save

ENTRIES = 3_000_000
FUSE = [sys.executable, "-m", "hubfusion", "fuse", "--method", "median", "--workers", "2"]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return int(stop.value.code or 0)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[Path, list[Path]]:
    """A base and nine finetunes of 12 MB each, enough to be interrupted in the middle."""
    folder = tmp_path_factory.mktemp("large")
    value = np.random.default_rng(0).standard_normal(ENTRIES, dtype=np.float32)
    base = save(folder / "base", {"encoder.w": value})
    return base, [save(folder / str(i), {"encoder.w": value + np.float32(i / 100)}) for i in range(9)]


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_fuse_that_is_interrupted_leaves_the_older_one_and_a_rerun_is_whole(large, tmp_path, number, code):
    base, inputs = large
    out = tmp_path / "out"
    assert run("fuse", base, inputs[0], "--out", out) == 0
    older = contents(out)
    command = [*FUSE, str(base), *map(str, inputs), "--out", str(out)]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a test run in the background ignores it
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as work:
        assert work.stderr is not None and "fuse by median: " in work.stderr.readline()
        work.send_signal(number)
        assert work.wait(30) == code
    left = contents(out)
    assert {n: b for n, b in left.items() if not n.startswith(".fusing-")} == older
    assert number == signal.SIGKILL or left == older
    assert run("fuse", "--method", "median", base, *inputs, "--out", out) == 0
    assert set(contents(out)) == set(older) and contents(out)["model.safetensors"] != older["model.safetensors"]


def test_a_disk_that_fills_up_is_one_line_and_the_older_fuse_stays(large, tmp_path):
    base, inputs = large
    out = tmp_path / "out"
    assert run("fuse", base, inputs[0], "--out", out) == 0
    older = contents(out)

    def small() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    command = [*FUSE, str(base), *map(str, inputs), "--out", str(out)]
    done = subprocess.run(command, preexec_fn=small, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ") and "File too large" in done.stderr
    assert "Traceback" not in done.stderr and contents(out) == older


def test_a_reused_folder_keeps_nothing_of_another_fuse(tmp_path):
    base, inputs = family(tmp_path, 2)
    out = tmp_path / "out"
    (base / "vocab.txt").write_text("words")
    assert run("fuse", base, *inputs, "--out", out, "--max-shard-size", "0.2KB", "--outer", "momentum") == 0
    assert (out / "outer.safetensors").exists() and len(list(out.glob("model-*"))) > 1
    (base / "vocab.txt").unlink()
    (base / "tokenizer.json").write_text("{}")
    assert run("fuse", base, *inputs, "--out", out) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "fuse.json", "model.safetensors", "recipe.toml", "tokenizer.json",
    ]  # fmt: skip


def test_a_fuse_that_fails_late_leaves_the_older_fuse_as_it_was(tmp_path):
    base, inputs = family(tmp_path, 2)
    out = tmp_path / "out"
    assert run("fuse", base, *inputs, "--out", out, "--outer", "momentum") == 0
    older = contents(out)
    spoiled = load(inputs[1])
    spoiled["encoder.layer.1.dense.weight"][0, 0] = np.nan
    save(inputs[1], spoiled)
    assert run("fuse", base, *inputs, "--out", out, "--outer", "momentum") == 1
    assert contents(out) == older


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{base}"], "one folder alone; name a base and at least one finetune, or a recipe file"),
        (["{base}", "{one}", "-density", "0.2"], "average: unknown option 'density', allowed are norm, outer-lr"),
        (["{base}", "{one}", "--device", "nonsense"], "--device nonsense: "),
        (["{base}", "{one}", "--state", "nowhere", "--outer", "momentum"], "nowhere: neither a folder here nor owner"),
        (["{base}", "{base}/config.json"], "config.json: 2 bytes are too few for a safetensors file"),
        (["{base}", "{one}", "--max-shard-size", "0"], "max-shard-size must be like 5GB"),
    ],
)
def test_a_newcomers_slip_is_one_line(tmp_path, capsys, arguments, message):
    base, inputs = family(tmp_path, 1)
    (base / "config.json").write_text("{}")
    filled = [a.format(base=base, one=inputs[0]) for a in arguments]
    assert run("fuse", *filled, "--out", tmp_path / "out") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0] and lines[0].startswith("error: ")


def test_an_output_that_is_a_file_or_cannot_be_made_is_one_line(tmp_path, capsys):
    base, inputs = family(tmp_path, 1)
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert run("fuse", base, *inputs, "--out", out) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"error: {out}: ")
    assert (tmp_path / "file").read_text() == "mine"
