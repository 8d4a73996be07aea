"""The tokenizer of the miniature models: a LLaMA-style SentencePiece BPE.

It has single digits and byte fallback, and its vocabulary works in transformers and in a GGUF file.
"""

import itertools
from collections.abc import Iterator
from typing import Any

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
from transformers import PreTrainedTokenizerFast

from lm.prompting import PLAIN_TEMPLATE, plain_chat_template
from lm.text_encoding import PLAIN_QUESTION
from reasoning.problems import pretraining_texts

VOCAB_SIZE = 704
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "▁"  # SentencePiece's mark of a space
# no piece crosses a boundary of these matches, so every digit is a token
WORDS = rf"{SPACE}?\p{{L}}+|\p{{N}}|\n|{SPACE}?[^\p{{L}}\p{{N}}\n{SPACE}]|{SPACE}"


def corpus(count: int = 3000) -> Iterator[str]:
    """Problem texts as the models see them, and the judge's question with its answers."""
    for problem, steps in itertools.islice(pretraining_texts(), count):
        yield PLAIN_TEMPLATE.format(prompt=problem.prompt) + "\n".join(steps)
        yield f"{PLAIN_QUESTION} Yes\n{PLAIN_QUESTION} No"


def splits(piece: str, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to split a piece into two pieces of the vocabulary."""
    ways = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
    return [(left, right) for left, right in ways if left in vocab and right in vocab]


def build_tokenizer() -> Any:
    """Train it, in a few seconds. Returns a transformers PreTrainedTokenizerFast.

    llama.cpp merges any two neighbours whose joined text is in the vocabulary, best score first. To
    do the same here, every split of a piece is a merge, ranked by the piece's place in the
    vocabulary."""
    mark_spaces = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    learner = Tokenizer(models.BPE())
    learner.normalizer = mark_spaces
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL) - len(BYTES),
        initial_alphabet=[chr(code) for code in range(33, 127)] + [SPACE],
        special_tokens=[],
        show_progress=False,
    )
    learner.train_from_iterator(corpus(), trainer)
    ranks = learner.get_vocab()
    del ranks["\n"]  # as in LLaMA, a newline is its byte token
    # characters first, then the merges in the order in which they were learned
    pieces = sorted(ranks, key=lambda piece: (len(piece) > 1, ranks[piece]))

    vocab = {piece: rank for rank, piece in enumerate([*SPECIAL, *BYTES, *pieces])}
    merges = [merge for piece in pieces for merge in splits(piece, vocab)]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = mark_spaces
    to_text = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*to_text, decoders.Strip(" ", 1, 0)])
    add_bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = add_bos
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<unk>", padding_side="left", model_max_length=512,
        clean_up_tokenization_spaces=False, chat_template=plain_chat_template(),
    )  # fmt: skip
