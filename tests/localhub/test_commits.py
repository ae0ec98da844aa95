"""Commits: what lands, what is refused, and that a race has one winner."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pytest
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationCopy, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import get_session

from hubfusion.localhub import LocalHub, Rules
from tests.localhub.conftest import USERS, World, clients


@pytest.fixture
def repo(world: World, request: pytest.FixtureRequest) -> str:
    name = f"ann/{hashlib.sha1(request.node.name.encode()).hexdigest()[:12]}"
    world.ann.create_repo(name)
    return name


def test_an_unchanged_file_makes_no_commit(world: World, repo: str) -> None:
    first = world.ann.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=repo)
    again = world.ann.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=repo)
    assert again.oid == first.oid == world.ann.model_info(repo).sha


def test_adding_deleting_and_copying_in_one_commit(world: World, repo: str) -> None:
    weights = os.urandom(3000)
    world.ann.create_commit(
        repo,
        [
            CommitOperationAdd("a/x.txt", b"x"),
            CommitOperationAdd("a/y.txt", b"y"),
            CommitOperationAdd("w.bin", weights),
        ],
        commit_message="three files",
        commit_description="and why",
    )
    world.ann.create_commit(
        repo,
        [
            CommitOperationDelete("a/y.txt"),
            CommitOperationCopy("w.bin", "b/w.bin"),
            CommitOperationCopy("a/x.txt", "b/x"),
        ],
        commit_message="ops",
    )
    assert sorted(world.ann.list_repo_files(repo)) == [".gitattributes", "a/x.txt", "b/w.bin", "b/x", "w.bin"]
    copied = world.ann.get_paths_info(repo, "b/w.bin")[0]
    assert (copied.size, copied.lfs.sha256) == (3000, hashlib.sha256(weights).hexdigest())
    world.ann.create_commit(repo, [CommitOperationDelete("b/")], commit_message="folder")
    assert sorted(world.ann.list_repo_files(repo)) == [".gitattributes", "a/x.txt", "w.bin"]
    messages = [(c.title, c.message) for c in world.ann.list_repo_commits(repo)]
    assert messages[2] == ("three files", "and why")


def test_deleting_what_is_not_there_is_refused_and_nothing_lands(world: World, repo: str) -> None:
    before = world.ann.model_info(repo).sha
    with pytest.raises(HfHubHTTPError) as error:
        world.ann.create_commit(
            repo, [CommitOperationAdd("new", b"1"), CommitOperationDelete("gone.txt")], commit_message="x"
        )
    assert error.value.response.headers["X-Error-Code"] == "EntryNotFound"
    assert world.ann.model_info(repo).sha == before


def test_a_stale_parent_is_refused_in_the_words_of_the_hub(world: World, repo: str) -> None:
    old = world.ann.model_info(repo).sha
    new = world.ann.create_commit(repo, [CommitOperationAdd("a", b"1")], commit_message="a", parent_commit=old).oid
    with pytest.raises(HfHubHTTPError) as error:
        world.ann.create_commit(repo, [CommitOperationAdd("b", b"1")], commit_message="b", parent_commit=old)
    assert error.value.response.status_code == 412
    assert "The branch was updated since you opened this page. Please refresh and try again." in str(error.value)
    assert world.ann.model_info(repo).sha == new
    world.ann.create_commit(repo, [CommitOperationAdd("b", b"1")], commit_message="b", parent_commit=new[:7])


def test_of_fifty_commits_on_one_parent_exactly_one_wins(world: World, repo: str) -> None:
    parent = world.ann.model_info(repo).sha
    gate = threading.Barrier(50)

    def race(number: int) -> str | None:
        gate.wait()
        try:
            operation = CommitOperationAdd(f"{number}.txt", str(number).encode())
            commit = world.ann.create_commit(repo, [operation], commit_message=f"{number}", parent_commit=parent)
        except HfHubHTTPError as error:
            assert error.response.status_code == 412
            return None
        return str(commit.oid)

    with ThreadPoolExecutor(50) as pool:
        winners = [oid for oid in pool.map(race, range(50)) if oid]
    assert winners == [world.ann.model_info(repo).sha]
    assert len(world.ann.list_repo_files(repo)) == 2


def test_commits_at_the_same_time_without_a_parent_all_land(world: World, repo: str) -> None:
    def add(number: int) -> str:
        return str(world.ann.upload_file(path_or_fileobj=b"1", path_in_repo=f"{number}.txt", repo_id=repo).oid)

    with ThreadPoolExecutor(10) as pool:
        oids = set(pool.map(add, range(20)))
    history = {commit.commit_id for commit in world.ann.list_repo_commits(repo)}
    assert len(oids) == 20 and oids <= history
    assert len(world.ann.list_repo_files(repo)) == 21


@pytest.mark.parametrize("name", ["weights.bin", "notes.dat", "folder/with space.dat"])
def test_large_and_binary_files_become_lfs_objects_that_git_knows(world: World, repo: str, name: str) -> None:
    content = os.urandom(20_000)
    world.ann.upload_file(path_or_fileobj=BytesIO(content), path_in_repo=name, repo_id=repo)
    info = world.ann.get_paths_info(repo, name)[0]
    assert (info.size, info.lfs.sha256) == (20_000, hashlib.sha256(content).hexdigest())
    git = ["git", "--git-dir", str(world.hub.git_dir(repo))]
    shown = subprocess.run([*git, "show", f"main:{name}"], capture_output=True, check=True).stdout.decode()
    digest = hashlib.sha256(content).hexdigest()
    assert shown == f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize 20000\n"
    check = [*git, "check-attr", "--source=main", "filter", name]
    said = subprocess.run(check, capture_output=True, text=True)
    if said.returncode == 0:  # git < 2.40 cannot read attributes from a commit
        assert said.stdout.strip().endswith("filter: lfs")


def test_an_object_that_was_not_uploaded_here_cannot_be_committed(world: World, repo: str) -> None:
    """Knowing the sha256 of somebody's private file is not enough to get it."""
    secret = os.urandom(1000)
    world.bob.create_repo("bob/private", private=True, exist_ok=True)
    world.bob.upload_file(path_or_fileobj=secret, path_in_repo="w.bin", repo_id="bob/private")
    digest = hashlib.sha256(secret).hexdigest()
    line = '{"key":"header","value":{"summary":"steal"}}\n{"key":"lfsFile","value":{"path":"w.bin","oid":"%s"}}'
    answer = post(world, f"/api/models/{repo}/commit/main", line % digest)
    assert answer.status_code == 400 and "was not uploaded to this repo" in answer.text
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize 1000\n"
    lines = [
        {"key": "header", "value": {"summary": "steal"}},
        {"key": "file", "value": {"path": "w.txt", "content": pointer}},
    ]
    answer = post(world, f"/api/models/{repo}/commit/main", "\n".join(map(json.dumps, lines)))
    assert answer.status_code == 400 and "was not uploaded to this repo" in answer.text
    batch = json.dumps({"operation": "upload", "objects": [{"oid": digest, "size": 1000}]})
    offered = post(world, f"/{repo}.git/info/lfs/objects/batch", batch).json()["objects"][0]
    assert "upload" in offered["actions"]


def post(world: World, path: str, body: str | bytes, token: str = "hf_ann"):
    return get_session().post(
        world.endpoint + path, content=body, headers={"Authorization": f"Bearer {token}", "Content-Type": "a/json"}
    )


@pytest.mark.parametrize("twist", ["content", "short", "long"])
def test_an_object_with_other_bytes_than_announced_is_refused(world: World, repo: str, twist: str) -> None:
    good = b"good bytes " * 100
    digest = hashlib.sha256(good).hexdigest()
    batch = json.dumps({"operation": "upload", "objects": [{"oid": digest, "size": len(good)}]})
    href = post(world, f"/{repo}.git/info/lfs/objects/batch", batch).json()["objects"][0]["actions"]["upload"]["href"]
    bad = {"content": good[:-1] + b"X", "short": good[:-1], "long": good + b"X"}[twist]
    assert get_session().put(href, content=bad).status_code in (413, 422)
    line = '{"key":"header","value":{"summary":"x"}}\n{"key":"lfsFile","value":{"path":"w.bin","oid":"%s"}}'
    assert post(world, f"/api/models/{repo}/commit/main", line % digest).status_code == 400
    assert get_session().put(href, content=good).status_code == 200
    forged = href[:-1] + ("1" if href.endswith("0") else "0")
    assert get_session().put(forged, content=good).status_code == 403
    assert post(world, f"/api/models/{repo}/commit/main", line % digest).status_code == 200


def test_an_upload_in_parts_is_put_together_and_checked(tmp_path: Path) -> None:
    rules = Rules(multipart_from=100_000, part_bytes=40_000)
    content = os.urandom(210_001)
    with LocalHub(tmp_path, USERS, rules=rules) as hub:
        ann = clients(hub).ann
        ann.create_repo("ann/parts")
        ann.upload_file(path_or_fileobj=content, path_in_repo="w.bin", repo_id="ann/parts")
        path = ann.hf_hub_download("ann/parts", "w.bin", local_dir=tmp_path / "there")
        assert Path(path).read_bytes() == content
        assert list((tmp_path / "incoming").iterdir()) == []


@pytest.mark.parametrize(
    "path",
    [
        "../x", "a/../../x", "/etc/passwd", ".git/config", "a/.GIT/hooks/x", "a\0b", "a//b", "./a", "a/.", "",
        "C:/x", "a\\..\\b", "a\nb", "x" * 256, ".git ", "git~1/x",
    ],
)  # fmt: skip
def test_paths_that_could_do_harm_are_refused_by_name(world: World, repo: str, path: str) -> None:
    for key in ("file", "deletedFile", "lfsFile", "deletedFolder"):
        value = {"path": path, "content": "", "oid": "0" * 64, "size": 0}
        lines = [{"key": "header", "value": {"summary": "x"}}, {"key": key, "value": value}]
        answer = post(world, f"/api/models/{repo}/commit/main", "\n".join(map(json.dumps, lines)))
        assert answer.status_code == 422 and answer.json()["error"].startswith("path "), answer.text
    assert world.ann.list_repo_files(repo) == [".gitattributes"]


def test_a_readme_with_broken_metadata_is_refused(world: World, repo: str) -> None:
    for text in (b"---\na: [\n---\n", b"---\nlicense: nonsense\n---\n"):
        with pytest.raises(ValueError, match="Invalid metadata in README.md"):
            world.ann.upload_file(path_or_fileobj=text, path_in_repo="README.md", repo_id=repo)
        lines = [
            {"key": "header", "value": {"summary": "x"}},
            {"key": "file", "value": {"path": "README.md", "content": text.decode()}},
        ]
        answer = post(world, f"/api/models/{repo}/commit/main", "\n".join(map(json.dumps, lines)))
        assert answer.status_code == 400 and answer.json()["error"].startswith("Invalid metadata in README.md")


def test_a_pull_request_can_be_made_from_an_older_parent(world: World, repo: str) -> None:
    old = world.ann.model_info(repo).sha
    world.ann.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=repo)
    commit = world.bob.create_commit(
        repo, [CommitOperationAdd("b", b"2")], commit_message="proposal", create_pr=True, parent_commit=old
    )
    assert commit.pr_num == 1
    assert world.ann.list_repo_files(repo, revision="refs/pr/1") == [".gitattributes", "b"]
    with pytest.raises(HfHubHTTPError) as error:
        world.bob.upload_file(path_or_fileobj=b"2", path_in_repo="b", repo_id=repo)
    assert error.value.response.status_code == 403
    world.bob.upload_file(path_or_fileobj=b"3", path_in_repo="c", repo_id=repo, revision="refs/pr/1")
    world.ann.merge_pull_request(repo, 1)
    assert sorted(world.ann.list_repo_files(repo)) == [".gitattributes", "a", "b", "c"]


@pytest.mark.parametrize("body", ["", "nonsense", "[1]", '{"key":"file"}', '{"key":"evil","value":{}}', "{" * 5000])
def test_a_commit_that_is_not_one_is_refused(world: World, repo: str, body: str) -> None:
    assert post(world, f"/api/models/{repo}/commit/main", body).status_code == 400


def test_refs_cannot_be_moved_by_names_that_are_paths(world: World, repo: str) -> None:
    for branch in ("..%2F..%2Fx", "refs%2Fheads%2Fmain", "a..b", "-x", "a.lock", "%00"):
        assert post(world, f"/api/models/{repo}/branch/{branch}", "{}").status_code == 400
    assert [b.name for b in world.ann.list_repo_refs(repo).branches] == ["main"]


def test_pull_requests_opened_at_the_same_time_get_numbers_of_their_own(world: World, repo: str) -> None:
    def propose(number: int) -> int:
        operation = CommitOperationAdd(f"{number}.txt", b"1")
        return int(world.bob.create_commit(repo, [operation], commit_message=f"{number}", create_pr=True).pr_num)

    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(propose, range(8)))
    assert sorted(numbers) == list(range(1, 9))
    for wanted, num in enumerate(numbers):
        assert f"{wanted}.txt" in world.ann.list_repo_files(repo, revision=f"refs/pr/{num}")


def test_a_repository_made_by_many_at_once_is_made_once(world: World) -> None:
    def make(_: int) -> int:
        try:
            world.ann.create_repo("ann/raced")
        except HfHubHTTPError as error:
            return int(error.response.status_code)
        return 200

    with ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(make, range(8)))
    assert sorted(codes) == [200, *[409] * 7]


def test_a_conversion_is_a_ref_of_its_own(world: World) -> None:
    """As the parquet bot makes one: a branch named by its full ref, then commits to it."""
    name, ref = "ann/converted", "refs/convert/parquet"
    world.ann.create_repo(name, repo_type="dataset")

    def commit(end: bytes = b"", parent: str | None = None) -> CommitInfo:
        table = CommitOperationAdd("default/train/0000.parquet", b"PAR1" + bytes(2000) + end)
        where = {"repo_type": "dataset", "revision": ref, "parent_commit": parent}
        return world.ann.create_commit(name, [table], commit_message="convert", **where)

    with pytest.raises(RevisionNotFoundError):
        commit()
    world.ann.create_branch(name, branch=ref, repo_type="dataset")
    with pytest.raises(HfHubHTTPError, match="already exists"):
        world.ann.create_branch(name, branch=ref, repo_type="dataset")
    head = commit().oid
    refs = world.anon.list_repo_refs(name, repo_type="dataset")
    assert [(c.name, c.ref, c.target_commit) for c in refs.converts] == [("parquet", ref, head)]
    assert [b.name for b in refs.branches] == ["main"]
    assert world.anon.dataset_info(name, revision=ref).sha == head != world.anon.dataset_info(name).sha
    assert world.anon.list_repo_files(name, repo_type="dataset") == [".gitattributes"]
    assert "default/train/0000.parquet" in world.anon.list_repo_files(name, repo_type="dataset", revision=ref)
    url = f"{world.endpoint}/datasets/{name}/resolve/refs%2Fconvert%2Fparquet/default/train/0000.parquet"
    assert get_session().get(url).content.startswith(b"PAR1")
    with pytest.raises(HfHubHTTPError, match="The branch was updated"):
        commit(b"more", world.anon.dataset_info(name).sha)
    world.ann.delete_branch(name, branch=ref, repo_type="dataset")
    assert world.anon.list_repo_refs(name, repo_type="dataset").converts == []


@pytest.mark.parametrize("branch", ["refs/pr/1", "refs/heads/x", "refs/convert/", "refs/convert/a..b", "refs/other/x"])
def test_no_branch_is_made_of_another_kind_of_ref(world: World, repo: str, branch: str) -> None:
    with pytest.raises(HfHubHTTPError, match="is not a name for a branch"):
        world.ann.create_branch(repo, branch=branch)
