"""Score every step of the preference pairs with a judge: data/synthetic_dataset.jsonl -> data/rewarded.jsonl.

    python reward_model/evaluate_steps.py --overwrite

Steps of `prefix` are read as context and get no score. A pair that the judge cannot score (it outgrows its context, nobody labelled
it) is written without scores to <output>.left_out.jsonl. Killed at any moment and started again with the same arguments, it goes on
where it was.
"""

import random
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import check_input, check_output, parse_args, run
from common.errors import UserError
from common.files import ResumableRows, at_root, content_hash, read_records, write_records
from reasoning.records import PreferencePair
from reward_model.protocols import StepJudge, mean
from reward_model.registry import CHUNK, JudgeArgs, check_judge, judge_identity, open_judge


@dataclass
class EvaluateArguments(JudgeArgs):
    input: str = field(
        default=at_root("data/synthetic_dataset.jsonl"), metadata={"help": "preference pairs"}
    )
    output: str = field(
        default=at_root("data/rewarded.jsonl"), metadata={"help": "the pairs with their scores"}
    )
    judge_path: str = field(
        default=JudgeArgs.judge_path,
        metadata={
            "help": "gguf: its file; hf, prm: a model directory or a hub name; hf: a GGUF file as well (it is this script's model)",
            "aliases": ["--model_name_or_path"],
        },
    )
    limit: int | None = field(
        default=None, metadata={"help": "score only so many pairs, drawn at random with --seed"}
    )
    seed: int = field(
        default=0, metadata={"help": "seed of the draw of --limit and of --judge shuffled"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace an existing output"})


def score_pairs(judge: StepJudge, pairs: list[PreferencePair]) -> list[PreferencePair]:
    """The pairs with a score for every step of both sides; a pair without any if the judge cannot score one side."""
    sides = [
        (pair.prompt, [*pair.prefix, *steps])
        for pair in pairs
        for steps in (pair.chosen, pair.rejected)
    ]
    scores = judge.score_steps(sides, skip=[len(pair.prefix) for pair in pairs for _ in range(2)])
    both = [
        (None, None) if None in two else two for two in zip(scores[::2], scores[1::2], strict=True)
    ]
    return [
        replace(pair, chosen_scores=a, rejected_scores=b)
        for pair, (a, b) in zip(pairs, both, strict=True)
    ]


def main() -> None:
    (args,) = parse_args(EvaluateArguments, description=__doc__)
    left_out_path = Path(args.output).with_suffix(".left_out.jsonl")
    check_input(args.input, "python utils/build_synthetic_dataset.py")
    check_judge(args)
    if Path(args.output).resolve() == Path(args.input).resolve():
        raise UserError(f"{args.output} is the input: give another --output")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, got {args.limit}")
    job = judge_identity(args) | {
        "input": content_hash(args.input),
        "limit": args.limit,
        "seed": args.seed,
    }
    # pairs at a time; gguf scores one by one, so it need lose none when killed
    unit = 1 if args.judge == "gguf" else CHUNK // 2
    if not ResumableRows.pending(args.output, job):
        check_output(args.output, args.overwrite)
        check_output(str(left_out_path), args.overwrite)
    pairs = list(read_records(args.input, PreferencePair))
    if args.limit is not None and args.limit < len(pairs):
        pairs = [
            pairs[index]
            for index in sorted(random.Random(args.seed).sample(range(len(pairs)), args.limit))
        ]

    from tqdm import tqdm

    with open_judge(args) as judge:
        rows = ResumableRows(args.output, job, unit, args.overwrite)
        print(f"judge {judge}")
        if rows.rows:
            print(f"going on after {len(rows.rows)} of {len(pairs)} pairs")
        with tqdm(initial=len(rows.rows), total=len(pairs), unit="pair", desc="scoring") as bar:
            for start in range(len(rows.rows), len(pairs), unit):
                for pair in score_pairs(judge, pairs[start : start + unit]):
                    rows.append(asdict(pair))
                    bar.update()

    results = [PreferencePair.from_row(row) for row in rows.rows]
    scored = [pair for pair in results if pair.chosen_scores is not None]
    left_out = [pair for pair in results if pair.chosen_scores is None]
    left_out_path.unlink(missing_ok=True)
    if left_out:
        write_records(left_out_path, left_out)
    if not scored:
        rows.finish()
        raise UserError(
            f"no pair was scored, all {len(pairs)} are {judge.unscored_reason}: see {left_out_path}"
        )
    write_records(args.output, scored)
    rows.finish()

    chosen, rejected = (
        [mean(pair.chosen_scores) for pair in scored],
        [mean(pair.rejected_scores) for pair in scored],
    )
    print(f"pairs scored      {len(scored)}")
    print(f"mean step score   chosen {mean(chosen):.3f}, rejected {mean(rejected):.3f}")
    print(
        f"chosen is higher  {mean([a > b for a, b in zip(chosen, rejected, strict=True)]):.3f} of pairs"
    )
    if left_out:
        print(
            f"left out          {len(left_out)} ({judge.unscored_reason}), written without scores to {left_out_path}"
        )
    print(f"wrote {args.output}: {len(scored)} pairs with a score for every step")


if __name__ == "__main__":
    run(main)
