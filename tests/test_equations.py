"""reasoning/equations.py: an equation becomes steps whose arithmetic the grader finds true."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tests.helpers.properties  # noqa: F401
from reasoning.equations import (
    OPERATORS,
    Operation,
    decimal,
    number,
    parse_infix,
    parse_prefix,
    shown,
    work_out,
)
from reasoning.grading import step_value

NUMBERS = st.decimals(0, 9999, places=2, allow_nan=False).map(Fraction)
TREES = st.recursive(
    NUMBERS, lambda trees: st.builds(Operation, st.sampled_from([*OPERATORS]), trees, trees)
)


def prefix(tree) -> list[str]:
    if isinstance(tree, Fraction):
        return [str(decimal(tree))]
    return [tree.operator, *prefix(tree.left), *prefix(tree.right)]


def infix(tree) -> str:
    if isinstance(tree, Fraction):
        return str(decimal(tree))
    return f"( {infix(tree.left)} {tree.operator} {infix(tree.right)} )"


@pytest.mark.property
@given(TREES)
def test_every_tree_is_read_back_and_its_steps_are_true(tree):
    assert parse_prefix(prefix(tree)) == tree
    assert parse_infix(infix(tree)) == tree
    try:
        value, steps = work_out(tree)
    except ZeroDivisionError:
        return
    for k, step in enumerate(steps or [], 1):
        stated, true = step_value(f"Step {k}: {step}")
        assert true and stated is not None
        if k == len(steps or []):
            assert stated == value
    assert steps is None or len(steps) == sum(token in OPERATORS for token in prefix(tree))


@pytest.mark.parametrize(
    ("equation", "steps"),
    [
        ("( 8.0 - 3.0 )", ["8 - 3 = 5"]),
        ("2 + 3 * 4", ["3 * 4 = 12", "2 + 12 = 14"]),
        ("(1 / 0.125) + (1 / 0.2)", ["1 / 0.125 = 8", "1 / 0.2 = 5", "8 + 5 = 13"]),
        ("3 - 5 + 4", ["3 - 5 = -2", "-2 + 4 = 2"]),
        ("1,250 ÷ 5 × 2", ["1250 / 5 = 250", "250 * 2 = 500"]),
        ("0.1 + 0.2", ["0.1 + 0.2 = 0.3"]),  # no float
        ("-(2 + 3)", ["2 + 3 = 5", "0 - 5 = -5"]),
        ("7", []),
        ("10 / 3 * 3", None),  # its first value has no end
        ("8 - -3", None),  # `8 - -3 = 11` is not an equation that can be checked
    ],
)
def test_steps(equation, steps):
    assert work_out(parse_infix(equation))[1] == steps


@pytest.mark.parametrize(
    "equation",
    ["", "x + 2", "2 ^ 3", "2 ** 3", "7 // 2", "2 +", "(2", "3 (4)", "1e3", "2 = 2", "[2] + 1",
     "True + 1", "'a'", "__import__('os')", "(" * 400 + "1" + ")" * 400, "1+" * 600 + "1",
     "-" * 900],
)  # fmt: skip
def test_no_plain_arithmetic(equation):
    with pytest.raises(ValueError):
        parse_infix(equation)


@pytest.mark.parametrize("tokens", ["", "+ 1", "1 2", "- 8 3 2", "% 1 2", "+ 1 x", "+ " * 501])
def test_no_prefix_equation(tokens):
    with pytest.raises(ValueError):
        parse_prefix(tokens.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0", "8"),
        ("-15.0", "-15"),
        ("0.6666666666666666", "2/3"),
        ("2.3333333333333335", "2 1/3"),
        ("-1.6666666666666667", "-1 2/3"),
        ("6.6499999999999995", "6.65"),
        ("0.6667", "0.6667"),
        (".5", "0.5"),
        ("1,000", "1000"),
    ],
)
def test_numbers(text, expected):
    assert shown(number(text)) == expected


@pytest.mark.parametrize("text", ["", "a", "1.2.3", "3/4", "13 r1", "nan", "inf", "1e9"])
def test_what_is_no_number(text):
    with pytest.raises(ValueError):
        number(text)
