"""The same repositories on a Hub that runs: pushed over HTTP, found by the crawl, screened by the real client."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from hubfusion.hub import Change, Hub, connect
from hubfusion.lineage import Contribution, Finetune, Rejected, Revision
from hubfusion.localhub import LocalHub
from hubfusion.screen import Policy, screen
from hubfusion.screen.crawl import crawl
from tests.bert_checkpoints import BASE, base_tensors, card, config, current_base, finetuned, publish_base, weights
from tests.fake_hub import FakeHub
from tests.hostile.cases import CASES, WEIGHTS

pytestmark = pytest.mark.slow


def push(hub: Hub, repo: str, files: dict[str, bytes]) -> Revision:
    hub.create(repo)
    return Revision(repo, hub.commit(repo, Change("push", hub.resolve(repo).sha, f"{repo}-nonce", files)))


def readme(front: object) -> bytes:
    return b"---\n" + yaml.safe_dump(front).encode() + b"---\n# model\n"


def is_servable(name: str) -> bool:
    """Cases that exist only in what a Hub lists, or that ask for another policy, are left to the tests in memory."""
    case = CASES[name]
    in_memory = case.listed is not None or case.found or case.policy != Policy()
    return not in_memory and isinstance(case.front, dict)


def test_hostile_repositories_are_refused_over_http_and_the_honest_one_beside_them_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    names = [name for name in CASES if is_servable(name)]
    users = {f"eve{i}": f"hf_eve{i}" for i in range(len(names))} | {"ann": "hf_ann", "bot": "hf_bot"}
    with LocalHub(tmp_path / "hub", users, {"ibm": ["bot"]}) as server:
        bot = connect(server.endpoint, "hf_bot")
        head = push(bot, BASE, {"config.json": config(), WEIGHTS: weights(base_tensors())})
        bot.tag(BASE, "v1", head.sha)
        base = current_base(bot, head)
        honest = {"config.json": config(), WEIGHTS: weights(finetuned(base_tensors(), 1))}
        push(connect(server.endpoint, "hf_ann"), "ann/m", honest | {"README.md": readme(card(head.sha))})
        for number, name in enumerate(names):
            memory = FakeHub()
            found = CASES[name].push(memory, publish_base(memory), f"eve{number}/m")
            tree = memory.commits[f"eve{number}/m"][-1][1]
            front = dict(found.card)
            block = front.get("cold_fusion")
            if isinstance(block, dict) and block.get("base_revision") == publish_base(FakeHub()).revision.sha:
                front["cold_fusion"] = block | {"base_revision": head.sha}
            files = {path: content for path, content in tree.items() if isinstance(content, bytes)}
            # Metadata that the Hub itself does not take never get as far as to us.
            with contextlib.suppress(ValueError):
                push(
                    connect(server.endpoint, f"hf_eve{number}"), f"eve{number}/m", files | {"README.md": readme(front)}
                )
        reader = connect(server.endpoint)
        crawled: dict[str, Finetune] = {f.revision.repo: f for f in crawl(reader, BASE)}
        verdicts = {repo: screen(reader, found, base, Policy()) for repo, found in crawled.items()}
    assert isinstance(verdicts.pop("ann/m"), Contribution)
    judged = {names[int(repo[3:].partition("/")[0])]: v for repo, v in verdicts.items()}
    wrong = {n: v for n, v in judged.items() if not isinstance(v, Rejected) or v.reason is not CASES[n].reason}
    assert wrong == {}
    # The others never became offers: their cards do not name the base, or hold what a crawl does not read.
    assert len(judged) > 80
