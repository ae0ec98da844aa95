"""Models on the Hub as inputs of a fuse: what is fetched, how, and that nothing of it stays."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hubfusion.cli import main
from hubfusion.errors import CheckpointError, HubError, RecipeError
from hubfusion.fuse import fuse
from hubfusion.fuse.inputs import fetched
from hubfusion.lineage import Recipe
from hubfusion.localhub import LocalHub
from hubfusion.localhub.faults import Fault, FaultRequest
from tests.random_checkpoints import backbone, load, recipe_of, save

BASE = backbone(100)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return int(stop.value.code or 0)


class Requests:
    """A fault plan that watches downloads (``owner/name/file``), and delays them or refuses one when told."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.delay, self.fail, self.flip = 0.0, "", ""
        self.lock = threading.Lock()

    def __call__(self, request: FaultRequest) -> Fault | None:
        if "/resolve/" not in request.path or request.method != "GET":
            return None
        with self.lock:
            self.paths.append(request.path.split("/resolve/")[0].strip("/") + "/" + request.path.rsplit("/", 1)[1])
        if self.fail and self.fail in request.path:
            return Fault(status=403)
        if self.flip and self.flip in request.path and request.headers["range"] == "bytes=0-":  # not the header alone
            return Fault(flip=800)
        return Fault(delay=self.delay) if self.delay else None


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[LocalHub, Requests, Path]]:
    """A Hub with ann/base and six finetunes of it, what watches it, and the folders ``up0`` ... ``up6`` they are of."""
    from huggingface_hub import HfApi

    place, requests = tmp_path_factory.mktemp("served"), Requests()
    with LocalHub(place / "hub", {"ann": "hf_ann"}, faults=requests).start() as hub:
        api = HfApi(endpoint=hub.endpoint, token="hf_ann")
        for i in range(7):
            folder = save(place / f"up{i}", backbone(i, shift=BASE, prefix="bert.") if i else BASE)
            (folder / "config.json").write_text("{}")
            (folder / "evil.py").write_text("")
            save_file({n: np.ones_like(v) for n, v in BASE.items()}, folder / "fisher.safetensors")
            if i == 0:
                save_file({f"momentum.{n}": np.ones_like(v) for n, v in BASE.items()}, folder / "outer.safetensors")
            repo = f"ann/m{i}" if i else "ann/base"
            api.create_repo(repo)
            api.upload_folder(repo_id=repo, folder_path=folder)
        yield hub, requests, place


@pytest.fixture
def requests(served) -> Requests:
    served[1].paths.clear()
    served[1].delay, served[1].fail, served[1].flip = 0.0, "", ""
    return served[1]


@pytest.fixture
def hub(served, requests, tmp_path, monkeypatch) -> LocalHub:
    """The Hub, with an empty temporary folder of our own."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return served[0]


@pytest.fixture
def ups(served) -> Path:
    return served[2]


def recipe(*labels: str, **fields) -> Recipe:
    return recipe_of(labels, base="ann/base", **fields)


def test_ids_are_pinned_and_only_what_the_method_reads_is_fetched(hub, requests, tmp_path):
    wanted = {"ann/base/model.safetensors", "ann/base/config.json", "ann/m1/model.safetensors"}
    for method, outer, more in (
        ("average", "plain", set()),
        ("fisher", "plain", {"ann/m1/fisher.safetensors"}),
        ("average", "nesterov", {"ann/base/outer.safetensors"}),
    ):
        requests.paths.clear()
        with fetched(recipe("ann/m1", method=method, outer=outer), hub.endpoint, None) as found:
            assert found.recipe.base.startswith("ann/base@") and found.recipe.inputs[0].model.startswith("ann/m1@")
            assert {p.name for p in found.inputs[0].iterdir()} == {n.split("/")[2] for n in wanted | more if "m1" in n}
        assert set(requests.paths) == wanted | more
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_outer_state_comes_with_the_base_or_from_an_id_of_its_own(hub, ups, tmp_path):
    out = {}
    for name, state in (("beside", None), ("given", "ann/base")):
        plan = recipe("ann/m1", outer="momentum", state=state)
        with fetched(plan, hub.endpoint, None) as found:
            fuse(found.recipe, found.base, found.inputs, tmp_path / name, state=found.state)
        out[name] = load(tmp_path / name)["encoder.layer.0.dense.bias"]
    one = load(ups / "up1")["bert.encoder.layer.0.dense.bias"]
    np.testing.assert_allclose(out["beside"], one + 0.9, rtol=1e-6)  # the delta, and 0.9 times a momentum of 1
    assert np.array_equal(out["given"], out["beside"])


def test_files_come_side_by_side(hub, requests):
    requests.delay = 0.3
    began = time.monotonic()
    with fetched(recipe(*(f"ann/m{i}" for i in range(1, 7))), hub.endpoint, None):
        took = time.monotonic() - began
    assert len(requests.paths) == 8 and took < 8 * 0.3  # one after another it would be more than that


def test_progress_counts_the_bytes_of_all_files(hub, ups):
    told: list[tuple[int, int]] = []
    with fetched(recipe("ann/m1", "ann/m2"), hub.endpoint, None, lambda *event: told.append(event)):
        pass
    sizes = sum((ups / f"up{i}" / "model.safetensors").stat().st_size for i in range(3)) + 2
    assert told[-1] == (sizes, sizes) and [d for d, _ in told] == sorted(d for d, _ in told)


def test_one_refused_file_ends_the_fetch_and_leaves_nothing(hub, requests, tmp_path):
    requests.fail = "m2"
    with pytest.raises(HubError, match="HTTP 403"), fetched(recipe("ann/m1", "ann/m2"), hub.endpoint, None):
        pass
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_failing_fuse_leaves_nothing_fetched(hub, tmp_path):
    with pytest.raises(CheckpointError), fetched(recipe("ann/m1"), hub.endpoint, None):
        raise CheckpointError("as if")
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_disk_that_is_too_small_is_said_before_the_first_byte(hub, requests, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(RecipeError, match=r"bytes are needed, 1000 are free; TMPDIR names another folder"):
        with fetched(recipe("ann/m1"), hub.endpoint, None):
            pass
    assert requests.paths == []


def test_a_fuse_of_ids_leaves_a_recipe_that_gives_the_same_bytes(hub, ups, tmp_path):
    out = tmp_path / "out"
    assert run("fuse", "ann/base", "ann/m1@main", ups / "up2", "--out", out, "--endpoint", hub.endpoint) == 0
    manifest = json.loads((out / "fuse.json").read_text())
    base, one = manifest["base"], manifest["inputs"][0]["model"]
    assert base.startswith("ann/base@") and one.startswith("ann/m1@") and len(one) == len("ann/m1@") + 40
    assert (out / "config.json").exists() and not (out / "evil.py").exists()
    assert '- "ann/base"' in (out / "README.md").read_text()
    assert run("fuse", out / "recipe.toml", "--out", tmp_path / "again", "--endpoint", hub.endpoint) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_an_index_is_followed_and_a_single_file_is_preferred_to_it(hub, tmp_path):
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.endpoint, token="hf_ann")
    sharded = save(tmp_path / "sharded", backbone(8, shift=BASE), shards=2)
    api.create_repo("ann/sharded")
    api.upload_folder(repo_id="ann/sharded", folder_path=sharded)
    with fetched(recipe("ann/sharded"), hub.endpoint, None) as found:
        assert {p.name for p in found.inputs[0].iterdir()} == {p.name for p in sharded.iterdir()}
    api.upload_folder(repo_id="ann/sharded", folder_path=save(tmp_path / "single", backbone(8, shift=BASE)))
    with fetched(recipe("ann/sharded"), hub.endpoint, None) as found:
        assert [p.name for p in Path(found.inputs[0]).iterdir()] == ["model.safetensors"]


SIX = tuple(f"ann/m{i}" for i in range(1, 7))


def test_the_command_adds_up_six_ids_as_they_come_to_what_six_folders_give(hub, ups, tmp_path, caplog):
    caplog.set_level("INFO", "hubfusion")
    assert run("fuse", "ann/base", *SIX, "--out", tmp_path / "ids", "--endpoint", hub.endpoint) == 0
    assert "added up 6 inputs as they came" in caplog.text
    assert run("fuse", ups / "up0", *(ups / f"up{i}" for i in range(1, 7)), "--out", tmp_path / "folders") == 0
    one, other = (json.loads((tmp_path / n / "fuse.json").read_text()) for n in ("ids", "folders"))
    assert one["files"] == other["files"]
    assert [i["delta_norm"] for i in one["inputs"]] == [i["delta_norm"] for i in other["inputs"]]
    assert run("fuse", tmp_path / "ids" / "recipe.toml", "--out", tmp_path / "again", "--endpoint", hub.endpoint) == 0
    assert (tmp_path / "again" / "fuse.json").read_bytes() == (tmp_path / "ids" / "fuse.json").read_bytes()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_coefficients_by_norm_wait_for_all_inputs(hub, tmp_path):
    options = ["--coefficients", "inverse-norm", "--endpoint", hub.endpoint]
    assert run("fuse", "ann/base", *SIX, "--out", tmp_path / "out", *options) == 0
    manifest = json.loads((tmp_path / "out" / "fuse.json").read_text())
    products = [i["coefficient"] * i["delta_norm"] for i in manifest["inputs"]]
    assert products == pytest.approx([products[0]] * 6, rel=1e-4)


def test_an_input_that_comes_changed_during_the_fuse_is_named_and_nothing_stays(hub, requests, tmp_path, capsys):
    requests.flip = "ann/m6"
    assert run("fuse", "ann/base", *SIX, "--out", tmp_path / "out", "--endpoint", hub.endpoint) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ann/m6@") and message.endswith(
        "model.safetensors: the bytes do not have the hash that the Hub lists, twice"
    )
    assert list((tmp_path / "tmp").iterdir()) == [] and list((tmp_path / "out").iterdir()) == []
