from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hubfusion.codec import from_json
from hubfusion.errors import CheckpointError, FusionError, HubError
from hubfusion.lineage import Contribution, Reason, Rejected, Revision
from hubfusion.screen import Policy, apply_caps, read_base, screen
from tests.bert_checkpoints import base_tensors, card, config, current_base, finetuned, publish_base, sharded, weights
from tests.fake_hub import FakeHub, finetune


def judge(
    files: dict[str, bytes] | None = None, policy: Policy | None = None, *, front: Any = None, **changes: Any
) -> Contribution | Rejected:
    """Screen one finetune; what is not given is as an honest contributor pushes it."""
    hub = FakeHub()
    base = publish_base(hub)
    honest = {"config.json": config(), "model.safetensors": weights(finetuned(base_tensors(), 1)), "README.md": b"#"}
    revision = hub.add("ann/news", honest if files is None else files)
    found = finetune(hub, revision, card(base.revision.sha) if front is None else front, **changes)
    return screen(hub, found, base, policy or Policy())


def refused(verdict: Contribution | Rejected) -> tuple[Reason, str]:
    assert isinstance(verdict, Rejected), verdict
    assert verdict.detail.isascii() and verdict.detail.isprintable()
    return verdict.reason, verdict.detail


def sha_of(tag: str) -> str:
    hub = FakeHub()
    publish_base(hub)
    return hub.tagged["ibm/ColD-Fusion"][tag]


def test_an_honest_finetune_becomes_a_contribution_with_all_that_fuse_needs() -> None:
    verdict = judge()
    assert isinstance(verdict, Contribution), verdict
    assert verdict.revision.repo == "ann/news" and verdict.author == "ann"
    assert verdict.base == Revision("ibm/ColD-Fusion", sha_of("v1"))
    assert (verdict.license, verdict.datasets, verdict.examples) == ("apache-2.0", ("org/news",), 600)
    assert [f.path for f in verdict.files] == ["model.safetensors"]
    assert verdict.files[0].sha256 is not None


def test_shards_are_taken_with_their_index() -> None:
    verdict = judge(sharded(finetuned(base_tensors(), 1), 3) | {"config.json": config()})
    assert isinstance(verdict, Contribution), verdict
    assert [f.path for f in verdict.files] == [
        "model.safetensors.index.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]


def test_a_bare_model_and_one_with_the_old_integer_buffer_are_both_fine() -> None:
    bare = {k.removeprefix("bert."): v for k, v in finetuned(base_tensors(), 1).items()}
    assert isinstance(judge({"config.json": config(), "model.safetensors": weights(bare)}), Contribution)
    old = finetuned(base_tensors(), 1) | {"bert.embeddings.position_ids": base_tensors()["embeddings.position_ids"]}
    assert isinstance(judge({"config.json": config(), "model.safetensors": weights(old)}), Contribution)


def test_what_transformers_saves_passes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    settings = transformers.BertConfig(vocab_size=50, max_position_embeddings=20, **shape)
    transformers.BertModel(settings).save_pretrained(tmp_path / "base")
    settings.num_labels = 4
    transformers.BertForSequenceClassification(settings).save_pretrained(tmp_path / "head")
    hub = FakeHub()
    revision = hub.add("ibm/ColD-Fusion", {p.name: p for p in (tmp_path / "base").iterdir()})
    hub.tag("ibm/ColD-Fusion", "v0", revision.sha)
    base = current_base(hub, revision)
    pushed = hub.add("ann/news", {p.name: p for p in (tmp_path / "head").iterdir()})
    verdict = screen(hub, finetune(hub, pushed, card(revision.sha)), base, Policy())
    assert isinstance(verdict, Contribution), verdict


def test_a_roberta_masked_language_model_is_a_base_whose_own_head_is_not_asked_for(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    settings = transformers.RobertaConfig(vocab_size=50, max_position_embeddings=20, **shape)
    transformers.RobertaForMaskedLM(settings).save_pretrained(tmp_path / "base")
    transformers.RobertaForSequenceClassification(settings).save_pretrained(tmp_path / "head")
    hub = FakeHub()
    revision = hub.add("ibm/ColD-Fusion", {p.name: p for p in (tmp_path / "base").iterdir()})
    base = read_base(hub, revision, "v0", {revision.sha: "v0"})
    pushed = hub.add("ann/news", {p.name: p for p in (tmp_path / "head").iterdir()})
    verdict = screen(hub, finetune(hub, pushed, card(revision.sha)), base, Policy())
    assert isinstance(verdict, Contribution), verdict


def test_the_base_is_read_with_tensors_config_and_license() -> None:
    hub = FakeHub()
    base = publish_base(hub)
    assert base.tag == "v1" and base.license == "apache-2.0" and base.config["hidden_size"] == 16
    assert base.tensors["embeddings.word_embeddings.weight"].shape == (50, 16)
    assert base.tensors["embeddings.position_ids"].dtype == "I64"
    assert sorted(base.versions.values()) == ["v0", "v1"]


def test_a_broken_base_is_an_error_and_not_a_rejection() -> None:
    hub = FakeHub()
    revision = hub.add("ibm/ColD-Fusion", {"config.json": config(), "model.safetensors": b"short"})
    with pytest.raises(CheckpointError, match="base ibm/ColD-Fusion@.*model.safetensors: 5 bytes are too few"):
        read_base(hub, revision, "v0", {})


def test_a_stale_base_is_named_with_its_tag_and_the_current_one() -> None:
    reason, detail = refused(judge(front=card(sha_of("v0"))))
    assert reason is Reason.STALE_BASE
    assert detail == "made from v0, the current base is v1; finetune v1 again"


def test_a_commit_that_kept_the_weights_of_the_release_is_the_release() -> None:
    hub = FakeHub()
    base = publish_base(hub)
    readme = "d" * 40
    base = read_base(hub, base.revision, "v1", {**base.versions, readme: "v1"})
    pushed = hub.add("ann/n", {"config.json": config(), "model.safetensors": weights(finetuned(base_tensors(), 1))})
    verdict = screen(hub, finetune(hub, pushed, card(readme)), base, Policy())
    assert isinstance(verdict, Contribution) and verdict.base == base.revision


def test_a_missing_base_revision_says_which_command_helps_unless_the_policy_lets_the_weights_tell() -> None:
    front = card("", cold_fusion={"examples": 600})
    reason, detail = refused(judge(front=front))
    assert reason is Reason.UNDECLARED_BASE and "run `hubfusion tag`" in detail
    assert isinstance(judge(front=front, policy=Policy(require_declared_base=False)), Contribution)


def test_a_sha_of_digits_alone_that_yaml_made_a_number_is_understood() -> None:
    front = card("", cold_fusion={"base_revision": int("1234567890" * 4)})
    reason, detail = refused(judge(front=front))
    assert reason is Reason.UNKNOWN_BASE and detail.startswith("123456789012 is no released revision")


@pytest.mark.parametrize(
    "licenses, base_license, stated, fits",
    [
        ((), "apache-2.0", "MIT", True),
        ((), "apache-2.0", "cc-by-nc-4.0", False),
        ((), "apache-2.0", "gpl-3.0", False),
        ((), "gpl-3.0", "gpl-3.0", True),
        (("cc-by-nc-4.0",), "apache-2.0", "cc-by-nc-4.0", True),
        (("cc-by-nc-4.0",), "apache-2.0", "apache-2.0", False),
    ],
)
def test_licenses_fit_by_policy_or_by_the_bases_own(
    licenses: tuple[str, ...], base_license: str, stated: str, fits: bool
) -> None:
    hub = FakeHub()
    files = {"config.json": config(), "model.safetensors": weights(base_tensors())}
    readme = f"---\nlicense: {base_license}\n---\n".encode()
    revision = hub.add("ibm/ColD-Fusion", files | {"README.md": readme})
    base = read_base(hub, revision, "v0", {revision.sha: "v0"})
    pushed = hub.add("ann/n", {"config.json": config(), "model.safetensors": weights(finetuned(base_tensors(), 1))})
    verdict = screen(hub, finetune(hub, pushed, card(revision.sha, license=stated)), base, Policy(licenses=licenses))
    assert isinstance(verdict, Contribution) is fits
    if isinstance(verdict, Rejected):
        assert verdict.reason is Reason.LICENSE and base_license in verdict.detail


def test_half_precision_is_taken_unless_the_policy_asks_for_the_bases_own_dtype() -> None:
    half = {k: v.astype("float16") for k, v in finetuned(base_tensors(), 1).items()}
    files = {"config.json": config(), "model.safetensors": weights(half)}
    reason, detail = refused(judge(files, Policy(any_float_dtype=False)))
    assert reason is Reason.ARCHITECTURE and "dtype F16, the base has F32" in detail
    assert isinstance(judge(files), Contribution)


def test_a_rejected_model_costs_less_than_100_kb_even_when_its_header_promises_more() -> None:
    hub = FakeHub()
    base = publish_base(hub)
    promise = (7 << 20).to_bytes(8, "little") + b"{" + b" " * (8 << 20)
    pushed = hub.add("ann/n", {"config.json": config().ljust(30_000), "model.safetensors": promise})
    hub.traffic = 0
    verdict = screen(hub, finetune(hub, pushed, card(base.revision.sha)), base, Policy())
    assert refused(verdict)[0] is Reason.TOO_LARGE
    assert 30_000 < hub.traffic < 100_000


def test_what_the_hubs_scanners_warn_of_is_refused() -> None:
    hub = FakeHub(warnings={"model.safetensors": "unsafe", "training_args.bin": "unsafe"})
    base = publish_base(hub)
    pushed = hub.add("ann/n", {"config.json": config(), "model.safetensors": weights(finetuned(base_tensors(), 1))})
    found = finetune(hub, pushed, card(base.revision.sha))
    assert refused(screen(hub, found, base, Policy())) == (
        Reason.FLAGGED,
        "model.safetensors: the Hub's scanners call it unsafe",
    )
    hub.warnings.pop("model.safetensors")  # what nobody reads does not count
    assert isinstance(screen(hub, found, base, Policy()), Contribution)


def test_an_accepted_model_takes_three_requests_and_no_weights() -> None:
    hub = FakeHub()
    base = publish_base(hub)
    big = weights(finetuned(base_tensors(), 1))
    pushed = hub.add("ann/n", {"config.json": config(), "model.safetensors": big})
    hub.traffic = hub.requests = 0
    assert isinstance(screen(hub, finetune(hub, pushed, card(base.revision.sha)), base, Policy()), Contribution)
    assert hub.requests == 3  # config, header, the Hub's own scans
    assert hub.traffic < 12_000 < len(big)


def test_a_header_longer_than_guessed_takes_one_more_request() -> None:
    hub = FakeHub()
    base = publish_base(hub)
    tensors = finetuned(base_tensors(), 1)
    tensors |= {f"adapter_{'x' * 300}_{i}": tensors["classifier.bias"] for i in range(40)}
    pushed = hub.add("ann/n", {"config.json": config(), "model.safetensors": weights(tensors)})
    hub.requests = 0
    assert isinstance(screen(hub, finetune(hub, pushed, card(base.revision.sha)), base, Policy()), Contribution)
    assert hub.requests == 4


def test_a_file_deleted_since_the_crawl_rejects_this_one_and_raises_nothing() -> None:
    hub = FakeHub()
    base = publish_base(hub)
    pushed = hub.add("ann/n", {"config.json": config(), "model.safetensors": weights(finetuned(base_tensors(), 1))})
    found = finetune(hub, pushed, card(base.revision.sha))
    hub.commits["ann/n"][0][1].pop("model.safetensors")
    assert refused(screen(hub, found, base, Policy()))[0] is Reason.GONE


def test_a_hub_that_does_not_answer_is_an_error_and_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub()
    base = publish_base(hub)
    pushed = hub.add("ann/n", {"config.json": config(), "model.safetensors": b""})
    found = finetune(hub, pushed, card(base.revision.sha))

    def fail(*_: object, **__: object) -> bytes:
        raise HubError("ann/n: HTTP 503")

    monkeypatch.setattr(hub, "read", fail)
    with pytest.raises(HubError, match="503"):
        screen(hub, found, base, Policy())


def test_screening_twice_gives_the_same_verdict() -> None:
    assert judge() == judge()


def contribution(author: str, number: int, *datasets: str) -> Contribution:
    base = Revision("ibm/ColD-Fusion", "0" * 40)
    return Contribution(Revision(f"{author}/m{number}", f"{number:040x}"), author, base, "mit", datasets, 600, ())


def test_caps_keep_the_oldest_of_an_author_in_any_letter_case() -> None:
    batch = [contribution("Ann", 1), contribution("ann", 2), contribution("bob", 3), contribution("ANN", 4)]
    kept, out = apply_caps(batch, Policy(max_per_author=2))
    assert [c.revision.repo for c in kept] == ["Ann/m1", "ann/m2", "bob/m3"]
    assert [(r.revision.repo, r.reason) for r in out] == [("ANN/m4", Reason.CAP)]
    assert out[0].detail == "ANN has all of its 2 places in this iteration; older contributions go first"


def test_caps_hold_for_datasets_and_for_the_iteration() -> None:
    batch = [contribution(f"u{i}", i, "org/a" if i < 3 else "org/b") for i in range(6)]
    kept, out = apply_caps(batch, Policy(max_per_dataset=2, max_contributions=3))
    assert [c.revision.repo for c in kept] == ["u0/m0", "u1/m1", "u3/m3"]
    assert "dataset org/a has all of its 2" in out[0].detail and "all 3 places" in out[1].detail


def test_a_rejected_one_takes_no_place() -> None:
    batch = [contribution("a", 1, "x/d"), contribution("b", 2, "x/d"), contribution("b", 3, "x/e")]
    kept, _ = apply_caps(batch, Policy(max_per_author=1, max_per_dataset=1))
    assert [c.revision.repo for c in kept] == ["a/m1", "b/m3"]


def test_a_policy_is_read_strictly_from_json() -> None:
    policy = from_json(Policy, {"licenses": ["mit"], "max_files": 9})
    assert policy.licenses == ("mit",) and policy.max_files == 9 and policy.max_per_author == 3
    with pytest.raises(FusionError, match="unknown key 'max_file'"):
        from_json(Policy, {"max_file": 9})


@pytest.mark.parametrize(
    ("dataset", "front", "says"),
    [
        ("org/news", b"license: mit", ""),
        ("org/news", b"license: [cc-by-4.0, mit]", ""),
        ("org/news", b"license: cc-by-nc-4.0", "its license 'cc-by-nc-4.0' is not one that is accepted here"),
        ("org/news", b"license: [mit, other]", "its license 'other' is not one"),
        ("org/news", b"pretty_name: News", "its license None is not one"),
        ("org/gone", b"license: mit", "no public card says under which license it is"),
        ("imdb", b"license: mit", "give it with its owner"),
    ],
)
def test_dataset_licenses_are_looked_up_when_the_policy_says_so(dataset: str, front: bytes, says: str) -> None:
    hub = FakeHub()
    base = publish_base(hub)
    hub.add("org/news", {"README.md": b"---\n" + front + b"\n---\n"})
    files = {"config.json": config(), "model.safetensors": weights(finetuned(base_tensors(), 1))}
    found = finetune(hub, hub.add("ann/m", files), card(base.revision.sha, datasets=[dataset]))
    assert isinstance(screen(hub, found, base, Policy()), Contribution)
    verdict = screen(hub, found, base, Policy(check_dataset_licenses=True))
    if says:
        reason, detail = refused(verdict)
        assert reason is Reason.LICENSE and says in detail and dataset in detail
    else:
        assert isinstance(verdict, Contribution)
