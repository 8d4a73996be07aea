"""Turn the equation of a word problem into steps: `(8.0 + 3.0) * 2` -> `8 + 3 = 11`, `11 * 2 = 22`.

Published sets of word problems (SVAMP, MAWPS, ASDiv) have no solutions in words, but an equation
whose value is the answer. All values are fractions, so nothing is rounded.
"""

import ast
import re
from collections.abc import Sequence
from fractions import Fraction
from operator import add, mul, sub, truediv
from typing import NamedTuple

OPERATORS = {"+": add, "-": sub, "*": mul, "/": truediv}
LONGEST = 1000  # characters of an equation
MOST_DECIMALS = 10  # of a number in a step

_AST = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_NUMBER = re.compile(r"[-+]?(\d+(\.(?P<decimals>\d*))?|\.\d+)")


class Operation(NamedTuple):
    operator: str  # a key of OPERATORS
    left: "Fraction | Operation"
    right: "Fraction | Operation"


Expression = Fraction | Operation


def number(text: str) -> Fraction:
    """The number that a text states, for example `8.0`, `1,250` or `-.5`. Raises ValueError.

    A number with 10 decimals or more was a fraction before a program divided it:
    `0.6666666666666666` is 2/3, and `6.6499999999999995` is 6.65."""
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.strip())
    match = _NUMBER.fullmatch(plain)
    if match is None or len(plain) > LONGEST:
        raise ValueError(f"{text[:40]!r} is no number")
    value, decimals = Fraction(plain), len(match["decimals"] or "")
    simple = value.limit_denominator(1000)
    if decimals >= 10 and abs(simple - value) <= Fraction(1, 10 ** min(decimals, 12)):
        return simple
    return value


def decimal(value: Fraction) -> str | None:
    """The value as a decimal: 51/2 -> `25.5`. None if it has more than MOST_DECIMALS decimals."""
    places = next((k for k in range(MOST_DECIMALS + 1) if 10**k % value.denominator == 0), None)
    if places is None:
        return None
    digits = str(abs(value.numerator) * 10**places // value.denominator).zfill(places + 1)
    whole, rest = digits[: len(digits) - places], digits[len(digits) - places :]
    return f"{'-' * (value < 0)}{whole}{'.' * (places > 0)}{rest}"


def shown(value: Fraction) -> str:
    """The value as a decimal, or as a mixed number if it is none: 8/3 -> `2 2/3`."""
    text = decimal(value)
    if text is None:
        whole, rest = divmod(abs(value.numerator), value.denominator)
        text = f"{'-' * (value < 0)}{f'{whole} ' * (whole > 0)}{rest}/{value.denominator}"
    return text


def parse_infix(text: str) -> Expression:
    """The expression of `( 8.0 - 3.0 ) * 2`, which has numbers, + - * / and parentheses.

    Raises ValueError for anything else."""
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.strip())
    plain = plain.translate(str.maketrans("×·÷−–", "**/--"))
    if len(plain) > LONGEST or "**" in plain or "//" in plain:
        raise ValueError(f"{text[:40]!r} is no plain arithmetic")
    try:
        return _from_ast(ast.parse(plain, mode="eval").body, plain)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{text[:40]!r} is no plain arithmetic") from None


def _from_ast(node: ast.expr, text: str) -> Expression:
    if isinstance(node, ast.BinOp) and type(node.op) in _AST:
        operator = _AST[type(node.op)]
        return Operation(operator, _from_ast(node.left, text), _from_ast(node.right, text))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        operand = _from_ast(node.operand, text)
        if isinstance(node.op, ast.UAdd):
            return operand
        return -operand if isinstance(operand, Fraction) else Operation("-", Fraction(0), operand)
    return number(ast.get_source_segment(text, node) or "")  # its digits, not its float


def parse_prefix(tokens: Sequence[str]) -> Expression:
    """The expression of tokens in prefix notation: `- 8 3` is 8 - 3. Raises ValueError."""
    if sum(map(len, tokens)) > LONGEST:
        raise ValueError("an equation of too many characters")
    stack: list[Expression] = []
    for token in reversed(tokens):
        if token not in OPERATORS:
            stack.append(number(token))
        elif len(stack) < 2:
            raise ValueError(f"{token!r} has less than two operands")
        else:
            stack.append(Operation(token, stack.pop(), stack.pop()))
    if len(stack) != 1:
        raise ValueError(f"{len(stack)} expressions instead of one")
    return stack[0]


def work_out(expression: Expression) -> tuple[Fraction, list[str] | None]:
    """(value, steps): one step for each operation, in the order in which they can be done.

    steps is None if an equation cannot be written with decimals alone, so that it is exactly true
    and can be checked (reasoning/grading.py): if a number has too many decimals, as that of 10 / 3,
    or if a negative number would follow an operator. Raises ZeroDivisionError."""
    if isinstance(expression, Fraction):
        return expression, [] if decimal(expression) else None
    (left, before), (right, between) = work_out(expression.left), work_out(expression.right)
    value = OPERATORS[expression.operator](left, right)
    if before is None or between is None or right < 0 or decimal(value) is None:
        return value, None
    step = f"{decimal(left)} {expression.operator} {decimal(right)} = {decimal(value)}"
    return value, [*before, *between, step]
