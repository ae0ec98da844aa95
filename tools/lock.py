"""Write ``requirements/*.txt``: exact versions with the hashes of every file of each, for all systems and Pythons.

Pins that hold stay; ``--upgrade`` takes the newest of each. Needs uv (``pip install uv``), which nothing else does.

- ``dev.txt``: what `make` and CI install, with the build backend, but for torch.
- ``torch.txt``: torch from the registry, with the CUDA packages that it needs on Linux.
- ``torch-cpu.txt``: its CPU-only build, which is not on the registry; `make` takes it where pip finds it.
- ``ray.txt``, ``sign.txt``, ``bench.txt``, ``release.txt``: what the extra of this name adds to these.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "requirements"
EXTRAS = ("ray", "sign", "bench", "release")
TORCH = re.compile(r"(cuda|nvidia)-|(torch|triton)==")
HASH = "    --hash=sha256:"

Pins = dict[str, list[str]]  # what stands before the hashes (name, version, marker) → the hashes


def main(argv: list[str] | None = None) -> None:
    """Resolve and write every file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="take the newest version of every package")
    parser.add_argument("--wheel", type=Path, action="append", default=[], help="a CPU-only build of torch")
    arguments = parser.parse_args(argv)
    old: Pins = {}
    if not arguments.upgrade:
        for name in ("dev", "torch", *EXTRAS):
            old |= read(FOLDER / f"{name}.txt")
    dev = resolve(("dev",), old)
    pins = old | dev
    for extra in EXTRAS:
        more = resolve(("dev", extra), pins)
        pins |= more  # what two extras need is the same in both files
        write(extra, {pin: hashes for pin, hashes in more.items() if pin not in dev})
    write("torch-cpu", cpu_builds(next(pin for pin in dev if pin.startswith("torch==")), arguments.wheel))
    write("torch", {pin: hashes for pin, hashes in dev.items() if TORCH.match(pin)})
    write("dev", {pin: hashes for pin, hashes in dev.items() if not TORCH.match(pin)})


def resolve(extras: tuple[str, ...], pins: Pins) -> Pins:
    """Every package that hubfusion with ``extras`` needs on any system, at ``pins`` where it has one."""
    command = ["uv", "pip", "compile", "pyproject.toml", "--universal", "--python-version", "3.11", "--no-config"]
    command += ["--generate-hashes", "--no-annotate", "--no-header", "--quiet"]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "pins.txt"
        constraints.write_text("\n".join(pins), encoding="utf-8")
        command += ["--constraint", str(constraints), *(f"--extra={extra}" for extra in extras)]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            sys.exit("lock: uv is not installed, pip install uv")
    if done.returncode:
        sys.exit(f"lock: uv: {done.stderr.strip()}")
    return parse(done.stdout)


def read(path: Path) -> Pins:
    """The pins of a file that `write` wrote."""
    return parse(path.read_text(encoding="utf-8"))


def parse(text: str) -> Pins:
    """Pins and hashes of a requirements file.

    >>> parse("# made by …\\na==1 ; os_name == 'nt' \\\\\\n    --hash=sha256:01 \\\\\\n    --hash=sha256:02\\n")
    {"a==1 ; os_name == 'nt'": ['01', '02']}
    """
    pins: Pins = {}
    for line in (line.removesuffix("\\").rstrip() for line in text.splitlines()):
        if line.startswith(HASH):
            pins[next(reversed(pins))].append(line.removeprefix(HASH))
        elif line and not line.startswith("#"):
            pins[line] = []
    return pins


def cpu_builds(torch: str, wheels: Sequence[Path]) -> Pins:
    """The pin of the CPU-only build of ``torch`` with the hashes of ``wheels`` and those already known."""
    path, pin = FOLDER / "torch-cpu.txt", f"{torch}+cpu"
    known = read(path).get(pin, []) if path.exists() else []
    for wheel in wheels:
        if "==".join(wheel.name.split("-")[:2]) != pin:
            sys.exit(f"lock: --wheel must be of {pin}, got {wheel.name}")
        known = [*known, hashlib.sha256(wheel.read_bytes()).hexdigest()]
    if not known:
        sys.exit(f"lock: no hash is known of {pin}, name its file with --wheel")
    return {pin: known}


def write(name: str, pins: Pins) -> None:
    """Write one file."""
    lines = ["# Made by tools/lock.py, see CONTRIBUTING."]
    for pin, hashes in pins.items():
        lines += [f"{pin} \\", " \\\n".join(HASH + digest for digest in sorted(set(hashes)))]
    (FOLDER / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
