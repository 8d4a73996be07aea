"""The stable learning rates of every step loss, with and without anchor: a grid, then three seeds.

    python benchmarks/stability.py    # about 90 minutes on 2 cores; the same command resumes it

The grid: each loss trains on 512 on-policy pairs for 3 epochs at a constant learning rate, which is
a third of the default, the default, and three times the default, with seed 0. The greedy exact
accuracy on validation problems is measured after each epoch. Then each loss trains with 3 seeds,
with its best learning rate and number of epochs, and is measured on test problems. `uniform`
without anchor is DPO (to 1e-5, tests).

Writes stability.json, stability.png and the rows of all runs to --output_dir.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.runs import base_run, bits, each_accuracy, pooled_accuracy, run_all
from common.cli import arg, check_input, parse_args, run
from common.files import at_root
from evaluation.metrics import Metric, rate_metric
from evaluation.results import print_table, write_result

RATES = (1.0, 3.0, 1 / 3)  # times the default
EPOCHS = 3
CREDITS = ("first_error", "score", "normalized", "uniform")
LOSSES = {
    **{f"stepwise {credit}": {"credit": credit} for credit in CREDITS},
    "step_dpo": {"loss_type": ["step_dpo"]},
    "full_step_dpo": {"loss_type": ["full_step_dpo"]},
}
ANCHORS = {"anchor": {}, "no anchor": {"anchor_lambda": 0.0}}
VARIANTS = {  # name -> settings of train.py dpo
    f"{loss}, {anchor}": {
        **{"lr_scheduler_type": "constant", "warmup_steps": 0, "num_train_epochs": EPOCHS},
        "precompute_ref_log_probs": True,
        **settings,
        **anchor_settings,
    }
    for loss, settings in LOSSES.items()
    for anchor, anchor_settings in ANCHORS.items()
}


@dataclass
class StabilityArguments:
    pairs: str = arg(at_root("data/rewarded.jsonl"), "scored pairs")
    limit: int = arg(512, "pairs to train on")
    validation: int = arg(500, "validation problems of the grid")
    test: int = arg(1000, "test problems of the three seeds")
    seeds: int = arg(3, "seeds at the chosen learning rate")
    workers: int = arg(2, "trainings at once")
    output_dir: str = arg(at_root("evaluation/results"), "folder of stability.json")


def main() -> None:
    (args,) = parse_args(StabilityArguments, description=__doc__)
    makes_scores = "python reward_model/evaluate_steps.py"
    check_input(args.pairs, makes_scores if args.pairs == StabilityArguments.pairs else None)
    # heavy libraries
    from evaluation.plots import stability_plot
    from trainer.stepwise_dpo_trainer import StepwiseDPOConfig

    output = Path(args.output_dir)
    common = {"pairs": args.pairs, "limit": args.limit}
    rates = [rate * StepwiseDPOConfig.learning_rate for rate in RATES]
    validation = {"split": "validation", "problems": args.validation}
    grid = [
        {
            **common,
            **validation,
            "name": name,
            "seed": 0,
            "each_epoch": True,
            "settings": {**settings, "learning_rate": rate},
        }
        for rate in rates
        for name, settings in VARIANTS.items()
    ]
    path = output / "stability_grid.jsonl"
    rows = run_all(grid, path, args.workers)
    (base_row,) = run_all([base_run(args.pairs, **validation)], path, 1)
    base = rate_metric(bits(base_row["correct"]))
    metrics: dict[str, Metric] = {"validation/base/accuracy": base}
    table = [("base", "", str(base), "", "")]
    best: dict[str, tuple[float, float, int]] = {}  # name -> accuracy, learning rate, epoch
    curves: dict[float, dict[str, list[float]]] = {rate: {} for rate in sorted(rates)}
    for one in grid:
        name, rate = one["name"], one["settings"]["learning_rate"]
        found = [row for row in rows if (row["name"], row["settings"]) == (name, one["settings"])]
        found.sort(key=lambda row: row["epoch"])
        measured = [rate_metric(bits(row["correct"])) for row in found]
        for row, metric in zip(found, measured, strict=True):
            metrics[f"validation/{name}/lr {rate:.1e}/epoch {row['epoch']}/accuracy"] = metric
            if name not in best or metric.value > best[name][0]:
                best[name] = (metric.value, rate, row["epoch"])
        table.append((name, f"{rate:.1e}", *map(str, measured)))
        curves[rate][name] = [metric.value for metric in measured]
    title = (
        f"exact accuracy, {args.validation} validation problems, {args.limit} pairs, constant lr, "
        "seed 0"
    )
    print_table(title, ["loss", "lr", *[f"epoch {k + 1}" for k in range(EPOCHS)]], table)
    panels = {f"lr {rate:.1e}": lines for rate, lines in curves.items()}
    stability_plot(output / "stability.png", base.value, panels, title)

    test = {"split": "test", "problems": args.test}
    chosen = {name: (rate, epoch) for name, (_, rate, epoch) in best.items()}
    final = [
        {
            **common,
            **test,
            "name": name,
            "seed": seed,
            "each_epoch": False,
            "settings": {
                **settings,
                "learning_rate": chosen[name][0],
                "num_train_epochs": chosen[name][1],
            },
        }
        for seed in range(args.seeds)
        for name, settings in VARIANTS.items()
    ]
    path = output / "stability_seeds.jsonl"
    rows = run_all(final, path, args.workers)
    (base_row,) = run_all([base_run(args.pairs, **test)], path, 1)
    metrics["test/base/accuracy"] = rate_metric(bits(base_row["correct"]))
    table = [("base", "", "", metrics["test/base/accuracy"], "")]
    for name, (rate, epoch) in chosen.items():
        found = [row for row in rows if (row["name"], row["epoch"]) == (name, epoch)]
        correct = [bits(row["correct"]) for row in found]
        accuracy = metrics[f"test/{name}/accuracy"] = pooled_accuracy(correct)
        table.append((name, f"{rate:.1e}", epoch, accuracy, each_accuracy(correct)))
    title = (
        f"exact accuracy, {args.test} test problems, lr and epochs chosen on validation, "
        f"{args.seeds} seeds"
    )
    print_table(title, ["loss", "lr", "epochs", "accuracy", "each seed"], table)
    result = output / "stability.json"
    write_result(result, metrics, vars(args), range(args.seeds), chosen=chosen)
    print(f"wrote {result} and {output / 'stability.png'}")


if __name__ == "__main__":
    run(main)
