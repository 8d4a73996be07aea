"""The stable learning rates of every step loss, with and without anchor.

    python benchmarks/stability.py    # about an hour on 2 cores; the same command resumes it

Each loss trains on 512 on-policy pairs for 3 epochs at a constant learning rate, which is a third
of the default, the default, and three times the default, with seed 0. The greedy exact accuracy on
validation problems is measured after each epoch. `uniform` without anchor is DPO (to 1e-5, tests).
benchmarks/compare.py compares the methods on test problems.

Writes stability.json, stability.png and the rows of all runs to --output_dir.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.runs import BASE, base_run, bits, run_all
from common.cli import arg, check_input, parse_args, run
from common.files import at_root
from evaluation.metrics import Metric, rate_metric
from evaluation.results import print_table, write_result

RATES = (1.0, 3.0, 1 / 3)  # times the default
EPOCHS = 3
CREDITS = ("fork", "first_error", "score", "normalized", "uniform")
LOSSES = {
    "stepwise + step_sft fork": {"loss_type": ["stepwise", "step_sft"], "credit": "fork"},
    **{f"stepwise {credit}": {"loss_type": ["stepwise"], "credit": credit} for credit in CREDITS},
    "step_dpo": {"loss_type": ["step_dpo"]},
    "full_step_dpo": {"loss_type": ["full_step_dpo"]},
}
ANCHORS = {"anchor": {"anchor_lambda": 5.0}, "no anchor": {"anchor_lambda": 0.0}}
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
    pairs: str = arg("data/rewarded.jsonl", "scored pairs")
    limit: int = arg(512, "pairs to train on")
    validation: int = arg(500, "validation problems")
    workers: int = arg(2, "trainings at once")
    output_dir: str = arg(at_root("evaluation/results"), "folder of stability.json")


def main() -> None:
    (args,) = parse_args(StabilityArguments, description=__doc__)
    makes_scores = "python reward_model/evaluate_steps.py"
    is_default = args.pairs == StabilityArguments.pairs
    check_input(at_root(args.pairs), makes_scores if is_default else None)
    # heavy libraries
    from evaluation.plots import stability_plot
    from trainer.stepwise_dpo_trainer import StepwiseDPOConfig

    output = Path(args.output_dir)
    measure = {"validation": args.validation}
    rates = [rate * StepwiseDPOConfig.learning_rate for rate in RATES]
    grid = [
        {
            "name": name,
            "recipe": "dpo",
            "rows": args.pairs,
            "model": BASE,
            "settings": {**settings, "limit": args.limit, "learning_rate": rate},
            "seed": 0,
            "measure": measure,
            "samples": 0,
            "each_epoch": True,
        }
        for rate in rates
        for name, settings in VARIANTS.items()
    ]
    path = output / "stability.jsonl"
    rows = run_all(grid, path, args.workers)
    (base_row,) = run_all([base_run(measure)], path, 1)
    base = rate_metric(bits(base_row["correct"]["validation"]))
    metrics: dict[str, Metric] = {"base/accuracy": base}
    table = [("base", "", str(base), "", "")]
    curves: dict[tuple[str, float], list[Metric]] = {}
    for one in grid:
        name, rate = one["name"], one["settings"]["learning_rate"]
        found = [row for row in rows if (row["name"], row["settings"]) == (name, one["settings"])]
        found.sort(key=lambda row: row["epoch"])
        accuracies = [rate_metric(bits(row["correct"]["validation"])) for row in found]
        for row, accuracy in zip(found, accuracies, strict=True):
            metrics[f"{name}/lr {rate:.1e}/epoch {row['epoch']}/accuracy"] = accuracy
        table.append((name, f"{rate:.1e}", *map(str, accuracies)))
        curves[name, rate] = accuracies
    title = (
        f"exact accuracy, {args.validation} validation problems, {args.limit} pairs, constant lr, "
        "seed 0"
    )
    print_table(title, ["loss", "lr", *[f"epoch {k + 1}" for k in range(EPOCHS)]], table)
    panels = {
        loss: {
            f"lr {rate:.1e}, {anchor}": curves[f"{loss}, {anchor}", rate]
            for anchor in ANCHORS
            for rate in sorted(rates)
        }
        for loss in LOSSES
    }
    stability_plot(output / "stability.png", base.value, panels, title)
    result = output / "stability.json"
    write_result(result, metrics, vars(args), [0])
    print(f"wrote {result} and {output / 'stability.png'}")


if __name__ == "__main__":
    run(main)
