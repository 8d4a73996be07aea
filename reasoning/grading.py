"""A solution against its reference: the exact score of every step, and of the whole.

For evaluation and dataset building alone: a search that imported this would know the answers it looks for.
"""

import re
from fractions import Fraction

from reasoning.answers import extract_answer, same_answer
from reasoning.records import Problem

_NUMBER = r"\d+(?:\.\d+)?"
_EQUATION = re.compile(
    rf"(?P<left>-?\s*{_NUMBER}(?:\s*[-+*/]\s*{_NUMBER})+)\s*=\s*(?P<right>-?\s*{_NUMBER})"
)
_TERM = re.compile(rf"([-+*/]?)\s*({_NUMBER})")


def _evaluate(expression: str) -> Fraction | None:
    """`3 * 4 + 2` with * and / before + and -; None if it divides by zero."""
    total, product = Fraction(0), Fraction(0)
    for operator, digits in _TERM.findall(expression):
        number = Fraction(digits)
        if operator == "*":
            product *= number
        elif operator == "/":
            if number == 0:
                return None
            product /= number
        else:
            total, product = total + product, -number if operator == "-" else number
    return total + product


def step_value(step: str) -> tuple[Fraction | None, bool]:
    """(value, true) of a step: the right side of its last equation, and whether every equation in it is true. (None, True) if it
    holds no equation."""
    value, true = None, True
    for equation in _EQUATION.finditer(step):
        value = Fraction(equation["right"].replace(" ", ""))
        true = true and _evaluate(equation["left"]) == value
    return value, true


def grade_steps(steps: list[str], problem: Problem) -> list[float]:
    """The exact score of every step, 0 or 1 each (DESIGN: the exact score of a step).

    A step is right if its equation is true, its value equals the reference's at that position, and every step before it is
    right; everything from the first error on is 0. The reference (`problem.steps`) must be there.
    """
    if not problem.steps:
        raise ValueError(
            "this problem has no reference steps: its steps cannot be graded, only its answer"
        )
    scores, right = [], True
    for k, step in enumerate(steps):
        right = right and k < len(problem.steps) and _same_step(step, problem.steps[k])
        scores.append(float(right))
    return scores


def _same_step(step: str, reference: str) -> bool:
    stated = extract_answer(reference)
    if stated is not None:
        return same_answer(extract_answer(step), stated)
    value, true = step_value(step)
    return (
        true
        and value is not None
        and value == step_value(reference)[0]
        and extract_answer(step) is None
    )


def is_correct(steps: list[str], problem: Problem) -> bool:
    """True if the last step states the right final answer."""
    return bool(steps) and same_answer(extract_answer(steps[-1]), problem.answer)


def step_accuracy(steps: list[str], problem: Problem) -> float:
    """Exact share of right steps, 0..1: right steps over the longer of solution and reference (missing steps are not right)."""
    return sum(grade_steps(steps, problem)) / max(len(steps), len(problem.steps))
