"""Which final answer a text states, and which answers mean the same; tests/data has the tables."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasoning import math_process
from reasoning.answers import extract_answer, opens_answer, same_answer
from reasoning.steps import ends_solution
from tests.helpers import properties  # noqa: F401  loads the profile

DATA = Path(__file__).parent / "data"
FINAL = [json.loads(line) for line in (DATA / "final_answers.jsonl").open()]
PAIRS = [json.loads(line) for line in (DATA / "answer_pairs.jsonl").open()]


@pytest.mark.parametrize("row", FINAL, ids=lambda row: row["kind"])
def test_what_states_a_final_answer(row):
    assert extract_answer(row["text"]) == row["answer"]


def test_the_table_of_final_answers_has_both_sides():
    states = Counter(row["answer"] is not None for row in FINAL)
    assert states[True] > 150 and states[False] > 90


def _marked(row):
    known = row.get("known_failure")
    marks = [pytest.mark.xfail(strict=True, reason=known)] if known else []
    return pytest.param(row, id=row["kind"], marks=marks)


@pytest.mark.parametrize("row", [_marked(row) for row in PAIRS])
def test_pairs_of_answers(row, monkeypatch):
    """In both directions. A row with `known_failure` is wrong, and counts in docs/answers.md."""
    monkeypatch.setattr(math_process, "SECONDS", 2.0)
    assert same_answer(row["answer"], row["reference"]) is row["same"]
    assert same_answer(row["reference"], row["answer"]) is row["same"]


def test_the_table_of_pairs_is_large_and_has_no_pair_twice():
    same = Counter(row["same"] for row in PAIRS)
    assert same[True] >= 150 and same[False] >= 150
    assert len({(row["answer"], row["reference"]) for row in PAIRS}) == len(PAIRS)


def test_nothing_is_no_answer():
    assert not same_answer(None, "5") and not same_answer("", "") and not same_answer("$", "5")


# --- the process of math-verify ---


def test_plain_numbers_need_no_process(monkeypatch):
    monkeypatch.setattr(math_process._client, "ask", lambda request: pytest.fail("asked"))
    for answer in (
        "52",
        "1,234",
        "18 dollars",
        "3/4",
        r"\frac{3}{4}",
        "50%",
        "4:30 PM",
        "9" * 5000,
    ):
        assert same_answer(answer, answer + ".") and not same_answer(answer, "7.25")


def test_in_other_threads():
    found = []

    def compare(k):
        found.append(same_answer(rf"\sqrt{{{k * k * 3}}}", rf"{k}\sqrt{{3}}"))

    threads = [threading.Thread(target=compare, args=(k,)) for k in range(2, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8


@pytest.mark.parametrize(
    "answer",
    [
        "10^{10^{10}}", "10**10**8", r"\binom{1000000000}{100000000}", "(10^7)!",
        r"\sum_{k=1}^{1000000000} \frac{1}{k}", "{" * 29 + "1" + "}" * 29,
        r"\begin{pmatrix}" + " & ".join(["9^{9^9}"] * 15) + r"\end{pmatrix}",
    ],
)  # fmt: skip
@pytest.mark.process
def test_a_comparison_is_bounded(answer, monkeypatch):
    monkeypatch.setattr(math_process, "SECONDS", 0.3)
    before = os.times()
    assert not same_answer(answer, "x + 1")
    math_process._client.close()  # its time counts once it has ended
    used = os.times()
    seconds = [
        used.children_user - before.children_user,
        used.children_system - before.children_system,
    ]
    assert sum(seconds) < 6  # with the start
    assert used.user - before.user < 0.3
    assert same_answer(r"\sqrt{12}", r"2\sqrt{3}")  # a new process


@pytest.mark.process
def test_another_process_after_a_kill():
    assert same_answer(r"\sqrt{20}", r"2\sqrt{5}")
    math_process._client.process.send_signal(signal.SIGKILL)
    assert same_answer(r"\sqrt{28}", r"2\sqrt{7}")


@pytest.mark.process
def test_a_program_that_holds_much_memory_keeps_its_process():
    program = (
        "from reasoning import math_process as m; held = bytearray(b'x' * (700 << 20))\n"
        "for k in (1, 2): m.same_expression('x', f'x + {k}'); print(m._client.process.pid)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=DATA.parents[1], capture_output=True, text=True
    )
    first, second = done.stdout.split()
    assert first == second


@pytest.mark.process
def test_a_forked_process_has_its_own():
    assert same_answer(r"\sqrt{44}", r"2\sqrt{11}")
    first = math_process._client.process.pid
    child = os.fork()
    if child == 0:
        right = same_answer(r"\sqrt{52}", r"2\sqrt{13}")
        own = math_process._client.process.pid != first
        math_process._client.close()
        os._exit(0 if right and own else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same_answer(r"\sqrt{68}", r"2\sqrt{17}") and math_process._client.process.pid == first


@pytest.mark.process
def test_it_ends_with_the_program_that_started_it():
    program = (
        "from reasoning import math_process as m; m.same_expression('x', 'x + 1')\n"
        "print(m._client.process.pid, flush=True); input()"
    )
    asking = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=DATA.parents[1],
        text=True,
    )
    pid = int(asking.stdout.readline())
    asking.kill()
    asking.communicate()
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or ") Z " in state.read_text():
            return
        time.sleep(0.1)
    pytest.fail("it goes on")


def test_it_says_so_if_it_cannot_start(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        math_process._Client().ask(b"[1, 2, 3]\n")


# --- long texts ---

PARTS = [
    " ", "1", "(", "{", "[", "\\", "$", "answer is ", "answer: ", "\\boxed{", "\\boxed{1}\n", "\\(",
    "<answer>", "**", "1+", "1,", "- ", "a. ", "√(", "^{\\circ", "\\text{", "$1 ", "\u2028",
]  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_long_texts_take_linear_time(part):
    text = (part * 100_000)[:100_000]
    start = time.process_time()
    extract_answer(text), ends_solution([f"The answer is {text}"]), opens_answer(text)
    same_answer(text, "5"), same_answer(text, text + "1")
    assert time.process_time() - start < 20  # quadratic time is a minute and more


def test_long_integers():
    digits = "1" + "0" * 5000
    assert same_answer(digits, digits) and not same_answer(digits, "1")
    assert extract_answer(f"Answer: {digits}") and not same_answer(digits, digits[:-1])


# --- properties ---

PIECES = st.sampled_from(
    [
        "1",
        "2",
        ".",
        ",",
        "-",
        "/",
        "%",
        "$",
        "x",
        "\\frac",
        "{",
        "}",
        "(",
        ")",
        "\\sqrt",
        "^",
        "_",
        "answer",
        "is",
        ":",
        "\\boxed{",
        "####",
        "**",
        "cm",
        "PM",
        "and",
        "\\text{",
        "=",
        "½",
        "√",
        "答案：",
        "5",
        "May",
        "?",
        " ",
        "\n",
        "Answer: ",
        "The answer is ",
    ]
)
TEXTS = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=12).map("".join))
NUMBERS = st.fractions(-1000, 1000, max_denominator=60)


@pytest.mark.property
@given(TEXTS)
def test_any_text_has_one_answer_or_none(text):
    answer = extract_answer(text)
    assert answer is None or answer.strip()
    assert ends_solution([text]) is (answer is not None)
    step = " ".join(text.split())
    assert not (opens_answer(step) and extract_answer(step))


@pytest.mark.property
@given(TEXTS)
def test_an_answer_equals_itself(text):
    assert same_answer(text, text) is bool(text.strip())


@pytest.mark.property
@given(NUMBERS, NUMBERS)
def test_numbers_are_the_same_if_their_values_are(first, second):
    assert same_answer(str(first), str(second)) is (first == second)
    assert same_answer(
        f"Answer: {first}"[8:], rf"\frac{{{2 * first.numerator}}}{{{2 * first.denominator}}}"
    )
    assert extract_answer(f"So the answer is {first}.") == str(first)


@pytest.mark.property
@given(st.integers(-(10**30), 10**30), st.sampled_from(["dollars", "cm", "apples", "km/h", "%"]))
def test_what_is_written_around_a_number_does_not_count(number, unit):
    forms = [f"{number:,}", f"{number} {unit}", f"${number}$", f"{number}.0", f"**{number}**."]
    assert all(same_answer(form, str(number)) and same_answer(str(number), form) for form in forms)
    assert not any(same_answer(form, str(number + 1)) for form in forms)


@pytest.mark.process
@pytest.mark.property
@given(TEXTS, TEXTS)
def test_equality_is_symmetric(first, second):
    start = time.process_time()
    assert same_answer(first, second) is same_answer(second, first)
    assert time.process_time() - start < 1  # of this process
