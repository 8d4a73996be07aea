"""Step PPO beside stepwise DPO, a control and a ceiling: accuracy on all hard and test problems, greedy and sampled once.

    python benchmarks/ppo_table.py           # about an hour and a half on 2 cores; stopped, it goes on where it was

Every row is a training by train.py with its defaults: step PPO rewarded by models/prm-mini (3 seeds), by the exact checker (the
ceiling) and by shuffled scores of prm-mini (the control that must not gain), and stepwise DPO. Writes ppo.json to
--output_dir, and every answer's correctness to ppo.jsonl.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.runs import BASE, bits
from common.cli import check_input, parse_args, run
from common.files import AppendedRows, at_root, read_records
from reasoning.records import Problem

DATA = at_root("data/mcts_steps.jsonl")
ROWS = {  # name -> what train.py is told, seeds
    "step PPO": (["ppo"], 3),
    "step PPO, exact rewards": (["ppo", "--judge", "exact"], 1),
    "step PPO, shuffled rewards": (["ppo", "--judge", "shuffled", "--shuffled_judge", "prm"], 1),
    "stepwise DPO": (["dpo"], 1),
}
MEASURED = {  # name -> split, temperature
    "hard": ("hard", 0.0),
    "test": ("test", 0.0),
    "hard, sampled": ("hard", 1.0),
    "test, sampled": ("test", 1.0),
}


@dataclass
class PPOTableArguments:
    rows: list[str] = field(
        default_factory=lambda: [*ROWS], metadata={"help": "rows of the table", "choices": [*ROWS]}
    )
    seeds: int | None = field(
        default=None,
        metadata={"help": "seeds of every row (default: 3 of step PPO with prm-mini, else 1)"},
    )
    limit: int | None = field(
        default=None, metadata={"help": "the first problems of each split (default: all)"}
    )
    output_dir: str = field(
        default_factory=lambda: at_root("evaluation/results"),
        metadata={"help": "folder of ppo.json"},
    )


def accuracy(model: str, limit: int | None) -> dict[str, str]:
    """Name in MEASURED -> a 0 or 1 a problem."""
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
    folder = (
        Path(at_root("saved_model/ppo_table")) / f"{name.replace(' ', '_').replace(',', '')}_{seed}"
    )
    if not (folder / "config.json").exists():
        given = [
            "--seed",
            str(seed),
            "--output_dir",
            str(folder),
            "--run_name",
            f"ppo_table/{folder.name}",
        ]
        subprocess.run([sys.executable, at_root("train.py"), *command, *given], check=True)
    log = json.loads(
        Path(at_root("logs/ppo_table"), folder.name, "log.json").read_text(encoding="utf-8")
    )
    return {
        "name": name,
        "seed": seed,
        "seconds": round(log["seconds"]),
        "correct": accuracy(str(folder), limit),
    }


def main() -> None:
    (args,) = parse_args(PPOTableArguments, description=__doc__)
    check_input(DATA, "python utils/build_mcts_dataset.py")
    from evaluation.metrics import clustered_mean_metric, print_table, rate_metric, write_result

    path = Path(args.output_dir) / "ppo.jsonl"
    store = AppendedRows(path)
    done = {
        (row["name"], row["seed"]): row
        for row in store.rows
        if row["correct"].keys() == MEASURED.keys()
    }

    def measured(name: str, seed: int, make) -> dict:
        if (name, seed) not in done:
            done[name, seed] = make()
            store.append(done[name, seed])
        return done[name, seed]

    base = measured(
        "base", 0, lambda: {"name": "base", "seed": 0, "correct": accuracy(BASE, args.limit)}
    )
    of_rows = {}
    for name in args.rows:
        command, seeds = ROWS[name]
        of_rows[name] = [
            measured(name, seed, lambda: train_and_measure(name, command, seed, args.limit))  # noqa: B023  called at once
            for seed in range(args.seeds or seeds)
        ]
    metrics, table = {}, []
    for split in MEASURED:
        before = bits(base["correct"][split])
        metrics[f"{split}/base_accuracy"] = rate_metric(before)
        table.append((split, "base", metrics[f"{split}/base_accuracy"], "", "", "", ""))
        for name, rows in of_rows.items():
            runs = [bits(row["correct"][split]) for row in rows]
            problem_of = [k for correct in runs for k in range(len(correct))]
            right = clustered_mean_metric([c for correct in runs for c in correct], problem_of)
            gain = clustered_mean_metric(
                [c - b for correct in runs for c, b in zip(correct, before, strict=True)],
                problem_of,
            )
            metrics |= {
                f"{split}/{name}/accuracy": right,
                f"{split}/{name}/accuracy_improvement": gain,
            }
            relative = f"{gain.value / metrics[f'{split}/base_accuracy'].value:+.0%}"
            minutes = ", ".join(f"{row['seconds'] / 60:.0f}" for row in rows)
            table.append(
                (
                    split,
                    name,
                    right,
                    gain,
                    relative,
                    ", ".join(f"{sum(c) / len(c):.3f}" for c in runs),
                    minutes,
                )
            )
    columns = [
        "split",
        "training",
        "accuracy",
        "minus base",
        "relative",
        "each seed",
        "minutes of training",
    ]
    print_table("exact accuracy, greedy and sampled once at temperature 1", columns, table)
    write_result(Path(args.output_dir) / "ppo.json", metrics, asdict(args), [0, 1, 2])
    print(f"wrote {Path(args.output_dir) / 'ppo.json'}, {path}")


if __name__ == "__main__":
    run(main)
