from __future__ import annotations

import json
import struct
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from hubfusion.checkpoint.headers import (
    MAX_HEADER_BYTES,
    HeaderTooLong,
    header_bytes,
    parse_header,
    parse_index,
    read_header,
)
from hubfusion.errors import CheckpointError
from tests.bert_checkpoints import base_tensors, sharded, weights


def pack(table: Any, data: int = 0) -> bytes:
    """A file from a header (JSON value, or text as it stands) and a number of data bytes."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **extra: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | extra


def parse(data: bytes) -> Any:
    return parse_header(data, len(data), "model.safetensors")


def test_a_header_gives_each_tensor_its_bytes_in_the_file() -> None:
    data = pack({"__metadata__": {"format": "pt"}, "b": entry(offsets=(4, 12)), "a": entry("F16", (1, 2), (0, 4))}, 12)
    header = parse(data)
    start = len(data) - 12
    assert list(header.tensors) == ["a", "b"] and header.size == start and header.metadata == {"format": "pt"}
    assert (header.tensors["a"].start, header.tensors["a"].stop, header.tensors["a"].entries) == (start, start + 4, 2)
    assert (header.tensors["b"].start, header.tensors["b"].stop) == (start + 4, start + 12)


@pytest.mark.parametrize(
    ("guess", "most", "ranges"),
    [
        (1000, None, [(0, 137)]),
        (64, None, [(0, 64), (64, 129)]),
        (2, None, [(0, 8), (8, 129)]),
        (64, 129, [(0, 64), (64, 129)]),
        (1000, 129, [(0, 129)]),
    ],
)
def test_a_header_is_read_by_range_in_two_requests_at_most(
    guess: int, most: int | None, ranges: list[tuple[int, int]]
) -> None:
    data, asked = pack({"a" * 61: entry(offsets=[0, 8])}, 8), list[tuple[int, int]]()

    def read(start: int, stop: int) -> bytes:
        asked.append((start, stop))
        return data[start:stop]

    header, length = read_header(read, len(data), "x", guess=guess, most=most)
    assert header == parse(data)
    assert (len(data), asked, length) == (137, ranges, ranges[-1][1])


@pytest.mark.parametrize("most", [0, 9, 128])
def test_a_header_that_is_longer_than_allowed_is_not_read(most: int) -> None:
    data, asked = pack({"a" * 61: entry(offsets=[0, 8])}, 8), list[int]()

    def read(start: int, stop: int) -> bytes:
        asked.append(stop)
        return data[start:stop]

    with pytest.raises(HeaderTooLong, match=rf"^x: header of 129 bytes, at most {most} are read$"):
        read_header(read, len(data), "x", guess=1000, most=most)
    assert asked == [max(8, most)]


def test_scalars_empty_tensors_and_what_the_library_writes_are_read() -> None:
    header = parse(pack({"s": entry(shape=(), offsets=(0, 4)), "e": entry(shape=(0, 3), offsets=(4, 4))}, 4))
    assert header.tensors["s"].entries == 1 and header.tensors["e"].entries == 0
    tensors = base_tensors()
    written = parse(weights(tensors)).tensors
    assert {n: s.shape for n, s in written.items()} == {n: v.shape for n, v in tensors.items()}


CASES: dict[str, tuple[bytes, str]] = {
    "an empty file": (b"", "0 bytes are too few"),
    "seven bytes": (b"1234567", "7 bytes are too few"),
    "a length and nothing": (struct.pack("<Q", 2), "does not fit in a file of 8"),
    "a header of length 0": (struct.pack("<Q", 0) + b"{}", "header of 0 bytes does not fit"),
    "a header longer than the file": (struct.pack("<Q", 100) + b"{}", "of 100 bytes does not fit in a file of 10"),
    "a header of 2^63": (struct.pack("<Q", 1 << 63) + b"{}", "at most 8388608 are allowed"),
    "a header over the limit": (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "at most 8388608 are allowed"),
    "a leading space": (pack(b" {}"), "must begin with '{', got b' '"),
    "a list": (pack(b"[]"), "must begin with '{'"),
    "no JSON": (pack(b"{nope}"), "header is not JSON"),
    "a trailing comma": (pack(b'{"a":1,}'), "header is not JSON"),
    "two values": (pack(b"{}{}"), "header is not JSON"),
    "bytes that are not UTF-8": (pack(b'{"\xff":1}'), "header is not JSON"),
    "NaN": (pack(b'{"a":NaN}'), "constant NaN"),
    "Infinity": (pack(b'{"a":-Infinity}'), "constant -Infinity"),
    "a number of 5000 digits": (pack(b'{"a":' + b"9" * 5000 + b"}"), "header is not JSON"),
    "deep nesting": (pack(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "header is not JSON"),
    "a key twice": (
        pack(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
        "key 'a' appears twice",
    ),
    "a key twice within an entry": (pack(b'{"a":{"dtype":"U8","dtype":"U8"}}'), "key 'dtype' appears twice"),
    "a key twice, once escaped": (pack(rb'{"a":1,"\u0061":1}'), "key 'a' appears twice"),
    "metadata that is a list": (pack({"__metadata__": []}), "__metadata__ must map text to text"),
    "metadata that nests": (pack({"__metadata__": {"a": {}}}), "__metadata__ must map text to text"),
    "an entry that is no mapping": (pack({"a": 1}), "fields must be exactly"),
    "a field too many": (pack({"a": entry(offsets=(0, 8), note=1)}, 8), "fields must be exactly"),
    "a field too few": (pack({"a": {"dtype": "F32", "shape": [2]}}), "fields must be exactly"),
    "an unknown dtype": (pack({"a": entry("F8_E4M3", (2,), (0, 2))}, 2), "dtype 'F8_E4M3' is not one of"),
    "a dtype in small letters": (pack({"a": entry("f32")}, 8), "dtype 'f32' is not one of"),
    "a dtype that is a list": (pack({"a": entry(["F32"])}, 8), "dtype ['F32'] is not one of"),
    "a shape that is a number": (pack({"a": entry(shape=2)}, 8), "shape must be up to 8 sizes"),
    "a negative size": (pack({"a": entry(shape=[-2], offsets=(0, 8))}, 8), "shape must be up to 8 sizes"),
    "a size that is a float": (pack({"a": entry(shape=[2.0])}, 8), "shape must be up to 8 sizes"),
    "a size that is true": (pack({"a": entry(shape=[True], offsets=(0, 4))}, 4), "shape must be up to 8 sizes"),
    "nine dimensions": (pack({"a": entry(shape=[1] * 9, offsets=(0, 4))}, 4), "shape must be up to 8 sizes"),
    "a size over 2^48": (pack({"a": entry(shape=[0, 1 << 49], offsets=(0, 0))}), "shape must be up to 8 sizes"),
    "a product that overflows 64 bits": (
        pack({"a": entry(shape=[1 << 32, 1 << 32], offsets=(0, 0))}),
        "needs 73786976294838206464 bytes, its offsets span 0",
    ),
    "offsets that are three": (pack({"a": entry(offsets=(0, 8, 9))}, 8), "data_offsets must be two"),
    "an offset that is text": (pack({"a": entry(offsets=("0", 8))}, 8), "data_offsets must be two"),
    "a negative offset": (pack({"a": entry(offsets=(-8, 0))}, 8), "data_offsets must be two"),
    "offsets turned round": (pack({"a": entry(offsets=(8, 0))}, 8), "needs 8 bytes, its offsets span -8"),
    "offsets shorter than the shape": (pack({"a": entry(offsets=(0, 4))}, 4), "needs 8 bytes, its offsets span 4"),
    "an overlap": (pack({"a": entry(), "b": entry(offsets=(4, 12))}, 12), "b: starts at byte"),
    "the same bytes twice": (pack({"a": entry(), "b": entry()}, 8), "overlaps the tensor before it"),
    "a gap at the start": (pack({"a": entry(offsets=(4, 12))}, 12), "leaves a gap before it"),
    "a gap in the middle": (pack({"a": entry(), "b": entry(offsets=(12, 20))}, 20), "leaves a gap before it"),
    "data cut off": (pack({"a": entry()}, 7), "is cut off"),
    "trailing bytes": (pack({"a": entry()}, 9), "has trailing bytes"),
    "trailing bytes and no tensor": (pack({}, 1), "has trailing bytes"),
    "an empty name": (pack({"": entry()}, 8), "tensor name '' is not allowed"),
    "a name with a path": (pack({"../a": entry()}, 8), "tensor name '../a' is not allowed"),
    "a name with NUL": (pack({"a\0b": entry()}, 8), "is not allowed"),
    "a name with markup": (pack({"<script>": entry()}, 8), "tensor name '<script>' is not allowed"),
    "a name with a right-to-left override": (pack({"a\u202eb": entry()}, 8), "is not allowed"),
    "a name of letters that only look Latin": (pack({"\u0430": entry()}, 8), "is not allowed"),
    "a name of 513 letters": (pack({"a" * 513: entry()}, 8), "is not allowed"),
    "20,001 tensors": (
        pack({f"t{i}": entry("U8", (0,), (0, 0)) for i in range(20_001)}),
        "20001 tensors, at most 20000 are allowed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_refused_that_has(case: str) -> None:
    data, sentence = CASES[case]
    with pytest.raises(CheckpointError) as caught:
        parse(data)
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("model.safetensors: ") and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_cut_off_read_is_told_from_a_cut_off_file() -> None:
    data = weights(base_tensors())
    with pytest.raises(CheckpointError, match="is cut off after 100"):
        parse_header(data[:100], len(data), "x")


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":0,' + b",".join(b'"%d":0' % i for i in range(700_000)) + b',"699999":0}',
        b'{"a":' + b"[" * 900 + b"]" * 900 + b"," + b'"b":[' + b"[]," * 2_000_000 + b"[]]}",
        b'{"a":[' + b"0," * 4_000_000 + b"0]}",
    ],
    ids=["many keys, the last one twice", "many lists", "many numbers"],
)
def test_the_largest_hostile_header_takes_seconds_and_megabytes(text: bytes) -> None:
    data = pack(text)
    assert len(text) <= MAX_HEADER_BYTES
    tracemalloc.start()
    begin = time.process_time()
    with pytest.raises(CheckpointError):
        parse(data)
    seconds, peak = time.process_time() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 20 and peak < 512 << 20


INDEX_CASES: dict[str, tuple[Any, str]] = {
    "no mapping": ([], "index must be a JSON object"),
    "no weight_map": ({"metadata": {}}, "weight_map must map"),
    "an empty weight_map": ({"weight_map": {}}, "weight_map must map"),
    "a list for weight_map": ({"weight_map": ["a"]}, "weight_map must map"),
    "a shard in the folder above": ({"weight_map": {"a": "../a.safetensors"}}, "must be a plain .safetensors file"),
    "a tensor name with a newline": ({"weight_map": {"a\nb": "a.safetensors"}}, "tensor name 'a\\nb' is not allowed"),
    "an absolute path": ({"weight_map": {"a": "/etc/a.safetensors"}}, "must be a plain .safetensors file name"),
    "a backslash": ({"weight_map": {"a": "..\\a.safetensors"}}, "must be a plain .safetensors file name"),
    "a pickle": ({"weight_map": {"a": "pytorch_model.bin"}}, "must be a plain .safetensors file name"),
    "a number for a shard": ({"weight_map": {"a": 1}}, "must be a plain .safetensors file name"),
    "a URL": ({"weight_map": {"a": "http://x/a.safetensors"}}, "must be a plain .safetensors file name"),
    "a shard name with a newline": ({"weight_map": {"a": "a.safetensors\n"}}, "must be a plain .safetensors file name"),
    "a missing shard": ({"weight_map": {"a": "b.safetensors"}}, "shard b.safetensors is not in the repository"),
    "20,001 tensors": ({"weight_map": {f"t{i}": "a.safetensors" for i in range(20_001)}}, "20001 tensors, at most"),
    "a key twice": (b'{"weight_map":{"a":"a.safetensors","a":"a.safetensors"}}', "key 'a' appears twice"),
    "no JSON": (b"<html>", "is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", INDEX_CASES)
def test_an_index_is_refused_that_has(case: str) -> None:
    table, sentence = INDEX_CASES[case]
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    with pytest.raises(CheckpointError) as caught:
        parse_index(text, {"a.safetensors": 100}, "index")
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_an_index_maps_each_tensor_to_its_shard() -> None:
    files = sharded(base_tensors())
    index = parse_index(files["model.safetensors.index.json"], {n: len(b) for n, b in files.items()}, "index")
    assert set(index) == set(base_tensors())
    assert set(index.values()) == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
ALMOST = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E5M2"]) | JSON,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | JSON,
        "data_offsets": st.tuples(st.integers(-1, 40), st.integers(-1, 40)).map(list) | JSON,
    }
)


@settings(max_examples=300, deadline=None)
@given(
    table=st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), ALMOST | JSON, max_size=4),
    data=st.integers(0, 48),
    declared=st.integers(-3, 3),
)
def test_whatever_the_header_says_it_is_read_or_refused_and_what_we_read_the_library_reads(
    table: Any, data: int, declared: int
) -> None:
    text = json.dumps(table).encode()
    file = struct.pack("<Q", max(0, len(text) + declared)) + text + bytes(data)
    check_against_library(file)


@settings(max_examples=300, deadline=None)
@given(file=st.binary(max_size=64), flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4))
def test_random_and_mutated_bytes_are_read_or_refused_as_the_library_would(
    file: bytes, flips: list[tuple[int, int]]
) -> None:
    check_against_library(file)
    good = bytearray(pack({"a": entry(), "b": entry("I64", (1,), (8, 16)), "__metadata__": {"format": "pt"}}, 16))
    for position, value in flips:
        good[position % len(good)] = value
    check_against_library(bytes(good))


def check_against_library(file: bytes) -> None:
    """We may refuse what the library takes, never the other way round; and what both take is the same."""
    try:
        ours = parse(file).tensors
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    try:
        theirs = dict(deserialize(file))
    except SafetensorError as error:
        raise AssertionError(f"accepted, but the library says {error}: {file!r}") from None
    assert set(ours) == set(theirs)
    for name, spec in ours.items():
        assert list(spec.shape) == theirs[name]["shape"] and spec.dtype == theirs[name]["dtype"]
        assert file[spec.start : spec.stop] == bytes(theirs[name]["data"])
    assert sum(s.stop - s.start for s in ours.values()) + header_bytes(file[:8], len(file), "x") == len(file)
