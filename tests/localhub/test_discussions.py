"""Discussions and pull requests."""

from __future__ import annotations

import pytest
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError

from tests.localhub.conftest import World


@pytest.fixture(scope="module")
def repo(world: World) -> str:
    world.ann.create_repo("ann/talk")
    world.ann.upload_file(path_or_fileobj=b"one\n", path_in_repo="a.txt", repo_id="ann/talk")
    return "ann/talk"


def refused(status: int):
    class Check:
        def __enter__(self):
            return self

        def __exit__(self, kind, error, trace):
            assert isinstance(error, HfHubHTTPError), f"expected HTTP {status}, got {error!r}"
            assert error.response.status_code == status
            return True

    return Check()


def test_a_discussion_keeps_everything_that_was_said(world: World, repo: str) -> None:
    opened = world.bob.create_discussion(repo, title="accepted into v2", description="**well done**")
    first = world.ann.comment_discussion(repo, opened.num, "thank you")
    world.ann.edit_discussion_comment(repo, opened.num, first.id, "thanks")
    world.bob.rename_discussion(repo, opened.num, "accepted")
    closed = world.ann.change_discussion_status(repo, opened.num, "closed", comment="done")
    assert closed.new_status == "closed"
    seen = world.anon.get_discussion_details(repo, opened.num)
    assert (seen.title, seen.status, seen.author, seen.is_pull_request) == ("accepted", "closed", "bob", False)
    assert [event.type for event in seen.events] == ["comment", "comment", "title-change", "comment", "status-change"]
    contents = [event.content for event in seen.events if event.type == "comment"]
    assert contents == ["**well done**", "thanks", "done"]
    assert [event.edited for event in seen.events if event.type == "comment"] == [False, True, False]


def test_discussions_are_listed_by_type_status_and_author(world: World, repo: str) -> None:
    numbers = {world.bob.create_discussion(repo, title=f"number {n}").num for n in range(60)}
    world.bob.change_discussion_status(repo, min(numbers), "closed")
    opened = {d.num for d in world.anon.get_repo_discussions(repo, author="bob", discussion_status="open")}
    assert numbers - {min(numbers)} <= opened and min(numbers) not in opened
    assert min(numbers) in {d.num for d in world.anon.get_repo_discussions(repo, discussion_status="closed")}
    assert not list(world.anon.get_repo_discussions(repo, author="nobody"))
    assert all(d.is_pull_request for d in world.anon.get_repo_discussions(repo, discussion_type="pull_request"))


def test_only_the_author_edits_and_only_owners_moderate(world: World, repo: str) -> None:
    opened = world.ann.create_discussion(repo, title="mine", description="text")
    said = world.bob.comment_discussion(repo, opened.num, "bob says")
    with refused(403):
        world.ann.edit_discussion_comment(repo, opened.num, said.id, "bob said what?")
    with refused(403):
        world.bob.rename_discussion(repo, opened.num, "not his")
    with refused(403):
        world.bob.change_discussion_status(repo, opened.num, "closed")
    with refused(401):
        world.anon.comment_discussion(repo, opened.num, "anonymous")
    with pytest.warns(UserWarning):
        world.ann.hide_discussion_comment(repo, opened.num, said.id)
    hidden = world.anon.get_discussion_details(repo, opened.num).events[1]
    assert hidden.hidden and "bob says" not in hidden.content
    with refused(404):
        world.ann.comment_discussion(repo, 99999, "where?")


@pytest.mark.parametrize("title", ["", "  ", "x" * 201])
def test_a_title_has_one_to_two_hundred_characters(world: World, repo: str, title: str) -> None:
    with refused(400):
        world.ann.create_discussion(repo, title=title)


def test_a_pull_request_shows_its_commits_and_diff_and_is_merged_by_an_owner(world: World, repo: str) -> None:
    commit = world.bob.create_commit(
        repo, [CommitOperationAdd("b.txt", b"new\n")], commit_message="add b", commit_description="why", create_pr=True
    )
    number, ref = commit.pr_num, commit.pr_revision
    assert ref == f"refs/pr/{number}" and "b.txt" not in world.ann.list_repo_files(repo)
    world.bob.upload_file(path_or_fileobj=b"more\n", path_in_repo="c.txt", repo_id=repo, revision=ref)
    seen = world.anon.get_discussion_details(repo, number)
    assert (seen.status, seen.target_branch, seen.conflicting_files) == ("open", "refs/heads/main", [])
    assert sorted(e.summary for e in seen.events if e.type == "commit") == [
        "Upload c.txt with huggingface_hub",
        "add b",
    ]
    assert "+new" in seen.diff and "+more" in seen.diff and "a.txt" not in seen.diff
    with refused(403):
        world.bob.merge_pull_request(repo, number)
    world.ann.upload_file(path_or_fileobj=b"d", path_in_repo="d.txt", repo_id=repo)
    world.ann.merge_pull_request(repo, number, comment="merged, thanks")
    merged = world.anon.get_discussion_details(repo, number)
    assert (merged.status, merged.merge_commit_oid) == ("merged", world.ann.model_info(repo).sha)
    assert {"a.txt", "b.txt", "c.txt", "d.txt"} <= set(world.ann.list_repo_files(repo))
    for again in (
        lambda: world.ann.merge_pull_request(repo, number),
        lambda: world.ann.change_discussion_status(repo, number, "open"),
    ):
        with refused(400):
            again()
    with refused(403):
        world.bob.upload_file(path_or_fileobj=b"late", path_in_repo="late.txt", repo_id=repo, revision=ref)


def test_a_conflict_is_named_and_nothing_is_merged(world: World, repo: str) -> None:
    commit = world.bob.create_commit(
        repo, [CommitOperationAdd("a.txt", b"theirs\n")], commit_message="change a", create_pr=True
    )
    world.ann.upload_file(path_or_fileobj=b"ours\n", path_in_repo="a.txt", repo_id=repo)
    before = world.ann.model_info(repo).sha
    assert world.anon.get_discussion_details(repo, commit.pr_num).conflicting_files == ["a.txt"]
    with refused(409):
        world.ann.merge_pull_request(repo, commit.pr_num)
    assert world.ann.model_info(repo).sha == before


def test_a_pull_request_can_be_for_another_branch(world: World, repo: str) -> None:
    world.ann.create_branch(repo, branch="next", exist_ok=True)
    commit = world.bob.create_commit(
        repo, [CommitOperationAdd("n.txt", b"n")], commit_message="for next", revision="next", create_pr=True
    )
    assert world.ann.get_discussion_details(repo, commit.pr_num).target_branch == "refs/heads/next"
    world.ann.merge_pull_request(repo, commit.pr_num)
    assert "n.txt" in world.ann.list_repo_files(repo, revision="next")
    assert "n.txt" not in world.ann.list_repo_files(repo)


def test_a_merge_whose_saying_was_lost_can_be_said_again(world: World, repo: str) -> None:
    """A process killed between git and database has merged, and the pull request still says open."""
    from hubfusion.localhub import discussions
    from hubfusion.localhub.store.repos import Kind

    commit = world.bob.create_commit(repo, [CommitOperationAdd("e", b"e")], commit_message="add e", create_pr=True)
    hub = world.hub.hub
    found = hub.repos.find(Kind.MODEL, *repo.split("/"))
    assert found is not None
    before = discussions.find(hub, found, commit.pr_num)
    world.ann.merge_pull_request(repo, commit.pr_num)
    head = world.ann.model_info(repo).sha
    discussions.save(hub, found, before)
    world.ann.merge_pull_request(repo, commit.pr_num)
    assert world.ann.model_info(repo).sha == head
    assert world.ann.get_discussion_details(repo, commit.pr_num).status == "merged"


def test_a_draft_is_opened_and_pushed_to_by_its_author(world: World, repo: str) -> None:
    draft = world.bob.create_pull_request(repo, title="draft one")
    assert (draft.status, draft.git_reference) == ("draft", f"refs/pr/{draft.num}")
    world.bob.upload_file(path_or_fileobj=b"1", path_in_repo="x", repo_id=repo, revision=draft.git_reference)
    assert world.bob.change_discussion_status(repo, draft.num, "open").new_status == "open"
    world.bob.change_discussion_status(repo, draft.num, "closed")
    with refused(403):
        world.bob.upload_file(path_or_fileobj=b"2", path_in_repo="x", repo_id=repo, revision=draft.git_reference)
