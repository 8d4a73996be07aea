"""Public data sets become records: rows of each shape (tests/data), and files of each type."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from common.errors import RecordError
from common.files import read_rows, write_records
from lm.text_encoding import encode_steps, response_pieces
from reasoning.datasets.files import Dropped, is_local, load_rows
from reasoning.datasets.loading import (
    find_shape,
    load_pairs,
    load_problems,
    load_step_labels,
    load_step_values,
)
from reasoning.datasets.shapes import KINDS, SHAPES, three_columns
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
    "math.jsonl": ("MATH", {"problems": (2, {"problems without a final answer": 1})}),
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
        {"pairs": (2, {"pairs with an empty 'rejected'": 1}), "problems": (3, {})},
    ),
    "trl_preference.jsonl": (
        "TRL preference",
        {"pairs": (1, {"pairs with an empty 'rejected'": 1})},
    ),
    "trl_conversational.jsonl": (
        "TRL preference",
        {"pairs": (1, {"prompts of more than one turn": 1})},
    ),
    "trl_implicit.jsonl": ("TRL preference", {"pairs": (2, {})}),
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
        "/rows.json, row 2",
        "/lines.json:2",
    ]
    assert wheres[-1].endswith("test.csv:3")  # the row's last line: its answer has two
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
    "no final answer": (
        GSM,
        {**GSM, "answer": "a\nb"},
        "rows.jsonl:2: field 'answer': no final answer",
    ),
    "missing field": (
        GSM,
        {"question": "x"},
        "rows.jsonl:2: field 'answer' is missing in a file of GSM8K (question, answer)",
    ),
    "empty question": (
        GSM,
        {**GSM, "question": " "},
        "rows.jsonl:2: field 'question': expected a text, got an empty one",
    ),
    "no object": (GSM, [1], "rows.jsonl:2: expected a JSON object, got [1]"),
    "unknown shape": (
        {"text": "x", "n": 1},
        GSM,
        "rows.jsonl:1: fields text, n are of no known shape; known: Step-DPO (prompt, ",
    ),
    "ranked answers": ({"prompt": "x", "answer": "y", "rank": 1}, GSM, "of no known shape"),
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
    "problem": (
        PRM,
        {**PRM, "question": {}},
        "rows.jsonl:2: field 'question.problem': expected a text, got nothing",
    ),
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
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_one_line_with_file_and_line(tmp_path, monkeypatch, name):
    good, bad, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (good, bad)))
    with pytest.raises(RecordError) as error:
        kind = next(iter(find_shape("rows.jsonl").gives))
        list(LOAD[kind]("rows.jsonl"))
    assert (
        message in str(error.value)
        and str(error.value).startswith("rows.jsonl:")
        and "\n" not in str(error.value)
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "none.jsonl not found"),
        ("empty.jsonl", b"", "empty.jsonl: no rows"),
        ("list.json", b"[]", "list.json: no rows"),
        ("torn.json", b'[{"question": ', "torn.json: not JSON"),
        ("torn.jsonl", b'{"question": ', "torn.jsonl:1: not JSON"),
        (
            "cells.csv",
            b"question,answer\na,b\nc\n",
            "cells.csv:3: expected 2 cells, as in the first line",
        ),
        ("latin.csv", b"question,answer\na,\xe9\n", "not CSV in UTF-8"),
        ("torn.csv.gz", b"question", "torn.csv.gz: not a complete gzip file"),
        (
            "torn.json.gz",
            gzip.compress(b"[]", mtime=0)[:9],
            "torn.json.gz: not a complete gzip file",
        ),
        ("torn.parquet", b"PAR1", "torn.parquet: cannot be read as Parquet"),
        ("rows.xlsx", b"x", "rows.xlsx: expected one of .jsonl"),
        ("folder/notes.txt", b"x", "folder: no .jsonl, .json, .csv, .parquet file in this folder"),
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
