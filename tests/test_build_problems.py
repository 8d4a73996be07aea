"""utils/build_problems.py: the held-out files are the committed ones; part of the train split, on request."""

import sys
from pathlib import Path

import pytest

from common.cli import run
from common.files import ROOT, read_records
from reasoning.problems import problems
from reasoning.records import Problem
from reasoning.splits import HELD_OUT
from utils import build_problems


def build(folder: Path, monkeypatch, *args: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["build_problems.py", *args])
    build_problems.main()


def test_held_out_files_are_the_committed_bytes(tmp_path, monkeypatch):
    build(tmp_path, monkeypatch, "--output", "new")
    names = sorted(f"problems_{split}.jsonl" for split in HELD_OUT)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
    for name in names:
        assert (tmp_path / "new" / name).read_bytes() == (ROOT / "data" / name).read_bytes()


def test_a_part_of_train(tmp_path, monkeypatch, capsys):
    build(
        tmp_path,
        monkeypatch,
        "--split",
        "train",
        "--skip",
        "10",
        "--limit",
        "20",
        "--max_events",
        "3",
        "--output",
        "some.jsonl",
    )
    assert capsys.readouterr().out == "wrote 20 problems to some.jsonl\n"
    some = list(read_records(tmp_path / "some.jsonl", Problem))
    whole = problems("train")
    skipped = [next(whole) for _ in range(10)]
    # start, events, question
    expected = [task for task in (next(whole) for _ in range(60)) if task.prompt.count(". ") <= 4][
        :20
    ]
    assert some == expected and not {task.prompt for task in some} & {
        task.prompt for task in skipped
    }


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--limit", "5"], "only with --split train"),
        (["--split", "pretrain"], "argument --split: invalid choice"),
        (["--split", "train", "--limit", "0"], "expected at least 0, 1 and 2"),
        (["--split", "train", "--skip", "20000"], "the train split has 20000 problems"),
        (["--split", "train", "--output", "there.jsonl"], "there.jsonl exists: give --overwrite"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, args, message):
    (tmp_path / "there.jsonl").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        run(lambda: build(tmp_path, monkeypatch, *args))
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there.jsonl"]
