"""lm/gguf_file.py: the header of any file is read or refused in one line, in little memory."""

import contextlib
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ModelError
from lm.gguf_file import MAX_COUNT, GGUFFile, read_gguf

STRING, ARRAY = 8, 9
U8, I8, U16, U32, F32, U64 = 0, 1, 2, 4, 6, 10


def text(value: str | bytes, length: str = "Q") -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack(f"<{length}", len(data)) + data


def header(
    *fields: tuple[str | bytes, int, bytes],
    tensors: tuple[tuple[str, tuple[int, ...], int, int], ...] = (),
    version: int = 3,
    order: str = "<",
) -> bytes:
    """A GGUF header. fields: (key, type, bytes of the value); tensors: (name, shape, type,
    offset)."""
    length = "I" if version == 1 else "Q"
    parts = [b"GGUF", struct.pack(f"{order}I2{length}", version, len(tensors), len(fields))]
    parts += [text(key, length) + struct.pack("<I", kind) + value for key, kind, value in fields]
    for name, shape, kind, offset in tensors:
        sizes = struct.pack(f"<I{len(shape)}{length}", len(shape), *shape)
        parts.append(text(name, length) + sizes + struct.pack("<IQ", kind, offset))
    return b"".join(parts)


def array(kind: int, count: int, items: bytes = b"", length: str = "Q") -> bytes:
    return struct.pack(f"<I{length}", kind, count) + items


def read(tmp_path, data: bytes, size: int = 0, any_kind: bool = True) -> GGUFFile:
    """Read a file with these bytes, followed by zeros up to `size` bytes."""
    path = tmp_path / "x.gguf"
    with open(path, "wb") as file:
        file.write(data)
        file.truncate(max(size, len(data)))
    return read_gguf(path, any_kind=any_kind)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_every_type_is_read_in_every_version(tmp_path, version):
    length = "I" if version == 1 else "Q"
    data = header(
        ("u8", U8, b"\xff"),
        ("i8", I8, b"\xff"),
        ("u64", U64, b"\xff" * 8),
        ("f32", F32, struct.pack("<f", 0.5)),
        ("bool", 7, b"\1"),
        ("text", STRING, text("é", length)),
        ("not UTF-8", STRING, text(b"a\xff", length)),
        ("bytes", ARRAY, array(I8, 3, b"\xff\0\x80", length)),
        ("floats", ARRAY, array(F32, 2, struct.pack("<2f", 1, 2), length)),
        ("texts", ARRAY, array(STRING, 2, text("", length) + text("b", length), length)),
        ("empty", ARRAY, array(STRING, 0, b"", length)),
        tensors=(("t", (2, 3), 0, 0), ("scalar", (), 0, 32)),
        version=version,
    )
    assert read(tmp_path, data, 1000).metadata == {
        "u8": 255, "i8": -1, "u64": 2**64 - 1, "f32": 0.5, "bool": True, "text": "é",
        "not UTF-8": "a\ufffd", "bytes": [-1, 0, -128], "floats": [1, 2], "texts": ["", "b"],
        "empty": [],
    }  # fmt: skip


def tensor(shape=(32,), kind=0, offset=0, name="t"):
    return header(tensors=((name, shape, kind, offset),))


HUGE = 2**64 - 1
ALIGNMENT = "general.alignment"
DAMAGED = {
    "an array of bytes": (header(("a", ARRAY, array(U8, 40_000_000))), "array of 40000000 "),
    "an array of numbers": (header(("a", ARRAY, array(F32, HUGE))), "an array of 1844"),
    "an array of texts": (header(("a", ARRAY, array(STRING, 6_000_000))), "an array of 6000000"),
    "the longest array": (header(("a", ARRAY, array(STRING, MAX_COUNT + 1))), "an array of"),
    "many long arrays": (
        header(*((str(k), ARRAY, array(U8, MAX_COUNT, bytes(MAX_COUNT))) for k in range(5))),
        "arrays of 5242880 items",
    ),
    "an array of arrays": (header(("a", ARRAY, array(ARRAY, 1))), "an array of arrays"),
    "an array of an unknown type": (header(("a", ARRAY, array(99, 1))), "unknown type 99"),
    "a text": (header(("a", STRING, struct.pack("<Q", HUGE))), "ends inside its header"),
    "a text like the file": (header(("a", STRING, struct.pack("<Q", 50_000_000))), "ends in"),
    "a long key": (b"GGUF" + struct.pack("<I3Q", 3, 0, 1, 70_000), "a name of 70000 bytes"),
    "a key twice": (header(("a", U8, b"\1"), ("a", U8, b"\1")), "field 'a' is there twice"),
    "empty keys": (b"GGUF" + struct.pack("<I2Q", 3, 0, 1000), "field '' is there twice"),
    "fields": (b"GGUF" + struct.pack("<I2Q", 3, 0, HUGE), "18446744073709551615 fields"),
    "tensors": (b"GGUF" + struct.pack("<I2Q", 3, HUGE, 0), "18446744073709551615 tensors"),
    "many tensors": (b"GGUF" + struct.pack("<I2Q", 3, 1000, 0), "has the shape|twice"),
    "dimensions": (tensor((1,) * 5), "5 dimensions"),
    "a shape": (tensor((HUGE, HUGE, HUGE)), "cut off"),
    "no numbers": (tensor((32, 0)), r"has the shape \(32, 0\)"),
    "half a block": (tensor((33,), 8), "in blocks of 32 numbers"),
    "a type": (tensor(kind=9999), "has type 9999"),
    "an offset": (tensor(offset=HUGE - 31), "cut off"),
    "an odd offset": (tensor(offset=8), "no multiple of 32 bytes"),
    "a tensor twice": (header(tensors=(("t", (1,), 0, 0), ("t", (1,), 0, 32))), "'t' is there"),
    "tensors that overlap": (
        header(tensors=(("t", (9,), 0, 32), ("u", (9,), 0, 0))),
        "two of its tensors overlap",
    ),
    "no alignment": (header((ALIGNMENT, U32, bytes(4))), "alignment is 0"),
    "alignment 24": (header((ALIGNMENT, U32, b"\x18\0\0\0")), "alignment is 24"),
    "a large alignment": (header((ALIGNMENT, U32, b"\0\0\0\x80")), "alignment is 2147483648"),
    "an alignment of text": (header((ALIGNMENT, STRING, text("32"))), "alignment is 0"),
    "big-endian": (header(order=">"), "version 50331648, expected 1 to 3"),
    "version 0": (header(version=0), "version 0"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_count_is_one_line_and_no_memory(tmp_path, kind):
    """In a file of 50 MB."""
    data, message = DAMAGED[kind]
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=message) as error:
            read(tmp_path, data, 50_000_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(tmp_path / "x.gguf") in str(error.value) and "\n" not in str(error.value)
    assert peak < 2_000_000


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> bytes:
    """A small file with fields of many types and three tensors."""
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_uint8("u8", 7)
    writer.add_float64("f64", 0.5)
    writer.add_custom_alignment(64)
    writer.add_token_list(["a", "b", "é" * 20])
    writer.add_token_scores([0.0, -1.0, -2.0])
    writer.add_array("bytes", list(b"0123456789"))
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("m", np.zeros((2, 32), np.float32))
    writer.add_tensor("n", np.zeros(3, np.float16))
    writer.add_tensor("o", np.zeros((1, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def check(path, data: bytes) -> bool:
    """Whether the bytes are accepted; they are read or refused in little memory."""
    path.write_bytes(data)
    accepted = False
    tracemalloc.start()
    try:
        for any_kind in (False, True):
            with contextlib.suppress(ModelError):
                accepted = isinstance(read_gguf(path, any_kind=any_kind), GGUFFile)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 * len(data) + 200_000
    if accepted:
        # what transformers reads it with: it may refuse the file, and ends
        with contextlib.suppress(ValueError, KeyError, IndexError):
            gguf.GGUFReader(path)
    return accepted


def test_the_small_file_is_accepted(small, tmp_path):
    assert check(tmp_path / "x.gguf", small)
    assert read_gguf(tmp_path / "x.gguf", any_kind=True).metadata["tokenizer.ggml.tokens"][0] == "a"


edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "insert", "delete", "count"]),
        st.integers(0, 2000),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.property
@given(edits)
def test_a_damaged_header_is_read_or_refused(small, tmp_path, changes):
    data = bytearray(small)
    for kind, place, new in changes:
        place %= len(data)
        if kind == "flip":
            data[place] ^= 1 << new[0] % 8
        elif kind == "set":
            data[place : place + len(new)] = new
        elif kind == "insert":
            data[place:place] = new
        elif kind == "count":
            data[place : place + 8] = struct.pack("<Q", len(small) // (1 + new[0] % 32))
        else:
            del data[place : place + len(new)]
    check(tmp_path / "x.gguf", bytes(data))


@pytest.mark.property
@given(st.integers(0, 4), st.integers(0, 300), st.integers(0, 300), st.binary(max_size=2000))
def test_random_bytes_are_read_or_refused(tmp_path, version, tensors, fields, rest):
    counts = struct.pack("<I2I" if version == 1 else "<I2Q", version, tensors, fields)
    check(tmp_path / "x.gguf", b"GGUF" + counts + rest)
    check(tmp_path / "x.gguf", rest)
