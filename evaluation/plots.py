"""The pictures of the evaluation scripts: the only place that knows matplotlib."""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from evaluation.metrics import Metric

BASE, TUNED = "#8a8f98", "#1f77b4"


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
