"""Turn texts into batches: tokenized once, sorted by length, cut by a token budget, padded to the longest.

This module does not import torch: token ids are small NumPy arrays until a batch is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hubfusion.data.loading import Split
from hubfusion.errors import EvaluationError
from hubfusion.train.recipe import Encoding


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of each example (int64, each of its own length), token types if the model reads them, and ``pad``."""

    ids: tuple[np.ndarray, ...]
    types: tuple[np.ndarray, ...] | None
    pad: int

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each example, (n,)."""
        return np.fromiter((len(i) for i in self.ids), dtype=np.int64, count=len(self.ids))

    def take(self, rows: Sequence[int]) -> Tokens:
        """These examples, in this order."""
        types = None if self.types is None else tuple(self.types[r] for r in rows)
        return Tokens(tuple(self.ids[r] for r in rows), types, self.pad)

    def batch(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Model inputs of these examples, padded on the right to the longest of them, each (rows, longest)."""
        longest = max(len(self.ids[r]) for r in rows)
        ids = np.full((len(rows), longest), self.pad, dtype=np.int64)
        mask = np.zeros((len(rows), longest), dtype=np.int64)
        types = None if self.types is None else np.zeros((len(rows), longest), dtype=np.int64)
        for k, row in enumerate(rows):
            n = len(self.ids[row])
            ids[k, :n] = self.ids[row]
            mask[k, :n] = 1
            if types is not None and self.types is not None:
                types[k, :n] = self.types[row]
        inputs = {"input_ids": ids, "attention_mask": mask}
        return inputs if types is None else inputs | {"token_type_ids": types}


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a checkpoint folder; its code is ours, never the folder's."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EvaluationError(f"{folder}: no usable tokenizer: {line}") from None
    if tokenizer.pad_token_id is None:
        raise EvaluationError(f"{folder}: the tokenizer has no padding token")
    return tokenizer


def tokenize(tokenizer: Any, split: Split, max_length: int, encoding: Encoding, name: str) -> Tokens:
    """Token ids of a split, truncated to ``max_length`` tokens.

    ``Encoding.RECYCLING`` is what Model Recycling's code feeds the model: the texts joined by a literal ``<SEP>`` and
    the dataset's ``name`` at the end.
    """
    first, second = list(split.first), None if split.second is None else list(split.second)
    if encoding is Encoding.RECYCLING:
        joined = first if second is None else [f"{a} <SEP> {b}" for a, b in zip(first, second, strict=True)]
        first, second = [f"{text}<{name}" for text in joined], None
    limit = min(max_length, tokenizer.model_max_length)
    encoded: Mapping[str, Any] = tokenizer(
        first, second, truncation=True, max_length=limit, padding=False, return_attention_mask=False
    )
    types = encoded.get("token_type_ids")
    return Tokens(
        tuple(np.asarray(i, dtype=np.int64) for i in encoded["input_ids"]),
        None if types is None else tuple(np.asarray(t, dtype=np.int64) for t in types),
        int(tokenizer.pad_token_id),
    )


def by_length(lengths: np.ndarray, rows: Sequence[int], budget: int, overhead: int) -> Iterator[list[int]]:
    """Cut ``rows`` into batches of near-equal lengths that cost least: padded tokens, and ``overhead`` tokens a batch.

    A batch has at most ``budget`` tokens, padding included; a single example may exceed it. Longest first, so that a
    batch too large for the memory fails at once. The cut is the optimum (dynamic programming over the sorted lengths).

    >>> list(by_length(np.array([9, 2, 3, 8]), [0, 1, 2, 3], budget=18, overhead=2))
    [[0, 3], [2, 1]]
    >>> list(by_length(np.array([9, 2, 3, 8]), [0, 1, 2, 3], budget=36, overhead=99))
    [[0, 3, 2, 1]]
    """
    order = sorted(rows, key=lambda r: (-int(lengths[r]), r))
    cost = np.full(len(order) + 1, np.inf)  # of the best cut of the first k examples
    cost[0] = 0
    start = np.zeros(len(order) + 1, dtype=np.int64)  # of the last batch in that cut
    for i, row in enumerate(order):
        longest = max(1, int(lengths[row]))
        most = min(max(1, budget // longest), len(order) - i)
        found = cost[i] + overhead + longest * np.arange(1, most + 1)
        ends = slice(i + 1, i + 1 + most)
        better = found < cost[ends]
        cost[ends][better] = found[better]
        start[ends][better] = i
    cuts = [len(order)]
    while cuts[-1]:
        cuts.append(int(start[cuts[-1]]))
    for low, high in zip(cuts[:0:-1], cuts[-2::-1], strict=True):
        yield order[low:high]
