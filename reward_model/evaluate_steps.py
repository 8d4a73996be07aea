"""Score every step of the preference pairs with the GGUF judge: data/synthetic_dataset.jsonl -> data/rewarded.jsonl.

    python reward_model/evaluate_steps.py --overwrite

Steps of `prefix` are read as context and get no score. A pair that outgrows the judge's context is written without scores to
<output>.left_out.jsonl. Killed at any moment and started again with the same arguments, it goes on where it was.
"""

import hashlib
import random
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.controls import shuffle_scores
from reasoning.records import PreferencePair, ResumableRows, read_records, write_records
from reward_model.base import PromptTooLong, mean
from utils.cli import UserError, at_root, check_input, check_output, parse_args, run


@dataclass
class EvaluateArguments:
    input: str = field(default_factory=lambda: at_root("data/synthetic_dataset.jsonl"), metadata={"help": "preference pairs"})
    output: str = field(default_factory=lambda: at_root("data/rewarded.jsonl"), metadata={"help": "the pairs with their scores"})
    judge_path: str = field(
        default_factory=lambda: at_root("models/judge-mini/judge-mini.Q8_0.gguf"),
        metadata={"help": "GGUF file of the judge, the model of this script", "aliases": ["--model_name_or_path"]},
    )
    judge_template: str | None = field(
        default=None, metadata={"help": "plain, zephyr, llama-2 or chatml (default: what the file says of itself)"}
    )
    threads: int | None = field(default=None, metadata={"help": "threads of the judge (default: as many as pay off)"})
    limit: int | None = field(default=None, metadata={"help": "score only so many pairs, drawn at random with --seed"})
    shuffle_scores: bool = field(default=False, metadata={"help": "a control: permute the scores over all steps of the file"})
    seed: int = field(default=0, metadata={"help": "seed of the draw of --limit and of --shuffle_scores"})
    overwrite: bool = field(default=False, metadata={"help": "replace an existing output"})


def score_pair(judge, pair: PreferencePair) -> PreferencePair:
    """The pair with a score for every step of both sides; without any if one side outgrows the judge's context."""
    try:
        chosen, rejected = (judge.score_continuation(pair.prompt, pair.prefix, steps) for steps in (pair.chosen, pair.rejected))
    except PromptTooLong:
        chosen = rejected = None
    return replace(pair, chosen_scores=chosen, rejected_scores=rejected)


def file_hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    (args,) = parse_args(EvaluateArguments, description=__doc__)
    left_out_path = Path(args.output).with_suffix(".left_out.jsonl")
    check_input(args.input, "python utils/build_synthetic_dataset.py")
    check_input(args.judge_path, "make models")
    if Path(args.output).resolve() == Path(args.input).resolve():
        raise UserError(f"{args.output} is the input: give another --output")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, got {args.limit}")
    job = {
        "input": file_hash(args.input),
        "judge": file_hash(args.judge_path),
        "template": args.judge_template,
        "limit": args.limit,
        "shuffled": args.shuffle_scores,
        "seed": args.seed,
    }
    if not ResumableRows.pending(args.output, job):
        check_output(args.output, args.overwrite)
        check_output(str(left_out_path), args.overwrite)
    pairs = list(read_records(args.input, PreferencePair))
    if args.limit is not None and args.limit < len(pairs):
        pairs = [pairs[index] for index in sorted(random.Random(args.seed).sample(range(len(pairs)), args.limit))]

    from tqdm import tqdm

    from reward_model.tinyllama_reward_model import TinyLlamaRewardScorer

    with TinyLlamaRewardScorer(args.judge_path, args.judge_template, args.threads) as judge:
        rows = ResumableRows(args.output, job, overwrite=args.overwrite)
        print(f"judge {args.judge_path}: template {judge.template_name}, context {judge.context_length}, threads {judge.threads}")
        if rows.rows:
            print(f"going on after {len(rows.rows)} of {len(pairs)} pairs")
        for pair in tqdm(pairs[len(rows.rows) :], initial=len(rows.rows), total=len(pairs), unit="pair", desc="scoring"):
            rows.append(asdict(score_pair(judge, pair)))

    results = [PreferencePair.from_row(row) for row in rows.rows]
    scored = [pair for pair in results if pair.chosen_scores is not None]
    left_out = [pair for pair in results if pair.chosen_scores is None]
    if args.shuffle_scores:
        scores = iter(shuffle_scores([side for pair in scored for side in (pair.chosen_scores, pair.rejected_scores)], args.seed))
        scored = [replace(pair, chosen_scores=next(scores), rejected_scores=next(scores)) for pair in scored]
    left_out_path.unlink(missing_ok=True)
    if left_out:
        write_records(left_out_path, left_out)
    write_records(args.output, scored)
    rows.finish()

    chosen, rejected = [mean(pair.chosen_scores) for pair in scored], [mean(pair.rejected_scores) for pair in scored]
    print(f"pairs scored      {len(scored)}")
    print(f"mean step score   chosen {mean(chosen):.3f}, rejected {mean(rejected):.3f}")
    print(f"chosen is higher  {mean([a > b for a, b in zip(chosen, rejected, strict=True)]):.3f} of pairs")
    if left_out:
        print(f"left out          {len(left_out)} (longer than the judge's context), written without scores to {left_out_path}")
    print(f"wrote {args.output}: {len(scored)} pairs with a score for every step")


if __name__ == "__main__":
    run(main)
