"""Step PPO, a ceiling, a control and stepwise DPO: accuracy on all hard and test problems.

    python benchmarks/ppo_table.py    # about 90 minutes on 2 cores; the same command resumes it

Each row is a training by train.py with its defaults: step PPO rewarded by models/prm-mini (3
seeds), by the exact checker (the ceiling) and by shuffled scores of prm-mini (the control, which
must not gain), and stepwise DPO. Each policy answers every problem greedily, and once by sampling
at temperature 1.

Writes ppo.json to --output_dir, and the correctness of every answer to ppo.jsonl.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.runs import BASE, bits, each_accuracy, pooled_accuracy, pooled_improvement
from common.cli import arg, check_input, parse_args, run
from common.files import AppendedRows, at_root, read_records
from evaluation.metrics import Metric, rate_metric
from evaluation.results import print_table, write_result
from reasoning.records import Problem

DATA = at_root("data/mcts_steps.jsonl.gz")
ROWS = {  # name -> (arguments of train.py, seeds)
    "step PPO": (["ppo"], 3),
    "step PPO, exact rewards": (["ppo", "--judge", "exact"], 1),
    "step PPO, shuffled rewards": (["ppo", "--judge", "shuffled", "--shuffled_judge", "prm"], 1),
    "stepwise DPO": (["dpo"], 1),
}
MEASURED = {  # name -> (split, temperature)
    "hard": ("hard", 0.0),
    "test": ("test", 0.0),
    "hard, sampled": ("hard", 1.0),
    "test, sampled": ("test", 1.0),
}


@dataclass
class PPOTableArguments:
    rows: list[str] = arg([*ROWS], "rows of the table", choices=[*ROWS])
    seeds: int | None = arg(
        None, "seeds of every row (default: 3 of step PPO with prm-mini, else 1)"
    )
    limit: int | None = arg(None, "the first problems of each split (default: all)")
    output_dir: str = arg(at_root("evaluation/results"), "folder of ppo.json")


def accuracy(model: str, limit: int | None) -> dict[str, str]:
    """Name in MEASURED -> a 0 or 1 a problem."""
    # heavy libraries
    from evaluation.accuracy import correct_answers
    from lm.policy import Policy

    policy, found = Policy.load(model), {}
    for name, (split, temperature) in MEASURED.items():
        path = at_root(f"data/problems_{split}.jsonl")
        problems = list(read_records(path, Problem))[:limit]
        label = f"{Path(model).name}: {name}"
        correct = correct_answers(policy, problems, temperature, label)
        found[name] = "".join(str(int(right)) for right in correct)
    return found


def train_and_measure(name: str, command: list[str], seed: int, limit: int | None) -> dict:
    """Train with one seed, unless its model is there already, and measure the model."""
    run_name = f"{name.replace(' ', '_').replace(',', '')}_{seed}"
    folder = Path(at_root("saved_model/ppo_table")) / run_name
    if not (folder / "config.json").exists():
        options = ["--seed", str(seed), "--output_dir", str(folder)]
        options += ["--run_name", f"ppo_table/{run_name}"]
        subprocess.run([sys.executable, at_root("train.py"), *command, *options], check=True)
    log = Path(at_root("logs/ppo_table"), run_name, "log.json").read_text(encoding="utf-8")
    seconds = round(json.loads(log)["seconds"])
    correct = accuracy(str(folder), limit)
    return {"name": name, "seed": seed, "seconds": seconds, "correct": correct}


def main() -> None:
    (args,) = parse_args(PPOTableArguments, description=__doc__)
    check_input(DATA, "python utils/build_mcts_dataset.py")
    output = Path(args.output_dir)
    store = AppendedRows(output / "ppo.jsonl", lambda row: "key" in row)
    done = {
        (row["name"], row["seed"]): row
        for row in store.rows
        if row["correct"].keys() == MEASURED.keys()
    }

    def measured(name: str, seed: int, measure: Callable[[], dict]) -> dict:
        if (name, seed) not in done:
            done[name, seed] = measure()
            store.append(done[name, seed])
        return done[name, seed]

    def measure_base() -> dict:
        return {"name": "base", "seed": 0, "correct": accuracy(BASE, args.limit)}

    base = measured("base", 0, measure_base)
    rows: dict[str, list[dict]] = {}
    for name in args.rows:
        command, seeds = ROWS[name]
        rows[name] = [
            measured(name, seed, lambda: train_and_measure(name, command, seed, args.limit))  # noqa: B023 (called at once)
            for seed in range(args.seeds or seeds)
        ]
    metrics: dict[str, Metric] = {}
    table: list[tuple] = []
    for split in MEASURED:
        base_correct = bits(base["correct"][split])
        base_accuracy = metrics[f"{split}/base_accuracy"] = rate_metric(base_correct)
        table.append((split, "base", base_accuracy, "", "", "", ""))
        for name, found in rows.items():
            correct = [bits(row["correct"][split]) for row in found]
            right, gain = pooled_accuracy(correct), pooled_improvement(correct, base_correct)
            metrics[f"{split}/{name}/accuracy"] = right
            metrics[f"{split}/{name}/accuracy_improvement"] = gain
            relative = f"{gain.value / base_accuracy.value:+.0%}"
            minutes = ", ".join(f"{row['seconds'] / 60:.0f}" for row in found)
            table.append((split, name, right, gain, relative, each_accuracy(correct), minutes))
    columns = ["split", "training", "accuracy", "minus base", "relative", "each seed"]
    title = "exact accuracy, greedy and sampled once at temperature 1"
    print_table(title, [*columns, "minutes of training"], table)
    write_result(output / "ppo.json", metrics, asdict(args), [0, 1, 2])
    print(f"wrote {output / 'ppo.json'}, {store.path}")


if __name__ == "__main__":
    run(main)
