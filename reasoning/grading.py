"""Grade a solution with its reference: the exact score of every step, and of the final answer.

Only evaluation, the control judges and the builders of data sets may import this. A search must
not: it would see the answers that it looks for.
"""

import re
from fractions import Fraction
from typing import Any

from reasoning.answers import extract_answer, same_answer
from reasoning.records import Problem
from reasoning.samples import Sample
from reasoning.steps import stated_answer

_NUMBER = r"\d++(?:\.\d++)?+"
_EQUATION = re.compile(  # also a number or a sum without `=`, so that no part is read twice
    rf"(?P<left>(?:-\s*+)?+{_NUMBER}(?P<terms>(?:\s*+[-+*/]\s*+{_NUMBER})++)?+)"
    rf"(?(terms)(?:\s*+=\s*+(?P<right>(?:-\s*+)?+{_NUMBER}))?+)"
)
LONGEST = 1000  # characters of an equation that is checked; a longer one counts as false
_TERM = re.compile(rf"([-+*/]?)\s*({_NUMBER})")


def _evaluate(expression: str) -> Fraction | None:
    """The value of an expression like `3 * 4 + 2`, * and / before + and -; None for x / 0."""
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
    """(value, true): the right side of the last equation, and whether all equations are true.

    (None, True) for a step without an equation, (None, False) for an equation over LONGEST."""
    value, true = None, True
    for equation in _EQUATION.finditer(step):
        if equation["right"] and len(equation[0]) > LONGEST:
            value, true = None, False
        elif equation["right"]:
            value = Fraction("".join(equation["right"].split()))
            true = true and _evaluate(equation["left"]) == value
    return value, true


def grade_steps(steps: list[str], problem: Problem) -> list[float]:
    """The exact score of every step, 0 or 1.

    A step is right if its equations are true, its value equals that of the reference's step at the
    same position, and all steps before it are right. So every step after the first error has score
    0. Raises ValueError if the problem has no reference solution."""
    if not problem.steps:
        raise ValueError("this problem has no reference steps: only its answer can be graded")
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
    """Whether the last step states the right final answer."""
    return same_answer(stated_answer(steps), problem.answer)


def step_accuracy(steps: list[str], problem: Problem) -> float:
    """Share of right steps, 0..1: divided by the length of the longer of solution and reference."""
    return sum(grade_steps(steps, problem)) / max(len(steps), len(problem.steps))


def graded(
    prompt: str, steps: list[str], ended: bool, problem: Problem | None = None, **more: Any
) -> Sample:
    """A sample with its verdict: `right`, `wrong`, `no answer` (its last step states none), `cut`
    (it did not end by itself), `empty`, or `not graded` without a reference.

    ended: by itself, within the token limit. more: further fields of Sample."""
    stated = extract_answer(steps[-1]) if steps else None
    if not steps:
        verdict = "empty"
    elif not ended:
        verdict = "cut"
    elif stated is None:
        verdict = "no answer"
    elif problem is None:
        verdict = "not graded"
    else:
        verdict = "right" if is_correct(steps, problem) else "wrong"
    reference = problem.answer if problem else None
    return Sample(prompt, steps, verdict, stated, reference, **more)
