"""One whole iteration with nothing replaced: the real commands in processes of their own, on two-layer models."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from demo.place import BASE, BOT, TEXTS, Place, open_place
from hubfusion.errors import FusionError
from hubfusion.evaluate.units import content_key
from hubfusion.hub import Change, RepoKind
from hubfusion.release.publish import current_release, fetch_release, manifest_at
from tests import bert_checkpoints

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(bert_checkpoints.VOCABULARY - 5))]
SETTINGS = f"""
base = "{BASE}"
ledger = "{BASE}-ledger"
ranking = "{BASE}-ranking"
work = "work"
deadline_minutes = 3
[fuse]
clip = true
[evaluate]
suite = "suite.toml"
recipes = "protocols.toml"
[gate]
mean = 50
worst = 100
"""
SUITE = """
name = "tiny"
datasets = [{ name = "news", repo = "demo/news" }, { name = "mail", repo = "demo/mail" }]
"""
PROTOCOLS = """
linear-probing = { examples = 40 }
finetune = { examples = 40, training = { epochs = 1, batch_size = 8, max_length = 12 } }
"""


def push_dataset(place: Place, name: str) -> None:
    """60 texts whose label shows in their words, and 20 to test on."""
    rng = np.random.default_rng(sum(name.encode()))
    hub, repo = place.hub(TEXTS), f"{TEXTS}/{name}"
    hub.create(repo, RepoKind.DATASET)
    files: dict[str, bytes | Path] = {}
    for split, count in (("train", 60), ("test", 20)):
        labels = rng.integers(0, 2, count)
        texts = [" ".join(f"w{i}" for i in rng.integers(20 * label, 20 * label + 20, 6)) for label in labels]
        buffer = io.BytesIO()
        pq.write_table(pa.table({"text": texts, "label": ["yes" if label else "no" for label in labels]}), buffer)
        files[f"data/{split}-00000-of-00001.parquet"] = buffer.getvalue()
    hub.commit(repo, Change("texts", hub.resolve(repo, kind=RepoKind.DATASET).sha, name, files), RepoKind.DATASET)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("whole")
    for name, text in (("bot.toml", SETTINGS), ("suite.toml", SUITE), ("protocols.toml", PROTOCOLS)):
        (folder / name).write_text(text)
    tokenizer = json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True}).encode()
    files = {
        "config.json": bert_checkpoints.config(),
        "model.safetensors": bert_checkpoints.weights(bert_checkpoints.base_tensors()),
    }
    bert_checkpoints.write_folder(
        folder / "pretrained", files | {"tokenizer_config.json": tokenizer, "vocab.txt": "\n".join(WORDS).encode()}
    )
    with open_place(folder) as made:
        made.run("bot", "found", "pretrained", "--license", "apache-2.0", user=BOT)
        push_dataset(made, "news")
        push_dataset(made, "mail")
        yield made


def contribute(place: Place, user: str, dataset: str) -> str:
    options = f"--base {BASE} --dataset {TEXTS}/{dataset} --repo {user}/model --license apache-2.0 --work {user}"
    training = "--epochs 1 --batch-size 8 --max-length 12 --learning-rate 1e-3"
    return place.run("hubfusion", "contribute", *options.split(), *training.split(), user=user)


@pytest.mark.timeout(600)
def test_a_whole_iteration_through_the_real_commands(place: Place, tmp_path: Path) -> None:
    assert "54 examples on ibm/ColD-Fusion v0" in contribute(place, "alice", "news")
    contribute(place, "bob", "mail")
    plan = place.run("bot", "iterate", user=BOT)
    assert "would be promoted" in plan and "Nothing was written" in plan
    hub = place.hub()
    assert list(hub.tags(BASE)) == ["v0"]
    assert "promoted" in place.run("bot", "iterate", "--publish", user=BOT)
    manifest = manifest_at(hub, hub.resolve(BASE, "v1"))
    assert manifest is not None
    assert [(c.author, c.examples, c.datasets) for c in (each.contribution for each in manifest.contributions)] == [
        ("alice", 54, ("demo/news",)),
        ("bob", 54, ("demo/mail",)),
    ]
    assert {(s.dataset, s.protocol) for s in manifest.candidate_scores} == {
        (d, p) for d in ("news", "mail") for p in ("linear-probing", "finetune")
    }
    assert manifest.seen == ("mail", "news")
    assert min(manifest.recipe.coefficients) < 1.0  # the larger update was clipped to the median of two
    head = hub.resolve(f"{BASE}-ranking", kind=RepoKind.DATASET)
    results = [f.path for f in hub.files(head, RepoKind.DATASET) if f.path.startswith("results/")]
    models = [json.loads(hub.read(head, path, stop=1 << 20, kind=RepoKind.DATASET))["model"] for path in results]
    release = fetch_release(hub, current_release(hub, BASE), tmp_path / "v1")
    # a run on another machine finds the scores of its base by the content of the base that it downloads
    assert len(models) == 16 and models.count(content_key(release)) == 8  # 2 datasets, 2 recipes, 2 seeds
    assert "nothing new" in place.run("bot", "iterate", "--publish", user=BOT)


def test_errors_are_one_line_and_an_exit_code(place: Place) -> None:
    with pytest.raises(FusionError, match=r"exit code 1: error: HF_TOKEN is not set"):
        place.run("hubfusion", "tag", "alice/model", "--base", BASE, "--license", "mit", "--revision", "v0")
    with pytest.raises(FusionError, match=r"exit code 1: error: ibm/nothing@v0: HTTP 404"):
        options = ("--base", "ibm/nothing", "--license", "mit", "--revision", "v0")
        place.run("hubfusion", "tag", "alice/model", *options, user="alice")
    with pytest.raises(FusionError, match="exit code 1: error: dataset nothing: demo/nothing at main: there is no"):
        contribute(place, "carol", "nothing")
