"""The pictures of the evaluation scripts: the only place that knows matplotlib."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from common.files import replacing
from evaluation.metrics import Metric

BASE, TUNED, WARNING = "#8a8f98", "#1f77b4", "#d1495b"


def comparison_plot(
    path: str | Path, metrics: dict[str, Metric], shown: dict[str, str], title: str
) -> None:
    """Bars of base and tuned side by side with 95 % intervals, for metrics from 0 to 1. `shown`: metric -> label under its bars."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for offset, side, color in ((-0.2, "base", BASE), (0.2, "tuned", TUNED)):
        places = [k + offset for k in range(len(shown))]
        values = [metrics[f"{side}_{name}"] for name in shown]
        axes.bar(
            places,
            [metric.value for metric in values],
            0.36,
            color=color,
            label=side,
            yerr=_whiskers(values),
            capsize=5,
        )
        for place, metric in zip(places, values, strict=True):
            top = metric.ci95[1] if metric.ci95 else metric.value
            axes.annotate(
                f"{metric.value:.3f}",
                (place, top),
                (0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
            )
    axes.set_xticks(range(len(shown)), shown.values())
    axes.set_ylim(0, 1.12)  # room for the numbers above a bar of 1
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.set_ylabel("share, 0 to 1 (95 % intervals)")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    _save(figure, path)


def judge_plot(path: str | Path, title: str, card: dict, policies: Sequence[dict]) -> None:
    """The report card of a judge, as evaluation/eval_judge.py makes it: reliability, distribution of the scores, score by position
    and, where there are, best of n and the ranked policies."""
    panels = [_reliability, _distribution, _by_position]
    panels += [_best_of_n] if "best_of_n" in card["selection"].get("chance", {}) else []
    panels += [_values] if card.get("values") else []
    panels += [_policies] if policies else []
    down = -(-len(panels) // 2)
    figure, grid = plt.subplots(down, 2, figsize=(10.4, 3.8 * down), layout="constrained")
    for axes, panel in zip(grid.flat, panels, strict=False):
        panel(axes, policies if panel is _policies else card)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def _reliability(axes: plt.Axes, card: dict) -> None:
    _diagram(axes, card["reliability"], "share of right steps")
    error = card["metrics"]["calibration_error"]
    axes.set_title(f"reliability (calibration error {error}; numbers: steps)", fontsize=9)


def _values(axes: plt.Axes, card: dict) -> None:
    _diagram(axes, card["values"], "share of right rollouts")
    error = card["metrics"]["value_calibration_error"]
    axes.set_title(f"values (calibration error {error}; numbers: beginnings)", fontsize=9)


def _diagram(axes: plt.Axes, rows: Sequence[dict], share: str) -> None:
    rights = [row["right"] for row in rows]
    axes.plot([0, 1], [0, 1], "--", color=BASE, linewidth=1)
    values = [right.value for right in rights]
    axes.errorbar(
        [row["score"] for row in rows], values, _whiskers(rights), fmt="o-", color=TUNED, capsize=3
    )
    for row, right in zip(rows, rights, strict=True):
        axes.annotate(
            f"{right.n:,}",
            (row["score"], right.value),
            (5, 4),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set(
        xlim=(-0.02, 1.08),
        ylim=(-0.02, 1.02),
        xlabel="mean score of the steps in a bin",
        ylabel=share,
    )


def _distribution(axes: plt.Axes, card: dict) -> None:
    for name, of_side, color in (("right", 1, TUNED), ("wrong", 0, WARNING)):
        scores = [score for label, score, _ in card["steps"] if label == of_side]
        axes.hist(
            scores,
            bins=20,
            range=(0, 1),
            color=color,
            alpha=0.6,
            label=f"{name} steps ({len(scores):,})",
        )
    auroc = card["metrics"].get("step_auroc")
    axes.set(xlabel="score", ylabel="steps")
    axes.set_title("scores" + (f" (AUROC {auroc})" if auroc else ""), fontsize=9)
    axes.legend(frameon=False, fontsize=8)


def _by_position(axes: plt.Axes, card: dict) -> None:
    for name, side, color in (("right", 1, TUNED), ("wrong", 2, WARNING)):
        there = [(k, row[side]) for k, row in enumerate(card["by_position"]) if row[side]]
        means = [metric for _, metric in there]
        places = [k for k, _ in there]
        axes.errorbar(
            places,
            [metric.value for metric in means],
            _whiskers(means),
            fmt="o-",
            color=color,
            capsize=3,
            label=name,
        )
    axes.set_xticks(range(len(card["by_position"])), [row[0] for row in card["by_position"]])
    axes.set(ylim=(-0.02, 1.02), xlabel="position of the step", ylabel="mean score")
    axes.set_title("score by position", fontsize=9)
    axes.legend(frameon=False, fontsize=8)


def _best_of_n(axes: plt.Axes, card: dict) -> None:
    metrics = {name: row["best_of_n"] for name, row in card["selection"].items()}
    others = ("chance", "log-prob", "majority", "oracle")
    colors = [BASE if name in others else TUNED for name in metrics]
    values = [metric.value for metric in metrics.values()]
    axes.tick_params(axis="x", labelsize=8)
    axes.bar(
        list(metrics), values, 0.7, color=colors, yerr=_whiskers(list(metrics.values())), capsize=4
    )
    for k, metric in enumerate(metrics.values()):
        top = metric.ci95[1] if metric.ci95 else metric.value
        axes.annotate(
            f"{metric.value:.3f}",
            (k, top),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.set(ylim=(0, 1.08), ylabel="exact accuracy of the picked sample")
    axes.set_title(f"best of {card['samples']:.3g} ({metrics['chance'].n:,} problems)", fontsize=9)


def _policies(axes: plt.Axes, policies: Sequence[dict]) -> None:
    rewards, accuracies = ([row[name] for row in policies] for name in ("reward", "accuracy"))
    places = [[metric.value for metric in metrics] for metrics in (rewards, accuracies)]
    axes.errorbar(
        *places, _whiskers(accuracies), _whiskers(rewards), fmt="o", color=TUNED, capsize=3
    )
    for row, x, y in zip(policies, *places, strict=True):
        axes.annotate(
            Path(row["policy"]).name, (x, y), (5, 4), textcoords="offset points", fontsize=7
        )
    axes.margins(0.15)  # room for the names
    axes.set(xlabel="mean reward by the judge", ylabel="exact accuracy")
    axes.set_title("policies, greedy answers", fontsize=9)


def response_plot(path: str | Path, title: str, card: dict) -> None:
    """What evaluation/eval_response_reward.py says of a reward model: score by rank and over length, the calibration of score
    differences, accuracy by kind of pair and, where there is, best of n.

    card: `answers`, (rank, length, score, category) of each; `reliability` as the function of that name gives it; `accuracies` and
    `best_of_n`, name -> Metric; `metrics`."""
    panels = [_score_by_rank, _score_over_length, _difference_reliability, _pair_accuracies]
    panels += [_best_response] if card["best_of_n"] else []
    figure, grid = plt.subplots(
        -(-len(panels) // 2), 2, figsize=(10.4, 3.8 * -(-len(panels) // 2)), layout="constrained"
    )
    for axes, panel in zip(grid.flat, panels, strict=False):
        panel(axes, card)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def _score_by_rank(axes: plt.Axes, card: dict) -> None:
    ranks = sorted({rank for rank, *_ in card["answers"]})
    scores = [
        [score for rank, _, score, _ in card["answers"] if rank == of_rank] for of_rank in ranks
    ]
    axes.boxplot(
        scores,
        positions=range(len(ranks)),
        widths=0.6,
        showfliers=False,
        medianprops={"color": TUNED},
    )
    axes.set_xticks(
        range(len(ranks)),
        [f"{rank}\n({len(of_rank):,})" for rank, of_rank in zip(ranks, scores, strict=True)],
    )
    axes.set(xlabel="rank, 1 is best (answers)", ylabel="score")
    correlation = card["metrics"].get("spearman")
    axes.set_title(
        "score by rank" + (f" (Spearman within groups {correlation})" if correlation else ""),
        fontsize=9,
    )


def _score_over_length(axes: plt.Axes, card: dict) -> None:
    for k, name in enumerate(dict.fromkeys(category for *_, category in card["answers"])):
        points = [
            (length, score) for _, length, score, category in card["answers"] if category == name
        ]
        axes.scatter(
            *zip(*points, strict=True), s=5, alpha=0.5, color=f"C{k % 10}", label=name or "answers"
        )
    axes.set(xlabel="length, characters", ylabel="score")
    correlation = card["metrics"].get("length_spearman")
    axes.set_title(
        "score over length" + (f" (Spearman within groups {correlation})" if correlation else ""),
        fontsize=9,
    )
    axes.legend(frameon=False, fontsize=7, markerscale=2)


def _difference_reliability(axes: plt.Axes, card: dict) -> None:
    _diagram(axes, card["reliability"], "share in which the first is better")
    axes.set_xlabel("mean sigmoid(r - r') of the pairs in a bin")
    axes.set_title(
        f"calibration (error {card['metrics']['calibration_error']}; numbers: pairs)", fontsize=9
    )


def _pair_accuracies(axes: plt.Axes, card: dict) -> None:
    names, metrics = [*card["accuracies"]], [*card["accuracies"].values()]
    places = range(len(names))[::-1]
    values = [metric.value for metric in metrics]
    axes.barh(
        places,
        values,
        0.7,
        xerr=_whiskers(metrics),
        color=[TUNED] + [BASE] * (len(names) - 1),
        capsize=2,
    )
    axes.set_yticks(places, names, fontsize=7)
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, 1.02), xlabel="pairs told apart")
    axes.set_title("pairwise accuracy", fontsize=9)


def _best_response(axes: plt.Axes, card: dict) -> None:
    metrics = card["best_of_n"]
    values = [metric.value for metric in metrics.values()]
    colors = [TUNED if name.startswith("scorer") else BASE for name in metrics]
    axes.bar([*metrics], values, 0.7, color=colors, yerr=_whiskers([*metrics.values()]), capsize=4)
    axes.tick_params(axis="x", labelsize=8)
    axes.set(ylim=(0, 1.05), ylabel="exact accuracy of the picked answer")
    axes.set_title(f"best of n ({metrics['scorer'].n:,} problems)", fontsize=9)


# What a picture of training shows: panel -> its keys in the trainer's log, each with the label of its line.
PANELS = {
    "loss": {"loss": "loss"},
    "margin between chosen and rejected": {"rewards/margins": "margin"},
    "pairs told apart (share)": {"rewards/accuracies": "pairs"},
    "mean value of steps": {"values/good": "labelled .5 and more", "values/bad": "the others"},
    "judge's score of sampled steps (share)": {"objective/scores": "score"},
    "exact accuracy, greedy (share)": {"exact_accuracy": "validation problems"},
    "KL to the reference (nats a step)": {"objective/kl": "KL"},
    "entropy (nats a token)": {"objective/entropy": "entropy"},
    "length of a step (tokens)": {"steps/tokens": "length"},
    "share of tokens that are clipped": {
        "policy/clipfrac_avg": "policy",
        "val/clipfrac_avg": "value function",
    },
    "share of steps that score 0 by rule": {"steps/scored_0": "empty, cut, repeated or unanswered"},
    "log-prob against the reference (nats)": {
        "logps/chosen_vs_ref": "chosen",
        "logps/rejected_vs_ref": "rejected",
    },
}
LESS_LIKELY = "drift/good_steps_less_likely"


def training_plot(history: Sequence[dict], path: str | Path, title: str) -> bool:
    """The course of a training run, from `trainer.state.log_history`: loss, margins, accuracy and drift over optimizer steps, rows
    with `eval_` dashed. What the history lacks is left out; returns False, and writes nothing, if there is nothing to draw."""

    def rows(key: str) -> tuple[list, list]:
        found = [(row["step"], row[key]) for row in history if key in row and "step" in row]
        return [step for step, _ in found], [value for _, value in found]

    def draw(axes: plt.Axes, key: str, label: str, color: str) -> list:
        lines = []
        for prefix, side, style in (("", "", "-"), ("eval_", ", held out", "--")):
            steps, values = rows(prefix + key)
            if steps:  # a line through one point would not be seen: short ones get dots
                marker = "o" if len(steps) < 40 else None
                lines += axes.plot(
                    steps,
                    values,
                    style,
                    color=color,
                    label=label + side,
                    marker=marker,
                    markersize=3,
                )
        return lines

    logged = {key for row in history for name in row for key in (name, name.removeprefix("eval_"))}
    *_, drift = PANELS
    shown = [
        name
        for name, keys in PANELS.items()
        if logged & {*keys, *([LESS_LIKELY] if name == drift else [])}
    ]
    if not shown:
        return False
    across = min(2, len(shown))
    down = -(-len(shown) // across)
    figure, grid = plt.subplots(
        down, across, figsize=(5.2 * across, 3.4 * down), layout="constrained", squeeze=False
    )
    for axes, name in zip(grid.flat, shown, strict=False):
        lines = []
        for (key, label), color in zip(PANELS[name].items(), (TUNED, BASE), strict=False):
            lines += draw(axes, key, label, color)
        if name == drift and lines:
            axes.axhline(0, color="black", linewidth=0.8)
        if name == drift and LESS_LIKELY in logged:
            share = axes.twinx()
            lines += draw(share, LESS_LIKELY, "good steps less likely (right axis)", WARNING)
            share.set_ylim(0, 1)
            share.tick_params(axis="y", colors=WARNING)
            share.spines[["top"]].set_visible(False)
        if "(share)" in name:
            axes.set_ylim(0, 1.02)
        axes.legend(handles=lines, frameon=False, fontsize=8)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("update" if "objective/scores" in logged else "optimizer step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(shown) :]:
        axes.remove()
    figure.suptitle(title, fontsize=11)
    _save(figure, path)
    return True


def credit_plot(
    path: str | Path, metrics: dict[str, Metric], models: Sequence[str], kinds: dict[str, str]
) -> None:
    """Left: change of log-prob of each kind of step, a bar a model (`models` but the first, which is the base). Right: share of
    right next steps at traps and elsewhere. `kinds`: name in the metrics -> label."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.4), layout="constrained", width_ratios=[len(kinds), 3]
    )
    colors = dict(zip(models, [BASE, *plt.get_cmap("tab10").colors], strict=False))
    for axes, group, names, labels in (
        (left, "logp_change", models[1:], kinds),
        (right, "next_step_accuracy", models, {"trap": "at traps", "elsewhere": "elsewhere"}),
    ):
        width = 0.8 / len(names)
        for m, name in enumerate(names):
            found = [
                (k, metrics[f"{name}/{group}/{kind}"])
                for k, kind in enumerate(labels)
                if f"{name}/{group}/{kind}" in metrics
            ]
            values = [metric for _, metric in found]
            places = [k + (m - (len(names) - 1) / 2) * width for k, _ in found]
            label = name if axes is right else None
            axes.bar(
                places,
                [v.value for v in values],
                width,
                yerr=_whiskers(values),
                color=colors[name],
                label=label,
                capsize=2,
            )
        axes.set_xticks(range(len(labels)), labels.values(), fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    left.axhline(0, color="black", linewidth=0.8)
    left.set(ylabel="nats a step (95 % intervals)")
    left.set_title("log-prob of steps, tuned minus base, pairs kept out of training", fontsize=10)
    right.set(ylim=(0, 1.02), ylabel="share right")
    right.set_title("greedy next step after a right beginning", fontsize=10)
    figure.legend(frameon=False, loc="outside lower center", ncols=len(models))
    _save(figure, path)


def stability_plot(
    path: str | Path, base: float, panels: dict[str, dict[str, Sequence[float]]], title: str
) -> None:
    """Accuracy after each epoch, a panel for every learning rate. panels: title -> "LOSS, anchor" or "LOSS, no anchor" -> the
    accuracies (0 to 1) after epochs 1, 2, ...; a loss has one colour, dashed without its anchor. base: the accuracy before."""
    figure, grid = plt.subplots(
        1,
        len(panels),
        figsize=(4.0 * len(panels), 4.2),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    losses = list(
        dict.fromkeys(name.split(", ")[0] for of_panel in panels.values() for name in of_panel)
    )
    for axes, (name, of_panel) in zip(grid.flat, panels.items(), strict=True):
        for run, values in of_panel.items():
            loss, anchor = run.split(", ")
            style = "-" if anchor == "anchor" else "--"
            places = range(len(values) + 1)
            axes.plot(
                places,
                [base, *values],
                style,
                color=f"C{losses.index(loss)}",
                marker="o",
                markersize=3,
                label=run,
            )
        axes.axhline(base, color=BASE, linewidth=0.8)
        axes.set(ylim=(0, 1), xlabel="epochs", title=name)
        axes.set_xticks(range(1 + max(map(len, of_panel.values()))))
        axes.spines[["top", "right"]].set_visible(False)
    grid.flat[0].set_ylabel("exact accuracy")
    figure.legend(
        *grid.flat[0].get_legend_handles_labels(),
        frameon=False,
        fontsize=8,
        loc="outside lower center",
        ncols=4,
    )
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def frontier_plot(
    path: str | Path,
    panels: dict[str, dict[str, Sequence[tuple[Metric, Metric]]]],
    controls: Sequence[str],
    title: str,
) -> None:
    """Accuracy over sampled tokens a problem, a panel a split. panels: split -> line -> its (tokens, accuracy). A line of a single
    point is drawn across, as a level to compare with; those of controls are dashed."""
    figure, grid = plt.subplots(
        1, len(panels), figsize=(6.8 * len(panels), 4.8), layout="constrained", squeeze=False
    )
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colors = dict(
        zip(
            names,
            plt.get_cmap("tab20").colors[::2] + plt.get_cmap("tab20").colors[1::2],
            strict=False,
        )
    )
    for axes, (split, lines) in zip(grid.flat, panels.items(), strict=True):
        for name, points in lines.items():
            tokens, values = zip(*points, strict=True)
            color, style = colors[name], "--" if name in controls else "-"
            where = [metric.value for metric in tokens]
            accuracies = [metric.value for metric in values]
            axes.errorbar(
                where,
                accuracies,
                _whiskers(values),
                fmt="o" + style,
                color=color,
                capsize=2,
                markersize=4,
                label=name,
            )
            if len(points) == 1:
                axes.axhline(accuracies[0], color=color, linewidth=0.8, linestyle=":")
        axes.set(
            xscale="log",
            ylim=(0, 1),
            xlabel="sampled tokens a problem",
            ylabel="exact accuracy (95 % intervals)",
        )
        axes.set_title(split, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    handles = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        frameon=False,
        fontsize=8,
        loc="outside lower center",
        ncols=4 * len(panels),
    )
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def _whiskers(metrics: Sequence[Metric]) -> list[list[float]]:
    """Distances from the values down to and up to their intervals' ends."""
    ends = [metric.ci95 or [metric.value, metric.value] for metric in metrics]
    return [
        [abs(end[side] - metric.value) for end, metric in zip(ends, metrics, strict=True)]
        for side in (0, 1)
    ]


def _save(figure: Figure, path: str | Path) -> None:
    """Write a PNG, whole or not at all."""
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
    finally:
        plt.close(figure)
