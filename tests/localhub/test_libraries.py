"""The libraries themselves, each in a fresh process, since they read HF_ENDPOINT when they are imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hubfusion.localhub import LocalHub, Rules
from tests.localhub.conftest import USERS, World

TRANSFORMERS = """
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertTokenizerFast
from transformers import BertForSequenceClassification
open("vocab.txt", "w").write("\\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=13)
model = BertForSequenceClassification(config)
model.push_to_hub("ann/bert")
BertTokenizerFast("vocab.txt").push_to_hub("ann/bert")
again = AutoModelForSequenceClassification.from_pretrained("ann/bert")
assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
assert AutoTokenizer.from_pretrained("ann/bert")("abc").input_ids[1:] == [1, 3]
from huggingface_hub import HfApi
api = HfApi()
api.create_tag("ann/bert", tag="v1")
with torch.no_grad():
    model.classifier.weight += 1
model.push_to_hub("ann/bert")
first = AutoModelForSequenceClassification.from_pretrained("ann/bert", revision="v1")
assert torch.equal(first.classifier.weight + 1, model.classifier.weight)
print(sorted(f for f in api.list_repo_files("ann/bert") if f.endswith("s")))
"""

DATASETS = """
import datasets
table = datasets.DatasetDict({
    "train": datasets.Dataset.from_dict({"text": ["a", "b"] * 50, "label": [0, 1] * 50}),
    "test": datasets.Dataset.from_dict({"text": ["c"], "label": [1]}),
})
table.push_to_hub("ann/data")
again = datasets.load_dataset("ann/data")
assert again["train"].to_dict() == table["train"].to_dict()
stream = datasets.load_dataset("ann/data", split="test", streaming=True)
assert next(iter(stream)) == {"text": "c", "label": 1}
datasets.Dataset.from_dict({"rank": [1, 2]}).push_to_hub("ann/data", config_name="board")
names = datasets.get_dataset_config_names("ann/data")
assert sorted(names) == ["board", "default"], names
print(again["train"].num_rows)
"""


def run(world: World, home: Path, command: list[str]) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_ENDPOINT": world.endpoint, "HF_HOME": str(home), "HF_TOKEN": USERS["ann"]}
    environment |= {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "DISABLE_SAFETENSORS_CONVERSION": "1",
    }
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_transformers_pushes_and_loads_a_model_at_any_revision(world: World, tmp_path: Path) -> None:
    printed = run(world, tmp_path, [sys.executable, "-c", TRANSFORMERS])
    assert printed.strip().endswith("['.gitattributes', 'model.safetensors']")
    assert world.anon.model_info("ann/bert").safetensors.total > 0


@pytest.mark.slow
def test_datasets_pushes_loads_and_streams_a_table(world: World, tmp_path: Path) -> None:
    assert run(world, tmp_path, [sys.executable, "-c", DATASETS]).strip().endswith("100")
    assert "format:parquet" in world.anon.dataset_info("ann/data").tags


@pytest.mark.slow
def test_the_hf_command_lists_uploads_and_downloads(world: World, tmp_path: Path) -> None:
    world.ann.create_repo("ann/cli", exist_ok=True)
    (tmp_path / "a.txt").write_text("from the command line")
    assert "ann" in run(world, tmp_path, ["hf", "auth", "whoami"])
    run(world, tmp_path, ["hf", "upload", "ann/cli", "a.txt", "b.txt"])
    run(world, tmp_path, ["hf", "download", "ann/cli", "b.txt", "--local-dir", "there"])
    assert (tmp_path / "there/b.txt").read_text() == "from the command line"
    assert "ann/cli" in run(world, tmp_path, ["hf", "models", "ls", "--author", "ann"])
    run(world, tmp_path, ["hf", "repos", "tag", "create", "ann/cli", "v0"])
    assert [tag.name for tag in world.ann.list_repo_refs("ann/cli").tags] == ["v0"]


@pytest.mark.slow
def test_evaluate_loads_a_metric_from_a_space(world: World, tmp_path: Path) -> None:
    source = """
import datasets
import evaluate


class Accuracy(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"accuracy": sum(a == b for a, b in zip(predictions, references)) / len(references)}
"""
    world.ann.create_repo("ann/metric", repo_type="space", space_sdk="static", exist_ok=True)
    world.ann.upload_file(
        path_or_fileobj=source.encode(), path_in_repo="metric.py", repo_id="ann/metric", repo_type="space"
    )
    code = "import evaluate; print(evaluate.load('ann/metric').compute(predictions=[1, 2], references=[1, 0]))"
    assert run(world, tmp_path, [sys.executable, "-c", code]).strip() == "{'accuracy': 0.5}"


PROBE = Path(__file__).resolve().parents[3] / "shared" / "hub_probe.py"
NOT_SERVED = {"misc.oidc_token_exchange", "jobs.run_uv_job_local_script"}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("xet", [False, True])
def test_every_row_of_the_probe_is_served_but_two(tmp_path: Path, xet: bool) -> None:
    """See the README for why these two are not."""
    if not PROBE.exists():
        pytest.skip(f"{PROBE.name} is not beside this checkout")
    with LocalHub(tmp_path / "store", USERS, rules=Rules(allow_jobs=True)) as hub:
        users = ["--token", USERS["ann"], "--user", "ann", "--token2", USERS["bob"], "--user2", "bob"]
        command = [sys.executable, str(PROBE), hub.endpoint, *users, "--json", str(tmp_path / "out.json")]
        subprocess.run([*command, *(["--xet"] if xet else [])], timeout=500, capture_output=True)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["row"] for row in rows if row["status"] != "OK"} == NOT_SERVED and len(rows) > 100
