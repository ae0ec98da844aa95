"""Preupload and commit."""

from __future__ import annotations

import base64
import binascii
import codecs
from fnmatch import fnmatch
from typing import Any

from starlette.responses import Response

from hubfusion.localhub import discussions as talk
from hubfusion.localhub.access import commit_of, proposed_repo, require_owner
from hubfusion.localhub.commits import REGULAR_MAX, branch_ref, land, large_patterns, read_proposal
from hubfusion.localhub.paths import checked_path
from hubfusion.localhub.refusal import Refusal, missing_revision
from hubfusion.localhub.store.git import Entry, is_ref_name
from hubfusion.localhub.store.repos import Repo
from hubfusion.localhub.web import COMMIT_BODY, Call, Routes, answer
from hubfusion.localhub.webhooks import announce_content, announce_discussion

routes = Routes()
_HERE = "/api/{kind:models|datasets|spaces}/{ns}/{name}"


def require_right(call: Call, repo: Repo, revision: str, create_pr: bool) -> str:
    """Who asks, if they may commit here: owners anywhere, others to a new PR or to one of theirs."""
    user = call.require_user()
    if not create_pr and not talk.owns_pull(call.hub, repo, branch_ref(revision), user):
        require_owner(call, repo.namespace)
    return user


@routes.add("POST", _HERE + "/preupload/{rev}")
def preupload(call: Call) -> Response:
    """Say of each file whether it is sent inline or as a large object, and what lies there now."""
    repo, revision = proposed_repo(call), call.params["rev"]
    require_right(call, repo, revision, call.flag("create_pr"))
    git = call.hub.repos.git(repo)
    snapshot = git.snapshot(commit_of(git, revision))
    body = call.json()
    patterns = large_patterns(git, snapshot)
    rules = snapshot.files.get(".gitignore")
    given = body.get("gitIgnore") or (git.blob(rules.oid).decode(errors="replace") if rules else "")
    ignored = [line.strip() for line in str(given).splitlines()]
    files = body.get("files")
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        raise Refusal(400, "files must be a list of {path, size, sample}")
    out = []
    for file in files:
        path, size = checked_path(file.get("path")), file.get("size")
        if not isinstance(size, int) or size < 0:
            raise Refusal(400, f"{path}: size must be a number of bytes, got {size!r}")
        large = patterns.has(path) or size > REGULAR_MAX or _is_binary(file.get("sample"))
        shown: dict[str, Any] = {"path": path, "uploadMode": "lfs" if large else "regular"}
        shown["shouldIgnore"] = any(_matches(path, pattern) for pattern in ignored)
        if (there := snapshot.files.get(path)) and bool(there.pointer) == large:
            shown["oid"] = _oid(there)
        out.append(shown)
    return answer({"files": out, "commitOid": snapshot.sha})


def _oid(entry: Entry) -> str:
    return entry.pointer.sha256 if entry.pointer else entry.oid


def _is_binary(sample: object) -> bool:
    try:
        start = base64.b64decode(str(sample or ""), validate=True)
    except binascii.Error:
        raise Refusal(400, "sample is not base64") from None
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)  # a character cut off at the end is no error
    except UnicodeDecodeError:
        return True
    return b"\0" in start


def _matches(path: str, pattern: str) -> bool:
    """Whether one line of a `.gitignore` (without negation) covers a path."""
    if not pattern or pattern.startswith(("#", "!")):
        return False
    parts, wanted = path.split("/"), pattern.rstrip("/").lstrip("/")
    if "/" in pattern.rstrip("/"):
        return any(fnmatch("/".join(parts[:n]), wanted) for n in range(1, len(parts) + 1))
    return any(fnmatch(part, wanted) for part in (parts[:-1] if pattern.endswith("/") else parts))


@routes.add("POST", _HERE + "/commit/{rev}", limit=COMMIT_BODY)
def commit(call: Call) -> Response:
    """Land a commit on a branch, or open a pull request with it."""
    found, revision, create_pr = proposed_repo(call), call.params["rev"], call.flag("create_pr")
    user = require_right(call, found, revision, create_pr)
    assert call.body is not None  # this route's body is always read
    proposal = read_proposal(call.hub, found, call.body)
    with call.hub.repos.writing(found) as repo:
        where = f"{call.base}/{repo.kind.prefix}{repo.id}"
        pull = None
        if create_pr:
            target = branch_ref(revision)
            if not target.startswith("refs/heads/") or not is_ref_name(target):
                raise missing_revision(revision)
            pull, old, new = talk.open_pull_request(call.hub, repo, target, proposal, user)
            ref = f"refs/pr/{pull}"
        else:
            ref, old, new = land(call.hub, repo, revision, proposal, user)
    announce_content(call, repo, [(ref, old, new)])
    if pull is not None:
        announce_discussion(call, repo, talk.find(call.hub, repo, pull), "create")
    shown = {"success": True, "commitOid": new, "commitUrl": f"{where}/commit/{new}", "hookOutput": ""}
    return answer(shown | ({"pullRequestUrl": f"{where}/discussions/{pull}"} if pull else {}))
