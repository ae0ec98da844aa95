"""Decide which finetunes may be downloaded: a `Contribution` or a `Rejected`, from card, file list and headers.

All input is untrusted: card and file list may contain anything, and headers are read by range requests within a limit
(under 100 kB for one model). The cheapest checks run first, and the first failure gives the reason. Checks of the
weights themselves are in `hubfusion.screen.soundness`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hubfusion.checkpoint.adapters import CONFIG as ADAPTER_CONFIG
from hubfusion.checkpoint.adapters import match_adapter
from hubfusion.checkpoint.backbone import CONFIG, MAX_BYTES, Backbone, declare, match, parse_backbone
from hubfusion.checkpoint.backbone import FILE as BACKBONE
from hubfusion.checkpoint.headers import MAX_HEADER_BYTES, TensorSpec
from hubfusion.errors import CheckpointError, NotFound
from hubfusion.hub import Hub, RepoKind
from hubfusion.hub.cards import MAX_CARD_BYTES, front_matter, read_card
from hubfusion.lineage import COMMIT_SHA, REPO_ID, Contribution, Finetune, Reason, Rejected, RemoteFile, Revision
from hubfusion.screen.policy import Policy
from hubfusion.screen.remote import RemoteTensors, ScreenRefusal, find_weights, read_config, read_tensors, refuse, short

PERMISSIVE = (
    "0bsd", "afl-3.0", "apache-2.0", "artistic-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear",
    "bsl-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc0-1.0", "cdla-permissive-1.0",
    "cdla-permissive-2.0", "ecl-2.0", "isc", "mit", "ms-pl", "ncsa", "odc-by", "pddl", "postgresql", "unlicense",
    "wtfpl", "zlib",
)  # fmt: skip
# Fields of config.json that change shapes or what the same weights compute; heads, dropout and labels may differ.
SAME_CONFIG = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "max_position_embeddings", "type_vocab_size", "embedding_size", "hidden_act",
    "hidden_activation", "activation", "activation_function", "layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps",
    "norm_eps", "position_embedding_type", "relative_attention", "position_buckets", "rope_theta", "pad_token_id",
    "is_decoder", "dim", "hidden_dim", "n_layers", "n_heads", "n_embd", "n_layer", "n_head", "local_attention",
    "global_attn_every_n_layers",
)  # fmt: skip
CODE = re.compile(r"(modeling|configuration|tokenization|processing|feature_extraction)_.*\.py")
ZERO_WIDTH_OR_CONTROL = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


@dataclass(frozen=True, slots=True)
class Base:
    """The base that finetunes are measured by: tensors by name, from the headers, ``config.json`` and backbone.

    ``versions`` maps the commit sha of every release to its tag. Several shas may carry ``tag``: commits on which the
    weights are those of the release, too.
    """

    revision: Revision
    tag: str
    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, Any]
    backbone: Backbone
    license: str
    versions: Mapping[str, str]


def read_base(hub: Hub, revision: Revision, tag: str, versions: Mapping[str, str]) -> Base:
    """Read configuration, license and headers of our own base at a pinned commit, by range requests.

    Raises `CheckpointError` when the base itself is not a well-formed safetensors checkpoint.
    """
    files = {f.path: f for f in hub.files(revision)}
    generous = Policy(max_header_bytes=MAX_HEADER_BYTES, max_config_bytes=1 << 20)
    try:
        config = read_config(hub, revision, files, generous)
        tensors = read_tensors(hub, revision, files, generous).tensors
        if BACKBONE in files:
            text = hub.read(revision, BACKBONE, stop=MAX_BYTES)
            backbone = parse_backbone(text, f"{revision} {BACKBONE}", tensors)
        else:
            backbone = declare(config, tensors)
    except ScreenRefusal as refused:
        raise CheckpointError(f"base {revision}: {refused}") from None
    stated = read_card(hub, revision).get("license")
    return Base(revision, tag, tensors, config, backbone, stated if isinstance(stated, str) else "", dict(versions))


def screen(hub: Hub, finetune: Finetune, base: Base, policy: Policy) -> Contribution | Rejected:
    """Judge one finetune without downloading weights; the first rule that objects gives the reason.

    Raises `HubError` when the Hub does not answer: that says nothing about the finetune.
    """
    revision, card = finetune.revision, finetune.card
    try:
        _check_author(finetune, policy)
        _check_relation(card, base)
        _check_base_revision(card, base, policy)
        license = _check_license(card, base, policy)
        datasets, examples = _read_datasets(card, policy), _read_examples(card)
        files = _check_files(finetune.files, policy)
        find_weights(files)
        if policy.check_dataset_licenses:
            _check_dataset_licenses(hub, datasets, base, policy)
        if CONFIG in files or ADAPTER_CONFIG not in files:  # peft pushes an adapter without the model's config
            _check_config(read_config(hub, revision, files, policy), base)
        weights = read_tensors(hub, revision, files, policy, guess=4096 + 130 * len(base.tensors))
        _check_tensors(weights, base, policy)
        read = [*(path for path in [CONFIG] if path in files), *(f.path for f in weights.files)]
        for path, word in hub.flagged(revision, read).items():
            refuse(Reason.FLAGGED, f"{path}: the Hub's scanners call it {word}")
    except ScreenRefusal as refused:
        return Rejected(revision, finetune.author, refused.reason, str(refused))
    except NotFound as error:
        return Rejected(revision, finetune.author, Reason.GONE, f"a listed file cannot be read any more: {error}")
    return Contribution(revision, finetune.author, base.revision, license, datasets, examples, weights.files)


def apply_caps(
    contributions: Sequence[Contribution], policy: Policy
) -> tuple[tuple[Contribution, ...], tuple[Rejected, ...]]:
    """Keep the oldest within the caps per author, per dataset and for the iteration; the others are `Reason.CAP`.

    A contribution that declares no dataset counts for none. Authors are owners of repositories, in any letter case.
    """
    authors: Counter[str] = Counter()
    datasets: Counter[str] = Counter()
    accepted: list[Contribution] = []
    rejected: list[Rejected] = []
    for each in contributions:
        author = each.revision.repo.partition("/")[0].lower()
        full = next((d for d in each.datasets if datasets[d.lower()] >= policy.max_per_dataset), None)
        if authors[author] >= policy.max_per_author:
            why = f"{each.author} has all of its {policy.max_per_author} places in this iteration"
        elif full is not None:
            why = f"dataset {full} has all of its {policy.max_per_dataset} places in this iteration"
        elif len(accepted) >= policy.max_contributions:
            why = f"all {policy.max_contributions} places of this iteration are taken"
        else:
            accepted.append(each)
            authors[author] += 1
            datasets.update({d.lower() for d in each.datasets})
            continue
        rejected.append(Rejected(each.revision, each.author, Reason.CAP, f"{why}; older contributions go first"))
    return tuple(accepted), tuple(rejected)


# -- the card: any JSON type may stand anywhere ------------------------------------------------------------------


def _check_author(finetune: Finetune, policy: Policy) -> None:
    owners = {finetune.author.lower(), finetune.revision.repo.partition("/")[0].lower()}
    if owners & {a.lower() for a in policy.authors_blocked}:
        refuse(Reason.BLOCKED, f"contributions of {finetune.author} are not taken")
    if policy.authors_allowed and not owners <= {a.lower() for a in policy.authors_allowed}:
        refuse(Reason.BLOCKED, f"{finetune.author} is not on the list of contributors; ask the maintainers")
    if out := sorted(set(finetune.tags) & set(policy.opt_out_tags)):
        refuse(Reason.OPTED_OUT, f"the model carries the tag {out[0]}; remove it to contribute")
    if finetune.gated:
        refuse(Reason.GATED, "the model is gated; open it to everybody to contribute")


def _check_relation(card: Any, base: Base) -> None:
    if not isinstance(card, Mapping):
        refuse(Reason.BAD_CARD, f"README.md: metadata must be a mapping, got {short(card)}")
    named, relation = card.get("base_model"), card.get("base_model_relation", "finetune")
    bases = [named] if isinstance(named, str) else named
    if not isinstance(bases, list) or not all(isinstance(b, str) for b in bases):
        refuse(Reason.BAD_CARD, f"README.md: base_model must be the id {base.revision.repo}, got {short(named)}")
    if bases != [base.revision.repo]:
        refuse(Reason.NOT_A_FINETUNE, f"README.md: base_model is {short(named)}, not {base.revision.repo} alone")
    if relation != "finetune":
        refuse(Reason.NOT_A_FINETUNE, f"README.md: base_model_relation is {short(relation)}, not finetune")


def _cold_fusion(card: Mapping[str, Any]) -> Mapping[str, Any]:
    block = {} if card.get("cold_fusion") is None else card["cold_fusion"]
    if not isinstance(block, Mapping):
        refuse(Reason.BAD_CARD, f"README.md: cold_fusion must be a mapping, got {short(block)}; run `hubfusion tag`")
    return block


def _check_base_revision(card: Mapping[str, Any], base: Base, policy: Policy) -> None:
    declared = _cold_fusion(card).get("base_revision")
    if declared is None:
        if policy.require_declared_base:
            what = "README.md does not say which revision of the base was finetuned"
            refuse(Reason.UNDECLARED_BASE, f"{what}; run `hubfusion tag` on the model")
        return
    # A sha of decimal digits alone reaches us as a number when the card does not quote it.
    sha = str(declared) if type(declared) is int else declared
    if not isinstance(sha, str) or not COMMIT_SHA.fullmatch(sha):
        what = f"README.md: cold_fusion.base_revision must be a full commit sha in quotes, got {short(declared)}"
        refuse(Reason.BAD_CARD, f"{what}; run `hubfusion tag`")
    tag = base.tag if sha == base.revision.sha else base.versions.get(sha)
    if tag is None:
        refuse(Reason.UNKNOWN_BASE, f"{sha[:12]} is no released revision of {base.revision.repo}")
    if tag != base.tag:
        refuse(Reason.STALE_BASE, f"made from {tag}, the current base is {base.tag}; finetune {base.tag} again")


def _allowed_licenses(base: Base, policy: Policy) -> list[str]:
    return [name.lower() for name in policy.licenses or (*PERMISSIVE, *filter(None, [base.license]))]


def _check_dataset_licenses(hub: Hub, datasets: Sequence[str], base: Base, policy: Policy) -> None:
    """Look the declared datasets up: two small requests each. What cannot be looked up is no license."""
    allowed = _allowed_licenses(base, policy)
    for name in datasets:
        if not REPO_ID.fullmatch(name):
            refuse(Reason.LICENSE, f"dataset {short(name)}: give it with its owner, its license is looked up")
        try:
            revision = hub.resolve(name, kind=RepoKind.DATASET)
            text = hub.read(revision, "README.md", stop=MAX_CARD_BYTES, kind=RepoKind.DATASET)
        except NotFound:
            refuse(Reason.LICENSE, f"dataset {short(name)}: no public card says under which license it is")
        stated = front_matter(text.decode("utf-8", "replace")).get("license")
        ids = stated if isinstance(stated, list) and stated else [stated]
        if bad := [each for each in ids if not isinstance(each, str) or each.strip().lower() not in allowed]:
            refuse(
                Reason.LICENSE, f"dataset {short(name)}: its license {short(bad[0])} is not one that is accepted here"
            )


def _check_license(card: Mapping[str, Any], base: Base, policy: Policy) -> str:
    stated = card.get("license")
    allowed = _allowed_licenses(base, policy)
    if not isinstance(stated, str) or not stated.strip():
        refuse(Reason.LICENSE, f"README.md: license must be one id such as apache-2.0, got {short(stated)}")
    name = stated.strip().lower()
    if name not in allowed:
        what = f"README.md: license {short(stated)} does not fit the base's ({base.license or 'none stated'})"
        refuse(Reason.LICENSE, f"{what}; {len(allowed)} are accepted, among them {', '.join(sorted(allowed)[:6])}")
    return name


def _read_datasets(card: Mapping[str, Any], policy: Policy) -> tuple[str, ...]:
    named = card.get("datasets")
    listed = [] if named is None else [named] if isinstance(named, str) else named
    if not isinstance(listed, list) or len(listed) > policy.max_datasets:
        what = f"a list of at most {policy.max_datasets} dataset ids"
        refuse(Reason.BAD_CARD, f"README.md: datasets must be {what}, got {short(named)}")
    for name in listed:
        if not isinstance(name, str) or not (REPO_ID.fullmatch(name) or REPO_ID.fullmatch(f"_/{name}")):
            refuse(Reason.BAD_CARD, f"README.md: datasets: {short(name)} is not a dataset id")
    return tuple(dict.fromkeys(listed))


def _read_examples(card: Mapping[str, Any]) -> int | None:
    examples = _cold_fusion(card).get("examples")
    if examples is not None and (type(examples) is not int or not 1 <= examples <= 10**12):
        what = f"README.md: cold_fusion.examples must be a whole number from 1, got {short(examples)}"
        refuse(Reason.BAD_CARD, what)
    return examples


# -- the files ---------------------------------------------------------------------------------------------------


def _check_files(listed: Sequence[RemoteFile], policy: Policy) -> dict[str, RemoteFile]:
    """The files of the root by name; every path is looked at, though only a few are ever read."""
    if len(listed) > policy.max_files:
        refuse(Reason.TOO_LARGE, f"more than {policy.max_files} files; a contribution needs config and weights")
    seen: set[str] = set()
    for file in listed:
        if problem := path_problem(file.path):
            refuse(Reason.BAD_FILES, f"file name {short(file.path)} {problem}")
        if file.path.casefold() in seen:
            refuse(Reason.BAD_FILES, f"file name {short(file.path)} is there twice but for upper and lower case")
        seen.add(file.path.casefold())
        if CODE.fullmatch(file.path):
            refuse(Reason.CUSTOM_CODE, f"{file.path}: models with their own code are not taken")
    return {f.path: f for f in listed if "/" not in f.path}


def path_problem(path: str) -> str:
    """Why a path must not be written below a folder or shown; empty when it is fine."""
    if not path or len(path) > 512:
        return "is empty or longer than 512 characters"
    if any(unicodedata.category(c) in ZERO_WIDTH_OR_CONTROL for c in path):
        return "has control, invisible or direction-changing characters"
    if "\\" in path or path.startswith("/") or any(p in ("", ".", "..", ".git") for p in path.split("/")):
        return "points outside its folder or into .git"
    return ""


def _check_config(config: Mapping[str, Any], base: Base) -> None:
    for key in ("auto_map", "custom_pipelines"):
        if key in config:
            refuse(Reason.CUSTOM_CODE, f"{CONFIG}: {key} asks to run the model's own code, which is never done")
    if "quantization_config" in config:
        refuse(Reason.ARCHITECTURE, f"{CONFIG}: quantized weights cannot be averaged; push them unquantized")
    for key in SAME_CONFIG:
        if key in base.config and key in config and config[key] != base.config[key]:
            ours, theirs = short(base.config[key]), short(config[key])
            refuse(Reason.ARCHITECTURE, f"{CONFIG}: {key} is {theirs}, the base has {ours}")


def _check_tensors(weights: RemoteTensors, base: Base, policy: Policy) -> None:
    try:
        if weights.adapter is not None:
            match_adapter(weights.adapter, base.backbone, base.tensors, weights.tensors)
        else:
            matched = match(base.backbone, base.tensors, weights.tensors, any_float=policy.any_float_dtype)
            size, extra = (
                sum(weights.tensors[n].entries for n in names) for names in (matched.names.values(), matched.heads)
            )
            if extra > size:
                refuse(
                    Reason.ARCHITECTURE, f"heads of {extra} entries beside a backbone of {size}: more head than model"
                )
    except CheckpointError as error:
        refuse(Reason.ARCHITECTURE, f"{error}; finetune {base.revision.repo} {base.tag} itself")
