"""Write docs/results.md from docs/results/*.json: python docs/make_results.py

With --check nothing is written; the exit code is 1 if the page does not match the result files.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "results.md"
Result = dict[str, Any]

INTRODUCTION = """# Results

<!-- Written by `python docs/make_results.py` from docs/results/*.json. Do not edit it by hand. -->

Every result file that the project cites, with its command, seeds and commit.
A figure is followed by its 95 % interval; n is what it was measured on.
A commit that ends in `-dirty` had uncommitted changes in its working tree.
[LOG.md](LOG.md) says how each figure came about, [GLOSSARY.md](GLOSSARY.md) what the words mean.
"""

# what the first table shows: (words, file, metric)
HEADLINES = [
    ("Accuracy of the base policy, test problems", "reward_score_comparison", "base_accuracy"),
    ("... after stepwise DPO", "reward_score_comparison", "tuned_accuracy"),
    (
        "Stepwise DPO from pairs whose samples are all wrong, hard problems, three seeds",
        "compare",
        "d/stepwise/hard/accuracy",
    ),
    ("... SFT on the chosen side of the same pairs", "compare", "d/SFT on chosen/hard/accuracy"),
    ("Step PPO, hard problems, three seeds", "ppo", "hard/step PPO/accuracy"),
    (
        "Weighted vote of 64 samples by prm-mini, hard problems",
        "search",
        "hard/policy-mini/weighted_vote/64/accuracy",
    ),
    ("Step AUROC of prm-mini, no step labels", "judge_prm-mini", "step_auroc"),
    ("Step AUROC of judge-mini, exact step labels", "judge_judge-mini.Q8_0", "step_auroc"),
    ("Pairwise accuracy of reward-mini", "response_reward", "pairwise_accuracy"),
]


MEASURES = ("test", "hard", "test, sampled", "hard, sampled")  # of benchmarks/compare.py


def figure(metric: dict | None, interval: bool = True) -> str:
    """A metric as `0.952 [0.942, 0.961]`; an empty text if there is none."""
    if metric is None:
        return ""
    value, ends = metric["value"], metric.get("ci95")
    digits = 0 if abs(value) >= 100 else 3
    text = f"{value:,.{digits}f}"
    if interval and ends:
        text += f" [{ends[0]:,.{digits}f}, {ends[1]:,.{digits}f}]"
    return text


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def all_metrics(result: Result) -> str:
    """One row a metric: value and n."""
    rows = [[name, figure(m), f"{m['n']:,}"] for name, m in result["metrics"].items()]
    return table(["metric", "value", "n"], rows)


def comparison(result: Result) -> str:
    """One row a measure: base, tuned, difference and n."""
    metrics = result["metrics"]
    names = [name.removeprefix("base_") for name in metrics if name.startswith("base_")]
    rows = []
    for name in names:
        both = metrics[f"base_{name}"], metrics[f"tuned_{name}"], metrics[f"{name}_improvement"]
        rows.append([name, *map(figure, both), f"{both[0]['n']:,}"])
    return table(["metric", "base", "tuned", "difference", "n"], rows)


def compare(result: Result) -> str:
    """For each regime accuracies and contrasts, then the planted judges and the tuning."""
    metrics, contrasts = result["metrics"], result["contrasts"]
    parts = []
    for regime in dict.fromkeys(contrast["regime"] for contrast in contrasts):
        rows = compared_methods(metrics, f"{regime}/")
        header = ["method", *MEASURES, "chosen log-prob minus reference"]
        parts += [f"Regime ({regime}), accuracy:", table(header, rows)]
        rows = [
            [
                *(c["rival"], c["measure"], figure(c | {"value": c["difference"]})),
                *(f"{c['p_holm']:.2g}", c["verdict"]),
            ]
            for c in contrasts
            if c["regime"] == regime
        ]
        header = ["rival", "measure", "difference", "Holm's p", "verdict"]
        parts += [f"Regime ({regime}), {contrasts[0]['method']} minus:", table(header, rows)]
    planted = {name: metric for name, metric in metrics.items() if name.startswith("planted/")}
    if planted:
        rows = [[*name.split("/", 2)[1:], figure(metric)] for name, metric in planted.items()]
        parts += ["Planted judges in (c):", table(["AUROC", "metric", "value"], rows)]
    tuning: dict[str, dict[str, str]] = {}
    for name, metric in metrics.items():
        if name.startswith("tuning/"):
            _, regime, method, cell, _ = name.split("/")
            tuning.setdefault(f"({regime}) {method}", {})[cell] = figure(metric, interval=False)
    cells = list(next(iter(tuning.values())))
    rows = [[method, *(own[cell] for cell in cells)] for method, own in tuning.items()]
    return "\n\n".join([*parts, "Accuracy on validation problems:", table(["", *cells], rows)])


def compared_methods(metrics: dict, start: str) -> list[list[str]]:
    """One row a method of a regime."""
    end = f"/{MEASURES[0]}/accuracy"
    names = [n.removesuffix(end) for n in metrics if n.startswith(start) and n.endswith(end)]
    return [
        [
            name.removeprefix(start),
            *(figure(metrics[f"{name}/{measure}/accuracy"]) for measure in MEASURES),
            figure(metrics.get(f"{name}/logps_chosen_vs_ref")),
        ]
        for name in names
    ]


def ppo(result: Result) -> str:
    """One row a training, one column a split and way to answer."""
    metrics = result["metrics"]
    splits = list(dict.fromkeys(name.split("/")[0] for name in metrics))
    names = [name.split("/")[1] for name in metrics if name.startswith(f"{splits[0]}/")]
    names = [name for name in dict.fromkeys(names) if name != "base_accuracy"]
    rows = [["base", *(figure(metrics[f"{split}/base_accuracy"]) for split in splits)]]
    for name in names:
        row = [figure(metrics.get(f"{split}/{name}/accuracy")) for split in splits]
        differences = [metrics.get(f"{split}/{name}/accuracy_improvement") for split in splits]
        rows += [[name, *row], ["... minus base", *map(figure, differences)]]
    return table(["training", *splits], rows)


def credit(result: Result) -> str:
    """One row a model, one column a kind of step."""
    metrics = result["metrics"]
    models = list(dict.fromkeys(name.split("/")[0] for name in metrics))
    columns = list(dict.fromkeys(name.partition("/")[2] for name in metrics))
    columns.sort(key=lambda name: not name.startswith("next_step"))
    parts = []
    for kind in dict.fromkeys(name.split("/")[0] for name in columns):
        names = [name for name in columns if name.startswith(kind)]
        rows = [
            [model, *(figure(metrics.get(f"{model}/{name}")) for name in names)]
            for model in models
            if f"{model}/{names[0]}" in metrics
        ]
        parts.append(table([kind, *(name.partition("/")[2] for name in names)], rows))
    return "\n\n".join(parts)


def search(result: Result) -> str:
    """A table a split: one row a strategy and n."""
    metrics = result["metrics"]
    runs: dict[str, list[str]] = {}
    for name in metrics:
        if name.endswith("/accuracy"):
            runs.setdefault(name.split("/")[0], []).append(name.removesuffix("/accuracy"))
    last = ("accuracy", "accuracy_improvement", "accuracy_over_majority_vote")
    header = ["strategy", "n", "tokens a problem", "accuracy", "minus greedy"]
    header.append("minus majority vote at the same tokens")
    parts = []
    for split, names in runs.items():
        rows = []
        for name in names:
            _, policy, strategy, n = name.split("/")
            label = strategy if policy == "policy-mini" else f"{policy}, {strategy}"
            tokens = f"{metrics[f'{name}/tokens']['value']:,.0f}"
            figures = [figure(metrics.get(f"{name}/{column}")) for column in last]
            rows.append([label, n, tokens, *figures])
        size = metrics[f"{names[0]}/accuracy"]["n"]
        parts.append(f"{size:,} {split} problems:\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def stability(result: Result) -> str:
    """Validation accuracy over learning rates and epochs, then test accuracy at the chosen ones."""
    metrics, chosen = result["metrics"], result["chosen"]
    rates = ["3.3e-05", "1.0e-04", "3.0e-04"]
    rows = []
    for loss in chosen:
        cells = []
        for rate in rates:
            names = [f"validation/{loss}/lr {rate}/epoch {k}/accuracy" for k in (1, 2, 3)]
            cells.append(" / ".join(figure(metrics[name], interval=False) for name in names))
        rows.append([loss, *cells])
    grid = table(["loss", *(f"lr {rate}" for rate in rates)], rows)
    rows = [["base", "", figure(metrics["test/base/accuracy"])]]
    for loss, (rate, epochs) in chosen.items():
        rows.append([loss, f"{rate:.1e}, {epochs}", figure(metrics[f"test/{loss}/accuracy"])])
    test = table(["loss", "chosen: lr, epochs", "test accuracy"], rows)
    base = figure(metrics["validation/base/accuracy"])
    return (
        f"Accuracy on 500 validation problems after 1 / 2 / 3 epochs, seed 0 (base {base}):\n\n"
        f"{grid}\n\nAccuracy on 1,000 test problems, three seeds, at the best setting:\n\n{test}"
    )


def dpo_speed(result: Result) -> str:
    """One row a case, and the seconds of an update for numbers of pairs."""
    metrics = result["metrics"]
    cases = [name.split("/")[0] for name in metrics if name.endswith("/speedup")]
    names = [name.partition("/")[2] for name in metrics if name.startswith(f"{cases[0]}/")]
    rows = [
        [case, *(f"{metrics[f'{case}/{name}']['value']:.2f}" for name in names)] for case in cases
    ]
    tables = [table(["case", *(name.replace("_", " ") for name in names)], rows)]
    sizes = [name.split("/")[1] for name in metrics if name.startswith("packed/")]
    rows = [
        [size, *(f"{metrics[f'{way}/{size}/seconds']['value']:.2f}" for way in ("trl", "packed"))]
        for size in sizes
    ]
    if sizes:
        tables.append(table(["pairs in an update", "TRL: seconds", "packed: seconds"], rows))
    return "\n\n".join(tables)


def judge_backends(result: Result) -> str:
    """One row a file and engine, one column a figure."""
    metrics = result["metrics"]
    runs = list(dict.fromkeys(name.rpartition("/")[0] for name in metrics))
    columns = list(dict.fromkeys(name.rpartition("/")[2] for name in metrics))
    rows = [
        [*run.split("/"), *(figure(metrics.get(f"{run}/{column}")) for column in columns)]
        for run in runs
    ]
    return table(["file", "engine", *(column.replace("_", " ") for column in columns)], rows)


@dataclass(frozen=True)
class Section:
    """One result: how it is made, and how the page shows it.

    commands: they write docs/results/NAME.json if the folder of their output is docs/results; a
    `make` or `python` line each. minutes: about, on two idle cores, for `make reproduce`."""

    title: str
    commands: tuple[str, ...]
    minutes: int
    tables: Callable[[Result], str]


# name of the file in docs/results -> its section; in the order of the page
COMPARED = {  # the trainings of "Where the credit goes" -> their arguments
    "stepwise": "--loss_type stepwise --credit first_error --anchor_lambda 5 ",
    "stepwise_no_anchor": "--loss_type stepwise --credit first_error ",
    "dpo": "--loss_type sigmoid ",
    "step_dpo": "--loss_type step_dpo ",
    "full_step_dpo": "--loss_type full_step_dpo ",
    "sft": "--loss_type sft ",
}
SECTIONS: dict[str, Section] = {
    "reward_score_comparison": Section(
        "Base against tuned, 2,000 test problems",
        ("python train.py", "python evaluation/eval_reward_scores.py"),
        15,
        comparison,
    ),
    "demo/reward_score_comparison": Section("The same in the demo", ("make demo",), 4, comparison),
    "hard/reward_score_comparison": Section(
        "Base against tuned, 1,000 hard problems",
        (
            "python evaluation/eval_reward_scores.py --input data/problems_hard.jsonl"
            " --output_dir evaluation/results/hard",
        ),
        5,
        comparison,
    ),
    "compare": Section(
        "Stepwise DPO, its control and its rivals",
        (
            "python benchmarks/compare.py --regimes d c --seeds 3 --until test --methods stepwise"
            ' "SFT on chosen" DPO "stepwise, shuffled scores"',
        ),
        240,
        compare,
    ),
    "stability": Section(
        "Losses over learning rates and epochs", ("python benchmarks/stability.py",), 60, stability
    ),
    "credit": Section(
        "Where the credit goes",
        (
            *(
                f"python train.py --limit 512 {flags}--output_dir saved_model/credit/{name}"
                for name, flags in COMPARED.items()
            ),
            "python evaluation/eval_credit.py --models "
            + " ".join(f"saved_model/credit/{name}" for name in COMPARED),
        ),
        20,
        credit,
    ),
    "search": Section(
        "Guided search",
        (
            "python evaluation/eval_search.py --choose_limit 50 --limit 1000"
            " --other_model models/policy-large",
        ),
        90,
        search,
    ),
    "ppo": Section("Step PPO", ("python benchmarks/ppo_table.py",), 90, ppo),
    "judge_prm-mini": Section(
        "Report card of prm-mini",
        ("python evaluation/eval_judge.py --judge prm --rollouts 8",),
        5,
        all_metrics,
    ),
    "judge_judge-mini.Q8_0": Section(
        "Report card of judge-mini", ("python evaluation/eval_judge.py",), 5, all_metrics
    ),
    "response_reward": Section(
        "Report card of reward-mini",
        ("python evaluation/eval_response_reward.py --scorer models/reward-mini",),
        5,
        all_metrics,
    ),
    "answers": Section(
        "Which answers are the same", ("python benchmarks/answer_rates.py",), 2, all_metrics
    ),
    "dpo_speed_policy-mini": Section(
        "Speed of stepwise DPO, policy-mini",
        ("python benchmarks/dpo_speed.py --sizes 4 8 16 32 64",),
        8,
        dpo_speed,
    ),
    "dpo_speed_smollm2-135m-instruct": Section(
        "Speed of stepwise DPO, SmolLM2",
        (
            "make smollm2",
            "python benchmarks/dpo_speed.py --model_name_or_path models/smollm2-135m-instruct"
            " --per_device_train_batch_size 3 --pairs 3 --cases a d --rounds 3",
        ),
        20,
        dpo_speed,
    ),
    "rollouts_policy-mini": Section(
        "Speed of sampling", ("python benchmarks/rollouts.py",), 4, all_metrics
    ),
    "search_speed": Section(
        "Speed of beam search",
        ("python benchmarks/search.py --ways ours batched generate",),
        2,
        all_metrics,
    ),
    "threads_policy-mini": Section("Threads", ("python benchmarks/threads.py",), 4, all_metrics),
    "judge_backends": Section(
        "Speed of the judges of GGUF files",
        (
            "python benchmarks/judge_backends.py",
            "python benchmarks/judge_backends.py --files tinyllama.Q4_0 tinyllama.Q8_0"
            " --threads 2 --rounds 3",
        ),
        25,
        judge_backends,
    ),
}


def page() -> str:
    """The whole page. Raises SystemExit with one line if a result file has no section."""
    files = {
        path.relative_to(DOCS / "results").as_posix() for path in DOCS.glob("results/**/*.json")
    }
    results = {}
    for name in sorted(file.removesuffix(".json") for file in files):
        result = json.loads((DOCS / f"results/{name}.json").read_text(encoding="utf-8"))
        if "metrics" in result:
            results[name] = result
    if unknown := results.keys() - SECTIONS.keys():
        sys.exit(
            f"docs/results/{min(unknown)}.json: add a line to SECTIONS in docs/make_results.py"
        )
    rows = []
    for words, file, name in HEADLINES:
        metric = results[file]["metrics"][name]
        rows.append([words, figure(metric), f"{metric['n']:,}"])
    parts = [INTRODUCTION, table(["headline", "value", "n"], rows)]
    for name, section in SECTIONS.items():
        result = results[name]
        seeds = ", ".join(map(str, result["seeds"]))
        seeds = f"seed{'s' * (len(result['seeds']) > 1)} {seeds}" if seeds else "no seed"
        commit, _, dirty = result["commit"].partition("-")
        source = f"[results/{name}.json](results/{name}.json), {seeds}, commit"
        source += f" `{commit[:7]}{dirty and '-' + dirty}`."
        commands = "\n".join(f"    {command}" for command in section.commands)
        parts += [f"## {section.title}", commands, source, section.tables(result)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    text = page()
    if not check:
        PAGE.write_text(text, encoding="utf-8")
        print(f"wrote {PAGE}")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit(f"{PAGE} is stale: run python docs/make_results.py")


if __name__ == "__main__":
    main()
