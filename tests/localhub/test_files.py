"""Reading: downloads and ranges, trees and histories, clones."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfFileSystem
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import get_session

from hubfusion.localhub.refusal import Refusal
from hubfusion.localhub.routes.files import parse_range
from tests.localhub.conftest import World

REPO = "ann/files"


def safetensors(entries: dict[str, list[int]], dtype: str = "F32") -> bytes:
    header, at = {}, 0
    for name, shape in entries.items():
        size = 4 * shape[0] * shape[1]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + os.urandom(at)


WEIGHTS = safetensors({"a": [4, 4], "b": [2, 3]})


@pytest.fixture(scope="module")
def shas(world: World) -> list[str]:
    """The commits of one repository: config, then weights, then a change of the config on a branch and a tag."""
    world.ann.create_repo(REPO)
    one = world.ann.upload_file(path_or_fileobj=b'{"v": 1}', path_in_repo="config.json", repo_id=REPO).oid
    files = [CommitOperationAdd("model.safetensors", WEIGHTS), CommitOperationAdd("sub/deep/note.txt", b"note")]
    two = world.ann.create_commit(REPO, files, commit_message="weights").oid
    world.ann.create_branch(REPO, branch="dev/x")
    three = world.ann.upload_file(
        path_or_fileobj=b'{"v": 2}', path_in_repo="config.json", repo_id=REPO, revision="dev/x"
    ).oid
    world.ann.create_tag(REPO, tag="v0", revision=one, tag_message="first")
    return [one, two, three]


def fetch(world: World, path: str, **headers: str):
    return get_session().get(f"{world.endpoint}/{REPO}/resolve/{path}", headers=headers)


def test_a_revision_can_be_a_branch_a_tag_or_a_commit(world: World, shas: list[str]) -> None:
    expected = {"main": 1, "dev%2Fx": 2, "v0": 1, shas[2]: 2, shas[0][:8]: 1}
    for revision, version in expected.items():
        answer = fetch(world, f"{revision}/config.json")
        assert answer.json() == {"v": version}, revision
    assert fetch(world, "v0/config.json").headers["x-repo-commit"] == shas[0]
    assert world.ann.model_info(REPO, revision="v0").sha == shas[0]


def test_a_download_has_the_headers_that_the_client_caches_by(world: World, shas: list[str], tmp_path: Path) -> None:
    info = world.anon.get_paths_info(REPO, ["config.json", "model.safetensors"])
    answer = get_session().head(f"{world.endpoint}/{REPO}/resolve/main/model.safetensors")
    assert answer.headers["x-repo-commit"] == shas[1]
    assert answer.headers["etag"].strip('"') == answer.headers["x-linked-etag"].strip('"') == info[1].lfs.sha256
    assert int(answer.headers["x-linked-size"]) == int(answer.headers["content-length"]) == len(WEIGHTS)
    assert fetch(world, "main/config.json").headers["etag"].strip('"') == info[0].blob_id
    path = world.anon.snapshot_download(REPO, cache_dir=tmp_path)
    assert (Path(path) / "model.safetensors").read_bytes() == WEIGHTS
    assert (Path(path) / "sub/deep/note.txt").read_text() == "note" and path.endswith(shas[1])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize(
    ("asked", "span"), [("0-3", (0, 4)), ("5-", (5, None)), ("-2", (-2, None)), ("7-9999", (7, None))]
)
def test_a_range_is_answered_with_just_these_bytes(
    world: World, shas: list[str], name: str, asked: str, span: tuple[int, int | None]
) -> None:
    whole = WEIGHTS if name.startswith("model") else b'{"v": 1}'
    answer = fetch(world, f"main/{name}", range=f"bytes={asked}")
    assert (answer.status_code, answer.content) == (206, whole[slice(*span)])
    start = span[0] % len(whole)
    assert answer.headers["content-range"] == f"bytes {start}-{start + len(answer.content) - 1}/{len(whole)}"


def test_a_range_beyond_the_end_is_refused_and_nonsense_is_ignored(world: World, shas: list[str]) -> None:
    assert fetch(world, "main/config.json", range="bytes=8-").status_code == 416
    assert fetch(world, "main/config.json", range="bytes=8-").headers["content-range"] == "bytes */8"
    for nonsense in ("bytes=-", "bytes=5-2", "lines=1-2", "bytes=0-1,3-4", "bytes=x-"):
        assert (fetch(world, "main/config.json", range=nonsense).status_code) == 200
    resumed = fetch(world, "main/config.json", **{"range": "bytes=2-", "if-range": '"other"'})
    assert (resumed.status_code, resumed.content) == (200, b'{"v": 1}')


def test_parse_range_counts_as_rfc_9110_does() -> None:
    assert parse_range("bytes=0-0", 10) == (0, 1)
    assert parse_range("bytes=9-", 10) == (9, 10)
    assert parse_range("bytes=-3", 10) == (7, 10)
    assert parse_range("bytes=-30", 10) == (0, 10)
    assert parse_range("bytes=2-1", 10) is None
    for beyond in ("bytes=10-", "bytes=-0", "bytes=11-12"):
        with pytest.raises(Refusal):
            parse_range(beyond, 10)


def test_what_is_missing_says_so_with_the_commit(world: World, shas: list[str]) -> None:
    answer = fetch(world, "main/nope.txt")
    assert (answer.status_code, answer.headers["x-error-code"]) == (404, "EntryNotFound")
    assert answer.headers["x-repo-commit"] == shas[1]
    with pytest.raises(EntryNotFoundError):
        world.anon.hf_hub_download(REPO, "nope.txt")
    with pytest.raises(RevisionNotFoundError):
        world.anon.hf_hub_download(REPO, "config.json", revision="nope")
    with pytest.raises(HfHubHTTPError):
        list(world.anon.list_repo_tree(REPO, path_in_repo="config.json"))


def test_the_tree_lists_files_and_folders_with_their_last_commits(world: World, shas: list[str]) -> None:
    top = {entry.path: type(entry).__name__ for entry in world.anon.list_repo_tree(REPO)}
    assert top == {
        ".gitattributes": "RepoFile",
        "config.json": "RepoFile",
        "model.safetensors": "RepoFile",
        "sub": "RepoFolder",
    }
    assert [entry.path for entry in world.anon.list_repo_tree(REPO, path_in_repo="sub", recursive=True)] == [
        "sub/deep",
        "sub/deep/note.txt",
    ]
    last = {e.path: e.last_commit.oid for e in world.anon.list_repo_tree(REPO, recursive=True, expand=True)}
    assert (last["config.json"], last["sub/deep"], last["model.safetensors"]) == (shas[0], shas[1], shas[1])
    infos = world.anon.get_paths_info(REPO, ["nope", "sub", "config.json"])
    assert sorted(info.path for info in infos) == ["config.json", "sub"]


def test_a_tree_of_many_files_comes_in_pages(world: World) -> None:
    world.ann.create_repo("ann/many", repo_type="dataset")
    adds = [CommitOperationAdd(f"data/{n:04}.txt", b"x") for n in range(1200)]
    world.ann.create_commit("ann/many", adds, commit_message="many", repo_type="dataset")
    listed = [e.path for e in world.ann.list_repo_tree("ann/many", path_in_repo="data", repo_type="dataset")]
    assert listed == [add.path_in_repo for add in adds]


def test_history_comes_in_pages_newest_first(world: World) -> None:
    world.ann.create_repo("ann/long")
    oids = [
        world.ann.create_commit("ann/long", [CommitOperationAdd("n", b"%d" % n)], commit_message=f"number {n}").oid
        for n in range(55)
    ]
    commits = world.ann.list_repo_commits("ann/long")
    assert [c.commit_id for c in commits][:-1] == oids[::-1] and commits[-1].title == "initial commit"
    world.ann.super_squash_history("ann/long", commit_message="one")
    assert [c.title for c in world.ann.list_repo_commits("ann/long")] == ["one"]
    assert world.ann.model_info("ann/long", revision=oids[3]).sha == oids[3]


def test_refs_are_gits_own(world: World, shas: list[str]) -> None:
    refs = world.anon.list_repo_refs(REPO, include_pull_requests=True)
    assert {b.name: b.target_commit for b in refs.branches} == {"main": shas[1], "dev/x": shas[2]}
    assert {t.name: t.target_commit for t in refs.tags} == {"v0": shas[0]}
    for make in (
        lambda: world.ann.create_tag(REPO, tag="v0"),
        lambda: world.ann.create_branch(REPO, branch="dev/x"),
        lambda: world.ann.create_branch(REPO, branch="dev"),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            make()
        assert error.value.response.status_code == 409
    with pytest.raises(HfHubHTTPError, match="Cannot delete refs/heads/main"):
        world.ann.delete_branch(REPO, branch="main")
    world.ann.create_tag(REPO, tag="tmp")
    world.ann.delete_tag(REPO, tag="tmp")
    with pytest.raises(RevisionNotFoundError):
        world.ann.delete_tag(REPO, tag="tmp")


def test_tensor_counts_come_from_the_headers(world: World, shas: list[str]) -> None:
    info = world.anon.model_info(REPO, expand=["safetensors"])
    assert (info.safetensors.parameters, info.safetensors.total) == ({"F32": 22}, 22)
    assert world.anon.get_safetensors_metadata(REPO).parameter_count == {"F32": 22}
    one, two = safetensors({"x": [2, 2]}), safetensors({"y": [3, 3]}, "F32")
    index = {"metadata": {}, "weight_map": {"x": "m-1.safetensors", "y": "m-2.safetensors"}}
    world.ann.create_repo("ann/sharded")
    operations = [
        CommitOperationAdd("m-1.safetensors", one),
        CommitOperationAdd("m-2.safetensors", two),
        CommitOperationAdd("model.safetensors.index.json", json.dumps(index).encode()),
    ]
    world.ann.create_commit("ann/sharded", operations, commit_message="shards")
    assert world.ann.model_info("ann/sharded").safetensors.parameters == {"F32": 13}
    assert set(world.ann.get_sharded_safetensors_metadata("ann/sharded").weight_map) == {"x", "y"}


def test_the_file_system_of_the_client_reads_and_writes(world: World, shas: list[str]) -> None:
    files = HfFileSystem(endpoint=world.endpoint, token="hf_ann")
    assert f"{REPO}/config.json" in files.ls(REPO, detail=False)
    with files.open(f"{REPO}/model.safetensors", "rb") as file:
        file.seek(8)
        assert file.read(8) == WEIGHTS[8:16]
    world.ann.create_repo("ann/written", repo_type="dataset")
    with files.open("datasets/ann/written/a.txt", "w") as file:
        file.write("hello")
    files.invalidate_cache()
    assert files.cat("datasets/ann/written/a.txt") == b"hello"


def test_git_clones_and_may_not_push(world: World, shas: list[str], tmp_path: Path) -> None:
    host = world.endpoint.removeprefix("http://")
    environment = {
        **os.environ,
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_LFS_SKIP_SMUDGE": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
    }
    url = f"http://ann:hf_ann@{host}/{REPO}"

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    for address in (url, url + ".git"):
        target = tmp_path / str(len(address))
        assert git("clone", "-q", address, str(target)).returncode == 0
        assert git("-C", str(target), "rev-parse", "HEAD").stdout.strip() == shas[1]
    assert git("-C", str(target), "rev-parse", "v0^{commit}").stdout.strip() == shas[0]
    git("-C", str(target), "commit", "-q", "--allow-empty", "-m", "x")
    pushed = git("-C", str(target), "push", "origin", "HEAD:main")
    assert pushed.returncode != 0 and world.ann.model_info(REPO).sha == shas[1]
    world.ann.create_repo("ann/hidden", private=True)
    assert git("clone", "-q", f"http://{host}/ann/hidden", str(tmp_path / "no")).returncode != 0
