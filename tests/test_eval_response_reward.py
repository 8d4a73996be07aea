"""The evaluation of a response reward model: metrics by hand, both file formats, a whole run."""

import itertools
import json
import math
import sys

import pytest

from common.cli import run
from common.errors import UserError
from common.files import write_records
from evaluation import eval_response_reward as script
from evaluation.eval_response_reward import (
    RankedAnswer,
    accuracies,
    best_of_n_metrics,
    calibration,
    pairs_of,
    rank_correlations,
)
from reasoning.datasets.ranking import RankedResponse, write_answers
from reasoning.problems import problems
from tests.helpers.reward_models import make_llama

# two groups; the third answer of the second is as long as the first, with as many lines
FOUND = [
    (
        "p",
        [
            RankedAnswer("aaaa", 1, "right"),
            RankedAnswer("bbbbbbbb", 2, "wrong"),
            RankedAnswer("c", 3, "malformed"),
        ],
    ),
    (
        "q",
        [
            RankedAnswer("aaaa", 1, "right"),
            RankedAnswer("bb", 2, "wrong"),
            RankedAnswer("cccc", 2, "wrong"),
        ],
    ),
]
SCORES = [[2.0, 3.0, -1.0], [1.0, 0.0, 1.0]]


def test_pairwise_accuracies_by_hand():
    pairs = pairs_of(FOUND, SCORES)
    assert [(pair.cluster, pair.gap, pair.in_order) for pair in pairs] == [
        *((0, -1.0, 0.0), (0, 3.0, 1.0), (0, 4.0, 1.0)),
        # ties of the ranker are no pair, ties of the scorer count half
        *((1, 1.0, 1.0), (1, 0.0, 0.5)),
    ]
    assert [pair.longer_is_better for pair in pairs] == [0.0, 1.0, 1.0, 1.0, 0.5]
    values = {
        name: (metric.value, metric.n) for name, metric in accuracies(pairs, False, 0).items()
    }
    assert values == {
        "pairwise_accuracy": (0.7, 5),
        "right_over_wrong/pairwise_accuracy": (0.5, 3),
        "right_over_malformed/pairwise_accuracy": (1.0, 1),
        "wrong_over_malformed/pairwise_accuracy": (1.0, 1),
        "equal_length/pairwise_accuracy": (0.5, 1),
        "right_over_wrong/equal_length/pairwise_accuracy": (0.5, 1),
    }


def test_correlations_within_groups_by_hand():
    metrics = rank_correlations(FOUND, SCORES, 0)
    # first group: scores 2, 3, -1 against ranks 1, 2, 3; second: 1, 0, 1 against 1, 2, 2
    assert (
        metrics["spearman"].value == pytest.approx((0.5 + 0.5) / 2) and metrics["spearman"].n == 2
    )
    assert metrics["kendall"].value == pytest.approx((1 / 3 + 0.5) / 2)
    assert metrics["length_spearman"].value == pytest.approx((1.0 + 1.0) / 2)
    assert "length_spearman" not in rank_correlations(
        [("p", [RankedAnswer("a", 1, ""), RankedAnswer("b", 2, "")])], [[1.0, 0.0]], 0
    )


def test_calibration_of_calibrated_and_overconfident_scores():
    gap = math.log(3)  # says .75
    found = [(f"p{k}", [RankedAnswer("a", 1, ""), RankedAnswer("b", 2, "")]) for k in range(400)]
    # and is right in three of four
    sure = pairs_of(found, [[0.0, -gap] if k % 4 else [-gap, 0.0] for k in range(400)])
    error, bins = calibration(sure, 0)
    assert error.value < 0.06 and [round(row.score, 2) for row in bins] == [0.25, 0.75]
    overconfident, _ = calibration(
        pairs_of(found, [[0.0, -9.0] if k % 4 else [-9.0, 0.0] for k in range(400)]), 0
    )
    assert overconfident.value > 0.2


def test_best_of_n_differences_are_paired():
    found = {
        "chance": [0.5, 0.5],
        "log-prob": [0.0, 1.0],
        "majority": [1.0, 0.0],
        "scorer": [1.0, 1.0],
        "oracle": [1.0, 1.0],
    }
    metrics = best_of_n_metrics(found, 8, 0)
    assert (
        metrics["best_of_8/scorer/accuracy"].value == 1
        and metrics["best_of_8/scorer/accuracy_over_majority"].value == 0.5
    )
    assert not any(name.endswith("over_oracle") for name in metrics)


@pytest.fixture(scope="module")
def scorer(tiny_model_dir, tmp_path_factory) -> str:
    return make_llama(tiny_model_dir, tmp_path_factory.mktemp("reward") / "scorer")


def evaluate(folder, monkeypatch, scorer: str, *args: object) -> dict:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(
        sys,
        "argv",
        ["eval_response_reward.py", *("--scorer", scorer, "--output_dir", "results"), "--overwrite"]
        + [str(arg) for arg in args],
    )
    script.main()
    assert (folder / "results" / "response_reward.png").stat().st_size > 10_000
    return json.loads((folder / "results" / "response_reward.json").read_text())


@pytest.mark.process
def test_a_whole_run(tmp_path, monkeypatch, scorer, tiny_model_dir, capsys):
    some = list(itertools.islice(problems("test"), 6))
    write_records(tmp_path / "problems.jsonl", some)
    rows = [
        RankedResponse(
            problem.prompt, text, rank, "rule:exact", category, split="train" if k == 0 else "test"
        )
        for k, problem in enumerate(some)
        for rank, (text, category) in enumerate(
            [("\n".join(problem.steps), "right"), ("Answer: 0", "wrong"), ("?", "malformed")], 1
        )
    ]
    write_answers(tmp_path / "answers.csv.gz", rows)
    options = [
        "--data",
        "answers.csv.gz",
        "--problems",
        "problems.jsonl",
        "--n",
        2,
        "--max_new_tokens",
        8,
    ]
    result = evaluate(
        tmp_path, monkeypatch, scorer, *options, "--model_name_or_path", tiny_model_dir
    )
    assert result["groups"] == 5 and result["metrics"]["pairwise_accuracy"]["n"] == 15
    assert {
        "spearman",
        "kendall",
        "calibration_error",
        "length_spearman",
        "longer/pairwise_accuracy",
    } <= result["metrics"].keys()
    assert result["metrics"]["best_of_2/scorer/accuracy_over_majority"]["n"] == 6
    assert "right_over_malformed/pairwise_accuracy" in capsys.readouterr().out
    with pytest.raises(UserError, match="no ranked group of the split other"):
        evaluate(tmp_path, monkeypatch, scorer, *options, "--data_split", "other")


@pytest.mark.process
def test_pairs_by_subset(tmp_path, monkeypatch, scorer, capsys):
    rows = [
        {
            "prompt": f"p{k}",
            "chosen": f"yes {k}",
            "rejected": f"no {k}",
            "subset": "ab"[k % 2],
            "id": k,
        }
        for k in range(6)
    ]
    write_records(tmp_path / "bench.jsonl.gz", rows)
    metrics = evaluate(tmp_path, monkeypatch, scorer, "--data", "bench.jsonl.gz", "--n", 0)[
        "metrics"
    ]
    assert [
        metrics[name]["n"]
        for name in ("pairwise_accuracy", "a/pairwise_accuracy", "b/pairwise_accuracy")
    ] == [6, 3, 3]
    assert not any(name.startswith("best_of") or "_over_" in name for name in metrics)
    write_records(tmp_path / "bench.jsonl.gz", [{"prompt": "p", "chosen": ["a"], "rejected": "b"}])
    with pytest.raises(SystemExit) as stopped:
        run(script.main)
    assert (
        stopped.value.code == 2 and "bench.jsonl.gz:1: field 'rejected'" in capsys.readouterr().err
    )
