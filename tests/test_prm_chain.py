"""The chain by its scripts alone: problems -> search trees -> a PRM -> its scores on pairs, and a
DPO step on those."""

import json

import pytest

from common.files import read_records
from reasoning.records import ScoredPair, StepValue

pytestmark = pytest.mark.slow


def test_from_problems_to_scores(run_script, tmp_path):
    def script(name, *args):
        done = run_script(name, *args)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = script(
        "utils/build_mcts_dataset.py",
        "--limit",
        20,
        "--budget",
        24,
        "--output",
        "steps.jsonl",
        "--trees",
        "trees.jsonl",
    )
    values = list(read_records(tmp_path / "steps.jsonl", StepValue))
    assert (
        len(values) > 100
        and 0 < sum(value.score for value in values) / len(values) < 1
        and "20 problems" in said
    )
    assert "right" in script("utils/show_tree.py", "--trees", "trees.jsonl", "--html", "tree.html")
    assert (tmp_path / "tree.html").read_text().startswith("<!DOCTYPE html>")

    script(
        "train.py",
        "prm",
        "--dataset_name",
        "steps.jsonl",
        "--output_dir",
        "prm",
        "--max_steps",
        20,
        "--logs_dir",
        "logs",
    )
    assert json.loads((tmp_path / "prm/config.json").read_text())["step_token"] == "<next>"

    pairs = ["--output", "pairs.jsonl", "--limit", 40, "--samples", 4]
    script("utils/build_synthetic_dataset.py", *pairs)
    script(
        "reward_model/evaluate_steps.py",
        "--judge",
        "prm",
        "--judge_path",
        "prm",
        "--input",
        "pairs.jsonl",
        "--output",
        "scored.jsonl",
    )
    scored = list(read_records(tmp_path / "scored.jsonl", ScoredPair))
    scores = [score for pair in scored for score in [*pair.chosen_scores, *pair.rejected_scores]]
    assert len(set(scores)) > len(scores) / 2  # they depend on the step

    script(
        "train.py",
        "--dataset_name",
        "scored.jsonl",
        "--output_dir",
        "tuned",
        "--max_steps",
        1,
        "--logs_dir",
        "logs",
    )
    assert (tmp_path / "tuned/model.safetensors").is_file()
