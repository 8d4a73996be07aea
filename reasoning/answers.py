"""Final answers: find the answer that a text states, and compare two answers.

This module knows no reference solution, so every package may import it."""

import contextlib
import logging
import re
import signal
import threading
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

# Forms of a final answer: "Answer: 52", "The answer is 52.", "#### 52"; _boxed finds "\boxed{52}".
_STATED = re.compile(
    r"(?:^|\b)(?:final\s+)?answer\s*(?:is|:|=)\s*:?\s*(?P<answer>\S.*)|^\s*####\s*(?P<hashes>\S.*)",
    re.IGNORECASE,
)


def _boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} or \\fbox{...}, or the 2 of `\\boxed 2`."""
    boxes = list(re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*", text))
    if not boxes:
        return None
    content = text[boxes[-1].end() :]
    if not content.startswith("{"):
        return re.split(r"[\s$.,]", content, maxsplit=1)[0] or None
    depth = 0
    for end, character in enumerate(content):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return content[1:end].strip()
    return None


def extract_answer(text: str) -> str | None:
    """The final answer in the last line that states one, or None. `The answer is $52.` -> `52`."""
    for line in reversed(text.splitlines()):
        boxed = _boxed(line)
        if boxed:
            return boxed
        stated = _STATED.search(line)
        if stated:
            answer = (stated["answer"] or stated["hashes"]).strip()
            return answer.rstrip(".").strip().strip("$*").strip() or None
    return None


# --- comparison ---

LONGEST = 300  # characters; longer answers are compared as text only
SECONDS = 5.0  # of processor time for one comparison by math-verify

_LAYOUT = re.compile(
    r"\\[!,;:]|\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[()\[\]]|\*\*|\\?[$£€]|\^\{?\\circ\}?|°"
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|mbox|mathrm|mathbf)\s*\{([^{}]*)\}")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_FRACTION = re.compile(r"(-?)\s*(?:(\d+)\s+)?(\d+)\s*/\s*(\d+)")  # 3/4 and 2 3/4
_AMOUNT = re.compile(
    r"(?:^[-+]\s*|(?<![\d.])[-+])?(?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d{1,2}(?!\d))?", re.IGNORECASE
)
# all other words of one or two letters are variables
_SHORT_WORDS = re.compile(r"cm|mm|km|kg|mg|ml|ft|in|lb|oz|hr|am|pm|mi|yd|is|he|an|at|by")
_NO_UNITS = re.compile(  # words that change the number beside them
    r"\b(?:and|or|half|halves|of|to|times|plus|minus|negative|dozens?|hundreds?|thousands?"
    r"|[mb]illions?|sqrt|sin|cos|tan|log|exp)\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]+")
# functions in the notation of a programming language
_FUNCTIONS = re.compile(r"(?<![a-zA-Z\\])(sqrt|pi|sin|cos|tan|log|ln|exp)(?![a-zA-Z])")


def _tidy(text: str) -> str:
    """The text without layout: $ (money or LaTeX), bold, thin spaces, degree signs, a final dot."""
    text = text.replace("\u00a0", " ").replace("{,}", ",").replace("\\%", "%").replace("−", "-")
    return _LAYOUT.sub("", text).strip().rstrip(".").strip()


def _number(text: str) -> Fraction | None:
    """The value of a text with one number and perhaps a unit (`18 dollars`, `1,234`, `2 1/2`)."""
    fraction = _FRACTION.fullmatch(text)
    if fraction:
        sign, whole, over, under = fraction.groups()
        value = int(whole or 0) + Fraction(int(over), int(under)) if int(under) else None
        return -value if sign and value is not None else value
    before, _, text = text.rpartition("=")  # `9 eggs * $2 = $18` states 18
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text.strip())
    text = re.sub(r"(?<=[a-z]{2})\^\{?[23]\}?", "", text)  # square and cubic units
    amounts = _AMOUNT.findall(text)
    rest = _AMOUNT.sub(" ", text)
    if (
        len(amounts) != 1
        or re.search(r"[^\w\s.,;:'\"/-]|_", rest)
        or _has_variables(f"{before} {rest}")
        or _NO_UNITS.search(rest)
    ):
        return None
    return Fraction(re.sub(r"\s|\.$|\.(?=e)", "", amounts[0].lower()))


def _has_variables(text: str) -> bool:
    """Whether the text has a variable: a word of one or two letters that is not English (`3xy`)."""
    return any(
        len(word) < 3 and not _SHORT_WORDS.fullmatch(word.lower()) for word in _WORD.findall(text)
    )


def _is_prose(text: str) -> bool:
    """Whether the text is words (not a product of one-letter variables), a time, or a ratio."""
    text = re.sub(r"\\(?:begin|end)\{\w+\}|\\[a-zA-Z]+", " ", text)
    words = _WORD.findall(text)
    if re.fullmatch(r"[^\W\d_]{2,}", text.strip()) or re.search(r"\d\s*:\s*\d", text):
        return True
    return any(len(word) > 2 and word != "and" and not _FUNCTIONS.fullmatch(word) for word in words)


def same_answer(answer: str | None, reference: str) -> bool:
    """Whether two answers mean the same.

    Equal texts do, and equal numbers, whatever their units, `$` and thousands separators.
    math-verify compares all others (LaTeX, fractions, intervals, sets, equations). If that takes
    longer than SECONDS of processor time, the answers count as different. The limit needs signals,
    which Python has only in the main thread: in another thread there is no limit."""
    if answer is None:
        return False
    pair = [_tidy(answer), _tidy(reference)]
    worded = [_TEXT.sub(r"\1", text) for text in pair]
    texts = [re.sub(r"^\((\w)\)$", r"\1", "".join(text.split())) for text in worded]
    if min(map(len, texts)) > 1:  # a single letter is a variable or a choice: its case matters
        texts = [text.casefold() for text in texts]
    if texts[0] == texts[1]:
        return True
    if not all(texts) or max(map(len, pair)) > LONGEST:
        return False
    first, second = map(_number, worded)
    if first is not None and second is not None:
        return first == second
    if (first is None and _is_prose(worded[0])) or (second is None and _is_prose(worded[1])):
        return False
    # a number is passed without its unit, which math-verify would read as a product of variables
    return _same_expression(
        pair[0] if first is None else str(first), pair[1] if second is None else str(second)
    )


class _TooLong(BaseException):
    """A BaseException, because math-verify catches every Exception."""


@contextlib.contextmanager
def _processor_limit(seconds: float) -> Iterator[None]:
    """Raises _TooLong after `seconds` of processor time.

    math-verify's own limit is wall-clock time, so that the load of the machine could decide which
    answers are right."""

    def stop(*_: Any) -> None:
        raise _TooLong

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _same_expression(answer: str, reference: str) -> bool:
    # sympy takes a second to import, and plain numbers do not need it
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limit is off

    def parsed(text: str) -> Any:
        latex = re.sub(r"\bsqrt\(([^()]*)\)", r"\\sqrt{\1}", text)
        return parse("$" + _FUNCTIONS.sub(r"\\\1", latex) + "$", parsing_timeout=None)

    try:
        with _processor_limit(SECONDS):
            return bool(verify(parsed(reference), parsed(answer), timeout_seconds=None))
    except _TooLong:
        return False
