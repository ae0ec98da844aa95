"""Gated access, likes, collections, Spaces' settings, cards, request limits."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from huggingface_hub.utils import get_session

from hubfusion.localhub import LocalHub, Rules
from tests.localhub.conftest import USERS, World, clients


def test_a_gated_repository_is_asked_for_granted_and_taken_back(world: World, tmp_path: Path) -> None:
    world.ann.create_repo("ann/gate")
    world.ann.upload_file(path_or_fileobj=b"s", path_in_repo="s.txt", repo_id="ann/gate")
    world.ann.update_repo_settings("ann/gate", gated="manual")
    ask = lambda: get_session().post(  # noqa: E731
        f"{world.endpoint}/ann/gate/ask-access", headers={"Authorization": "Bearer hf_bob"}
    )
    assert ask().status_code == 200 and ask().status_code == 400
    assert [r.username for r in world.ann.list_pending_access_requests("ann/gate")] == ["bob"]
    with pytest.raises(GatedRepoError):
        world.bob.hf_hub_download("ann/gate", "s.txt", local_dir=tmp_path)
    world.ann.accept_access_request("ann/gate", "bob")
    assert Path(world.bob.hf_hub_download("ann/gate", "s.txt", local_dir=tmp_path)).read_bytes() == b"s"
    with pytest.raises(HfHubHTTPError) as error:
        world.ann.accept_access_request("ann/gate", "bob")
    assert error.value.response.status_code == 404
    world.ann.reject_access_request("ann/gate", "bob", rejection_reason="no")
    with pytest.raises(GatedRepoError):
        world.bob.hf_hub_download("ann/gate", "s.txt", local_dir=tmp_path / "other")
    with pytest.raises(HfHubHTTPError):
        world.bob.list_pending_access_requests("ann/gate").__next__()
    world.ann.update_repo_settings("ann/gate", gated=False)
    assert world.anon.model_info("ann/gate").gated is False


def test_the_diff_of_a_gated_repository_is_not_shown_to_strangers(world: World) -> None:
    world.ann.create_repo("ann/gatediff")
    draft = world.ann.create_pull_request("ann/gatediff", title="secret")
    world.ann.upload_file(
        path_or_fileobj=b"secret", path_in_repo="s", repo_id="ann/gatediff", revision=draft.git_reference
    )
    world.ann.update_repo_settings("ann/gatediff", gated="auto")
    with pytest.raises(GatedRepoError):
        world.bob.get_discussion_details("ann/gatediff", draft.num)
    assert "+secret" in world.ann.get_discussion_details("ann/gatediff", draft.num).diff


def test_likes_are_counted_and_listed(world: World) -> None:
    world.ann.create_repo("ann/liked")
    for token in ("hf_ann", "hf_bob"):
        url = f"{world.endpoint}/api/models/ann/liked/like"
        assert get_session().post(url, headers={"Authorization": f"Bearer {token}"}).status_code == 200
    assert world.anon.model_info("ann/liked").likes == 2
    assert [user.username for user in world.anon.list_repo_likers("ann/liked")] == ["ann", "bob"]
    assert world.bob.list_liked_repos().models == ["ann/liked"]
    assert [m.id for m in world.anon.list_models(author="ann", sort="likes")][0] == "ann/liked"
    world.bob.unlike("ann/liked")
    assert world.anon.model_info("ann/liked").likes == 1


def test_a_collection_holds_repositories_in_order(world: World) -> None:
    for name in ("ann/c1", "ann/c2"):
        world.ann.create_repo(name)
    made = world.ann.create_collection(title="the bases", description="v1 and v2")
    assert world.ann.create_collection(title="the bases", exists_ok=True).slug == made.slug
    for name in ("ann/c1", "ann/c2"):
        full = world.ann.add_collection_item(made.slug, item_id=name, item_type="model", note=f"note {name}")
    with pytest.raises(HfHubHTTPError) as error:
        world.ann.add_collection_item(made.slug, item_id="ann/c1", item_type="model")
    assert error.value.response.status_code == 409
    world.ann.update_collection_item(made.slug, full.items[1].item_object_id, position=0)
    seen = world.anon.get_collection(made.slug)
    assert [(item.item_id, item.note) for item in seen.items] == [("ann/c2", "note ann/c2"), ("ann/c1", "note ann/c1")]
    renamed = world.ann.update_collection_metadata(made.slug, title="renamed", private=True)
    assert renamed.slug != made.slug and world.ann.get_collection(made.slug).title == "renamed"
    with pytest.raises(HfHubHTTPError):
        world.bob.get_collection(renamed.slug)
    assert [c.slug for c in world.ann.list_collections(owner="ann")] == [renamed.slug]
    assert list(world.bob.list_collections(owner="ann")) == []
    with pytest.raises(HfHubHTTPError):
        world.ann.create_collection(title="x" * 61)
    world.ann.delete_collection_item(renamed.slug, seen.items[0].item_object_id)
    world.ann.delete_collection(renamed.slug)
    world.ann.delete_collection(renamed.slug, missing_ok=True)


def test_secrets_of_a_space_never_leave_again(world: World) -> None:
    world.ann.create_repo("ann/space", repo_type="space", space_sdk="static")
    world.ann.add_space_secret("ann/space", "TOKEN", "hush")
    world.ann.add_space_variable("ann/space", "MODE", "fast")
    assert world.ann.get_space_variables("ann/space")["MODE"].value == "fast"
    listed = get_session().get(
        f"{world.endpoint}/api/spaces/ann/space/secrets", headers={"Authorization": "Bearer hf_ann"}
    )
    assert "TOKEN" in listed.json() and "hush" not in listed.text
    with pytest.raises(HfHubHTTPError):
        world.bob.get_space_variables("ann/space")
    assert world.anon.get_space_runtime("ann/space").stage == "STOPPED"


def test_a_card_is_checked_before_it_is_pushed(world: World) -> None:
    def check(text: str):
        return get_session().post(f"{world.endpoint}/api/validate-yaml", json={"content": text}, headers=plain)

    plain = {"Accept": "text/plain"}
    assert check("---\nlicense: mit\n---\n").status_code == 200
    bad = check("---\nlicense: not-a-license\n---\n")
    assert bad.status_code == 400 and bad.text.startswith('- Error: "license" must be one of')
    assert ModelCard("---\nlicense: mit\n---\n").data.license == "mit"


def test_requests_over_the_quota_get_429_with_the_seconds_to_wait(tmp_path: Path) -> None:
    with LocalHub(tmp_path, USERS, rules=Rules(requests=3)) as hub:
        url = f"{hub.endpoint}/api/models"
        first = get_session().get(url)
        assert "r=2" in first.headers["ratelimit"] and "q=3;w=300" in first.headers["ratelimit-policy"]
        codes = [get_session().get(url).status_code for _ in range(3)]
        assert codes == [200, 200, 429]
        refused = get_session().get(url)
        assert refused.headers["ratelimit"].startswith('"api";r=0;t=')
        ann = clients(hub).ann
        assert ann.whoami()["name"] == "ann"  # another caller has another quota
