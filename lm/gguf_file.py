"""The header of a GGUF file, with checks that the step judges' libraries can use the file.

These libraries end the process on a file that they do not expect, so everything is checked here
first. (`gguf.GGUFReader`, which transformers uses, trusts the lengths that it reads: a damaged one
sends it into an endless loop.)

The header is walked to its end before anything of it is built: every count is checked against the
bytes that are left, every tensor against the end of the file. So a damaged count costs no memory.
"""

import mmap
import struct
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain, pairwise
from math import prod
from pathlib import Path
from typing import Any

from common.errors import ModelError, short

# GGUF value type -> struct format; 8 and 9 have none
SCALARS = {kind: code for kind, code in enumerate("BbHhIif?..Qqd") if code != "."}
STRING, ARRAY = 8, 9
# tensor type -> numbers in a block, bytes of a block: what ctransformers 0.2.27 can read
BLOCKS = {
    0: (1, 4), 1: (1, 2),  # F32 F16
    2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),  # Q4_0 Q4_1 Q5_0 Q5_1 Q8_0
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),  # Q2_K .. Q6_K
}  # fmt: skip
COUNTS = [
    "context_length", "embedding_length", "block_count", "feed_forward_length",
    "attention.head_count",
]  # fmt: skip
# fields that are at most the largest dimension of all tensors
SIZES = [
    "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "rope.dimension_count", "expert_count", "expert_feed_forward_length",
]  # fmt: skip
# of a layer
MATRICES = [
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output",
    "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
]  # fmt: skip
MAX_COUNT = 1 << 20  # a header with more fields or tensors, or with a longer array, is damaged
MAX_ITEMS = 1 << 22  # of all arrays together; the largest vocabularies need 1.5 million
MAX_NAME = (1 << 16) - 1  # bytes of a key (as the specification says) or of a tensor's name
# special token of a tokenizer -> its name in GGUF
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
QUANTIZATIONS = ["F32", "F16", "Q8_0", "Q4_0"]  # those that lm/gguf_export.py writes


class OtherKindError(ModelError):
    """A file that may be sound but is of a kind that ctransformers does not read."""


class _OtherKind(ValueError):
    """The reason of an OtherKindError."""


class TokenType(IntEnum):
    NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclass(frozen=True)
class GGUFFile:
    """A checked file: its metadata (`general.name`, `tokenizer.ggml.tokens` ...) by key."""

    path: str
    metadata: dict[str, Any]

    @property
    def tokens(self) -> list[str]:
        return self.metadata["tokenizer.ggml.tokens"]

    @property
    def token_types(self) -> list[int]:
        """A TokenType for every token; a file without types has plain tokens only."""
        types = self.metadata.get("tokenizer.ggml.token_type")
        return [TokenType.NORMAL] * len(self.tokens) if types is None else types

    @property
    def special_tokens(self) -> dict[str, str]:
        """The texts of the special tokens that the file names (`bos_token`, ...)."""
        tokens = _list(self.metadata.get("tokenizer.ggml.tokens"))
        found: dict[str, str] = {}
        for name, key in SPECIAL.items():
            index: Any = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
            if _is_index(index, tokens):
                found[name] = str(tokens[index])
        return found

    @property
    def chat_templates(self) -> dict[str, Any]:
        """The file's chat templates by name; the usual one is `default`."""
        names = self.metadata.get("tokenizer.chat_templates", [])
        keys = {str(name): f"tokenizer.chat_template.{name}" for name in _list(names)}
        keys["default"] = "tokenizer.chat_template"
        return {name: self.metadata[key] for name, key in keys.items() if key in self.metadata}

    @property
    def context_length(self) -> int:
        return self.metadata[f"{self.metadata['general.architecture']}.context_length"]


class _Header:
    """The bytes of a file, read from its start.

    Raises ValueError if they end too early or if a type is unknown."""

    def __init__(self, data: mmap.mmap):
        self.data, self.position, self.length, self.items = data, 0, "I", 0

    def check(self, size: int) -> None:
        """Raises ValueError unless so many bytes are left."""
        if size > len(self.data) - self.position:
            raise ValueError(f"it ends inside its header, at byte {len(self.data)}")

    def skip(self, size: int) -> None:
        self.check(size)
        self.position += size

    def take(self, size: int) -> bytes:
        self.skip(size)
        return self.data[self.position - size : self.position]

    def number(self, format: str) -> Any:
        return struct.unpack(f"<{format}", self.take(struct.calcsize(f"<{format}")))[0]

    def count(self) -> int:
        return self.number(self.length)

    def name(self) -> str:
        size = self.count()
        if size > MAX_NAME:
            raise ValueError(f"its header is damaged (a name of {size} bytes)")
        return self.take(size).decode(errors="replace")

    def text(self) -> str:
        return self.take(self.count()).decode(errors="replace")

    def array(self) -> tuple[int, int]:
        """(type of the items, their number), checked against the bytes that are left."""
        kind, count = self.number("I"), self.count()
        if kind == ARRAY:
            raise ValueError("it has an array of arrays, which is not read")
        size = struct.calcsize(f"<{self.length if kind == STRING else _format(kind)}")
        if count > MAX_COUNT:
            raise ValueError(f"its header is damaged (an array of {count} items)")
        self.check(count * size)
        return kind, count

    def skip_value(self, kind: int) -> None:
        if kind == STRING:
            self.skip(self.count())
        elif kind == ARRAY:
            item, count = self.array()
            self.items += count
            if self.items > MAX_ITEMS:
                raise ValueError(f"its header is damaged (arrays of {self.items} items)")
            if item == STRING:
                for _ in range(count):
                    self.skip(self.count())
            else:
                self.skip(count * struct.calcsize(f"<{_format(item)}"))
        else:
            self.skip(struct.calcsize(f"<{_format(kind)}"))

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(_format(kind))
        item, count = self.array()
        if item == STRING:
            return [self.text() for _ in range(count)]
        code = f"<{_format(item)}"
        values = (v for (v,) in struct.iter_unpack(code, self.take(count * struct.calcsize(code))))
        if struct.calcsize(code) > 2:
            return list(values)
        seen: dict[Any, Any] = {}  # one object for equal small numbers, which are many
        return [seen.setdefault(v, v) for v in values]


def _format(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"it has a field of the unknown type {kind}")
    return SCALARS[kind]


def read_gguf(path: str | Path, any_kind: bool = False) -> GGUFFile:
    """Read and check a GGUF file.

    any_kind: accept every architecture, vocabulary and tensor type, for a library that refuses by
    itself what it cannot read. Raises ModelError with the file and what is wrong with it; it is an
    OtherKindError if `any_kind` might read the file."""
    blocks = BLOCKS
    if any_kind:
        from gguf.constants import GGML_QUANT_SIZES  # here: gguf loads numpy, which slows --help

        blocks = GGML_QUANT_SIZES
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError("it is no GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                metadata, tensors = _read(data, blocks)
        _check_sizes(metadata, tensors)
        if not any_kind:
            _check(metadata, tensors)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except _OtherKind as error:
        raise OtherKindError(f"{path} cannot be used: {error}") from None
    except ValueError as error:
        raise ModelError(f"{path} cannot be used: {error}") from None
    return GGUFFile(str(path), metadata)


def read_model(path: str | Path) -> GGUFFile:
    """Read a GGUF file of any kind that says what a judge needs: its tokens and its context.

    Raises ModelError."""
    file = read_gguf(path, any_kind=True)
    tokens, types = (file.metadata.get(f"tokenizer.ggml.{k}") for k in ("tokens", "token_type"))
    key = f"{file.metadata.get('general.architecture')}.context_length"
    length = file.metadata.get(key)
    try:
        for values, kind in ((tokens, str), ([] if types is None else types, int)):
            typed = isinstance(values, list) and all(isinstance(value, kind) for value in values)
            _expect(typed, "its tokens or token types are missing or of the wrong type")
        same = types is None or len(_list(tokens)) == len(types)
        _expect(same, "its tokens and token types are of different lengths")
        is_count = isinstance(length, int) and length >= 1
        _expect(is_count, f"its field {key!r} is missing or no count")
    except ValueError as error:
        raise ModelError(f"{path} cannot be used: {error}") from None
    return file


def _read(
    data: mmap.mmap, blocks: dict[int, tuple[int, int]]
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """(metadata, shape of every tensor). Raises ValueError if the header is damaged."""
    header = _Header(data)
    header.skip(4)
    version = header.number("I")
    _expect(1 <= version <= 3, f"it is GGUF version {version}, expected 1 to 3 (little-endian)")
    header.length = "I" if version == 1 else "Q"
    tensor_count, field_count = header.count(), header.count()
    counts = f"{tensor_count} tensors, {field_count} fields"
    _expect(max(tensor_count, field_count) <= MAX_COUNT, f"its header is damaged ({counts})")
    fields: dict[str, tuple[int, int]] = {}  # key -> (position of the value, type)
    for _ in range(field_count):
        key, kind = header.name(), header.number("I")
        _expect(key not in fields, f"its field {short(key)} is there twice")
        fields[key] = header.position, kind
        header.skip_value(kind)
    shapes: dict[str, tuple[int, ...]] = {}
    spans = []  # (start, end) of every tensor, from the end of the header
    for _ in range(tensor_count):
        name, dimensions = header.name(), header.number("I")
        called = f"its tensor {short(name)}"
        _expect(name not in shapes, f"{called} is there twice")
        _expect(dimensions <= 4, f"{called} has {dimensions} dimensions")
        shape = tuple(header.count() for _ in range(dimensions))
        kind, offset = header.number("I"), header.number("Q")
        if blocks is BLOCKS:
            readable = "which the library cannot read (it reads F32, F16, Q4_0 to Q6_K)"
            _expect(kind in blocks, f"{called} has type {kind}, {readable}", _OtherKind)
        _expect(kind in blocks, f"{called} has type {kind}, which is unknown")
        block, size = blocks[kind]
        rows_fit = prod(shape) > 0 and prod(shape[:1]) % block == 0
        _expect(rows_fit, f"{called} has the shape {shape}, in blocks of {block} numbers")
        shapes[name] = shape
        spans.append((offset, offset + prod(shape) // block * size))
    end = header.position
    alignment = 32
    if "general.alignment" in fields:
        header.position, kind = fields["general.alignment"]
        alignment = header.value(kind) if SCALARS.get(kind, "?") in "BbHhIiQq" else 0
    # a power of 2
    is_alignment = 0 < alignment <= len(data) and alignment & (alignment - 1) == 0
    _expect(is_alignment, f"its alignment is {alignment}")
    spans.sort()
    aligned = all(start % alignment == 0 for start, _ in spans)
    _expect(aligned, f"a tensor begins at no multiple of {alignment} bytes")
    overlap = any(later < stop for (_, stop), (later, _) in pairwise(spans))
    _expect(not overlap, "two of its tensors overlap")
    needed = -(-end // alignment) * alignment + (spans[-1][1] if spans else 0)
    _expect(needed <= len(data), f"it is cut off: {len(data)} bytes, its tensors need {needed}")
    metadata = {}
    for key, (position, kind) in fields.items():
        header.position = position
        metadata[key] = header.value(kind)
    return metadata, shapes


def _check_sizes(metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError if the model is said to be larger than its tensors, or a token is absurd.

    A library would build what the fields say before it sees that the tensors differ."""
    kind = metadata.get("general.architecture")
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    for key in ("block_count", *SIZES):
        limit = len(shapes) if key == "block_count" else largest
        value = metadata.get(f"{kind}.{key}")
        for number in value if isinstance(value, list) else [value]:  # a list: one for each block
            fits = not isinstance(number, int) or number <= limit
            _expect(fits, f"its field '{kind}.{key}' is {number}, more than its tensors hold")
    longest = max((len(str(t)) for t in _list(metadata.get("tokenizer.ggml.tokens"))), default=0)
    _expect(longest <= MAX_NAME, f"one of its tokens has {longest} characters")


def _check(metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless the file is a LLaMA with a SentencePiece vocabulary.

    The judge's library is used for no other kind."""
    kind = metadata.get("general.architecture")
    _expect(kind == "llama", f"its architecture is {kind!r}, expected 'llama'", _OtherKind)
    for key in COUNTS:
        count = metadata.get(f"llama.{key}")
        is_count = isinstance(count, int) and count >= 1
        _expect(is_count, f"its field 'llama.{key}' is missing or no count")
    key = "llama.attention.layer_norm_rms_epsilon"
    _expect(isinstance(metadata.get(key), float), f"its field {key!r} is missing or no number")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    message = f"its positions are scaled ({scaling}), which the library would ignore"
    _expect(scaling == "none", message, _OtherKind)
    kind = metadata.get("tokenizer.ggml.model")
    message = f"its tokenizer is {kind!r}, expected 'llama' (SentencePiece)"
    _expect(kind == "llama", message, _OtherKind)

    keys = ("tokens", "scores", "token_type")
    vocabulary: list[Any] = [metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    _expect(
        all(isinstance(part, list) and len(part) == len(vocabulary[0]) for part in vocabulary),
        "its tokens, scores and token types are missing or of different lengths",
    )
    tokens, scores, types = vocabulary
    for values, kind in ((tokens, str), (scores, float), (types, int)):
        typed = all(isinstance(value, kind) for value in values)
        _expect(typed, "its tokens, scores or token types are of the wrong type")
    has_bytes = {f"<0x{byte:02X}>" for byte in range(256)} <= set(tokens)
    _expect(has_bytes, "its vocabulary lacks some of the 256 byte tokens")
    for key in ("bos_token_id", "eos_token_id"):
        is_token = _is_index(metadata.get(f"tokenizer.ggml.{key}", 1), tokens)
        _expect(is_token, f"its field 'tokenizer.ggml.{key}' is no token id")

    expected = (metadata["llama.embedding_length"], len(tokens))
    for name in ("token_embd.weight", "output.weight"):
        shape = shapes.get(name, "missing")
        message = f"its tensor {name!r} is {shape}, expected the shape {expected}"
        is_tied = name == "output.weight" and name not in shapes
        _expect(shape == expected, message, _OtherKind if is_tied else ValueError)
    layers = range(metadata["llama.block_count"])
    for name in chain(["output_norm"], (f"blk.{k}.{part}" for k in layers for part in MATRICES)):
        _expect(f"{name}.weight" in shapes, f"its tensor '{name}.weight' is missing")


def _list(value: Any) -> list:
    return value if isinstance(value, list) else []


def _is_index(value: Any, items: list) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(items)


def _expect(holds: bool, message: str, error: type[ValueError] = ValueError) -> None:
    if not holds:
        raise error(message)
