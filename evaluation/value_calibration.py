"""A judge as a value: its scores of unfinished solutions against what fresh rollouts from there come to."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.metrics import (
    Metric,
    auroc_difference,
    auroc_metric,
    calibration_metric,
    equal_rollouts,
    reliability,
)
from reasoning.grading import is_correct
from reasoning.records import Problem

MOST = 2500  # beginnings that are rolled out; more are drawn from at random


@dataclass(frozen=True)
class Outcome:
    """A beginning of a solution: the exact label of its last step (0 or 1), the judge's score and the policy's mean token log-prob
    of that step, and for each rollout from there whether it ended right."""

    problem: int
    label: float
    score: float
    logp: float
    right: list[bool]


def roll_out(
    policy, judged: Sequence, problems: Sequence[Problem], n: int, max_new_tokens: int, seed: int
) -> list[Outcome]:
    """n rollouts from after every step that does not end its solution; equal beginnings count once. `judged`: rows with `state`,
    `solution`, `scores` and `step_logps`. A rollout that does not end by itself is not right."""
    number = {problem.prompt: k for k, problem in enumerate(problems)}
    beginnings = {}
    for row in judged:
        for k in range(1, len(row.state.steps)):
            label, score, logp = (
                row.solution.labels[k - 1],
                row.scores[k - 1],
                row.step_logps[k - 1],
            )
            beginnings.setdefault(row.state.first(k), (label, score, logp))
    drawn = sorted(random.Random(seed).sample(range(len(beginnings)), min(MOST, len(beginnings))))
    states = [list(beginnings)[place] for place in drawn]
    rollouts = policy.rollouts(states, n, 1.0, max_new_tokens, seed + 1, progress="rollouts")
    outcomes = []
    for state, group in zip(states, rollouts, strict=True):
        problem = number[state.prompt]
        right = [
            whole.status == "finished" and is_correct(list(whole.steps), problems[problem])
            for whole in group
        ]
        outcomes.append(Outcome(problem, *beginnings[state], right))
    return outcomes


def value_metrics(outcomes: Sequence[Outcome], seed: int) -> tuple[dict[str, Metric], list[dict]]:
    """Metrics by name, and the rows of a reliability diagram (bins of equal mass).

    `value_calibration_error`: distance of score and share of right rollouts. `prefix_auroc/NAME`: of the exact labels, by the
    judge, the log-prob, and the share of right ones among 1, 2, 4 ... rollouts, an estimate that knows the answer.
    `prefix_auroc_over_log-prob`: judge minus log-prob, paired. `equal_rollouts`: how many rollouts have the judge's AUROC,
    interpolated; at most as many as there are."""
    labels, scores, logps, problems = zip(
        *((o.label, o.score, o.logp, o.problem) for o in outcomes), strict=True
    )
    right = np.array([o.right for o in outcomes], dtype=float)  # (beginnings, rollouts)
    shares = right.mean(1)
    metrics = {
        "value_calibration_error": calibration_metric(
            shares, scores, problems, seed, equal_mass=True
        )
    }
    auroc = {
        "judge": auroc_metric(labels, scores, problems, seed),
        "log-prob": auroc_metric(labels, logps, problems, seed),
    }
    count = 1
    while count <= right.shape[1]:
        auroc[f"{count} rollouts"] = auroc_metric(labels, right[:, :count].mean(1), problems, seed)
        count *= 2
    if auroc["judge"]:
        metrics |= {f"prefix_auroc/{name}": metric for name, metric in auroc.items()}
        metrics["prefix_auroc_over_log-prob"] = auroc_difference(
            labels, scores, logps, problems, seed
        )
        metrics["equal_rollouts"] = equal_rollouts(labels, scores, right, problems, seed)
    return metrics, reliability(shares, scores, problems, seed, equal_mass=True)
