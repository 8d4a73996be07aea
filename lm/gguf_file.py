"""Reads the header of a GGUF file and checks that the step judge's library can take the file.

The library ends the process on a file it does not expect, so everything is checked here first: every length against the file's
size, every tensor against its end. (`gguf.GGUFReader` trusts the lengths it reads: a damaged one sends it into an endless loop.)
"""

import mmap
import struct
from dataclasses import dataclass
from enum import IntEnum
from math import prod
from pathlib import Path
from typing import Any

from common.errors import ModelError

# GGUF value type -> struct format
SCALARS = dict(enumerate(["B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d"]))
STRING, ARRAY = 8, 9
# tensor type -> numbers in a block, bytes of a block: what ctransformers 0.2.27 knows
BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),  # F32 F16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),  # Q2_K Q3_K Q4_K Q5_K Q6_K
}  # fmt: skip
COUNTS = [
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
]
# of a layer
MATRICES = [
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_norm",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
]
MOST = 1 << 20  # a header with more fields or tensors than this is garbage


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
    """The bytes of a file, read from the front; raises ValueError where they end too early or mean nothing."""

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
    if not SCALARS.get(kind):
        raise ValueError(f"it has a field of the unknown type {kind}")
    return SCALARS[kind]


def read_gguf(path: str | Path, any_kind: bool = False) -> GGUFFile:
    """Read and check a GGUF file. Raises ModelError, one line that names the file and what is wrong with it.

    any_kind: of any architecture, vocabulary and tensor type, for a library that says itself what it cannot read."""
    blocks = BLOCKS
    if any_kind:
        from gguf.constants import GGML_QUANT_SIZES as blocks
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
    """(metadata, shape of every tensor), after every tensor was found to lie inside the file."""
    header = _Header(data)
    header.take(4)
    version = header.numbers("I")[0]
    if not 1 <= version <= 3:
        raise ValueError(f"it is GGUF version {version}, expected 1 to 3 (little-endian)")
    header.length = "I" if version == 1 else "Q"
    tensor_count, field_count = header.count(), header.count()
    if max(tensor_count, field_count) > MOST:
        raise ValueError(f"its header is garbage ({tensor_count} tensors, {field_count} fields)")
    metadata = {}
    for _ in range(field_count):
        key = header.text()
        metadata[key] = header.value(header.numbers("I")[0])
    shapes, ends = {}, [0]
    for _ in range(tensor_count):
        name, dimensions = header.text(), header.numbers("I")[0]
        if dimensions > 4:
            raise ValueError(f"its tensor {name!r} has {dimensions} dimensions")
        shapes[name] = tuple(header.count() for _ in range(dimensions))
        kind, offset = *header.numbers("I"), *header.numbers("Q")
        if kind not in blocks:
            raise ValueError(
                f"its tensor {name!r} has type {kind}, which the library cannot read (it reads F32, F16, Q4_0 to Q6_K)"
            )
        block, size = blocks[kind]
        ends.append(offset + prod(shapes[name]) // block * size)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its alignment is {alignment!r}")
    needed = -(-header.position // alignment) * alignment + max(ends)
    if needed > len(data):
        raise ValueError(f"it is cut off: {len(data)} bytes, its tensors need {needed}")
    return metadata, shapes


def _check(metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless this is a LLaMA with a SentencePiece vocabulary, the only kind the judge's library is used for."""
    if metadata.get("general.architecture") != "llama":
        raise ValueError(
            f"its architecture is {metadata.get('general.architecture')!r}, expected 'llama'"
        )
    for key in COUNTS:
        if not isinstance(metadata.get(f"llama.{key}"), int) or metadata[f"llama.{key}"] < 1:
            raise ValueError(f"its field 'llama.{key}' is missing or no count")
    if not isinstance(metadata.get("llama.attention.layer_norm_rms_epsilon"), float):
        raise ValueError(
            "its field 'llama.attention.layer_norm_rms_epsilon' is missing or no number"
        )
    if metadata.get("llama.rope.scaling.type", "none") != "none":
        raise ValueError(
            f"its positions are scaled ({metadata['llama.rope.scaling.type']}), which the library would ignore"
        )
    if metadata.get("tokenizer.ggml.model") != "llama":
        raise ValueError(
            f"its tokenizer is {metadata.get('tokenizer.ggml.model')!r}, expected 'llama' (SentencePiece)"
        )
    vocabulary = [
        metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "scores", "token_type")
    ]
    if not all(isinstance(part, list) and len(part) == len(vocabulary[0]) for part in vocabulary):
        raise ValueError("its tokens, scores and token types are missing or of different lengths")
    tokens, scores, types = vocabulary
    for values, kind in ((tokens, str), (scores, float), (types, int)):
        if not all(isinstance(value, kind) for value in values):
            raise ValueError("its tokens, scores or token types are of the wrong type")
    if not {f"<0x{byte:02X}>" for byte in range(256)} <= set(tokens):
        raise ValueError("its vocabulary lacks some of the 256 byte tokens")
    for key in ("bos_token_id", "eos_token_id"):
        if metadata.get(f"tokenizer.ggml.{key}", 1) not in range(len(tokens)):
            raise ValueError(f"its field 'tokenizer.ggml.{key}' is no token id")
    for name in ("token_embd.weight", "output.weight"):
        expected = (metadata["llama.embedding_length"], len(tokens))
        if shapes.get(name) != expected:
            raise ValueError(
                f"its tensor {name!r} is {shapes.get(name, 'missing')}, expected the shape {expected}"
            )
    for name in [
        "output_norm",
        *(f"blk.{k}.{part}" for k in range(metadata["llama.block_count"]) for part in MATRICES),
    ]:
        if f"{name}.weight" not in shapes:
            raise ValueError(f"its tensor '{name}.weight' is missing")
