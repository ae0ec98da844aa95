"""Repository cards: the YAML on top of README.md, what is wrong with it, and the tags that follow from it."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from hubfusion.localhub.store.repos import Kind

_FRONT = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NODES = 100_000
_YAML_MAX = 2 << 20
RELATIONS = ("adapter", "merge", "quantized", "finetune")

LICENSES = frozenset(
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 "
    "bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear "
    "c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 "
    "cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 "
    "cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 "
    "eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl "
    "apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib "
    "pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 "
    "llama4 grok2-community gemma unknown other".split()
)
"""Identifiers the Hub takes as `license`, from its documentation (hub-docs, repositories-licenses)."""


class CardError(ValueError):
    """The metadata of a card cannot be read; the message is one line."""


def parse_card(text: str) -> dict[str, Any]:
    """The metadata on top of a README as JSON values; {} when there is none."""
    match = _FRONT.match(text)
    return parse_metadata(match[1]) if match else {}


def parse_metadata(text: str) -> dict[str, Any]:
    """YAML metadata as a JSON object."""
    plain = parse_yaml(text)
    if not isinstance(plain, dict | None):
        raise CardError("metadata must be a mapping")
    return plain or {}


def parse_yaml(text: str) -> Any:
    """YAML as JSON values: dates become text, aliases are written out within a bound."""
    if len(text) > _YAML_MAX:
        raise CardError(f"metadata is longer than {_YAML_MAX} characters")
    try:
        return _plain(yaml.load(text, Loader=_LOADER), [_NODES])
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise CardError(" ".join(str(error).split())[:300]) from None


def _plain(value: Any, left: list[int]) -> Any:
    left[0] -= 1
    if left[0] < 0:
        raise CardError(f"metadata has more than {_NODES} values")
    if isinstance(value, Mapping):
        return {str(key): _plain(item, left) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item, left) for item in value]
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise CardError("metadata has a number of more than 63 bits")
    if isinstance(value, (datetime.date, datetime.time, bytes)):
        return str(value)
    if isinstance(value, float) and value != value or value in (float("inf"), float("-inf")):
        return str(value)
    return value


def check_metadata(kind: Kind, data: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Errors and warnings about metadata, each a sentence as the Hub writes it."""
    errors, warnings = [], []
    for name in _texts(data.get("license")):
        if name not in LICENSES:
            errors.append(f'"license" must be one of [{", ".join(sorted(LICENSES))}]')
    if not data:
        warnings.append("empty or missing yaml metadata in repo card")
    for key in ("tags", "datasets", "language", "base_model"):
        value = data.get(key)
        items = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(item, (str, bool)) for item in items):
            errors.append(f'"{key}" must be a string or a list of strings')
    for base in _texts(data.get("base_model")):
        if kind is Kind.MODEL and not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", base):
            errors.append(f'"base_model" with value "{base[:100]}" is not valid. Use a model id from the Hub')
    relation = data.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]')
    for key in ("library_name", "pipeline_tag", "license_name", "pretty_name"):
        if key in data and data[key] is not None and not isinstance(data[key], str):
            errors.append(f'"{key}" must be a string')
    index = data.get("model-index")
    if index is not None and not (
        isinstance(index, list) and all(isinstance(x, dict) and x.get("name") and "results" in x for x in index)
    ):
        errors.append('"model-index" must be a list of entries with "name" and "results"')
    return errors, warnings


def _texts(value: Any) -> list[str]:
    items = value if isinstance(value, list) else [] if value is None else [value]
    return [str(item) for item in items if isinstance(item, (str, int, float))]


def base_models(card: Mapping[str, Any]) -> list[str]:
    """The ids under `base_model`, in order, once each."""
    return list(dict.fromkeys(_texts(card.get("base_model"))))


def relation_of(card: Mapping[str, Any], paths: Sequence[str], config: Mapping[str, Any]) -> str:
    """How the model came from its base: said by `base_model_relation`, else inferred as the Hub documents it.

    Two or more bases make a merge, an adapter config an adapter, GGUF or a quantization config a quantized model, and
    everything else is a finetune.
    """
    said = card.get("base_model_relation")
    if said in RELATIONS:
        return str(said)
    if len(base_models(card)) > 1:
        return "merge"
    if "adapter_config.json" in paths:
        return "adapter"
    if "quantization_config" in config or any(path.endswith(".gguf") for path in paths):
        return "quantized"
    return "finetune"


def library_of(card: Mapping[str, Any], paths: Sequence[str], config: Mapping[str, Any]) -> str | None:
    """`library_name` of the card, else what the files say."""
    said = card.get("library_name")
    if isinstance(said, str):
        return said
    files = set(paths)
    if "adapter_config.json" in files:
        return "peft"
    if "modules.json" in files and "config_sentence_transformers.json" in files:
        return "sentence-transformers"
    return "transformers" if "model_type" in config else None


_ARCHITECTURES = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "ForConditionalGeneration": "text2text-generation",
}


def pipeline_of(card: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """`pipeline_tag` of the card, else what the architecture in config.json is for."""
    said = card.get("pipeline_tag")
    if isinstance(said, str):
        return said
    for architecture in _texts(config.get("architectures")):
        for suffix, task in _ARCHITECTURES.items():
            if architecture.endswith(suffix):
                return task
    return None


def model_tags(card: Mapping[str, Any], paths: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    """The tags of a model: by which it is found in listings."""
    tags = [library_of(card, paths, config)]
    if any(path.endswith(".safetensors") for path in paths):
        tags.append("safetensors")
    if any(path.endswith("pytorch_model.bin") for path in paths):
        tags.append("pytorch")
    tags += [config["model_type"]] if isinstance(config.get("model_type"), str) else []
    tags += [pipeline_of(card, config), *_texts(card.get("tags"))]
    tags += ["model-index"] if card.get("model-index") else []
    tags += _common(card)
    bases, relation = base_models(card), relation_of(card, paths, config)
    tags += [f"base_model:{base}" for base in bases] + [f"base_model:{relation}:{base}" for base in bases]
    return _once(tags)


def dataset_tags(card: Mapping[str, Any], paths: Sequence[str]) -> list[str]:
    """The tags of a dataset."""
    tags: list[str | None] = []
    for key in ("task_categories", "task_ids", "size_categories", "annotations_creators", "multilinguality"):
        tags += [f"{key}:{item}" for item in _texts(card.get(key))]
    for form in ("parquet", "csv", "json", "text"):
        suffixes = (".jsonl", ".json") if form == "json" else (".txt",) if form == "text" else (f".{form}",)
        if any(path.endswith(suffixes) for path in paths):
            tags.append(f"format:{form}")
            break
    tags += [f"language:{item}" for item in _texts(card.get("language"))]
    return _once([*tags, *_texts(card.get("tags")), *_common(card, language=False)])


def space_tags(card: Mapping[str, Any]) -> list[str]:
    """The tags of a Space."""
    return _once([card.get("sdk"), *_texts(card.get("tags")), *_common(card)])


def _common(card: Mapping[str, Any], language: bool = True) -> list[str | None]:
    tags: list[str | None] = list(_texts(card.get("language"))) if language else []
    tags += [f"dataset:{item}" for item in _texts(card.get("datasets"))]
    tags += [f"arxiv:{item}" for item in _texts(card.get("arxiv"))]
    tags += [f"license:{item}" for item in _texts(card.get("license"))]
    return [*tags, "region:us"]


def _once(tags: Sequence[str | None]) -> list[str]:
    return list(dict.fromkeys(tag for tag in tags if isinstance(tag, str) and tag))


def parse_json_object(blob: bytes) -> dict[str, Any]:
    """A small JSON file as an object; {} when it is anything else."""
    try:
        value = json.loads(blob)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
