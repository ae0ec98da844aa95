"""How transformers lays out each model type: which tensors are the backbone and what the task classes lack or add.

The facts are derived from transformers on the meta device (`hubfusion.checkpoint.derive`) and shipped as a table
(``model_types.json``), so that screening and fusing import neither torch nor transformers.
``python -m hubfusion.checkpoint.derive`` writes the table.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelType:
    """How transformers lays out a model type: which tensors are the backbone, and how its task classes store them.

    Names are those in the files that ``save_pretrained`` writes, relative to the backbone where they lie in it. In a
    pattern, a component that is a number is written ``*``: ``encoder.layer.*.output.dense.weight``.

    - ``name``: ``model_type`` of the config.
    - ``prefix``: ``base_model_prefix`` without a dot, or "".
    - ``modules``: the first components of the parameters and persistent buffers of AutoModel's class.
    - ``optional``: patterns, as short as possible, of what AutoModel's class has and some text task class lacks, or the
      other way round: poolers.
    - ``buffers``: patterns of the buffers of AutoModel's class, persistent or not, and of tensors that older versions
      wrote and transformers ignores.
    - ``heads``: the components under which the language-model and pretraining classes keep what lies outside the
      backbone. One component, or as many as it takes to lie outside.
    - ``ties``: pairs (alias, name) of patterns: with ``tie_word_embeddings``, the alias is the same tensor as the name.
    - ``partial``: classes that lack more than a quarter of the backbone or store it under other names.
    """

    name: str
    prefix: str
    modules: tuple[str, ...]
    optional: tuple[str, ...]
    buffers: tuple[str, ...]
    heads: tuple[str, ...]
    ties: tuple[tuple[str, str], ...]
    partial: tuple[str, ...] = ()


def find_model_type(name: str) -> ModelType | None:
    """The shipped facts of a model type, or None if the table does not have it.

    >>> find_model_type("roberta").optional
    ('pooler',)
    """
    row = _table().get(name)
    return None if row is None else ModelType(name, **{key: _frozen(value) for key, value in row.items()})


def known_model_types() -> tuple[str, ...]:
    """The model types in the shipped table, sorted."""
    return tuple(_table())


def format_table(types: list[ModelType], version: str) -> str:
    """The text of the table: one line for each model type, with the version of transformers that it comes from."""
    rows = []
    for facts in sorted(types, key=lambda facts: facts.name):
        row = {field.name: getattr(facts, field.name) for field in fields(facts)[1:]}
        rows.append(f"{json.dumps(facts.name)}: {json.dumps(row)}")
    return f'{{"transformers": {json.dumps(version)}, "types": {{\n' + ",\n".join(rows) + "\n}}\n"


@cache
def _table() -> dict[str, dict[str, Any]]:
    text = files("hubfusion.checkpoint").joinpath("model_types.json").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = json.loads(text)["types"]
    return table


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
