"""Values to and from JSON and TOML; msgspec reads them, and the standard library writes JSON.

Reading is strict: an unknown key, a missing one or a value of another type is a `FusionError` that names its path.
msgspec rather than pydantic, because its import and one suite of 36 datasets take 30 ms and pydantic's take 250
(two cores, warm); it is imported when something is read, so `hubfusion fuse` does not pay for it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from hubfusion.errors import FusionError

T = TypeVar("T")

_MESSAGE = re.compile(r"(?P<text>.*?)( - at `(key in `)?\$(?P<path>[^`]*)`+)?", re.DOTALL)
_STEP = re.compile(r"\.(?P<key>\w+)|\[(?P<index>\d+|\.\.\.)\]")


def to_json(value: Any) -> Any:
    """Plain JSON data (dict, list, str, int, float, bool, None) of a value: fields by name, enums by value."""
    return json.loads(dumps(value))


def dumps(value: Any) -> str:
    """JSON text of a value: sorted keys, two spaces, a newline at the end, NaN refused; the same value, same text."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r:.60}")


def digest(data: Any) -> str:
    """16 hexadecimal digits of the canonical JSON of plain data."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def loads(kind: type[T], text: str | bytes, where: str) -> T:
    """Read JSON text as the dataclass ``kind``; ``where`` names the file in errors. NaN and Infinity are refused."""
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise FusionError(f"{where}: not JSON: {error}") from None
    return from_json(kind, data, where)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """Read TOML text as plain data, for `from_json`; ``where`` names the file in errors."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FusionError(f"{where}: not TOML: {error}") from None


def from_json(kind: type[T], data: Any, where: str = "$") -> T:
    """Read ``data`` (parsed JSON or TOML) as the dataclass ``kind``.

    Unknown keys, missing keys and values of another type raise `FusionError` with the path, e.g.
    ``$.recipe.scale: expected float, got 'one'``; a key of a mapping is ``[...]`` in it. A float may be written as an
    integer; an integer is never a float or a bool. What a ``__post_init__`` raises is raised as it is.
    """
    import msgspec

    try:
        value = msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise FusionError(_sentence(kind, data, where, str(error))) from None
    _refuse_unknown(value, data, where)
    return value


def _refuse_unknown(value: Any, data: Any, where: str) -> None:
    """msgspec refuses unknown keys for classes of its own only; here they are refused for dataclasses."""
    if dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value)]
        if unknown := sorted(data.keys() - names):
            raise FusionError(f"{where}: unknown key {unknown[0]!r}, allowed are {', '.join(names)}")
        for name, inner in data.items():
            _refuse_unknown(getattr(value, name), inner, f"{where}.{name}")
    elif isinstance(value, tuple | list):
        for index, (entry, inner) in enumerate(zip(value, data, strict=True)):
            _refuse_unknown(entry, inner, f"{where}[{index}]")
    elif isinstance(value, Mapping):
        for name, inner in data.items():
            _refuse_unknown(value[name], inner, f"{where}.{name}")


def _sentence(kind: Any, data: Any, where: str, message: str) -> str:
    """msgspec's message as ours: the path first, the value itself instead of its type, the allowed words of an enum."""
    parts = _MESSAGE.fullmatch(message)
    text, path = (parts["text"], parts["path"] or "") if parts else (message, "")
    steps = [step["key"] or step["index"] for step in _STEP.finditer(path)]
    text = text.replace("`", "")
    if text.startswith("Invalid enum value"):
        text = f"must be one of {', '.join(_allowed(kind, steps))}, got {_at(data, steps)!r:.60}"
    elif text.startswith("Expected ") and " of length" not in text and "..." not in steps:
        text = f"{text.partition(', got')[0]}, got {_at(data, steps)!r:.60}"
    return f"{where}{path}: {text[:1].lower()}{text[1:]}"


def _at(data: Any, steps: list[str]) -> Any:
    for step in steps:
        data = data[int(step) if isinstance(data, list | tuple) else step]
    return data


def _allowed(kind: Any, steps: list[str]) -> list[str]:
    """The values of the enum at a path of a type."""
    from msgspec import inspect

    places = [inspect.type_info(kind)]
    for step in [*steps, ""]:
        places = [t for p in places for t in (p.types if isinstance(p, inspect.UnionType) else (p,))]
        if step:
            places = [t for p in places for t in _inside(p, step)]
    return [member.value for p in places if isinstance(p, inspect.EnumType) for member in p.cls]


def _inside(place: Any, step: str) -> list[Any]:
    from msgspec import inspect

    match place:
        case inspect.DataclassType():
            return [f.type for f in place.fields if f.name == step]
        case inspect.TupleType():
            return [place.item_types[int(step)]]
        case inspect.VarTupleType():
            return [place.item_type]
        case inspect.DictType():
            return [place.value_type]
    return []
