"""Conversion of rows of public data sets into problems.

Reference solutions (GSM8K, MATH) are written in this project's format: `Step 1: ...`, and a last
step `Answer: ...`. Where word problems have an equation in place of a solution, the steps are those
of the equation (reasoning/equations.py)."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from common.errors import RecordError
from reasoning.answers import extract_answer, same_answer
from reasoning.datasets.files import Dropped, show
from reasoning.datasets.row_fields import NO_ANSWER, fields_of, in_one_line, is_empty, text_of
from reasoning.datasets.row_prompt import question_of
from reasoning.equations import (
    OPERATORS,
    Expression,
    number,
    parse_infix,
    parse_prefix,
    shown,
    work_out,
)
from reasoning.records import Problem
from reasoning.steps import (
    CLOSING_STEP,
    STEP_NUMBER,
    one_line,
    split_sentences,
    split_steps,
    without_annotations,
)

# --- GSM8K, MATH: problems with a reference solution ---


def _reference(steps: list[str], answer: str) -> list[str]:
    """A reference solution in this project's format: numbered steps, then the answer."""
    numbered = [
        step if STEP_NUMBER.match(step) else f"Step {k}: {step}" for k, step in enumerate(steps, 1)
    ]
    return [*numbered, f"Answer: {answer}"]


# Words in place of an answer that was not found, or that a proof does not have.
_NO_ANSWER = re.compile(
    r"(?:an? |the )?proofs?(?: problem| question)?|proved|proven|q\.?e\.?d\.?"
    r"|see (?:the )?(?:\w+ )?(?:proof|solution|explanation|answer|above|below|image|figure)s?"
    r"|(?:(?:final )?answer )?(?:was )?not[ _-]?(?:found|provided|given|available|applicable)"
    r"|no[ _-](?:final[ _-])?answer(?: found)?|unknown|unanswered|missing|unavailable|omitted"
    r"|n/a|n\.a\.?|#n/a|<na>|null|nan|<none>|to ?do|tb[ad]|[-–—_?.…*∎■□\s]+|\\(?:black)?square",
    re.IGNORECASE,
)
# These may be the answer (of which primes are even squares? none), so the solution decides.
_NO_ANSWER_OR_NONE = re.compile(r"none|nil", re.IGNORECASE)


def _is_answer(answer: str, solution: str = "") -> bool:
    """Whether a text can be checked as an answer; `proof`, `notfound` and `N/A` cannot.

    `none` can, if there is no solution or if the solution has this word too. `no solution`,
    `undefined` and `does not exist` always can: they are answers of MATH."""
    plain = re.sub(r"\\(?:text|mathrm|textbf|boxed)\s*|[{}$()\[\]\"'`]", "", answer).strip()
    if not plain or _NO_ANSWER.fullmatch(plain.rstrip(".! ") or plain):
        return False
    if solution and _NO_ANSWER_OR_NONE.fullmatch(plain.rstrip(".! ")):
        return re.search(rf"\b{plain.rstrip('.! ')}\b", solution, re.IGNORECASE) is not None
    return True


def _problem(
    prompt: str, answer: str | None, dropped: Dropped, steps: Sequence[str] = (), solution: str = ""
) -> Iterator[Problem]:
    """One Problem, or none if its answer cannot be checked."""
    if answer and _is_answer(answer, solution):
        yield Problem(prompt, answer, _reference(list(steps), answer) if steps else [])
    else:
        dropped[NO_ANSWER] += 1


def gsm8k_problem(row: dict, dropped: Dropped) -> Iterator[Problem]:
    """`answer`: one step a line with <<annotations>>, then `#### 72`.

    In a user's own file `answer` may also be the answer alone."""
    prompt, solution = question_of(row), text_of(row, "answer")
    answer, lines = extract_answer(solution), split_steps(without_annotations(solution))
    steps = [one_line(line) for line in lines if not CLOSING_STEP.match(line)]
    if answer is None and len(lines) == 1:
        yield from _problem(prompt, lines[0], dropped)
    else:
        yield from _problem(prompt, answer, dropped, steps)


def math_problem(row: dict, dropped: Dropped) -> Iterator[Problem]:
    """`solution`: prose, the answer in \\boxed{}. A sentence is a step; drawings are removed.

    NuminaMath and others also have the answer in `answer`."""
    prompt, solution = question_of(row), text_of(row, "solution")
    if is_empty(row.get("answer")):
        answer = extract_answer(one_line(solution))
    else:
        answer = one_line(text_of(row, "answer"))
    steps = split_sentences(re.sub(r"\[asy\].*?\[/asy\]", "", solution, flags=re.DOTALL))
    yield from _problem(prompt, answer, dropped, steps, solution)


def problem_with_answer(prompt_field: str, answer_field: str) -> Callable:
    """For data sets that have the right answer, but no reference solution."""

    def problem(row: dict, dropped: Dropped) -> Iterator[Problem]:
        prompt = question_of(row) if prompt_field == "question" else text_of(row, prompt_field)
        answer: Any = row
        for name in answer_field.split("."):
            answer = answer.get(name) if isinstance(answer, dict) else None
        text = None if is_empty(answer) else text_of({"answer": answer}, "answer")
        yield from _problem(prompt, text, dropped)

    return problem


# --- SVAMP, MAWPS, ASDiv: problems with an equation ---

_PLACEHOLDER = re.compile(r"\b(?:number|N_)(\d+)\b")  # number0 or N_00
_GADGET = re.compile(r"<gadget[^>]*>(.*?)</gadget>", re.DOTALL)
_UNIT = re.compile(r"\s*\([^()]*\)")


def _with_equation(
    prompt: str, answer: str, expressions: Sequence[Expression], dropped: Dropped
) -> Iterator[Problem]:
    """One Problem, or none if the value of the last expression is not the answer.

    It has the steps of all expressions, or none if decimals cannot show them exactly."""
    try:
        worked = [work_out(expression) for expression in expressions]
    except ZeroDivisionError:
        dropped["problems whose equation divides by zero"] += 1
        return
    value = shown(worked[-1][0])
    with suppress(ValueError):  # words, or a fraction: compared as it is
        answer = shown(number(answer))
    if not same_answer(answer, value):
        dropped["problems whose answer is not the value of their equation"] += 1
        return
    steps = [step for _, part in worked for step in part or []]
    if any(part is None for _, part in worked):
        dropped.notes["problems without steps: decimals cannot show them exactly"] += 1
        steps = []
    yield Problem(prompt, value, _reference(steps, value) if steps else [])


def _with_infix(
    prompt: str, answer: str, equations: Sequence[str], dropped: Dropped
) -> Iterator[Problem]:
    try:
        expressions = [parse_infix(equation) for equation in equations]
    except ValueError:
        dropped["problems whose equation is no plain arithmetic"] += 1
    else:
        yield from _with_equation(prompt, answer, expressions, dropped)


def svamp_problem(row: dict, dropped: Dropped) -> Iterator[Problem]:
    """`Equation` is infix: `( 8.0 - 3.0 )`."""
    equation = text_of(row, "equation")
    yield from _with_infix(question_of(row), text_of(row, "answer"), [equation], dropped)


def calculator_problem(row: dict, dropped: Dropped) -> Iterator[Problem]:
    """`chain`: `<gadget id="calculator">8 - 3</gadget>`, then its output, and so on."""
    equations = _GADGET.findall(text_of(row, "chain")) or [text_of(row, "result")]
    prompt = _joined_marks(text_of(row, "question"))
    yield from _with_infix(prompt, text_of(row, "result"), equations, dropped)


def placeholder_problem(row: dict, dropped: Dropped) -> Iterator[Problem]:
    """`Question` and `Equation` have `number0` or `N_00` in place of the first of the `Numbers`.

    `Equation` is prefix, `- number0 number1`, or infix, `( N_00 - N_01 )`."""
    numbers, equation = text_of(row, "numbers").split(), text_of(row, "equation")
    try:
        in_text = [shown(number(text)) for text in numbers]
        prompt = _PLACEHOLDER.sub(lambda match: in_text[int(match[1])], text_of(row, "question"))
        equation = _PLACEHOLDER.sub(lambda match: numbers[int(match[1])], equation)
    except (ValueError, IndexError):
        expected = "a number for every placeholder"
        raise RecordError(f"field 'numbers': expected {expected}, got {show(numbers)}") from None
    prompt, answer, tokens = _joined_marks(prompt), text_of(row, "answer"), equation.split()
    if len(tokens) < 2 or tokens[0] not in OPERATORS:
        yield from _with_infix(prompt, answer, [equation], dropped)
        return
    try:
        expression = parse_prefix(tokens)
    except ValueError:
        dropped["problems whose equation is no plain arithmetic"] += 1
    else:
        yield from _with_equation(prompt, answer, [expression], dropped)


def _joined_marks(text: str) -> str:
    """The text without the spaces that a program put around marks: `Tom 's cat , too .`"""
    text = re.sub(r"\s(?=[.,;:?!)]|'(?:s|re|ve|ll|d|m)\b|n't\b)", "", one_line(text))
    return re.sub(r"(?<=s)\s(?='\s)|(?<=\()\s", "", text)  # girls ' team


def asdiv_problem(row: dict, dropped: Dropped) -> Iterator[Problem]:
    """`Formula`: `7+2=9`, or several with `;` between them. `Answer`: `9 (apples)`.

    Many formulas are no plain arithmetic, as `LCM[2,3]=6`; their problems have no steps."""
    answer = text_of(row, "answer")
    prompt, answer = question_of(row), _UNIT.sub("", answer) or answer
    try:
        expressions = []
        for equation in text_of(row, "formula").split(";"):
            left, right = equation.split("=")
            number(right)  # `13 r1` is none
            expressions.append(parse_infix(left))
    except ValueError:
        dropped.notes["problems without steps: their formula is no plain arithmetic"] += 1
        yield from _problem(prompt, answer, dropped)
    else:
        yield from _with_equation(prompt, answer, expressions, dropped)


def own_problem(row: dict, dropped: Dropped) -> Iterator[Problem]:
    problem = Problem.from_row({**fields_of(row, Problem), "answer": text_of(row, "answer")})
    if _is_answer(problem.answer, " ".join(problem.steps)):
        yield in_one_line(problem)
    else:
        dropped[NO_ANSWER] += 1
