import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.text_encoding import response_pieces
from reasoning.answers import extract_answer, same_answer
from reasoning.grading import grade_steps, is_correct, step_accuracy, step_value
from reasoning.records import Problem
from reasoning.steps import (
    ends_solution,
    shared_prefix,
    split_sentences,
    split_steps,
    split_text,
    stated_answer,
)
from tests.helpers import properties  # noqa: F401  loads the profile

PROBLEM = Problem("?", "52", ["Step 1: 12 + 14 = 26", "Step 2: 26 * 2 = 52", "Answer: 52"])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: 52", "52"), ("The answer is 52.", "52"), ("so\nFinal answer: $1,200", "1,200"),
        ("#### 72", "72"), (r"Thus \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("Step 1: 2 + 2 = 4", None), ("", None), ("Answer:", None), ("Answer: 1\nAnswer: 2", "2"),
        ("answer = x", "x"),
    ],
)  # fmt: skip
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("52", "52", True), ("52.0", "52", True), ("1,200", "1200", True), ("52", "53", False),
        (None, "52", False), ("3/8", "0.375", True), (r"\frac{1}{2}", "0.5", True),
        ("yes", "yes", True), ("yes", "no", False), ("nan", "52", False),
    ],
)  # fmt: skip
def test_same_answer(first, second, same):
    assert same_answer(first, second) is same


@pytest.mark.parametrize(
    ("step", "value", "true"),
    [
        ("Step 1: 12 + 14 = 26", 26, True), ("42 - 17 = 35", 35, False),
        ("3 * 4 = 12, 26 + 12 = 38", 38, True), ("3 + 4 * 2 = 11", 11, True),
        ("7 / 2 = 3.5", 3.5, True), ("1 / 0 = 0", 0, False), ("5 - 9 = -4", -4, True),
        ("no", None, True), ("3 * 4 = 13, 26 + 12 = 38", 38, False),
        ("5 = 2 + 3 = 5", 5, True), ("1" * 5000 + " + 1 = 2", None, False),
        ("- 2 + 3 = 1", 1, True),
        ("7 = 7", None, True), ("2 + 2", None, True),
    ],
)  # fmt: skip
def test_step_value(step, value, true):
    assert step_value(step) == (value, true)


@pytest.mark.parametrize(
    ("steps", "scores"),
    [
        (PROBLEM.steps, [1, 1, 1]),
        (["Step 1: 14 + 12 = 26", "Step 2: 2 * 26 = 52", "The answer is 52."], [1, 1, 1]),
        # steps after an error are 0
        (["Step 1: 12 + 14 = 25", "Step 2: 26 * 2 = 52", "Answer: 52"], [0, 0, 0]),
        # a true equation, but not the right one
        (["Step 1: 12 + 14 = 26", "Step 2: 26 + 2 = 28", "Answer: 28"], [1, 0, 0]),
        (["Step 1: 12 + 14 = 26", "Answer: 52"], [1, 0]),  # a step left out
        # one too many
        (["Step 1: 12 + 14 = 26", "Step 2: 26 * 2 = 52", "Answer: 52", "Answer: 52"], [1, 1, 1, 0]),
        (["twenty-six"], [0]),
        ([], []),
    ],
)
def test_grade_steps(steps, scores):
    assert grade_steps(steps, PROBLEM) == scores
    assert step_accuracy(steps, PROBLEM) == sum(scores) / max(3, len(steps))


def test_is_correct_looks_at_the_last_step_alone():
    assert (
        is_correct(["Answer: 52"], PROBLEM)
        and not is_correct(["Answer: 52", "Answer: 5"], PROBLEM)
        and not is_correct([], PROBLEM)
    )
    with pytest.raises(ValueError, match="no reference steps"):
        grade_steps(["x"], Problem("?", "1"))


def test_steps_and_text():
    assert split_steps(" Step 1: a\n\nAnswer: 5 \n") == ["Step 1: a", "Answer: 5"]
    assert response_pieces(["a", "Answer: 5"], finished=True) == ["a\n", "Answer: 5"]
    assert response_pieces(["a"], finished=False) == ["a\n"]
    assert ends_solution(["a", "Answer: 5"]) and not ends_solution(["a"]) and not ends_solution([])
    assert shared_prefix(["a", "b"], ["a", "c"]) == 1


def test_an_answer_below_its_heading():
    """A policy writes one step a line, so the heading is a step of its own."""
    for heading in ("### Answer", "**Final Answer:**", "Answer:", "The final answer is:"):
        assert not ends_solution(["12 + 14 = 26", heading])
        assert ends_solution(["12 + 14 = 26", heading, "52"])
        assert is_correct(["12 + 14 = 26", heading, "$52$"], PROBLEM)
    assert not ends_solution(["### Answer", "To find it, we add both numbers first."])
    assert stated_answer(["Answer: 5", "so all is done"]) is None
    assert stated_answer([]) is None


@pytest.mark.parametrize(
    "part", [" ", "1", "1+", "- ", "1 ", "$ A. ", "{A. ", "Step 1: ", "\n", "\\["]
)
def test_long_texts_take_linear_time(part):
    text = (part * 100_000)[:100_000]
    start = time.process_time()
    for function in (split_steps, split_text, split_sentences, step_value):
        function(text)
    assert time.process_time() - start < 20  # quadratic time is a minute and more


LINES = st.lists(
    st.sampled_from(
        [
            "5",
            "A",
            ".",
            "$$",
            "\\[",
            "\\]",
            "\\begin{x}",
            "\\end{x}",
            "{",
            "}",
            "$",
            "\\boxed{5}",
            "é",
            "\t",
            "\u2028",
            "Step 1: ",
            "Step 2. ",
            "Answer: ",
            "### Answer",
            "a b",
            " ",
            "\n",
            "\n\n",
            "#### 5",
            ". ",
        ]
    ),
    max_size=15,
).map("".join)


@pytest.mark.property
@given(st.one_of(LINES, st.text(max_size=60)))
def test_steps_joined_and_split_again_are_the_same(text):
    steps = split_steps(text)
    assert split_steps("\n".join(steps)) == steps
    assert all(step.strip() == step and step.splitlines() == [step] for step in steps)
    for split in (split_text, split_sentences):
        pieces = split(text)
        assert split_steps("\n".join(pieces)) == pieces
        assert "".join("".join(pieces).split()) == "".join(text.split())  # nothing is lost


@pytest.mark.property
@given(st.lists(LINES.map(lambda text: " ".join(text.split())).filter(bool), max_size=4))
def test_what_ends_a_solution_states_its_answer(steps):
    answer = stated_answer(steps)
    assert ends_solution(steps) is (answer is not None)
    if steps:
        assert extract_answer(steps[-1]) in (None, answer)
        assert is_correct(steps, Problem("?", answer or "none")) is (answer is not None)
