"""utils/demo.py at a tiny size: the whole loop, and nothing but its own folder is touched."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest

from common.files import write_records
from tests.helpers.scripts import ROOT, run_script
from utils.demo import before_and_after, example, own_model

ROW = {
    "prompt": "Mia has 3 apples. She gets twice as many. How many apples does Mia have now?",
    "answer": "6",
    "base_steps": ["Step 1: 3 + 2 = 5", "Answer: 5"],
    "base_scores": [0.02, 0.01],
    "tuned_steps": ["Step 1: 3 * 2 = 6", "Step 2: \x1b[2J", "Answer: 6"],
    "tuned_scores": None,
}


def test_the_example_is_one_that_training_fixed(tmp_path):
    wrong = {**ROW, "tuned_steps": ROW["base_steps"]}
    silent = {**ROW, "base_steps": [], "tuned_steps": []}
    path = tmp_path / "answers.jsonl"
    write_records(path, [silent, wrong, ROW])
    assert example(path)["tuned_steps"] == ROW["tuned_steps"]
    write_records(path, [silent, wrong])
    assert example(path)["base_steps"] == []


def test_both_answers_stand_side_by_side():
    lines = before_and_after(ROW).splitlines()
    assert lines[0].strip() == ROW["prompt"]
    assert lines[2:] == [
        "    before                       after",
        "    Step 1: 3 + 2 = 5  [0.02]    Step 1: 3 * 2 = 6",
        "    Answer: 5          [0.01]    Step 2: \\x1b[2J",
        "                                 Answer: 6",
    ]
    nothing = {**ROW, "base_steps": [], "base_scores": []}
    assert before_and_after(nothing).splitlines()[2:4] == [
        "    before    after",
        "              Step 1: 3 * 2 = 6",
    ]


@pytest.mark.process
@pytest.mark.slow
def test_the_last_commands_train_another_model(tmp_path):
    """As they are pasted, at a tiny size."""
    models = ROOT / "models/policy-mini", ROOT / "models/judge-mini"
    sizes = (["--limit", 40], ["--limit", 8], ["--max_steps", 1])
    commands = [shlex.split(line) for line in own_model(*map(str, models))]
    moved = {word: str(tmp_path / Path(word).name) for line in commands for word in line
             if "mine_" in word or "_trained" in word}  # fmt: skip
    assert len(moved) == 3
    for (_, script, *words), size in zip(commands, sizes, strict=True):
        words = [moved.get(word, word) for word in words]
        done = run_script(Path(script).resolve(), *words, *size, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "\r" not in done.stderr and "%|" not in done.stderr
    assert (tmp_path / "policy-mini_trained/adapter_config.json").is_file()


@pytest.mark.process
@pytest.mark.slow
def test_the_demo_writes_into_its_own_folder_alone(tmp_path):
    """In a copy of the repository without its history, in which a user has results."""
    ignored = shutil.ignore_patterns(".git", ".venv", "saved_model", "logs", "results")
    repo = shutil.copytree(ROOT, tmp_path / "repo", ignore=ignored)
    own = [repo / "evaluation/results/mine.json", repo / "saved_model/stepwise_dpo_tinyllama/mine"]
    for path in own:
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    before = {path for path in repo.rglob("*") if "__pycache__" not in path.parts}
    sizes = ("--problems", 40, "--test_problems", 8)
    done = run_script(repo / "utils/demo.py", *sizes, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "| accuracy" in done.stdout and "Now your own model" in done.stdout
    assert done.stdout.count("$ python") + done.stdout.count(f"$ {sys.executable}") == 5 + 3 + 1
    # a log has no bars
    assert "\r" not in done.stdout + done.stderr and "%|" not in done.stderr, done.stderr
    page = repo / "data/demo/results/report.html"
    *_, shown = done.stdout.splitlines()[-1].rpartition(": ")
    assert page.is_file() and (tmp_path / shown).samefile(page)
    new = {path for path in repo.rglob("*") if "__pycache__" not in path.parts} - before
    assert all(path.is_relative_to(repo / "data/demo") for path in new), new
    assert (repo / "data/demo/results/reward_score_comparison.json").is_file()
    assert [path.read_text() for path in own] == ["mine", "mine"]
