"""Split a text into steps. A step is one line of a response.

A response of K steps is the text `step 1 \\n step 2 \\n ... step K`. It ends there if step K states
the final answer (lm/text_encoding.py then adds EOS), and with a newline if more steps follow.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from reasoning.answers import extract_answer, opens_answer


def split_steps(text: str) -> list[str]:
    """The steps of a response: its non-empty lines, without surrounding white space."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def one_line(text: str) -> str:
    """The text in one line: runs of white space become a space. A step must be one line."""
    return " ".join(text.split())


_ANNOTATION = re.compile(r"<<[^<>]*>>")


def without_annotations(text: str) -> str:
    """The text without the annotations of GSM8K's calculator, such as `<<48/2=24>>`."""
    return _ANNOTATION.sub("", text)


STEP_NUMBER = re.compile(r"\s*Step\s+\d+\s*[:.]", re.IGNORECASE)
CLOSING_STEP = re.compile(r"\s*(?:(?:Final\s+)?Answer\s*:|####)", re.IGNORECASE)


@dataclass(frozen=True)
class StepSeparator:
    """What stands between two steps in the text of a model.

    pattern: a match behind the text of a step ends the step; it belongs to no step.
    joint: what is written between steps that a model is to continue."""

    pattern: re.Pattern
    joint: str = "\n"

    def end(self, text: str) -> int | None:
        """Where the first step of a text ends, its separator included; None if it goes on."""
        ends = (m.end() for m in self.pattern.finditer(text) if self.step(text[: m.start()]))
        return next(ends, None)

    def split(self, text: str) -> list[str]:
        """The steps of a text, each in one line."""
        steps = [self.step(part) for part in self._parts(text)]
        return [step for step in steps if step]

    def step(self, text: str) -> str:
        """The text of one step in one line, without its separator."""
        return one_line(self.pattern.sub(" ", text))

    def _parts(self, text: str) -> Iterator[str]:
        while (end := self.end(text)) is not None:
            yield text[:end]
            text = text[end:]
        yield text


NEWLINE = StepSeparator(re.compile(r"\n"))
_CLOSES = r"\n(?=\s*(?:(?:Final\s+)?Answer\s*:|####))"  # the final answer is always a step
SEPARATORS = {
    "newline": NEWLINE,
    "blank_line": StepSeparator(re.compile(rf"\n[^\S\n]*\n|{_CLOSES}", re.IGNORECASE), "\n\n"),
    "numbered": StepSeparator(
        re.compile(rf"\n(?=\s*(?:[*#]+\s*)?Step\s+\d+\s*[:.])|{_CLOSES}", re.IGNORECASE)
    ),
}


def step_separator(name: str) -> StepSeparator:
    """The separator of a name in SEPARATORS, or of a regular expression. Raises ValueError."""
    if name in SEPARATORS:
        return SEPARATORS[name]
    try:
        pattern = re.compile(name)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"expected {', '.join(SEPARATORS)} or a regular expression, got {name!r} ({error})"
        ) from None
    if not name:
        raise ValueError("expected a name or a regular expression, got an empty text")
    return StepSeparator(pattern)


_OPENING = re.compile(r"\\\[|\\begin\{|\[asy\]")
_CLOSING = re.compile(r"\\\]|\\end\{|\[/asy\]")
_SENTENCE = re.compile(r"(?:(?<=[.!?])|(?<=[.!?]\$))\s+(?=[A-Z\\$])")


def split_text(text: str) -> list[str]:
    """The steps of a text in which they are not marked by lines alone; each step in one line.

    If lines begin with `Step 1:`, each such line starts a step. Otherwise a step is a paragraph if
    the text has blank lines, and a line if not. `Answer:` always starts a step. LaTeX environments
    and displays are not cut, and a display belongs to the step before it."""
    lines = text.strip().splitlines()
    inside = _inside_of_displays(lines)
    numbered = any(map(STEP_NUMBER.match, lines))
    blank = any(not line.strip() and not within for line, within in zip(lines, inside, strict=True))
    pieces: list[list[str]] = []
    for k, line in enumerate(lines):
        if STEP_NUMBER.match(line) or CLOSING_STEP.match(line):
            begins = True
        else:
            is_display = line.lstrip().startswith(("\\[", "$$", "\\begin{"))
            begins = not numbered and (not blank or not lines[k - 1].strip()) and not is_display
        if not pieces or (begins and not inside[k]):
            pieces.append([line])
        else:
            pieces[-1].append(line)
    return [step for step in (one_line("\n".join(piece)) for piece in pieces) if step]


def _inside_of_displays(lines: list[str]) -> list[bool]:
    """For each line, whether its start is inside a LaTeX environment or display."""
    inside, depth, in_dollars = [], 0, False
    for line in lines:
        inside.append(depth > 0 or in_dollars)
        depth += len(_OPENING.findall(line)) - len(_CLOSING.findall(line))
        in_dollars ^= line.count("$$") % 2 == 1
    return inside


_BRACKETS = re.compile(r"\\begin\{|\\end\{|\\\[|\\\]|[{}$]")


def split_sentences(text: str) -> list[str]:
    """The sentences of the steps of `split_text`; none ends inside a formula or braces."""
    sentences = []
    for piece in split_text(text):
        begin, read, count = 0, 0, Counter[str]()
        for end in _SENTENCE.finditer(piece):
            count.update(_BRACKETS.findall(piece, read, end.start()))
            read = end.start()
            environments = count["\\begin{"], count["\\end{"]
            if (
                count["$"] % 2 == 0
                and count["{"] + sum(environments) == count["}"]
                and count["\\["] == count["\\]"]
                and environments[0] == environments[1]
            ):
                sentences.append(piece[begin:read])
                begin = end.end()
        sentences.append(piece[begin:])
    return [sentence for sentence in sentences if sentence]


def stated_answer(steps: Sequence[str]) -> str | None:
    """The final answer that the last step states, alone or below a heading such as `### Answer`."""
    if not steps:
        return None
    if len(steps) > 1 and opens_answer(steps[-2]):
        return extract_answer(f"{one_line(steps[-2])}\n{one_line(steps[-1])}")
    return extract_answer(steps[-1])


def ends_solution(steps: Sequence[str]) -> bool:
    """Whether the last step states a final answer, so that only EOS follows."""
    return stated_answer(steps) is not None


def shared_prefix(first: Sequence, second: Sequence) -> int:
    """The number of items that two sequences share at their start, for example steps or tokens."""
    k = 0
    while k < min(len(first), len(second)) and first[k] == second[k]:
        k += 1
    return k
