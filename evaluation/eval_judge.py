"""The report card of a step judge: its scores against exact labels of fresh policy samples.

The samples are of held-out problems. With --labels, the labelled solutions of a file or a data set
are used instead.
"""

import sys
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import DtypeArgs, arg, check_input, check_least, check_model, parse_args, run
from common.errors import UserError
from common.files import at_root, file_stem
from common.outputs import together
from common.progress import taking_long
from evaluation.judge_card import Judged, RankedPolicy, card, print_card, verdict
from evaluation.metrics import Metric, mean_metric, rate_metric, spearman_metric
from evaluation.results import output_paths, print_metrics, write_result
from evaluation.value_calibration import measure_values, roll_out
from lm.registry import SamplingArgs, style_of, warn_of_foreign_prompts
from reasoning.datasets.files import Dropped
from reasoning.datasets.loading import load_step_labels, problems_of
from reasoning.grading import grade_steps, is_correct
from reasoning.records import LabelledSolution, Problem
from reasoning.splits import MAKES_HELD_OUT
from reward_model.protocols import StepJudge, aggregate
from reward_model.registry import (
    JudgeArgs,
    check_judge,
    judge_files,
    judge_name,
    open_judge,
    score_all,
)

if TYPE_CHECKING:
    from lm.policy import Policy

# arguments that --labels does not use
ONLY_SAMPLES = (
    *("model_name_or_path", "input", "samples", "rollouts", "max_new_tokens", "policies"),
    *(field.name for field in fields(SamplingArgs)),
)
NEVER = -1e9  # log-prob of a sample without a step: it must never be picked


@dataclass
class CardArgs(JudgeArgs, SamplingArgs, DtypeArgs):
    model_name_or_path: str = arg(at_root("models/policy-mini"), "policy that is sampled")
    input: str = arg(at_root("data/problems_test.jsonl"), "held-out problems with reference steps")
    labels: str | None = arg(
        None,
        "judge these labelled solutions instead of samples: a file or hub name with "
        "step labels of this project, or in the format of PRM800K, Math-Shepherd, "
        "ProcessBench or TRL's stepwise supervision",
    )
    labels_split: str | None = arg(None, "split of --labels, if it has several")
    policies: list[str] | None = arg(
        None,
        "three or more models, for example checkpoints: compares their ranks by the "
        "judge with their ranks by exact accuracy",
    )
    output_dir: str = arg(at_root("evaluation/results"), "folder of judge_NAME.json and its plot")
    limit: int | None = arg(500, "use the first LIMIT problems, or solutions of --labels")
    samples: int = arg(4, "samples a problem, at temperature 1; best of n picks one of them")
    rollouts: int = arg(0, "rollouts after each step, for value calibration; 0: none")
    threshold: float = arg(
        0.5,
        "a step with a lower score counts as wrong, for accuracy, kappa and "
        "ProcessBench's F1; choose it on other data",
    )
    max_new_tokens: int = arg(256, "longest sample, in tokens")
    seed: int = arg(0, "seed of samples, rollouts, the bootstrap and a shuffled judge")
    overwrite: bool = arg(False, "replace an existing result")

    def __post_init__(self) -> None:
        check_least(self, limit=1, samples=1, rollouts=0, max_new_tokens=1, seed=0)
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"argument --threshold: expected a number above 0, up to 1, got {self.threshold}"
            )
        if self.policies is not None and len(self.policies) < 3:
            raise ValueError(
                f"argument --policies: expected 3 or more models to rank, got {len(self.policies)}"
            )


def check(args: CardArgs) -> tuple[Path, Path]:
    """The paths of result and plot. Raises UserError for wrong arguments, before any work."""

    def made_by(name: str, command: str) -> str | None:
        return command if getattr(args, name) == getattr(CardArgs, name) else None

    check_judge(args)
    style_of(args)
    name = judge_name(args)
    if args.labels is not None:
        for unused in ONLY_SAMPLES:
            if getattr(args, unused) != getattr(CardArgs, unused):
                raise UserError(f"argument --{unused}: --labels does not use it")
        name += f"_on_{file_stem(args.labels)}"
    elif args.labels_split is not None:
        raise UserError("argument --labels_split: give --labels, or leave it out")
    if args.labels is None:
        check_model(args.model_name_or_path, made_by("model_name_or_path", "make models-policy"))
        for policy in args.policies or []:
            check_model(policy)
        check_input(args.input, made_by("input", MAKES_HELD_OUT))
    read = [args.labels or args.input, *(args.policies or []), *judge_files(args)]
    if args.labels is None:
        read.append(args.model_name_or_path)
    plot, _, result = output_paths(args.output_dir, f"judge_{name}", read, args.overwrite)
    return result, plot


def read_problems(args: CardArgs) -> list[Problem]:
    """The problems, each with reference steps. Raises RecordError or UserError."""
    problems = problems_of(args.input, args.limit)
    for problem in problems:
        if not problem.steps:
            raise UserError(
                f"{args.input}: a problem without reference steps cannot be graded: "
                f"{problem.prompt[:60]!r}"
            )
    return problems


def read_labels(labels: str, args: CardArgs, notes: list[str]) -> list[Judged]:
    """The labelled solutions. Raises RecordError, or UserError if no step is right or wrong."""
    dropped = Dropped()
    rows = load_step_labels(labels, split=args.labels_split, dropped=dropped)
    judged = [Judged(solution) for solution in islice(rows, args.limit)]
    notes += dropped.report(labels)
    if not any(label in (0, 1) for row in judged for label in row.solution.labels):
        raise UserError(
            f"{labels}: none of {len(judged)} solutions has a step that is labelled right or wrong"
        )
    return judged


def sample(args: CardArgs, problems: list[Problem], policy: "Policy") -> list[Judged]:
    """Samples of the policy with their exact labels and the policy's own log-probs."""
    states = [policy.start(problem.prompt) for problem in problems]
    samples = policy.rollouts(
        states, args.samples, 1.0, args.max_new_tokens, args.seed, progress="samples"
    )
    answers = [
        (problem, state, list(state.steps))
        for problem, group in zip(problems, samples, strict=True)
        for state in group
    ]
    all_logps = policy.step_logps(
        [(problem.prompt, [], steps) for problem, _, steps in answers], progress="log-probs"
    )
    judged = []
    for (problem, state, steps), logps in zip(answers, all_logps, strict=True):
        labels, correct = grade_steps(steps, problem), is_correct(steps, problem)
        solution = LabelledSolution(problem.prompt, steps, [*labels], correct)
        tokens = max(1, sum(step.tokens for step in logps))
        logp = sum(step.logp for step in logps) / tokens if steps else NEVER
        step_logps = [step.logp / max(1, step.tokens) for step in logps]
        judged.append(Judged(solution, logp=logp, step_logps=step_logps, state=state))
    return judged


def rank_policies(
    args: CardArgs, paths: list[str], problems: list[Problem], judge: StepJudge, notes: list[str]
) -> tuple[list[RankedPolicy], Metric | None]:
    """Policies by mean reward and by exact accuracy of greedy answers, and Spearman's correlation.

    All policies answer the same problems. A problem does not count if the judge cannot score one of
    its answers."""
    # both are slow to import
    from scipy.stats import rankdata

    from lm.policy import Policy

    all_scores: list[list[list[float] | None]] = []  # (policies, problems, steps)
    all_correct: list[list[float]] = []  # (policies, problems)
    prompts = [problem.prompt for problem in problems]
    for path in paths:
        name = Path(path).name
        policy = Policy.load(path, style_of(args))
        replies = policy.generate(
            prompts, max_new_tokens=args.max_new_tokens, progress=f"{name}: answers"
        )
        del policy  # one model in memory at a time
        answers = [reply.steps for (reply,) in replies]
        solutions = list(zip(prompts, answers, strict=True))
        all_scores.append(score_all(judge, solutions, f"{name}: scores"))
        correct = [is_correct(steps, p) for steps, p in zip(answers, problems, strict=True)]
        all_correct.append([float(right) for right in correct])
    kept = [k for k in range(len(problems)) if all(row[k] is not None for row in all_scores)]
    if len(kept) < len(problems):
        notes.append(
            f"{len(problems) - len(kept)} of {len(problems)} problems do not count for the "
            f"policies: an answer is {judge.unscored_reason}"
        )
    if not kept:
        return [], None
    rewards = [[aggregate(row[k] or [], "mean") for k in kept] for row in all_scores]
    accuracies = [[row[k] for k in kept] for row in all_correct]
    reward_ranks, accuracy_ranks = (
        rankdata([-sum(row) for row in rows], method="min").astype(int).tolist()
        for rows in (rewards, accuracies)
    )
    ranked = []
    for k, path in enumerate(paths):
        reward, accuracy = mean_metric(rewards[k], args.seed), rate_metric(accuracies[k])
        ranked.append(RankedPolicy(path, reward, accuracy, reward_ranks[k], accuracy_ranks[k]))
    spearman = spearman_metric(rewards, accuracies, args.seed)
    if spearman is None:
        notes.append("no policy_spearman: all policies have the same reward or the same accuracy")
    return ranked, spearman


def main() -> None:
    (args,) = parse_args(CardArgs, description=__doc__)
    result, plot = check(args)
    notes: list[str] = []
    problems = read_problems(args) if args.labels is None else []
    judged = read_labels(args.labels, args, notes) if args.labels is not None else []

    policies: list[RankedPolicy] = []
    spearman = None
    with open_judge(args) as judge:
        if args.labels is None:
            with taking_long("loading the libraries"):
                from lm.policy import Policy  # slow to import (torch)

            policy = Policy.load(args.model_name_or_path, style_of(args))
            prompts = [problem.prompt for problem in problems]
            warn_of_foreign_prompts(policy, args.model_name_or_path, prompts)
            judged = sample(args, problems, policy)
        solutions = [(row.solution.prompt, row.solution.steps) for row in judged]
        scored = [
            replace(row, scores=scores)
            for row, scores in zip(judged, score_all(judge, solutions, "scores"), strict=True)
            if scores is not None
        ]
        if args.policies:
            policies, spearman = rank_policies(args, args.policies, problems, judge, notes)
    left_out = len(judged) - len(scored)
    if not scored:
        raise UserError(
            f"nothing to judge: each of the {left_out} solutions is {judge.unscored_reason}"
        )
    if left_out:
        reason = f"each is {judge.unscored_reason}"
        notes.insert(0, f"{left_out} of {len(judged)} solutions left out: {reason}")

    with taking_long("computing intervals"):
        found = card(scored, args.seed, args.threshold)
    found.policies, notes = policies, notes + found.notes
    value_metrics: dict[str, Metric] = {}
    if args.rollouts:
        outcomes = roll_out(policy, scored, problems, args.rollouts, args.max_new_tokens, args.seed)
        with taking_long("computing intervals"):
            value_metrics, found.values = measure_values(outcomes, args.seed)
        found.metrics |= value_metrics
    if spearman:
        found.metrics["policy_spearman"] = spearman
    source = f"samples of {args.model_name_or_path}"
    if args.labels is not None:
        source = f"labelled solutions of {args.labels}"
    right = sum(step.label for step in found.steps) / len(found.steps)
    title = (
        f"judge {judge_name(args)} on {len(scored):,} {source} "
        f"({len({row.solution.prompt for row in scored}):,} problems, "
        f"{len(found.steps):,} labelled steps)"
    )
    words = verdict(found.metrics.get("step_auroc"))
    extras = {
        "judge": judge_name(args),
        "verdict": words,
        "right_steps": right,
        "left_out": left_out,
        "samples_a_problem": found.samples,
        "notes": notes,
        "reliability": [asdict(row) for row in found.reliability],
        "value_reliability": [asdict(row) for row in found.values],
        "policies": [asdict(row) for row in policies],
    }
    with together(), taking_long("drawing"):
        from evaluation.plots import judge_plot  # slow to import (matplotlib)

        judge_plot(plot, title, found)
        write_result(result, found.metrics, asdict(args), [args.seed], **extras)
    print_card(f"{title}; {right:.3f} of the steps are right", found, spearman)
    if value_metrics:
        heading = f"values of {len(outcomes):,} prefixes, {args.rollouts} rollouts each"
        print_metrics(heading, value_metrics)
    if found.best_threshold:
        threshold, f1 = found.best_threshold
        print(f"the highest processbench_f1 on these data is {f1:.3f}, at --threshold {threshold}")
    print(words, *notes, f"wrote {result} and {plot}", sep="\n")


if __name__ == "__main__":
    run(main)
