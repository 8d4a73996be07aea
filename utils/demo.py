"""Run the whole loop at a small size: sample, judge, train, compare, look (make demo).

Writes everything into data/demo/, and first removes what an earlier demo left there.
"""

import itertools
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import arg, check_model, here, hold_output, parse_args, run, training_flags, unused
from common.files import ROOT, at_root, read_rows
from common.terminal import printable
from reasoning.answers import extract_answer, same_answer

DEMO = "data/demo"  # ignored by git
BASE, TUNED = "models/policy-mini", f"{DEMO}/model"
PAIRS, REWARDED = f"{DEMO}/synthetic_dataset.jsonl", f"{DEMO}/rewarded.jsonl"
LOGS, RESULTS = f"{DEMO}/logs", f"{DEMO}/results"
COMPARISON = "reward_score_comparison"
# the models of the commands at the end: any causal LM, and one that can do the arithmetic
MODEL, JUDGE = "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "Qwen/Qwen2.5-1.5B-Instruct"


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


def example(answers: Path) -> dict:
    """The row of the first problem that only the tuned model gets right, else of the first one."""
    rows = [row for _, row in read_rows(answers)]
    for row in rows:
        base, tuned = (
            bool(row[f"{side}_steps"])
            and same_answer(extract_answer(row[f"{side}_steps"][-1]), row["answer"])
            for side in ("base", "tuned")
        )
        if tuned and not base:
            return row
    return rows[0]


def before_and_after(row: dict) -> str:
    """A problem with both answers side by side, and the judge's score behind each step."""

    def column(title: str, side: str) -> list[str]:
        steps = [printable(step) for step in row[f"{side}_steps"]]
        scores = row.get(f"{side}_scores") or [None] * len(steps)
        wide = max(map(len, steps), default=0)
        marks = ["" if score is None else f"  [{score:.2f}]" for score in scores]
        return [title, *(f"{step:{wide}}{mark}" for step, mark in zip(steps, marks, strict=True))]

    before, after = column("before", "base"), column("after", "tuned")
    wide = max(map(len, before))
    pairs = itertools.zip_longest(before, after, fillvalue="")
    lines = [f"    {left:{wide}}    {right}".rstrip() for left, right in pairs]
    prompt = textwrap.indent(textwrap.fill(printable(row["prompt"]), 96), "    ")
    return "\n".join([prompt, "", *lines])


def own_model(model: str, judge: str) -> list[str]:
    """The commands that sample from a model, judge the steps and train it; they can be pasted."""
    pairs, scored = (unused(at_root(f"data/mine_{name}.jsonl")) for name in ("pairs", "scored"))
    sample = ("--model_name_or_path", model, "--output", pairs)
    score = ("--judge", "hf", "--judge_path", judge, "--input", pairs, "--output", scored)
    return [
        here("python utils/build_synthetic_dataset.py", *sample),
        here("python reward_model/evaluate_steps.py", *score),
        here("python train.py", "--dataset_name", scored, *training_flags(model), "--use_peft"),
    ]


def main() -> None:
    (args,) = parse_args(DemoArguments, description=__doc__)
    check_model(at_root(BASE), "make models-policy")
    hold_output(ROOT / DEMO)
    shutil.rmtree(ROOT / DEMO, ignore_errors=True)
    start = time.monotonic()
    step(
        "1/5 Sample",
        "The policy answers each train problem 8 times; a right and a wrong answer make a pair.",
        *("utils/build_synthetic_dataset.py", "--limit", args.problems),
        *("--output", PAIRS, "--seed", args.seed),
    )
    step(
        "2/5 Judge",
        "A GGUF model is asked after every step whether it is right; P(yes) is the step's score.",
        *("reward_model/evaluate_steps.py", "--input", PAIRS, "--output", REWARDED),
    )
    step(
        "3/5 Train",
        "Stepwise DPO raises steps with high scores and lowers the first step with a low score.",
        *("train.py", "--dataset_name", REWARDED, "--output_dir", TUNED, "--logs_dir", LOGS),
        *("--seed", args.seed),
    )
    step(
        "4/5 Compare",
        "Base and tuned model answer held-out problems; a table shows judge reward and accuracy.",
        *("evaluation/eval_reward_scores.py", "--tuned_model", TUNED, "--pairs", REWARDED),
        *("--limit", args.test_problems, "--output_dir", RESULTS),
    )
    step(
        "5/5 Look",
        "One page has every problem with both answers, scored and checked, and the curves.",
        *("evaluation/report.py", "--results_dir", RESULTS, "--logs_dir", LOGS),
    )
    plot, page = (at_root(f"{RESULTS}/{name}") for name in (f"{COMPARISON}.png", "report.html"))
    minutes = (time.monotonic() - start) / 60
    print(
        f"\n=== Done in {minutes:.1f} minutes: a held-out problem, before and after the training\n",
        before_and_after(example(ROOT / RESULTS / f"{COMPARISON}.jsonl")),
        "\n    In brackets: the judge's score of the step, 0 (wrong) to 1 (right).",
        f"\n=== Now your own model: write its folder or hub name for {MODEL}",
        f"    The judge can be any model that knows arithmetic, here {JUDGE}.",
        "    With --input FILE the first command samples problems of your own.\n",
        *(f"    $ {command}" for command in own_model(MODEL, JUDGE)),
        "\n=== Look",
        "    Your own questions to both models:",
        f"    $ {here('python inference.py --serve --model_name_or_path', at_root(TUNED))}",
        f"    The table of step 4 as a plot: {plot}",
        f"    All answers, to look at in a browser: {page}",
        sep="\n",
    )


if __name__ == "__main__":
    run(main)
