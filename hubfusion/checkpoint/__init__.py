"""Safetensors checkpoints: headers, reading, writing, and the deltas of finetunes from their base."""

from __future__ import annotations

from hubfusion.checkpoint.reader import (
    INDEX,
    MAX_INDEX_BYTES,
    SINGLE,
    WEIGHTS_NAME,
    Array,
    Checkpoint,
    Parameter,
    open_checkpoint,
)
from hubfusion.checkpoint.writer import (
    MANIFEST,
    MAX_SHARD_BYTES,
    Writing,
    WrittenFile,
    encode,
    plan_shards,
    write_checkpoint,
)

__all__ = [
    "INDEX",
    "MANIFEST",
    "MAX_INDEX_BYTES",
    "MAX_SHARD_BYTES",
    "SINGLE",
    "WEIGHTS_NAME",
    "Array",
    "Checkpoint",
    "Parameter",
    "Writing",
    "WrittenFile",
    "encode",
    "open_checkpoint",
    "plan_shards",
    "write_checkpoint",
]
