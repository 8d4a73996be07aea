"""Records: what is written reads back, and a wrong row is named with file, line and field."""

import json
from pathlib import Path

import pytest

from common.errors import RecordError
from common.files import read_records, to_line, write_records
from reasoning.records import LabelledSolution, PreferencePair, Problem, ScoredPair, StepValue

ROOT = Path(__file__).resolve().parents[1]
PAIR = {"prompt": "2 + 2?", "chosen": ["2 + 2 = 4", "Answer: 4"], "rejected": ["Answer: 5"]}
SCORED = {**PAIR, "chosen_scores": [1, 0.5], "rejected_scores": [0.0]}


def test_round_trip(tmp_path):
    pair = PreferencePair.from_row({**SCORED, "prefix": ["so 🍎"]})
    assert write_records(tmp_path / "new" / "pairs.jsonl", [pair, pair]) == 2
    assert (
        list(read_records(tmp_path / "new" / "pairs.jsonl", ScoredPair))
        == [ScoredPair(**vars(pair))] * 2
    )
    assert "🍎" in (tmp_path / "new" / "pairs.jsonl").read_text()


def test_examples_are_read():
    pairs = list(read_records(ROOT / "data/examples.jsonl", PreferencePair))
    assert len(pairs) == 15 and sum(bool(pair.prefix) for pair in pairs) == 2


BAD = {
    "not an object": ([1], "expected a JSON object, got a list"),
    "missing field": ({"prompt": "x", "chosen": ["a"]}, "field 'rejected' is missing"),
    "wrong type": ({**PAIR, "prompt": 3}, "field 'prompt': expected a text, got the number 3"),
    "empty prompt": ({**PAIR, "prompt": "  "}, "field 'prompt': expected a text, got an empty one"),
    "steps are no list": ({**PAIR, "chosen": "a"}, "field 'chosen': expected a list, got a text"),
    "no steps": ({**PAIR, "rejected": []}, "field 'rejected': expected at least one step"),
    "empty step": (
        {**PAIR, "chosen": ["a", " "]},
        "field 'chosen', step 2: expected a text, got an empty one",
    ),
    "step is no text": (
        {**PAIR, "chosen": [None]},
        "field 'chosen', step 1: expected a text, got null",
    ),
    "half a surrogate": (
        {**PAIR, "prompt": "\ud800"},
        "field 'prompt': expected a text, got half of a Unicode",
    ),
    "unequal lengths": (
        {**SCORED, "chosen_scores": [1]},
        "field 'chosen_scores': expected one score for each of 2 steps, got 1",
    ),
    "score too large": (
        {**SCORED, "rejected_scores": [1.2]},
        "field 'rejected_scores', item 1: expected a score from 0 to 1, got",
    ),
    "score is nan": (
        {**SCORED, "rejected_scores": [float("nan")]},
        "expected a score from 0 to 1, got the number nan",
    ),
    "score is a truth": (
        {**SCORED, "rejected_scores": [True]},
        "expected a score from 0 to 1, got true or false",
    ),
    "one side scored": ({**PAIR, "chosen_scores": [1, 1]}, "expected both or neither"),
    "not scored": (PAIR, "field 'chosen_scores' is missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_broken_row_says_file_line_field_and_what_was_expected(tmp_path, name):
    row, message = BAD[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(to_line(SCORED) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(RecordError) as error:
        list(read_records(path, ScoredPair))
    assert (
        str(error.value).startswith(f"{path}:3: ")
        and message in str(error.value)
        and "\n" not in str(error.value)
    )


def test_problem_rows():
    row = {
        "prompt": "x",
        "answer": "4",
        "steps": ["2 + 2 = 4", "Answer: 4"],
        "traps": [True, False],
    }
    assert Problem.from_row(row) == Problem(**row)
    with pytest.raises(RecordError, match="field 'traps': expected one for each of 2 steps, got 1"):
        Problem.from_row({**row, "traps": [True]})
    with pytest.raises(RecordError, match="field 'answer': expected a text, got the number 4"):
        Problem.from_row({**row, "answer": 4})


def test_step_values_and_labelled_solutions():
    value = {"prompt": "x", "prefix": ["a"], "step": "b", "score": 0.25, "rollouts": 8, "visits": 3}
    assert (
        StepValue.from_row(value) == StepValue(**value)
        and StepValue.from_row({**value, "prefix": None}).prefix == []
    )
    solution = {"prompt": "x", "steps": ["a", "b"], "labels": [1, None], "final_correct": False}
    assert LabelledSolution.from_row(
        json.loads(to_line(LabelledSolution(**solution)))
    ) == LabelledSolution(**solution)
    for kind, row, message in [
        (
            StepValue,
            {**value, "score": None},
            "field 'score': expected a score from 0 to 1, got null",
        ),
        (
            StepValue,
            {**value, "score": 1.5},
            "field 'score': expected a score from 0 to 1, got the number 1.5",
        ),
        (
            StepValue,
            {**value, "rollouts": -1},
            "field 'rollouts': expected a whole number from 0 on",
        ),
        (
            LabelledSolution,
            {**solution, "labels": [1]},
            "field 'labels': expected one label for each of 2 steps, got 1",
        ),
        (
            LabelledSolution,
            {**solution, "labels": [1, 2]},
            "field 'labels', item 2: expected a label from 0 to 1 or null",
        ),
        (
            LabelledSolution,
            {**solution, "final_correct": "no"},
            "field 'final_correct': expected true or false, got a text",
        ),
    ]:
        with pytest.raises(RecordError, match=message):
            kind.from_row(row)
