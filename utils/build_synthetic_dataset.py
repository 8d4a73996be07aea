"""Policy samples -> preference pairs (data/synthetic_dataset.jsonl).

    python utils/build_synthetic_dataset.py --overwrite

Every problem is answered several times; a right answer against a wrong one makes a pair (`--pair_by answer`, rejection sampling),
or the sample a judge likes best against the one it likes least (`--pair_by judge`, no answer needed). Steps that both begin with
go to `prefix`. Held-out problems are refused. Killed, it resumes.
"""

import hashlib
import itertools
import json
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import check_output, parse_args, run
from common.errors import UserError
from common.files import ResumableRows, at_root, read_records, write_records
from lm.registry import PolicyArgs, check_policy, open_policy, policy_identity
from reasoning.datasets.loading import load_problems
from reasoning.grading import is_correct
from reasoning.problems import problems
from reasoning.records import PreferencePair, Problem, Prompt
from reasoning.splits import refuse_held_out
from reward_model.protocols import StepJudge, aggregate
from reward_model.registry import JudgeArgs, check_judge, judge_identity, open_judge

UNIT = 64  # problems sampled together: with the same seed a group always gives the same samples


@dataclass
class PairArguments(JudgeArgs, PolicyArgs):
    input: str | None = field(
        default=None,
        metadata={
            "help": "problems, of any shape that reasoning/datasets/shapes.py knows; default: the generated train problems"
        },
    )
    output: str = field(
        default_factory=lambda: at_root("data/synthetic_dataset.jsonl"),
        metadata={"help": "the pairs"},
    )
    pair_by: str = field(
        default="answer",
        metadata={
            "help": "answer: right against wrong; judge: best against worst mean step score",
            "choices": ["answer", "judge"],
        },
    )
    limit: int | None = field(
        default=None,
        metadata={
            "help": "use the first N problems; default: 2000 of the train problems, all of --input"
        },
    )
    samples: int = field(default=8, metadata={"help": "samples a problem"})
    temperature: float = field(default=1.0, metadata={"help": "sampling temperature, above 0"})
    max_new_tokens: int = field(default=256, metadata={"help": "tokens a sample may have"})
    seed: int = field(default=0, metadata={"help": "seed of the samples and of --judge shuffled"})
    overwrite: bool = field(default=False, metadata={"help": "replace the output"})

    def __post_init__(self):
        for name in ("samples", "max_new_tokens", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"argument --{name}: expected 1 or more, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise UserError(f"argument --temperature: expected above 0, got {self.temperature}")
        if self.judge != JudgeArgs.judge and self.pair_by != "judge":
            raise UserError("argument --judge: samples are judged with --pair_by judge only")


def read_problems(args: PairArguments) -> list[Problem] | list[Prompt]:
    """Raises UserError if one of them is held out."""
    if args.input is None:
        return list(itertools.islice(problems("train"), args.limit or 2000))
    rows = (
        load_problems(args.input) if args.pair_by == "answer" else read_records(args.input, Prompt)
    )
    tasks = list(itertools.islice({task.prompt: task for task in rows}.values(), args.limit))
    refuse_held_out(args.input, tasks)
    return tasks


def pair_by_answer(task: Problem, samples: list[list[str]]) -> tuple[PreferencePair | None, str]:
    """(pair, why not): the first right sample against the first wrong one."""
    right = [steps for steps in samples if is_correct(steps, task)]
    wrong = [steps for steps in samples if steps not in right]
    if not right or not wrong:
        return None, "none right" if wrong else "none wrong"
    return PreferencePair.of_solutions(task.prompt, right[0], wrong[0]), ""


def pair_by_judge(
    task: Prompt, samples: list[list[str]], scores: list[list[float]]
) -> tuple[PreferencePair | None, str]:
    """(pair, why not): the highest mean step score against the lowest."""
    ranked = sorted(zip(map(aggregate, scores), samples, strict=True), key=lambda scored: scored[0])
    (low, worse), (high, better) = ranked[0], ranked[-1]
    if high == low:
        return None, "all scored alike"
    return PreferencePair.of_solutions(task.prompt, better, worse), ""


def main() -> None:
    (args,) = parse_args(PairArguments, description=__doc__.split("\n\n")[0])
    tasks = read_problems(args)
    check_policy(args)
    if args.pair_by == "judge":
        check_judge(args)
    job = {
        name: getattr(args, name)
        for name in ("pair_by", "samples", "temperature", "max_new_tokens", "seed")
    }
    job |= policy_identity(args)
    job["problems"] = hashlib.sha256(
        json.dumps([vars(task) for task in tasks]).encode()
    ).hexdigest()
    if args.pair_by == "judge":
        job |= judge_identity(args)
    check_output(args.output, args.overwrite or ResumableRows.pending(args.output, job))

    with open_judge(args) if args.pair_by == "judge" else nullcontext() as judge:
        policy = open_policy(args)
        rows = ResumableRows(args.output, job, UNIT, args.overwrite)
        if rows.rows:
            print(f"resuming: {len(rows.rows)} of {len(tasks)} problems are done")
        sample_problems(args, tasks, policy, judge, rows)
    pairs = list(
        {json.dumps(row["pair"]): row["pair"] for row in rows.rows if row["pair"]}.values()
    )
    summary(tasks, rows.rows, pairs)
    if not pairs:
        rows.finish()
        raise UserError("no pairs came out (see above), nothing was written")
    write_records(args.output, pairs)
    rows.finish()
    print(f"wrote {len(pairs)} pairs to {args.output}")


def sample_problems(args: PairArguments, tasks: list, policy, judge, rows: ResumableRows) -> None:
    """Append one row a problem: its pair or why there is none, and counts."""
    from tqdm import tqdm

    with tqdm(total=len(tasks), initial=len(rows.rows), desc="sampling", unit="problem") as bar:
        for start in range(len(rows.rows), len(tasks), UNIT):
            group = tasks[start : start + UNIT]
            options = {
                "n": args.samples,
                "temperature": args.temperature,
                "max_new_tokens": args.max_new_tokens,
            }
            answers = policy.generate(
                [task.prompt for task in group], seed=args.seed * 1_000_003 + start, **options
            )
            ended = [
                [response.steps for response in responses if response.finished and response.steps]
                for responses in answers
            ]
            scores = ended
            if judge:
                ended, scores = score_group(judge, group, ended)
            for task, samples, their_scores in zip(group, ended, scores, strict=True):
                right = (
                    sum(is_correct(steps, task) for steps in samples)
                    if isinstance(task, Problem)
                    else None
                )
                if not samples:
                    pair, why_not = (
                        None,
                        "no sample ended"
                        + (f", or all were {judge.unscored_reason}" if judge else ""),
                    )
                elif judge is None:
                    pair, why_not = pair_by_answer(task, samples)
                else:
                    pair, why_not = pair_by_judge(task, samples, their_scores)
                counts = {
                    "samples": args.samples,
                    "ended": len(samples),
                    "right": right,
                    "why_not": why_not,
                }
                rows.append({**counts, "pair": vars(pair) if pair else False})
                bar.update()


def score_group(judge: StepJudge, group: list, ended: list[list[list[str]]]) -> tuple[list, list]:
    """(samples, scores): for each problem its samples that the judge can score, and their step scores."""
    tasks = list(zip(group, ended, strict=True))
    solutions = list(
        dict.fromkeys((task.prompt, tuple(steps)) for task, samples in tasks for steps in samples)
    )
    scores = dict(zip(solutions, judge.score_steps(solutions), strict=True))
    scored = [
        [(steps, scores[task.prompt, tuple(steps)]) for steps in samples] for task, samples in tasks
    ]
    fitting = [
        [(steps, of_steps) for steps, of_steps in samples if of_steps is not None]
        for samples in scored
    ]
    return [[steps for steps, _ in samples] for samples in fitting], [
        [of_steps for _, of_steps in samples] for samples in fitting
    ]


def summary(tasks: list, rows: list[dict], pairs: list[dict]) -> None:
    samples = sum(row["samples"] for row in rows)
    print(
        f"{len(tasks)} problems, {samples} samples, {sum(row['ended'] for row in rows)} ended by themselves"
    )
    if isinstance(tasks[0], Problem):
        right = sum(row["right"] for row in rows)
        print(f"{right} samples right ({right / samples:.3f})")
    why_not = Counter(row["why_not"] for row in rows if row["why_not"])
    dropped = ", ".join(f"{why}: {count}" for why, count in why_not.most_common())
    print(f"{len(pairs)} pairs" + (f"; problems without a pair: {dropped}" if dropped else ""))


if __name__ == "__main__":
    run(main)
