"""Sign a release and check the signature, by OpenSSF model signing (`pip install hubfusion[sign]`).

The signature covers every file of the revision but the card, which may be corrected later. With a key it works
offline; it says who made the files, not when: the version and the parent's commit stand in the signed manifest.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from hubfusion.errors import FusionError

SIGNATURE = "model.sig"
UNSIGNED = (SIGNATURE, "README.md", ".gitattributes")


def check_private_key(private_key: Path) -> None:
    """Refuse what cannot sign (no key, no package), before hours of work end in it."""
    signing = _module("signing")
    try:
        signing.Config().use_elliptic_key_signer(private_key=private_key)
    except (ValueError, OSError, TypeError) as error:
        raise FusionError(f"private key {private_key}: {_one_line(error)}") from None


def sign(folder: Path, private_key: Path) -> Path:
    """Sign all files in ``folder`` but `UNSIGNED` with an elliptic-curve key (PEM); returns the signature's path."""
    target = folder / SIGNATURE
    check_private_key(private_key)
    signing = _module("signing")
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=private_key)
        config.set_hashing_config(_hashing(folder)).sign(folder, target)
    except (ValueError, OSError, TypeError) as error:
        raise FusionError(f"signature of {folder}: {_one_line(error)}") from None
    return target


def check_signature(folder: Path, public_key: Path) -> str:
    """Compare ``folder`` with its `SIGNATURE`; empty when it holds, else what differs, in one sentence."""
    verifying = _module("verifying")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (ValueError, OSError, TypeError) as error:
        raise FusionError(f"public key {public_key}: {_one_line(error)}") from None
    try:
        config.set_hashing_config(_hashing(folder)).verify(folder, folder / SIGNATURE)
    except Exception as error:  # the library raises many kinds; whatever it is, the signature does not hold
        return f"{SIGNATURE} does not hold: {_one_line(error)}"
    return ""


def _hashing(folder: Path) -> Any:
    paths = [folder / name for name in UNSIGNED]
    return _module("hashing").Config().set_ignored_paths(paths=paths, ignore_git_paths=True)


def _module(name: str) -> Any:
    try:
        return import_module(f"model_signing.{name}")
    except ImportError as error:
        raise FusionError(f"signatures need `pip install hubfusion[sign]`: {error}") from None


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
