"""What the Hub says when it does not do what was asked: a status, one line, and the code that clients switch on."""

from __future__ import annotations

from enum import StrEnum


class Code(StrEnum):
    """Values of `X-Error-Code`; huggingface_hub turns each into its own exception class."""

    REPO = "RepoNotFound"
    REVISION = "RevisionNotFound"
    ENTRY = "EntryNotFound"
    GATED = "GatedRepo"


class Refusal(Exception):
    """An answer that is an error: HTTP status, message in one line, optional code and headers."""

    def __init__(
        self, status: int, message: str, code: Code | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = headers or {}


STALE_PARENT = "The branch was updated since you opened this page. Please refresh and try again."


def missing_repo(anonymous: bool) -> Refusal:
    """A repository that does not exist or is hidden; anonymous callers cannot tell and get 401, as on the Hub."""
    if anonymous:
        return Refusal(401, "Invalid username or password.", Code.REPO)
    return Refusal(404, "Repository not found", Code.REPO)


def missing_revision(revision: str) -> Refusal:
    """The branch, tag, pull request or commit is not in this repository."""
    return Refusal(404, f"Invalid rev id: {revision}", Code.REVISION)


def missing_entry(path: str, headers: dict[str, str] | None = None) -> Refusal:
    """The file or folder is not in this revision."""
    return Refusal(404, f"Entry not found: {path}" if path else "Entry not found", Code.ENTRY, headers)
