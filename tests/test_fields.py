"""The fields of a data set of one's own: --prompt_field, --chosen_field and the others."""

import csv
import json
from pathlib import Path

import pytest

from common.errors import RecordError, UserError
from common.files import read_records, write_records
from reasoning.datasets.files import Dropped, FieldArgs, check_no_fields, load_rows
from reasoning.datasets.loading import find_shape, load_groups, load_pairs, load_problems
from reasoning.datasets.selection import select_problems
from reasoning.records import PreferencePair
from tests.helpers.mains import call_main
from utils import prepare_dataset

BETTER, WORSE = "Step 1: 3 + 4 = 7\nAnswer: 7", "Step 1: 3 + 4 = 8\nAnswer: 8"
OWN = {"Task": {"Text": "3 + 4 = ?"}, "good": BETTER, "bad": WORSE, "gold": 7, "answer": "no"}
PAIRS = {"prompt": "Task.Text", "chosen": "good", "rejected": "bad"}


@pytest.fixture
def own(tmp_path) -> str:
    write_records(tmp_path / "own.jsonl", [OWN, OWN | {"Task": {"Text": "3 + 5 = ?"}}])
    return str(tmp_path / "own.jsonl")


def test_pairs_and_problems_of_other_fields(own):
    pair = next(load_pairs(own, fields=PAIRS))
    assert (pair.prompt, pair.chosen, pair.rejected) == (
        "3 + 4 = ?",
        BETTER.split("\n"),
        WORSE.split("\n"),
    )
    problems = list(load_problems(own, fields={"prompt": "Task.Text", "answer": "gold"}))
    # the column that has our name is replaced
    assert [(p.prompt, p.answer) for p in problems] == [("3 + 4 = ?", "7"), ("3 + 5 = ?", "7")]
    (_, group), _ = load_groups(own, fields=PAIRS)
    assert group.prompt == "3 + 4 = ?" and len(group.answers) == 2
    assert "pairs" in find_shape(own, fields=PAIRS).gives


def test_fields_of_a_table_in_any_case(tmp_path):
    with open(tmp_path / "own.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["My Question", "Gold.Value"], ["3 + 4 = ?", "7"]])
    (problem,) = load_problems(
        str(tmp_path / "own.csv"), fields={"prompt": "My Question", "answer": "Gold.Value"}
    )
    assert (problem.prompt, problem.answer) == ("3 + 4 = ?", "7")


def test_a_field_that_is_not_there_is_named(own):
    with pytest.raises(RecordError, match=r"own.jsonl:1: argument --chosen_field: no field 'x'"):
        next(load_pairs(own, fields=PAIRS | {"chosen": "x"}))
    with pytest.raises(RecordError, match=r"--prompt_field: no field 'task.words'; its fields are"):
        next(load_rows(own, fields={"prompt": "task.words"}))


def test_a_later_row_without_the_field_is_left_out_and_counted(tmp_path):
    rows = [{"q": f"{k} + 4 = ?", "a": str(k + 4)} for k in range(4)]
    del rows[2]["a"]
    write_records(tmp_path / "own.jsonl", rows)
    dropped = Dropped()
    fields = {"prompt": "q", "answer": "a"}
    found = list(load_problems(str(tmp_path / "own.jsonl"), dropped=dropped, fields=fields))
    assert [problem.answer for problem in found] == ["4", "5", "7"] and sum(dropped.values()) == 1


def test_without_the_arguments_nothing_is_renamed(own):
    assert next(load_rows(own)) == next(load_rows(own, fields={}))
    args = FieldArgs(prompt_field="q")
    assert (args.field_names, args.field_flags) == ({"prompt": "q"}, ["--prompt_field", "q"])
    check_no_fields(FieldArgs())
    with pytest.raises(UserError, match="--prompt_field: goes with a data set of your own"):
        check_no_fields(args)


def test_scripts_take_them(own, tmp_path, monkeypatch, capsys):
    output = tmp_path / "pairs.jsonl"
    flags = [f"--{ours}_field={theirs}" for ours, theirs in PAIRS.items()]
    given = ("--dataset_name", own, "--output", output, "--test_size", 0, *flags)
    code, _, err = call_main(prepare_dataset.main, *given, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0, err
    prompts = [pair.prompt for pair in read_records(output, PreferencePair)]
    assert prompts == ["3 + 4 = ?", "3 + 5 = ?"]
    fields = FieldArgs(prompt_field="Task.Text", answer_field="gold")
    assert [p.answer for p in select_problems(own, None, 9, fields)] == ["7", "7"]
    fields = FieldArgs(prompt_field="Task.Text")
    found = select_problems(own, None, 9, fields, with_answers=False)
    assert [p.prompt for p in found] == prompts
    with pytest.raises(UserError, match="--prompt_field: goes with a data set of your own"):
        select_problems(None, None, 9, fields)
    assert json.loads(Path(own).read_text().splitlines()[0]) == OWN
