"""The tokenizer of the miniature models: a LLaMA-style SentencePiece BPE with single digits and byte fallback, so that the same
vocabulary works in transformers and in a GGUF file."""

import itertools
from collections.abc import Iterable
from typing import Any

from lm.text_encoding import PLAIN_QUESTION, PLAIN_TEMPLATE
from reasoning.problems import pretraining_texts

VOCAB_SIZE = 704
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "▁"  # SentencePiece's mark of a space
WORDS = rf"{SPACE}?\p{{L}}+|\p{{N}}|\n|{SPACE}?[^\p{{L}}\p{{N}}\n{SPACE}]|{SPACE}"  # no piece crosses these: digits stay single


def corpus(count: int = 3000) -> Iterable[str]:
    """Problem texts as the models see them, and the judge's question with its answers."""
    for problem, steps in itertools.islice(pretraining_texts(), count):
        yield PLAIN_TEMPLATE.format(prompt=problem.prompt) + "\n".join(steps)
        yield f"{PLAIN_QUESTION} Yes\n{PLAIN_QUESTION} No"


def build_tokenizer() -> Any:
    """Train it (seconds). Returns a transformers PreTrainedTokenizerFast.

    llama.cpp merges any two neighbours whose joined text is in the vocabulary, best score first. To make the BPE here do the same,
    every way to split a piece into two pieces becomes a merge, ranked by the piece's place in the vocabulary."""
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

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    printable = [chr(code) for code in range(33, 127)] + [SPACE]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL) - len(BYTES),
        initial_alphabet=printable,
        special_tokens=[],
        show_progress=False,
    )
    learner.train_from_iterator(corpus(), trainer)
    learned = sorted(learner.get_vocab(), key=learner.get_vocab().get)
    learned.remove("\n")  # as in LLaMA a newline is its byte token
    # characters first, then the merges in the order they were learned
    pieces = sorted(learned, key=lambda piece: len(piece) > 1)

    vocab = {piece: rank for rank, piece in enumerate([*SPECIAL, *BYTES, *pieces])}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
