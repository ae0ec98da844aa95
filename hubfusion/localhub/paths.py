"""Which file paths a repository may hold: nothing that could land outside it or inside `.git`."""

from __future__ import annotations

import re

from hubfusion.localhub.refusal import Refusal


def checked_path(path: object) -> str:
    """The path itself; refused with 422 and the reason when a checkout of it could do harm."""
    if not isinstance(path, str) or not path:
        raise Refusal(422, "path must be a text that is not empty")
    shown = ascii(path[:100])
    parts = path.split("/")
    if path.startswith("/") or re.match(r"[A-Za-z]:[\\/]", path):
        raise Refusal(422, f"path {shown} must be relative")
    if re.search(r"[\x00-\x1f\x7f]", path):
        raise Refusal(422, f"path {shown} must not contain control characters")
    if any("\ud800" <= letter <= "\udfff" for letter in path):
        raise Refusal(422, f"path {shown} is not UTF-8")
    if ".." in parts or "." in parts or "" in parts:
        raise Refusal(422, f"path {shown} must not contain '..', '.' or empty parts")
    if any(re.fullmatch(r"\.git|git~1", part.rstrip(" ."), re.IGNORECASE) for part in parts):
        raise Refusal(422, f"path {shown} must not contain '.git'")
    if "\\" in path:
        raise Refusal(422, f"path {shown} must not contain a backslash")
    if len(path.encode()) > 1024 or any(len(part.encode()) > 255 for part in parts):
        raise Refusal(422, f"path {shown} is longer than 1024 bytes, or a part of it than 255")
    return path
