"""The gain from step scores: stepwise DPO, controls and rivals, on pairs by answer and by judge.

    python benchmarks/main_table.py    # about two hours on 2 cores; the same command resumes it

Each row trains policy-mini on the same number of pairs and answers all test problems greedily:

- stepwise DPO with its defaults
- with exact scores in place of the judge's scores (the ceiling)
- with shuffled scores (the control, which must not gain more)
- SFT on chosen, with as many updates
- DPO with the learning rate and the epochs that benchmarks/stability.py chose on validation

Scripts of this repository make missing pairs. Writes main_table.json to --output_dir.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.runs import (
    base_run,
    bits,
    each_accuracy,
    pooled_accuracy,
    pooled_improvement,
    run_all,
)
from common.cli import arg, check_input, parse_args, run
from common.files import at_root
from evaluation.metrics import rate_metric
from evaluation.results import print_table, write_result

FOLDER = Path(at_root("data/main_table"))  # ignored by git
SCORE, BY_JUDGE = "reward_model/evaluate_steps.py", str(FOLDER / "by_judge.jsonl")
SAMPLE_BY_JUDGE = ["utils/build_synthetic_dataset.py", "--pair_by", "judge", "--limit", "1000"]
SCORE_BY_JUDGE = [SCORE, "--input", BY_JUDGE]
PAIRS = {  # name -> (file, the script that makes it, with its arguments)
    "by answer": (at_root("data/rewarded.jsonl"), []),
    "by answer, exact": (str(FOLDER / "exact.jsonl"), [SCORE, "--judge", "exact"]),
    "by answer, shuffled": (str(FOLDER / "shuffled.jsonl"), [SCORE, "--judge", "shuffled"]),
    "by judge, without scores": (BY_JUDGE, SAMPLE_BY_JUDGE),
    "by judge": (str(FOLDER / "by_judge_scored.jsonl"), SCORE_BY_JUDGE),
    "by judge, exact": (
        str(FOLDER / "by_judge_exact.jsonl"),
        [*SCORE_BY_JUDGE, "--judge", "exact"],
    ),
    "by judge, shuffled": (
        str(FOLDER / "by_judge_shuffled.jsonl"),
        [*SCORE_BY_JUDGE, "--judge", "shuffled"],
    ),
}


@dataclass
class TableArguments:
    test: int = arg(2000, "test problems")
    limit: int = arg(512, "pairs to train on, in every row")
    seeds: int = arg(5, "seeds of every row")
    workers: int = arg(2, "trainings at once")
    stability: str = arg(
        at_root("docs/results/stability.json"),
        "the result of benchmarks/stability.py, with the settings of DPO",
    )
    output_dir: str = arg(at_root("evaluation/results"), "folder of main_table.json")


def main() -> None:
    (args,) = parse_args(TableArguments, description=__doc__)
    check_input(args.stability, "python benchmarks/stability.py")
    for path, command in PAIRS.values():
        if not Path(path).exists():
            script = [sys.executable, at_root(command[0]), *command[1:]]
            subprocess.run([*script, "--output", path], check=True)

    chosen = json.loads(Path(args.stability).read_text(encoding="utf-8"))["chosen"]
    rate, epochs = chosen["stepwise uniform, no anchor"]  # this is DPO
    dpo = {"loss_type": ["sigmoid"], "learning_rate": rate, "num_train_epochs": epochs}
    dpo |= {"lr_scheduler_type": "constant", "warmup_steps": 0}  # as in stability.py
    rows = {
        f"{pairs}: {name}": (f"{pairs}{scores}", settings)
        for pairs in ("by answer", "by judge")
        for name, scores, settings in (
            ("stepwise, the default", "", {}),
            ("stepwise, exact scores", ", exact", {}),
            ("stepwise, shuffled scores", ", shuffled", {}),
            ("SFT on chosen", "", {"loss_type": ["sft"]}),
            ("DPO at its best lr", "", dpo),
        )
    }
    common = {"limit": args.limit, "split": "test", "problems": args.test, "each_epoch": False}
    runs = [
        {
            **common,
            "name": name,
            "pairs": PAIRS[pairs][0],
            "seed": seed,
            "settings": {"precompute_ref_log_probs": True, **settings},
        }
        for seed in range(args.seeds)
        for name, (pairs, settings) in rows.items()
    ]
    output = Path(args.output_dir)
    path = output / "main_table.jsonl"
    done = run_all(runs, path, args.workers)
    (base_row,) = run_all([base_run(PAIRS["by answer"][0], "test", args.test)], path, 1)
    base = bits(base_row["correct"])
    metrics = {"base_accuracy": rate_metric(base)}
    table = [("base", "", metrics["base_accuracy"], "", "")]
    for name in rows:
        found = [row for row in done if row["name"] == name]
        # seed -> the row of the last epoch
        last = {row["seed"]: row for row in sorted(found, key=lambda row: row["epoch"])}
        correct = [bits(row["correct"]) for row in last.values()]
        accuracy, improvement = pooled_accuracy(correct), pooled_improvement(correct, base)
        metrics[f"{name}/accuracy"] = accuracy
        metrics[f"{name}/accuracy_improvement"] = improvement
        pairs = found[0]["pairs_trained"]
        table.append((name, pairs, accuracy, improvement, each_accuracy(correct)))
    title = f"greedy exact accuracy, {args.test:,} test problems, {args.seeds} seeds"
    print_table(title, ["training", "pairs", "accuracy", "minus base", "each seed"], table)
    write_result(output / "main_table.json", metrics, vars(args), range(args.seeds))
    print(f"wrote {output / 'main_table.json'}")


if __name__ == "__main__":
    run(main)
