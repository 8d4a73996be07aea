"""benchmarks/compare.py: its rows, its runs and its statistics."""

import random
from itertools import chain, islice

import numpy as np
import pytest

from benchmarks.compare import DEFAULT, MEASURES, METHODS, contrasts_of, verdict
from benchmarks.compare_rows import (
    before_low_scores,
    exactly_scored,
    good_samples,
    pick,
    planted_judge,
    shuffled,
)
from benchmarks.runs import BASE, key_of, train_and_measure
from common.files import ROOT
from evaluation.metrics import auroc_metric, crossed_mean_metric, holm, two_sided_p
from reasoning.grading import grade_steps
from reasoning.problems import corrupted, stories
from reasoning.records import Problem, ScoredPair
from trainer.stepwise_dpo_trainer import StepwiseDPOConfig

MIA = Problem("Mia?", "10", ["Step 1: 2 + 3 = 5", "Step 2: 5 * 2 = 10", "Answer: 10"])
RIGHT = (MIA.steps, [0.9, 0.8, 0.9])
SLIP = ([MIA.steps[0], "Step 2: 5 * 2 = 12", "Answer: 12"], [0.9, 0.2, 0.1])
EARLY = (["Step 1: 2 + 3 = 6", "Step 2: 6 * 2 = 12", "Answer: 12"], [0.3, 0.4, 0.7])


def test_each_regime_picks_its_pairs():
    bob = Problem("Bob?", "10", MIA.steps)
    rollouts = [(MIA, [SLIP, RIGHT, EARLY]), (bob, [EARLY, SLIP])]
    ((problem, pair),) = pick("a", rollouts, 5)
    assert problem is MIA and pair.prefix == MIA.steps[:1]
    assert (pair.chosen, pair.chosen_scores) == (MIA.steps[1:], [0.8, 0.9])
    assert (pair.rejected, pair.rejected_scores) == (SLIP[0][1:], [0.2, 0.1])
    (_, best), (_, second) = pick("c", rollouts, 5)
    assert best.chosen == MIA.steps[1:] and best.rejected == SLIP[0][1:]  # means .87, .40, .47
    assert pick("d", rollouts[1:], 5) == [(bob, second)]
    assert (second.chosen, second.rejected) == (EARLY[0], SLIP[0])
    assert len(pick("c", rollouts, 1)) == 1
    ((exact,),) = [exactly_scored([(bob, second)])]
    assert (exact.chosen_scores, exact.rejected_scores) == ([0, 0, 0], [1, 0, 0])


def test_rows_for_sft_stop_before_low_scores():
    pair = ScoredPair("p", ["a", "b", "c"], ["x"], [], [0.9, 0.5, 0.4], [0.1])
    low = ScoredPair("q", ["a"], ["x"], [], [0.2], [0.1])
    (cut,) = before_low_scores([pair, low])
    assert (cut.chosen, cut.chosen_scores, cut.rejected) == (["a", "b"], [0.9, 0.5], ["x"])
    rollouts = [(MIA, [SLIP, RIGHT, RIGHT, EARLY]), (Problem("other", "1"), [RIGHT])]
    for regime in "ac":
        (good,) = good_samples(regime, rollouts, {"Mia?"})
        assert (good.prompt, good.steps) == ("Mia?", MIA.steps)


def test_shuffled_scores_are_the_same_scores_elsewhere():
    pairs = [ScoredPair(f"p{k}", ["a", "b"], ["x"], [], [k / 9, 0.5], [k / 20]) for k in range(9)]
    mixed = shuffled(pairs, 0)
    before, after = (
        sorted(chain(*(p.chosen_scores + p.rejected_scores for p in each)))
        for each in (pairs, mixed)
    )
    assert before == after and mixed != pairs
    assert [pair.chosen for pair in mixed] == [pair.chosen for pair in pairs]


@pytest.mark.parametrize("wanted", [0.5, 0.7, 0.9, 1.0])
def test_a_planted_judge_has_its_auroc(wanted):
    judge, rng = planted_judge(wanted), random.Random(0)
    labels, scores, clusters = [], [], []
    for number, story in enumerate(islice(stories("validation"), 300)):
        problem = story.problem()
        steps = corrupted(story, rng)
        found = judge(problem, steps)
        assert found == judge(problem, steps) and all(0 <= score <= 1 for score in found)
        # a step's score does not depend on the steps after it
        assert judge(problem, steps[:2]) == found[:2]
        labels += grade_steps(steps, problem)
        scores += found
        clusters += [number] * len(steps)
    assert auroc_metric(labels, scores, clusters).value == pytest.approx(wanted, abs=0.03)


def test_a_mean_over_runs_and_problems_knows_both_kinds_of_noise():
    rng = np.random.default_rng(0)
    same = np.repeat(rng.integers(0, 2, (1, 400)), 5, 0)  # all runs alike
    metric = crossed_mean_metric(same)
    assert metric.value == same.mean() and metric.n == 2000
    width = metric.ci95[1] - metric.ci95[0]
    assert width == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)  # as of 400 problems, not of 2,000
    other = same + np.array([[0.2], [-0.2], [0.1], [-0.1], [0.0]])
    wider = crossed_mean_metric(other)
    assert wider.ci95[1] - wider.ci95[0] > 1.5 * width
    assert crossed_mean_metric(np.ones((3, 9))).ci95 == [1, 1]


def test_p_values_and_their_correction():
    ones = crossed_mean_metric(np.zeros((2, 50)))
    assert two_sided_p(ones) == 1
    noise = np.random.default_rng(1).normal(0, 1, (1, 400))  # standard error 0.05
    shifted = noise - noise.mean() + 0.1
    assert two_sided_p(crossed_mean_metric(shifted)) == pytest.approx(0.046, abs=0.015)
    assert two_sided_p(crossed_mean_metric(shifted + 1)) < 1e-6
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([]) == []


def test_the_default_is_that_of_the_trainer():
    settings = METHODS[DEFAULT][2]
    assert settings == {name: getattr(StepwiseDPOConfig(), name) for name in settings}


def test_contrasts_have_a_verdict_each():
    def rows(share: float, seeds: int = 3) -> list[dict]:
        rng = np.random.default_rng(0)  # the same problems are easy for all
        hard = rng.random(1000)
        greedy = "".join(str(int(value < share)) for value in hard)
        sampled = "".join(str(4 * int(value < share)) for value in hard)
        correct = dict(zip(MEASURES, (greedy, greedy, sampled, sampled), strict=True))
        return [{"correct": correct, "logged": {}}] * seeds

    found = {("c", DEFAULT): rows(0.8), ("c", "DPO"): rows(0.6), ("c", "SFT on chosen"): rows(0.8)}
    found[("c", "RPO")] = rows(0.9)
    found[("c", "base")] = rows(0.5, 1)
    contrasts = contrasts_of(found)
    assert len(contrasts) == 3 * len(MEASURES)
    verdicts = {contrast["rival"]: contrast["verdict"] for contrast in contrasts}
    assert verdicts == {"DPO": "better", "SFT on chosen": "equivalent", "RPO": "worse"}
    assert contrasts[0]["difference"] == pytest.approx(0.2, abs=0.03)
    assert verdict(0.01, [-0.03, 0.05], 0.6) == "undecided"


@pytest.mark.process
@pytest.mark.parametrize("recipe", ["dpo", "sft"])
def test_a_run_trains_and_measures(recipe, tmp_path):
    settings = {"learning_rate": 1e-4, "max_steps": 1, "limit": 16}
    run = {"name": "a", "recipe": recipe, "rows": "data/rewarded.jsonl", "model": BASE, "seed": 0}
    run |= {"settings": settings, "measure": {"validation": 4}, "samples": 3, "each_epoch": False}
    (row,) = train_and_measure(run | {"threads": 1})
    assert row["correct"].keys() == {"validation", "validation, sampled"}
    assert len(row["correct"]["validation"]) == 4 and set(row["correct"]["validation"]) <= {*"01"}
    assert set(row["correct"]["validation, sampled"]) <= {*"0123"}
    assert row["logged"]["loss"] > 0
    # the identity of a run is its settings and contents, whatever its name and its threads
    assert key_of(run) == key_of(run | {"name": "b", "threads": 2}) != key_of(run | {"seed": 1})
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((ROOT / "data/rewarded.jsonl").read_bytes())
    assert key_of(run) == key_of(run | {"rows": str(copy)})
