"""benchmarks/dpo_speed.py: the pairs that it measures, and a small run of it."""

import json
from itertools import islice

import pytest

from benchmarks.dpo_speed import LENGTHS, SpeedArguments, lengths_of, pairs_of
from reasoning.grading import grade_steps
from reasoning.problems import problems


@pytest.mark.parametrize("case", "abd")
def test_pairs_of_the_lengths_that_a_case_names(case):
    args = SpeedArguments(pairs=12)
    pairs = pairs_of(case, args)
    assert len(pairs) == 12
    means = lengths_of(pairs, args.model_name_or_path)
    assert means == pytest.approx(LENGTHS[case], abs=3)
    answers = {problem.prompt: problem for problem in islice(problems("train"), 600)}
    for pair in pairs[:3]:
        problem, k = answers[pair.prompt], len(pair.prefix)
        right = grade_steps([*pair.prefix, *pair.chosen], problem)
        wrong = grade_steps([*pair.prefix, *pair.rejected], problem)
        assert all(right) and wrong[k] == 0
    if case == "d":
        assert len({(pair.prompt, *pair.prefix) for pair in pairs}) == 4


def test_whole_solutions_are_the_committed_pairs_without_a_prefix():
    args = SpeedArguments(pairs=5)
    for whole, pair in zip(pairs_of("c", args), pairs_of("e", args), strict=True):
        assert whole.prefix == [] and whole.chosen == [*pair.prefix, *pair.chosen]
        assert len(whole.rejected_scores) == len(whole.rejected)


@pytest.mark.slow
def test_dpo_speed_measures_and_writes(run_script, tmp_path, tiny_model_dir):
    more = ["--cases", "d", "--pairs", "3", "--rounds", "1", "--sizes", "1", "2"]
    done = run_script(
        "benchmarks/dpo_speed.py",
        *("--model_name_or_path", tiny_model_dir, "--per_device_train_batch_size", "3", *more),
        *("--output_dir", tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr
    (result,) = (tmp_path / "out").glob("dpo_speed_*.json")
    metrics = json.loads(result.read_text())["metrics"]
    assert metrics["d/speedup"]["value"] > 0 and metrics["d/prefix_tokens"]["value"] > 60
    assert metrics["packed/2/seconds"]["value"] > 0
    assert result.with_suffix(".png").exists()
