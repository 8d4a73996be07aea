"""Rates of error of same_answer and of math-verify alone, on tests/data/answer_pairs.jsonl.

python benchmarks/answer_rates.py --output_dir docs/results   # two minutes

math-verify alone is `verify(parse(reference), parse(answer))`, both as a LaTeX formula, with its
own time limit. Speed is comparisons a second of wall-clock time, in one process."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import arg, parse_args, run
from common.files import ROOT
from evaluation.metrics import Metric, rate_metric
from evaluation.results import print_metrics, write_result
from reasoning import math_process
from reasoning.answers import same_answer

PAIRS = ROOT / "tests/data/answer_pairs.jsonl"
PARTS = {"written with the code": "first", "written after it": "second"}


@dataclass
class Args:
    output_dir: str = arg("evaluation/results", "folder of the result answers.json")


def math_verify_alone(answer: str, reference: str) -> bool:
    from math_verify import parse, verify

    return verify(*(parse(text if "$" in text else f"${text}$") for text in (reference, answer)))


def rates(rows: list[dict], same: Callable[[str, str], bool]) -> dict[str, Metric]:
    """The shares of different pairs that are accepted, and of same pairs that are refused."""
    said = [same(row["answer"], row["reference"]) for row in rows]
    found = {}
    for name, right in (("wrongly accepted", False), ("wrongly refused", True)):
        wrong = [
            float(x != right) for x, row in zip(said, rows, strict=True) if row["same"] is right
        ]
        found[name] = rate_metric(wrong)
    return found


def speed(pairs: list[tuple[str, str]]) -> Metric:
    """Comparisons a second of pairs that were not compared before, after a first one."""
    same_answer(*pairs[0])
    math_process.same_expression.cache_clear()
    start = time.perf_counter()
    for pair in pairs:
        same_answer(*pair)
    return Metric(len(pairs) / (time.perf_counter() - start), None, len(pairs))


def main() -> None:
    (args,) = parse_args(
        Args, description="Rates of error of same_answer and of math-verify alone."
    )
    with PAIRS.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = [row for row in rows if row["kind"] != "odd"]  # they would hold math-verify up
    metrics = {}
    for who, same in (("same_answer", same_answer), ("math-verify", math_verify_alone)):
        for words, part in PARTS.items():
            found = rates([row for row in rows if row["part"] == part], same)
            metrics |= {f"{words}/{who}/{name}": metric for name, metric in found.items()}
    metrics["plain numbers a second"] = speed([(f"{k:,}", f"{k}.0") for k in range(1000, 6000)])
    metrics["LaTeX a second"] = speed(
        [(rf"\sqrt{{{k * k * 3}}}", rf"{k}\sqrt{{3}}") for k in range(2, 102)]
        + [(rf"\frac{{x+{k}}}{{2}}", rf"\frac{{x}}{{2}}+{k / 2}") for k in range(100)]
    )
    write_result(Path(args.output_dir) / "answers.json", metrics, {"pairs": len(rows)}, [0])
    print_metrics("same_answer and math-verify alone", metrics)


if __name__ == "__main__":
    run(main)
