from __future__ import annotations

from pathlib import Path

import pytest

from bot.config import read_access, read_config, read_plan
from hubfusion.errors import FusionError
from hubfusion.release.signature import Keyless

ROOT = Path(__file__).resolve().parents[2]
LEAST = 'base = "a/b"\nledger = "a/l"\nranking = "a/r"\n[evaluate]\nsuite = "offline"\n'


@pytest.mark.parametrize(
    ("file", "names"), [("bot.toml", ["linear-probing", "finetune"]), ("demo/bot.toml", ["few-shot"])]
)
def test_the_settings_that_ship_are_read_and_their_suites_and_protocols_exist(file: str, names: list[str]) -> None:
    config = read_config(ROOT / file)
    suite, protocols = read_plan(config.evaluate)
    assert config.base == "ibm/ColD-Fusion"
    assert suite.datasets and [p.name for p in protocols] == names


def test_what_is_not_said_has_safe_values(tmp_path: Path) -> None:
    (tmp_path / "bot.toml").write_text(LEAST)
    config = read_config(tmp_path / "bot.toml")
    assert (config.fuse.method, config.fuse.clip, config.fuse.at_least) == ("average", True, 2)
    assert (config.gate.mean, config.gate.worst) == (0.5, 3.0)


def test_files_are_found_beside_the_settings(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('name = "mine"\ndatasets = [{ name = "d", repo = "a/d" }]\n')
    (tmp_path / "bot.toml").write_text(LEAST.replace('"offline"', '"mine.toml"'))
    suite, _ = read_plan(read_config(tmp_path / "bot.toml").evaluate)
    assert suite.name == "mine"


def test_a_probe_suite_is_found_beside_the_settings_too(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('name = "mine"\ndatasets = [{ name = "d", repo = "a/d" }]\n')
    (tmp_path / "bot.toml").write_text(LEAST + "[leave_one_out]\nsuite = 'mine.toml'\nseeds = [0]\n")
    probe = read_config(tmp_path / "bot.toml").leave_one_out
    assert probe is not None and probe.seeds == (0,)
    assert read_plan(probe)[0].name == "mine"


@pytest.mark.parametrize("method", ["ties", "dare", "slerp"])
def test_a_method_that_cannot_clip_is_fine_without(tmp_path: Path, method: str) -> None:
    (tmp_path / "bot.toml").write_text(LEAST + f"[fuse]\nmethod = '{method}'\nclip = false\n")
    assert read_config(tmp_path / "bot.toml").fuse.method == method


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LEAST + "[fuse]\nmethd = 'ties'\n", r"bot\.toml\.fuse: unknown key 'methd', allowed are method, options"),
        (LEAST + "[fuse]\nclip = 'yes'\n", r"bot\.toml\.fuse\.clip: expected bool, got 'yes'"),
        (
            LEAST + "[fuse]\nmethod = 'ties'\n",
            "fuse.clip: ties cannot clip; set clip = false or use one of average, geometric_median, median, "
            "multi_krum, task_arithmetic, trimmed_mean$",
        ),
        (LEAST + "[fuse]\noptions = { norm = 'equal' }\n", r"fuse\.options\.norm: clip = true decides it"),
        (LEAST + "[fuse]\nmethod = 'mean'\n", r"fuse\.method must be one of average, .* got 'mean'"),
        (LEAST + "[fuse]\nisolate = -1\n", r"fuse\.isolate must be at least 0, got -1"),
        (LEAST + "[fuse]\nat_least = 0\n", r"fuse\.at_least must be at least 1, got 0"),
        (LEAST + "[examine]\nversions = -1\n", r"examine\.versions must be at least 0, got -1"),
        (LEAST + "[gate]\nmean = -1\n", r"gate\.mean must be at least 0 points, got -1"),
        ("base = 'a/b'\n", r"object missing required field ledger"),
        ("base = \n", r"bot\.toml: not TOML"),
    ],
)
def test_settings_that_do_not_fit_are_named_with_their_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bot.toml").write_text(text)
    with pytest.raises(FusionError, match=message):
        read_config(tmp_path / "bot.toml")


def test_settings_that_are_not_there_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(FusionError, match=r"bot\.toml: cannot be read: No such file"):
        read_config(tmp_path / "bot.toml")


def test_a_suite_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "bot.toml").write_text(LEAST.replace('"offline"', '"nothing"'))
    with pytest.raises(FusionError, match="nothing"):
        read_plan(read_config(tmp_path / "bot.toml").evaluate)


def test_the_token_is_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    access = read_access()
    assert (access.endpoint, access.token) == ("http://127.0.0.1:1", "hf_canary")
    assert "hf_canary" not in repr(access)


def test_a_trigger_scan_is_off_until_its_table_is_there(tmp_path: Path) -> None:
    (tmp_path / "bot.toml").write_text(LEAST)
    assert read_config(tmp_path / "bot.toml").triggers is None
    (tmp_path / "bot.toml").write_text(LEAST + "[triggers]\ntokens = 50\nradii = [0.5, 1]\n")
    found = read_config(tmp_path / "bot.toml").triggers
    assert found is not None and (found.tokens, found.radii, found.texts) == (50, (0.5, 1.0), 32)


def test_the_signing_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HUBFUSION_SIGNING_KEY", "HUBFUSION_TRUST"):
        monkeypatch.delenv(name, raising=False)
    assert read_access().signer is None
    monkeypatch.setenv("HUBFUSION_SIGNING_KEY", "/keys/release.pem")
    assert read_access().signer == Path("/keys/release.pem")
    monkeypatch.setenv("HUBFUSION_TRUST", "/keys/ours.json")
    with pytest.raises(FusionError, match="HUBFUSION_TRUST is for HUBFUSION_SIGNING_KEY=keyless only"):
        read_access()
    monkeypatch.setenv("HUBFUSION_SIGNING_KEY", "keyless")
    assert read_access().signer == Keyless(Path("/keys/ours.json"))
    monkeypatch.delenv("HUBFUSION_TRUST")
    assert read_access().signer == Keyless()
