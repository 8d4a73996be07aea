"""Where an answer in words says yes or no, and how probable yes was at that place.

A model that is asked for Yes or No may write `**Yes**`, a sentence, or its thoughts before. The
verdict is one occurrence of the word yes or no in the answer; the score is read at the token that
begins it. docs/judges.md has the rule and a table of cases.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lm.thinking import OPEN, answer_start

# (first letter in the answer, letter behind the last one, {spelling: probability}) of a token for
# which a spelling of yes or no is listed, or the first letters of one
Place = tuple[int, int, dict[str, float]]

# the least P(yes) + P(no) of a place that counts although the answer has no verdict there
MOST_LIKELY = 0.5

# a base model may go on without a space: "YesAnswer: 4"
_WORD = re.compile(r"(?<![^\W_])((?:[Yy]es|[Nn]o)(?![^\W_A-Z])|(?:YES|NO)(?![^\W_]))(?!['’-]\w)")
_WORDS = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
NEAR = 60  # letters around a word that decide what it means
LONGEST = 100_000  # letters of an answer that are read

# "yes or no", "yes/no": the question's own words
_OTHER_AHEAD = re.compile(r"[\"'”’*`\s]*(?:or|and|nor|/|\|)[\"'“‘*`\s]*(?:yes|no)\b", re.I)
_OTHER_BEHIND = re.compile(r"\b(?:yes|no)[\"'”’*`\s]*(?:or|and|nor|/|\|)[\"'“‘*`\s]*$", re.I)
# "not a yes", "I can't say no"
_NEGATED = re.compile(
    r"(?:\bnot|n['’]t|\bnever|\bcannot)\s+(?:(?:say|answer|be|a|an|simply|just|clearly)\s+){0,3}"
    r"[\"'“‘*`_]*$",
    re.I,
)
# "step no. 2": a number
_NUMBERED = re.compile(r"\b(?:step|line|problem|question|equation|example|case|item)s?\s+$", re.I)
# words that go on behind the verdict "no"; before any other word it is "no error", "no mistake"
_GOES_ON = re.compile(
    r"yes|no|the|that|this|it|it's|its|there|there's|because|since|as|for|from|so|but|and|or|if|when|while"
    r"|where|i|i'm|i'd|we|you|they|he|she|in|on|at|not|wait|however|although|though|due|is|was"
    r"|based|given|after|before|according|unfortunately"
)
# words that may stand before a verdict that is stated, and around them
_LABEL = r"answer|verdict|judge?ment|conclusion|assessment|result|decision|boxed"
_FILLER = (
    r"is|be|should|must|therefore|thus|hence|so|a|an|clearly|definitely|simply|the|my|final"
    r"|short|correct|text|textbf|mathrm"
)
_LABELS, _FILLERS = re.compile(_LABEL), re.compile(_FILLER)
_LEADING = re.compile(
    rf"{_LABEL}|{_FILLER}|i|i'd|say|think|well|ok|okay|sure|hmm|assistant|output|response"
)


@dataclass(frozen=True)
class Verdict:
    """The word that decides: its first letter in the answer, and what it says. leads: nothing but
    words such as `The answer is` stands before it, so that no longer answer would have another."""

    start: int
    is_yes: bool
    leads: bool


def find_verdict(text: str) -> Verdict | None:
    """The verdict of an answer; None if it has none.

    Of several words yes and no the first counts if it begins the answer, else the last that is
    stated (`the answer is no`), else the last that is a sentence of its own, else the last."""
    start = answer_start(text)
    opened = OPEN.search(text, start)
    end = min(opened.start() if opened else len(text), start + LONGEST)
    found: dict[str, Verdict] = {}
    for match in _WORD.finditer(text, start, end):
        before = text[max(start, match.start() - NEAR) : match.start()]
        after = text[match.end() : min(match.end() + NEAR, end)]
        if not _is_verdict(match[1].lower(), before, after):
            continue
        leads = not found and _leads(text[start : match.start()])
        kind = "leads" if leads else _kind(before, after)
        found[kind] = Verdict(match.start(), match[1].lower() == "yes", leads)
        if leads:
            break
    return next(
        (found[kind] for kind in ("leads", "stated", "alone", "any") if kind in found), None
    )


def _is_verdict(word: str, before: str, after: str) -> bool:
    """Whether a word yes or no may be a verdict, by the text around it."""
    if _OTHER_AHEAD.match(after) or _OTHER_BEHIND.search(before) or _NEGATED.search(before):
        return False
    if word == "yes":
        return True
    if _NUMBERED.search(before) and re.match(r"\.?\s?\d", after):
        return False
    following = re.match(r"[ \t]+([^\W\d_]+(?:['’][^\W\d_]+)?)(\s+\d)?", after)
    if not following or _GOES_ON.fullmatch(following[1].lower().replace("’", "'")):
        return True
    # "no step 2 is wrong"
    return following[1].lower() in ("step", "line", "equation") and following[2] is not None


def _leads(before: str) -> bool:
    """Whether a verdict with this text before it begins the answer."""
    before = before.strip()
    return len(before) <= 80 and all(map(_LEADING.fullmatch, _lower(before)))


def _kind(before: str, after: str) -> str:
    """How a verdict that does not begin its answer stands in it."""
    words = _lower(before)
    while words and _FILLERS.fullmatch(words[-1]):
        words.pop()
    if words and _LABELS.fullmatch(words[-1]):
        return "stated"
    opens = before.rstrip(" \t*_\"'“‘`(")
    closes = after.lstrip("*_\"'”’`)")
    if (not opens or opens[-1] in ".!?:;\n>)]}") and re.match(r"\s*(?:$|[.!,;:\n<…—–-])", closes):
        return "alone"
    return "any"


def _lower(text: str) -> list[str]:
    return [word.lower().replace("’", "'") for word in _WORDS.findall(text)]


# --- probabilities


def spelling(token: str) -> str | None:
    """`yes` or `no` or their first letters, if a token spells that and nothing else but marks and
    white space."""
    letters = re.sub(r"[\W_ĠĊ]+", "", token).lower()  # Ġ and Ċ: byte-level space and newline
    return letters if letters and ("yes".startswith(letters) or letters in ("n", "no")) else None


def p_yes(text: str, places: Sequence[Place]) -> float | None:
    """P(yes) / (P(yes) + P(no)) at the token that begins the verdict.

    An answer without a verdict is scored at its first token at which yes and no together are more
    likely than all other words. None if there is no such token."""
    verdict = find_verdict(text)
    start = answer_start(text)
    for first, last, listed in places:
        yes, no = (_side(listed, word) for word in ("yes", "no"))
        if verdict is not None:
            if first <= verdict.start < last and yes + no > 0:
                return yes / (yes + no)
        elif last > start and yes + no > MOST_LIKELY:
            # a whole word that is no verdict says something else ("no error"); one that runs into
            # the next token is what a base model writes ("Yes4")
            word = _WORD.search(text, first, first + LONGEST)
            if word is None or word.start() >= last:
                return yes / (yes + no)
    return None


def _side(listed: dict[str, float], word: str) -> float:
    """The probability of a word, or of its first letters if no token spells the whole word."""
    if word in listed:
        return listed[word]
    return sum(p for letters, p in listed.items() if word.startswith(letters))
