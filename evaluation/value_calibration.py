"""A judge as a value function: its scores of prefixes against the outcomes of fresh rollouts."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from evaluation.judge_card import Judged
from evaluation.metrics import (
    Bin,
    Metric,
    auroc_difference,
    auroc_metric,
    calibration_metric,
    reliability,
    rollouts_equivalent,
)
from reasoning.grading import is_correct
from reasoning.records import Problem

if TYPE_CHECKING:
    from lm.policy import Policy, State

MOST_PREFIXES = 2500  # of more prefixes, a random sample is rolled out


@dataclass(frozen=True)
class Outcome:
    """A prefix: the number of its problem, its last step, and the outcomes of rollouts from there.

    label: exact label of the last step (0 or 1). score: the judge's score of it. logp: its mean
    token log-prob under the policy. right: for each rollout whether its answer is right."""

    problem: int
    label: float
    score: float
    logp: float
    right: list[bool]


def roll_out(
    policy: "Policy",
    judged: Sequence[Judged],
    problems: Sequence[Problem],
    n: int,
    max_new_tokens: int,
    seed: int,
) -> list[Outcome]:
    """n rollouts after every step that does not end its solution; equal prefixes count once.

    judged: samples of the policy, with `state` and `step_logps`. A rollout that does not end by
    itself counts as wrong."""
    number = {problem.prompt: k for k, problem in enumerate(problems)}
    prefixes: dict[State, tuple[float, float, float]] = {}
    for row in judged:
        assert row.state is not None
        steps = zip(row.solution.labels, row.scores, row.step_logps, strict=True)
        for k, (label, score, logp) in enumerate(steps, 1):
            if k < len(row.state.steps) and label is not None:
                prefixes.setdefault(row.state.first(k), (label, score, logp))
    count = min(MOST_PREFIXES, len(prefixes))
    places = sorted(random.Random(seed).sample(range(len(prefixes)), count))
    states = [list(prefixes)[place] for place in places]
    rollouts = policy.rollouts(states, n, 1.0, max_new_tokens, seed + 1, progress="rollouts")
    outcomes = []
    for state, group in zip(states, rollouts, strict=True):
        problem = number[state.prompt]
        right = [
            rollout.status == "finished" and is_correct(list(rollout.steps), problems[problem])
            for rollout in group
        ]
        outcomes.append(Outcome(problem, *prefixes[state], right=right))
    return outcomes


def measure_values(outcomes: Sequence[Outcome], seed: int) -> tuple[dict[str, Metric], list[Bin]]:
    """Metrics by name, and the bins of a reliability diagram (equal mass).

    `value_calibration_error`: calibration of the scores against the share of right rollouts.
    `prefix_auroc/NAME`: AUROC against the exact labels, of the judge, of the log-prob, and of the
    share of right ones among 1, 2, 4 ... rollouts (which use the reference answer).
    `prefix_auroc_over_log-prob`: judge minus log-prob, paired. `rollouts_equivalent`: the number of
    rollouts with the judge's AUROC, interpolated, at most the number of rollouts."""
    labels, scores = [o.label for o in outcomes], [o.score for o in outcomes]
    logps, problems = [o.logp for o in outcomes], [o.problem for o in outcomes]
    right = np.array([o.right for o in outcomes], dtype=float)  # (prefixes, rollouts)
    shares = right.mean(1)
    estimates = {"judge": np.array(scores), "log-prob": np.array(logps)}
    count = 1
    while count <= right.shape[1]:
        estimates[f"{count} rollouts"] = right[:, :count].mean(1)
        count *= 2
    found: dict[str, Metric | None] = {
        "value_calibration_error": calibration_metric(shares, scores, problems, seed, True)
    }
    for name, estimate in estimates.items():
        found[f"prefix_auroc/{name}"] = auroc_metric(labels, estimate, problems, seed)
    found["prefix_auroc_over_log-prob"] = auroc_difference(labels, scores, logps, problems, seed)
    found["rollouts_equivalent"] = rollouts_equivalent(labels, scores, right, problems, seed)
    metrics = {name: metric for name, metric in found.items() if metric is not None}
    return metrics, reliability(shares, scores, problems, seed, equal_mass=True)
