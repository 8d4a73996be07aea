"""The report card of a step judge: its scores against labels, as metrics and tables."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from common.errors import UserError
from evaluation.metrics import (
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
    print_table,
    processbench_metrics,
    reliability,
)
from reasoning.answers import extract_answer
from reasoning.records import LabelledSolution
from reward_model.protocols import SCORE_AGGREGATES, aggregate

HEADLINES = (
    "step_auroc",
    "step_auroc_over_log-prob",
    "decision_accuracy",
    "kappa",
    "calibration_error",
    "brier",
)
SELECTION = {  # metrics of `select` -> columns of its table
    "answer_auroc": "AUROC of answers",
    "best_of_n": "best of n",
    "best_of_n_over_chance": "over chance",
    "best_of_n_over_log-prob": "over log-prob",
    "best_of_n_over_majority": "over majority vote",
    "best_of_n_below_oracle": "below oracle",
}
POSITIONS = 10  # rows of the table by position; the last holds all later steps


@dataclass
class Judged:
    """A solution with its labels, and then with the judge's scores: None if the judge left it out. Of the policy's own samples also
    their mean token log-prob, that of each step, and the state that was sampled."""

    solution: LabelledSolution
    logp: float | None = None
    scores: list[float] | None = None
    step_logps: list[float] | None = None
    state: object = None


def card(judged: Sequence[Judged], seed: int, threshold: float = 0.5) -> dict:
    """All that is said of a judge, from the solutions that it scored: `metrics` by name; `steps`, label, score and position of each
    labelled one; `reliability`, `by_position` and `selection`, the rows of their tables; `samples`, how many solutions a problem
    `best_of_n` had to pick from; `best_threshold`; `notes`, what is left out and why."""
    metrics, notes = {}, []
    problems: dict[str, int] = {}
    # samples of one problem are not independent
    problem = [problems.setdefault(row.solution.prompt, len(problems)) for row in judged]
    steps = [
        (label, score, k, cluster)
        for row, cluster in zip(judged, problem, strict=True)
        for k, (label, score) in enumerate(
            zip(row.solution.labels, row.scores, strict=True), start=1
        )
        if label in (0, 1)
    ]
    if not steps:
        raise UserError("no step to judge: every solution with a labelled step is left out")
    labels, scores, positions, clusters = zip(*steps, strict=True)
    of_steps = (labels, scores, clusters, seed)
    metrics["step_auroc"] = auroc_metric(*of_steps)
    if metrics["step_auroc"] is None:
        notes.append("no step_auroc: all labelled steps have the same label")
    elif all(row.step_logps is not None for row in judged):
        logps = [
            logp
            for row in judged
            for label, logp in zip(row.solution.labels, row.step_logps, strict=True)
            if label in (0, 1)
        ]
        metrics["step_auroc_over_log-prob"] = auroc_difference(
            labels, scores, logps, clusters, seed
        )
    metrics["decision_accuracy"] = accuracy_metric(*of_steps, threshold)
    metrics["kappa"] = kappa_metric(*of_steps, threshold)
    if metrics["kappa"] is None:
        notes.append("no kappa: judge and labels say the same of every step")
    soft = sum(label not in (0, 1, None) for row in judged for label in row.solution.labels)
    if soft:
        notes.append(
            f"{soft} steps have a label between 0 and 1, which says neither right nor wrong: they are not used"
        )

    whole = [
        (row.solution.labels, row.scores, cluster)
        for row, cluster in zip(judged, problem, strict=True)
        if row.solution.steps
    ]
    found = processbench_metrics(*zip(*whole, strict=True), seed, threshold)
    metrics |= found
    if "processbench_f1" not in found:
        parts = {
            "processbench_error_accuracy": "without an error",
            "processbench_correct_accuracy": "with an error",
        }
        kind = next((parts[name] for name in found), "whose first error is known")
        notes.append(f"no processbench_f1: there is no solution {kind}")
    unknown = sum(first_error(row_labels) is None for row_labels, _, _ in whole)
    if unknown:
        notes.append(
            f"{unknown} solutions are labelled in parts, their first error is not known: not in processbench_*"
        )

    metrics["calibration_error"] = calibration_metric(*of_steps)
    metrics["brier"] = brier_metric(*of_steps)
    by_position = []
    for k in sorted({min(position, POSITIONS) for position in positions}):
        name, row = f"{k}" + ("+" if k == POSITIONS else ""), {}
        for side, of_side in (("right", 1), ("wrong", 0)):
            here = [
                (step[1], step[3])
                for step in steps
                if min(step[2], POSITIONS) == k and step[0] == of_side
            ]
            row[side] = clustered_mean_metric(*zip(*here, strict=True), seed) if here else None
            metrics[f"{side}_step_score/{name}"] = row[side]
        by_position.append((name, row["right"], row["wrong"]))

    selection, samples = select(judged, problem, seed, notes)
    metrics |= {
        f"{kind}/{name}": metric for name, row in selection.items() for kind, metric in row.items()
    }
    return {
        "metrics": {name: metric for name, metric in metrics.items() if metric is not None},
        "steps": [step[:3] for step in steps],
        "reliability": reliability(*of_steps),
        "by_position": by_position,
        "selection": selection,
        "samples": samples,
        "best_threshold": best_threshold(*list(zip(*whole, strict=True))[:2])
        if "processbench_f1" in found
        else None,
        "notes": notes,
    }


def select(
    judged: Sequence[Judged], problem: Sequence[int], seed: int, notes: list[str]
) -> tuple[dict[str, dict[str, Metric | None]], float | None]:
    """What one score a solution is worth, for every aggregate of the step scores, the policy's own log-prob and the majority vote
    (how many samples of the problem have the same answer): `answer_auroc` (right against wrong answers over all problems),
    `best_of_n` (accuracy when it picks among the samples of each problem) and the paired differences of that to chance, to the
    log-prob, to the vote and to the oracle. With it the mean number of samples picked from."""
    graded = [
        (row, cluster)
        for row, cluster in zip(judged, problem, strict=True)
        if row.solution.final_correct is not None
    ]
    if not graded:
        notes.append(
            "no answer_auroc and no best_of_n: it is not said which final answers are right"
        )
        return {}, None
    correct = [float(row.solution.final_correct) for row, _ in graded]
    clusters = [cluster for _, cluster in graded]
    values = {name: [aggregate(row.scores, name) for row, _ in graded] for name in SCORE_AGGREGATES}
    if all(row.logp is not None for row, _ in graded):
        values["log-prob"] = [row.logp for row, _ in graded]
    answers = [(cluster, extract_answer("\n".join(row.solution.steps))) for row, cluster in graded]
    if any(answer for _, answer in answers):
        votes = Counter(answers)
        values["majority"] = [votes[answer] if answer[1] else 0 for answer in answers]
    if len(set(correct)) < 2:
        notes.append(f"no answer_auroc: all answers are {'right' if correct[0] else 'wrong'}")
    rows = {
        name: {"answer_auroc": auroc_metric(correct, of_name, clusters, seed)}
        for name, of_name in values.items()
    }

    groups = defaultdict(list)
    for k, cluster in enumerate(clusters):
        groups[cluster].append(k)
    groups = [group for group in groups.values() if len(group) > 1]
    if not groups:
        notes.append("no best_of_n: no problem has two scored solutions to pick from")
        return rows, None

    def picked(of_name: list[float]) -> list[float]:
        return best_of_n(
            [[of_name[k] for k in group] for group in groups],
            [[correct[k] for k in group] for group in groups],
        )

    accuracy = {name: picked(of_name) for name, of_name in values.items()}
    accuracy |= {"chance": picked([0.0] * len(correct)), "oracle": picked(correct)}

    def difference(first: str, second: str) -> Metric:
        return mean_metric(
            [a - b for a, b in zip(accuracy[first], accuracy[second], strict=True)], seed
        )

    for name in accuracy:
        rows[name] = rows.get(name, {}) | {"best_of_n": mean_metric(accuracy[name], seed)}
        if name in SCORE_AGGREGATES:
            rows[name]["best_of_n_over_chance"] = difference(name, "chance")
            for rival in ("log-prob", "majority"):
                if rival in accuracy:
                    rows[name][f"best_of_n_over_{rival}"] = difference(name, rival)
            rows[name]["best_of_n_below_oracle"] = difference("oracle", name)
    return rows, sum(map(len, groups)) / len(groups)


def plain_row(row: dict) -> dict:
    return {
        name: asdict(value) if isinstance(value, Metric) else value for name, value in row.items()
    }


def print_card(title: str, found: dict, policies: list[dict], spearman: Metric | None) -> None:
    metrics = found["metrics"]
    shown = [name for name in metrics if name in HEADLINES or name.startswith("processbench")]
    print_table(
        title, ["metric", "value", "n"], [(name, metrics[name], metrics[name].n) for name in shown]
    )

    rows = [
        (
            f"{row['low']:.1f} to {row['high']:.1f}",
            f"{row['score']:.3f}",
            row["right"],
            row["right"].n,
        )
        for row in found["reliability"]
    ]
    print_table(
        "calibration: ten bins of equal width",
        ["score", "mean score", "share of right steps", "n"],
        rows,
    )

    rows = [
        (k, *(cell for side in sides for cell in ((side, side.n) if side else ("", 0))))
        for k, *sides in found["by_position"]
    ]
    print_table("mean score by position", ["step", "right steps", "n", "wrong steps", "n"], rows)

    n = {
        key: metric.n
        for row in found["selection"].values()
        for key, metric in row.items()
        if metric
    }
    if n:
        title = "one score a solution"
        title += (
            f"; AUROC of right against wrong answers: {n['answer_auroc']:,} solutions"
            if "answer_auroc" in n
            else ""
        )
        title += (
            f"; accuracy of the best of {found['samples']:.3g}: {n['best_of_n']:,} problems"
            if "best_of_n" in n
            else ""
        )
        columns = {key: text for key, text in SELECTION.items() if key in n}
        rows = [
            (name, *(row.get(key) or "" for key in columns))
            for name, row in found["selection"].items()
        ]
        print_table(title, ["aggregate", *columns.values()], rows)
    if policies:
        told = f", Spearman {spearman}" if spearman else ""
        rows = [
            (p["policy"], p["reward"], p["reward_rank"], p["accuracy"], p["accuracy_rank"])
            for p in policies
        ]
        columns = ["policy", "mean reward", "rank", "exact accuracy", "rank"]
        print_table(
            f"policies, greedy answers to {policies[0]['reward'].n:,} problems{told}", columns, rows
        )
