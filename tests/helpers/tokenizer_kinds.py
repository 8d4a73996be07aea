"""Small tokenizers of many kinds, for tests that a rule holds for each of them."""

import itertools
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from lm.miniature_tokenizer import build_tokenizer, corpus

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"plain": None, "chat": CHAT, "chat with BOS": "{{ bos_token }}" + CHAT}
POST_PROCESSORS = {
    "adds nothing": "$A",
    "adds BOS": "<s> $A",
    "adds BOS and EOS": "<s> $A </s>",
    "adds EOS": "$A </s>",
}
# <|im_end|> is an added token that is not special, as in some published tokenizers
CONTROL = {"<s>": True, "</s>": True, "<|im_start|>": True, "<|im_end|>": False}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _corpus() -> Iterator[str]:
    return itertools.islice(corpus(), 200)


def _byte_level(add_prefix_space: bool, trim_offsets: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_corpus(), learner)
    return tokenizer


def _unigram(prepend_scheme: str) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    # no piece holds a line break, as in SentencePiece
    lines = pre_tokenizers.Split("\n", behavior="isolated")
    metaspace = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, metaspace])
    learner = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), learner)
    pieces = [tuple(piece) for piece in json.loads(tokenizer.to_str())["model"]["vocab"]]
    pieces += [(byte, -20.0) for byte in BYTES]
    tokenizer.model = models.Unigram(pieces, 0, byte_fallback=True)
    to_text = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend_scheme)]
    tokenizer.decoder = decoders.Sequence(to_text)
    return tokenizer


def _sentencepiece() -> Tokenizer:
    return build_tokenizer().backend_tokenizer


def _normalizing() -> Tokenizer:
    """It reads full-width letters as ASCII, in its special tokens too."""
    tokenizer = _byte_level(add_prefix_space=False, trim_offsets=True)
    tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


BACKENDS = {
    "SentencePiece BPE": _sentencepiece,
    "byte-level": lambda: _byte_level(add_prefix_space=False, trim_offsets=True),
    "byte-level with prefix space": lambda: _byte_level(add_prefix_space=True, trim_offsets=False),
    "Unigram": lambda: _unigram("first"),
    "Unigram with a space before every word": lambda: _unigram("always"),
    "normalizing": _normalizing,
}
KINDS = [*itertools.product(BACKENDS, POST_PROCESSORS, TEMPLATES)]


@cache
def _backend(name: str) -> str:
    return BACKENDS[name]().to_str()


@cache
def make_tokenizer(backend: str, post_processor: str, template: str) -> Any:
    """One of KINDS. It has a truncation, a padding and `split_special_tokens` of its own."""
    tokenizer = Tokenizer.from_str(_backend(backend))
    tokenizer.add_tokens(
        [
            AddedToken(text, special=special, normalized=backend == "normalizing")
            for text, special in CONTROL.items()
        ]
    )
    ids = [(text, tokenizer.token_to_id(text)) for text in ("<s>", "</s>")]
    adds = processors.TemplateProcessing(single=POST_PROCESSORS[post_processor], special_tokens=ids)
    before = [tokenizer.post_processor] if "byte-level" in backend else []
    tokenizer.post_processor = processors.Sequence([*before, adds])
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=32)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>",
        chat_template=TEMPLATES[template], split_special_tokens=True,
    )  # fmt: skip
