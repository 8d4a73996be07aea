"""Commands that scripts print can be pasted: each is run as it stands, in a folder with a space."""

import itertools
import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import cli
from common.cli import beside, here, unused
from common.files import ROOT, read_records, write_records
from reasoning.problems import problems
from reasoning.records import PreferencePair, Problem, ScoredPair
from tests.helpers import scripts
from tests.helpers.training import STEP_VALUES

PAIR = {"prompt": "Mia has 2 cups.", "chosen": ["Answer: 2"], "rejected": ["Answer: 3"]}
SOLUTION = {"prompt": "p", "completions": ["a\n", "b\n"], "labels": [True, False]}


def paste(line: str, folder: Path, *more: object):
    """Run a printed command in a folder, with more arguments (the last of two equal flags wins)."""
    python, script, *words = shlex.split(line)
    assert Path(python).name.startswith("python")
    path = (folder / script).resolve()
    assert path.is_file(), line
    return scripts.run_script(path.relative_to(ROOT), *words, *more, cwd=folder)


def next_line(printed: str) -> str:
    (line,) = [line for line in printed.splitlines() if line.startswith("next: ")]
    return line.removeprefix("next: ")


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "my data (1)"
    folder.mkdir()
    return folder


@pytest.mark.process
def test_from_a_public_file_to_a_training_by_pasting(folder, tmp_path):
    """prepare_dataset -> build_synthetic_dataset -> evaluate_steps -> train.py dpo"""
    write_records(folder / "my problems.jsonl", itertools.islice(problems("train"), 30))
    given = ("--dataset_name", "my problems.jsonl", "--output", "out put/pre pared.jsonl")
    done = scripts.run_script("utils/prepare_dataset.py", *given, cwd=folder)
    assert done.returncode == 0, done.stderr

    # an output that exists is not the one that the command names
    sampled = shlex.split(next_line(done.stdout))
    sampled = sampled[sampled.index("--output") + 1]
    assert sampled == "out put/pre pared_pairs.jsonl"
    (folder / "out put/pre pared_pairs_scored.jsonl").write_text("mine")
    done = paste(next_line(done.stdout), folder, "--limit", 24, "--samples", 4)
    assert done.returncode == 0, done.stderr
    assert list(read_records(folder / sampled, PreferencePair))

    done = paste(next_line(done.stdout), folder, "--limit", 4)
    assert done.returncode == 0, done.stderr
    scored = folder / "out put/pre pared_pairs_scored_2.jsonl"
    assert len(list(read_records(scored, ScoredPair))) == 4

    small = ("--max_steps", 1, "--logging_steps", 1, "--save_strategy", "no", "--use_cpu", "true")
    outputs = ("--output_dir", tmp_path / "tuned", "--logs_dir", tmp_path / "logs")
    line = next_line(done.stdout)
    assert "saved_model/pre pared_pairs_scored_2" in line
    done = paste(line, folder, *small, *outputs)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tuned/model.safetensors").is_file()


def in_backticks(text: str) -> str:
    (command,) = re.findall(r"`([^`]*python [^`]*)`", text) or re.findall(r"`([^`]+)`", text)
    return command


@pytest.mark.process
@pytest.mark.parametrize(
    ("script", "given", "made"),
    [
        ("reward_model/evaluate_steps.py", ["--input", "no such.jsonl"], "build_synthetic"),
        ("utils/show_tree.py", ["--trees", "no such.jsonl"], "build_mcts"),
        ("train.py", ["dpo", "--dataset_name", "pairs.jsonl"], "evaluate_steps"),
        ("train.py", ["dpo", "--dataset_name", "trl pairs.jsonl"], "prepare_dataset"),
        ("train.py", ["dpo", "--dataset_name", "solutions.jsonl"], "prepare_dataset"),
        ("train.py", ["dpo", "--dataset_name", "problems.jsonl"], "build_synthetic"),
    ],
)
def test_the_command_in_an_error_is_understood_by_its_script(folder, script, given, made):
    """--limit 0 ends the script after its arguments were read, before any work."""
    write_records(folder / "pairs.jsonl", [PAIR])
    messages = {"chosen": PAIR["chosen"][0], "rejected": PAIR["rejected"][0], "prompt": "p"}
    write_records(folder / "trl pairs.jsonl", [messages])
    write_records(folder / "solutions.jsonl", [SOLUTION])
    write_records(folder / "problems.jsonl", [Problem("x", "1")])
    outputs = ["--output_dir", "out"] if script == "train.py" else []
    done = scripts.run_script(script, *given, *outputs, cwd=folder)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    command = in_backticks(done.stderr)
    assert made in command, done.stderr
    tried = paste(command, folder, "--limit", 0)
    assert tried.returncode == 2 and "--limit: expected 1 or more" in tried.stderr, tried.stderr


@pytest.mark.process
def test_scores_of_responses_and_step_values_name_their_training(folder):
    write_records(folder / "values.jsonl", STEP_VALUES)
    given = ("--dataset_name", "values.jsonl", "--to", "step_values", "--output", "o v.jsonl")
    done = scripts.run_script("utils/prepare_dataset.py", *given, cwd=folder)
    assert "train.py prm --dataset_name 'o v.jsonl'" in next_line(done.stdout)
    rows = [{"prompt": "x", "answer": answer} for answer in ("Answer: 1", "Step 1: no")]
    write_records(folder / "rows.jsonl", rows)
    given = ("pairs", "--scorer", ROOT / "models/reward-mini", "--input", "rows.jsonl")
    script = "reward_model/score_responses.py"
    scored = scripts.run_script(script, *given, "--output", "p q.jsonl", cwd=folder)
    assert scored.returncode == 0, scored.stderr
    for printed in (done.stdout, scored.stdout):
        tried = paste(next_line(printed), folder, "--limit", 0)
        assert tried.returncode == 2 and "--limit: expected 1 or more" in tried.stderr


def test_a_command_is_that_of_the_folder_where_the_user_is(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_python", lambda: "python")
    monkeypatch.chdir(ROOT)
    assert here("make data") == "make data"
    assert here("python train.py dpo", "--x", "a b", 3) == "python train.py dpo --x 'a b' 3"
    monkeypatch.chdir(ROOT / "utils")
    assert here("make data") == "make -C .. data"
    assert here("python train.py") == "python ../train.py"
    monkeypatch.chdir(tmp_path)
    (_, script) = shlex.split(here("python utils/demo.py"))
    assert Path(script).resolve() == ROOT / "utils/demo.py"


def test_outputs_that_do_not_exist(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    assert unused(path) == str(path) and beside(path, "pairs") == str(tmp_path / "x_pairs.jsonl")
    path.touch()
    (tmp_path / "x_2.jsonl.gz").touch()
    (tmp_path / "x_pairs.jsonl").mkdir()
    assert unused(path) == str(tmp_path / "x_3.jsonl.gz")
    assert beside(path, "pairs") == str(tmp_path / "x_pairs_2.jsonl")


@pytest.mark.property
@given(st.lists(st.text(), max_size=4))
def test_every_argument_stays_one_word(words):
    assert shlex.split(here("python train.py dpo", *words))[3:] == words
