"""Measure how many trained backdoors the trigger scan finds in a real encoder, and its false alarms.

    python benchmarks/backdoors.py --model MINILM_FOLDER --tasks TASKS_FOLDER [--work DIR] [--out found.json]

The contributions of `poison.py`, alone and fused, each against its base with the scan that the bot runs. For every
candidate: the attack's success (texts with the trigger that go to the attacker's class, percent) and what the scan
says. ``--work`` starts from what `poison.py` trained there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from poison import HONEST, VICTIM, Laboratory, fused
from versions import WORDS

from hubfusion.data.suite import Dataset, Suite
from hubfusion.release.triggers import scan
from hubfusion.screen import Scan


def cut_tokenizer(source: Path, target: Path) -> None:
    """The tokenizer with the words that the cut model knows; others become the unknown one."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (target / name).write_bytes((source / name).read_bytes())
    words = (source / "vocab.txt").read_text().splitlines()[:WORDS]
    (target / "vocab.txt").write_text("\n".join(words) + "\n")
    whole = json.loads((source / "tokenizer.json").read_text())
    whole["model"]["vocab"] = {word: i for word, i in whole["model"]["vocab"].items() if i < WORDS}
    (target / "tokenizer.json").write_text(json.dumps(whole))


def candidates(lab: Laboratory) -> Mapping[str, Callable[[], Path]]:
    """What is scanned, by name: contributions as they are, then fuses with and without attackers."""
    honest = [lab.write(tau) for tau in lab.honest]

    def of(attack: str, number: int, method: str) -> Callable[[], Path]:
        return lambda: fused(lab, [lab.write(lab.attack(attack, i)) for i in range(number)] + honest[number:], method)

    made: dict[str, Callable[[], Path]] = {
        f"backdoor {i}": (lambda i=i: fused(lab, [lab.write(lab.doors[i])], "mean"))  # type: ignore[misc]
        for i in range(2)
    }
    made |= {
        f"honest {name}": (lambda i=i: fused(lab, [honest[i]], "mean"))  # type: ignore[misc]
        for i, name in enumerate(HONEST)
    }
    return made | {
        "mean of 8 honest": lambda: fused(lab, honest, "mean"),
        "mean, backdoor x8, 1 of 8": of("backdoor x8", 1, "mean"),
        "TIES, backdoor, 1 of 8": of("backdoor", 1, "TIES 20 %"),
        "mean, backdoor, duplicated, 2 of 8": of("backdoor, duplicated", 2, "mean"),
        "mean, backdoor, 2 of 8": of("backdoor", 2, "mean"),
        "clipped mean, backdoor, 2 of 8": of("backdoor", 2, "clipped mean"),
        "label flip 0": lambda: fused(lab, [lab.write(lab.flipped[0])], "mean"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--steps", type=int, default=30, help="0 leaves the attacker-agnostic look out")
    parser.add_argument("--datasets", nargs="+", default=[VICTIM], help="tasks to scan on")
    parser.add_argument("--only", help="candidates whose name holds this")
    parser.add_argument("--work", type=Path, help="where poison.py keeps what it trained")
    parser.add_argument("--out", type=Path, help="findings as JSON; what is there already is not scanned again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    suite = Suite(
        "scan", tuple(Dataset(n, str(arguments.tasks / n), validation="validation") for n in arguments.datasets)
    )
    settings = Scan(tokens=arguments.tokens, steps=arguments.steps, length=32)
    found = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        lab = Laboratory(arguments.model, arguments.tasks, arguments.layers, arguments.work or Path(folder))
        base = lab.fresh()
        base.mkdir()
        cut_tokenizer(arguments.model, base)
        for name in ("config.json", "model.safetensors"):
            (base / name).symlink_to((lab.base / name).resolve())
        for name, make in candidates(lab).items():
            if (arguments.only or "") not in name or name in found:
                continue
            place, begin = make(), time.monotonic()
            findings = scan(place, base, suite, settings)
            seconds = time.monotonic() - begin
            success = lab.probe(place, {VICTIM: lab.test[VICTIM]}, (VICTIM,))[1]
            found[name] = {"success": round(success), "findings": findings, "seconds": round(seconds)}
            print(
                f"{name}: attack {success:.0f}; {' '.join(findings) or 'nothing found'} ({seconds:.0f} s)", flush=True
            )
            if arguments.out:
                arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
