"""Which loss holds at which learning rate: every step loss, with and without the anchor, over a grid; then three seeds.

    python benchmarks/stability.py          # about an hour and a half on 2 cores; stopped, it goes on where it was

The grid: 512 on-policy pairs, one constant-lr run of 3 epochs a setting, at a third of the default learning rate, at it and at
three times it; greedy exact accuracy on validation problems after each epoch (seed 0). Then each loss with its best learning rate
and number of epochs trains with 3 seeds and is measured on test problems. `uniform` without anchor is DPO (to 1e-5, tests).
Writes stability.json, stability.png and the rows they came from to --output_dir.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.runs import base_run, bits, run_all
from common.cli import check_input, parse_args, run
from common.files import at_root

RATES = (1.0, 3.0, 1 / 3)  # times the default
EPOCHS = 3
LOSSES = {
    **{
        f"stepwise {credit}": {"credit": credit}
        for credit in ("first_error", "score", "normalized", "uniform")
    },
    "step_dpo": {"loss_type": ["step_dpo"]},
    "full_step_dpo": {"loss_type": ["full_step_dpo"]},
}
ANCHORS = {"anchor": {}, "no anchor": {"anchor_lambda": 0.0}}


@dataclass
class StabilityArguments:
    pairs: str = field(
        default_factory=lambda: at_root("data/rewarded.jsonl"), metadata={"help": "scored pairs"}
    )
    limit: int = field(default=512, metadata={"help": "pairs to train on"})
    validation: int = field(default=500, metadata={"help": "validation problems of the grid"})
    test: int = field(default=1000, metadata={"help": "test problems of the three seeds"})
    seeds: int = field(default=3, metadata={"help": "seeds at the chosen learning rate"})
    workers: int = field(default=2, metadata={"help": "trainings at once"})
    output_dir: str = field(
        default_factory=lambda: at_root("evaluation/results"),
        metadata={"help": "folder of stability.json"},
    )


def main() -> None:
    (args,) = parse_args(StabilityArguments, description=__doc__)
    check_input(args.pairs, "make data")
    from evaluation.metrics import (
        Metric,
        clustered_mean_metric,
        print_table,
        rate_metric,
        write_result,
    )
    from evaluation.plots import stability_plot
    from trainer.stepwise_dpo_trainer import StepwiseDPOConfig

    default_rate = StepwiseDPOConfig.learning_rate
    output = Path(args.output_dir)
    common = {"pairs": args.pairs, "limit": args.limit, "each_epoch": True}
    constant = {
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "num_train_epochs": EPOCHS,
        "precompute_ref_log_probs": True,
    }
    grid = [
        {
            **common, "name": f"{loss}, {anchor}", "seed": 0, "split": "validation", "problems": args.validation,
            "settings": {**constant, **LOSSES[loss], **ANCHORS[anchor], "learning_rate": rate * default_rate},
        }
        for rate in RATES for loss in LOSSES for anchor in ANCHORS
    ]  # fmt: skip
    rows = run_all(grid, output / "stability_grid.jsonl", args.workers)
    base = run_all(
        [base_run(args.pairs, "validation", args.validation)], output / "stability_grid.jsonl", 1
    )[0]
    metrics: dict[str, Metric] = {"validation/base/accuracy": rate_metric(bits(base["correct"]))}
    table, best, drawn = [("base", "", *[str(metrics["validation/base/accuracy"])], "", "")], {}, {}
    for run_ in grid:
        name, rate = run_["name"], run_["settings"]["learning_rate"]
        of_run = sorted(
            (row for row in rows if (row["name"], row["settings"]) == (name, run_["settings"])),
            key=lambda r: r["epoch"],
        )
        measured = [rate_metric(bits(row["correct"])) for row in of_run]
        for row, metric in zip(of_run, measured, strict=True):
            metrics[f"validation/{name}/lr {rate:.1e}/epoch {row['epoch']}/accuracy"] = metric
            if name not in best or metric.value > best[name][0]:
                best[name] = (metric.value, rate, row["epoch"])
        table.append((name, f"{rate:.1e}", *map(str, measured)))
        drawn.setdefault(rate, {})[name] = [metric.value for metric in measured]
    title = f"exact accuracy, {args.validation} validation problems, {args.limit} pairs, constant lr, seed 0"
    print_table(title, ["loss", "lr", *[f"epoch {k + 1}" for k in range(EPOCHS)]], table)
    panels = {f"lr {rate:.1e}": drawn[rate] for rate in sorted(drawn)}
    stability_plot(
        output / "stability.png", metrics["validation/base/accuracy"].value, panels, title
    )

    final = [
        {
            **common, "name": f"{loss}, {anchor}", "seed": seed, "split": "test", "problems": args.test, "each_epoch": False,
            "settings": {**constant, **LOSSES[loss], **ANCHORS[anchor], "learning_rate": best[f"{loss}, {anchor}"][1],
                         "num_train_epochs": best[f"{loss}, {anchor}"][2]},
        }
        for seed in range(args.seeds) for loss in LOSSES for anchor in ANCHORS
    ]  # fmt: skip
    rows = run_all(final, output / "stability_seeds.jsonl", args.workers)
    base = run_all([base_run(args.pairs, "test", args.test)], output / "stability_seeds.jsonl", 1)[
        0
    ]
    metrics["test/base/accuracy"] = rate_metric(bits(base["correct"]))
    table = [("base", "", "", metrics["test/base/accuracy"], "")]
    for name, (_, rate, epochs) in best.items():
        last = [
            bits(row["correct"]) for row in rows if row["name"] == name and row["epoch"] == epochs
        ]
        # a problem's answers are not independent
        problem_of = [k for correct in last for k in range(len(correct))]
        pooled = clustered_mean_metric([c for correct in last for c in correct], problem_of)
        metrics[f"test/{name}/accuracy"] = pooled
        seeds = ", ".join(f"{sum(correct) / len(correct):.3f}" for correct in last)
        table.append((name, f"{rate:.1e}", epochs, pooled, seeds))
    title = f"exact accuracy, {args.test} test problems, lr and epochs chosen on validation, {args.seeds} seeds"
    print_table(title, ["loss", "lr", "epochs", "accuracy", "each seed"], table)
    write_result(
        output / "stability.json",
        metrics,
        vars(args),
        range(args.seeds),
        chosen={n: b[1:] for n, b in best.items()},
    )
    print(f"wrote {output / 'stability.json'} and {output / 'stability.png'}")


if __name__ == "__main__":
    run(main)
