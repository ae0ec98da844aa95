"""Who may see, read and write a repository; every endpoint comes through here."""

from __future__ import annotations

import json

from hubfusion.localhub.refusal import Code, Refusal, missing_repo, missing_revision
from hubfusion.localhub.store.git import GitRepo, Snapshot
from hubfusion.localhub.store.repos import Kind, Repo
from hubfusion.localhub.web import Call

KINDS = {"models": Kind.MODEL, "datasets": Kind.DATASET, "spaces": Kind.SPACE}


def kind_of(call: Call) -> Kind:
    """The kind of repository that the path names (`kind` is absent in web paths of models)."""
    return KINDS[call.params.get("kind", "models")]


def is_visible(call: Call, repo: Repo) -> bool:
    """Whether who asks may know of a repository."""
    return not repo.private or call.hub.accounts.owns(call.user, repo.namespace)


def visible_repo(call: Call) -> Repo:
    """The repository that the path names; one that is hidden from who asks does not exist for them."""
    kind, namespace, name = kind_of(call), call.params["ns"], call.params["name"]
    repo = call.hub.repos.find(kind, namespace, name)
    if repo is None and (moved := call.hub.repos.moved_to(kind, namespace, name)) and is_visible(call, moved):
        raise _redirect(call, moved)
    if repo is None or not is_visible(call, repo):
        raise missing_repo(call.user is None)
    return repo


def _redirect(call: Call, repo: Repo) -> Refusal:
    old = f"{call.params['ns']}/{call.params['name']}"
    target = call.url.replace(f"/{old}", f"/{repo.id}", 1)
    return Refusal(307, f"Temporary Redirect. Redirecting to {repo.id}", headers={"Location": target})


def written_repo(call: Call) -> Repo:
    """The repository that the path names, if who asks may change it: 401 without a token, 403 without the right."""
    call.require_user()
    repo = visible_repo(call)
    require_owner(call, repo.namespace)
    return repo


def proposed_repo(call: Call) -> Repo:
    """The repository that the path names, if who asks may propose a change to it: any user who can read its files."""
    call.require_user()
    return readable_repo(call)


def require_owner(call: Call, namespace: str) -> str:
    """The name of who asks, if this namespace is theirs or of an organization of theirs."""
    user = call.require_user()
    if not call.hub.accounts.owns(user, namespace):
        raise Refusal(403, f"Forbidden: you don't have the rights to write to namespace {namespace}")
    return user


def readable_repo(call: Call) -> Repo:
    """The repository that the path names, if who asks may read its files: gated ones need a grant."""
    repo = visible_repo(call)
    require_grant(call, repo)
    return repo


def require_grant(call: Call, repo: Repo) -> None:
    """Refuse with `GatedRepo` who may see a repository but not read its files."""
    if repo.gated and not call.hub.accounts.owns(call.user, repo.namespace):
        where = f"{call.base}/{repo.kind.prefix}{repo.id}"
        if call.user is None:
            raise Refusal(
                401,
                f"Access to {repo.kind} {repo.id} is restricted. You must have access to it and be authenticated to "
                f"access it. Please log in.",
                Code.GATED,
            )
        row = call.hub.db.row("SELECT body FROM access WHERE repo = ? AND user = ?", repo.number, call.user)
        if row is None or json.loads(row["body"])["status"] != "accepted":
            raise Refusal(
                403,
                f"Access to {repo.kind} {repo.id} is restricted and you are not in the authorized list. "
                f"Visit {where} to ask for access.",
                Code.GATED,
            )


def commit_of(git: GitRepo, revision: str) -> str:
    """The commit of a revision; 404 with `RevisionNotFound` when there is none."""
    sha = git.resolve(revision)
    if sha is None:
        raise missing_revision(revision)
    return sha


def snapshot_of(call: Call, repo: Repo) -> Snapshot:
    """The files of the revision that the path names (`main` when it names none)."""
    git = call.hub.repos.git(repo)
    return git.snapshot(commit_of(git, call.params.get("rev", "main")))
