"""The plots of the evaluation scripts; the only module that imports matplotlib.

Colours are told apart with any colour blindness, and are never alone: lines have markers and kinds
of dashes, bars have hatches. A panel has at most six series. Intervals of curves are bands.
"""

import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from common.outputs import replacing
from evaluation.judge_card import Card, JudgedStep, RankedPolicy
from evaluation.metrics import Bin, Metric

# Six series of a panel: colour (Okabe and Ito 2008, with black), marker, dashes, hatch of bars
LOOKS = [
    ("#0072b2", "o", "-", ""),
    ("#d55e00", "s", (0, (6, 2)), "///"),
    ("#000000", "^", (0, (2, 2)), "..."),
    ("#cc79a7", "D", (0, (6, 2, 2, 2)), "\\\\\\"),
    ("#56b4e9", "X", (0, (1, 1)), "xxx"),
    ("#e69f00", "P", (0, (4, 1, 1, 1)), "ooo"),
]
BAR_LOOKS = [look for look in LOOKS if look[0] != "#000000"]  # intervals are black
MOST = len(LOOKS)  # series in a panel
RIGHT, WRONG = LOOKS[0][0], LOOKS[1][0]  # steps, pairs and answers
BASE, TUNED = "#8a8f98", RIGHT

# What a training plot shows: panel -> key in the trainer's log -> label of its line.
PANELS = {
    "loss": {"loss": "loss"},
    "margin between chosen and rejected": {"rewards/margins": "margin"},
    "pairwise accuracy (share)": {"rewards/accuracies": "pairs"},
    "mean value of steps": {"values/good": "label 0.5 or more", "values/bad": "label below 0.5"},
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
    "log-prob minus reference log-prob (nats)": {
        "logps/chosen_vs_ref": "chosen",
        "logps/rejected_vs_ref": "rejected",
    },
}
*_, DRIFT = PANELS
LESS_LIKELY = "drift/good_steps_less_likely"  # on the right axis of the last panel


# --- parts that several plots share ---


def _panels(
    path: str | Path,
    title: str,
    panels: Sequence[Callable[[plt.Axes], None]],
    height: float = 3.8,
    width: float = 5.2,
    most: int = 2,
    below: Callable[[Figure], None] = lambda figure: None,
) -> None:
    """A figure with one panel for each function, `most` in a row."""
    across = min(most, len(panels))
    down = -(-len(panels) // across)
    size = (width * across, height * down)
    figure, grid = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        panel(axes)
        _no_frame(axes)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    below(figure)
    _title(figure, title)
    _save(figure, path)


def _text(text: str, most: int = 60) -> str:
    """A text from a user, such as the name of a folder, as matplotlib shows it unchanged.

    Dollars do not begin a formula, a leading underscore does not hide a label, bytes that are no
    text become question marks, and more than `most` characters lose their middle."""
    text = text.encode("utf-8", "replace").decode().replace("\0", " ")
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[len(text) - most // 2 + 5 :]}"
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _title(figure: Figure, title: str) -> None:
    """The title above all panels, on as many lines as it needs."""
    across = int(13 * figure.get_figwidth())  # characters, at this size
    lines = textwrap.wrap(title, across, max_lines=4, placeholder=" ...")
    figure.suptitle(_text("\n".join(lines), 5 * across), fontsize=10)


def _no_frame(axes: plt.Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _values(metrics: Sequence[Metric]) -> list[float]:
    return [metric.value for metric in metrics]


def _whiskers(metrics: Sequence[Metric]) -> list[list[float]]:
    """Distances from the values down to and up to the ends of their intervals."""
    ends = [metric.ci95 or [metric.value, metric.value] for metric in metrics]
    return [
        [abs(end[side] - metric.value) for end, metric in zip(ends, metrics, strict=True)]
        for side in (0, 1)
    ]


def _curve(
    axes: plt.Axes,
    places: Sequence[float],
    values: Sequence[Metric],
    look: int,
    label: str | None = None,
) -> plt.Line2D:
    """A line through the values, with their intervals as a band; a single value has a whisker."""
    color, marker, dashes, _ = LOOKS[look]
    style = {"color": color, "marker": marker, "linestyle": dashes, "markersize": 4}
    (line,) = axes.plot(places, _values(values), label=label, linewidth=1.6, **style)
    ends = [metric.ci95 or [metric.value, metric.value] for metric in values]
    if len(values) == 1:
        axes.vlines(places, *zip(*ends, strict=True), color=color, linewidth=1.2)
    else:
        axes.fill_between(places, *zip(*ends, strict=True), color=color, alpha=0.16, linewidth=0)
    return line


def _name_ends(axes: plt.Axes, lines: Sequence[plt.Line2D]) -> None:
    """The names of lines beside their right ends, instead of a legend; they do not overlap."""
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    gap = 0.075 * (high - low)
    lines = sorted(lines, key=lambda line: line.get_ydata()[-1])
    places: list[float] = []
    for line in lines:
        places.append(max(line.get_ydata()[-1], places[-1] + gap if places else low))
    for k in range(1, len(places) + 1):
        places[-k] = min(places[-k], high - gap * (k - 1))
    beside = axes.get_yaxis_transform()
    for line, place in zip(lines, places, strict=True):
        end, up = line.get_xdata()[-1], line.get_ydata()[-1]
        look = {"color": line.get_color(), "linewidth": 0.8, "label": "_leader"}
        if len(line.get_xdata()) > 1:  # a single value is a level
            axes.plot([end, right], [up, up], **look)
        axes.plot([1, 1.04], [up, place], transform=beside, clip_on=False, **look)
        axes.text(1.05, place, line.get_label(), transform=beside, fontsize=8, va="center")
    axes.set(xlim=(left, right), ylim=(low, high))


def _in_groups(names: Sequence[str], most: int = MOST) -> list[Sequence[str]]:
    """The names in as few groups as possible, of about the same size, at most `most` in each."""
    size = -(-len(names) // -(-len(names) // most)) if names else 1
    return [names[start : start + size] for start in range(0, len(names), size)]


def _bars(axes: plt.Axes, metrics: dict[str, Metric], highlighted: Callable[[str], bool]) -> None:
    """One bar a metric, with its interval; the highlighted ones have another colour."""
    values = list(metrics.values())
    colors = [TUNED if highlighted(name) else BASE for name in metrics]
    axes.bar([*metrics], _values(values), 0.7, color=colors, yerr=_whiskers(values), capsize=4)
    axes.tick_params(axis="x", labelsize=8)


def _write_values(
    axes: plt.Axes, places: Sequence[float], metrics: Sequence[Metric], fontsize: int | None = None
) -> None:
    """The values above the intervals of bars."""
    for place, metric in zip(places, metrics, strict=True):
        top = metric.ci95[1] if metric.ci95 else metric.value
        at = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        axes.annotate(f"{metric.value:.3f}", (place, top), fontsize=fontsize, **at)


def _diagram(axes: plt.Axes, bins: Sequence[Bin], share: str) -> None:
    """A reliability diagram; the numbers beside the points are the sizes of the bins."""
    rights, scores = [row.right for row in bins], [row.score for row in bins]
    axes.plot([0, 1], [0, 1], "--", color=BASE, linewidth=1)
    _curve(axes, scores, rights, 0)
    for score, right in zip(scores, rights, strict=True):
        _name_point(axes, f"{right.n:,}", (score, right.value))
    axes.set(xlim=(-0.02, 1.08), ylim=(-0.02, 1.02))
    axes.set(xlabel="mean score of the steps in a bin", ylabel=share)


def _name_point(axes: plt.Axes, name: str, point: tuple[float, float]) -> None:
    axes.annotate(_text(name), point, (5, 4), textcoords="offset points", fontsize=7)


def _in_brackets(name: str, metric: Metric | None) -> str:
    return f" ({name} {metric})" if metric else ""


def _save(figure: Figure, path: str | Path) -> None:
    """Write a PNG, whole or not at all. A character that the font lacks becomes a box."""
    try:
        with replacing(path) as temporary, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.savefig(temporary, format="png", dpi=150)
    finally:
        plt.close(figure)


# --- base against tuned ---


def comparison_plot(
    path: str | Path, metrics: dict[str, Metric], shown: dict[str, str], title: str
) -> None:
    """Bars of base and tuned side by side with 95 % intervals, for metrics from 0 to 1.

    shown: metric -> label below its bars."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for offset, side, color, hatch in ((-0.2, "base", BASE, ""), (0.2, "tuned", TUNED, "///")):
        places = [k + offset for k in range(len(shown))]
        values = [metrics[f"{side}_{name}"] for name in shown]
        heights, ends = _values(values), _whiskers(values)
        look = {"color": color, "hatch": hatch, "edgecolor": "white", "label": side}
        axes.bar(places, heights, 0.36, yerr=ends, capsize=5, **look)
        _write_values(axes, places, values)
    axes.set_xticks(range(len(shown)), shown.values())
    axes.set_ylim(0, 1.12)  # space for the number above a bar of height 1
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.set_ylabel("share, 0 to 1 (95 % intervals)")
    axes.set_title(_text(title), fontsize=10)
    _no_frame(axes)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    _save(figure, path)


# --- the card of a judge ---


def judge_plot(path: str | Path, title: str, card: Card) -> None:
    """The card of a judge (evaluation/judge_card.py).

    Reliability, distribution of the scores, score by position and, where there are any, best of n,
    values and ranked policies."""
    metrics = card.metrics
    best_of_n = {n: row["best_of_n"] for n, row in card.selection.items() if "best_of_n" in row}
    panels = [
        partial(_reliability, bins=card.reliability, error=metrics["calibration_error"]),
        partial(_distribution, steps=card.steps, auroc=metrics.get("step_auroc")),
        partial(_by_position, rows=card.by_position),
    ]
    if best_of_n:
        panels.append(partial(_best_of_n, metrics=best_of_n, samples=card.samples))
    if card.values:
        error = metrics["value_calibration_error"]
        panels.append(partial(_value_reliability, bins=card.values, error=error))
    if card.policies:
        panels.append(partial(_policies, policies=card.policies))
    _panels(path, title, panels)


def _reliability(axes: plt.Axes, bins: Sequence[Bin], error: Metric) -> None:
    _diagram(axes, bins, "share of right steps")
    axes.set_title(f"reliability (calibration error {error}; numbers: steps)", fontsize=9)


def _value_reliability(axes: plt.Axes, bins: Sequence[Bin], error: Metric) -> None:
    _diagram(axes, bins, "share of right rollouts")
    axes.set_title(f"value calibration (error {error}; numbers: prefixes)", fontsize=9)


def _distribution(axes: plt.Axes, steps: Sequence[JudgedStep], auroc: Metric | None) -> None:
    for name, label, look in (("right", 1, 0), ("wrong", 0, 1)):
        scores = [step.score for step in steps if step.label == label]
        color, _, dashes, hatch = LOOKS[look]
        style = {"color": color, "linestyle": dashes, "linewidth": 1.4, "histtype": "step"}
        style |= {"hatch": hatch, "fill": look == 0, "alpha": 0.6 if look == 0 else 1}
        name = f"{name} steps ({len(scores):,})"
        axes.hist(scores, bins=20, range=(0, 1), label=name, **style)
    axes.set(xlabel="score", ylabel="steps")
    axes.set_title("scores" + _in_brackets("AUROC", auroc), fontsize=9)
    axes.legend(frameon=False, fontsize=8)


def _by_position(axes: plt.Axes, rows: Sequence[tuple[str, Metric | None, Metric | None]]) -> None:
    positions, rights, wrongs = zip(*rows, strict=True)
    lines = []
    for name, side, look in (("right", rights, 0), ("wrong", wrongs, 1)):
        places = [k for k, metric in enumerate(side) if metric]
        if means := [metric for metric in side if metric]:
            lines.append(_curve(axes, places, means, look, f"{name} steps"))
    axes.set_xticks(range(len(rows)), positions)
    axes.set(ylim=(-0.02, 1.02), xlabel="position of the step", ylabel="mean score")
    axes.set_title("score by position", fontsize=9)
    _name_ends(axes, lines)


def _best_of_n(axes: plt.Axes, metrics: dict[str, Metric], samples: float | None) -> None:
    others = ("chance", "log-prob", "majority", "oracle")
    _bars(axes, metrics, lambda name: name not in others)
    _write_values(axes, range(len(metrics)), list(metrics.values()), fontsize=8)
    axes.set(ylim=(0, 1.08), ylabel="exact accuracy of the picked sample")
    axes.set_title(f"best of {samples:.3g} ({metrics['chance'].n:,} problems)", fontsize=9)


def _policies(axes: plt.Axes, policies: Sequence[RankedPolicy]) -> None:
    rewards, accuracies = [p.reward for p in policies], [p.accuracy for p in policies]
    points = (_values(rewards), _values(accuracies))
    ends = (_whiskers(accuracies), _whiskers(rewards))
    axes.errorbar(*points, *ends, fmt="o", color=TUNED, capsize=3)
    for policy in policies:
        point = (policy.reward.value, policy.accuracy.value)
        _name_point(axes, Path(policy.policy).name, point)
    axes.margins(0.15)  # space for the names
    axes.set(xlabel="mean reward by the judge", ylabel="exact accuracy")
    axes.set_title("policies, greedy answers", fontsize=9)


# --- a response reward model ---

# rank, length in characters, score, category
ScoredAnswer = tuple[int, int, float, str]


def response_plot(
    path: str | Path,
    title: str,
    answers: Sequence[ScoredAnswer],
    bins: Sequence[Bin],
    accuracies: dict[str, Metric],
    best_of_n: dict[str, Metric],
    metrics: dict[str, Metric],
) -> None:
    """The plots of evaluation/eval_response_reward.py.

    Score by rank and over length, calibration of score differences (`bins`), pairwise accuracy by
    kind of pair (`accuracies`) and, if it was measured, best of n."""
    error = metrics["calibration_error"]
    spearman, by_length = metrics.get("spearman"), metrics.get("length_spearman")
    panels = [
        partial(_score_by_rank, answers=answers, spearman=spearman),
        partial(_score_over_length, answers=answers, spearman=by_length),
        partial(_difference_reliability, bins=bins, error=error),
        partial(_pairwise_accuracies, accuracies=accuracies),
    ]
    if best_of_n:
        panels.append(partial(_best_response, metrics=best_of_n))
    _panels(path, title, panels)


def _score_by_rank(
    axes: plt.Axes, answers: Sequence[ScoredAnswer], spearman: Metric | None
) -> None:
    by_rank: dict[int, list[float]] = {rank: [] for rank in sorted({row[0] for row in answers})}
    for rank, _, score, _ in answers:
        by_rank[rank].append(score)
    axes.boxplot(
        list(by_rank.values()),
        positions=range(len(by_rank)),
        widths=0.6,
        showfliers=False,
        medianprops={"color": TUNED},
    )
    names = [f"{rank}\n({len(scores):,})" for rank, scores in by_rank.items()]
    axes.set_xticks(range(len(by_rank)), names)
    axes.set(xlabel="rank, 1 is best (answers)", ylabel="score")
    axes.set_title("score by rank" + _in_brackets("Spearman within groups", spearman), fontsize=9)


def _score_over_length(
    axes: plt.Axes, answers: Sequence[ScoredAnswer], spearman: Metric | None
) -> None:
    sizes = Counter(category for *_, category in answers)
    shown = [name for name, _ in sizes.most_common(MOST if len(sizes) <= MOST else MOST - 1)]
    rest = f"{len(sizes) - len(shown)} other categories"
    groups: dict[str, list[tuple[int, float]]] = {_text(name or "answers"): [] for name in shown}
    for _, length, score, category in answers:
        label = _text(category or "answers") if category in shown else rest
        groups.setdefault(label, []).append((length, score))
    for (label, points), (color, marker, *_) in zip(groups.items(), LOOKS, strict=False):
        look = {"s": 9, "alpha": 0.5, "color": color, "marker": marker, "linewidths": 0}
        axes.scatter(*zip(*points, strict=True), label=label, **look)
    axes.set(xlabel="length, characters", ylabel="score")
    bracket = _in_brackets("Spearman within groups", spearman)
    axes.set_title("score over length" + bracket, fontsize=9)
    axes.legend(frameon=False, fontsize=7, markerscale=2)


def _difference_reliability(axes: plt.Axes, bins: Sequence[Bin], error: Metric) -> None:
    _diagram(axes, bins, "share of pairs in which the first is better")
    axes.set_xlabel("mean sigmoid(r - r') of the pairs in a bin")
    axes.set_title(f"calibration (error {error}; numbers: pairs)", fontsize=9)


def _pairwise_accuracies(axes: plt.Axes, accuracies: dict[str, Metric]) -> None:
    metrics = list(accuracies.values())
    places = range(len(metrics))[::-1]
    colors, ends = [TUNED] + [BASE] * (len(metrics) - 1), _whiskers(metrics)
    axes.barh(places, _values(metrics), 0.7, xerr=ends, color=colors, capsize=2)
    axes.set_yticks(places, [_text(name) for name in accuracies], fontsize=7)
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, 1.02), xlabel="share of pairs in the right order")
    axes.set_title("pairwise accuracy", fontsize=9)


def _best_response(axes: plt.Axes, metrics: dict[str, Metric]) -> None:
    _bars(axes, metrics, lambda name: name.startswith("scorer"))
    axes.set(ylim=(0, 1.05), ylabel="exact accuracy of the picked answer")
    axes.set_title(f"best of n ({metrics['scorer'].n:,} problems)", fontsize=9)


# --- trainings ---


def training_plot(history: Sequence[dict], path: str | Path, title: str) -> bool:
    """The course of a training run, from `trainer.state.log_history`: one panel for each of PANELS.

    Rows with `eval_` are dashed, with hollow markers. Returns False and writes nothing if the
    history has no such key."""
    logged = {key.removeprefix("eval_") for row in history for key in row}
    shown = [
        name
        for name, keys in PANELS.items()
        if logged & keys.keys() or (name == DRIFT and LESS_LIKELY in logged)
    ]
    if not shown:
        return False
    unit = "update" if "objective/scores" in logged else "optimizer step"
    panels = [partial(_training_panel, name=name, history=history, unit=unit) for name in shown]
    _panels(path, title, panels, height=3.4)
    return True


def _training_panel(axes: plt.Axes, name: str, history: Sequence[dict], unit: str) -> None:
    lines = []
    for look, (key, label) in enumerate(PANELS[name].items()):
        lines += _training_lines(axes, history, key, label, look)
    if name == DRIFT and lines:
        axes.axhline(0, color="black", linewidth=0.8)
    if name == DRIFT and any({LESS_LIKELY, f"eval_{LESS_LIKELY}"} & row.keys() for row in history):
        share = axes.twinx()
        label = "good steps less likely (right axis)"
        lines += _training_lines(share, history, LESS_LIKELY, label, 3)
        share.set_ylim(0, 1)
        share.tick_params(axis="y", colors=LOOKS[3][0])
        share.spines[["top"]].set_visible(False)
    if "(share)" in name:
        axes.set_ylim(0, 1.02)
    axes.legend(handles=lines, frameon=False, fontsize=8, handlelength=3)
    axes.set_title(name, fontsize=10)
    axes.set_xlabel(unit)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _training_lines(
    axes: plt.Axes, history: Sequence[dict], key: str, label: str, look: int
) -> list[plt.Line2D]:
    """The lines of one key: training, and held-out (dashed, with hollow markers)."""
    lines = []
    color, marker, *_ = LOOKS[look]
    for prefix, side, style, fill in (("", "", "-", color), ("eval_", ", held-out", "--", "white")):
        rows = [row for row in history if prefix + key in row and "step" in row]
        if rows:
            steps, values = [row["step"] for row in rows], [row[prefix + key] for row in rows]
            # a line through one point is invisible; many lines of the log need a few markers
            every = max(1, len(rows) // 12) if len(rows) >= 40 else None
            marks = {"marker": marker, "markersize": 3.5, "markevery": every}
            marks["markerfacecolor"] = fill
            lines += axes.plot(steps, values, style, label=label + side, color=color, **marks)
    return lines


def stability_plot(
    path: str | Path, base: float, panels: dict[str, dict[str, Sequence[Metric]]], title: str
) -> None:
    """Exact accuracy after each epoch, one panel a loss.

    panels: loss -> setting, such as "lr 1e-4, no anchor" -> accuracies after epochs 1, 2, ...; the
    settings of all losses have the same names, six at most. base: accuracy before training."""
    settings = list(dict.fromkeys(name for runs in panels.values() for name in runs))
    look_of = {name: look for look, name in enumerate(settings)}
    start = Metric(base, None, 0)

    def panel(axes: plt.Axes, loss: str, runs: dict[str, Sequence[Metric]]) -> None:
        for name, values in runs.items():
            places = range(len(values) + 1)
            _curve(axes, places, [start, *values], look_of[name], _text(name))
        axes.axhline(base, color=BASE, linewidth=0.8)
        axes.set(ylim=(0, 1), xlabel="epochs", ylabel="exact accuracy (95 % intervals)")
        axes.set_xticks(range(1 + max(map(len, runs.values()))))
        axes.set_title(_text(loss), fontsize=10)

    drawn = [partial(panel, loss=loss, runs=runs) for loss, runs in panels.items()]
    _panels(path, title, drawn, height=3.2, width=3.8, most=3, below=_legend_below)


def _legend_below(figure: Figure) -> None:
    """One legend for all panels."""
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    look = {"frameon": False, "fontsize": 8, "loc": "outside lower center", "handlelength": 4}
    columns = _in_groups([*handles], max(1, int(figure.get_figwidth() / 2.3)))
    figure.legend(handles.values(), handles.keys(), ncols=len(columns[0]), **look)


def compare_plot(
    path: str | Path,
    panels: dict[str, dict[str, list[Metric]]],
    splits: Sequence[str],
    curve: dict[float, Metric],
) -> None:
    """The accuracies of methods, one panel a regime, and a curve over the AUROC of planted judges.

    panels: title -> method -> one Metric for each of `splits`. curve: AUROC -> difference."""

    def regime(axes: plt.Axes, title: str, methods: dict[str, list[Metric]]) -> None:
        for k, (split, (color, marker, *_)) in enumerate(zip(splits, LOOKS, strict=False)):
            values = [metrics[k] for metrics in methods.values()]
            places = [m + 0.15 * (2 * k - 1) for m in range(len(values))]
            ends = zip(*(metric.ci95 or [metric.value] * 2 for metric in values), strict=True)
            axes.hlines(places, *ends, color=color, alpha=0.3, linewidth=5)
            axes.plot(_values(values), places, marker, color=color, markersize=4, label=split)
        axes.set_yticks(range(len(methods)), list(methods), fontsize=8)
        axes.invert_yaxis()
        axes.set(xlabel="exact accuracy, greedy (95 % intervals)")
        axes.set_title(title, fontsize=10)
        axes.legend(frameon=False, fontsize=8)

    def planted(axes: plt.Axes) -> None:
        _curve(axes, [*curve], [*curve.values()], 0)
        axes.axhline(0, color=BASE, linewidth=0.8)
        axes.set(xlabel="step AUROC of the judge", ylabel="stepwise DPO minus DPO, accuracy")
        axes.set_title("is this judge worth it?", fontsize=10)

    drawn = [partial(regime, title=title, methods=methods) for title, methods in panels.items()]
    _panels(path, "the same rollouts and updates for each", [*drawn, *([planted] if curve else [])])


def credit_plot(
    path: str | Path, metrics: dict[str, Metric], models: Sequence[str], kinds: dict[str, str]
) -> None:
    """Left: change of log-prob by kind of step, a bar a model. Right: share of right next steps.

    models: the base first; it has no bar on the left. More than five tuned models have several
    rows of panels. kinds: name in the metrics -> label."""
    base, *tuned = models
    rows = _in_groups(tuned, MOST - 1) or [[]]
    figure, grid = plt.subplots(
        len(rows), 2, figsize=(12, 4.0 * len(rows)), layout="constrained", squeeze=False,
        sharey="col", width_ratios=[len(kinds), 3],
    )  # fmt: skip
    for names, (left, right) in zip(rows, grid, strict=True):
        looks = dict(zip(names, BAR_LOOKS, strict=False))
        places = {"trap": "at traps", "elsewhere": "elsewhere"}
        _credit_bars(left, metrics, "logp_change", looks, kinds)
        base_look = (BASE, "", "", "")
        _credit_bars(right, metrics, "next_step_accuracy", {base: base_look, **looks}, places)
        left.axhline(0, color="black", linewidth=0.8)
        left.set(ylabel="nats a step (95 % intervals)")
        right.set(ylim=(0, 1.02), ylabel="share right")
        right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    title = "log-prob of steps, tuned minus base, pairs kept out of training"
    grid[0][0].set_title(title, fontsize=10)
    grid[0][1].set_title("greedy next step after a right prefix", fontsize=10)
    _save(figure, path)


def _credit_bars(
    axes: plt.Axes,
    metrics: dict[str, Metric],
    group: str,
    looks: dict[str, tuple],
    labels: dict[str, str],
) -> None:
    """Bars of the models (`looks`) side by side at each of the labels."""
    width = 0.8 / max(1, len(looks))
    for m, (name, (color, _, _, hatch)) in enumerate(looks.items()):
        keys = [f"{name}/{group}/{kind}" for kind in labels]
        values = [metrics[key] for key in keys if key in metrics]
        offset = (m - (len(looks) - 1) / 2) * width
        places = [k + offset for k, key in enumerate(keys) if key in metrics]
        style = {"color": color, "hatch": hatch, "edgecolor": "white", "label": _text(name, 40)}
        axes.bar(places, _values(values), width, yerr=_whiskers(values), capsize=2, **style)
    axes.set_xticks(range(len(labels)), labels.values(), fontsize=8)
    _no_frame(axes)


def curves_plot(
    path: str | Path,
    title: str,
    places: Sequence[float],
    curves: dict[str, Sequence[float]],
    across: str,
    up: str,
) -> None:
    """Curves over the same places, from 0 on both axes: a straight line through 0 is proportional.

    curves: label -> a value for each place. across, up: the names of the axes."""

    def panel(axes: plt.Axes, names: Sequence[str]) -> None:
        lines = []
        for name, (color, marker, dashes, _) in zip(names, LOOKS, strict=False):
            look = {"color": color, "marker": marker, "linestyle": dashes, "markersize": 4}
            lines += axes.plot(places, curves[name], label=_text(name, 30), **look)
        axes.set(xlabel=across, ylabel=up, xlim=(0, None), ylim=(0, None))
        _name_ends(axes, lines)

    _panels(path, title, [partial(panel, names=names) for names in _in_groups([*curves])])


# --- search ---


Points = Sequence[tuple[Metric, Metric]]  # (tokens, accuracy) of one line, by n


def frontier_plot(
    path: str | Path,
    panels: Mapping[str, Mapping[str, Points]],
    controls: Collection[str],
    title: str,
) -> None:
    """Accuracy over sampled tokens a problem, for each split one panel a strategy.

    panels: split -> line -> its points. A strategy has its own controls beside it (`NAME-...`, two
    at most), the majority vote, and greedy answers as level lines."""
    drawn = [
        partial(_frontier_panel, title=f"{split}: {name}" if name else split, lines=lines)
        for split, found in panels.items()
        for name, lines in _by_strategy(found, controls).items()
    ]
    _panels(path, title, drawn, height=3.2, width=4.6, most=3)


def _by_strategy(
    found: Mapping[str, Points], controls: Collection[str]
) -> dict[str, dict[str, Points]]:
    """Panel -> its lines, six at most."""
    greedy = [name for name in found if name.split(", ")[-1] == "greedy"][:2]
    beside = [name for name in ("majority_vote", *greedy) if name in found]
    own = [name for name in found if name not in (*beside, *controls)]
    curves = [name for name in own if len(found[name]) > 1]
    groups: dict[str, Sequence[str]] = {}
    for name in curves:
        its = [control for control in controls if control.startswith(f"{name}-")]
        groups[name] = [name, *beside, *[control for control in its if control in found][:2]]
    points = [name for name in own if name not in curves] or ([] if curves else beside)
    for k, names in enumerate(_in_groups(points)):
        groups[" " * k] = names
    return {title: {name: found[name] for name in names} for title, names in groups.items()}


def _frontier_panel(axes: plt.Axes, title: str, lines: Mapping[str, Points]) -> None:
    drawn = []
    for look, (name, points) in enumerate(lines.items()):
        accuracies = [accuracy for _, accuracy in points]
        tokens = _values([tokens for tokens, _ in points])
        drawn.append(_curve(axes, tokens, accuracies, look, _text(name, 30)))
        if len(points) == 1:
            color, _, dashes, _ = LOOKS[look]
            style = {"color": color, "linewidth": 0.8, "linestyle": dashes}
            axes.axhline(accuracies[0].value, label="_level", **style)
    axes.set(xscale="log", ylim=(0, 1))
    axes.set(xlabel="sampled tokens a problem", ylabel="exact accuracy (95 % intervals)")
    axes.set_title(_text(title, 50), fontsize=10)
    _name_ends(axes, drawn)
