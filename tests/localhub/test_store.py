"""What lies on disk: git plumbing, objects, attributes, the database."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from hubfusion.localhub.refusal import Refusal
from hubfusion.localhub.store.database import Database
from hubfusion.localhub.store.git import NOTHING, Delete, GitRepo, Put, RefMoved, Signature, init_bare, is_ref_name
from hubfusion.localhub.store.gitattributes import INITIAL, LfsPatterns, line_for
from hubfusion.localhub.store.objects import ObjectStore, Pointer, parse_pointer
from hubfusion.localhub.store.recent import Recent

ANN = Signature("ann", 1_700_000_000.0)
MAIN = "refs/heads/main"


@pytest.fixture
def repo(tmp_path: Path) -> GitRepo:
    init_bare(tmp_path / "1.git")
    return GitRepo(tmp_path / "1.git", Recent(1000))


def git(repo: GitRepo, *arguments: str) -> str:
    command = ["git", "--git-dir", str(repo.path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_commit_is_invisible_until_its_ref_moves(repo: GitRepo) -> None:
    first = repo.write_commit([], [Put("a", b"1"), Put('odd "name" é', b"2")], "first\n", ANN)
    assert repo.refs("refs") == {} and git(repo, "for-each-ref") == ""
    repo.move_refs([(MAIN, first, NOTHING)])
    assert repo.ref(MAIN) == first == repo.resolve("main")
    second = repo.write_commit([first], [Delete("a"), Put("b/c", b"3")], "second\n\nbody\n", ANN)
    repo.move_refs([(MAIN, second, first)])
    files = repo.snapshot(second).files
    assert {path: entry.size for path, entry in files.items()} == {'odd "name" é': 1, "b/c": 1}
    assert repo.blob(files["b/c"].oid) == b"3"
    assert [(c.sha, c.title, c.message, c.author) for c in repo.log([second])] == [
        (second, "second", "body", "ann"),
        (first, "first", "", "ann"),
    ]
    assert git(repo, "fsck", "--strict") == ""


def test_a_ref_moves_only_from_where_it_is_expected_and_all_move_or_none(repo: GitRepo) -> None:
    one, two = (repo.write_commit([], [Put("a", text)], "x", ANN) for text in (b"1", b"2"))
    repo.move_refs([(MAIN, one, NOTHING)])
    for moves in (
        [(MAIN, two, NOTHING)],
        [(MAIN, two, two)],
        [("refs/tags/t", two, NOTHING), (MAIN, two, two)],
        [(MAIN, NOTHING, two)],
    ):
        with pytest.raises(RefMoved):
            repo.move_refs(moves)
    assert repo.refs("refs") == {MAIN: one}


def test_revisions_come_down_to_commits_and_nothing_else(repo: GitRepo) -> None:
    sha = repo.write_commit([], [Put("a", b"1")], "x", ANN)
    tag = repo.write_tag("v0", sha, "first", ANN)
    repo.move_refs([(MAIN, sha, NOTHING), ("refs/tags/v0", tag, NOTHING), ("refs/pr/1", sha, NOTHING)])
    for revision in ("main", "v0", "refs/pr/1", "refs/heads/main", sha, sha[:7]):
        assert repo.resolve(revision) == sha, revision
    blob = repo.snapshot(sha).files["a"].oid
    for revision in (
        blob,
        repo.tree(sha),
        sha[:6],
        "f" * 40,
        "../../etc/passwd",
        "main..v0",
        "HEAD",
        "-h",
        "",
        "@{-1}",
    ):
        assert repo.resolve(revision) is None, revision
    git(repo, "pack-refs", "--all")
    assert repo.resolve("main") == repo.resolve("v0") == sha


@pytest.mark.parametrize("name", ["refs/heads/a", "refs/heads/dev/x", "refs/tags/v1.0", "refs/heads/é"])
def test_names_that_git_takes(name: str) -> None:
    assert is_ref_name(name)
    assert subprocess.run(["git", "check-ref-format", name]).returncode == 0


@pytest.mark.parametrize(
    "name",
    ["refs/heads/../x", "refs/heads/a..b", "refs/heads/.a", "refs/heads/a.lock", "refs/heads/a b", "refs/heads/a~1",
     "refs/heads/a^", "refs/heads/a:b", "refs/heads/a?", "refs/heads/a*", "refs/heads/a[", "refs/heads/a\\b",
     "refs/heads//a", "refs/heads/a/", "refs/heads/a.", "refs/heads/@{x", "refs/heads/a\n", "refs/heads/a\x7f"],
)  # fmt: skip
def test_names_that_git_refuses_are_refused_before_it_is_asked(name: str) -> None:
    assert not is_ref_name(name)
    assert subprocess.run(["git", "check-ref-format", name]).returncode != 0


def test_a_merge_says_what_is_in_conflict(repo: GitRepo) -> None:
    base = repo.write_commit([], [Put("a", b"1\n"), Put("b", b"1\n")], "base", ANN)
    ours = repo.write_commit([base], [Put("a", b"2\n")], "ours", ANN)
    theirs = repo.write_commit([base], [Put("b", b"2\n")], "theirs", ANN)
    other = repo.write_commit([base], [Put("a", b"3\n")], "other", ANN)
    tree, clashing = repo.write_merge(ours, theirs)
    merged = repo.commit_tree(tree, [ours, theirs], "merge", ANN)
    assert clashing == [] and {repo.blob(e.oid) for e in repo.snapshot(merged).files.values()} == {b"2\n"}
    assert repo.write_merge(ours, other)[1] == ["a"]
    assert repo.is_ancestor(theirs, merged) and not repo.is_ancestor(other, merged)


def test_pointers_are_written_and_read_as_git_lfs_does() -> None:
    text = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 12345\n"
    assert parse_pointer(text) == Pointer("ab" * 32, 12345) and Pointer("ab" * 32, 12345).text() == text
    for other in (b"", text[:-1], text + b"x" * 600, text.replace(b"sha256", b"md5"), text.upper(), b"size 1\n" + text):
        assert parse_pointer(other) is None


@pytest.mark.parametrize(
    "path",
    [
        "w.bin",
        "a/b/model.safetensors",
        "events.tfevents.1",
        "x.tar.gz",
        "saved_model/a/b",
        "README.md",
        "a.txt",
        "bin",
        "x.BIN",
    ],
)
def test_patterns_decide_as_git_does(tmp_path: Path, path: str) -> None:
    text = INITIAL + "/top.txt filter=lfs\nsub/*.txt filter=lfs -text\n*.npy -filter\n" + line_for("odd name[1].txt")
    (tmp_path / ".gitattributes").write_text(text)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    patterns = LfsPatterns(text)
    for name in (
        path,
        "top.txt",
        "a/top.txt",
        "sub/a.txt",
        "sub/b/a.txt",
        "x.npy",
        "odd name[1].txt",
        "a/odd name[1].txt",
    ):
        said = subprocess.run(
            ["git", "-C", str(tmp_path), "check-attr", "filter", "--", name], capture_output=True, text=True, check=True
        )
        assert patterns.has(name) == said.stdout.strip().endswith("filter: lfs"), name


def test_an_object_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path / "objects", tmp_path / "incoming")
    content = os.urandom(100_000)
    digest = hashlib.sha256(content).hexdigest()
    for blocks, size in (([content[:-1]], 100_000), ([content, b"x"], 100_000), ([content[::-1]], 100_000)):
        with pytest.raises(Refusal):
            store.add(blocks, digest, size)
        assert store.size(digest) is None and list(store.temporary.iterdir()) == []
    store.add([content[:60_000], content[60_000:]], digest, 100_000)
    assert store.path(digest).read_bytes() == content
    for name in ("../x", "", digest.upper(), digest + "/x"):
        with pytest.raises(Refusal):
            store.path(name)


def test_a_transaction_is_whole_or_nothing(tmp_path: Path) -> None:
    db = Database(tmp_path / "db")
    db.put_document("a", "1", "ann", {"n": 1})
    with pytest.raises(RuntimeError), db.write():
        db.put_document("a", "1", "ann", {"n": 2})
        db.put_document("a", "2", "bob", {"n": 3})
        raise RuntimeError
    assert db.documents("a") == [{"n": 1}] and db.documents("a", "bob") == []
    assert db.meta("key", "first") == db.meta("key", "second") == "first"
    assert db.delete_document("a", "1") and not db.delete_document("a", "1")


def test_the_values_used_last_stay() -> None:
    recent: Recent[str, int] = Recent(10, lambda value: value)
    for key, value in (("a", 4), ("b", 4)):
        recent.put(key, value)
    assert recent.get("a") == 4
    recent.put("c", 4)
    assert (recent.get("a"), recent.get("b"), recent.get("c")) == (4, None, 4)
    recent.put("huge", 1000)
    assert recent.get("huge") == 1000 and recent.get("a") is None
