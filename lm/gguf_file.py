"""The header of a GGUF file, with checks that the step judge's library can use the file.

That library ends the process on a file that it does not expect, so everything is checked here
first: every length against the size of the file, every tensor against the end of the file.
(`gguf.GGUFReader` trusts the lengths that it reads: a damaged one sends it into an endless loop.)
"""

import mmap
import struct
from dataclasses import dataclass
from enum import IntEnum
from math import prod
from pathlib import Path
from typing import Any

from common.errors import ModelError

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
# of a layer
MATRICES = [
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output",
    "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
]  # fmt: skip
MAX_COUNT = 1 << 20  # a header with more fields or tensors is damaged
QUANTIZATIONS = ["F32", "F16", "Q8_0", "Q4_0"]  # those that lm/gguf_export.py writes


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
        return self.metadata["tokenizer.ggml.token_type"]

    @property
    def context_length(self) -> int:
        return self.metadata["llama.context_length"]


class _Header:
    """The bytes of a file, read from its start.

    Raises ValueError if they end too early or if a type is unknown."""

    def __init__(self, data: mmap.mmap):
        self.data, self.position, self.length = data, 0, "I"

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.position:
            raise ValueError(f"it ends inside its header, at byte {len(self.data)}")
        self.position += size
        return self.data[self.position - size : self.position]

    def numbers(self, format: str, count: int = 1) -> tuple:
        return struct.unpack(f"<{count}{format}", self.take(count * struct.calcsize(f"<{format}")))

    def count(self) -> int:
        return self.numbers(self.length)[0]

    def text(self) -> str:
        return self.take(self.count()).decode(errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            item, count = self.numbers("I")[0], self.count()
            if item == STRING:
                return [self.text() for _ in range(count)]
            return list(self.numbers(_format(item), count))
        return self.numbers(_format(kind))[0]


def _format(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"it has a field of the unknown type {kind}")
    return SCALARS[kind]


def read_gguf(path: str | Path, any_kind: bool = False) -> GGUFFile:
    """Read and check a GGUF file.

    any_kind: accept every architecture, vocabulary and tensor type, for a library that refuses by
    itself what it cannot read. Raises ModelError with the file and what is wrong with it."""
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
        if not any_kind:
            _check(metadata, tensors)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{path} cannot be used: {error}") from None
    return GGUFFile(str(path), metadata)


def _read(
    data: mmap.mmap, blocks: dict[int, tuple[int, int]]
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """(metadata, shape of every tensor). Raises ValueError if a tensor ends behind the file."""
    header = _Header(data)
    header.take(4)
    version = header.numbers("I")[0]
    _expect(1 <= version <= 3, f"it is GGUF version {version}, expected 1 to 3 (little-endian)")
    header.length = "I" if version == 1 else "Q"
    tensor_count, field_count = header.count(), header.count()
    counts = f"{tensor_count} tensors, {field_count} fields"
    _expect(max(tensor_count, field_count) <= MAX_COUNT, f"its header is damaged ({counts})")
    metadata = {}
    for _ in range(field_count):
        key = header.text()
        metadata[key] = header.value(header.numbers("I")[0])
    shapes, ends = {}, [0]
    for _ in range(tensor_count):
        name, dimensions = header.text(), header.numbers("I")[0]
        _expect(dimensions <= 4, f"its tensor {name!r} has {dimensions} dimensions")
        shapes[name] = tuple(header.count() for _ in range(dimensions))
        kind, offset = *header.numbers("I"), *header.numbers("Q")
        readable = "which the library cannot read (it reads F32, F16, Q4_0 to Q6_K)"
        _expect(kind in blocks, f"its tensor {name!r} has type {kind}, {readable}")
        block, size = blocks[kind]
        ends.append(offset + prod(shapes[name]) // block * size)
    alignment = metadata.get("general.alignment", 32)
    _expect(isinstance(alignment, int) and alignment >= 1, f"its alignment is {alignment!r}")
    needed = -(-header.position // alignment) * alignment + max(ends)
    _expect(needed <= len(data), f"it is cut off: {len(data)} bytes, its tensors need {needed}")
    return metadata, shapes


def _check(metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless the file is a LLaMA with a SentencePiece vocabulary.

    The judge's library is used for no other kind."""
    kind = metadata.get("general.architecture")
    _expect(kind == "llama", f"its architecture is {kind!r}, expected 'llama'")
    for key in COUNTS:
        count = metadata.get(f"llama.{key}")
        is_count = isinstance(count, int) and count >= 1
        _expect(is_count, f"its field 'llama.{key}' is missing or no count")
    key = "llama.attention.layer_norm_rms_epsilon"
    _expect(isinstance(metadata.get(key), float), f"its field {key!r} is missing or no number")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    message = f"its positions are scaled ({scaling}), which the library would ignore"
    _expect(scaling == "none", message)
    kind = metadata.get("tokenizer.ggml.model")
    _expect(kind == "llama", f"its tokenizer is {kind!r}, expected 'llama' (SentencePiece)")

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
        is_token = metadata.get(f"tokenizer.ggml.{key}", 1) in range(len(tokens))
        _expect(is_token, f"its field 'tokenizer.ggml.{key}' is no token id")

    expected = (metadata["llama.embedding_length"], len(tokens))
    for name in ("token_embd.weight", "output.weight"):
        shape = shapes.get(name, "missing")
        message = f"its tensor {name!r} is {shape}, expected the shape {expected}"
        _expect(shape == expected, message)
    layers = range(metadata["llama.block_count"])
    for name in ["output_norm", *(f"blk.{k}.{part}" for k in layers for part in MATRICES)]:
        _expect(f"{name}.weight" in shapes, f"its tensor '{name}.weight' is missing")


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
