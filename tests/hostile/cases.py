"""Malformed and malicious finetunes, each one honest but for one thing; the name says what, `Case` how it must end.

Everything is generated: nothing here was taken from a real attack, and no payload does anything but be there.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hubfusion.lineage import Finetune, Reason, RemoteFile
from hubfusion.screen import Base, Policy
from tests.bert_checkpoints import BASE, Tensors, base_tensors, card, config, finetuned, sharded, weights
from tests.fake_hub import FakeHub, finetune

R = Reason
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WORDS, QUERY = "bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.query.weight"
FILE = RemoteFile("README.md", 10, "0" * 40)


@dataclass(frozen=True)
class Case:
    """``files`` and ``front`` change an honest push (None takes away), ``listed`` what the Hub lists of it."""

    reason: Reason
    says: str
    files: Mapping[str, bytes | None] = field(default_factory=dict)
    front: Any = field(default_factory=dict)
    listed: Callable[[tuple[RemoteFile, ...]], tuple[RemoteFile, ...]] | None = None
    found: Mapping[str, Any] = field(default_factory=dict)
    policy: Policy = field(default_factory=Policy)
    tensors: Tensors | None = None

    def push(self, hub: FakeHub, base: Base, repo: str) -> Finetune:
        """Put the repository on the Hub and say what a crawl finds there."""
        honest: dict[str, bytes | None] = {"config.json": config(), "README.md": b"# hello\n"}
        honest[WEIGHTS] = weights(finetuned(base_tensors(), 1) if self.tensors is None else self.tensors)
        files = {k: v for k, v in (honest | dict(self.files)).items() if v is not None}
        front = self.front
        if isinstance(front, dict):
            front = card(base.revision.sha, **{k: _fill(v, base) for k, v in front.items()})
        found = finetune(hub, hub.add(repo, files), front, **self.found)
        return finetune(
            hub,
            found.revision,
            front,
            **({"files": self.listed(found.files) if self.listed else found.files} | dict(self.found)),
        )


def _fill(value: Any, base: Base) -> Any:
    """Put the sha of the current base where a case says CURRENT."""
    if isinstance(value, dict):
        return {k: base.revision.sha if v == "CURRENT" else v for k, v in value.items()}
    return value


def block(**fields: Any) -> dict[str, Any]:
    """The cold_fusion block with fields changed."""
    return {"cold_fusion": {"base_revision": "CURRENT", "examples": 600} | fields}


def raw(table: Any, data: int = 0) -> dict[str, bytes | None]:
    """A weights file from a header (JSON value or text) and data bytes."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return {WEIGHTS: struct.pack("<Q", len(text)) + text + bytes(data)}


def without(*names: str) -> Tensors:
    return {k: v for k, v in finetuned(base_tensors(), 1).items() if k not in names}


def plus(**more: Any) -> Tensors:
    return finetuned(base_tensors(), 1) | {k.replace("__", "."): v for k, v in more.items()}


def changed(name: str, change: Callable[[Any], Any]) -> Tensors:
    tensors = finetuned(base_tensors(), 1)
    return tensors | {name: np.ascontiguousarray(change(tensors[name]))}


def lora(module: str = "bert.encoder.layer.0.attention.self.query", **options: Any) -> dict[str, bytes | None]:
    """A LoRA adapter of rank 2 in place of the weights, with options of its configuration changed."""
    stated = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query"], **options}
    pair = {
        f"base_model.model.{module}.lora_A.weight": np.full((2, 16), 0.1, np.float32),
        f"base_model.model.{module}.lora_B.weight": np.full((16, 2), 0.1, np.float32),
    }
    files = {"adapter_model.safetensors": weights(pair), "adapter_config.json": json.dumps(stated).encode()}
    return {WEIGHTS: None, "config.json": None, **files}


def edited_header(change: Callable[[dict[str, Any]], Any]) -> dict[str, bytes | None]:
    """The honest file with its header table changed, the data as they are."""
    data = weights(finetuned(base_tensors(), 1))
    length = 8 + struct.unpack("<Q", data[:8])[0]
    table = json.loads(data[8:length])
    change(table)
    text = json.dumps(table).encode()
    return {WEIGHTS: struct.pack("<Q", len(text)) + text + data[length:]}


def shards(change: Callable[[dict[str, Any]], Any]) -> dict[str, bytes | None]:
    """An honest sharded model whose files (the index parsed) were changed."""
    files: dict[str, Any] = dict(sharded(finetuned(base_tensors(), 1)))
    files[INDEX] = json.loads(files[INDEX])
    change(files)
    if not isinstance(files[INDEX], bytes):
        files[INDEX] = json.dumps(files[INDEX]).encode()
    return {WEIGHTS: None} | files


def add_path(path: str) -> Callable[[tuple[RemoteFile, ...]], tuple[RemoteFile, ...]]:
    return lambda files: (*files, RemoteFile(path, 10, "0" * 40))


def relist(**fields: Any) -> Callable[[tuple[RemoteFile, ...]], tuple[RemoteFile, ...]]:
    """The Hub lists the weights with other fields."""

    def change(files: tuple[RemoteFile, ...]) -> tuple[RemoteFile, ...]:
        facts = {f.path: {"path": f.path, "size": f.size, "blob": f.blob, "sha256": f.sha256} for f in files}
        facts[WEIGHTS] |= fields
        return tuple(RemoteFile(**fact) for fact in facts.values())

    return change


def alias_bomb() -> list[Any]:
    """As YAML aliases make it: 60 levels of ten references each, 10^60 when written out."""
    bomb: list[Any] = ["boom"]
    for _ in range(60):
        bomb = [bomb] * 10
    return bomb


def set_map(value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda files: files[INDEX].update(weight_map=value)


def one_entry(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda table: table["classifier.bias"].update(fields)


class Bomb:
    """What a malicious pickle looks like; it would only print."""

    def __reduce__(self) -> Any:
        return print, ("this pickle was run",)


CARDS: dict[str, Case] = {
    "metadata are a list": Case(R.BAD_CARD, "metadata must be a mapping, got []", front=[]),
    "metadata are text": Case(R.BAD_CARD, "metadata must be a mapping", front="base_model: x"),
    "metadata are null": Case(R.BAD_CARD, "metadata must be a mapping, got None", front=None),
    "base_model is missing": Case(R.BAD_CARD, "base_model must be the id ibm/ColD-Fusion", front={"base_model": None}),
    "base_model is a number": Case(R.BAD_CARD, "base_model must be the id", front={"base_model": 7}),
    "base_model is a mapping": Case(R.BAD_CARD, "base_model must be the id", front={"base_model": {"a": 1}}),
    "base_model holds a number": Case(R.BAD_CARD, "base_model must be the id", front={"base_model": [BASE, 1]}),
    "base_model is an alias bomb": Case(R.BAD_CARD, "base_model must be the id", front={"base_model": alias_bomb()}),
    "base_model is another": Case(R.NOT_A_FINETUNE, "not ibm/ColD-Fusion alone", front={"base_model": "a/b"}),
    "base_model differs in letter case": Case(R.NOT_A_FINETUNE, "alone", front={"base_model": BASE.lower()}),
    "a merge of two bases": Case(R.NOT_A_FINETUNE, "alone", front={"base_model": [BASE, "a/b"]}),
    "relation is adapter": Case(R.NOT_A_FINETUNE, "is 'adapter', not", front={"base_model_relation": "adapter"}),
    "relation is quantized": Case(R.NOT_A_FINETUNE, "'quantized'", front={"base_model_relation": "quantized"}),
    "relation is a list": Case(R.NOT_A_FINETUNE, "relation is ['f", front={"base_model_relation": ["finetune"]}),
    "relation is an alias bomb": Case(R.NOT_A_FINETUNE, "relation is", front={"base_model_relation": alias_bomb()}),
    "cold_fusion is text": Case(R.BAD_CARD, "cold_fusion must be a mapping", front={"cold_fusion": "yes"}),
    "cold_fusion is a list": Case(R.BAD_CARD, "cold_fusion must be a mapping", front={"cold_fusion": []}),
    "no base revision": Case(R.UNDECLARED_BASE, "hubfusion tag", front={"cold_fusion": {"examples": 5}}),
    "no cold_fusion block": Case(R.UNDECLARED_BASE, "hubfusion tag", front={"cold_fusion": None}),
    "base revision is a branch": Case(R.BAD_CARD, "got 'main'", front=block(base_revision="main")),
    "base revision is short": Case(R.BAD_CARD, "full commit sha", front=block(base_revision="abc1234")),
    "base revision is in capitals": Case(R.BAD_CARD, "full commit sha", front=block(base_revision="A" * 40)),
    "base revision is a float": Case(R.BAD_CARD, "got inf", front=block(base_revision=math.inf)),
    "base revision is a list": Case(R.BAD_CARD, "full commit sha", front=block(base_revision=["a" * 40])),
    "base revision ends in a newline": Case(R.BAD_CARD, "full commit sha", front=block(base_revision="a" * 40 + "\n")),
    "base revision is of nobody": Case(R.UNKNOWN_BASE, "bbbbbbbbbbbb is no", front=block(base_revision="b" * 40)),
    "examples are text": Case(R.BAD_CARD, "examples must be a whole number", front=block(examples="many")),
    "examples are negative": Case(R.BAD_CARD, "got -1", front=block(examples=-1)),
    "examples are true": Case(R.BAD_CARD, "got True", front=block(examples=True)),
    "examples are astronomical": Case(R.BAD_CARD, "whole number", front=block(examples=10**30)),
    "datasets are a mapping": Case(R.BAD_CARD, "datasets must be", front={"datasets": {"a": 1}}),
    "a dataset is a number": Case(R.BAD_CARD, "7 is not a dataset id", front={"datasets": ["org/a", 7]}),
    "a dataset is a path": Case(R.BAD_CARD, "is not a dataset id", front={"datasets": ["../../etc/passwd"]}),
    "a dataset has markup": Case(R.BAD_CARD, "is not a dataset id", front={"datasets": ["<img src=x>"]}),
    "51 datasets": Case(R.BAD_CARD, "at most 50", front={"datasets": [f"org/d{i}" for i in range(51)]}),
    "no license": Case(R.LICENSE, "got None", front={"license": None}),
    "an empty license": Case(R.LICENSE, "got ' '", front={"license": " "}),
    "a license list": Case(R.LICENSE, "must be one id", front={"license": ["mit", "cc-by-nc-4.0"]}),
    "a non-commercial license": Case(R.LICENSE, "does not fit", front={"license": "cc-by-nc-4.0"}),
    "a license called other": Case(R.LICENSE, "'other' does not fit", front={"license": "other"}),
    "a license with a look-alike letter": Case(R.LICENSE, "m\\u0456t", front={"license": "m\u0456t"}),
    "a license of a megabyte": Case(R.LICENSE, "...", front={"license": "mit" * 350_000}),
    "a gated model": Case(R.GATED, "open it to everybody", found={"gated": True}),
    "an author who is blocked": Case(R.BLOCKED, "are not taken", policy=Policy(authors_blocked=("EVE",))),
    "an author who is not on the list": Case(R.BLOCKED, "ask", policy=Policy(authors_allowed=("ann",))),
    "an author who names himself another": Case(
        R.BLOCKED, "is not on the list", policy=Policy(authors_allowed=("ann",)), found={"author": "ann"}
    ),
    "an owner who opted out": Case(R.OPTED_OUT, "no-merge", found={"tags": ("cold-fusion", "no-merge")}),
}

FILES: dict[str, Case] = {
    "a path into the folder above": Case(R.BAD_FILES, "points outside", listed=add_path("../x")),
    "a path with dots inside": Case(R.BAD_FILES, "points outside", listed=add_path("a/../../x")),
    "an absolute path": Case(R.BAD_FILES, "points outside", listed=add_path("/etc/cron.d/x")),
    "a path with a backslash": Case(R.BAD_FILES, "points outside", listed=add_path("..\\x")),
    "a path with an empty part": Case(R.BAD_FILES, "points outside", listed=add_path("a//b")),
    "a path into .git": Case(R.BAD_FILES, ".git", listed=add_path(".git/hooks/post-checkout")),
    "a path with NUL": Case(R.BAD_FILES, "invisible", listed=add_path("model.safetensors\0.bin")),
    "a path with an escape sequence": Case(R.BAD_FILES, "\\x1b", listed=add_path("\x1b[2Jx")),
    "a path with a newline": Case(R.BAD_FILES, "invisible", listed=add_path("a\nb")),
    "a path with a right-to-left override": Case(R.BAD_FILES, "\\u202e", listed=add_path("txt.\u202enib")),
    "a path with a zero-width space": Case(R.BAD_FILES, "invisible", listed=add_path("model\u200b.safetensors")),
    "an empty path": Case(R.BAD_FILES, "is empty", listed=add_path("")),
    "a path of 513 letters": Case(R.BAD_FILES, "longer than 512", listed=add_path("x" * 513)),
    "two names that differ in letter case": Case(R.BAD_FILES, "twice", listed=add_path("MODEL.safetensors")),
    "the same name twice": Case(R.BAD_FILES, "twice", listed=add_path("model.safetensors")),
    "a negative size": Case(R.BAD_FILES, "is not a size", listed=relist(size=-1)),
    "a size that is null": Case(R.BAD_FILES, "listed size None is not", listed=relist(size=None)),
    "a hash that is none": Case(R.BAD_FILES, "is no hash", listed=relist(sha256="../../x")),
    "weights of a terabyte": Case(R.TOO_LARGE, "at most 21474836480", listed=relist(size=1 << 40)),
    "501 files": Case(R.TOO_LARGE, "more than 500 files", listed=lambda f: f + (FILE,) * 500),
    "single and sharded weights": Case(R.BAD_FILES, "readers disagree", files={INDEX: b"{}"}),
    "an adapter beside the weights": Case(R.BAD_FILES, "what the model is", files={"adapter_config.json": b"{}"}),
    "weights as pickle only": Case(
        R.NO_SAFETENSORS, "only pytorch_model.bin", files={WEIGHTS: None, "pytorch_model.bin": pickle.dumps(Bomb())}
    ),
    "weights for Keras only": Case(R.NO_SAFETENSORS, "tf_model.h5", files={WEIGHTS: None, "tf_model.h5": b""}),
    "an adapter only": Case(
        R.NO_SAFETENSORS, "without adapter_config", files={WEIGHTS: None, "adapter_model.safetensors": b""}
    ),
    "no weights at all": Case(R.NO_SAFETENSORS, "found none", files={WEIGHTS: None}),
    "weights in a subfolder": Case(R.NO_SAFETENSORS, "found none", files={WEIGHTS: None, "a/" + WEIGHTS: b""}),
    "an archive only": Case(R.NO_SAFETENSORS, "found none", files={WEIGHTS: None, "model.zip": b"PK\3\4"}),
    "a modeling script": Case(R.CUSTOM_CODE, "modeling_evil.py", files={"modeling_evil.py": b"import os"}),
    "a tokenization script": Case(R.CUSTOM_CODE, "tokenization_x.py", files={"tokenization_x.py": b""}),
}

CONFIGS: dict[str, Case] = {
    "no config": Case(R.BAD_CONFIG, "config.json is missing", files={"config.json": None}),
    "an empty config": Case(R.BAD_CONFIG, "is not JSON", files={"config.json": b""}),
    "a config that is no JSON": Case(R.BAD_CONFIG, "is not JSON", files={"config.json": b"<html>"}),
    "a config that is a list": Case(R.BAD_CONFIG, "must be a mapping", files={"config.json": b"[]"}),
    "a config that nests deeply": Case(R.BAD_CONFIG, "is not JSON", files={"config.json": b"[" * 30_000}),
    "a config of latin-1": Case(R.BAD_CONFIG, "is not JSON", files={"config.json": b'{"a":"\xe9"}'}),
    "a config of 33 kB": Case(R.TOO_LARGE, "at most 32768", files={"config.json": config().ljust(33_000)}),
    "auto_map": Case(
        R.CUSTOM_CODE, "auto_map asks", files={"config.json": config(auto_map={"AutoModel": "modeling.Evil"})}
    ),
    "custom_pipelines": Case(R.CUSTOM_CODE, "custom_p", files={"config.json": config(custom_pipelines={"x": {}})}),
    "quantized": Case(R.ARCHITECTURE, "quantized", files={"config.json": config(quantization_config={"bits": 4})}),
    "another model type": Case(R.ARCHITECTURE, "is 'roberta'", files={"config.json": config(model_type="roberta")}),
    "a model type that is a list": Case(R.ARCHITECTURE, "['bert']", files={"config.json": config(model_type=["bert"])}),
    "a hidden size of a million": Case(R.ARCHITECTURE, "1000000", files={"config.json": config(hidden_size=10**6)}),
    "another activation": Case(R.ARCHITECTURE, "hidden_act", files={"config.json": config(hidden_act="relu")}),
    "other attention heads": Case(R.ARCHITECTURE, "num_att", files={"config.json": config(num_attention_heads=4)}),
}

HEADERS: dict[str, Case] = {
    "empty weights": Case(R.BAD_HEADER, "0 bytes are too few", files={WEIGHTS: b""}),
    "an LFS pointer": Case(R.BAD_HEADER, "at most", files={WEIGHTS: b"version https://git-lfs.github.com/spec/v1\n"}),
    "a page of HTML": Case(R.BAD_HEADER, "at most", files={WEIGHTS: b"<!doctype html><html></html>"}),
    "a pickle called safetensors": Case(R.BAD_HEADER, "at most", files={WEIGHTS: pickle.dumps(Bomb(), 4)}),
    "a zip called safetensors": Case(R.BAD_HEADER, "at most", files={WEIGHTS: b"PK\3\4" + bytes(range(90))}),
    "a header past the end": Case(R.BAD_HEADER, "does not fit", files={WEIGHTS: struct.pack("<Q", 999) + b"{}"}),
    "a header of 2^63 bytes": Case(R.BAD_HEADER, "at most", files={WEIGHTS: struct.pack("<Q", 1 << 63) + b"{}"}),
    "a header of 100 kB": Case(R.TOO_LARGE, "at most 65536 are read", files=raw(b"{" + b" " * 100_000 + b"}")),
    "a header with a leading space": Case(R.BAD_HEADER, "must begin with '{'", files=raw(b" {}")),
    "a header that is no JSON": Case(R.BAD_HEADER, "is not JSON", files=raw(b"{nope}")),
    "a header of NaN": Case(R.BAD_HEADER, "constant NaN", files=raw(b'{"a":NaN}')),
    "a header that nests deeply": Case(R.BAD_HEADER, "is not JSON", files=raw(b'{"a":' + b"[" * 60_000)),
    "a tensor twice": Case(R.BAD_HEADER, "appears twice", files=raw(b'{"a":{},"a":{}}')),
    "metadata that nest": Case(R.BAD_HEADER, "text to text", files=edited_header(lambda t: t.update(__metadata__=[]))),
    "a field too many": Case(R.BAD_HEADER, "fields must be exactly", files=edited_header(one_entry(code="x"))),
    "an unknown dtype": Case(R.BAD_HEADER, "is not one of", files=edited_header(one_entry(dtype="F8_E4M3"))),
    "a negative shape": Case(R.BAD_HEADER, "shape must be", files=edited_header(one_entry(shape=[-3]))),
    "an overflowing shape": Case(R.BAD_HEADER, "needs 7378", files=edited_header(one_entry(shape=[1 << 32, 1 << 32]))),
    "nine dimensions": Case(R.BAD_HEADER, "up to 8 sizes", files=edited_header(one_entry(shape=[1] * 9))),
    "offsets outside the file": Case(
        R.BAD_HEADER, "leaves a gap", files=edited_header(one_entry(data_offsets=[1 << 40, (1 << 40) + 12]))
    ),
    "offsets that overlap": Case(
        R.BAD_HEADER, "overlaps", files=edited_header(lambda t: t.update({"copy": t["classifier.bias"]}))
    ),
    "a hole in the data": Case(R.BAD_HEADER, "leaves a gap", files=edited_header(lambda t: t.pop(QUERY))),
    "a tensor name with a path": Case(
        R.BAD_HEADER, "is not allowed", files=edited_header(lambda t: t.update({"../a": t.pop("classifier.bias")}))
    ),
    "a tensor name with markup": Case(
        R.BAD_HEADER, "is not allowed", files=edited_header(lambda t: t.update({"<b>": t.pop("classifier.bias")}))
    ),
    "data cut off": Case(R.BAD_HEADER, "is cut off", files={WEIGHTS: weights(finetuned(base_tensors(), 1))[:-1]}),
    "trailing data": Case(
        R.BAD_HEADER, "trailing bytes", files={WEIGHTS: weights(finetuned(base_tensors(), 1)) + b"x"}
    ),
    "a header of no tensors": Case(R.ARCHITECTURE, "of the base is missing", files=raw(b"{}")),
}

INDEXES: dict[str, Case] = {
    "a shard in the folder above": Case(
        R.BAD_INDEX, "must be a plain", files=shards(set_map({"a": "../model.safetensors"}))
    ),
    "a shard with an absolute path": Case(
        R.BAD_INDEX, "must be a plain", files=shards(set_map({"a": "/tmp/model.safetensors"}))
    ),
    "a shard that is a pickle": Case(R.BAD_INDEX, "must be a plain", files=shards(set_map({"a": "x.bin"}))),
    "a shard that is missing": Case(R.BAD_INDEX, "is not in the repo", files=shards(set_map({"a": "x.safetensors"}))),
    "a shard that is a number": Case(R.BAD_INDEX, "must be a plain", files=shards(set_map({"a": 1}))),
    "an empty index": Case(R.BAD_INDEX, "weight_map must map", files=shards(set_map({}))),
    "an index that is a page": Case(R.BAD_INDEX, "is not JSON", files=shards(lambda f: f.update({INDEX: b"<html>"}))),
    "an index that is a list": Case(R.BAD_INDEX, "must be a JSON obj", files=shards(lambda f: f.update({INDEX: []}))),
    "an index with a tensor twice": Case(
        R.BAD_INDEX, "appears twice", files=shards(lambda f: f.update({INDEX: b'{"weight_map":{"a":"b","a":"c"}}'}))
    ),
    "an index with a hostile tensor name": Case(
        R.BAD_INDEX, "is not allowed", files=shards(lambda f: f[INDEX]["weight_map"].update({"a\nb": "x.safetensors"}))
    ),
    "an index of 40 kB": Case(R.TOO_LARGE, "at most 32768", files=shards(lambda f: f[INDEX].update(x="y" * 40_000))),
    "an index that promises more": Case(
        R.BAD_INDEX,
        "model-00001-of-00002.safetensors lacks extra",
        files=shards(lambda f: f[INDEX]["weight_map"].update(extra="model-00001-of-00002.safetensors")),
    ),
    "a shard that holds more": Case(
        R.BAD_INDEX, "unknown to the index", files=shards(lambda f: f[INDEX]["weight_map"].pop("classifier.bias"))
    ),
    "shards without end": Case(
        R.TOO_LARGE,
        "65 shards, at most 64",
        files=shards(
            lambda f: (
                f.update({f"s{i}.safetensors": b"" for i in range(65)}),
                set_map({f"t{i}": f"s{i}.safetensors" for i in range(65)})(f),
            )
        ),
    ),
    "a shard that is cut off": Case(
        R.BAD_HEADER,
        "model-00002-of-00002.safetensors: is cut off",
        files=shards(lambda f: f.update({k: v[:-1] for k, v in f.items() if k.startswith("model-00002")})),
    ),
}

WRONG = "finetune ibm/ColD-Fusion"
LAYOUTS: dict[str, Case] = {
    "a missing parameter": Case(R.ARCHITECTURE, f"{QUERY} of the base is missing", tensors=without(QUERY)),
    "a transposed matrix": Case(R.ARCHITECTURE, "has shape [16, 50]", tensors=changed(WORDS, np.transpose)),
    "a larger vocabulary": Case(
        R.ARCHITECTURE, "[51, 16]", tensors=changed(WORDS, lambda v: np.pad(v, ((0, 1), (0, 0))))
    ),
    "an integer matrix": Case(R.ARCHITECTURE, "dtype I32", tensors=changed(QUERY, lambda v: v.astype("int32"))),
    "a layer too many": Case(
        R.ARCHITECTURE, "lies in the backbone", tensors=plus(bert__encoder__layer__2__x=np.zeros(3, np.float32))
    ),
    "a hidden parameter": Case(
        R.ARCHITECTURE, "lies in the backbone", tensors=plus(bert__backdoor=np.zeros(3, np.float32))
    ),
    "a second copy without prefix": Case(
        R.ARCHITECTURE, "is a second copy", tensors=plus(pooler__dense__bias=np.zeros(16, np.float32))
    ),
    "a second copy under another prefix": Case(
        R.ARCHITECTURE,
        "the backbone is there twice",
        tensors=finetuned(base_tensors(), 1)
        | {n.replace("bert.", "teacher."): v for n, v in finetuned(base_tensors(), 2).items() if n.startswith("bert.")},
    ),
    "a buffer of another type": Case(
        R.ARCHITECTURE, "dtype I32", tensors=plus(bert__embeddings__position_ids=np.zeros((1, 20), np.int32))
    ),
    "an adapter whose start changes the base": Case(R.ADAPTER, "init_lora", files=lora(init_lora_weights="pissa")),
    "an adapter of an unknown kind": Case(R.ADAPTER, "peft_type 'IA3'", files=lora(peft_type="IA3")),
    "an adapter with an unknown option": Case(R.ADAPTER, "use_evil 1 cannot", files=lora(use_evil=1)),
    "an adapter whose config is no JSON": Case(R.ADAPTER, "not JSON", files=lora() | {"adapter_config.json": b"<"}),
    "an adapter of a head alone": Case(R.ARCHITECTURE, "adapts nothing", files=lora("classifier")),
    "an adapter of a module that the base lacks": Case(
        R.ARCHITECTURE, "adapts nothing", files=lora("bert.encoder.layer.7.attention.self.query")
    ),
    "an adapter of a rank that it does not have": Case(R.ARCHITECTURE, "r is 3, its", files=lora(r=3)),
    "an adapter that scales by infinity": Case(R.ARCHITECTURE, "lora_alpha must be", files=lora(lora_alpha=math.inf)),
    "more head than model": Case(R.ARCHITECTURE, "more head than model", tensors=plus(big=np.zeros(9000, np.float32))),
}

CASES = {
    f"{case.reason}: {name}": case
    for table in (CARDS, FILES, CONFIGS, HEADERS, INDEXES, LAYOUTS)
    for name, case in table.items()
}
