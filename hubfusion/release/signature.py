"""Sign a release and check the signature, by OpenSSF model signing (the extra `sign`).

The signature covers every file of the revision except the card, which may be corrected later. Signing with a key works
offline; it proves who made the files, not when: the version and the parent's commit are in the signed manifest. Keyless
signing uses an identity token of the environment (a workflow in GitHub Actions). A Sigstore instance certifies a
short-lived key for that identity and records both in a public log, so signing and checking need the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from hubfusion import install_command
from hubfusion.errors import FusionError

SIGNATURE = "model.sig"
UNSIGNED = (SIGNATURE, "README.md", ".gitattributes")
ACTIONS = "https://token.actions.githubusercontent.com"


@dataclass(frozen=True, slots=True)
class Keyless:
    """Sign as whom the surroundings say we are; ``trust`` is a file that describes another Sigstore than the public."""

    trust: Path | None = None


@dataclass(frozen=True, slots=True)
class Identity:
    """Who must have signed keylessly: ``name`` (a workflow's URL, an address), as ``provider`` (an issuer) knows it."""

    name: str
    provider: str = ACTIONS
    trust: Path | None = None


def check_signer(signer: Path | Keyless) -> None:
    """Refuse what cannot sign (no key, no identity, no package), before hours of work end in it."""
    if isinstance(signer, Keyless):
        _token()
    else:
        _with_key(signer)


def sign(folder: Path, signer: Path | Keyless) -> Path:
    """Sign all files in ``folder`` but `UNSIGNED`; returns the signature's path.

    ``signer`` is the file of an elliptic-curve private key (PEM), or `Keyless`. The token of a keyless signature is
    asked for now, since it is good for minutes only.
    """
    target = folder / SIGNATURE
    token = _token() if isinstance(signer, Keyless) else ""
    config = _module("signing").Config() if isinstance(signer, Keyless) else _with_key(signer)
    try:
        if isinstance(signer, Keyless):
            # Given, not left to the library: where it finds no token, it waits for a person at a browser.
            config.use_sigstore_signer(identity_token=token, trust_config=signer.trust)
        config.set_hashing_config(_hashing(folder)).sign(folder, target)
    except Exception as error:  # many kinds: of the library, of the clients and formats below it
        raise FusionError(f"signature of {folder}: {_one_line(error, token)}") from None
    return target


def check_signature(folder: Path, signed_by: Path | Identity) -> str:
    """Compare ``folder`` with its `SIGNATURE`; empty when it holds, else what differs, in one sentence.

    ``signed_by`` is the file of a public key (PEM), or who must have signed keylessly. Raises `FusionError` when there
    is nothing to check with: no such key, no package, no Sigstore.
    """
    config = _module("verifying").Config()
    try:
        if isinstance(signed_by, Identity):
            config.use_sigstore_verifier(
                identity=signed_by.name, oidc_issuer=signed_by.provider, trust_config=signed_by.trust
            )
        else:
            config.use_elliptic_key_verifier(public_key=signed_by)
    except Exception as error:
        source = signed_by.trust or "Sigstore's keys" if isinstance(signed_by, Identity) else f"public key {signed_by}"
        raise FusionError(f"{source}: {_one_line(error)}") from None
    try:
        config.set_hashing_config(_hashing(folder)).verify(folder, folder / SIGNATURE)
    except Exception as error:  # the library raises many kinds; whatever it is, the signature does not hold
        return f"{SIGNATURE} does not hold: {_one_line(error)}"
    return ""


def _with_key(private_key: Path) -> Any:
    signing = _module("signing")
    try:
        return signing.Config().use_elliptic_key_signer(private_key=private_key)
    except (ValueError, OSError, TypeError) as error:
        raise FusionError(f"private key {private_key}: {_one_line(error)}") from None


def _token() -> str:
    """The surroundings' word for who we are, a secret; raises `FusionError` when they give none."""
    oidc = _module("oidc", "sigstore")
    try:
        token = oidc.detect_credential()
    except Exception as error:
        raise FusionError(f"keyless signing: {_one_line(error)}") from None
    if not token:
        raise FusionError("keyless signing: no identity here; it takes GitHub Actions and `id-token: write`")
    return str(token)


def _hashing(folder: Path) -> Any:
    paths = [folder / name for name in UNSIGNED]
    return _module("hashing").Config().set_ignored_paths(paths=paths, ignore_git_paths=True)


def _module(name: str, package: str = "model_signing") -> Any:
    try:
        return import_module(f"{package}.{name}")
    except ImportError as error:
        raise FusionError(f"signatures need `{install_command('sign')}`: {error}") from None


def _one_line(error: Exception, secret: str = "") -> str:
    """Kind and words of an error, or of what caused it when it has none; what a server repeats may hold the secret."""
    told = error if str(error) or error.__cause__ is None else error.__cause__
    text = " ".join(f"{type(error).__name__}: {told}".split())
    return (text.replace(secret, "(token)") if secret else text)[:300]
