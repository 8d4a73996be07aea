"""The report card of a step judge: its scores against labels, as metrics and tables."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.errors import UserError
from evaluation.metrics import (
    Bin,
    Metric,
    accuracy_metric,
    auroc_difference,
    auroc_metric,
    best_of_n,
    best_threshold,
    brier_metric,
    calibration_metric,
    clustered_mean_metric,
    first_error,
    kappa_metric,
    mean_metric,
    paired_difference,
    processbench_metrics,
    reliability,
)
from evaluation.results import print_metrics, print_table
from reasoning.answers import extract_answer
from reasoning.records import LabelledSolution
from reward_model.protocols import SCORE_AGGREGATES, aggregate

if TYPE_CHECKING:
    from lm.policy import State

HEADLINES = (
    "step_auroc", "step_auroc_over_log-prob", "decision_accuracy", "kappa", "calibration_error",
    "brier",
)  # fmt: skip
SELECTION = {  # metric of `selection_metrics` -> column of its table
    "answer_auroc": "AUROC of answers",
    "best_of_n": "best of n",
    "best_of_n_over_chance": "over chance",
    "best_of_n_over_log-prob": "over log-prob",
    "best_of_n_over_majority": "over majority vote",
    "best_of_n_below_oracle": "below oracle",
}
POSITIONS = 10  # rows of the table by position; the last row holds all later steps


@dataclass
class Judged:
    """A labelled solution and the judge's score of each of its steps.

    For a sample of the policy also its mean token log-prob, the mean token log-prob of each step,
    and the state that was sampled."""

    solution: LabelledSolution
    scores: list[float] = field(default_factory=list)
    logp: float | None = None
    step_logps: list[float] = field(default_factory=list)
    state: "State | None" = None


@dataclass(frozen=True)
class JudgedStep:
    """A labelled step: label 0 or 1, score, position from 1 on, and the number of its problem."""

    label: float
    score: float
    position: int
    problem: int


@dataclass(frozen=True)
class RankedPolicy:
    """A policy's mean reward by the judge, its exact accuracy, and its ranks (1 is the highest)."""

    policy: str
    reward: Metric
    accuracy: Metric
    reward_rank: int
    accuracy_rank: int


@dataclass
class Card:
    """All metrics of a judge, and the rows of their tables and plots.

    by_position: name of the position, mean score of right steps, of wrong steps. selection:
    aggregate -> metric -> value. samples: mean number of solutions a problem that `best_of_n`
    picked from. best_threshold: that of ProcessBench's F1, and this F1. values: reliability of the
    scores as values (evaluation/value_calibration.py). notes: what is left out, and why."""

    metrics: dict[str, Metric]
    steps: list[JudgedStep]
    reliability: list[Bin]
    by_position: list[tuple[str, Metric | None, Metric | None]]
    selection: dict[str, dict[str, Metric]] = field(default_factory=dict)
    samples: float | None = None
    best_threshold: tuple[float, float] | None = None
    values: list[Bin] = field(default_factory=list)
    policies: list[RankedPolicy] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def card(judged: Sequence[Judged], seed: int, threshold: float = 0.5) -> Card:
    """The card of the solutions that the judge scored. Raises UserError if no step has a label."""
    prompts = [row.solution.prompt for row in judged]
    numbers = {prompt: k for k, prompt in enumerate(dict.fromkeys(prompts))}
    problems = [numbers[prompt] for prompt in prompts]
    steps = [
        JudgedStep(label, score, position, problem)
        for row, problem in zip(judged, problems, strict=True)
        for position, (label, score) in enumerate(
            zip(row.solution.labels, row.scores, strict=True), start=1
        )
        if label is not None and label in (0, 1)
    ]
    if not steps:
        raise UserError("no step to judge: every solution with a labelled step is left out")
    notes: list[str] = []
    metrics = _step_metrics(judged, steps, seed, threshold, notes)
    processbench, best = _processbench(judged, problems, seed, threshold, notes)
    labels, scores, clusters = _columns(steps)
    metrics |= processbench
    metrics["calibration_error"] = calibration_metric(labels, scores, clusters, seed)
    metrics["brier"] = brier_metric(labels, scores, clusters, seed)
    by_position = _by_position(steps, seed)
    for position, *sides in by_position:
        for side, metric in zip(("right", "wrong"), sides, strict=True):
            if metric:
                metrics[f"{side}_step_score/{position}"] = metric
    selection, samples = selection_metrics(judged, problems, seed, notes)
    for name, row in selection.items():
        metrics |= {f"{kind}/{name}": metric for kind, metric in row.items()}
    bins = reliability(labels, scores, clusters, seed)
    return Card(metrics, steps, bins, by_position, selection, samples, best, notes=notes)


def _columns(steps: Sequence[JudgedStep]) -> tuple[list[float], list[float], list[int]]:
    """Labels, scores and problems of steps."""
    return [s.label for s in steps], [s.score for s in steps], [s.problem for s in steps]


def _step_metrics(
    judged: Sequence[Judged], steps: list[JudgedStep], seed: int, threshold: float, notes: list[str]
) -> dict[str, Metric]:
    """AUROC, accuracy and kappa of the single steps."""
    labels, scores, clusters = _columns(steps)
    metrics: dict[str, Metric | None] = {}
    metrics["step_auroc"] = auroc_metric(labels, scores, clusters, seed)
    if metrics["step_auroc"] is None:
        notes.append("no step_auroc: all labelled steps have the same label")
    elif all(len(row.step_logps) == len(row.scores) for row in judged):
        logps = [
            logp
            for row in judged
            for label, logp in zip(row.solution.labels, row.step_logps, strict=True)
            if label in (0, 1)
        ]
        difference = auroc_difference(labels, scores, logps, clusters, seed)
        metrics["step_auroc_over_log-prob"] = difference
    metrics["decision_accuracy"] = accuracy_metric(labels, scores, clusters, seed, threshold)
    metrics["kappa"] = kappa_metric(labels, scores, clusters, seed, threshold)
    if metrics["kappa"] is None:
        notes.append("no kappa: judge and labels give the same verdict on every step")
    soft = sum(label not in (0, 1, None) for row in judged for label in row.solution.labels)
    if soft:
        notes.append(f"{soft} steps are not used: their label is between 0 and 1")
    return {name: metric for name, metric in metrics.items() if metric is not None}


def _processbench(
    judged: Sequence[Judged], problems: Sequence[int], seed: int, threshold: float, notes: list[str]
) -> tuple[dict[str, Metric], tuple[float, float] | None]:
    """ProcessBench's metrics, and the threshold with the highest F1."""
    whole = [(row, k) for row, k in zip(judged, problems, strict=True) if row.solution.steps]
    labels = [row.solution.labels for row, _ in whole]
    scores = [row.scores for row, _ in whole]
    metrics = processbench_metrics(labels, scores, [k for _, k in whole], seed, threshold)
    unknown = sum(first_error(solution_labels) is None for solution_labels in labels)
    best = None
    if "processbench_f1" in metrics:
        best = best_threshold(labels, scores)
    elif "processbench_error_accuracy" in metrics:
        notes.append("no processbench_f1: there is no solution without an error")
    elif "processbench_correct_accuracy" in metrics:
        notes.append("no processbench_f1: there is no solution with an error")
    else:
        notes.append("no processbench_f1: there is no solution whose first error is known")
    if unknown:
        notes.append(
            f"{unknown} solutions do not count for processbench_*: steps without a label leave "
            "their first error unknown"
        )
    return metrics, best


def _by_position(
    steps: Sequence[JudgedStep], seed: int
) -> list[tuple[str, Metric | None, Metric | None]]:
    """Position, mean score of right steps, mean score of wrong steps; None where there are none."""

    def mean(inside: Sequence[JudgedStep]) -> Metric | None:
        _, scores, clusters = _columns(inside)
        return clustered_mean_metric(scores, clusters, seed) if inside else None

    rows = []
    for k in sorted({min(step.position, POSITIONS) for step in steps}):
        inside = [step for step in steps if min(step.position, POSITIONS) == k]
        right, wrong = (mean([step for step in inside if step.label == side]) for side in (1, 0))
        rows.append((f"{k}+" if k == POSITIONS else f"{k}", right, wrong))
    return rows


def selection_metrics(
    judged: Sequence[Judged], problems: Sequence[int], seed: int, notes: list[str]
) -> tuple[dict[str, dict[str, Metric]], float | None]:
    """How well one score a solution separates right from wrong answers and picks one.

    The scores: every aggregate of the step scores, the policy's log-prob, and the majority vote
    (how many samples of the problem have the same answer). `answer_auroc`: right against wrong
    answers over all problems. `best_of_n`: exact accuracy of the best sample of each problem, with
    its paired differences to chance, log-prob, majority vote and oracle. Also returns the mean
    number of samples to pick from."""
    graded = [
        (row, k)
        for row, k in zip(judged, problems, strict=True)
        if row.solution.final_correct is not None
    ]
    if not graded:
        notes.append("no answer_auroc and no best_of_n: nothing says which final answers are right")
        return {}, None
    correct = [float(row.solution.final_correct is True) for row, _ in graded]
    clusters = [k for _, k in graded]
    values: dict[str, list[float]] = {
        name: [aggregate(row.scores, name) for row, _ in graded] for name in SCORE_AGGREGATES
    }
    logps = [row.logp for row, _ in graded if row.logp is not None]
    if len(logps) == len(graded):
        values["log-prob"] = logps
    answers = [(k, extract_answer("\n".join(row.solution.steps))) for row, k in graded]
    if any(answer for _, answer in answers):
        votes = Counter(answers)
        values["majority"] = [votes[k, answer] if answer else 0 for k, answer in answers]
    rows: dict[str, dict[str, Metric]] = {name: {} for name in values}
    for name, row in rows.items():
        if auroc := auroc_metric(correct, values[name], clusters, seed):
            row["answer_auroc"] = auroc
    if len(set(correct)) < 2:
        notes.append(f"no answer_auroc: all answers are {'right' if correct[0] else 'wrong'}")

    by_problem = defaultdict(list)
    for place, k in enumerate(clusters):
        by_problem[k].append(place)
    groups = [group for group in by_problem.values() if len(group) > 1]
    if not groups:
        notes.append("no best_of_n: no problem has two scored solutions to pick from")
        return rows, None

    def by_group(numbers: Sequence[float]) -> list[list[float]]:
        return [[numbers[place] for place in group] for group in groups]

    values |= {"chance": [0.0] * len(correct), "oracle": correct}
    accuracy = {
        name: best_of_n(by_group(numbers), by_group(correct)) for name, numbers in values.items()
    }
    for name, picked in accuracy.items():
        row = rows.setdefault(name, {})
        row["best_of_n"] = mean_metric(picked, seed)
        if name in SCORE_AGGREGATES:
            for rival in ("chance", "log-prob", "majority"):
                if rival in accuracy:
                    over = paired_difference(accuracy[rival], picked, seed)
                    row[f"best_of_n_over_{rival}"] = over
            row["best_of_n_below_oracle"] = paired_difference(picked, accuracy["oracle"], seed)
    return rows, sum(map(len, groups)) / len(groups)


def verdict(step_auroc: Metric | None) -> str:
    """What the report card says about training on the judge's scores, in words."""
    if step_auroc is None or step_auroc.ci95 is None:
        return "verdict: open, because AUROC needs right and wrong steps"
    low, high = step_auroc.ci95
    if high < 0.5:
        return (
            "verdict: worse than chance: the judge scores wrong steps higher than right ones. "
            "Check the labels and the question; do not train on its scores"
        )
    if low <= 0.5:
        return (
            "verdict: not shown to be better than chance (AUROC 0.5). Do not train on its scores; "
            "take another judge, or label more steps if there are few"
        )
    return f"verdict: better than chance, with a step AUROC of at least {low:.3f}"


def print_card(title: str, card: Card, spearman: Metric | None) -> None:
    """Print the tables; spearman: the correlation of reward and accuracy over `card.policies`."""
    shown = {
        name: metric
        for name, metric in card.metrics.items()
        if name in HEADLINES or name.startswith("processbench")
    }
    print_metrics(title, shown)

    rows: list[Sequence[object]] = [
        (f"{row.low:.1f} to {row.high:.1f}", f"{row.score:.3f}", row.right, row.right.n)
        for row in card.reliability
    ]
    columns = ["score", "mean score", "share of right steps", "n"]
    print_table("calibration: ten bins of equal width", columns, rows)

    rows = [
        (position, right or "", right.n if right else 0, wrong or "", wrong.n if wrong else 0)
        for position, right, wrong in card.by_position
    ]
    print_table("mean score by position", ["step", "right steps", "n", "wrong steps", "n"], rows)

    n = {kind: metric.n for row in card.selection.values() for kind, metric in row.items()}
    if n:
        title = "one score a solution"
        if "answer_auroc" in n:
            title += f"; AUROC of right against wrong answers: {n['answer_auroc']:,} solutions"
        if "best_of_n" in n:
            title += f"; accuracy of the best of {card.samples:.3g}: {n['best_of_n']:,} problems"
        kinds = [kind for kind in SELECTION if kind in n]
        rows = [(name, *(row.get(k, "") for k in kinds)) for name, row in card.selection.items()]
        print_table(title, ["aggregate", *(SELECTION[kind] for kind in kinds)], rows)
    if card.policies:
        title = f"policies, greedy answers to {card.policies[0].reward.n:,} problems"
        title += f", Spearman {spearman}" if spearman else ""
        rows = [
            (p.policy, p.reward, p.reward_rank, p.accuracy, p.accuracy_rank) for p in card.policies
        ]
        print_table(title, ["policy", "mean reward", "rank", "exact accuracy", "rank"], rows)
