"""Where the credit of a training went: which steps became more likely, and which next steps are right, at traps and elsewhere.

    python evaluation/eval_credit.py --models saved_model/stepwise saved_model/dpo saved_model/sft

Log-probs: the steps of pairs that were kept out of training, tuned minus base, in nats. Next steps: on test problems, whether the
greedy step after a right beginning is the reference's. Traps are known for the problems of reasoning/problems.py alone.
Writes credit.json and a picture.
"""

import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import check_input, check_model, check_output, parse_args, run
from common.errors import UserError
from common.files import at_root, read_records
from reasoning.records import PreferencePair, Problem
from reasoning.splits import is_kept_out

# what the steps of pairs are told apart by -> in words
KINDS = {
    "chosen_trap": "chosen,\nat traps",
    "chosen_elsewhere": "chosen,\nelsewhere",
    "rejected_error_trap": "rejected: first\nerror, at a trap",
    "rejected_error_elsewhere": "rejected: first\nerror, elsewhere",
    "rejected_right": "rejected:\nright steps",
    "rejected_after": "rejected: after\nthe first error",
}


@dataclass
class CreditArgs:
    models: list[str] = field(
        default_factory=list,
        metadata={"help": "tuned models: directories, each named by its last part"},
    )
    base_model: str = field(
        default_factory=lambda: at_root("models/policy-mini"),
        metadata={"help": "the model all of them were trained from"},
    )
    pairs: str = field(
        default_factory=lambda: at_root("data/rewarded.jsonl"),
        metadata={"help": "pairs; those kept out of training are read"},
    )
    input: str = field(
        default_factory=lambda: at_root("data/problems_test.jsonl"),
        metadata={"help": "JSONL of held-out problems with traps"},
    )
    output_dir: str = field(
        default_factory=lambda: at_root("evaluation/results"),
        metadata={"help": "folder of credit.json; the picture in ../plots"},
    )
    limit: int | None = field(default=None, metadata={"help": "use the first LIMIT problems"})
    seed: int = field(default=0, metadata={"help": "seed of the bootstrap"})


def kinds_of(pair: PreferencePair, problem: Problem, side: str) -> list[str]:
    """The key of KINDS of every step of one side of a pair of this problem."""
    from reasoning.grading import grade_steps

    steps, start = getattr(pair, side), len(pair.prefix)
    right = grade_steps([*pair.prefix, *steps], problem)[start:]
    kinds, before = [], True
    for k, score in enumerate(right, start):
        place = "trap" if k < len(problem.traps) and problem.traps[k] else "elsewhere"
        if side == "chosen":
            kinds.append(f"chosen_{place}")
        elif score:
            kinds.append("rejected_right")
        else:
            kinds.append(f"rejected_error_{place}" if before else "rejected_after")
            before = False
    return kinds


def main() -> None:
    (args,) = parse_args(CreditArgs, description=__doc__)
    if not args.models:
        raise UserError("--models: name one tuned model or more")
    names = [Path(model).resolve().name for model in args.models]
    if len(set(names)) < len(names):
        raise UserError(f"--models: two have the same last part: {', '.join(names)}")
    for model in (args.base_model, *args.models):
        check_model(model)
    check_input(args.input, "make data")
    check_input(args.pairs, "make data")
    output = Path(args.output_dir) / "credit.json"
    picture = output.parent.parent / "plots" / "credit.png"
    for path in (output, picture):
        check_output(str(path), overwrite=True)
    problems = list(read_records(args.input, Problem))[: args.limit]
    if not all(problem.steps and problem.traps for problem in problems):
        raise UserError(
            f"{args.input}: problems with steps and traps are needed, as reasoning/problems.py makes them"
        )

    from reasoning.problems import problems as generate

    known = {problem.prompt: problem for problem in generate("train")}
    kept = [pair for pair in read_records(args.pairs, PreferencePair) if is_kept_out(pair.prompt)]
    pairs = [pair for pair in kept if pair.prompt in known]
    if not pairs:
        raise UserError(
            f"{args.pairs}: none of its pairs was kept out of training and is of a train problem with known traps"
        )

    from evaluation.metrics import clustered_mean_metric, print_table, write_result
    from evaluation.plots import credit_plot
    from lm.policy import Policy

    sides = ("chosen", "rejected")
    kinds = {side: [kinds_of(pair, known[pair.prompt], side) for pair in pairs] for side in sides}
    metrics, base_logps = {}, {}
    for name, model in zip(["base", *names], [args.base_model, *args.models], strict=True):
        policy = Policy.load(model)
        changes = defaultdict(list)
        for side in sides:
            rows = [(pair.prompt, pair.prefix, getattr(pair, side)) for pair in pairs]
            logps = [
                [step.logp for step in steps]
                for steps in policy.step_logps(rows, f"{name}: {side}")
            ]
            base_logps.setdefault(side, logps)
            for k, (steps, of_base) in enumerate(zip(logps, base_logps[side], strict=True)):
                for kind, now, before in zip(kinds[side][k], steps, of_base, strict=True):
                    changes[kind].append((now - before, k))
        next_step = defaultdict(list)
        references = [(problem.prompt, [], problem.steps) for problem in problems]
        for k, steps in enumerate(policy.step_logps(references, f"{name}: next steps")):
            for step, trap in zip(steps, problems[k].traps, strict=True):
                next_step["trap" if trap else "elsewhere"].append((float(step.greedy), k))
        for kind in KINDS if name != "base" else ():
            if changes[kind]:
                metrics[f"{name}/logp_change/{kind}"] = clustered_mean_metric(
                    *zip(*changes[kind], strict=True), args.seed
                )
        for place, values in next_step.items():
            metrics[f"{name}/next_step_accuracy/{place}"] = clustered_mean_metric(
                *zip(*values, strict=True), args.seed
            )

    write_result(
        output, metrics, asdict(args), [args.seed], pairs=len(pairs), problems=len(problems)
    )
    credit_plot(picture, metrics, ["base", *names], KINDS)

    def row(name: str, kind: str, columns: list[str]) -> list:
        return [name, *(metrics.get(f"{name}/{kind}/{column}", "") for column in columns)]

    title = f"change of a step's log-prob, nats, {len(pairs)} pairs kept out of training"
    print_table(title, ["model", *KINDS], [row(name, "logp_change", list(KINDS)) for name in names])
    title = f"greedy step right after a right beginning, {len(problems):,} test problems"
    places = ["trap", "elsewhere"]
    print_table(
        title,
        ["model", *places],
        [row(name, "next_step_accuracy", places) for name in ["base", *names]],
    )
    print(f"wrote {output} and {picture}")


if __name__ == "__main__":
    run(main)
