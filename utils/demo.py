"""Run the whole loop at a small size: sample, judge, train, compare, answer (make demo).

Writes everything into data/demo/, and first removes what an earlier demo left there.
"""

import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import arg, check_model, hold_output, parse_args, run
from common.files import ROOT, at_root, read_rows
from reasoning.answers import extract_answer, same_answer

DEMO = "data/demo"  # ignored by git
BASE, TUNED = "models/policy-mini", f"{DEMO}/model"
PAIRS, REWARDED = f"{DEMO}/synthetic_dataset.jsonl", f"{DEMO}/rewarded.jsonl"
LOGS, RESULTS = f"{DEMO}/logs", f"{DEMO}/results"
COMPARISON = "reward_score_comparison"


@dataclass
class DemoArguments:
    problems: int = arg(700, "train problems to sample, 8 solutions each")
    test_problems: int = arg(1000, "held-out problems that base and tuned model answer")
    seed: int = arg(0, "seed of the samples and of training")


def step(title: str, why: str, *command: object) -> None:
    """Run one script of the repository and show its output.

    Raises SystemExit with the script's exit code if it fails."""
    print(f"\n=== {title}\n    {why}\n    $ python {shlex.join(map(str, command))}\n", flush=True)
    start = time.monotonic()
    code = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT).returncode
    if code:
        raise SystemExit(code)
    print(f"    ({time.monotonic() - start:.0f} s)", flush=True)


def improved_prompt(answers: Path) -> str:
    """The first problem that only the tuned model gets right; without one, the first problem."""
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
    check_model(at_root(BASE), "make models-policy")
    hold_output(ROOT / DEMO)
    shutil.rmtree(ROOT / DEMO, ignore_errors=True)
    start = time.monotonic()
    step(
        "1/6 Sample",
        "The policy answers each train problem 8 times; a right and a wrong answer make a pair.",
        *("utils/build_synthetic_dataset.py", "--limit", args.problems),
        *("--output", PAIRS, "--seed", args.seed),
    )
    step(
        "2/6 Judge",
        "A GGUF model is asked after every step whether it is right; P(yes) is the step's score.",
        *("reward_model/evaluate_steps.py", "--input", PAIRS, "--output", REWARDED),
    )
    step(
        "3/6 Train",
        "Stepwise DPO raises steps with high scores and lowers the first step with a low score.",
        *("train.py", "--dataset_name", REWARDED, "--output_dir", TUNED, "--logs_dir", LOGS),
        *("--seed", args.seed),
    )
    step(
        "4/6 Compare",
        "Base and tuned model answer held-out problems; a table shows judge reward and accuracy.",
        *("evaluation/eval_reward_scores.py", "--tuned_model", TUNED, "--pairs", REWARDED),
        *("--limit", args.test_problems, "--output_dir", RESULTS),
    )
    prompt = improved_prompt(ROOT / RESULTS / f"{COMPARISON}.jsonl")
    answer = ("inference.py", "--show_scores", "--prompt", prompt, "--model_name_or_path")
    why = "One held-out problem, with the judge's score beside each step."
    step("5/6 Answer: the base", why, *answer, BASE)
    step("5/6 Answer: the tuned model", "The same problem after training.", *answer, TUNED)
    step(
        "6/6 Look",
        "One page has every problem with both answers, scored and checked, and the curves.",
        *("evaluation/report.py", "--results_dir", RESULTS, "--logs_dir", LOGS),
    )
    plot, page = (at_root(f"{RESULTS}/{name}") for name in (f"{COMPARISON}.png", "report.html"))
    minutes = (time.monotonic() - start) / 60
    print(f"\nThe table of step 4 as a plot: {plot} (the whole loop took {minutes:.1f} minutes)")
    print(f"All answers, to look at in a browser: {page}")


if __name__ == "__main__":
    run(main)
