"""Tiny models of published families: their configuration classes, with tokenizers of their kinds.

A tokenizer splits texts, names its special tokens and writes a chat as the published one does; the
weights are random."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from lm.miniature_tokenizer import build_tokenizer, corpus
from tests.helpers.chat_models import CHATML, THINKING
from tests.helpers.reward_models import TINY_SHAPE

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}"
    "{% endif %}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)


def _split(pattern: str) -> Any:
    words = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def byte_level(pre: Any, special: list[str], bos: str | None = None) -> Tokenizer:
    """Byte-level BPE of 450 tokens; with `bos` it begins every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(itertools.islice(corpus(), 400), trainer)
    if bos is not None:
        tokens = [(bos, tokenizer.token_to_id(bos))]
        add_bos = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=tokens)
        tokenizer.post_processor = add_bos
    return tokenizer


def _gpt2_words() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm_words() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), _gpt2_words()])


@cache
def _miniature() -> str:
    return build_tokenizer().backend_tokenizer.to_str()


def _sentencepiece(special: list[str]) -> Tokenizer:
    """As the miniatures', with the control tokens of the family."""
    tokenizer = Tokenizer.from_str(_miniature())
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer


def _gemma_words() -> Tokenizer:
    """SentencePiece that puts no space in front."""
    tokenizer = _sentencepiece(["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(to_text)
    bos = [("<bos>", tokenizer.token_to_id("<bos>"))]
    add_bos = processors.TemplateProcessing(single="<bos> $A", special_tokens=bos)
    tokenizer.post_processor = add_bos
    return tokenizer


def _nfc(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@dataclass(frozen=True)
class Family:
    model_type: str
    tokenizer: Callable[[], Tokenizer]
    template: str | None
    bos: str | None
    eos: str
    pad: str | None
    config: dict[str, Any] = field(default_factory=dict)


_QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_QWEN_TEMPLATE = CHATML.replace("{{ bos_token }}", "")
FAMILIES = {
    "smollm2": Family(
        "llama", lambda: byte_level(_smollm_words(), _QWEN),
        _QWEN_TEMPLATE, "<|im_start|>", "<|im_end|>", "<|im_end|>", {"tie_word_embeddings": True},
    ),
    "qwen2": Family(
        "qwen2", lambda: _nfc(byte_level(_split(WORDS % 1), _QWEN)),
        _QWEN_TEMPLATE, None, "<|im_end|>", "<|endoftext|>", {"tie_word_embeddings": True},
    ),
    "qwen3": Family(
        "qwen3", lambda: _nfc(byte_level(_split(WORDS % 1), [*_QWEN, "<think>", "</think>"])),
        THINKING.replace("{{ bos_token }}", ""), None, "<|im_end|>", "<|endoftext|>",
        {"head_dim": 128},
    ),
    "llama3": Family(
        "llama",
        lambda: byte_level(
            _split(WORDS % "1,3"),
            ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
             "<|eot_id|>"],
            bos="<|begin_of_text|>",
        ),
        LLAMA3, "<|begin_of_text|>", "<|eot_id|>", None,
    ),
    "gemma3": Family(
        "gemma3_text", _gemma_words, GEMMA, "<bos>", "<eos>", "<unk>",
        {"head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16},
    ),
    "phi3": Family(
        "phi3", lambda: _sentencepiece(["<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]),
        PHI3, "<s>", "<|endoftext|>", "<|endoftext|>",
        {"sliding_window": 64},
    ),
    "mistral": Family(
        "mistral", lambda: _sentencepiece(["[INST]", "[/INST]"]),
        MISTRAL, "<s>", "</s>", None, {"sliding_window": 64},
    ),
    "gpt2": Family(
        "gpt2", lambda: byte_level(_gpt2_words(), ["<|endoftext|>"]),
        None, "<|endoftext|>", "<|endoftext|>", None,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    ),
}  # fmt: skip


def make_family(name: str, folder: Path, **changes: Any) -> str:
    """Write the model directory of a family; returns its path. changes: of the configuration."""
    family = FAMILIES[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=family.tokenizer(), bos_token=family.bos, eos_token=family.eos,
        pad_token=family.pad, chat_template=family.template,
    )  # fmt: skip
    shape = {} if family.model_type == "gpt2" else TINY_SHAPE | {"intermediate_size": 64}
    config = AutoConfig.for_model(
        family.model_type, **(shape | family.config | changes), vocab_size=len(tokenizer) + 6,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for key, weight in model.named_parameters():
        if key.endswith(".bias"):
            torch.nn.init.normal_(weight, std=0.3)
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert len(AutoTokenizer.from_pretrained(folder)) == len(tokenizer)
    return str(folder)
