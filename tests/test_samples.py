"""Samples with verdicts: what the grader says, which three are shown, where they are saved."""

import json

import pytest

from common.errors import UserError
from reasoning.grading import graded
from reasoning.records import Problem
from reasoning.samples import Sample, samples_file, show_samples, three

PROBLEM = Problem("Mia has 2 apples. ...?", "10")


@pytest.mark.parametrize(
    ("steps", "ended", "problem", "verdict", "stated"),
    [
        (["Step 1: 5 * 2 = 10", "Answer: 10"], True, PROBLEM, "right", "10"),
        (["Answer: 7"], True, PROBLEM, "wrong", "7"),
        (["So she has 10 apples"], True, PROBLEM, "no answer", None),
        (["Answer: 10"], False, PROBLEM, "cut", "10"),
        ([], True, PROBLEM, "empty", None),
        (["Answer: 7"], True, None, "not graded", "7"),
    ],
)
def test_verdicts(steps, ended, problem, verdict, stated):
    sample = graded(PROBLEM.prompt, steps, ended, problem)
    assert (sample.verdict, sample.stated) == (verdict, stated)
    assert sample.reference == (problem.answer if problem else None)


def test_three_of_different_verdicts_come_first():
    made = [Sample(f"p {k}", [], verdict) for k, verdict in enumerate(["wrong"] * 5 + ["cut"])]
    assert three(made) == [made[0], made[5], made[1]]
    assert three(made[:2]) == made[:2] and three([]) == []


def test_what_is_shown_and_saved(tmp_path, capsys):
    steps = ["Step 1: 1", "Answer: \x1b[31m7" + "7" * 100]
    prompts = [PROBLEM.prompt, "another", "a third", "a fourth", "another"]
    samples = [graded(prompt, steps, True, PROBLEM, scores=[0.5, 0.25]) for prompt in prompts]
    path = samples_file(tmp_path / "pairs.jsonl.gz", overwrite=False)
    show_samples(samples, path)
    shown = capsys.readouterr().out
    for part in ("'Mia has 2 apples. ...?'", "(of 2)", "wrong; it states", "0.500 0.250", "'10'"):
        assert part in shown, shown
    assert "\x1b" not in shown and "what to do: the problems are too hard" in shown
    assert path == tmp_path / "pairs.samples.jsonl" and str(path) in shown
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 3 and rows[0]["steps"] == steps and rows[0]["verdict"] == "wrong"
    assert samples_file(tmp_path / "pairs.jsonl", overwrite=False) == path  # its own file


@pytest.mark.parametrize("content", ['{"prompt": "x"}\n', "[1]\n", "no JSON", "1\n"])
def test_a_users_file_of_that_name_is_not_replaced(tmp_path, content):
    (tmp_path / "pairs.samples.jsonl").write_text(content)
    with pytest.raises(UserError, match="exists"):
        samples_file(tmp_path / "pairs.jsonl", overwrite=False)


def test_no_samples_print_nothing(tmp_path, capsys):
    show_samples([], tmp_path / "x")
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())
