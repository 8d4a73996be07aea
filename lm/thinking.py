"""The marks around a model's thoughts, and where its answer begins behind them."""

import re

_THOUGHT = r"(?:\w{1,20}:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|analysis|reflection)"
OPEN = re.compile(
    rf"[<\[◁]\|?(?:start_|begin_of_)?{_THOUGHT}\|?[>\]▷]|<\|open\|>think|<\|channel>thought"
    r"|<\|channel\|>analysis|Here are my reasoning steps",
    re.IGNORECASE,
)
CLOSE = re.compile(
    rf"[<\[◁]\|?(?:/|end_|end_of_){_THOUGHT}\|?[>\]▷]|<\|close\|>think|<channel\|>"
    r"|<\|channel\|>final(?:<\|message\|>)?|assistantfinal|\[BEGIN FINAL RESPONSE\]",
    re.IGNORECASE,
)


def answer_start(text: str) -> int:
    """Where the answer begins behind a block of thoughts; len(text) if the block is not closed."""
    start = last_end(CLOSE, text, 0)
    opened = OPEN.search(text, start)
    return len(text) if opened and not text[start : opened.start()].strip() else start


def last_end(mark: re.Pattern, text: str, otherwise: int = -1) -> int:
    """The end of the last mark in a text."""
    return max((match.end() for match in mark.finditer(text)), default=otherwise)


def open_thought(text: str) -> str:
    """The mark that opens the thought in which a text ends; empty if it ends in none."""
    last = max(OPEN.finditer(text), key=re.Match.end, default=None)
    return last[0] if last and last.end() > last_end(CLOSE, text) else ""
