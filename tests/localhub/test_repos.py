"""Repositories: who may make, see, change and move them."""

from __future__ import annotations

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from hubfusion.errors import HubError
from hubfusion.localhub import LocalHub
from tests.localhub.conftest import World


def status(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return int(error.value.response.status_code)


def test_whoami_names_the_user_and_the_organizations(world: World) -> None:
    me = world.bot.whoami()
    assert (me["name"], me["type"], [org["name"] for org in me["orgs"]]) == ("ibm-bot", "user", ["ibm"])


def test_a_wrong_token_is_refused(world: World) -> None:
    with pytest.raises(HfHubHTTPError) as error:
        HfApi(endpoint=world.endpoint, token="hf_wrong").whoami()
    assert status(error) == 401


@pytest.mark.parametrize("kind", ["model", "dataset", "space"])
def test_a_new_repository_has_one_commit_and_its_url(world: World, kind: str) -> None:
    sdk = "static" if kind == "space" else None
    url = world.ann.create_repo(f"ann/new-{kind}", repo_type=kind, space_sdk=sdk)
    assert url.repo_id == f"ann/new-{kind}" and url.repo_type == kind
    info = world.anon.repo_info(f"ann/new-{kind}", repo_type=kind)
    assert [f.rfilename for f in info.siblings] == [".gitattributes"]
    commits = world.anon.list_repo_commits(f"ann/new-{kind}", repo_type=kind)
    assert [c.title for c in commits] == ["initial commit"] and commits[0].authors == ["ann"]


def test_making_a_repository_twice_is_a_conflict_unless_that_is_ok(world: World) -> None:
    world.ann.create_repo("ann/twice")
    world.ann.create_repo("ann/twice", exist_ok=True)
    with pytest.raises(HfHubHTTPError) as error:
        world.ann.create_repo("ann/TWICE")
    assert status(error) == 409


def test_only_members_make_repositories_of_an_organization(world: World) -> None:
    world.bot.create_repo("ibm/base")
    world.bot.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="ibm/base")
    for stranger in (world.ann, world.anon):
        with pytest.raises(HfHubHTTPError) as error:
            stranger.create_repo("ibm/other")
        assert status(error) in (401, 403)
        with pytest.raises(HfHubHTTPError) as error:
            stranger.upload_file(path_or_fileobj=b"[]", path_in_repo="config.json", repo_id="ibm/base")
        assert status(error) in (401, 403)


def test_strangers_can_neither_change_nor_delete(world: World) -> None:
    world.ann.create_repo("ann/mine")
    attempts = [
        lambda: world.bob.delete_repo("ann/mine"),
        lambda: world.bob.move_repo("ann/mine", "bob/mine"),
        lambda: world.ann.move_repo("ann/mine", "bob/mine"),
        lambda: world.bob.update_repo_settings("ann/mine", private=True),
        lambda: world.bob.create_branch("ann/mine", branch="x"),
        lambda: world.bob.create_tag("ann/mine", tag="x"),
        lambda: world.bob.super_squash_history("ann/mine"),
    ]
    for attempt in attempts:
        with pytest.raises(HfHubHTTPError) as error:
            attempt()
        assert status(error) == 403
    assert world.ann.repo_exists("ann/mine") and not world.ann.repo_exists("bob/mine")


def test_a_private_repository_does_not_exist_for_others(world: World) -> None:
    world.ann.create_repo("ann/secret", private=True)
    assert world.ann.model_info("ann/secret").private is True
    for other in (world.bob, world.anon):
        with pytest.raises(RepositoryNotFoundError):
            other.model_info("ann/secret")
        assert "ann/secret" not in [m.id for m in other.list_models(author="ann")]
        with pytest.raises(HfHubHTTPError):
            other.create_discussion("ann/secret", title="hello", description="is it here?")
    assert "ann/secret" in [m.id for m in world.ann.list_models(author="ann")]
    world.ann.update_repo_settings("ann/secret", private=False)
    assert world.anon.repo_exists("ann/secret")


def test_a_moved_repository_is_found_under_its_old_name(world: World) -> None:
    world.ann.create_repo("ann/old")
    sha = world.ann.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id="ann/old").oid
    world.ann.move_repo("ann/old", "ann/new")
    assert world.anon.model_info("ann/old").id == "ann/new"
    assert world.anon.model_info("ann/new").sha == sha
    world.ann.create_repo("ann/old")
    assert world.anon.model_info("ann/old").id == "ann/old"
    with pytest.raises(HfHubHTTPError):
        world.ann.move_repo("ann/old", "ann/new")


def test_a_deleted_repository_leaves_nothing_to_its_successor(world: World) -> None:
    world.ann.create_repo("ann/again")
    world.ann.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id="ann/again")
    world.ann.create_discussion("ann/again", title="hello")
    world.ann.delete_repo("ann/again")
    assert not world.ann.repo_exists("ann/again")
    world.ann.delete_repo("ann/again", missing_ok=True)
    world.ann.create_repo("ann/again")
    assert world.ann.list_repo_files("ann/again") == [".gitattributes"]
    assert list(world.ann.get_repo_discussions("ann/again")) == []


def test_what_is_missing_is_named_as_clients_expect(world: World) -> None:
    world.ann.create_repo("ann/there")
    with pytest.raises(RepositoryNotFoundError):
        world.ann.model_info("ann/nowhere")
    with pytest.raises(RepositoryNotFoundError):
        world.anon.model_info("gpt2")
    with pytest.raises(RevisionNotFoundError):
        world.ann.model_info("ann/there", revision="nope")
    assert not world.ann.file_exists("ann/there", "nope.txt")


def test_files_of_a_gated_repository_need_a_grant_and_its_metadata_do_not(world: World) -> None:
    world.ann.create_repo("ann/gated")
    world.ann.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id="ann/gated")
    world.ann.update_repo_settings("ann/gated", gated="manual")
    assert world.anon.model_info("ann/gated").gated == "manual"
    for other in (world.bob, world.anon):
        with pytest.raises(GatedRepoError):
            other.hf_hub_download("ann/gated", "a.txt", local_dir="/nonexistent")
    with pytest.raises(HfHubHTTPError):
        world.bob.create_commit("ann/gated", [CommitOperationAdd("b", b"1")], commit_message="x", create_pr=True)


def test_a_store_is_served_by_one_process_and_on_loopback_only(world: World) -> None:
    with pytest.raises(HubError, match="another Hub serves"):
        LocalHub(world.hub.hub.directory, {"ann": "hf_ann"})
    with pytest.raises(HubError, match="only loopback"):
        LocalHub(world.hub.hub.directory, {"ann": "hf_ann"}, host="0.0.0.0")


@pytest.mark.parametrize(
    ("users", "orgs", "says"),
    [
        ({"api": "hf_x"}, {}, "reserved"),
        ({"a/b": "hf_x"}, {}, "reserved"),
        ({"ann": "a b"}, {}, "printable"),
        ({"ann": "hf_x", "bob": "hf_x"}, {}, "same token"),
        ({"ann": "hf_x"}, {"ibm": ["bob"]}, "no user bob"),
        ({"ann": "hf_x"}, {"ann": ["ann"]}, "both"),
    ],
)
def test_accounts_that_make_no_sense_are_refused(tmp_path, users, orgs, says) -> None:
    with pytest.raises(HubError, match=says):
        LocalHub(tmp_path, users, orgs)
