"""The whole loop, live, at a small size: sample, judge, train, compare, answer (make demo).

Writes data/demo/, saved_model/stepwise_dpo_tinyllama/ and evaluation/results/, and starts each of them afresh.
"""

import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import parse_args, run
from common.errors import UserError
from common.files import ROOT, at_root, read_rows
from reasoning.answers import extract_answer, same_answer

BASE, TUNED = "models/policy-mini", "saved_model/stepwise_dpo_tinyllama"


@dataclass
class DemoArguments:
    problems: int = field(
        default=700, metadata={"help": "train problems that are sampled, 8 times each"}
    )
    test_problems: int = field(
        default=1000, metadata={"help": "held-out problems that base and tuned answer"}
    )
    seed: int = field(default=0, metadata={"help": "seed of samples and training"})


def step(title: str, why: str, *command: object) -> None:
    """Run one script of the repository with its output shown. Raises SystemExit with its exit code if it fails."""
    print(f"\n=== {title}\n    {why}\n    $ python {shlex.join(map(str, command))}\n", flush=True)
    start = time.monotonic()
    code = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT).returncode
    if code:
        raise SystemExit(code)
    print(f"    ({time.monotonic() - start:.0f} s)", flush=True)


def telling_problem(answers: Path) -> str:
    """The first problem that the base gets wrong and the tuned model right; if there is none, the first."""
    rows = [row for _, row in read_rows(answers)]
    for row in rows:
        base, tuned = (
            same_answer(extract_answer(row[f"{side}_steps"][-1]), row["answer"])
            for side in ("base", "tuned")
        )
        if tuned and not base:
            return row["prompt"]
    return rows[0]["prompt"]


def main() -> None:
    (args,) = parse_args(DemoArguments, description=__doc__)
    if not (ROOT / BASE / "config.json").is_file():
        raise UserError(f"{at_root(BASE)} not found: run `make models` first")
    for folder in ("data/demo", TUNED, "evaluation/results"):
        shutil.rmtree(ROOT / folder, ignore_errors=True)
    start = time.monotonic()
    pairs, rewarded = "data/demo/synthetic_dataset.jsonl", "data/demo/rewarded.jsonl"
    step(
        "1/5 Sample", "The policy answers train problems 8 times; a right answer against a wrong one makes a preference pair.",
        "utils/build_synthetic_dataset.py", "--limit", args.problems, "--output", pairs, "--seed", args.seed,
    )  # fmt: skip
    step(
        "2/5 Judge", "A GGUF language model is asked after every step whether it is right; its P(yes) is the step's score.",
        "reward_model/evaluate_steps.py", "--input", pairs, "--output", rewarded,
    )  # fmt: skip
    step(
        "3/5 Train", "Stepwise DPO raises what the judge scores right and lowers the first step that it scores wrong.",
        "train.py", "--dataset_name", rewarded, "--output_dir", TUNED, "--seed", args.seed,
    )  # fmt: skip
    step(
        "4/5 Compare", "Base and tuned answer held-out problems; the judge's reward and the exact accuracy stand side by side.",
        "evaluation/eval_reward_scores.py", "--pairs", rewarded, "--limit", args.test_problems,
    )  # fmt: skip
    prompt = telling_problem(ROOT / "evaluation/results/reward_score_comparison.jsonl")
    show = ("inference.py", "--show_scores", "--prompt", prompt, "--model_name_or_path")
    step(
        "5/5 Answer: the base",
        "One held-out problem, the judge's score beside each step.",
        *show,
        BASE,
    )
    step("5/5 Answer: the tuned model", "The same problem after training.", *show, TUNED)
    plot = at_root("evaluation/plots/reward_score_comparison.png")
    print(
        f"\nThe table of step 4 as a picture: {plot} (the whole loop took {(time.monotonic() - start) / 60:.1f} minutes)"
    )


if __name__ == "__main__":
    run(main)
