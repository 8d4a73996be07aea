"""Answers of the kinds in GSM8K and MATH: which mean the same, and which do not."""

import threading
import time

import pytest

from reasoning import answers
from reasoning.answers import extract_answer, same_answer

EQUAL = [
    # words and numbers, without math-verify
    ("52.", "52"), (r"\$18", "18"), ("$1,234.50", "1234.5"), ("18 dollars", "18"),
    (r"18\text{ cm}^2", "18"), ("1{,}234", "1234"), (r"10,\!000", "10000"), ("- 3", "-3"),
    ("-$5", "-5"), (r"90^\circ", "90"), ("2 1/2", "2.5"), ("-3/4", "-0.75"), ("1e3", "1000"),
    ("he earned 18 dollars", "18"), ("9 eggs * $2 = $18", "18"), ("**18**", "18"),
    (r"\text{(B)}", "B"), (r"\text{Evelyn}", "evelyn"), ("(3,4)", "(3, 4)"), ("8,3,1", "8, 3, 1"),
    ("2:30", "2 : 30"), (r"\left(1, 2\right]", "(1,2]"), (r"\(52\)", "52"),
    # mathematics
    (r"\dfrac12", "0.5"), (r"\frac{11}{36}", "11/36"), ("50%", "0.5"), (r"50\%", "50"),
    ("x = 5", "5"), (r"\sqrt{8}", r"2\sqrt{2}"), ("sqrt(8)", "2*sqrt(2)"),
    (r"\{1, 2\}", r"\{2, 1\}"), ("x^2 + 2x + 1", "(x+1)^2"), (r"[1, \frac{4}{2})", "[1,2)"),
    ("5!", "120"), (r"20 \text{ and } 30", "20, 30"), (r"2\frac{1}{2}", "2.5"),
    (r"5\pi", r"\pi \cdot 5"),
]  # fmt: skip
DIFFERENT = [
    ("18", "19"), ("-5", "5"), ("1,2", "12"), ("1,234", "1.234"), ("7,5", "75"), ("2:30", "2:31"),
    ("2:30", "2"), ("3 hours", "4"), ("A", "B"), ("no", "on"), ("none", "0"), ("Evelyn", "Eve"),
    ("half of 18", "18"), ("18 of 20", "18"), ("", "5"), ("5 million", "5"), ("9" * 400, "8"),
    ("1/0", "1"), ("nan", "0"), ("1e99", "1"), ("1/2", r"\frac{1}{3}"), ("(1,2)", "[1,2]"),
    ("(1,2)", "(2,1)"), (r"\{1,2\}", r"\{1,3\}"), ("5 and 7", "7"), (r"\frac{1}{0}", "1"),
    ("3xy", "3"), ("x + y = 5 dollars", "5"), ("2x", "2"), ("x^2", "2x"), ("18 dollars", "18x"),
    ("(1,234)", "1234"), ("5!", "5"), (r"\sqrt{2}", "1.4"),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second"), EQUAL)
def test_equal(first, second):
    assert same_answer(first, second) and same_answer(second, first)


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_different(first, second):
    assert not same_answer(first, second) and not same_answer(second, first)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"first \boxed{1}, then \boxed{2}", "2"), (r"It is $\boxed 7$.", "7"),
        (r"\fbox{3 cm}", "3 cm"), (r"\boxed{never closed", None), ("a step\n#### 1,200", "1,200"),
        (r"\boxedx", None), ("Step 5: She spends 13520. The answer is: 13520", "13520"),
        ("That is 29 cents. Answer: 29", "29"),
    ],
)  # fmt: skip
def test_stated_answers(text, answer):
    assert extract_answer(text) == answer


def test_in_another_thread_too():
    """math-verify's own time limit raises there."""
    found = []
    thread = threading.Thread(target=lambda: found.append(same_answer(r"\frac{2}{4}", "0.5")))
    thread.start()
    thread.join()
    assert found == [True]


def test_a_comparison_has_a_time_limit(monkeypatch):
    monkeypatch.setattr(answers, "SECONDS", 0.2)
    same_answer(r"\frac{2}{4}", "x")  # imports
    start = time.process_time()
    assert not same_answer("10^{10^{10}}", "5 + 10^{10^{9}}") and time.process_time() - start < 3
