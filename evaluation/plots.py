"""The pictures of the evaluation scripts: the only place that knows matplotlib."""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from evaluation.metrics import Metric

BASE, TUNED, WARNING = "#8a8f98", "#1f77b4", "#d1495b"


def comparison_plot(path: str | Path, metrics: dict[str, Metric], shown: dict[str, str], title: str) -> None:
    """Bars of base and tuned side by side with 95 % intervals, for metrics from 0 to 1. `shown`: metric -> label under its bars."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for offset, side, color in ((-0.2, "base", BASE), (0.2, "tuned", TUNED)):
        places = [k + offset for k in range(len(shown))]
        values = [metrics[f"{side}_{name}"] for name in shown]
        axes.bar(places, [metric.value for metric in values], 0.36, color=color, label=side, yerr=_whiskers(values), capsize=5)
        for place, metric in zip(places, values, strict=True):
            top = metric.ci95[1] if metric.ci95 else metric.value
            axes.annotate(f"{metric.value:.3f}", (place, top), (0, 3), textcoords="offset points", ha="center", va="bottom")
    axes.set_xticks(range(len(shown)), shown.values())
    axes.set_ylim(0, 1.12)  # room for the numbers above a bar of 1
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.set_ylabel("share, 0 to 1 (95 % intervals)")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    _save(figure, Path(path))


# What a picture of training shows: panel -> its keys in the trainer's log, each with the label of its line.
PANELS = {
    "loss": {"loss": "loss"},
    "margin between chosen and rejected": {"rewards/margins": "margin"},
    "pairs told apart (share)": {"rewards/accuracies": "pairs"},
    "log-prob against the reference (nats)": {"logps/chosen_vs_ref": "chosen", "logps/rejected_vs_ref": "rejected"},
}
LESS_LIKELY = "drift/good_steps_less_likely"


def training_picture(history: Sequence[dict], path: str | Path, title: str) -> bool:
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
                lines += axes.plot(steps, values, style, color=color, label=label + side, marker=marker, markersize=3)
        return lines

    logged = {key for row in history for name in row for key in (name, name.removeprefix("eval_"))}
    *_, drift = PANELS
    shown = [name for name, keys in PANELS.items() if logged & {*keys, *([LESS_LIKELY] if name == drift else [])}]
    if not shown:
        return False
    across = min(2, len(shown))
    down = -(-len(shown) // across)
    figure, grid = plt.subplots(down, across, figsize=(5.2 * across, 3.4 * down), layout="constrained", squeeze=False)
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
        axes.set_xlabel("optimizer step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(shown) :]:
        axes.remove()
    figure.suptitle(title, fontsize=11)
    _save(figure, Path(path))
    return True


def _whiskers(metrics: Sequence[Metric]) -> list[list[float]]:
    """Distances from the values down to and up to their intervals' ends."""
    ends = [metric.ci95 or [metric.value, metric.value] for metric in metrics]
    return [[abs(end[side] - metric.value) for end, metric in zip(ends, metrics, strict=True)] for side in (0, 1)]


def _save(figure: plt.Figure, path: Path) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=150)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        plt.close(figure)
