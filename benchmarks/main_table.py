"""What the step scores add: pairs by answer and by judge, five seeds each, beside the strongest rivals.

    python benchmarks/main_table.py          # some two hours on 2 cores; stopped, it goes on where it was

Every row trains policy-mini on the same number of pairs and answers the 2,000 test problems greedily: the default; the same with
exact scores in place of the judge's (the ceiling) and with shuffled scores (the control that must not gain more); SFT on chosen for
as many updates; DPO at the constant learning rate and epochs that benchmarks/stability.py found best on validation.
Makes the pairs it lacks by the scripts of the repository. Writes main_table.json to --output_dir.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.runs import base_run, bits, run_all
from common.cli import check_input, parse_args, run
from common.files import at_root

FOLDER = Path(at_root("data/demo"))  # ignored by git
SCORE, BY_JUDGE = "reward_model/evaluate_steps.py", str(FOLDER / "by_judge.jsonl")
SAMPLE_BY_JUDGE = ["utils/build_synthetic_dataset.py", "--pair_by", "judge", "--limit", "1000"]
PAIRS = {  # name -> (file, the script that makes it and its arguments)
    "by answer": (at_root("data/rewarded.jsonl"), []),
    "by answer, exact": (str(FOLDER / "exact.jsonl"), [SCORE, "--judge", "exact"]),
    "by answer, shuffled": (str(FOLDER / "shuffled.jsonl"), [SCORE, "--judge", "shuffled"]),
    "by judge, without scores": (BY_JUDGE, SAMPLE_BY_JUDGE),
    "by judge": (str(FOLDER / "by_judge_scored.jsonl"), [SCORE, "--input", BY_JUDGE]),
    "by judge, exact": (
        str(FOLDER / "by_judge_exact.jsonl"),
        [SCORE, "--input", BY_JUDGE, "--judge", "exact"],
    ),
    "by judge, shuffled": (
        str(FOLDER / "by_judge_shuffled.jsonl"),
        [SCORE, "--input", BY_JUDGE, "--judge", "shuffled"],
    ),
}


@dataclass
class TableArguments:
    test: int = field(default=2000, metadata={"help": "test problems"})
    limit: int = field(default=512, metadata={"help": "pairs to train on, in every row"})
    seeds: int = field(default=5, metadata={"help": "seeds of every row"})
    workers: int = field(default=2, metadata={"help": "trainings at once"})
    stability: str = field(
        default_factory=lambda: at_root("docs/results/stability.json"),
        metadata={"help": "what benchmarks/stability.py wrote: the settings of DPO"},
    )
    output_dir: str = field(
        default_factory=lambda: at_root("evaluation/results"),
        metadata={"help": "folder of main_table.json"},
    )


def main() -> None:
    (args,) = parse_args(TableArguments, description=__doc__)
    check_input(args.stability, "python benchmarks/stability.py")
    for path, command in PAIRS.values():
        if not Path(path).exists():
            subprocess.run(
                [sys.executable, at_root(command[0]), *command[1:], "--output", path], check=True
            )
    from evaluation.metrics import clustered_mean_metric, print_table, rate_metric, write_result

    rate, epochs = json.loads(Path(args.stability).read_text())["chosen"][
        "stepwise uniform, no anchor"
    ]
    constant = {"lr_scheduler_type": "constant", "warmup_steps": 0}  # as it was chosen
    dpo = {"loss_type": ["sigmoid"], "learning_rate": rate, "num_train_epochs": epochs, **constant}
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
    runs = [
        {
            "name": name, "pairs": PAIRS[pairs][0], "limit": args.limit, "seed": seed, "split": "test",
            "problems": args.test, "each_epoch": False, "settings": {"precompute_ref_log_probs": True, **settings},
        }
        for seed in range(args.seeds) for name, (pairs, settings) in rows.items()
    ]  # fmt: skip
    output = Path(args.output_dir)
    done = run_all(runs, output / "main_table.jsonl", args.workers)
    base = bits(
        run_all(
            [base_run(PAIRS["by answer"][0], "test", args.test)], output / "main_table.jsonl", 1
        )[0]["correct"]
    )
    metrics = {"base_accuracy": rate_metric(base)}
    table = [("base", "", metrics["base_accuracy"], "", "")]
    for name in rows:
        of_seeds: dict[int, list[int]] = {}
        for row in sorted(
            (row for row in done if row["name"] == name), key=lambda row: row["epoch"]
        ):
            of_seeds[row["seed"]] = bits(row["correct"])  # the last epoch's
        problem_of = [k for correct in of_seeds.values() for k in range(len(correct))]
        right = [c for correct in of_seeds.values() for c in correct]
        gain = [
            c - before
            for correct in of_seeds.values()
            for c, before in zip(correct, base, strict=True)
        ]
        metrics[f"{name}/accuracy"] = clustered_mean_metric(right, problem_of)
        metrics[f"{name}/accuracy_improvement"] = clustered_mean_metric(gain, problem_of)
        seeds = ", ".join(f"{sum(correct) / len(correct):.3f}" for correct in of_seeds.values())
        trained = next(row["pairs_trained"] for row in done if row["name"] == name)
        table.append(
            (
                name,
                trained,
                metrics[f"{name}/accuracy"],
                metrics[f"{name}/accuracy_improvement"],
                seeds,
            )
        )
    title = f"greedy exact accuracy, {args.test:,} test problems, {args.seeds} seeds"
    print_table(title, ["training", "pairs", "accuracy", "minus base", "each seed"], table)
    write_result(output / "main_table.json", metrics, vars(args), range(args.seeds))
    print(f"wrote {output / 'main_table.json'}")


if __name__ == "__main__":
    run(main)
