"""The report card of a step judge: its scores against exact labels, on the steps of fresh policy samples of held-out problems, or
against the step labels of any file or data set (--labels).
"""

import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import check_input, check_model, check_output, parse_args, run
from common.errors import UserError
from common.files import at_root, read_records
from evaluation.judge_card import Judged, card, plain_row, print_card
from evaluation.metrics import (
    Metric,
    mean_metric,
    print_table,
    rate_metric,
    spearman_metric,
    write_result,
)
from reasoning.datasets.loading import load_step_labels
from reasoning.records import LabelledSolution, Problem
from reward_model.protocols import StepJudge, aggregate
from reward_model.registry import JudgeArgs, check_judge, judge_name, open_judge, score_all

# unused with --labels
OF_SAMPLES = ("model_name_or_path", "input", "samples", "rollouts", "max_new_tokens", "policies")


NEVER = -1e9  # log-prob of a sample without a step, which is not to be picked


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


def rank_policies(
    args: CardArgs, problems: list[Problem], judge: StepJudge, notes: list[str]
) -> tuple[list[dict], Metric | None]:
    """Greedy answers of each policy to the same problems: its mean reward by the judge, its exact accuracy, its rank by each (1 is
    the highest); and Spearman's correlation of the two."""
    from scipy.stats import rankdata

    from lm.policy import Policy
    from reasoning.grading import is_correct

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
            f"{len(problems) - len(kept)} of {len(problems)} problems do not count for the policies: an answer is {judge.unscored_reason}"
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
            from lm.policy import Policy

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
        notes.insert(
            0, f"{left_out} of {len(judged)} solutions left out: each is {judge.unscored_reason}"
        )
    if not scored:
        raise UserError(
            f"nothing to judge: each of the {left_out} solutions is {judge.unscored_reason}"
        )

    found = card(scored, args.seed, args.threshold)
    metrics, notes = found["metrics"], notes + found["notes"]
    values = []
    if args.rollouts:
        from evaluation.value_calibration import roll_out, value_metrics

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

    from evaluation.plots import judge_plot

    judge_plot(picture, title, found | {"values": values}, policies)
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
        reliability=[plain_row(row) for row in found["reliability"]],
        value_reliability=[plain_row(row) for row in values],
        policies=[plain_row(row) for row in policies],
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


if __name__ == "__main__":
    run(main)
