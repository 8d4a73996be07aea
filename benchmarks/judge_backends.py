"""The same question through the `gguf` and the `hf` judge, on the same file: how far their scores are apart, and how fast they are.

    python benchmarks/judge_backends.py          # a minute on 2 cores

The `gguf` judge's library rounds activations to 8 bits wherever the weights are quantized; transformers does not. So a file in F32
shows whether the two compute the same, and a quantized one what that rounding is worth. `one by one` is `hf` given a solution at a
time; `alone` also reads every text on its own, without sharing what the questions of a solution have in common.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import check_input, check_model, parse_args, run
from common.errors import UserError
from common.files import at_root

Scores = list[list[float] | None]


@dataclass
class BackendArguments:
    model_name_or_path: str = field(
        default_factory=lambda: at_root("models/judge-mini"),
        metadata={"help": "LLaMA model directory; it is exported to GGUF files"},
    )
    dataset_name: str = field(
        default_factory=lambda: at_root("data/synthetic_dataset.jsonl"),
        metadata={"help": "preference pairs"},
    )
    limit: int = field(
        default=100, metadata={"help": "use the first LIMIT pairs: two solutions each"}
    )
    quantization: list[str] = field(
        default_factory=lambda: ["F32", "Q8_0"],
        metadata={"help": "how the files are stored", "choices": ["F32", "F16", "Q8_0", "Q4_0"]},
    )


def compare(path: Path, solutions: list) -> list[list[object]]:
    """Rows of the table for one file."""
    from reward_model.judges.hf import HFJudge
    from reward_model.tinyllama_reward_model import TinyLlamaRewardScorer

    def timed(name: str, score: Callable[[], Scores]) -> Scores:
        start = time.perf_counter()
        scores = score()
        rate = len(solutions) / (time.perf_counter() - start)
        apart = [
            abs(a - b)
            for ours, theirs in zip(scores, reference or scores, strict=True)
            for a, b in zip(ours, theirs, strict=True)
        ]
        flips = [
            (a > 0.5) != (b > 0.5)
            for x, y in zip(scores, reference or scores, strict=True)
            for a, b in zip(x, y, strict=True)
        ]
        rows.append(
            [
                name,
                f"{rate:.1f}",
                f"{max(apart):.6f}",
                f"{sum(apart) / len(apart):.6f}",
                f"{sum(flips) / len(flips):.4f}",
                len(apart),
            ]
        )
        return scores

    rows: list[list[object]] = []
    reference: Scores = []
    with TinyLlamaRewardScorer(path) as gguf:
        if None in (reference := gguf.score_steps(solutions)):
            raise UserError(f"{path}: a solution outgrows its context: give other --dataset_name")
        timed("gguf", lambda: gguf.score_steps(solutions))
    with HFJudge(path) as hf:
        timed("hf", lambda: hf.score_steps(solutions))
        timed("hf, one by one", lambda: [hf.score_steps([solution])[0] for solution in solutions])
        hf.packed = False
        timed("hf, alone", lambda: hf.score_steps(solutions))
    return rows


def main() -> None:
    (args,) = parse_args(BackendArguments, description=__doc__)
    check_model(args.model_name_or_path)
    check_input(args.dataset_name, "make data")
    if args.limit < 1:
        raise UserError(f"argument --limit: expected 1 or more, got {args.limit}")
    import itertools

    from common.files import read_records
    from evaluation.metrics import print_table
    from lm.gguf_export import export_gguf
    from reasoning.records import PreferencePair

    pairs = itertools.islice(read_records(args.dataset_name, PreferencePair), args.limit)
    solutions = [
        (pair.prompt, [*pair.prefix, *steps])
        for pair in pairs
        for steps in (pair.chosen, pair.rejected)
    ]
    for quantization in args.quantization:
        with TemporaryDirectory() as folder:
            path = (
                Path(folder) / f"{Path(args.model_name_or_path).resolve().name}.{quantization}.gguf"
            )
            export_gguf(args.model_name_or_path, path, quantization)
            rows = compare(path, solutions)
        columns = [
            "judge",
            "solutions/s",
            "max |difference| to gguf",
            "mean",
            "verdicts at .5 that differ",
            "steps",
        ]
        print_table(f"{path.name}: {len(solutions)} solutions", columns, rows)


if __name__ == "__main__":
    run(main)
