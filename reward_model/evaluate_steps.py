"""Score every step of preference pairs with a judge, by default data/synthetic_dataset.jsonl.

    python reward_model/evaluate_steps.py --overwrite

Steps of `prefix` are context and get no score. A pair that the judge cannot score (usually because
it is longer than the judge's context) is written without scores to <output>.left_out.jsonl. A
killed run resumes when it is started again with the same arguments. Input and output may end in
.jsonl.gz.
"""

import itertools
import random
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import (
    DtypeArgs,
    arg,
    check_input,
    check_least,
    check_outputs,
    here,
    parse_args,
    run,
    unused,
)
from common.engine import Job, ShardArgs
from common.errors import UserError
from common.files import at_root, file_stem, read_records, write_records
from common.identity import content_hash
from common.outputs import together
from lm.known_words import MOST_TEXTS
from reasoning.records import PreferencePair
from reward_model.protocols import Solution, StepJudge, mean
from reward_model.registry import (
    CHUNK,
    SHUFFLED,
    JudgeArgs,
    check_judge,
    judge_files,
    judge_identity,
    judge_record,
    open_judge,
    warn_of_foreign_text,
)
from reward_model.score_checks import warn_of_pair_scores


@dataclass
class EvaluateArguments(JudgeArgs, DtypeArgs, ShardArgs):
    input: str = arg(at_root("data/synthetic_dataset.jsonl"), "preference pairs")
    output: str = arg(at_root("data/rewarded.jsonl"), "the pairs with their scores")
    judge_path: str = arg(
        JudgeArgs.judge_path,
        "the judge's model: for gguf a file; for hf, prm and response a directory or a "
        "hub name; for hf also a GGUF file",
        aliases=["--model_name_or_path"],
    )
    limit: int | None = arg(None, "score only this many pairs, drawn at random with --seed")
    seed: int = arg(0, "seed of the draw of --limit, of --judge shuffled and random")
    overwrite: bool = arg(False, "replace an existing output")


def solutions(pair: PreferencePair) -> list[Solution]:
    """Both sides of a pair from the first step on, chosen first."""
    return [(pair.prompt, [*pair.prefix, *steps]) for steps in (pair.chosen, pair.rejected)]


def score_pairs(
    judge: StepJudge, pairs: list[PreferencePair], record: str | None = None
) -> list[PreferencePair]:
    """The pairs with a score for every step of both sides, or with none at all if the judge cannot
    score one side.

    record: of this judge (reward_model/registry.py); the pairs that have it keep their scores."""
    todo = [pair for pair in pairs if not has_scores_of(record, pair)]
    sides = list(itertools.chain.from_iterable(map(solutions, todo)))
    skip = [len(pair.prefix) for pair in todo for _ in range(2)]
    scores = judge.score_steps(sides, skip=skip) if todo else []
    found = zip(scores[::2], scores[1::2], strict=True)
    scored = []
    for pair in pairs:
        if not has_scores_of(record, pair):
            chosen, rejected = next(found)
            if chosen is None or rejected is None:
                chosen = rejected = None
            named = record if pair.judge and chosen is not None else None
            pair = replace(pair, chosen_scores=chosen, rejected_scores=rejected, judge=named)
        scored.append(pair)
    return scored


def has_scores_of(record: str | None, pair: PreferencePair) -> bool:
    """Whether the scores of a pair are of the judge with this record."""
    return record is not None and pair.judge == record and pair.chosen_scores is not None


class Scoring:
    """Scores pairs with the judge that it holds.

    solutions: some of those that it will score, to see whether the judge knows their words."""

    def __init__(self, args: EvaluateArguments, solutions: list[Solution]):
        self.judge, self.record = open_judge(args), judge_record(args)
        print(f"judge {self.judge}")
        warn_of_foreign_text(self.judge, solutions)

    def __call__(self, start: int, pairs: list[PreferencePair]) -> list[dict]:
        """The pairs as rows; `why_not` is there if one has no scores."""
        rows = [asdict(pair) for pair in score_pairs(self.judge, pairs, self.record)]
        for row in rows:
            if row["chosen_scores"] is None:
                row["why_not"] = self.judge.unscored_reason
        return rows

    def close(self) -> None:
        self.judge.close()


def left_out(pair: PreferencePair, reason: str) -> dict:
    return asdict(replace(pair, chosen_scores=None, rejected_scores=None)) | {"why_not": reason}


def main() -> None:
    (args,) = parse_args(EvaluateArguments, description=__doc__)
    output = Path(args.output)
    compressed = ".gz" if output.suffix == ".gz" else ""
    left_out_path = output.with_name(f"{file_stem(output)}.left_out.jsonl{compressed}")
    makes_pairs = shlex.join(["python", "utils/build_synthetic_dataset.py", "--output", args.input])
    check_input(args.input, makes_pairs)
    check_judge(args)
    check_least(args, limit=1)
    identity = judge_identity(args) | {
        "input": content_hash(args.input),
        "limit": args.limit,
        "seed": args.seed,
    }
    pairs = list(read_records(args.input, PreferencePair))
    if args.limit is not None and args.limit < len(pairs):
        drawn = random.Random(args.seed).sample(range(len(pairs)), args.limit)
        pairs = [pairs[index] for index in sorted(drawn)]
    # pairs in one call; these judges score solutions one by one, so a kill need not lose any
    unit = 1 if args.judge in ("gguf", "llamacpp") else CHUNK // 2
    job = Job(args, identity, pairs, unit)
    outputs = [job.file] if job.is_part else [output, left_out_path]
    check_outputs(outputs, [args.input, *judge_files(args)], job.may_replace())

    record = judge_record(args)
    if kept := sum(has_scores_of(record, pair) for pair in pairs):
        print(
            f"{kept} of {len(pairs)} pairs have the scores of this judge and are not judged again"
        )
    rows = job.open()
    if len(rows):
        print(f"resuming after {len(rows)} of {len(pairs)} pairs")
    texts = list(itertools.chain.from_iterable(map(solutions, job.some(MOST_TEXTS // 2))))
    job.fill(rows, partial(Scoring, args, texts), left_out, desc="scoring", noun="pair")
    if job.is_part:
        return
    found = rows.rows
    reasons = {row.pop("why_not"): None for row in found if "why_not" in row}
    why_not = " or ".join(r for r in reasons if not any(r in other != r for other in reasons))
    results = [PreferencePair.from_row(row) for row in found]
    scored = [pair for pair in results if pair.chosen_scores is not None]
    unscored = [pair for pair in results if pair.chosen_scores is None]
    with together():
        if unscored:
            write_records(left_out_path, unscored)
        if scored:
            write_records(output, scored)
    if not unscored:
        left_out_path.unlink(missing_ok=True)  # of an earlier run
    if not scored:
        rows.finish()
        reason = f"all {len(pairs)} are {why_not}"
        raise UserError(f"no pair was scored, {reason}: see {left_out_path}")
    rows.finish()

    chosen = [mean(pair.chosen_scores or []) for pair in scored]
    rejected = [mean(pair.rejected_scores or []) for pair in scored]
    higher = mean([a > b for a, b in zip(chosen, rejected, strict=True)])
    print(f"pairs scored      {len(scored)}")
    print(f"mean step score   chosen {mean(chosen):.3f}, rejected {mean(rejected):.3f}")
    print(f"chosen is higher  {higher:.3f} of pairs")
    if unscored:
        print(f"left out          {len(unscored)} ({why_not})", end="")
        print(f", written without scores to {left_out_path}")
    if args.judge not in (SHUFFLED, "random"):  # these tell nothing apart on purpose
        warn_of_pair_scores(scored)
    print(f"wrote {args.output}: {len(scored)} pairs with a score for every step")
    trained = unused(at_root(f"saved_model/{file_stem(output)}"))
    flags = ("--dataset_name", args.output, "--output_dir", trained)
    print(f"next: {here('python train.py dpo', *flags)}")


if __name__ == "__main__":
    run(main)
