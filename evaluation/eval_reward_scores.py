"""Base against tuned on held-out problems: both answer greedily, the judge scores every step, the answers are checked exactly.

Reward and exact accuracy stand side by side, so that a policy that fools its judge is seen.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import check_input, check_model, check_output, parse_args, run
from common.errors import UserError
from common.files import at_root, read_records, write_records
from reasoning.records import PreferencePair, Problem
from reasoning.splits import is_kept_out
from reward_model.registry import JudgeArgs, check_judge, open_judge, score_all

NAME = "reward_score_comparison"
RATES = ("accuracy", "unfinished")


@dataclass
class EvalArgs(JudgeArgs):
    base_model: str = field(
        default=at_root("models/policy-mini"),
        metadata={"help": "policy before training: a model directory or a hub name"},
    )
    tuned_model: str = field(
        default=at_root("saved_model/stepwise_dpo_tinyllama"),
        metadata={
            "help": "policy after training",
            "aliases": ["--model_name_or_path", "--model-name-or-path"],
        },
    )
    input: str = field(
        default=at_root("data/problems_test.jsonl"), metadata={"help": "JSONL of held-out problems"}
    )
    pairs: str = field(
        default=at_root("data/rewarded.jsonl"),
        metadata={"help": "JSONL of pairs; the tenth that is kept out of training is used"},
    )
    output_dir: str = field(
        default=at_root("evaluation/results"),
        metadata={"help": "folder of the results (replaced); pictures go to ../plots"},
    )
    limit: int | None = field(
        default=None, metadata={"help": "use the first LIMIT problems; all if not given"}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "longest answer, in tokens"})
    seed: int = field(
        default=0,
        metadata={"help": "seed of the bootstrap and of --judge shuffled (the answers are greedy)"},
    )

    def __post_init__(self):
        for name in ("limit", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"argument --{name}: expected 1 or more, got {value}")
        if self.seed < 0:
            raise ValueError(f"argument --seed: expected 0 or more, got {self.seed}")


def check(args: EvalArgs) -> tuple[list[Problem], list[PreferencePair], dict[str, Path]]:
    """The problems, the kept-out pairs and where the outputs go; everything that can be wrong is found here, before any work."""

    def made_by(name: str, command: str) -> str | None:
        return command if getattr(args, name) == getattr(EvalArgs, name) else None

    check_model(args.base_model, made_by("base_model", "python utils/build_embedded_models.py"))
    check_model(args.tuned_model, made_by("tuned_model", "python train.py"))
    check_judge(args)
    check_input(args.input, made_by("input", "make data"))
    check_input(args.pairs, made_by("pairs", "python reward_model/evaluate_steps.py"))
    problems = list(read_records(args.input, Problem))[: args.limit]
    pairs = [pair for pair in read_records(args.pairs, PreferencePair) if is_kept_out(pair.prompt)]
    folder = Path(args.output_dir)
    outputs = {
        "answers": folder / f"{NAME}.jsonl",
        "plot": folder.parent / "plots" / f"{NAME}.png",
        "result": folder / f"{NAME}.json",
    }
    for path in outputs.values():
        check_output(str(path), overwrite=True)
    return problems, pairs, outputs


def measure(problem: Problem, answer, scores: list[float]) -> dict[str, float]:
    """The measures of one answer (DESIGN: metric names)."""
    from reasoning.grading import is_correct, step_accuracy
    from reward_model.protocols import aggregate

    measures = {
        "reward": aggregate(scores, "mean"),
        "reward_min": aggregate(scores, "min"),
        "accuracy": float(is_correct(answer.steps, problem)),
    }
    if problem.steps:
        measures["step_accuracy"] = step_accuracy(answer.steps, problem)
    return measures | {"unfinished": float(not answer.finished), "steps": float(len(answer.steps))}


def main() -> None:
    (args,) = parse_args(EvalArgs, description=__doc__)
    problems, pairs, outputs = check(args)

    from evaluation.metrics import compare, print_comparison, write_result
    from evaluation.plots import comparison_plot

    answers, margins = {}, {}
    with open_judge(args) as judge:
        from lm.policy import Policy

        for side, model in (("base", args.base_model), ("tuned", args.tuned_model)):
            policy = Policy.load(model)
            replies = policy.generate(
                [problem.prompt for problem in problems],
                max_new_tokens=args.max_new_tokens,
                progress=f"{side} answers",
            )
            answers[side] = [reply[0] for reply in replies]
            chosen = policy.logps([(pair.prompt, pair.prefix, pair.chosen) for pair in pairs])
            rejected = policy.logps([(pair.prompt, pair.prefix, pair.rejected) for pair in pairs])
            margins[side] = [better - worse for better, worse in zip(chosen, rejected, strict=True)]
            del policy  # one model in memory at a time
        both = [
            (problem.prompt, answers[side][k].steps)
            for k, problem in enumerate(problems)
            for side in answers
        ]
        # side by side: the judge reads a problem once, `shuffled` permutes over both
        of_both = score_all(judge, both, "scores")
        scores = {"base": of_both[::2], "tuned": of_both[1::2]}

    scored = [
        k
        for k in range(len(problems))
        if scores["base"][k] is not None and scores["tuned"][k] is not None
    ]
    left_out = len(problems) - len(scored)
    if not scored:
        raise UserError(
            f"nothing to compare: an answer to each of the {left_out} problems is {judge.unscored_reason}"
        )
    measures = {
        side: [measure(problems[k], answers[side][k], scores[side][k]) for k in scored]
        for side in answers
    }
    metrics = {}
    for name in ("reward", "reward_min", "accuracy", "step_accuracy", "unfinished", "steps"):
        base, tuned = (
            [row[name] for row in measures[side] if name in row] for side in ("base", "tuned")
        )
        if base:
            metrics |= compare(name, base, tuned, name in RATES, args.seed)
    if pairs:
        metrics |= compare("logp_margin", margins["base"], margins["tuned"], seed=args.seed)

    write_records(
        outputs["answers"],
        (_row(problem, answers, scores, k) for k, problem in enumerate(problems)),
    )
    title = f"{len(scored):,} held-out problems, greedy answers"
    comparison_plot(
        outputs["plot"],
        metrics,
        {"reward": "mean step reward (judge)", "accuracy": "exact accuracy"},
        title,
    )
    write_result(
        outputs["result"],
        metrics,
        asdict(args),
        [args.seed],
        base_avg_score_diff=metrics["base_reward"].value,
        tuned_avg_score_diff=metrics["tuned_reward"].value,
        improvement=metrics["reward_improvement"].value,
        num_examples=len(scored),
        left_out=left_out,
    )
    print_comparison(
        f"{title}\nbase: {args.base_model}\ntuned: {args.tuned_model}\njudge: {judge}", metrics
    )
    if left_out:
        print(
            f"{left_out} of {len(problems)} problems left out for both: an answer is {judge.unscored_reason}"
        )
    if not pairs:
        print(f"{args.pairs} holds none of the pairs kept out of training: no logp_margin")
    print(
        f"wrote {outputs['result']}, {outputs['answers']} (every answer with its scores) and {outputs['plot']}"
    )


# One row of reward_score_comparison.jsonl; base_scores and tuned_scores are missing where the judge cannot score the answer:
#   {"prompt": "Mia has 12 apples. ...", "answer": "52",
#    "base_steps": ["Step 1: 12 + 14 = 26", ...], "base_scores": [0.98, ...], "base_finished": true,    ended by itself
#    "tuned_steps": [...], "tuned_scores": [...], "tuned_finished": true}
def _row(problem: Problem, answers: dict, scores: dict, k: int) -> dict:
    row = {"prompt": problem.prompt, "answer": problem.answer}
    for side in answers:
        answer = answers[side][k]
        row |= {
            f"{side}_steps": answer.steps,
            f"{side}_scores": scores[side][k],
            f"{side}_finished": answer.finished,
        }
    return row


if __name__ == "__main__":
    run(main)
