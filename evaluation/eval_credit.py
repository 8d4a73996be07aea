"""Credit assignment of a training: which steps became more likely, at traps and elsewhere.

    python evaluation/eval_credit.py --models saved_model/stepwise saved_model/dpo saved_model/sft

Log-probs: steps of pairs that were kept out of training, tuned minus base, in nats. Next steps: on
test problems, whether the greedy step after a right prefix is the reference's. Only the problems of
reasoning/problems.py have known traps. Writes credit.json and a plot.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import DtypeArgs, arg, check_input, check_model, parse_args, run
from common.errors import UserError
from common.files import at_root, read_records
from common.outputs import together
from common.progress import taking_long
from evaluation.metrics import Metric, clustered_mean_metric
from evaluation.results import output_paths, print_table, write_result
from reasoning.grading import grade_steps
from reasoning.problems import problems as generate_problems
from reasoning.records import PreferencePair, Problem
from reasoning.splits import MAKES_HELD_OUT, is_kept_out

# kinds of steps -> their names in the plot
KINDS = {
    "chosen_trap": "chosen,\nat traps",
    "chosen_elsewhere": "chosen,\nelsewhere",
    "rejected_error_trap": "rejected: first\nerror, at a trap",
    "rejected_error_elsewhere": "rejected: first\nerror, elsewhere",
    "rejected_right": "rejected:\nright steps",
    "rejected_after": "rejected: after\nthe first error",
}
PLACES = ("trap", "elsewhere")
SIDES = ("chosen", "rejected")


@dataclass
class CreditArgs(DtypeArgs):
    models: list[str] = arg(
        [], "tuned models: directories with different last parts, used as names"
    )
    base_model: str = arg(
        at_root("models/policy-mini"), "the model that all of them were trained from"
    )
    pairs: str = arg(
        at_root("data/rewarded.jsonl"), "JSONL of pairs; only those kept out of training are used"
    )
    input: str = arg(at_root("data/problems_test.jsonl"), "JSONL of held-out problems with traps")
    output_dir: str = arg(at_root("evaluation/results"), "folder of credit.json and its plot")
    limit: int | None = arg(None, "use the first LIMIT problems")
    seed: int = arg(0, "seed of the bootstrap")
    overwrite: bool = arg(False, "replace an existing result")


def kinds_of(pair: PreferencePair, problem: Problem, side: str) -> list[str]:
    """The kind (a key of KINDS) of every step of one side of a pair of this problem."""
    steps, start = getattr(pair, side), len(pair.prefix)
    scores = grade_steps([*pair.prefix, *steps], problem)[start:]
    kinds, all_right = [], True
    for k, score in enumerate(scores, start):
        place = "trap" if k < len(problem.traps) and problem.traps[k] else "elsewhere"
        if side == "chosen":
            kinds.append(f"chosen_{place}")
        elif score:
            kinds.append("rejected_right")
        else:
            kinds.append(f"rejected_error_{place}" if all_right else "rejected_after")
            all_right = False
    return kinds


def check(args: CreditArgs) -> tuple[list[str], Path, Path]:
    """The names of the models, and the paths of result and plot. Raises UserError."""
    if not args.models:
        raise UserError("--models: name one tuned model or more")
    names = [Path(model).resolve().name for model in args.models]
    if len(set(names)) < len(names):
        raise UserError(f"--models: two have the same last part: {', '.join(names)}")
    for model in (args.base_model, *args.models):
        check_model(model)
    check_input(args.input, MAKES_HELD_OUT if args.input == CreditArgs.input else None)
    makes_scores = "python reward_model/evaluate_steps.py"
    check_input(args.pairs, makes_scores if args.pairs == CreditArgs.pairs else None)
    read = [args.base_model, *args.models, args.pairs, args.input]
    plot, _, result = output_paths(args.output_dir, "credit", read, args.overwrite)
    return names, result, plot


def read_problems(args: CreditArgs) -> list[Problem]:
    """The held-out problems. Raises RecordError, or UserError if one has no steps or no traps."""
    problems = list(islice(read_records(args.input, Problem), args.limit))
    if not all(problem.steps and problem.traps for problem in problems):
        raise UserError(
            f"{args.input}: every problem needs steps and traps, as in reasoning/problems.py"
        )
    return problems


def read_pairs(args: CreditArgs) -> list[tuple[PreferencePair, Problem]]:
    """The kept-out pairs of train problems with known traps. Raises RecordError or UserError."""
    kept = [pair for pair in read_records(args.pairs, PreferencePair) if is_kept_out(pair.prompt)]
    prompts, known = {pair.prompt for pair in kept}, {}
    for problem in generate_problems("train"):
        if problem.prompt in prompts:
            known[problem.prompt] = problem
        if len(known) == len(prompts):
            break
    pairs = [(pair, known[pair.prompt]) for pair in kept if pair.prompt in known]
    if not pairs:
        raise UserError(
            f"{args.pairs}: none of its pairs was kept out of training and belongs to a train "
            "problem with known traps"
        )
    return pairs


def print_by_model(
    title: str, metrics: dict[str, Metric], models: Sequence[str], group: str, kinds: Sequence[str]
) -> None:
    """A table of MODEL/GROUP/KIND, a row a model and a column a kind."""
    rows = [
        [model, *(metrics.get(f"{model}/{group}/{kind}", "") for kind in kinds)] for model in models
    ]
    print_table(title, ["model", *kinds], rows)


def main() -> None:
    (args,) = parse_args(CreditArgs, description=__doc__)
    names, result, plot = check(args)
    problems = read_problems(args)
    pairs = read_pairs(args)

    # slow to import (torch, matplotlib)
    with taking_long("loading the libraries"):
        from lm.policy import Policy

    metrics: dict[str, Metric] = {}
    base_logps: dict[str, list[list[float]]] = {}  # side -> (pairs, steps)
    models = dict(zip(["base", *names], [args.base_model, *args.models], strict=True))
    for name, model in models.items():
        policy = Policy.load(model)
        changes: dict[str, tuple[list[float], list[int]]] = defaultdict(lambda: ([], []))
        for side in SIDES:
            rows = [(pair.prompt, pair.prefix, getattr(pair, side)) for pair, _ in pairs]
            step_logps = policy.step_logps(rows, f"{name}: {side}")
            logps = [[step.logp for step in steps] for steps in step_logps]
            before = base_logps.setdefault(side, logps)
            for k, (pair, problem) in enumerate(pairs):
                for kind, new, old in zip(
                    kinds_of(pair, problem, side), logps[k], before[k], strict=True
                ):
                    changes[kind][0].append(new - old)
                    changes[kind][1].append(k)
        right: dict[str, tuple[list[float], list[int]]] = defaultdict(lambda: ([], []))
        next_steps = policy.step_logps(
            [(problem.prompt, [], problem.steps) for problem in problems], f"{name}: next steps"
        )
        for k, steps in enumerate(next_steps):
            for step, trap in zip(steps, problems[k].traps, strict=True):
                values, clusters = right["trap" if trap else "elsewhere"]
                values.append(float(step.greedy))
                clusters.append(k)
        for kind in KINDS if name != "base" else ():
            if kind in changes:
                metric = clustered_mean_metric(*changes[kind], args.seed)
                metrics[f"{name}/logp_change/{kind}"] = metric
        for place, found in right.items():
            metric = clustered_mean_metric(*found, args.seed)
            metrics[f"{name}/next_step_accuracy/{place}"] = metric

    counts = {"pairs": len(pairs), "problems": len(problems)}
    with together(), taking_long("drawing"):
        from evaluation.plots import credit_plot

        credit_plot(plot, metrics, list(models), KINDS)
        write_result(result, metrics, asdict(args), [args.seed], **counts)
    title = f"change of the log-prob of a step, nats, {len(pairs)} pairs kept out of training"
    print_by_model(title, metrics, names, "logp_change", list(KINDS))
    title = f"share of right greedy steps after a right prefix, {len(problems):,} test problems"
    print_by_model(title, metrics, list(models), "next_step_accuracy", PLACES)
    print(f"wrote {result} and {plot}")


if __name__ == "__main__":
    run(main)
