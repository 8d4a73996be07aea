"""Step PPO and its rivals at the same number of rollouts, on all hard and test problems.

    python benchmarks/ppo_table.py    # about 5 hours on 2 cores; the same command resumes it

Every row trains policy-mini with 2,560 of its rollouts and the defaults of train.py:

- step PPO rewarded by models/prm-mini; by the exact checker of steps (the ceiling); by shuffled
  scores of prm-mini (the control, which must not gain)
- PPO with outcome rewards: every step of a whole solution gets 1 if its final answer is right
- SFT on the right ones of 8 samples of 320 problems, and DPO and stepwise DPO on pairs of them

Each policy answers every problem greedily, and 4 times by sampling at temperature 1. PPO raises
sampled accuracy first. Writes ppo.json to --output_dir, and the answers to ppo.jsonl.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import compare_rows
from benchmarks.compare import SAMPLES, shares
from benchmarks.runs import BASE, base_run, row_of_each
from common.cli import arg, check_input, check_least, parse_args, run
from common.files import at_root
from evaluation.metrics import Metric, crossed_mean_metric
from evaluation.results import print_table, write_result

DATA = "data/ppo_table"  # ignored by git
STEPS = "data/mcts_steps.jsonl.gz"
ROLLOUTS = 2560
FIRST_PROBLEM = 18_000  # of the train problems
PPO = {"total_episodes": ROLLOUTS, "eval_strategy": "no"}
# row -> (what it learns from, command of train.py, settings)
ROWS: dict[str, tuple[str, str, dict]] = {
    "step PPO": (STEPS, "ppo", PPO),
    "step PPO, exact rewards": (STEPS, "ppo", PPO | {"judge": "exact"}),
    "step PPO, shuffled rewards": (
        STEPS,
        "ppo",
        PPO | {"judge": "shuffled", "shuffled_judge": "prm"},
    ),
    "PPO, outcome rewards": (STEPS, "ppo", PPO | {"judge": "outcome", "states": "fresh"}),
    "SFT on right samples": (f"{DATA}/a_good.jsonl", "sft", {}),
    "DPO": (f"{DATA}/a_judge.jsonl", "dpo", {"loss_type": ["sigmoid"]}),
    "stepwise DPO": (f"{DATA}/a_judge.jsonl", "dpo", {}),
}
MEASURED = {"hard": 1000, "test": 2000}
MEASURES = ("hard", "test", "hard, sampled", "test, sampled")


@dataclass
class PPOTableArguments:
    rows: list[str] = arg([*ROWS], "rows of the table", choices=[*ROWS])
    seeds: int = arg(3, "seeds of every row")
    workers: int = arg(2, "trainings at once")
    output_dir: str = arg(at_root("evaluation/results"), "folder of ppo.json")

    def __post_init__(self) -> None:
        check_least(self, seeds=1, workers=1)


def make_rows() -> None:
    """The rows that the rollouts of policy-mini give."""
    folder, count = Path(at_root(DATA)), ROLLOUTS // compare_rows.SAMPLES
    path = compare_rows.sample(folder, at_root(BASE), "train", FIRST_PROBLEM, count)
    compare_rows.write_rows(folder, "a", compare_rows.read_rollouts(path), count)


def main() -> None:
    (args,) = parse_args(PPOTableArguments, description=__doc__)
    check_input(at_root(STEPS), "python utils/build_mcts_dataset.py")
    make_rows()
    common = {"model": BASE, "measure": MEASURED, "samples": SAMPLES, "each_epoch": False}
    runs = {("base", 0): base_run(MEASURED, SAMPLES)}
    for seed in range(args.seeds):
        for name in args.rows:
            rows, recipe, settings = ROWS[name]
            what = {"name": name, "rows": rows, "recipe": recipe, "settings": settings}
            runs[name, seed] = common | what | {"seed": seed}
    output = Path(args.output_dir)
    rows = row_of_each([*runs.values()], output / "ppo.jsonl", args.workers)
    found: dict[str, list[dict]] = {}
    for (name, _), row in zip(runs, rows, strict=True):
        found.setdefault(name, []).append(row)
    metrics: dict[str, Metric] = {}
    table: list[tuple] = []
    for measure in MEASURES:
        base = shares(found["base"], measure)
        base_accuracy = metrics[f"{measure}/base_accuracy"] = crossed_mean_metric(base)
        table.append((measure, "base", base_accuracy, "", "", ""))
        for name in args.rows:
            right = shares(found[name], measure)
            accuracy, gain = crossed_mean_metric(right), crossed_mean_metric(right - base)
            metrics[f"{measure}/{name}/accuracy"] = accuracy
            metrics[f"{measure}/{name}/accuracy_improvement"] = gain
            minutes = ", ".join(f"{row['seconds'] / 60:.0f}" for row in found[name])
            each = ", ".join(f"{value:.3f}" for value in right.mean(1))
            table.append(
                (measure, name, metrics[f"{measure}/{name}/accuracy"], gain, each, minutes)
            )
    columns = ["problems", "training", "accuracy", "minus base", "each seed"]
    title = f"exact accuracy at {ROLLOUTS:,} rollouts, greedy and mean of {SAMPLES} samples"
    print_table(title, [*columns, "minutes of training"], table)
    write_result(output / "ppo.json", metrics, asdict(args), range(args.seeds))
    print(f"wrote {output / 'ppo.json'}")


if __name__ == "__main__":
    run(main)
