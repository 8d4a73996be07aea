"""Sample solutions from a policy and write preference pairs (data/synthetic_dataset.jsonl).

    python utils/build_synthetic_dataset.py --overwrite

The policy answers every problem several times. A pair is one right and one wrong answer (`--pair_by
answer`, rejection sampling), or the sample with the highest and the one with the lowest judge score
(`--pair_by judge`, which needs no reference answers). The steps with which both sides begin become
the pair's `prefix`. Held-out problems are refused. A killed run resumes when it is started again.
"""

import hashlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from common.cli import arg, beside, check_least, check_outputs, here, parse_args, run
from common.engine import FATAL, Job, ShardArgs
from common.errors import UserError
from common.files import at_root, write_records
from lm.known_words import MOST_TEXTS
from lm.registry import PolicyArgs, check_policy, open_policy, policy_identity
from reasoning.datasets.files import FieldArgs
from reasoning.datasets.selection import select_problems
from reasoning.grading import graded, is_correct
from reasoning.records import Problem, Prompt
from reasoning.samples import (
    FEW,
    Sample,
    SaveSamplesArgs,
    samples_file,
    show_samples,
    write_samples,
)
from reward_model.protocols import StepJudge
from reward_model.registry import (
    JudgeArgs,
    check_judge,
    judge_files,
    judge_flags,
    judge_identity,
    judge_record,
    open_judge,
    warn_of_foreign_text,
)
from reward_model.solution_pairs import pair_by_answer, pair_by_judge

if TYPE_CHECKING:
    from lm.policy import Response

UNIT = (
    64  # problems sampled together; with the same seed such a group always gives the same samples
)

Steps = list[str]
Selected = list[Problem] | list[Prompt]


@dataclass
class PairArguments(JudgeArgs, PolicyArgs, FieldArgs, SaveSamplesArgs, ShardArgs):
    input: str | None = arg(
        None,
        "problems in any shape that reasoning/datasets/shapes.py knows; default: the "
        "generated train problems",
    )
    output: str = arg(at_root("data/synthetic_dataset.jsonl"), "where the pairs are written, JSONL")
    pair_by: str = arg(
        "answer",
        "answer: a right against a wrong final answer; judge: the highest against the "
        "lowest mean step score",
        choices=["answer", "judge"],
    )
    limit: int | None = arg(
        None, "use the first N problems; default: 2000 train problems, or all of --input"
    )
    samples: int = arg(8, "samples per problem")
    temperature: float = arg(1.0, "sampling temperature, above 0")
    max_new_tokens: int = arg(256, "most tokens per sample")
    seed: int = arg(0, "seed of the samples and of --judge shuffled")
    overwrite: bool = arg(False, "replace the output")

    def __post_init__(self) -> None:
        check_least(self, samples=1, max_new_tokens=1, limit=1)
        if self.temperature <= 0:
            raise UserError(f"argument --temperature: expected above 0, got {self.temperature}")
        if self.judge != JudgeArgs.judge and self.pair_by != "judge":
            raise UserError("argument --judge: samples are judged with --pair_by judge only")


def main() -> None:
    (args,) = parse_args(PairArguments, description=__doc__.split("\n\n")[0])
    by_answer = args.pair_by == "answer"
    selected = select_problems(args.input, args.limit, 2000, args, with_answers=by_answer)
    check_policy(args)
    if args.pair_by == "judge":
        check_judge(args)
    settings = ("pair_by", "samples", "temperature", "max_new_tokens", "seed")
    identity = {name: getattr(args, name) for name in settings} | policy_identity(args)
    rows_read = json.dumps([vars(problem) for problem in selected])
    identity["problems"] = hashlib.sha256(rows_read.encode()).hexdigest()
    if args.pair_by == "judge":
        identity |= judge_identity(args)
    if args.save_samples:
        identity["save_samples"] = True
    read = [args.input, args.model_name_or_path, *judge_files(args)]
    job = Job(args, identity, selected, UNIT)
    may_replace = job.may_replace()
    check_outputs(job.outputs, read, may_replace)
    samples_path = None if job.is_part else samples_file(args.output, may_replace)

    rows = job.open()
    if len(rows):
        print(f"resuming: {len(rows)} of {len(selected)} problems are done")
    prompts = [problem.prompt for problem in job.some(MOST_TEXTS)]
    left_out = partial(without_pair, args.samples)
    job.fill(rows, partial(Sampling, args, prompts), left_out, desc="sampling", noun="problem")
    if job.is_part:
        return
    found = rows.rows
    pairs = list({json.dumps(row["pair"]): row["pair"] for row in found if row["pair"]}.values())
    print_summary(selected, found, pairs)
    if len(pairs) < FEW * len(selected):
        samples = [Sample(**row["sample"]) for row in found if row.get("sample")]
        show_samples(samples, samples_path)
    if args.save_samples:
        write_samples(samples_path, found)
    job.write_left_out([p for p, row in zip(selected, found, strict=True) if is_left_out(row)])
    if not pairs:
        rows.finish()
        raise UserError(f"no pairs could be made (see above), nothing was written to {args.output}")
    write_records(args.output, pairs)
    rows.finish()
    print(f"wrote {len(pairs)} pairs to {args.output}")
    flags = ("--input", args.output, "--output", beside(args.output, "scored"), *judge_flags(args))
    print(f"next: {here('python reward_model/evaluate_steps.py', *flags)}")


class Sampling:
    """Samples problems with the policy, and with --pair_by judge the judge, that it holds.

    prompts: some of those that it will answer, to see whether the policy knows their words."""

    def __init__(self, args: PairArguments, prompts: list[str]):
        self.args, self.stack, self.judge = args, ExitStack(), None
        self.make_pair: Callable = pair_by_answer
        if args.pair_by == "judge":
            self.judge = self.stack.enter_context(open_judge(args))
            self.make_pair = partial(pair_by_judge, judge=judge_record(args))
        self.policy = open_policy(args, prompts)
        self.is_first = True

    def __call__(self, start: int, group: Selected) -> list[dict]:
        """A row for each problem: its pair, or the reason why there is none, and counts."""
        args, judge = self.args, self.judge
        options = {name: getattr(args, name) for name in ("temperature", "max_new_tokens")}
        no_sample = "no sample ended"
        prompts, seed = [problem.prompt for problem in group], args.seed * 1_000_003 + start
        answers = self.policy.generate(prompts, n=args.samples, seed=seed, **options)
        # for each problem its samples that ended, with a judge (steps, scores), else the steps
        candidates = [
            [response.steps for response in responses if response.finished and response.steps]
            for responses in answers
        ]
        ended = candidates
        if judge:
            no_sample += f", or all were {judge.unscored_reason}"
            if self.is_first:
                pool = zip(group, ended, strict=True)
                solutions = [(p.prompt, steps) for p, own in pool for steps in own]
                warn_of_foreign_text(judge, solutions)
                self.is_first = False
            candidates = score_group(judge, group, ended)
            ended = [[steps for steps, _ in scored] for scored in candidates]
        rows = []
        for problem, responses, samples, own in zip(group, answers, ended, candidates, strict=True):
            pair, why_not = self.make_pair(problem, own) if own else (None, no_sample)
            right = None
            if isinstance(problem, Problem):
                right = sum(is_correct(steps, problem) for steps in samples)
            row = {"samples": args.samples, "ended": len(samples), "right": right}
            row |= {"why_not": why_not, "pair": vars(pair) if pair else False}
            if not pair:  # a sample that shows why
                row["sample"] = asdict(example(problem, responses[0], own if judge else []))
            if args.save_samples:
                scored = own if judge else []
                row["all"] = [asdict(example(problem, each, scored)) for each in responses]
            rows.append(row)
        return rows

    def close(self) -> None:
        self.stack.close()


def without_pair(samples: int, problem: Problem | Prompt, reason: str) -> dict:
    """The row of a problem that is left out."""
    right = 0 if isinstance(problem, Problem) else None
    return {"samples": samples, "ended": 0, "right": right, "why_not": reason, "pair": False}


def is_left_out(row: dict) -> bool:
    return row["why_not"] == FATAL


def example(
    problem: Problem | Prompt, response: "Response", scored: list[tuple[Steps, list[float]]]
) -> Sample:
    """A sample of a problem with its verdict, and with its scores if it was judged."""
    scores = next((scores for steps, scores in scored if steps == response.steps), None)
    reference = problem if isinstance(problem, Problem) else None
    return graded(problem.prompt, response.steps, response.finished, reference, scores=scores)


def score_group(
    judge: StepJudge, group: Selected, samples: list[list[Steps]]
) -> list[list[tuple[Steps, list[float]]]]:
    """For each problem (steps, step scores) of those of its samples that the judge can score."""
    keys = [
        [(problem.prompt, tuple(steps)) for steps in own]
        for problem, own in zip(group, samples, strict=True)
    ]
    solutions = list(dict.fromkeys(itertools.chain.from_iterable(keys)))
    scores = dict(zip(solutions, judge.score_steps(solutions), strict=True))
    return [[(list(key[1]), scores[key]) for key in own if scores[key] is not None] for own in keys]


def print_summary(selected: Selected, rows: list[dict], pairs: list[dict]) -> None:
    samples, ended = (sum(row[name] for row in rows) for name in ("samples", "ended"))
    print(f"{len(selected)} problems, {samples} samples, {ended} ended by themselves")
    if isinstance(selected[0], Problem):
        right = sum(row["right"] for row in rows)
        print(f"{right} samples right ({right / samples:.3f})")
    why_not = Counter(row["why_not"] for row in rows if row["why_not"])
    dropped = ", ".join(f"{why}: {count}" for why, count in why_not.most_common())
    print(f"{len(pairs)} pairs" + (f"; problems without a pair: {dropped}" if dropped else ""))


if __name__ == "__main__":
    run(main)
