"""Base against tuned policy on held-out problems, by the judge's step scores and by exact accuracy.

Both policies answer greedily. A policy that gains reward without accuracy exploits its judge. The
log-prob margin is measured on pairs that the tuned policy's training kept out: `train.py dpo` names
its pairs in the model's folder. For another model, give them with --pairs.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import DtypeArgs, arg, check_input, check_least, check_model, parse_args, run
from common.errors import RecordError, UserError
from common.files import ROOT, TRAINING_JOB, at_root, read_records, write_records
from common.identity import rows_hash
from common.outputs import together
from common.progress import taking_long
from evaluation.metrics import Metric, compare
from evaluation.results import output_paths, print_comparison, write_result
from lm.registry import PromptArgs, style_of, warn_of_foreign_prompts
from reasoning.datasets.loading import load_pairs, problems_of
from reasoning.grading import graded, is_correct, step_accuracy
from reasoning.records import PreferencePair, Problem, ScoredPair
from reasoning.samples import Sample, show_samples
from reasoning.splits import MAKES_HELD_OUT, is_kept_out
from reward_model.protocols import aggregate
from reward_model.registry import JudgeArgs, check_judge, judge_files, open_judge, score_all

if TYPE_CHECKING:
    from lm.policy import Policy, Response

NAME = "reward_score_comparison"
RATES = ("accuracy", "unfinished")
MEASURES = ("reward", "reward_min", "accuracy", "step_accuracy", "unfinished", "steps")


@dataclass
class EvalArgs(JudgeArgs, PromptArgs, DtypeArgs):
    base_model: str = arg(
        at_root("models/policy-mini"), "policy before training: a model directory or a hub name"
    )
    tuned_model: str = arg(
        at_root("saved_model/stepwise_dpo_tinyllama"),
        "policy after training",
        aliases=["--model_name_or_path", "--model-name-or-path"],
    )
    input: str = arg(at_root("data/problems_test.jsonl"), "held-out problems")
    pairs: str | None = arg(
        None,
        "JSONL of pairs, of which those kept out of training are used (default: the pairs that the "
        "tuned model was trained on with train.py dpo; without them no margin is measured)",
    )
    output_dir: str = arg(
        at_root("evaluation/results"), f"folder of {NAME}.json, its answers and its plot"
    )
    limit: int | None = arg(None, "use the first LIMIT problems; all if not given")
    max_new_tokens: int = arg(256, "longest answer, in tokens")
    seed: int = arg(0, "seed of the bootstrap and of --judge shuffled (the answers are greedy)")
    overwrite: bool = arg(False, "replace an existing result")

    def __post_init__(self) -> None:
        check_least(self, limit=1, max_new_tokens=1, seed=0)


def training_pairs(model: str) -> tuple[str | None, list[PreferencePair], str]:
    """(file, its pairs, why there are none) of the pairs that a model was trained on.

    The file must have the pairs of the training's job file: another one at that path would have
    nothing to do with the model."""
    try:
        job = json.loads((Path(model) / TRAINING_JOB).read_text(encoding="utf-8"))
        name, count, expected = (job[key] for key in ("dataset", "pairs", "pairs_sha256"))
    except (OSError, ValueError, KeyError, TypeError):
        return None, [], f"{model} has no {TRAINING_JOB} of a training on pairs"
    if isinstance(name, dict):
        return None, [], f"{model} was trained on several data sets: give one of them with --pairs"
    for path in (str(name), str(ROOT / str(name))):  # a relative path may be meant from the root
        if Path(path).exists():
            try:
                pairs = [ScoredPair.from_row(asdict(pair)) for pair in load_pairs(path)]
            except RecordError:
                continue
            trained = [pair for pair in pairs if not is_kept_out(pair.prompt)][:count]
            if rows_hash(trained) == expected:
                return os.path.relpath(path), list(pairs), ""
    return None, [], f"{name}, on which {model} was trained, is not there any more or has changed"


def check(args: EvalArgs) -> tuple[list[Problem], list[PreferencePair], str]:
    """The problems, the kept-out pairs, and why there are none.

    Fills in `pairs` with those of the tuned model's training. Raises UserError or RecordError for
    anything wrong with the arguments or files, before any work."""

    def made_by(name: str, command: str) -> str | None:
        return command if getattr(args, name) == getattr(EvalArgs, name) else None

    check_model(args.base_model, made_by("base_model", "make models-policy"))
    check_model(args.tuned_model, made_by("tuned_model", "python train.py"))
    check_judge(args)
    style_of(args)
    check_input(args.input, made_by("input", MAKES_HELD_OUT))
    problems = problems_of(args.input, args.limit)
    if args.pairs is None:
        args.pairs, pairs, missing = training_pairs(args.tuned_model)
    else:
        check_input(args.pairs)
        pairs, missing = list(read_records(args.pairs, PreferencePair)), ""
    kept_out = [pair for pair in pairs if is_kept_out(pair.prompt)]
    if not kept_out:
        missing = missing or f"{args.pairs} has none of the pairs kept out of training"
    return problems, kept_out, missing


# One row of reward_score_comparison.jsonl: a Problem (reasoning/records.py) and both answers. The
# judge could not score an answer without scores. evaluation/report.py shows the rows.
#   {"prompt": "Mia has 12 apples. ...", "answer": "52", "steps": [...], "traps": [...],
#    "base_steps": ["Step 1: 12 + 14 = 26", ...], "base_scores": [0.98, ...],
#    "base_finished": true,                                                    it ended by itself
#    "tuned_steps": [...], "tuned_scores": [...], "tuned_finished": true}
@dataclass(frozen=True)
class Compared:
    """A problem with the answers of both policies and the judge's scores of their steps."""

    problem: Problem
    answers: dict[str, "Response"]  # base and tuned
    scores: dict[str, list[float]]  # without an answer that the judge cannot score

    def measures(self, side: str) -> dict[str, float]:
        """MEASURES of one answer; step_accuracy only with reference steps."""
        answer, scores = self.answers[side], self.scores[side]
        measures = {
            "reward": aggregate(scores, "mean"),
            "reward_min": aggregate(scores, "min"),
            "accuracy": float(is_correct(answer.steps, self.problem)),
            "unfinished": float(not answer.finished),
            "steps": float(len(answer.steps)),
        }
        if self.problem.steps:
            measures["step_accuracy"] = step_accuracy(answer.steps, self.problem)
        return measures

    def sample(self, side: str) -> Sample:
        """One answer with its verdict and its scores."""
        answer, scores = self.answers[side], self.scores.get(side)
        known = (self.problem.prompt, answer.steps, answer.finished, self.problem)
        return graded(*known, scores=scores)

    def row(self) -> dict[str, object]:
        row: dict[str, object] = asdict(self.problem)
        for side, answer in self.answers.items():
            row[f"{side}_steps"] = answer.steps
            row[f"{side}_scores"] = self.scores.get(side)
            row[f"{side}_finished"] = answer.finished
        return row


def margins(policy: "Policy", pairs: Sequence[PreferencePair], side: str) -> list[float]:
    """The log-prob of chosen minus that of rejected, for each pair."""
    rows = [(pair.prompt, pair.prefix, pair.chosen) for pair in pairs]
    chosen = policy.logps(rows, f"{side}: chosen")
    rows = [(pair.prompt, pair.prefix, pair.rejected) for pair in pairs]
    rejected = policy.logps(rows, f"{side}: rejected")
    return [better - worse for better, worse in zip(chosen, rejected, strict=True)]


def main() -> None:
    (args,) = parse_args(EvalArgs, description=__doc__)
    problems, pairs, missing = check(args)
    read = [args.base_model, args.tuned_model, args.input, args.pairs, *judge_files(args)]
    plot, rows, result = output_paths(args.output_dir, NAME, read, args.overwrite)
    models = {"base": args.base_model, "tuned": args.tuned_model}
    prompts = [problem.prompt for problem in problems]
    answers, logp_margins = {}, {}
    with open_judge(args) as judge:
        with taking_long("loading the libraries"):
            from lm.policy import Policy  # slow to import (torch)

        for side, model in models.items():
            policy = Policy.load(model, style_of(args))
            flag = "--base_model" if side == "base" else "--tuned_model"
            warn_of_foreign_prompts(policy, model, prompts, flag)
            replies = policy.generate(
                prompts, max_new_tokens=args.max_new_tokens, progress=f"{side} answers"
            )
            answers[side] = [reply for (reply,) in replies]
            if pairs:
                logp_margins[side] = margins(policy, pairs, side)
            del policy  # one model in memory at a time
        # Both answers to a problem are neighbours: the judge reads the problem once, and the judge
        # `shuffled` permutes the scores of both.
        solutions = [
            (prompt, answers[side][k].steps) for k, prompt in enumerate(prompts) for side in models
        ]
        scores = score_all(judge, solutions, "scores")

    compared = []
    for k, problem in enumerate(problems):
        both = dict(zip(models, scores[2 * k : 2 * k + 2], strict=True))
        known = {side: numbers for side, numbers in both.items() if numbers is not None}
        compared.append(Compared(problem, {side: answers[side][k] for side in models}, known))
    scored = [row for row in compared if len(row.scores) == len(models)]
    left_out = len(problems) - len(scored)
    if not scored:
        raise UserError(
            f"nothing to compare: an answer to each of the {left_out} problems is "
            f"{judge.unscored_reason}"
        )
    measures = {side: [row.measures(side) for row in scored] for side in models}
    metrics: dict[str, Metric] = {}
    with taking_long("computing intervals"):
        for name in MEASURES:
            base, tuned = ([row[name] for row in measures[side] if name in row] for side in models)
            if base:
                metrics |= compare(name, base, tuned, name in RATES, args.seed)
        if pairs:
            base, tuned = logp_margins.values()
            metrics |= compare("logp_margin", base, tuned, seed=args.seed)

    title = f"{len(scored):,} held-out problems, greedy answers"
    shown = {"reward": "mean step reward (judge)", "accuracy": "exact accuracy"}
    extras = {
        "base_avg_score_diff": metrics["base_reward"].value,
        "tuned_avg_score_diff": metrics["tuned_reward"].value,
        "improvement": metrics["reward_improvement"].value,
        "num_examples": len(scored),
        "left_out": left_out,
    }
    with together(), taking_long("drawing"):
        from evaluation.plots import comparison_plot  # slow to import (matplotlib)

        write_records(rows, (row.row() for row in compared))
        comparison_plot(plot, metrics, shown, title)
        write_result(result, metrics, asdict(args), [args.seed], **extras)
    names = "".join(f"\n{side}: {model}" for side, model in models.items())
    print_comparison(f"{title}{names}\njudge: {judge}", metrics)
    if left_out:
        print(
            f"{left_out} of {len(problems)} problems left out for both: an answer is "
            f"{judge.unscored_reason}"
        )
    if missing:
        print(f"no logp_margin: {missing} (--pairs names others)")
    for side in models:
        if not metrics[f"{side}_accuracy"].value or metrics[f"{side}_unfinished"].value == 1:
            print(f"{side}: no answer is right, or none ended by itself")
            show_samples([row.sample(side) for row in compared])
    print(f"wrote {result}, {rows} (answers and scores) and {plot}")


if __name__ == "__main__":
    run(main)
