"""The report card of a step judge: its scores against exact labels, on the steps of fresh policy samples of held-out problems, or
against the step labels of any file or data set (--labels).
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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
    rate_metric,
    reliability,
    spearman_metric,
    write_result,
)
from reasoning.answers import extract_answer
from reasoning.loaders import load_step_labels
from reasoning.records import LabelledSolution, Problem, read_records
from reward_model.base import AGGREGATES, StepJudge, aggregate
from utils.cli import UserError, at_root, check_input, check_model, check_output, parse_args, run
from utils.judges import JudgeArgs, check_judge, judge_name, open_judge, score_all

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
NEVER = -1e9  # log-prob of a sample without a step, which is not to be picked
POSITIONS = 10  # rows of the table by position; the last holds all later steps
OF_SAMPLES = (
    "model_name_or_path",
    "input",
    "samples",
    "rollouts",
    "max_new_tokens",
    "policies",
)  # unused with --labels


@dataclass
class CardArgs(JudgeArgs):
    model_name_or_path: str = field(
        default=at_root("models/policy-mini"), metadata={"help": "policy whose samples are judged"}
    )
    input: str = field(
        default=at_root("data/problems_test.jsonl"),
        metadata={"help": "JSONL of held-out problems with reference steps"},
    )
    labels: str | None = field(
        default=None,
        metadata={
            "help": "judge these labelled solutions in place of samples: a file or hub name in the shape of PRM800K, "
            "Math-Shepherd, ProcessBench, TRL's stepwise format, or labels that people made here"
        },
    )
    labels_split: str | None = field(
        default=None, metadata={"help": "split of --labels, where it has several"}
    )
    policies: list[str] | None = field(
        default=None,
        metadata={
            "help": "three or more models, best checkpoints: does the judge rank them as exact accuracy does?"
        },
    )
    output_dir: str = field(
        default=at_root("evaluation/results"),
        metadata={
            "help": "folder of the result judge_NAME.json, replaced if there; its picture goes to ../plots"
        },
    )
    limit: int | None = field(
        default=500, metadata={"help": "use the first LIMIT problems, or solutions of --labels"}
    )
    samples: int = field(
        default=4,
        metadata={"help": "samples a problem, at temperature 1; the judge picks one for best-of-n"},
    )
    rollouts: int = field(
        default=0,
        metadata={
            "help": "judge values as well: so many rollouts after each step show what it is worth (0: not)"
        },
    )
    threshold: float = field(
        default=0.5,
        metadata={
            "help": "steps scored below it are called wrong, for accuracy, kappa and ProcessBench's F1; choose it on other data"
        },
    )
    max_new_tokens: int = field(default=256, metadata={"help": "longest sample, in tokens"})
    seed: int = field(
        default=0,
        metadata={"help": "seed of samples, rollouts, the bootstrap and a shuffled judge"},
    )

    def __post_init__(self):
        for name, least in (
            ("limit", 1),
            ("samples", 1),
            ("rollouts", 0),
            ("max_new_tokens", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"argument --{name}: expected {least} or more, got {value}")
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"argument --threshold: expected a number above 0, up to 1, got {self.threshold}"
            )
        if self.policies is not None and len(self.policies) < 3:
            raise ValueError(
                f"argument --policies: expected 3 or more models to rank, got {len(self.policies)}"
            )


@dataclass
class Judged:
    """A solution with its labels, and then with the judge's scores: None if the judge left it out. Of the policy's own samples also
    their mean token log-prob, that of each step, and the state that was sampled."""

    solution: LabelledSolution
    logp: float | None = None
    scores: list[float] | None = None
    step_logps: list[float] | None = None
    state: object = None


def check(args: CardArgs) -> tuple[Path, Path]:
    """The result and the picture, once the arguments are found to be good."""

    def made_by(name: str, command: str) -> str | None:
        return command if getattr(args, name) == getattr(CardArgs, name) else None

    check_judge(args)
    name = judge_name(args)
    if args.labels is not None:
        for unused in OF_SAMPLES:
            if getattr(args, unused) != getattr(CardArgs, unused):
                raise UserError(
                    f"argument --{unused}: --labels does not use it, it judges what others wrote"
                )
        name += f"_on_{Path(args.labels).stem}"
    elif args.labels_split is not None:
        raise UserError("argument --labels_split: it is a split of --labels, which is not given")
    folder = Path(args.output_dir)
    result, picture = folder / f"judge_{name}.json", folder.parent / "plots" / f"judge_{name}.png"
    for path in (result, picture):
        check_output(str(path), overwrite=True)
    if args.labels is None:
        check_model(args.model_name_or_path, made_by("model_name_or_path", "make models"))
        for policy in args.policies or []:
            check_model(policy)
        check_input(args.input, made_by("input", "make data"))
    return result, picture


def read_problems(args: CardArgs) -> list[Problem]:
    problems = list(read_records(args.input, Problem))[: args.limit]
    for problem in problems:
        if not problem.steps:
            raise UserError(
                f"{args.input}: a problem without reference steps cannot be graded: {problem.prompt[:60]!r}"
            )
    return problems


def read_labels(args: CardArgs, notes: list[str]) -> list[Judged]:
    dropped: Counter[str] = Counter()
    rows = load_step_labels(args.labels, split=args.labels_split, dropped=dropped)
    judged = [Judged(solution) for solution in islice(rows, args.limit)]
    notes += [f"{args.labels}: {count} {what} left out" for what, count in dropped.items()]
    if not any(label in (0, 1) for row in judged for label in row.solution.labels):
        raise UserError(
            f"{args.labels}: none of {len(judged)} solutions has a step that is labelled right or wrong"
        )
    return judged


def sample(args: CardArgs, problems: list[Problem], policy) -> list[Judged]:
    """Samples of the policy with their exact labels and the policy's own log-probs."""
    from reasoning.grading import grade_steps, is_correct

    states = [policy.start(problem.prompt) for problem in problems]
    samples = policy.rollouts(
        states, args.samples, 1.0, args.max_new_tokens, args.seed, progress="samples"
    )
    answers = [
        (problem, state, list(state.steps))
        for problem, group in zip(problems, samples, strict=True)
        for state in group
    ]
    logps = policy.step_logps(
        [(problem.prompt, [], steps) for problem, _, steps in answers], progress="log-probs"
    )
    judged = []
    for (problem, state, steps), of_steps in zip(answers, logps, strict=True):
        solution = LabelledSolution(
            problem.prompt, steps, grade_steps(steps, problem), is_correct(steps, problem)
        )
        logp = (
            sum(step.logp for step in of_steps) / max(1, sum(step.tokens for step in of_steps))
            if steps
            else NEVER
        )
        step_logps = [step.logp / max(1, step.tokens) for step in of_steps]
        judged.append(Judged(solution, logp, step_logps=step_logps, state=state))
    return judged


def card(judged: Sequence[Judged], seed: int, threshold: float = 0.5) -> dict:
    """All that is said of a judge, from the solutions that it scored: `metrics` by name; `steps`, label, score and position of each
    labelled one; `reliability`, `by_position` and `selection`, the rows of their tables; `samples`, how many solutions a problem
    `best_of_n` had to pick from; `best_threshold`; `notes`, what is left out and why."""
    metrics, notes = {}, []
    problems: dict[str, int] = {}
    problem = [
        problems.setdefault(row.solution.prompt, len(problems)) for row in judged
    ]  # samples of one problem are not independent
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
    values = {name: [aggregate(row.scores, name) for row, _ in graded] for name in AGGREGATES}
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
        if name in AGGREGATES:
            rows[name]["best_of_n_over_chance"] = difference(name, "chance")
            for rival in ("log-prob", "majority"):
                if rival in accuracy:
                    rows[name][f"best_of_n_over_{rival}"] = difference(name, rival)
            rows[name]["best_of_n_below_oracle"] = difference("oracle", name)
    return rows, sum(map(len, groups)) / len(groups)


def rank_policies(
    args: CardArgs, problems: list[Problem], judge: StepJudge, notes: list[str]
) -> tuple[list[dict], Metric | None]:
    """Greedy answers of each policy to the same problems: its mean reward by the judge, its exact accuracy, its rank by each (1 is
    the highest); and Spearman's correlation of the two."""
    from scipy.stats import rankdata

    from reasoning.grading import is_correct
    from search.policy import Policy

    rewards, accuracies = [], []  # (policies, problems)
    for path in args.policies:
        policy = Policy.load(path)
        name = Path(path).name
        replies = policy.generate(
            [p.prompt for p in problems],
            max_new_tokens=args.max_new_tokens,
            progress=f"{name}: answers",
        )
        del policy  # one model in memory at a time
        answers = [reply[0].steps for reply in replies]
        scores = score_all(
            judge,
            [(p.prompt, steps) for p, steps in zip(problems, answers, strict=True)],
            f"{name}: scores",
        )
        rewards.append([None if row is None else aggregate(row, "mean") for row in scores])
        accuracies.append(
            [float(is_correct(steps, p)) for p, steps in zip(problems, answers, strict=True)]
        )
    kept = [k for k in range(len(problems)) if all(row[k] is not None for row in rewards)]
    if len(kept) < len(problems):
        notes.append(
            f"{len(problems) - len(kept)} of {len(problems)} problems do not count for the policies: an answer is {judge.left_out}"
        )
    if not kept:
        return [], None
    rewards, accuracies = (
        [[row[k] for k in kept] for row in rows] for rows in (rewards, accuracies)
    )
    ranks = [
        rankdata([-sum(row) for row in rows], method="min").astype(int).tolist()
        for rows in (rewards, accuracies)
    ]
    rows = [
        {
            "policy": path,
            "reward": mean_metric(rewards[k], args.seed),
            "accuracy": rate_metric(accuracies[k]),
            "reward_rank": ranks[0][k],
            "accuracy_rank": ranks[1][k],
        }
        for k, path in enumerate(args.policies)
    ]
    spearman = spearman_metric(rewards, accuracies, args.seed)
    if spearman is None:
        notes.append("no policy_spearman: all policies have the same reward or the same accuracy")
    return rows, spearman


def main() -> None:
    (args,) = parse_args(CardArgs, description=__doc__)
    result, picture = check(args)
    notes: list[str] = []
    of_file = args.labels is not None
    problems = [] if of_file else read_problems(args)
    judged = read_labels(args, notes) if of_file else []

    policies, spearman = [], None
    with open_judge(args) as judge:
        if not of_file:
            from search.policy import Policy

            policy = Policy.load(args.model_name_or_path)
            judged = sample(args, problems, policy)
        solutions = [(row.solution.prompt, row.solution.steps) for row in judged]
        for row, scores in zip(judged, score_all(judge, solutions, "scores"), strict=True):
            row.scores = scores
        if args.policies:
            policies, spearman = rank_policies(args, problems, judge, notes)
    scored = [row for row in judged if row.scores is not None]
    left_out = len(judged) - len(scored)
    if left_out:
        notes.insert(0, f"{left_out} of {len(judged)} solutions left out: each is {judge.left_out}")
    if not scored:
        raise UserError(f"nothing to judge: each of the {left_out} solutions is {judge.left_out}")

    found = card(scored, args.seed, args.threshold)
    metrics, notes = found["metrics"], notes + found["notes"]
    values = []
    if args.rollouts:
        from evaluation.outcomes import roll_out, value_metrics

        outcomes = roll_out(policy, scored, problems, args.rollouts, args.max_new_tokens, args.seed)
        of_values, values = value_metrics(outcomes, args.seed)
        metrics |= of_values
    if spearman:
        metrics["policy_spearman"] = spearman
    what = (
        f"labelled solutions of {args.labels}"
        if of_file
        else f"samples of {args.model_name_or_path}"
    )
    right = sum(label for label, _, _ in found["steps"]) / len(found["steps"])
    count = len({row.solution.prompt for row in scored})
    title = f"judge {judge_name(args)} on {len(scored):,} {what} ({count:,} problems, {len(found['steps']):,} labelled steps)"

    from evaluation.plots import judge_picture

    judge_picture(picture, title, found | {"values": values}, policies)
    write_result(
        result,
        metrics,
        asdict(args),
        [args.seed],
        judge=judge_name(args),
        right_steps=right,
        left_out=left_out,
        samples_a_problem=found["samples"],
        notes=notes,
        reliability=[_plain(row) for row in found["reliability"]],
        value_reliability=[_plain(row) for row in values],
        policies=[_plain(row) for row in policies],
    )
    print_card(f"{title}; {right:.3f} of the steps are right", found, policies, spearman)
    if values:
        names = [
            name
            for name in metrics
            if name.startswith(("value_", "prefix_auroc", "equal_rollouts"))
        ]
        what = f"values of {len(outcomes):,} beginnings, {args.rollouts} rollouts each"
        print_table(
            what,
            ["metric", "value", "n"],
            [(name, metrics[name], metrics[name].n) for name in names],
        )
    if found["best_threshold"]:
        print(
            "here processbench_f1 would be highest at --threshold {}: {:.3f}".format(
                *found["best_threshold"]
            )
        )
    print(*notes, f"wrote {result} and {picture}", sep="\n")


def _plain(row: dict) -> dict:
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


if __name__ == "__main__":
    run(main)
