"""Keyless signatures, by the real client, against a Sigstore that runs on loopback."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from hubfusion.cli.commands import app
from hubfusion.errors import FusionError
from hubfusion.localhub import LocalHub
from hubfusion.release.provenance import verify
from hubfusion.release.signature import SIGNATURE, Identity, Keyless, check_signature, check_signer, sign
from tests.bert_checkpoints import BASE, write_folder
from tests.cli.test_trust import USERS
from tests.fake_sigstore import IDENTITY, ISSUER, REQUEST_TOKEN, Sigstore
from tests.published import FILE, WEIGHTS, ServedWorld, World, flip, make_keys

AMBIENT = ("GITHUB_ACTIONS", "ACTIONS_ID_TOKEN_REQUEST_URL", "ACTIONS_ID_TOKEN_REQUEST_TOKEN", "SIGSTORE_ID_TOKEN")


@pytest.fixture
def sigstore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sigstore]:
    """Our own Sigstore, and an environment in which nobody vouches for us until a test says so."""
    for name in AMBIENT:
        monkeypatch.delenv(name, raising=False)
    with Sigstore(tmp_path / "sigstore") as services:
        yield services


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(
        tmp_path / "release", {"model.safetensors": b"weights", "fusion.json": b"{}", "README.md": b"#"}
    )


def test_a_release_signed_by_a_workflow_holds_for_that_workflow_alone(
    tmp_path: Path, sigstore: Sigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sigstore.be_actions(monkeypatch)
    world = World(tmp_path / "world", ("ann", "bob"), signer=Keyless(sigstore.trust))
    right = Identity(IDENTITY, trust=sigstore.trust)
    found = verify(world.hub, BASE, "v1", tmp_path / "good", signed_by=right)
    assert found.differences == () and found.steps[-1] == f"model.sig was checked with {IDENTITY}"
    assert right.provider == ISSUER
    others = {
        "other workflow": replace(right, name=IDENTITY.replace("iterate", "ci")),
        "other branch": replace(right, name=IDENTITY.replace("heads/main", "heads/fix")),
        "other provider": replace(right, provider="https://accounts.google.com"),
    }
    for name, other in others.items():
        (said,) = verify(world.hub, BASE, "v1", tmp_path / name.replace(" ", "-"), signed_by=other).differences
        assert said.startswith("model.sig does not hold: VerificationError: ") and "\n" not in said, (name, said)


def test_a_flipped_bit_in_any_file_or_in_the_bundle_is_found(
    tmp_path: Path, sigstore: Sigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sigstore.be_actions(monkeypatch)
    world = World(tmp_path / "world", ("ann", "bob"), signer=Keyless(sigstore.trust))
    right = Identity(IDENTITY, trust=sigstore.trust)
    tree = world.tree(BASE, world.hub.tagged[BASE]["v1"])
    for path in (WEIGHTS, FILE, "config.json"):
        kept = tree[path]
        tree[path] = kept + b" " if path != WEIGHTS else flip(kept, 4 * len(kept))
        found = verify(world.hub, BASE, "v1", tmp_path / path.replace(".", "-"), signed_by=right).differences
        assert any(d.startswith("model.sig does not hold") for d in found), (path, found)
        tree[path] = kept
    bundle = json.loads(tree[SIGNATURE])
    material, envelope = bundle["verificationMaterial"], bundle["dsseEnvelope"]
    entry = material["tlogEntries"][0]
    parts = [
        (envelope, "payload"),
        (envelope["signatures"][0], "sig"),
        (material["certificate"], "rawBytes"),
        (entry, "canonicalizedBody"),
        (entry["inclusionPromise"], "signedEntryTimestamp"),
        (entry["inclusionProof"], "rootHash"),
    ]
    for where, key in parts:
        good = where[key]
        where[key] = good[:-12] + ("A" if good[-12] != "A" else "B") + good[-11:]
        tree[SIGNATURE] = json.dumps(bundle).encode()
        (said,) = verify(world.hub, BASE, "v1", tmp_path / f"in-{key}", signed_by=right).differences
        assert said.startswith("model.sig does not hold"), (key, said)
        where[key] = good
    tree[SIGNATURE] = json.dumps(bundle).encode()
    assert verify(world.hub, BASE, "v1", tmp_path / "whole", signed_by=right).differences == ()


def test_a_signature_of_another_sigstore_or_by_a_key_is_none_of_an_identity(
    tmp_path: Path, folder: Path, sigstore: Sigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, (private, public) = Identity(IDENTITY, trust=sigstore.trust), make_keys(tmp_path)
    with Sigstore(tmp_path / "theirs") as theirs:
        theirs.be_actions(monkeypatch)
        sign(folder, Keyless(theirs.trust))
        assert check_signature(folder, replace(right, trust=theirs.trust)) == ""
    assert check_signature(folder, right).startswith("model.sig does not hold: ")
    assert check_signature(folder, public).startswith("model.sig does not hold: ")
    sign(folder, private)
    assert check_signature(folder, public) == ""
    assert check_signature(folder, right).startswith("model.sig does not hold: ")


def test_where_nobody_vouches_for_us_there_is_one_line_and_no_browser(
    folder: Path, sigstore: Sigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sigstore.oidc as oidc  # type: ignore[import-not-found,unused-ignore]

    monkeypatch.setattr(oidc.Issuer, "identity_token", lambda *_, **__: pytest.fail("it waits for a person"))
    for attempt in (lambda: check_signer(Keyless(sigstore.trust)), lambda: sign(folder, Keyless(sigstore.trust))):
        with pytest.raises(FusionError, match="^keyless signing: no identity here; it takes GitHub Actions and"):
            attempt()
        with monkeypatch.context() as patch:
            patch.setenv("GITHUB_ACTIONS", "true")  # a job without `id-token: write`
            with pytest.raises(FusionError, match="^keyless signing: .*ACTIONS_ID_TOKEN_REQUEST_TOKEN") as caught:
                attempt()
            assert "\n" not in str(caught.value)
            sigstore.be_actions(patch)
            patch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "stale")
            with pytest.raises(FusionError, match="^keyless signing: .*403") as caught:
                attempt()
            assert "\n" not in str(caught.value)
    assert not (folder / SIGNATURE).exists()


def test_a_job_with_an_identity_can_sign_and_has_not_signed_yet(
    sigstore: Sigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sigstore.be_actions(monkeypatch)
    check_signer(Keyless(sigstore.trust))
    assert [path.partition("?")[0] for path in sigstore.requests] == ["/token"]


def test_the_tokens_are_in_no_log_and_no_error_even_when_a_server_repeats_them(
    folder: Path, sigstore: Sigstore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sigstore.be_actions(monkeypatch)
    secrets = (REQUEST_TOKEN, sigstore.token, sigstore.token.split(".")[1])
    with caplog.at_level(logging.DEBUG):
        signed = sign(folder, Keyless(sigstore.trust)).read_text()
        assert check_signature(folder, Identity(IDENTITY, trust=sigstore.trust)) == ""
        sigstore.refusal = 403
        with pytest.raises(FusionError, match=r"^signature of .*403 Client Error: .*\(token\)") as caught:
            sign(folder, Keyless(sigstore.trust))
    assert "\n" not in str(caught.value)
    assert caplog.text
    for secret in secrets:
        assert secret not in str(caught.value) and secret not in signed and secret not in caplog.text


def test_a_sigstore_that_is_not_there_or_not_described_is_one_line(
    tmp_path: Path, folder: Path, sigstore: Sigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sigstore.be_actions(monkeypatch)
    with Sigstore(tmp_path / "gone") as gone:
        pass
    with pytest.raises(FusionError, match="^signature of .*(refused|Max retries|NetworkError)") as caught:
        sign(folder, Keyless(gone.trust))
    assert "\n" not in str(caught.value) and not (folder / SIGNATURE).exists()
    (tmp_path / "bad.json").write_text("{}")
    for trust in (tmp_path / "bad.json", tmp_path / "missing.json"):
        with pytest.raises(FusionError, match="^signature of "):
            sign(folder, Keyless(trust))
        with pytest.raises(FusionError, match=f"^{trust}: ") as caught:
            check_signature(folder, Identity(IDENTITY, trust=trust))
        assert "\n" not in str(caught.value)


def run(*argv: str, endpoint: str = "http://127.0.0.1:9") -> Result:
    return CliRunner().invoke(app, list(argv), env={"HF_ENDPOINT": endpoint, "HF_TOKEN": None})


def test_the_command_verifies_a_keyless_release_over_http(
    tmp_path: Path, sigstore: Sigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    sigstore.be_actions(monkeypatch)
    with LocalHub(tmp_path / "hub", USERS, {"ibm": ["ibm-bot"]}) as hub:
        ServedWorld(tmp_path / "made", hub.endpoint, ("ann", "bob"), signer=Keyless(sigstore.trust))
        who = ("verify", f"{BASE}@v1", "--identity", IDENTITY, "--trust", str(sigstore.trust))
        good = run(*who, "--identity-provider", ISSUER, endpoint=hub.endpoint)
        assert good.exit_code == 0 and f"model.sig was checked with {IDENTITY}" in good.output, good.output
        bad = run(*who, "--identity-provider", "https://accounts.google.com", endpoint=hub.endpoint)
        assert bad.exit_code == 1 and "DIFFERS: model.sig does not hold" in bad.output, bad.output
    shutil.rmtree(tmp_path / "hub")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--identity-provider", ISSUER], "--identity, which is missing"),
        (["--trust", "trust.json"], "--identity, which is missing"),
        (["--identity", IDENTITY, "--key", "key.pub"], "one signature, by a key or by an identity"),
    ],
)
def test_options_of_two_ways_to_sign_do_not_mix(options: list[str], says: str) -> None:
    found = run("verify", f"{BASE}@v1", *options)
    assert found.exit_code == 1 and says in str(found.exception), found.output


def test_a_bot_that_cannot_sign_stops_before_the_work(sigstore: Sigstore, monkeypatch: pytest.MonkeyPatch) -> None:
    from bot.__main__ import new_run
    from bot.config import read_config

    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setenv("HUBFUSION_SIGNING_KEY", "keyless")
    with pytest.raises(FusionError, match="^keyless signing: no identity here"):
        new_run(read_config(Path(__file__).resolve().parents[2] / "bot.toml"), act=True)
