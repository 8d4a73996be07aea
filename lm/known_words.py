"""Whether a model knows the words of a text, measured by its own tokenizer.

A tokenizer has learned the words of the text that its model was trained on: it writes them in few
tokens, and words that it has never seen in many, down to single characters or bytes. So the bytes
that a token stands for, over the words of a text, tell a model's own text from foreign text. This
needs no forward pass and holds for causal LMs, PRMs and reward models alike.

Bytes a token, of prompts with their steps (smallest, median, largest of n texts):

    miniatures  their own test and hard problems   3.30  3.81  4.50   n = 2,000
    miniatures  GSM8K                              1.03  1.34  2.48   n = 1,000
    miniatures  SVAMP (prompts)                    1.11  1.47  2.71   n = 1,000, 0.4 % above 2.5
    miniatures  MAWPS (prompts)                    1.04  1.43  3.17   n = 998, 0.7 % above 2.5
    SmolLM2     GSM8K                              2.82  4.49  6.76   n = 1,000

An English model reads other languages at about 2 bytes a token, so they count as unknown to it.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from common.cli import warn
from common.errors import short

LEAST_BYTES = 2.5  # a token, in the words of a known text
FEW_WORDS = 3  # a text with fewer words tells nothing
MOST_TEXTS = 200  # that are measured
SHARE = 0.1  # of unknown texts, from which on it is said

# single letters and pairs are variables in every text
_WORD = re.compile(r"[^\W\d_]{3,}")


# `count_tokens` of a policy, a judge or a scorer: the number of its tokens of each text, or None if
# it cannot say (a server)
Counter = Callable[[Sequence[str]], list[int] | None]


def tokens_of(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """The number of tokens of each text, without special tokens."""
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [len(text) for text in ids]


def unknown_texts(count_tokens: Counter, texts: Sequence[str]) -> tuple[list[str], int, float]:
    """(the texts whose words are unknown, the number of texts measured, mean bytes a token of the
    unknown texts).

    At most 200 texts are measured, evenly spaced."""
    spaced = texts[:: -(-len(texts) // MOST_TEXTS) or 1]
    words = {text: _WORD.findall(text) for text in spaced}
    asked = {text: " ".join(found) for text, found in words.items() if len(found) >= FEW_WORDS}
    counts = count_tokens(list(asked.values())) if asked else None
    if counts is None:
        return [], 0, 0.0
    bytes_a_token = {
        text: sum(len(word.encode(errors="replace")) for word in words[text]) / max(1, count)
        for text, count in zip(asked, counts, strict=True)
    }
    unknown = [text for text, number in bytes_a_token.items() if number < LEAST_BYTES]
    mean = sum(bytes_a_token[text] for text in unknown) / max(1, len(unknown))
    return unknown, len(asked), mean


def warn_of_unknown_words(
    count_tokens: Counter, name: str, texts: Iterable[str], advice: str
) -> bool:
    """Warn on stderr if a model does not know the words of a tenth of the texts; returns whether.

    name: of the model, with its role. advice: what to do."""
    unknown, measured, mean = unknown_texts(count_tokens, list(dict.fromkeys(texts)))
    if not unknown or len(unknown) < SHARE * measured:
        return False
    warn(
        f"the {name} has not learned the words of {len(unknown)} of {measured} texts: it reads "
        f"them in pieces of {mean:.1f} bytes ({LEAST_BYTES} or more in text that a model knows), "
        "so what it makes of them may mean nothing",
        f"for example {short(unknown[0])}",
        f"what to do: {advice}",
    )
    return True
