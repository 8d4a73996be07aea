"""The chain of scripts: problems, search trees, a PRM, its scores on pairs, a DPO step on those."""

import json

import pytest

from common.files import read_records
from reasoning.records import ScoredPair, StepValue
from tests.helpers.training import flags

pytestmark = [pytest.mark.slow, pytest.mark.process]


def test_from_problems_to_scores(run_script, tmp_path):
    def script(name, *args, **options):
        done = run_script(name, *args, *flags(**options))
        assert done.returncode == 0, done.stderr
        return done.stdout

    trees = {"limit": 20, "budget": 24, "output": "steps.jsonl", "trees": "trees.jsonl"}
    printed = script("utils/build_mcts_dataset.py", **trees)
    values = list(read_records(tmp_path / "steps.jsonl", StepValue))
    assert len(values) > 100 and "20 problems" in printed
    assert 0 < sum(value.score for value in values) / len(values) < 1
    assert "right" in script("utils/show_tree.py", trees="trees.jsonl", html="tree.html")
    assert (tmp_path / "tree.html").read_text().startswith("<!DOCTYPE html>")

    training = {"dataset_name": "steps.jsonl", "output_dir": "prm", "max_steps": 20}
    script("train.py", "prm", **training, logs_dir="logs")
    assert json.loads((tmp_path / "prm/config.json").read_text())["step_token"] == "<next>"

    script("utils/build_synthetic_dataset.py", output="pairs.jsonl", limit=40, samples=4)
    judge = {"judge": "prm", "judge_path": "prm", "input": "pairs.jsonl", "output": "scored.jsonl"}
    script("reward_model/evaluate_steps.py", **judge)
    scored = list(read_records(tmp_path / "scored.jsonl", ScoredPair))
    scores = [score for pair in scored for score in [*pair.chosen_scores, *pair.rejected_scores]]
    assert len(set(scores)) > len(scores) / 2  # they depend on the step

    training = {"dataset_name": "scored.jsonl", "output_dir": "tuned", "max_steps": 1}
    script("train.py", **training, logs_dir="logs")
    assert (tmp_path / "tuned/model.safetensors").is_file()
