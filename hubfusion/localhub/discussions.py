"""Discussions and pull requests: one JSON document each; their commits and diffs are read from git."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from hubfusion.localhub.commits import Proposal, changes_of, publish
from hubfusion.localhub.facts import when
from hubfusion.localhub.refusal import Refusal, missing_revision
from hubfusion.localhub.state import Hub
from hubfusion.localhub.store.git import GitRepo, Signature
from hubfusion.localhub.store.repos import MAIN, Repo

Document = dict[str, Any]
TITLE_MAX = 200
COMMENT_MAX = 65_536


def checked_title(value: object) -> str:
    """A title of 1 to 200 characters, stripped."""
    title = value.strip() if isinstance(value, str) else ""
    if not 1 <= len(title) <= TITLE_MAX:
        raise Refusal(400, f"title must have 1 to {TITLE_MAX} characters, got {len(title)}")
    return title


def checked_comment(value: object) -> str:
    """A comment of 1 to 65536 characters."""
    text = value if isinstance(value, str) else ""
    if not text.strip() or len(text) > COMMENT_MAX:
        raise Refusal(400, f"comment must have 1 to {COMMENT_MAX} characters, got {len(text)}")
    return text


def event(kind: str, author: str, data: dict[str, Any]) -> dict[str, Any]:
    """One event of a discussion."""
    return {"id": secrets.token_hex(12), "type": kind, "at": time.time(), "author": author, "data": data}


def comment_event(author: str, text: str) -> dict[str, Any]:
    """A new comment."""
    return event("comment", author, {"raw": text, "edited": False, "hidden": False, "history": []})


def find(hub: Hub, repo: Repo, num: int) -> Document:
    """One discussion; 404 when there is none of this number."""
    row = hub.db.row("SELECT body FROM discussions WHERE repo = ? AND num = ?", repo.number, num)
    if row is None:
        raise Refusal(404, f"Discussion {num} not found in {repo.id}")
    document: Document = json.loads(row["body"])
    return document


def every(hub: Hub, repo: Repo) -> list[Document]:
    """All discussions of a repository, newest first."""
    rows = hub.db.rows("SELECT body FROM discussions WHERE repo = ? ORDER BY num DESC", repo.number)
    return [json.loads(row["body"]) for row in rows]


def save(hub: Hub, repo: Repo, document: Document) -> None:
    """Write one discussion, whole."""
    with hub.db.write() as connection:
        connection.execute(
            "INSERT OR REPLACE INTO discussions VALUES (?, ?, ?)",
            (repo.number, document["num"], json.dumps(document)),
        )


def next_number(hub: Hub, repo: Repo) -> int:
    """The number of the next discussion; the caller holds the repository's lock."""
    row = hub.db.row("SELECT max(num) AS n FROM discussions WHERE repo = ?", repo.number)
    return (row["n"] or 0) + 1 if row else 1


def open_discussion(hub: Hub, repo: Repo, author: str, title: str, text: str) -> Document:
    """A new discussion; the caller holds the repository's lock."""
    document = _document(next_number(hub, repo), author, title, "open", text)
    save(hub, repo, document)
    return document


def _document(num: int, author: str, title: str, status: str, text: str) -> Document:
    events = [comment_event(author, text)] if text.strip() else []
    return {
        "num": num,
        "title": title,
        "author": author,
        "at": time.time(),
        "status": status,
        "pull": False,
        "target": None,
        "base": None,
        "merged": None,
        "events": events,
    }


def open_draft(hub: Hub, repo: Repo, author: str, title: str, text: str) -> Document:
    """A pull request without changes yet, as a draft on the head of main; the caller holds the lock."""
    git = hub.repos.git(repo)
    head = git.ref(MAIN)
    assert head is not None  # every repository has a main
    document = _document(next_number(hub, repo), author, title, "draft", text) | {
        "pull": True,
        "target": MAIN,
        "base": head,
    }
    git.move_refs([(f"refs/pr/{document['num']}", head, "")])
    save(hub, repo, document)
    return document


def open_pull_request(hub: Hub, repo: Repo, target: str, proposal: Proposal, author: str) -> tuple[int, str, str]:
    """A pull request to a branch with one commit: (number, base commit, new commit). The caller holds the lock.

    The ref is written first: when the process is killed in between there is a ref without a discussion, whose number
    the next one takes over.
    """
    git = hub.repos.git(repo)
    head = git.ref(target)
    if head is None:
        raise missing_revision(target)
    base = git.resolve(proposal.parent) if proposal.parent else head
    if base is None:
        raise Refusal(412, f"parent commit {proposal.parent} is not in {repo.id}")
    changes = changes_of(git, git.snapshot(base), proposal)
    new = git.write_commit([base], changes, proposal.message, Signature(author, time.time()))
    num = next_number(hub, repo)
    document = _document(num, author, proposal.summary[:TITLE_MAX], "open", proposal.description) | {
        "pull": True,
        "target": target,
        "base": base,
    }
    git.move_refs([(f"refs/pr/{num}", new, "")])
    save(hub, repo, document)
    return num, base, new


def owns_pull(hub: Hub, repo: Repo, ref: str, user: str) -> bool:
    """Whether a ref is an open pull request of this user."""
    if not ref.startswith("refs/pr/") or not ref[8:].isdigit():
        return False
    row = hub.db.row("SELECT body FROM discussions WHERE repo = ? AND num = ?", repo.number, int(ref[8:17]))
    document = json.loads(row["body"]) if row else {}
    return document.get("author") == user and document.get("status") in ("open", "draft")


def pull_head(git: GitRepo, document: Document) -> str | None:
    """The newest commit of a pull request."""
    return git.ref(f"refs/pr/{document['num']}")


def conflicts(git: GitRepo, document: Document) -> list[str]:
    """Paths that an open pull request and the branch it is for both changed."""
    main, head = git.ref(document["target"]), pull_head(git, document)
    if not main or not head or document["status"] not in ("open", "draft"):
        return []
    return git.write_merge(main, head)[1]


def merge(hub: Hub, repo: Repo, document: Document, user: str, comment: str) -> tuple[str, str]:
    """Merge a pull request into its branch: (old head, new head). The caller holds the lock.

    When a killed process had merged in git but not said so, the tree is already what the merge makes it: then only
    the saying is left to do.
    """
    if not document["pull"] or document["status"] not in ("open", "draft"):
        raise Refusal(400, f"#{document['num']} is not an open pull request")
    git = hub.repos.git(repo)
    main, head = git.ref(document["target"]), pull_head(git, document)
    if main is None or head is None:
        raise missing_revision(document["target"])
    tree, clashing = git.write_merge(main, head)
    if clashing:
        raise Refusal(409, f"This pull request has conflicts in {', '.join(clashing)[:500]}")
    new = main
    if not git.is_ancestor(head, main) or head == document["base"]:
        message = f"{document['title']} (#{document['num']})\n\n{comment}".strip() + "\n"
        new = git.commit_tree(tree, [main, head], message, Signature(user, time.time()))
        publish(hub, repo, document["target"], new, main)
    document["status"], document["merged"] = "merged", new
    if comment:
        document["events"].append(comment_event(user, comment))
    document["events"].append(event("status-change", user, {"status": "merged"}))
    save(hub, repo, document)
    return main, new


def show(document: Document, repo: Repo) -> dict[str, Any]:
    """A discussion as listings show it."""
    return {
        "num": document["num"],
        "title": document["title"],
        "author": {"name": document["author"], "type": "user"},
        "status": document["status"],
        "createdAt": when(document["at"]),
        "isPullRequest": document["pull"],
        "repo": {"name": repo.id, "type": repo.kind},
        "pinned": False,
        "numComments": sum(item["type"] == "comment" for item in document["events"]),
    }


def show_event(item: dict[str, Any]) -> dict[str, Any]:
    """One event as clients read it."""
    shown = {
        "id": item["id"],
        "type": item["type"],
        "createdAt": when(item["at"]),
        "author": {"name": item["author"], "type": "user"},
        "data": item["data"],
    }
    if item["type"] == "comment":
        data = item["data"]
        latest = {"raw": data["raw"], "html": "", "updatedAt": when(item["at"]), "author": shown["author"]}
        shown["data"] = {
            "edited": data["edited"],
            "hidden": data["hidden"],
            "latest": latest,
            "history": [{"raw": text} for text in data["history"]],
            "numEdits": len(data["history"]),
        }
    return shown


def show_whole(hub: Hub, repo: Repo, document: Document, with_diff: bool) -> dict[str, Any]:
    """A discussion with its events; a pull request also with commits, conflicts and (if asked) its diff."""
    events = [show_event(item) for item in document["events"]]
    shown = show(document, repo)
    if document["pull"]:
        git = hub.repos.git(repo)
        head = pull_head(git, document)
        assert head is not None  # written before the document
        for commit in git.log([head, f"^{document['base']}"]):
            data = {"oid": commit.sha, "subject": commit.title}
            item = {"id": commit.sha[:24], "type": "commit", "at": commit.at, "author": commit.author, "data": data}
            events.append(show_event(item))
        events.sort(key=lambda item: str(item["createdAt"]))
        shown["changes"] = {"base": document["target"]} | (
            {"mergeCommitId": document["merged"]} if document["merged"] else {}
        )
        shown["filesWithConflicts"] = conflicts(git, document)
        if with_diff:
            shown["diff"] = git.diff(git.merge_base(document["base"], head) or document["base"], head)
    return shown | {"events": events}
