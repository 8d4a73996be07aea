"""Text <-> steps. A step is a line; the one prompt template stands here, and what a response looks like as text.

A response of K steps is written `step 1 \\n step 2 \\n ... step K`, and then either the end of the text (EOS, added as a token
by whoever tokenizes) if step K states the final answer, or a newline if the solution is to go on (a step pair, a prefix).
"""

import re
from collections.abc import Sequence

from reasoning.answers import extract_answer


def split_steps(text: str) -> list[str]:
    """The steps of a response: its lines without surrounding white space, empty ones left out."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def one_line(text: str) -> str:
    """A step as it has to be: one line (runs of white space become a space), so that K steps, written out, split into K again."""
    return " ".join(text.split())


STEP_NUMBER = re.compile(r"\s*Step\s+\d+\s*[:.]", re.IGNORECASE)
CLOSING_STEP = re.compile(r"\s*(?:(?:Final\s+)?Answer\s*:|####)", re.IGNORECASE)
_OPENING = re.compile(r"\\\[|\\begin\{|\[asy\]")
_CLOSING = re.compile(r"\\\]|\\end\{|\[/asy\]")
_SENTENCE = re.compile(r"(?:(?<=[.!?])|(?<=[.!?]\$))\s+(?=[A-Z\\$])")


def split_text(text: str) -> list[str]:
    """The steps of a text that comes in one piece, each one line.

    Where lines begin with `Step 1:`, a step goes from there to the next one; else steps are paragraphs if the text has blank
    lines, and lines if it has none. `Answer:` begins a step of its own. Nothing is cut inside of LaTeX environments and displays,
    and a display belongs to the step before it."""
    lines = text.strip().splitlines()
    inside = _inside_of_displays(lines)
    numbered = any(map(STEP_NUMBER.match, lines))
    blank = any(not line.strip() and not within for line, within in zip(lines, inside, strict=True))
    pieces: list[str] = []
    for k, line in enumerate(lines):
        if STEP_NUMBER.match(line) or CLOSING_STEP.match(line):
            begins = True
        else:
            is_display = line.lstrip().startswith(("\\[", "$$", "\\begin{"))
            begins = not numbered and (not blank or not lines[k - 1].strip()) and not is_display
        if not pieces or (begins and not inside[k]):
            pieces.append(line)
        else:
            pieces[-1] += f"\n{line}"
    return [step for step in map(one_line, pieces) if step]


def _inside_of_displays(lines: list[str]) -> list[bool]:
    """For each line, whether it begins inside of a LaTeX environment or display."""
    inside, depth, in_dollars = [], 0, False
    for line in lines:
        inside.append(depth > 0 or in_dollars)
        depth += len(_OPENING.findall(line)) - len(_CLOSING.findall(line))
        in_dollars ^= line.count("$$") % 2 == 1
    return inside


def split_sentences(text: str) -> list[str]:
    """The sentences of split_text's pieces; none ends inside of a formula or a brace."""
    sentences = []
    for piece in split_text(text):
        begin = 0
        for end in _SENTENCE.finditer(piece):
            so_far = piece[begin : end.start()]
            is_open = (
                so_far.count("$") % 2
                or so_far.count("{") != so_far.count("}")
                or so_far.count("\\[") != so_far.count("\\]")
            )
            if not is_open and so_far.count("\\begin{") == so_far.count("\\end{"):
                sentences.append(so_far)
                begin = end.end()
        sentences.append(piece[begin:])
    return [sentence for sentence in sentences if sentence]


def ends_solution(steps: list[str]) -> bool:
    """True if the last step states a final answer: nothing is to follow but EOS."""
    return bool(steps) and extract_answer(steps[-1]) is not None


def shared_prefix(first: Sequence, second: Sequence) -> int:
    """How many first items two sequences share: steps of two solutions, tokens of two texts."""
    k = 0
    while k < min(len(first), len(second)) and first[k] == second[k]:
        k += 1
    return k
