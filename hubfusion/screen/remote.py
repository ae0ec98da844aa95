"""Read config, shards and headers of a checkpoint on the Hub by range requests, without downloading it.

All of it is untrusted. Reads stay within the limits of the `Policy`, under 100 kB for one model.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from hubfusion.checkpoint import INDEX, SINGLE, adapters, headers
from hubfusion.checkpoint.adapters import CONFIG as ADAPTER_CONFIG
from hubfusion.checkpoint.adapters import WEIGHTS as ADAPTER
from hubfusion.checkpoint.backbone import CONFIG
from hubfusion.checkpoint.headers import Header, TensorSpec
from hubfusion.errors import CheckpointError
from hubfusion.hub import Hub
from hubfusion.lineage import Reason, RemoteFile, Revision
from hubfusion.screen.policy import Policy


class ScreenRefusal(Exception):
    """Raised when a rule rejects: the reason and one sentence; `hubfusion.screen.rules` turns it into a `Rejected`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        """Keep both."""
        super().__init__(detail)
        self.reason = reason


def refuse(reason: Reason, detail: str) -> NoReturn:
    """Reject the finetune that is being screened."""
    raise ScreenRefusal(reason, detail)


@dataclass(frozen=True, slots=True)
class RemoteTensors:
    """``files`` are those that hold the weights, ``tensors`` all of theirs by name.

    Files are shards and their index; of an adapter its weights and its configuration, which is ``adapter``, parsed.
    """

    files: tuple[RemoteFile, ...]
    tensors: Mapping[str, TensorSpec]
    adapter: Mapping[str, Any] | None = None


def find_weights(files: Mapping[str, RemoteFile]) -> RemoteFile:
    """The file that the weights start from: the single one, the index, or the adapter's; refuses several and none."""
    if ADAPTER in files and ADAPTER_CONFIG in files and SINGLE not in files and INDEX not in files:
        return files[ADAPTER]
    if SINGLE in files and INDEX in files:
        refuse(Reason.BAD_FILES, f"{SINGLE} and {INDEX} are both there: readers disagree on which one counts")
    if SINGLE not in files and INDEX not in files:
        others = sorted(n for n in files if n.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack")))
        adapter = f"{ADAPTER} without {ADAPTER_CONFIG}" if ADAPTER in files else ""
        present = adapter or (f"only {others[0]}" if others else "none")
        what = f"weights must be {SINGLE}, {INDEX} with shards, or {ADAPTER} with {ADAPTER_CONFIG}, found {present}"
        refuse(Reason.NO_SAFETENSORS, f"{what}; save with safe_serialization=True")
    if ADAPTER_CONFIG in files:
        refuse(Reason.BAD_FILES, f"{ADAPTER_CONFIG} beside full weights: readers disagree on what the model is")
    return files[SINGLE] if SINGLE in files else files[INDEX]


def _check_size(file: RemoteFile, most: int) -> None:
    if type(file.size) is not int or file.size < 0:
        refuse(Reason.BAD_FILES, f"{file.path}: listed size {short(file.size)} is not a size")
    if file.size > most:
        refuse(Reason.TOO_LARGE, f"{file.path}: {file.size} bytes, at most {most} are allowed")
    if file.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", str(file.sha256)):
        refuse(Reason.BAD_FILES, f"{file.path}: listed sha256 {short(file.sha256)} is no hash")


def read_config(hub: Hub, revision: Revision, files: Mapping[str, RemoteFile], policy: Policy) -> Mapping[str, Any]:
    """Parse ``config.json``; the caller checks its values."""
    if CONFIG not in files:
        refuse(Reason.BAD_CONFIG, f"{CONFIG} is missing; push the model with save_pretrained")
    _check_size(files[CONFIG], policy.max_config_bytes)
    text = hub.read(revision, CONFIG, stop=files[CONFIG].size) if files[CONFIG].size else b""
    try:
        config = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        refuse(Reason.BAD_CONFIG, f"{CONFIG} is not JSON: {str(error)[:80]}")
    if not isinstance(config, dict):
        refuse(Reason.BAD_CONFIG, f"{CONFIG} must be a mapping, got {short(config)}")
    return config


def read_tensors(
    hub: Hub, revision: Revision, files: Mapping[str, RemoteFile], policy: Policy, guess: int = 16 << 10
) -> RemoteTensors:
    """Read the headers of the checkpoint at ``revision``; together they may take ``policy.max_header_bytes``.

    ``files`` are those of the root by name, ``guess`` is the expected length of all headers in bytes.
    """
    first, budget = find_weights(files), policy.max_header_bytes
    if first.path == ADAPTER:
        return _read_adapter(hub, revision, files, policy)
    if first.path == SINGLE:
        return RemoteTensors((first,), _read_header(hub, revision, first, policy, budget, guess)[0].tensors)
    _check_size(first, budget // 2)
    text = hub.read(revision, INDEX, stop=max(1, first.size))
    try:
        index = headers.parse_index(text, {n: f.size for n, f in files.items()}, INDEX)
    except CheckpointError as error:
        refuse(Reason.BAD_INDEX, str(error))
    budget -= len(text)
    shards = sorted(set(index.values()))
    if len(shards) > policy.max_shards:
        refuse(Reason.TOO_LARGE, f"{INDEX}: {len(shards)} shards, at most {policy.max_shards} are allowed")
    tensors: dict[str, TensorSpec] = {}
    for shard in shards:
        header, used = _read_header(hub, revision, files[shard], policy, budget, guess // len(shards) + 1024)
        budget -= used
        promised = {name for name, where in index.items() if where == shard}
        if wrong := sorted(promised ^ set(header.tensors)):
            kind = "lacks" if wrong[0] in promised else "holds, unknown to the index,"
            refuse(Reason.BAD_INDEX, f"{shard} {kind} {wrong[0][:80]}")
        tensors.update(header.tensors)
    return RemoteTensors((first, *(files[shard] for shard in shards)), tensors)


def _read_adapter(hub: Hub, revision: Revision, files: Mapping[str, RemoteFile], policy: Policy) -> RemoteTensors:
    weights, stated = files[ADAPTER], files[ADAPTER_CONFIG]
    _check_size(stated, policy.max_config_bytes)
    try:
        adapter = adapters.parse_config(hub.read(revision, ADAPTER_CONFIG, stop=max(1, stated.size)))
    except CheckpointError as error:
        refuse(Reason.ADAPTER, str(error))
    budget = policy.max_header_bytes
    tensors = _read_header(hub, revision, weights, policy, budget, min(budget, 32 << 10))[0].tensors
    return RemoteTensors((stated, weights), tensors, adapter)


def _read_header(
    hub: Hub, revision: Revision, file: RemoteFile, policy: Policy, budget: int, guess: int
) -> tuple[Header, int]:
    """The header of one file and the bytes it took: one request when it is about as long as the base's, else two."""
    _check_size(file, policy.max_file_bytes)

    def read(start: int, stop: int) -> bytes:
        return hub.read(revision, file.path, start=start, stop=stop)

    try:
        return headers.read_header(read, file.size, file.path, guess=guess, most=budget)
    except headers.HeaderTooLong as error:
        refuse(Reason.TOO_LARGE, str(error))
    except CheckpointError as error:
        refuse(Reason.BAD_HEADER, str(error))


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict, _REPR.maxstring, _REPR.maxother = 2, 3, 3, 60, 60


def short(value: Any) -> str:
    """An untrusted value for one line of text: printable ASCII only, cut after 60 characters, in bounded time."""
    text = _REPR.repr(value).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 60 else text[:57] + "..."
