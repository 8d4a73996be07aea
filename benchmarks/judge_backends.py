"""Compare the `gguf` and the `hf` judge on the same GGUF files: their scores and their speed.

    python benchmarks/judge_backends.py          # a minute on 2 cores

The library of the `gguf` judge rounds activations to 8 bits if the weights are quantized;
transformers does not. So a file in F32 shows whether both compute the same, and a quantized file
shows the effect of that rounding. "one by one" gives `hf` one solution at a time; "alone" reads
every text on its own, without sharing the prefixes of the questions about a solution.
"""

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import arg, check_input, check_least, check_model, parse_args, run
from common.errors import UserError
from common.files import at_root, read_records
from reasoning.records import PreferencePair
from reward_model.protocols import Scores, Solution, mean

COLUMNS = ("judge", "solutions/s", "max |difference| to gguf", "mean", "verdicts at .5 that differ")


@dataclass
class BackendArguments:
    model_name_or_path: str = arg(
        at_root("models/judge-mini"), "LLaMA model directory; it is exported to GGUF files"
    )
    dataset_name: str = arg(at_root("data/synthetic_dataset.jsonl"), "preference pairs")
    limit: int = arg(100, "use the first LIMIT pairs: two solutions each")
    quantization: list[str] = arg(
        ["F32", "Q8_0"], "quantizations of the files", choices=["F32", "F16", "Q8_0", "Q4_0"]
    )


def compare(path: Path, solutions: list[Solution]) -> list[list[object]]:
    """Rows of the table for one file."""
    # local: torch and the judges' libraries would slow --help
    from reward_model.judges.hf import HFJudge
    from reward_model.tinyllama_reward_model import TinyLlamaRewardScorer

    def flat(scores: Scores) -> list[float]:
        return [score for steps in scores for score in steps or ()]

    def add_row(name: str, score: Callable[[], Scores]) -> None:
        start = time.perf_counter()
        scores = score()
        rate = len(solutions) / (time.perf_counter() - start)
        both = list(zip(flat(scores), flat(reference), strict=True))
        differences = [abs(a - b) for a, b in both]
        flips = mean([(a > 0.5) != (b > 0.5) for a, b in both])
        largest, average = f"{max(differences):.6f}", f"{mean(differences):.6f}"
        rows.append([name, f"{rate:.1f}", largest, average, f"{flips:.4f}", len(both)])

    rows: list[list[object]] = []
    with TinyLlamaRewardScorer(path) as gguf:
        reference = gguf.score_steps(solutions)
        if None in reference:
            reason = "a solution is longer than its context: give another --dataset_name"
            raise UserError(f"{path}: {reason}")
        add_row("gguf", lambda: gguf.score_steps(solutions))
    with HFJudge(path) as hf:
        add_row("hf", lambda: hf.score_steps(solutions))
        add_row("hf, one by one", lambda: [hf.score_steps([item])[0] for item in solutions])
        hf.packed = False
        add_row("hf, alone", lambda: hf.score_steps(solutions))
    return rows


def main() -> None:
    (args,) = parse_args(BackendArguments, description=__doc__)
    check_model(args.model_name_or_path)
    check_input(args.dataset_name)
    check_least(args, limit=1)
    # local: torch would slow --help
    from evaluation.results import print_table
    from lm.gguf_export import export_gguf

    pairs = itertools.islice(read_records(args.dataset_name, PreferencePair), args.limit)
    solutions: list[Solution] = [
        (pair.prompt, [*pair.prefix, *steps])
        for pair in pairs
        for steps in (pair.chosen, pair.rejected)
    ]
    name = Path(args.model_name_or_path).resolve().name
    for quantization in args.quantization:
        with TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.{quantization}.gguf"
            export_gguf(args.model_name_or_path, path, quantization)
            rows = compare(path, solutions)
        print_table(f"{path.name}: {len(solutions)} solutions", [*COLUMNS, "steps"], rows)


if __name__ == "__main__":
    run(main)
