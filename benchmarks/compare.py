"""Stepwise DPO, its controls and its rivals: the same rollouts, tuning and updates for each.

    python benchmarks/compare.py    # about 20 hours on 2 cores; the same command resumes it
    python benchmarks/compare.py --regimes c d --seeds 1      # a part of it

Five regimes (REGIMES in benchmarks/compare_rows.py) say what is known of the rollouts. In each, all
methods train policy-mini on the same rollouts of the same problems, with as many updates of as many
rows.

1. Tuning, in (a) and (c): every method with 3 learning rates and 3 numbers of epochs, one seed. The
   highest greedy accuracy on validation problems wins. (b) and (e) use the settings of (a), (d)
   those of (c), and the controls those of the default.
2. Test: every method with all seeds answers the test and the hard problems, greedily and 4 times at
   temperature 1.
3. Planted judges: in (c), stepwise DPO and DPO on pairs that judges of known AUROC picked and
   scored.

A contrast is a difference of two methods on the same problems. Its interval comes from a bootstrap
over problems and seeds; its p-value is that of a normal distribution with the bootstrap's standard
error, and p_holm is corrected over all contrasts (Holm 1979). `better` and `worse` need p_holm
below 0.05; `equivalent` means that the whole interval lies within 2 points.

Writes compare.json and compare.png to --output_dir, and the answers of every run to
compare.jsonl."""

import itertools
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import compare_rows
from benchmarks.compare_rows import REGIMES
from benchmarks.runs import BASE, as_flags, base_run, key_of, row_of_each
from common.cli import arg, check_least, parse_args, run
from common.files import at_root, read_rows
from evaluation.metrics import (
    Metric,
    crossed_mean_metric,
    holm,
    mean_metric,
    rate_metric,
    two_sided_p,
)
from evaluation.results import print_table, write_result

DATA = "data/compare"  # ignored by git
TREES = "data/mcts_trees.jsonl.gz"
# regime -> (split, first problem, number of problems) of its rollouts; judge-mini has not learned
# from these problems
ROLLOUTS = {
    **dict.fromkeys("ac", ("train", 14_000, 2000)),
    "d": ("hard_train", 0, 3000),
    "e": ("train", 16_000, 2000),
}
BATCH = 16
RATES, EPOCHS = (3e-5, 1e-4, 3e-4), (1, 2, 4)
DEFAULT = "stepwise"
# method -> (rows, command of train.py, settings)
METHODS: dict[str, tuple[str, str, dict]] = {
    # the defaults of train.py dpo, written out: they are part of a run's identity
    DEFAULT: (
        "judge",
        "dpo",
        {
            "loss_type": ["stepwise", "step_sft"],
            "loss_weights": [1, 4],
            "credit": "fork",
            "anchor_lambda": 0,
        },
    ),
    "SFT on chosen": ("judge", "dpo", {"loss_type": ["sft"]}),
    "SFT on all good samples": ("good", "sft", {}),
    "SFT before the first low score": ("cut", "dpo", {"loss_type": ["sft"]}),
    "DPO": ("judge", "dpo", {"loss_type": ["sigmoid"]}),
    "RPO": ("judge", "dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 1]}),
    "DPO-Positive": (
        "whole",
        "dpo",
        {"loss_type": ["stepwise"], "credit": "uniform", "anchor_lambda": 5},
    ),
    "Step-DPO": ("judge", "dpo", {"loss_type": ["step_dpo"], "anchor_lambda": 0}),
    "Full-Step-DPO": ("judge", "dpo", {"loss_type": ["full_step_dpo"], "anchor_lambda": 0}),
}
# the default with other scores on the same pairs: method -> rows
CONTROLS = {f"{DEFAULT}, {scores} scores": scores for scores in ("exact", "shuffled")}
TUNED_IN = {"a": "a", "b": "a", "c": "c", "d": "c", "e": "a"}
PLANTED = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
VALIDATION = {"validation": 500, "hard_validation": 250}
TEST, SAMPLES = {"test": 2000, "hard": 1000}, 4
MEASURES = ("test", "hard", "test, sampled", "hard, sampled")
STAGES = ("tuning", "test", "planted")
EQUIVALENT = 0.02


@dataclass
class CompareArguments:
    regimes: list[str] = arg([*"cdabe"], "regimes, in the order of work", choices=[*REGIMES])
    methods: list[str] = arg([*METHODS, *CONTROLS], "methods", choices=[*METHODS, *CONTROLS])
    limit: int = arg(512, "pairs to train on, at most")
    seeds: int = arg(5, "training seeds of every method")
    until: str = arg("planted", "the last stage to compute", choices=[*STAGES])
    workers: int = arg(2, "trainings at once")
    output_dir: str = arg(at_root("evaluation/results"), "folder of compare.json")

    def __post_init__(self) -> None:
        check_least(self, limit=1, seeds=1, workers=1)


class Comparison:
    """The runs of the comparison. Those that are finished are not computed again."""

    def __init__(self, args: CompareArguments):
        self.args, self.store = args, Path(args.output_dir, "compare.jsonl")
        self.rates: dict[tuple[str, str], dict[tuple[float, int], Metric]] = {}

    def rows(self, runs: Sequence[dict]) -> list[dict]:
        """The row of every run."""
        return row_of_each(runs, self.store, self.args.workers)

    # --- training rows ---

    def rollouts(self, regime: str) -> compare_rows.Rollouts:
        folder, policy = Path(at_root(DATA)), at_root(self.base(regime))
        split = ROLLOUTS[regime]
        path = compare_rows.sample(folder, policy, *split, only_failed=regime == "d")
        return compare_rows.read_rollouts(path)

    def make_rows(self, regime: str) -> None:
        """Write the training rows of a regime."""
        folder, limit = Path(at_root(DATA)), self.args.limit
        if regime == "b":
            pairs = folder / "step_pairs.jsonl"
            flags = {"from_trees": at_root(TREES), "per_state": 1, "output": pairs}
            _call("utils/build_step_pairs.py", *as_flags(flags | {"overwrite": "true"}))
            compare_rows.write_tree_rows(folder, Path(at_root(TREES)), pairs, limit)
        else:
            compare_rows.write_rows(folder, regime, self.rollouts(regime), limit)

    def has_rows(self, regime: str, method: str) -> bool:
        """Whether there is anything for a method to learn from, such as a good sample."""
        rows = CONTROLS.get(method) or METHODS[method][0]
        found = Path(at_root(f"{DATA}/{regime}_{rows}.jsonl")).stat().st_size > 0
        if not found:
            print(f"({regime}) {method} is left out: there are no rows for it")
        return found

    def base(self, regime: str) -> str:
        """The policy that is trained in a regime."""
        return self.round_1 if regime == "e" else BASE

    @cached_property
    def round_1(self) -> str:
        """The policy of the first round: that of the default in (a), trained if it is not there."""
        first = self.run("a", DEFAULT, *self.tuned("a", DEFAULT), seed=0)
        folder = f"{DATA}/round_1_{key_of(first)[:8]}"
        if not Path(at_root(folder), "config.json").exists():
            flags = first["settings"] | {"dataset_name": at_root(first["rows"]), "seed": 0}
            _call("train.py", "dpo", *as_flags(flags | {"output_dir": at_root(folder)}))
        return folder

    def run(
        self, regime: str, method: str, rate: float, epochs: int, seed: int, rows: str = ""
    ) -> dict:
        """A run (benchmarks/runs.py) with as many updates as `epochs` passes over the pairs."""
        own_rows, recipe, settings = METHODS[DEFAULT if method in CONTROLS else method]
        rows = rows or CONTROLS.get(method, own_rows)
        pairs = sum(1 for _ in read_rows(at_root(f"{DATA}/{regime}_judge.jsonl")))
        more = {"precompute_ref_log_probs": True} if recipe == "dpo" else {}
        more |= {"learning_rate": rate, "max_steps": epochs * -(-pairs // BATCH)}
        return {
            "name": f"{regime}: {method}",
            "recipe": recipe,
            "rows": f"{DATA}/{regime}_{rows}.jsonl",
            "model": self.base(regime),
            "settings": settings | more,
            "seed": seed,
            "each_epoch": False,
            "measure": TEST,
            "samples": SAMPLES,
        }

    # --- tuning ---

    def tune(self, regime: str, methods: Sequence[str]) -> None:
        methods = [method for method in methods if self.has_rows(regime, method)]
        cells = list(itertools.product(methods, RATES, EPOCHS))
        more = {"measure": VALIDATION, "samples": 0}
        found = self.rows([self.run(regime, *cell, seed=0) | more for cell in cells])
        for (method, rate, epochs), row in zip(cells, found, strict=True):
            right = [float(digit) for split in VALIDATION for digit in row["correct"][split]]
            self.rates.setdefault((regime, method), {})[rate, epochs] = rate_metric(right)

    def is_tuned(self, regime: str, method: str) -> bool:
        return (TUNED_IN[regime], DEFAULT if method in CONTROLS else method) in self.rates

    def tuned(self, regime: str, method: str) -> tuple[float, int]:
        """The learning rate and the number of epochs of a method."""
        rates = self.rates[TUNED_IN[regime], DEFAULT if method in CONTROLS else method]
        return max(rates, key=lambda cell: rates[cell].value)

    # --- test ---

    def test(self) -> dict[tuple[str, str], list[dict]]:
        """(regime, method) -> the rows of its seeds. `base` is the policy that is trained."""
        args = self.args
        cells = [
            (regime, method)
            for regime, method in itertools.product(args.regimes, args.methods)
            if self.is_tuned(regime, method) and self.has_rows(regime, method)
        ]
        runs = {
            (regime, method, seed): self.run(regime, method, *self.tuned(regime, method), seed=seed)
            for seed in range(args.seeds)
            for regime, method in cells
        }
        for regime in args.regimes:
            runs[regime, "base", 0] = base_run(TEST, SAMPLES, self.base(regime))
        found: dict[tuple[str, str], list[dict]] = {}
        for (regime, method, _), row in zip(runs, self.rows([*runs.values()]), strict=True):
            found.setdefault((regime, method), []).append(row)
        return found

    def planted(self) -> dict[float, dict[str, list[dict]]]:
        """AUROC -> method -> the rows of its seeds, for judges of this AUROC in (c)."""
        rollouts, runs = self.rollouts("c"), {}
        for auroc in PLANTED:
            compare_rows.write_planted_rows(Path(at_root(DATA)), auroc, rollouts, self.args.limit)
        for seed in range(self.args.seeds):
            for auroc in PLANTED:
                for method in (DEFAULT, "DPO"):
                    settings = (*self.tuned("c", method), seed, f"planted_{auroc:g}")
                    runs[auroc, method, seed] = self.run("c", method, *settings) | {"samples": 0}
        found: dict[float, dict[str, list[dict]]] = {auroc: {} for auroc in PLANTED}
        for (auroc, method, _), row in zip(runs, self.rows([*runs.values()]), strict=True):
            found[auroc].setdefault(method, []).append(row)
        return found


def _call(script: str, *flags: str) -> None:
    subprocess.run([sys.executable, at_root(script), *flags], check=True)


# --- figures ---


def shares(rows: Sequence[dict], measure: str) -> np.ndarray:
    """(runs, problems): the share of right answers of every run to every problem, 0 to 1."""
    right = [[int(digit) for digit in row["correct"][measure]] for row in rows]
    return np.array(right) / (SAMPLES if measure.endswith("sampled") else 1)


def contrasts_of(found: dict[tuple[str, str], list[dict]]) -> list[dict]:
    """The default minus every other method, in every regime and measure."""
    contrasts, p_values = [], []
    for (regime, rival), rows in found.items():
        if rival in (DEFAULT, "base") or (regime, DEFAULT) not in found:
            continue
        for measure in MEASURES:
            difference = shares(found[regime, DEFAULT], measure) - shares(rows, measure)
            metric = crossed_mean_metric(difference)
            named = {"regime": regime, "method": DEFAULT, "rival": rival, "measure": measure}
            contrasts.append(named | {"difference": metric.value, "ci95": metric.ci95})
            p_values.append(two_sided_p(metric))
    for contrast, p in zip(contrasts, holm(p_values), strict=True):
        contrast |= {"p_holm": p, "verdict": verdict(contrast["difference"], contrast["ci95"], p)}
    return contrasts


def verdict(difference: float, ci95: Sequence[float], p_holm: float) -> str:
    if ci95[0] > -EQUIVALENT and ci95[1] < EQUIVALENT:
        return "equivalent"
    if p_holm < 0.05:
        return "better" if difference > 0 else "worse"
    return "undecided"


def report(comparison: Comparison, found: dict, planted: dict) -> None:
    # matplotlib needs seconds
    from evaluation.plots import compare_plot

    args, output = comparison.args, Path(comparison.args.output_dir)
    metrics: dict[str, Metric] = {}
    for (regime, method), rates in comparison.rates.items():
        for (rate, epochs), metric in rates.items():
            metrics[f"tuning/{regime}/{method}/lr {rate:g}, epochs {epochs}/accuracy"] = metric
    for (regime, method), rows in found.items():
        name = f"{regime}/{method}"
        for measure in MEASURES:
            right, base = shares(rows, measure), shares(found[regime, "base"], measure)
            metrics[f"{name}/{measure}/accuracy"] = crossed_mean_metric(right)
            if method != "base":
                gain = crossed_mean_metric(right - base)
                metrics[f"{name}/{measure}/accuracy_improvement"] = gain
        drifts = [row["logged"].get("logps/chosen_vs_ref") for row in rows]
        if method != "base" and None not in drifts:
            metrics[f"{name}/logps_chosen_vs_ref"] = mean_metric(drifts)
    curve: dict[float, Metric] = {}
    for auroc, methods in planted.items():
        both = [np.hstack([shares(rows, split) for split in TEST]) for rows in methods.values()]
        for method, right in zip(methods, both, strict=True):
            metrics[f"planted/{auroc:g}/{method}/accuracy"] = crossed_mean_metric(right)
        curve[auroc] = crossed_mean_metric(both[0] - both[1])
        metrics[f"planted/{auroc:g}/{DEFAULT} minus DPO"] = curve[auroc]

    contrasts = contrasts_of(found)
    verdicts = {(c["regime"], c["rival"], c["measure"]): c["verdict"] for c in contrasts}
    for regime in args.regimes:
        table = []
        for (own, method), rows in found.items():
            if own != regime:
                continue
            settings = "" if method == "base" else "{:g}, {}".format(*comparison.tuned(own, method))
            cells = [
                f"{metrics[f'{own}/{method}/{measure}/accuracy']} "
                + verdicts.get((own, method, measure), "")
                for measure in MEASURES
            ]
            table.append((method, settings, len(rows), *cells))
        title = f"({regime}) {REGIMES[regime]}: accuracy, and the verdict on {DEFAULT} against it"
        print_table(title, ["method", "lr, epochs", "seeds", *MEASURES], table)
    if curve:
        title = f"{DEFAULT} minus DPO on judges of planted quality, test and hard problems, greedy"
        print_table(title, ["AUROC", "difference"], [*curve.items()])
    chosen = {
        f"{regime}/{method}": comparison.tuned(regime, method)
        for regime, method in comparison.rates
    }
    result = output / "compare.json"
    more = {"chosen": chosen, "contrasts": contrasts}
    write_result(result, metrics, vars(args), range(args.seeds), **more)
    panels = {
        f"({regime}) {REGIMES[regime]}": {
            method: [metrics[f"{regime}/{method}/{split}/accuracy"] for split in TEST]
            for own, method in found
            if own == regime
        }
        for regime in args.regimes
    }
    if found:
        compare_plot(output / "compare.png", panels, [*TEST], curve)
    print(f"wrote {result}")


def main() -> None:
    (args,) = parse_args(CompareArguments, description=__doc__)
    comparison = Comparison(args)
    has_planted = args.until == "planted" and "c" in args.regimes
    # the controls, the second round and the planted judges need the settings of these
    needed = {DEFAULT, *args.methods, *(["DPO"] if has_planted else [])}
    tuned_in = dict.fromkeys(TUNED_IN[regime] for regime in args.regimes)
    for regime in tuned_in:
        comparison.make_rows(regime)
        comparison.tune(regime, [method for method in METHODS if method in needed])
    found, planted = {}, {}
    if args.until != "tuning":
        for regime in args.regimes:
            if regime not in tuned_in:
                comparison.make_rows(regime)
        found = comparison.test()
    if has_planted:
        planted = comparison.planted()
    report(comparison, found, planted)


if __name__ == "__main__":
    run(main)
