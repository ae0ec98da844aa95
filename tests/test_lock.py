"""The lock holds what pyproject.toml asks for, and a hash of every file."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools import lock

PROJECT = tomllib.loads((lock.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FILES = sorted(lock.FOLDER.glob("*.txt"))


def pins(*names: str) -> dict[str, str]:
    files = [lock.read(lock.FOLDER / f"{name}.txt") for name in names]
    return {name: version for pin in sum(map(list, files), []) for name, version in [pin.split(" ")[0].split("==")]}


@pytest.mark.parametrize("extra", ["", "dev", *lock.EXTRAS])
def test_every_dependency_is_pinned_within_its_bounds(extra: str) -> None:
    project = PROJECT["project"]
    asked = project["optional-dependencies"][extra] if extra else project["dependencies"]
    asked = asked + PROJECT["build-system"]["requires"]
    pinned = pins("dev", "torch", *[extra] * (extra in lock.EXTRAS))
    for requirement in map(Requirement, asked):
        name = requirement.name.lower().replace("_", "-")
        assert name in pinned, f"{name} is not in requirements/: run tools/lock.py"
        assert pinned[name] in requirement.specifier, f"{requirement}: {pinned[name]} is pinned, run tools/lock.py"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_pin_has_the_hashes_of_its_files(path: Path) -> None:
    for pin, hashes in lock.read(path).items():
        assert "==" in pin and hashes
        assert all(len(digest) == 64 and set(digest) <= set("0123456789abcdef") for digest in hashes)


def test_the_cpu_only_build_is_of_the_pinned_torch() -> None:
    assert pins("torch-cpu")["torch"] == pins("torch")["torch"] + "+cpu"


def test_a_new_torch_needs_a_wheel_of_its_version(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no hash is known of torch==99\.0\+cpu"):
        lock.cpu_builds("torch==99.0", [])
    old, new = (tmp_path / f"torch-{version}+cpu-cp311-cp311-linux_x86_64.whl" for version in ("98.0", "99.0"))
    with pytest.raises(SystemExit, match=r"must be of torch==99\.0\+cpu, got torch-98\.0"):
        lock.cpu_builds("torch==99.0", [old])
    new.write_bytes(b"wheel")
    assert lock.cpu_builds("torch==99.0", [new]) == {"torch==99.0+cpu": [hashlib.sha256(b"wheel").hexdigest()]}


def test_what_is_written_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "FOLDER", tmp_path)
    written = {"a==1": ["02", "01"], "b==2 ; sys_platform == 'linux'": ["03"]}
    lock.write("some", written)
    assert lock.read(tmp_path / "some.txt") == {pin: sorted(hashes) for pin, hashes in written.items()}
