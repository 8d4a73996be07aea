"""utils/build_problems.py: held-out files equal the committed ones; parts of the train split."""

import itertools
import sys
from pathlib import Path

import pytest

from common.cli import run
from common.files import ROOT, read_records
from common.outputs import release
from reasoning.problems import SPLITS, problems
from reasoning.records import Problem
from reasoning.splits import HELD_OUT
from utils import build_problems


def build(folder: Path, monkeypatch, *args: object) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["build_problems.py", *map(str, args)])
    build_problems.main()
    release()


@pytest.mark.process
def test_held_out_files_are_the_committed_bytes(tmp_path, monkeypatch):
    build(tmp_path, monkeypatch, "--output", "new")
    files = {split: tmp_path / "new" / f"problems_{split}.jsonl" for split in HELD_OUT}
    assert sorted((tmp_path / "new").iterdir()) == sorted(files.values())
    for split, file in files.items():
        assert file.read_bytes() == (ROOT / "data" / file.name).read_bytes()
        assert sum(1 for _ in read_records(file, Problem)) == SPLITS[split][2]


def test_a_part_of_train(tmp_path, monkeypatch, capsys):
    selected = ("--split", "train", "--skip", 10, "--limit", 20, "--max_events", 3)
    for name in ("some.jsonl", "some.jsonl.gz"):
        build(tmp_path, monkeypatch, *selected, "--output", name)
        assert capsys.readouterr().out == f"wrote 20 problems to {name}\n"
        first = list(itertools.islice(problems("train"), 70))
        # sentences: the start, the events and the question
        short = [problem for problem in first[10:] if problem.prompt.count(". ") <= 4]
        assert list(read_records(tmp_path / name, Problem)) == short[:20]


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
