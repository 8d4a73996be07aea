"""Final answers: find one in a text, compare two. Knows no reference solution, so anyone may import it."""

import re
from decimal import Decimal, InvalidOperation

# The ways a line states its final answer: "Answer: 52", "The answer is 52.", "#### 52", "\boxed{52}".
_STATED = re.compile(r"(?:^|\b)(?:final\s+)?answer\s*(?:is|:|=)\s*:?\s*(?P<answer>\S.*)|^\s*####\s*(?P<hashes>\S.*)", re.IGNORECASE)


def _boxed(text: str) -> str | None:
    """The content of the last \\boxed{...}, braces balanced."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin = start + len("\\boxed{")
    depth = 1
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin:end].strip()
    return None


def extract_answer(text: str) -> str | None:
    """The final answer that a text states in its last line that states one, or None. `The answer is $52.` -> `52`."""
    for line in reversed(text.splitlines()):
        boxed = _boxed(line)
        if boxed:
            return boxed
        stated = _STATED.search(line)
        if stated:
            answer = (stated["answer"] or stated["hashes"]).strip()
            return answer.rstrip(".").strip().strip("$*").strip() or None
    return None


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.replace(",", "").replace("$", "").strip())
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def same_answer(answer: str | None, reference: str) -> bool:
    """True if two answers mean the same: as numbers where both are plain numbers, else by math-verify (LaTeX, fractions, sets)."""
    if answer is None:
        return False
    if answer.strip() == reference.strip():
        return True
    first, second = _number(answer), _number(reference)
    if first is not None and second is not None:
        return first == second
    from math_verify import parse, verify  # sympy takes a second to import, and plain numbers never need it

    def parsed(text):
        return parse(text if "\\" not in text else f"${text}$")

    return bool(verify(parsed(reference), parsed(answer)))
