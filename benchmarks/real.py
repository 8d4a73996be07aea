"""Stepwise DPO and its rivals on a real model, at as many updates, on problems that people wrote.

    make real PROBLEMS=data/mawps.jsonl TEST_PROBLEMS=data/svamp.jsonl
    python benchmarks/real.py        # some hours on 2 cores; the same command resumes it

Takes the warm-started policy, the trees and the pairs of round 1 from the folder of
utils/run_loop.py. Every method trains that policy on rows from the same trees:

- stepwise DPO with the settings of configs/real/dpo.yaml; DPO; and SFT on the chosen steps
- SFT on the right rollouts, as many as there are pairs, or all

1. Tuning: every method with each learning rate, one seed, on the validation problems.
2. Test: every method with its best learning rate and all seeds, on all test problems, greedily.

Writes real.json to --output_dir, and the answers of every run to real.jsonl. Its figures are named
SET/MODEL/METHOD/accuracy, such as svamp/smollm2-135m-instruct/DPO/accuracy."""

import itertools
import json
import os
import random
import sys
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from benchmarks.compare import shares
from benchmarks.runs import base_run, row_of_each
from common.cli import arg, check_input, check_least, parse_args, run
from common.files import ROOT, at_root, file_stem, read_records, read_rows, write_records
from evaluation.metrics import Metric, crossed_mean_metric, rate_metric
from evaluation.results import print_table, write_result
from reasoning.records import Problem
from search.step_pairs import solutions
from search.tree_search import Tree

DEFAULT = "stepwise"
# method -> (rows, command of train.py, settings)
METHODS: dict[str, tuple[str, str, dict]] = {
    DEFAULT: ("pairs", "dpo", {}),
    "DPO": ("pairs", "dpo", {"loss_type": ["sigmoid"]}),
    "SFT on chosen": ("pairs", "dpo", {"loss_type": ["sft"]}),
    "SFT on right samples": ("right", "sft", {}),
}


@dataclass
class RealArguments:
    loop: str = arg(at_root("data/real"), "folder of utils/run_loop.py, with round 1 finished")
    methods: list[str] = arg([*METHODS], "methods", choices=[*METHODS])
    rates: list[float] = arg([3e-5, 7e-5, 1e-4], "learning rates of the tuning")
    until: str = arg("test", "the last stage to compute", choices=["tuning", "test"])
    seeds: int = arg(3, "training seeds of every method")
    workers: int = arg(1, "trainings at once; each holds several copies of the model")
    output_dir: str = arg(at_root("evaluation/results"), "folder of real.json")

    def __post_init__(self) -> None:
        check_least(self, seeds=1, workers=1)


def write_right_rollouts(loop: Path) -> None:
    """Write the different right solutions of the trees, at most as many as there are pairs."""
    answers = {row.prompt: row.answer for row in read_records(loop / "train.jsonl", Problem)}
    right = [
        Problem(tree.prompt, answers[tree.prompt], list(steps))
        for tree in read_records(loop / "round_1/trees.jsonl.gz", Tree)
        for steps, outcome in ChainMap(*solutions(tree).values()).items()
        if outcome == "right"
    ]
    random.Random(0).shuffle(right)
    pairs = sum(1 for _ in read_rows(loop / "round_1/pairs.jsonl"))
    write_records(loop / "round_1/right.jsonl", right[:pairs])


def names_of(loop: Path) -> tuple[str, dict[Path, str]]:
    """The name of the first model of the loop, and the name of each file of test problems."""
    settings = json.loads((loop / "stages.json").read_bytes())["settings"]
    own = file_stem(settings["problems"]).lower()
    files = sorted(loop.glob("test*.jsonl"))
    return Path(settings["model_name_or_path"]).name, {
        file: own if file.stem == "test" else file.stem.removeprefix("test_") for file in files
    }


def main() -> None:
    (args,) = parse_args(RealArguments, description=__doc__)
    loop = Path(args.loop)
    check_input(str(loop / "round_1/pairs.jsonl"), "make real")
    write_right_rollouts(loop)
    output = Path(args.output_dir)

    def named(path: Path) -> str:
        """The path from the root: what is written tells nothing about the machine."""
        return os.path.relpath(path, ROOT)

    policy = named(loop / "warm/policy")
    common = yaml.safe_load(Path(at_root("configs/real/dpo.yaml")).read_text(encoding="utf-8"))
    batch, epochs = common["per_device_train_batch_size"], common["num_train_epochs"]
    others = ("learning_rate", "num_train_epochs", "logging_steps", "save_steps")
    dpo = {name: value for name, value in common.items() if name not in others}
    sft = {name: common[name] for name in ("per_device_train_batch_size", "max_length")}
    updates = epochs * -(-sum(1 for _ in read_rows(loop / "round_1/pairs.jsonl")) // batch)
    validation = {named(loop / "validation.jsonl"): 10_000}
    model, sets = names_of(loop)
    tests = {named(path): 10_000 for path in sets}

    def one(method: str, rate: float, seed: int, measure: dict[str, int]) -> dict:
        rows, recipe, settings = METHODS[method]
        return {
            "name": method,
            "recipe": recipe,
            "rows": named(loop / f"round_1/{rows}.jsonl"),
            "model": policy,
            "settings": {
                **(dpo if recipe == "dpo" else sft),
                "max_steps": updates,
                "learning_rate": rate,
                **settings,
            },
            "seed": seed,
            "each_epoch": False,
            "measure": measure,
            "samples": 0,
        }

    def rows(runs: Sequence[dict]) -> list[dict]:
        return row_of_each(runs, output / "real.jsonl", args.workers)

    metrics: dict[str, Metric] = {}
    cells = list(itertools.product(args.methods, args.rates))
    found = rows([one(*cell, seed=0, measure=validation) for cell in cells])
    rates: dict[str, dict[float, Metric]] = {method: {} for method in args.methods}
    for (method, rate), row in zip(cells, found, strict=True):
        (digits,) = row["correct"].values()
        rates[method][rate] = rate_metric([float(digit) for digit in digits])
        metrics[f"validation/{model}/{method}/lr {rate:g}/accuracy"] = rates[method][rate]
    table = [(method, f"{rate:g}", own[rate]) for method, own in rates.items() for rate in own]
    print_table("validation problems, seed 0", ["method", "learning rate", "accuracy"], table)
    if args.until == "tuning":
        return
    chosen = {m: max(own, key=lambda rate: own[rate].value) for m, own in rates.items()}
    seeds = range(args.seeds)
    tested = [one(method, chosen[method], seed, tests) for method in args.methods for seed in seeds]
    base, *found = rows([base_run(tests, 0, policy), *tested])
    table = []
    for test, name in zip(tests, sets.values(), strict=True):
        before = shares([base], test)
        metrics[f"{name}/{model}/warm start/accuracy"] = crossed_mean_metric(before)
        for k, method in enumerate(args.methods):
            right = shares(found[k * args.seeds : (k + 1) * args.seeds], test)
            accuracy, gain = crossed_mean_metric(right), crossed_mean_metric(right - before)
            metrics[f"{name}/{model}/{method}/accuracy"] = accuracy
            metrics[f"{name}/{model}/{method}/accuracy_improvement"] = gain
            each = ", ".join(f"{value:.3f}" for value in right.mean(1))
            table.append((name, method, f"{chosen[method]:g}", accuracy, gain, each))
    columns = ["problems", "method", "learning rate", "accuracy", "minus warm start", "each seed"]
    print_table(f"{updates} updates of {batch} rows", columns, table)
    write_result(output / "real.json", metrics, vars(args), seeds, chosen=chosen)
    print(f"wrote {output / 'real.json'}")


if __name__ == "__main__":
    run(main)
