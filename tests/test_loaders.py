"""Public data sets become records: rows of each shape (tests/data), and files of each type."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from common.errors import RecordError
from common.files import read_rows, write_records
from lm.text_encoding import encode_steps, response_pieces
from reasoning.datasets.files import Dropped, folder_files, is_local, load_rows, split_of
from reasoning.datasets.loading import (
    find_shape,
    load_groups,
    load_pairs,
    load_problems,
    load_step_labels,
    load_step_values,
    problems_of,
)
from reasoning.datasets.shapes import KINDS, SHAPES
from reasoning.datasets.step_shapes import three_columns
from reasoning.records import LabelledSolution, PreferencePair, Problem, StepValue
from reasoning.steps import split_steps, split_text

DATA = Path(__file__).parent / "data"
MIA = "Mia has 12 apples. She buys 14 more. Soon there are 2 times as many. How many has she now?"
LOAD = {
    "problems": load_problems,
    "pairs": load_pairs,
    "step_labels": load_step_labels,
    "step_values": load_step_values,
}

# file -> its shape, and for each kind of record: how many come out, what is dropped
FILES = {
    "gsm8k.jsonl": ("GSM8K", {"problems": (4, {})}),
    "math.jsonl": ("MATH", {"problems": (2, {"problems without a checkable answer": 1})}),
    "numina.jsonl": ("MATH", {"problems": (2, {"problems without a checkable answer": 2})}),
    "svamp.csv": (
        "SVAMP",
        {
            "problems": (
                3,
                {
                    "problems whose answer is not the value of their equation": 1,
                    "problems whose equation divides by zero": 1,
                    "problems whose equation is no plain arithmetic": 1,
                },
            )
        },
    ),
    "mawps.csv": (
        "number placeholders",
        {
            "problems": (
                3,
                {
                    "problems whose answer is not the value of their equation": 1,
                    "problems whose equation is no plain arithmetic": 1,
                    "rows with a wrong 'numbers'": 1,
                },
            )
        },
    ),
    "mawps_hub.jsonl": ("number placeholders", {"problems": (2, {})}),
    "asdiv.xml": (
        "ASDiv",
        {"problems": (5, {"problems whose answer is not the value of their equation": 1})},
    ),
    "calc_x.jsonl": ("Calc-X", {"problems": (2, {})}),
    "big_math.jsonl": ("problem and answer", {"problems": (2, {})}),
    "prm800k.jsonl": (
        "PRM800K",
        {"step_labels": (14, {}), "step_values": (25, {}), "problems": (2, {})},
    ),
    "math_shepherd.jsonl": ("Math-Shepherd", {"step_labels": (3, {}), "step_values": (6, {})}),
    "processbench.json": ("ProcessBench", {"step_labels": (2, {}), "step_values": (4, {})}),
    "trl_stepwise.jsonl": (
        "TRL stepwise supervision",
        {"step_labels": (2, {}), "step_values": (4, {})},
    ),
    "omegaprm.jsonl": (
        "OmegaPRM",
        {"step_values": (6, {"values of a question without a step": 1}), "problems": (1, {})},
    ),
    "step_dpo.jsonl": (
        "Step-DPO",
        {"pairs": (2, {"rows with an empty 'rejected'": 1}), "problems": (3, {})},
    ),
    "trl_preference.jsonl": (
        "TRL preference",
        {"pairs": (1, {"rows with an empty 'rejected'": 1})},
    ),
    "trl_conversational.jsonl": (
        "TRL preference",
        {"pairs": (1, {"prompts of more than one turn": 1})},
    ),
    "trl_implicit.jsonl": ("TRL preference", {"pairs": (2, {})}),
    "ultrafeedback.jsonl": ("TRL preference", {"pairs": (2, {"rows with an empty 'chosen'": 1})}),
    "orca.jsonl": ("TRL preference", {"pairs": (2, {})}),
    "alpaca.json": ("TRL preference", {"pairs": (1, {"rows with an empty 'rejected'": 1})}),
    "hh_rlhf.jsonl": ("TRL preference", {"pairs": (1, {"prompts of more than one turn": 1})}),
    "sharegpt.jsonl": ("TRL preference", {"pairs": (1, {})}),
    "responses.jsonl": ("responses", {"pairs": (1, {})}),
    "ms_swift.jsonl": ("messages", {"pairs": (1, {})}),
    "three_columns.csv": ("three columns", {"step_values": (5, {})}),
}


def steps_of(record) -> list[list[str]]:
    if isinstance(record, PreferencePair):
        return [[*record.prefix, *record.chosen], [*record.prefix, *record.rejected]]
    return [[*record.prefix, record.step]] if isinstance(record, StepValue) else [record.steps]


@pytest.mark.parametrize("name", FILES)
def test_every_shape(name, tokenizer, tmp_path):
    """The number of records; and K steps stay K steps in a file and in a tokenizer."""
    shape, kinds = FILES[name]
    assert find_shape(str(DATA / name)).name == shape
    for kind, (count, drops) in kinds.items():
        dropped = Dropped()
        records = list(LOAD[kind](str(DATA / name), dropped=dropped))
        assert (len(records), dropped) == (count, drops)
        write_records(tmp_path / kind, records)
        assert [KINDS[kind].from_row(row) for _, row in read_rows(tmp_path / kind)] == records
        for record in records:
            for steps in steps_of(record):
                assert split_steps("".join(response_pieces(steps, finished=True))) == steps
                _, step_of = encode_steps(tokenizer, record.prompt, [], steps)
                assert sorted(set(step_of) - {-1}) == list(range(len(steps)))
    for kind in LOAD.keys() - kinds.keys():
        with pytest.raises(RecordError, match=rf"{name}: {shape} \(.*\) gives .*, no "):
            list(LOAD[kind](str(DATA / name)))


def load(kind: str, name: str) -> list:
    return list(LOAD[kind](str(DATA / name)))


def test_gsm8k():
    question = (
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
        "May. How many clips did Natalia sell altogether in April and May?"
    )
    steps = [
        "Step 1: Natalia sold 48/2 = 24 clips in May.",
        "Step 2: Natalia sold 48+24 = 72 clips altogether in April and May.",
    ]
    assert load("problems", "gsm8k.jsonl")[0] == Problem(question, "72", [*steps, "Answer: 72"])


def test_math():
    first, second = load("problems", "math.jsonl")
    assert first.steps == [
        "Step 1: The points differ by $4 - 1 = 3$ in $x$ and by $6 - 2 = 4$ in $y$.",
        r"Step 2: By the theorem of Pythagoras the distance is \[ \sqrt{3^2 + 4^2} = \boxed{5}. \]",
        "Answer: 5",
    ]
    assert second.answer == r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"  # over two lines in the file
    assert [step[:16] for step in second.steps] == [
        "Step 1: Adding b",
        "Step 2: Then $y ",
        "Step 3: The vect",
        "Answer: \\begin{p",
    ]


def test_prm800k():
    """The solution with its human step, then the alternatives; each rating is used once."""
    solutions = load("step_labels", "prm800k.jsonl")
    assert (
        solutions[0].steps[1] == "We have $3p+e=1.24$ and $5p+e=1.82$."
        and solutions[0].labels == [1] * 6
    )
    assert (
        solutions[0].steps[-1] == "That means a pencil costs 29 cents. Answer: 29"
        and solutions[0].final_correct is True
    )
    assert solutions[1].steps == [
        solutions[0].steps[0],
        "The first equation is 3p + e = 124, and the second equation is 5p + e = 182.",
    ]
    assert solutions[1].labels == [None, 0] and solutions[1].final_correct is None
    stopped = solutions[10]  # labelled up to the first error; the steps behind it are there
    assert stopped.labels == [1] * 6 + [0] + [None] * 6 and stopped.final_correct is False
    assert stopped.steps[-1] == "Answer: 7200"
    rows = [row for _, row in load_rows(str(DATA / "prm800k.jsonl"))]
    steps = [step for row in rows for step in row["label"]["steps"]]
    ratings = Counter(
        completion["rating"] >= 0 for step in steps for completion in step["completions"]
    )
    labels = Counter(
        label == 1 for solution in solutions for label in solution.labels if label is not None
    )
    assert labels == ratings + Counter({True: 1})  # and the human step


def test_math_shepherd():
    right, wrong, latex = load("step_labels", "math_shepherd.jsonl")
    assert wrong == LabelledSolution(
        MIA,
        [
            "Step 1: Mia has 12 + 14 = 26 apples.",
            "Step 2: She then has 26 + 2 = 28 apples. The answer is: 28",
        ],
        [1.0, 0.0],
        False,
    )
    assert right.labels == [1, 1] and right.final_correct is True
    assert latex.steps[0] == r"Step 1: Doubling gives $$\begin{pmatrix} 2 & 4 \end{pmatrix}$$"


def test_processbench_and_trl_stepwise():
    first, second = load("step_labels", "processbench.json")
    assert first.labels == [1, 0, None] and first.final_correct is False
    assert second.labels == [1, 1] and second.steps[0] == r"By definition $3! = 3 \cdot 2 \cdot 1$."
    first, second = load("step_labels", "trl_stepwise.jsonl")
    assert first.labels == [1, 0] and second.labels == [1, 0.75] and first.final_correct is None
    assert first.steps == [
        "The whole parts are equal.",
        "Compare 0.8 and 0.11: 11 > 8, so 9.11 is larger.",
    ]
    values = load("step_values", "trl_stepwise.jsonl")
    assert values[1] == StepValue(first.prompt, first.steps[1], 0.0, prefix=first.steps[:1])


def test_step_dpo():
    """The number of the next step moves from the prefix to both sides."""
    first, second = load("pairs", "step_dpo.jsonl")
    assert first == PreferencePair(
        "Tom has 20 coins. He loses 6 coins and finds 9. How many has he now?",
        ["Step 2: He then has 14 + 9 = 23 coins."],
        ["Step 2: He then has 20 + 9 = 29 coins."],
        prefix=["Step 1: After the loss he has 20 - 6 = 14 coins."],
        chosen_scores=[1.0],
        rejected_scores=[0.0],
    )
    assert second.prefix == [] and second.chosen == [
        r"Step 1: Over the denominator 6 this is \[ \frac{3}{6} + \frac{2}{6}. \]"
    ]


def test_trl_preference():
    assert load("pairs", "trl_preference.jsonl") == [
        PreferencePair(
            "Ana has 8 eggs and buys 5. How many?",
            ["Answer: 13"],
            ["Answer: 12"],
            prefix=["Step 1: 8 + 5 = 13"],
        )
    ]
    assert load("pairs", "trl_conversational.jsonl") == [
        PreferencePair(
            "You count.\n\nHow many legs have 3 cats?",
            ["3 * 4 = 12", "Answer: 12"],
            ["3 + 4 = 7", "Answer: 7"],
            prefix=["A cat has 4 legs."],
        )
    ]
    assert load("pairs", "trl_implicit.jsonl") == [
        PreferencePair("2 + 2?", ["Answer: 4"], ["Answer: 5"]),
        PreferencePair("The sky is", ["blue."], ["green."]),
    ]


QUESTION = "A crate holds 6 jars. How many do 4 crates hold?"
SYSTEM = f"You count.\n\n{QUESTION}"
PROMPTS = {
    "ultrafeedback.jsonl": [QUESTION, SYSTEM],
    "orca.jsonl": [SYSTEM, QUESTION],
    "alpaca.json": ["Multiply the numbers.\n4 and 6"],
    "hh_rlhf.jsonl": [QUESTION],
    "sharegpt.jsonl": [SYSTEM],
    "responses.jsonl": [QUESTION],
    "ms_swift.jsonl": [SYSTEM],
}


@pytest.mark.parametrize("name", PROMPTS)
def test_preferences_as_they_are_published(name):
    """The prompt comes from the column or the turns that hold it, for pairs and for groups."""
    pairs = load("pairs", name)
    assert [pair.prompt for pair in pairs] == PROMPTS[name]
    for pair in pairs:
        sides = (["4 * 6 = 24", "Answer: 24"], ["4 + 6 = 10", "Answer: 10"])
        assert (pair.prefix, pair.chosen, pair.rejected) == ([], *sides)
    groups = [group for _, group in load_groups(str(DATA / name))]
    assert [group.prompt for group in groups] == PROMPTS[name]
    assert groups[0].answers == ["4 * 6 = 24\nAnswer: 24", "4 + 6 = 10\nAnswer: 10"]


def test_problems_as_they_are_published():
    assert [problem.answer for problem in load("problems", "numina.jsonl")] == ["24", "none"]
    assert [problem.answer for problem in load("problems", "big_math.jsonl")] == ["24", "10"]


def test_equations_become_steps():
    assert load("problems", "svamp.csv") == [
        Problem(QUESTION, "24", ["Step 1: 6 * 4 = 24", "Answer: 24"]),
        Problem(
            "Bo had 15 pears. He ate 3 and shared the others with 3 friends, "
            "How many pears did each of the 4 get?",
            "3",
            ["Step 1: 15 - 3 = 12", "Step 2: 12 / 4 = 3", "Answer: 3"],
        ),
        # 10 / 3 = 3.33 would not be true
        Problem("Ten kites hang on 3 hooks. How many kites hang on each hook?", "3 1/3"),
    ]
    assert load("problems", "mawps.csv") == [
        Problem(
            "Pia had 17 pens and 4 caps. She didn't keep 9 of the pens, so how many pens are in "
            "Pia's box?",
            "8",
            ["Step 1: 17 - 9 = 8", "Answer: 8"],
        ),
        Problem(
            "The boys' team paid $ 2.5 for each of 4 caps and 3 balls at $ 1.25. How much did they "
            "pay?",
            "13.75",
            [
                "Step 1: 2.5 * 4 = 10",
                "Step 2: 3 * 1.25 = 3.75",
                "Step 3: 10 + 3.75 = 13.75",
                "Answer: 13.75",
            ],
        ),
        Problem("Uma mixed 2/3 cup of milk and 2 1/3 cups of water. How many cups is that?", "3"),
    ]
    assert [problem.steps for problem in load("problems", "mawps_hub.jsonl")] == [
        ["Step 1: 8 + 5 = 13", "Step 2: 13 - 2 = 11", "Answer: 11"],
        ["Step 1: 3 * 400 = 1200", "Answer: 1200"],
    ]
    asdiv = load("problems", "asdiv.xml")
    assert [problem.answer for problem in asdiv] == ["7", "70", "12", "3", "Ada"]
    assert asdiv[1].prompt.startswith("A ferry carries 6 cars & a bus. It sails")
    assert asdiv[1].steps == [
        "Step 1: 6 + 1 = 7", "Step 2: 7 * 5 = 35", "Step 3: 35 * 2 = 70", "Answer: 70"
    ]  # fmt: skip
    assert [bool(problem.steps) for problem in asdiv] == [True, True, False, False, False]
    assert [problem.steps for problem in load("problems", "calc_x.jsonl")] == [
        ["Step 1: 14 - 5 = 9", "Step 2: 9 + 2 = 11", "Answer: 11"],
        [],
    ]
    dropped = Dropped()
    list(load_problems(str(DATA / "asdiv.xml"), dropped=dropped))
    assert dropped.notes["problems without steps: their formula is no plain arithmetic"] == 3


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "not XML (no element found"),
        ("<a><b>", "not XML (no element found"),
        ("<a></a>", "no rows"),
        ("<a><p><q>1</q></p><p><q>2</q></p></a>", "of no known shape"),
    ],
)
def test_xml_that_cannot_be_used(tmp_path, content, expected):
    (tmp_path / "rows.xml").write_text(content)
    with pytest.raises(RecordError, match=re.escape(expected)):
        list(load_problems(str(tmp_path / "rows.xml")))


SIDES = {"chosen": "4 * 6 = 24\nAnswer: 24", "rejected": "4 + 6 = 10\nAnswer: 10"}
PREFERENCES = {
    "another name": ({"frage": QUESTION}, "if it is in 'frage', rename that column"),
    "two parts": (
        {"context": "A crate holds 6 jars.", "question": "4?"},
        "'question' and 'context'",
    ),
    "task and question": (
        {"instruction": "Answer.", "question": "4?"},
        "'question' and 'instruction'",
    ),
    "nothing, and the name of a source": ({"source": "mine"}, "4"),  # guessed
    "part of the question": ({"question": QUESTION, "context": "6 jars"}, QUESTION),
    "prompt and more": ({"prompt": QUESTION, "context": "elsewhere", "question": "4?"}, QUESTION),
    "earlier turns": ({"instruction": QUESTION, "history": [["a", "b"]]}, None),
    "number": ({"prompt": 24}, "24"),
    "messages": ({"messages": [{"role": "user", "content": QUESTION}]}, QUESTION),
    "null, then text": ({"prompt": None, "question": QUESTION}, QUESTION),
    "NaN": ({"prompt": float("nan"), "query": QUESTION}, QUESTION),
    "a transcript": ({"prompt": f"\n\nHuman: {QUESTION}\n\nAssistant:"}, QUESTION),
    "sides repeat it": (
        {"prompt": QUESTION, **{k: f"{QUESTION}\n{v}" for k, v in SIDES.items()}},
        QUESTION,
    ),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_the_prompt_of_a_preference(tmp_path, name):
    """A column that holds the prompt is used, or named in the error; nothing is guessed instead."""
    columns, expected = PREFERENCES[name]
    (tmp_path / "rows.jsonl").write_text(json.dumps({**SIDES, **columns}))
    try:
        (pair,) = load_pairs(str(tmp_path / "rows.jsonl"))
    except RecordError as error:
        assert expected is None or expected in str(error)
    else:
        assert (pair.prompt, pair.chosen[-1]) == (expected, "Answer: 24")


def test_a_guess_and_unused_columns_are_said(tmp_path):
    rows = [{"chosen": "The sky is blue.", "rejected": "The sky is green.", "id": 7}]
    write_records(tmp_path / "rows.jsonl", rows)
    dropped = Dropped()
    (pair,) = load_pairs(str(tmp_path / "rows.jsonl"), dropped=dropped)
    assert pair.prompt == "The sky is"
    assert dropped.report("rows.jsonl") == [
        "1 rows without a prompt: guessed, the words with which both sides begin",
        "columns not used: id",
    ]


NO_ANSWERS = [
    "proof",
    "Proof.",
    "notfound",
    "not found",
    "N/A",
    "n/a",
    "-",
    "--",
    "?",
    "see solution",
]
NO_ANSWERS += [
    "See the proof above"[:13],
    "\\text{proof}",
    "$\\boxed{\\text{N/A}}$",
    "unknown",
    "Q.E.D.",
    "null",
]
NO_ANSWERS += [
    "  ",
    "...",
    "answer not found",
    "[not provided]",
    "\\blacksquare",
    "nan",
    None,
    "none",
]
ANSWERS = [
    "no solution",
    "\\text{no solution}",
    "undefined",
    "does not exist",
    "\\emptyset",
    "0",
    "-5",
]
ANSWERS += [
    "\\{\\}"[:0] or "DNE",
    "\\text{No}",
    "proofreading",
    "x - y",
    "A",
    "\\infty",
    "empty set",
    "None of these",
]


@pytest.mark.parametrize("answer", NO_ANSWERS)
def test_words_in_place_of_an_answer(tmp_path, answer):
    rows = [{"problem": "p?", "solution": "Some words.", "answer": answer}]
    rows += [{"problem": "q?", "solution": "Some words.", "answer": "4"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dropped = Dropped()
    (problem,) = load_problems(str(tmp_path / "rows.jsonl"), dropped=dropped)
    assert problem.answer == "4" and dropped == {"problems without a checkable answer": 1}


@pytest.mark.parametrize("answer", ANSWERS)
def test_words_that_are_an_answer(tmp_path, answer):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"problem": "p?", "answer": answer}))
    (problem,) = load_problems(str(tmp_path / "rows.jsonl"))
    assert problem.answer == answer


def test_none_is_an_answer_where_the_solution_says_so(tmp_path):
    rows = [
        {"problem": "p?", "solution": f"There are {word}.", "answer": "None"}
        for word in ("none", "5")
    ]
    rows += [{"problem": "q?", "answer": "none"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows[:2]))
    assert [problem.answer for problem in load_problems(str(tmp_path / "rows.json"))] == ["None"]
    (tmp_path / "rows.json").write_text(json.dumps(rows[2:]))
    assert [problem.answer for problem in load_problems(str(tmp_path / "rows.json"))] == ["none"]


EMPTY = [None, "", " \n", float("nan"), "null", "NaN", "<NA>", [], "missing"]


@pytest.mark.parametrize("value", EMPTY)
@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("first", [True, False])
def test_an_empty_cell_is_dropped_by_its_name(tmp_path, value, column, first):
    """Wherever the row stands, as null, NaN, white space or missing; in every type of file."""
    good = {"prompt": QUESTION, **SIDES}
    bad = {name: text for name, text in good.items() if value != "missing" or name != column}
    bad |= {column: value} if value != "missing" else {}
    rows = [bad, good] if first else [good, bad]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [tmp_path / "rows.jsonl"]
    if value in (None, ""):
        import pandas as pd

        pd.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
        pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
        files += [tmp_path / "rows.csv", tmp_path / "rows.parquet"]
    for file in files:
        for load_all in (load_pairs, load_groups):
            dropped = Dropped()
            assert len(list(load_all(str(file), dropped=dropped))) == 1
            assert dropped == {f"rows with an empty '{column}'": 1}


def test_omegaprm():
    values = load("step_values", "omegaprm.jsonl")
    assert [value.score for value in values] == [0.0, 0.125, 0.21875, 0.0, 0.21875, 0.34375]
    longer, shorter = values[0], values[1]
    assert (
        shorter.prefix == longer.prefix[: len(shorter.prefix)]
        and shorter.step == longer.prefix[len(shorter.prefix)]
    )
    assert (
        values[1].step == values[4].step
        and values[1].prompt.startswith("Melinda")
        and values[1].prefix[0].startswith("To ")
    )


def test_three_columns():
    """The problem ends before the first line that begins with `Step 1:`; a row reads back."""
    values = load("step_values", "three_columns.csv")
    assert values[0] == StepValue(MIA, "Step 1: 12 + 14 = 26", 0.875)
    assert values[2] == StepValue(
        MIA, "Answer: 28", 0, prefix=["Step 1: 12 + 14 = 26", "Step 2: 26 + 2 = 28"]
    )
    assert values[4] == StepValue(
        "Which is the smallest?\n(a) 3\n(b) 2", "Answer: (b)", 0.5, prefix=['Step 1: "2 < 3"']
    )
    assert (
        three_columns(values[2])["question"] == f"{MIA}\nStep 1: 12 + 14 = 26\nStep 2: 26 + 2 = 28"
    )
    for value in values:
        (back,) = next(shape for shape in SHAPES if shape.name == "three columns").gives[
            "step_values"
        ](three_columns(value), {})
        assert back == value


@pytest.mark.parametrize(
    ("prompt", "prefix"), [("x", ["So 2"]), ("x\nStep 1: add", []), ("Step 1: add", [])]
)
def test_three_columns_refuse_a_value_that_would_read_back_differently(prompt, prefix):
    with pytest.raises(
        RecordError, match=r"expected a first step that begins with 'Step 1:'|field 'prompt'"
    ):
        three_columns(StepValue(prompt, "Answer: 1", 0.5, prefix=prefix))


def test_own_records_and_two_lines_in_a_step(tmp_path):
    rows = {
        "problems": {"prompt": "x", "answer": "4", "steps": ["2 + 2\n= 4", "Answer: 4"]},
        "pairs": {
            "prompt": "x",
            "chosen": ["a\nb"],
            "rejected": ["c"],
            "chosen_scores": [1],
            "rejected_scores": [0.5],
        },
        "step_labels": {"prompt": "x", "steps": ["a\u2028b"], "labels": [None, 1][1:]},
        "step_values": {
            "prompt": "x",
            "prefix": ["p\n\nq"],
            "step": "a\nb",
            "score": 0.5,
            "rollouts": 4,
        },
    }
    for kind, row in rows.items():
        write_records(tmp_path / f"{kind}.jsonl", [row])
        (record,) = LOAD[kind](str(tmp_path / f"{kind}.jsonl"))
        assert all(
            "\n" not in step and "\u2028" not in step
            for steps in steps_of(record)
            for step in steps
        )
    assert record == StepValue("x", "a b", 0.5, prefix=["p q"], rollouts=4)


def test_a_users_own_question_and_answer(tmp_path):
    rows = [
        {"question": "2 + 2?", "answer": "4"},
        {"question": "3?", "answer": "Step 1: 3 = 3\nAnswer: 3"},
    ]
    write_records(tmp_path / "train.jsonl", rows)
    assert list(load_problems(str(tmp_path / "train.jsonl"))) == [
        Problem("2 + 2?", "4"),
        Problem("3?", "3", ["Step 1: 3 = 3", "Answer: 3"]),
    ]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\nmore of one\n\ntwo", ["one more of one", "two"]),
        ("So\n\\[\nx\n\n= 1\n\\]\nthen\n$$\ny\n$$", ["So \\[ x = 1 \\]", "then $$ y $$"]),
        (
            "a\n\\begin{aligned}\nb\n\nc\n\\end{aligned}\nd",
            ["a \\begin{aligned} b c \\end{aligned}", "d"],
        ),
        ("Step 1: a\n\nmore\nStep 2: b\nAnswer: 5", ["Step 1: a more", "Step 2: b", "Answer: 5"]),
        ("a\nb\n\nc\nAnswer: 5", ["a b", "c", "Answer: 5"]),
        ("Let me see.\nStep 1: a\n#### 5", ["Let me see.", "Step 1: a", "#### 5"]),
        (" \n ", []),
    ],
)
def test_split_text(text, steps):
    assert split_text(text) == steps


# --- files ---


def test_files_of_every_type(tmp_path):
    from datasets import Dataset

    rows = [
        {"question": f"{k} + {k}?", "answer": f"{k} + {k} = {2 * k}\n#### {2 * k}"}
        for k in range(3)
    ]
    for name in ("set/data/train-00000-of-00001.parquet", "set/test.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows[:2]).to_parquet(str(tmp_path / "set/data/train-00000-of-00001.parquet"))
    Dataset.from_list(rows[2:]).to_csv(str(tmp_path / "set/test.csv"), index=False)
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = list(load_problems(str(tmp_path / "rows.json")))
    assert [problem.answer for problem in expected] == ["0", "2", "4"]
    assert list(load_problems(str(tmp_path / "lines.json"))) == expected
    assert (
        list(load_problems(str(tmp_path / "set")))
        == list(load_problems(str(tmp_path / "set"), split="train"))
        == expected[:2]
    )
    assert list(load_problems(str(tmp_path / "set"), split="test")) == expected[2:]
    wheres = [
        where
        for name in ("rows.json", "lines.json", "set/test.csv")
        for where, _ in load_rows(str(tmp_path / name))
    ]
    assert [where.removeprefix(str(tmp_path)) for where in wheres[1::3]] == [
        "/rows.json:6",
        "/lines.json:2",
    ]
    assert wheres[-1].endswith("test.csv:2")  # the row's first line
    # compressed files give the same rows as plain ones
    for name in ("rows.json", "lines.json", "set/test.csv"):
        packed = tmp_path / f"{name}.gz"
        packed.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        assert list(load_problems(str(packed))) == list(load_problems(str(tmp_path / name)))
    assert list(load_problems(str(tmp_path / "set"), split="test")) == expected[2:] * 2
    (tmp_path / "set/test.csv").unlink()
    assert list(load_problems(str(tmp_path / "set"), split="test")) == expected[2:]
    assert is_local("rows.jsonl.gz") and is_local("rows.csv.gz") and not is_local("org/rows")
    values = tmp_path / "values.csv"
    values.write_text('prompt,prefix,step,score\nx,"[""a""]",b,0.5\n')
    assert list(load_step_values(str(values))) == [StepValue("x", "b", 0.5, prefix=["a"])]


GSM = {"question": "2 + 2?", "answer": "#### 4"}
PRM = {
    "question": {"problem": "x"},
    "label": {"steps": [{"completions": [{"text": "a", "rating": 1}], "chosen_completion": 0}]},
}


def prm(**step) -> dict:
    return {**PRM, "label": {"steps": [{"completions": [{"text": "a", "rating": 1}], **step}]}}


BAD = {
    "no final answer": (GSM, {**GSM, "answer": "a\nb"}, "problems without a checkable answer"),
    "missing field": (GSM, {"question": "x"}, "problems without a checkable answer"),
    "empty question": (GSM, {**GSM, "question": " "}, "rows with an empty 'question'"),
    "no object": (GSM, [1], "rows.jsonl:2: expected a JSON object, got [1]"),
    "rating": (
        PRM,
        prm(completions=[{"text": "a", "rating": 2}]),
        "rows.jsonl:2: field 'label.steps', step 1: expected a rating of",
    ),
    "choice": (
        PRM,
        prm(chosen_completion=3),
        "step 1: chosen_completion 3 is none of its 1 completions",
    ),
    "completion": (PRM, prm(completions=["a"]), "step 1: expected a completion with a text, got"),
    "problem": (PRM, {**PRM, "question": {}}, "rows with an empty 'question'"),
    "first error": (
        {"problem": "x", "steps": ["a"], "label": 0},
        {"problem": "x", "steps": ["a"], "label": 1},
        "rows.jsonl:2: field 'label': expected -1 or the index of one of 1 steps, got 1",
    ),
    "labels": (
        {"prompt": "x", "completions": ["a"], "labels": [True]},
        {"prompt": "x", "completions": ["a"], "labels": [True, False]},
        "rows.jsonl:2: field 'labels': expected one label for each of 1 steps, got 2",
    ),
    "label": (
        {"prompt": "x", "completions": ["a"], "labels": [True]},
        {"prompt": "x", "completions": ["a"], "labels": ["+"]},
        "rows.jsonl:2: field 'labels': expected true, false, null or a number from 0 to 1, got "
        '"+"',
    ),
    "messages": (
        {"prompt": "x", "chosen": "a", "rejected": "b"},
        {"prompt": "x", "chosen": [{"role": "assistant"}], "rejected": "b"},
        "rows.jsonl:2: field 'chosen': expected a text or messages with role and content",
    ),
    "another question": (
        {"question": "x", "reasoning_steps": [{"solution_prefix": "x\n\na", "mc_value": 1}]},
        {"question": "x", "reasoning_steps": [{"solution_prefix": "y\n\na", "mc_value": 1}]},
        "rows.jsonl:2: field 'reasoning_steps', item 1: its solution_prefix does not begin with "
        "the question",
    ),
    "three columns": (
        {"question": "x", "next_step": "a", "score": "0.5"},
        {"question": "x", "next_step": "a", "score": "good"},
        "rows.jsonl:2: field 'score': expected a score from 0 to 1, got \"good\"",
    ),
    "value": (
        {"question": "x", "reasoning_steps": [{"solution_prefix": "x\n\na", "mc_value": 1}]},
        {"question": "x", "reasoning_steps": [{"solution_prefix": "x\n\na", "mc_value": 2}]},
        "rows.jsonl:2: field 'score': expected a score from 0 to 1, got the number 2",
    ),
    "number of 5,000 digits": (
        GSM,
        {**GSM, "answer": "5000 digits"},
        "rows.jsonl:2: field 'answer'",
    ),
    "score of 400 digits": (
        {"prompt": "x", "step": "a", "score": 1},
        {"prompt": "x", "step": "a", "score": 10**400},
        "field 'score': expected a score from 0 to 1, got a number of too many digits",
    ),
    "label of 400 digits": (
        {"prompt": "x", "completions": ["a"], "labels": [True]},
        {"prompt": "x", "completions": ["a"], "labels": [10**400]},
        "field 'labels': expected true, false, null or a number",
    ),
    "half of a character": (
        GSM,
        {**GSM, "question": "\ud83d?"},
        "field 'prompt': expected a text, got half",
    ),
    "rating that is a list": (
        PRM,
        prm(completions=[{"text": "a", "rating": []}]),
        "expected a rating of",
    ),
    "choice that is a text": (
        PRM,
        prm(chosen_completion="first"),
        'chosen_completion "first" is none of its',
    ),
    "steps that are numbers": (
        PRM,
        {**PRM, "question": {"problem": "x", "pre_generated_steps": 3}},
        "field 'question.pre_generated_steps': expected a list of texts",
    ),
    "step that is a text": (
        PRM,
        {**PRM, "label": {"steps": ["a"]}},
        "step 1: expected an object with completions",
    ),
    "not JSON": (GSM, '{"question": ', "rows.jsonl:2: not JSON (Expecting value at column 13)"),
    "deep": (GSM, "[" * 100_000, "rows.jsonl:2: nested too deeply"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_odd_row_is_left_out_counted_and_shown(tmp_path, monkeypatch, name):
    """The row alone is an error of one line."""
    good, bad, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    line = bad if isinstance(bad, str) else json.dumps(bad)
    line = line.replace('"5000 digits"', "9" * 5000)
    Path("rows.jsonl").write_text(f"{json.dumps(good)}\n{line}\n")
    kind = next(iter(find_shape("rows.jsonl").gives))
    expected = len(list(LOAD[kind]("rows.jsonl")))
    dropped = Dropped()
    assert len(list(LOAD[kind]("rows.jsonl", dropped=dropped))) == expected == 1
    assert (dropped.read, dropped.total()) == (2, 1)
    assert message in "\n".join(dropped.report("rows.jsonl"))
    Path("rows.jsonl").write_text(f"{line}\n{json.dumps(good)}\n")  # the odd row first
    assert len(list(LOAD[kind]("rows.jsonl"))) == 1
    Path("rows.jsonl").write_text(f"{line}\n")
    with pytest.raises(RecordError) as error:
        list(LOAD[kind]("rows.jsonl"))
    assert str(error.value).startswith("rows.jsonl:") and "\n" not in str(error.value)


def test_almost_no_usable_row_is_an_error(tmp_path):
    rows = [{"prompt": "x", "step": "a", "score": 1}] + [
        {"prompt": "x", "step": "a", "score": 7}
    ] * 20
    write_records(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        RecordError, match=r"only 1 of its 21 rows can be used; .*rows.jsonl:2: field"
    ):
        list(load_step_values(str(tmp_path / "rows.jsonl")))
    write_records(tmp_path / "rows.jsonl", rows[:1] * 3 + rows)
    dropped = Dropped()
    assert len(list(load_step_values(str(tmp_path / "rows.jsonl"), dropped=dropped))) == 4
    assert len(dropped.examples) == 3 and dropped.report("x")[-1] == "left out: 17 more odd rows"


@pytest.mark.parametrize("row", [{"text": "x", "n": 1}, {"prompt": "x", "answer": "y", "rank": 1}])
def test_an_unknown_shape_is_one_line(tmp_path, monkeypatch, row):
    monkeypatch.chdir(tmp_path)
    write_records("rows.jsonl", [row])
    fields = ", ".join(row)
    expected = f"rows.jsonl:1: fields {fields} are of no known shape; known: Step-DPO \\(prompt, "
    with pytest.raises(RecordError, match=expected):
        find_shape("rows.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "none.jsonl not found"),
        ("empty.jsonl", b"", "empty.jsonl: no rows"),
        ("list.json", b"[]", "list.json: no rows"),
        ("torn.json", b'[{"question": ', "torn.json:1: not JSON"),
        ("torn.jsonl", b'{"question": ', "torn.jsonl:1: not JSON"),
        ("latin.csv", b"question,answer\na,\xe9\n", "latin.csv:2: not UTF-8 (byte 1 of the line)"),
        (
            "latin.jsonl",
            b'{"question": "\xe9?", "answer": "1"}\n' * 2 + b'{"question": "b?", "answer": "2"}\n',
            "2 of 3 rows are not UTF-8, so the file has another encoding; save it as UTF-8",
        ),
        ("quote.csv", b'question,answer\na,"b\nc,d\n', "quote.csv:2: not CSV: a quote that begins"),
        ("open.json", b'[{"question": "a", "answer": "1"},\n', "the list does not end"),
        ("two.json", b'{"train": [{"a": 1}], "test": [{"a": 1}]}', "holds the lists train, test"),
        ("torn.csv.gz", b"question", "torn.csv.gz: not a complete gzip file"),
        (
            "torn.json.gz",
            gzip.compress(b"[]", mtime=0)[:9],
            "torn.json.gz: not a complete gzip file",
        ),
        ("torn.parquet", b"PAR1", "torn.parquet: cannot be read as Parquet"),
        ("rows.xlsx", b"x", "rows.xlsx: expected one of .jsonl"),
        (
            "folder/notes.txt",
            b"x",
            "folder: no .jsonl, .json, .csv, .xml, .parquet file in this folder",
        ),
        (
            "nobody/nothing",
            None,
            "data set nobody/nothing: not a file, and not available from the hub",
        ),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    with pytest.raises(RecordError) as error:
        list(load_rows("folder" if name.startswith("folder") else name))
    assert message in str(error.value) and "\n" not in str(error.value)


GSM_ROWS = [
    {"question": 'Añade 2 + 2, \n or "more"; ok?', "answer": "2 + 2 = 4\n#### 4"},
    {"question": "3 + 3?", "answer": "#### 6"},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in GSM_ROWS)
WHOLE = json.dumps(GSM_ROWS, indent=1, ensure_ascii=False)


def table(delimiter: str = ",", end: str = "\n", last: str = "") -> str:
    rows = [["question", "answer"], *([f'"{cell}"' for cell in row] for row in CELLS)]
    return "".join(delimiter.join(row) + last + end for row in rows)


CELLS = [[row[name].replace('"', '""') for name in ("question", "answer")] for row in GSM_ROWS]
WRITTEN = {  # name of a file -> its bytes
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "utf16.jsonl": LINES.encode("utf-16"),
    "utf16le.jsonl": LINES.encode("utf-16-le"),
    "utf16be.jsonl": LINES.encode("utf-16-be"),
    "utf32.jsonl": LINES.encode("utf-32"),
    "crlf.jsonl": LINES.replace("\n", "\r\n").encode(),
    "cr.jsonl": LINES.replace("\n", "\r").encode(),
    "blank.jsonl": LINES.replace("\n", "\n\n  \n").encode(),
    "commas.jsonl": LINES.replace("}\n", "},\n").encode(),
    "joined.jsonl": LINES.replace("}\n", "}").encode(),
    "list.jsonl": WHOLE.encode(),
    "one_line_list.jsonl": json.dumps(GSM_ROWS).encode(),
    "list_of_lines.json": f"[\n{LINES.replace('}', '},', 1)}]\n".encode(),
    "trailing_comma.json": WHOLE.replace("\n]", ",\n]").encode(),
    "indented.json": "\n".join(json.dumps(row, indent=4) for row in GSM_ROWS).encode(),
    "bom.json": b"\xef\xbb\xbf" + WHOLE.encode(),
    "utf16.json": WHOLE.encode("utf-16"),
    "data.json": json.dumps({"version": "1", "data": GSM_ROWS}).encode(),
    "train.json": json.dumps({"train": GSM_ROWS}, indent=2).encode(),
    "hub.json": json.dumps({"rows": [{"row_idx": 0, "row": row} for row in GSM_ROWS]}).encode(),
    "bom.csv": b"\xef\xbb\xbf" + table().encode(),
    "utf16.csv": table().encode("utf-16"),
    "crlf.csv": table(end="\r\n").encode(),
    "capitals.csv": table().replace("question,answer", " Question ,ANSWER").encode(),
    "blank.csv": ("\n\n" + table() + "\n,\n").encode(),
    "trailing_comma.csv": table(last=",").encode(),
    "semicolon.csv": table(";").encode(),
    "sep.csv": ("sep=;\r\n" + table(";", "\r\n")).encode(),
    "tab.csv": table("\t").encode("utf-16"),
    "cr.csv": table(end="\r").encode(),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_files_as_editors_spreadsheets_and_tools_write_them(tmp_path, name):
    (tmp_path / name).write_bytes(WRITTEN[name])
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(WRITTEN[name]))
    for path in (tmp_path / name, tmp_path / f"{name}.gz"):
        dropped = Dropped()
        assert [row for _, row in load_rows(str(path), dropped=dropped)] == GSM_ROWS
        assert not dropped


def test_a_damaged_line_does_not_end_the_file(tmp_path):
    good = LINES.encode().splitlines()
    (tmp_path / "rows.jsonl").write_bytes(
        b"\n".join([b'{"question', *good, b"\xff\xfe", b"[1]", b"7"])
    )
    dropped = Dropped()
    assert [row for _, row in load_rows(str(tmp_path / "rows.jsonl"), dropped=dropped)] == GSM_ROWS
    assert (dropped.read, dropped.odd) == (6, 4)
    (tmp_path / "rows.csv").write_text('question,answer\na,b\nc\n"d"e,f\ng,h,i\nj,k\n')
    dropped = Dropped()
    found = [row["question"] for _, row in load_rows(str(tmp_path / "rows.csv"), dropped=dropped)]
    assert found == ["a", "j"] and dropped == {"rows of another form": 3}
    assert dropped.examples[0].endswith("rows.csv:3: 1 cells, the header has 2")


def test_cells_with_lists_and_cells_that_only_look_like_one(tmp_path):
    """JSON, or as pandas writes them; an interval and a set stay texts."""
    sides = [f"[{{'role': 'assistant', 'content': 'Answer: {k}'}}]" for k in (4, 5)]
    (tmp_path / "pairs.csv").write_text(
        f'prompt,chosen,rejected\n2 + 2?,"{sides[0]}","{sides[1]}"\n'
    )
    assert list(load_pairs(str(tmp_path / "pairs.csv"))) == [
        PreferencePair("2 + 2?", ["Answer: 4"], ["Answer: 5"])
    ]
    (tmp_path / "problems.csv").write_text(
        'prompt,answer\na,"[1, 2]"\nb,"{1, 2}"\nc,"[0, 1)"\nd,-5\n'
    )
    answers = [problem.answer for problem in load_problems(str(tmp_path / "problems.csv"))]
    assert answers == ["[1, 2]", "{1, 2}", "[0, 1)", "-5"]
    table = 'prompt,steps,labels,final_correct\nx,"[""a"", ""b""]","[1, null]",True\n'
    (tmp_path / "labels.csv").write_text(table)
    assert list(load_step_labels(str(tmp_path / "labels.csv"))) == [
        LabelledSolution("x", ["a", "b"], [1.0, None], True)
    ]


SPLIT_OF = {
    "train.jsonl": "train",
    "data/train-00000-of-00001.parquet": "train",
    "train/algebra/1.json": "train",
    "train/algebra/test_17.json": "train",
    "MATH/test/algebra/1.json": "test",
    "gsm8k_test.jsonl": "test",
    "Test.csv": "test",
    "validation-00000-of-00002.parquet": "validation",
    "dev.jsonl": "validation",
    "main/test.jsonl.gz": "test",
    "train_test_split/train.csv": "train",
    "latest/rows.jsonl": None,
    "training/contest.jsonl": "train",
    "phase1_train.jsonl": "train",
    "train_prefs-00000.parquet": "train",
}


@pytest.mark.parametrize("name", SPLIT_OF)
def test_the_split_of_a_file(name):
    assert split_of(Path(name)) == SPLIT_OF[name]


def test_the_files_of_a_folder(tmp_path):
    row = {"question": "1 + 1?", "answer": "2"}
    names = [
        "rows.jsonl",
        "algebra/more.jsonl",
        "test/1.jsonl",
        "dev.jsonl",
        ".cache/x/train.jsonl",
    ]
    for name in names:
        write_records(tmp_path / name, [row])

    def files(split: str | None = None) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in folder_files(str(tmp_path), split)]

    assert files() == ["algebra/more.jsonl", "rows.jsonl"]  # no train file; never those of test
    assert files("test") == ["test/1.jsonl"] and files("validation") == files("dev") == [
        "dev.jsonl"
    ]
    assert files("algebra") == ["algebra/more.jsonl"]
    write_records(tmp_path / "train_x.jsonl", [row])
    dropped = Dropped()
    list(load_rows(str(tmp_path), dropped=dropped))
    assert files() == ["train_x.jsonl"] and dropped.notes == {
        "files not read: of split none": 2,
        "files not read: of split test": 1,
        "files not read: of split validation": 1,
    }
    with pytest.raises(RecordError, match="for split 'geometry'"):
        files("geometry")


def test_an_odd_file_of_a_folder_is_left_out(tmp_path):
    """MATH is a file for each problem."""
    for k in range(3):
        problem = {"problem": f"{k} + 1?", "solution": f"\\boxed{{{k + 1}}}"}
        (tmp_path / f"{k}.json").write_text(json.dumps(problem, indent=4))
    (tmp_path / "3.json").write_text('{\n "problem": "3')
    (tmp_path / "4.json").write_text("")
    dropped = Dropped()
    assert len(list(load_problems(str(tmp_path), dropped=dropped))) == 3
    assert dropped.examples[0].startswith(f"{tmp_path}/3.json:2: not JSON")
    assert dropped.examples[1] == f"{tmp_path}/4.json: a file without rows"


def test_problems_of_any_shape_for_an_evaluation(tmp_path, capsys):
    """A published row may be odd; a file of this project's own may not have an odd row."""
    assert len(problems_of(str(DATA / "mawps.csv"), 2)) == 2
    assert len(problems_of(str(DATA / "mawps.csv"))) == 3
    printed = capsys.readouterr().out
    assert "1 rows of" in printed and "field 'numbers': expected a number for every" in printed
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompt": "1 + 1?", "answer": "2"}\n{"prompt": "1 + 2?", "answer": 3}\n')
    assert problems_of(str(own), 1) == [Problem("1 + 1?", "2")]
    with pytest.raises(RecordError, match=r"own.jsonl:2: field 'answer': expected a text"):
        problems_of(str(own))
