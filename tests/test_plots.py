"""Plots show what the history or the card holds, and their files are complete."""

import itertools
import re
import warnings

import numpy as np
import pytest

from common.files import ROOT
from evaluation import plots
from evaluation.judge_card import Card, JudgedStep, RankedPolicy
from evaluation.metrics import Bin, Metric
from evaluation.plots import judge_plot, training_plot

TRAIN = [
    {
        "step": step,
        "epoch": step / 10,
        "loss": 1 / step,
        "rewards/margins": 0.1 * step,
        "rewards/accuracies": 0.5 + 0.01 * step,
        "logps/chosen_vs_ref": 0.2 * step,
        "logps/rejected_vs_ref": -1.0 * step,
        "drift/good_steps_less_likely": 0.3,
    }
    for step in range(1, 21)
]
EVAL = [
    {"step": 10, "eval_loss": 0.4, "eval_rewards/margins": 0.5},
    {"step": 20, "eval_loss": 0.3, "eval_rewards/margins": 0.9},
]
END = {"step": 20, "train_runtime": 3.0, "train_loss": 0.2}


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The panels of the figures that are saved: (title, {label: (x, y)} of its lines)."""
    panels, save = [], plots._save

    def keep(figure, path):
        for axes in figure.axes:
            lines = {
                line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
                for line in axes.lines
            }
            panels.append(
                (
                    axes.get_title(),
                    {label: line for label, line in lines.items() if not label.startswith("_")},
                )
            )
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return panels


def test_a_run_has_four_panels_and_a_twin_axis(tmp_path, drawn):
    path = tmp_path / "logs" / "run" / "training.png"
    assert training_plot([*TRAIN, *EVAL, END], path, "stepwise, lr 1e-4")
    assert path.read_bytes().startswith(b"\x89PNG") and [
        file.name for file in path.parent.iterdir()
    ] == ["training.png"]
    lines = {title: labels for title, labels in drawn if title}
    assert list(lines) == [panel for panel, keys in plots.PANELS.items() if TRAIN[0].keys() & keys]
    steps = list(range(1, 21))
    assert lines["loss"] == {
        "loss": (steps, [1 / k for k in steps]),
        "loss, held-out": ([10, 20], [0.4, 0.3]),
    }
    assert set(lines["margin between chosen and rejected"]) == {"margin", "margin, held-out"}
    assert lines["log-prob minus reference log-prob (nats)"]["rejected"] == (
        steps,
        [-1.0 * k for k in steps],
    )
    (twin,) = [labels for title, labels in drawn if not title]
    assert list(twin.values()) == [(steps, [0.3] * 20)]


def test_what_the_history_lacks_is_left_out(tmp_path, drawn):
    assert training_plot([{"step": 1, "loss": 0.7}], tmp_path / "one.png", "one row")
    assert drawn == [("loss", {"loss": ([1], [0.7])})]
    drawn.clear()
    assert training_plot(
        [{"step": 1, "drift/good_steps_less_likely": 0.5}, EVAL[0]], tmp_path / "odd.png", "odd"
    )
    assert [title for title, _ in drawn if title] == [
        "loss",
        "margin between chosen and rejected",
        "log-prob minus reference log-prob (nats)",
    ]
    assert training_plot([END], tmp_path / "none.png", "nothing") is False
    assert sorted(file.name for file in tmp_path.iterdir()) == ["odd.png", "one.png"]


@pytest.mark.process
def test_the_card_of_a_judge_draws_what_it_holds(tmp_path, drawn):
    half = Metric(0.5, [0.4, 0.6], 4)
    card = Card(
        metrics={"calibration_error": half},
        steps=[JudgedStep(1, 0.9, 1, 0), JudgedStep(0, 0.2, 2, 0)],
        reliability=[Bin(0.2, 0.3, 0.2, half), Bin(0.9, 1.0, 0.9, half)],
        by_position=[("1", half, None), ("2", Metric(0.7, None, 1), half)],
        selection={"min": {"answer_auroc": half}},
    )
    judge_plot(tmp_path / "few.png", "a judge", card)
    titles = [title.split(" (")[0] for title, _ in drawn]
    assert titles == ["reliability", "scores", "score by position"]
    drawn.clear()
    card.selection = {"min": {"best_of_n": half}, "chance": {"best_of_n": half}}
    card.policies = [RankedPolicy(f"runs/{name}", half, half, 1, 1) for name in "abc"]
    card.samples, card.values = 4.0, card.reliability
    card.metrics["value_calibration_error"] = half
    judge_plot(tmp_path / "all.png", "a judge", card)
    assert [title.split(" (")[0] for title, _ in drawn][3:] == [
        "best of 4",
        "value calibration",
        "policies, greedy answers",
    ]
    assert {file.name for file in tmp_path.iterdir()} == {"few.png", "all.png"}


def test_stability_has_a_panel_a_loss_and_a_line_a_setting(tmp_path, drawn):
    def metrics(*values):
        return [Metric(value, [value - 0.05, value + 0.05], 500) for value in values]

    runs = {"lr 1e-4, anchor": metrics(0.6, 0.7), "lr 1e-4, no anchor": metrics(0.5, 0.1)}
    one = {"lr 1e-4, no anchor": metrics(0.2)}
    plots.stability_plot(tmp_path / "stability.png", 0.4, {"dpo": runs, "step_dpo": one}, "title")
    assert [title for title, _ in drawn] == ["dpo", "step_dpo"]
    assert drawn[0][1]["lr 1e-4, no anchor"] == ([0, 1, 2], [0.4, 0.5, 0.1])
    assert drawn[1][1] == {"lr 1e-4, no anchor": ([0, 1], [0.4, 0.2])}


# --- colours ---

# Machado, Oliveira and Fernandes 2009: linear RGB as people with full colour blindness see it
SIGHTS = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
               [0.004733, 0.691367, 0.303900]],
}  # fmt: skip
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
          [0.0193339, 0.1191920, 0.9503041]]  # fmt: skip


def difference(one: str, other: str, sight: str) -> float:
    """CIE76 colour difference as a person sees it; about 2.3 is just noticeable."""

    def lab(color: str) -> np.ndarray:
        rgb = np.array([int(color[k : k + 2], 16) for k in (1, 3, 5)]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        seen = np.clip(np.array(SIGHTS[sight]) @ linear, 0, 1)
        ratio = np.array(TO_XYZ) @ seen / [0.95047, 1, 1.08883]
        x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), ratio * 7.787 + 16 / 116)
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    return float(np.linalg.norm(lab(one) - lab(other)))


def looks_of_page() -> dict[str, list[str]]:
    """The colours of the series of the report page, in its light and its dark scheme."""
    css = (ROOT / "evaluation/report.css").read_text()
    found = re.findall(r"--look\d: (#\w{6})", css)
    assert len(found) == 12
    return {"page, light": found[:6], "page, dark": found[6:]}


@pytest.mark.parametrize("sight", SIGHTS)
def test_all_readers_tell_the_colours_apart(sight):
    palettes = {"plots": [look[0] for look in plots.LOOKS], **looks_of_page()}
    for where, palette in palettes.items():
        for pair in itertools.combinations(palette, 2):
            assert difference(*pair, sight) > 15, (where, pair)
    assert difference(plots.RIGHT, plots.WRONG, sight) > 60
    assert difference(plots.BASE, plots.TUNED, sight) > 25
    css = (ROOT / "evaluation/report.css").read_text()
    for scheme in zip(
        *(re.findall(rf"--{end}: (#\w+)", css) for end in ("high", "low")), strict=True
    ):
        assert difference(*scheme, sight) > 60


def test_series_differ_without_colours_too():
    markers, dashes, hatches = ([look[k] for look in plots.LOOKS] for k in (1, 2, 3))
    assert len(set(markers)) == len(set(map(str, dashes))) == len(set(hatches)) == plots.MOST == 6


@pytest.mark.process
def test_no_panel_has_more_than_six_series(tmp_path, drawn):
    half, path = Metric(0.5, [0.4, 0.6], 4), tmp_path / "plot.png"
    tokens = Metric(9.0, None, 4)
    curve = [(tokens, half), (Metric(99.0, None, 4), half)]
    names = ["beam", "mcts"]
    controls = [f"beam-{k}" for k in range(4)]
    lines = {name: curve for name in ("majority_vote", *names, *controls)}
    lines |= {name: curve[:1] for name in ("greedy", "large, greedy", *"abcdefgh")}
    plots.frontier_plot(path, {"test": lines}, controls, "many")
    panels = {title.strip(): [*labels] for title, labels in drawn}
    beside = ["majority_vote", "greedy", "large, greedy"]
    assert panels["test: beam"] == ["beam", *beside, "beam-0", "beam-1"]
    assert panels["test: mcts"] == ["mcts", *beside]
    assert {name for labels in panels.values() for name in labels} >= {*names, *"abcdefgh"}
    plots.curves_plot(path, "many", [1, 2], {name: [1, 2] for name in "abcdefgh"}, "x", "y")
    answers = [(1, k, 0.1, f"category {k % 9}") for k in range(90)]
    error = {"calibration_error": half}
    bins = [Bin(0.2, 0.3, 0.2, half)]
    plots.response_plot(path, "many", answers, bins, {"all": half}, {}, error)
    assert drawn and all(len(labels) <= 6 for _, labels in drawn)


def test_intervals_of_curves_are_bands(tmp_path, monkeypatch):
    bands = []
    monkeypatch.setattr(plots.plt.Axes, "fill_between", lambda *given, **_: bands.append(given[1:]))
    one, two = Metric(0.5, [0.4, 0.6], 4), Metric(0.7, None, 4)
    plots.compare_plot(
        tmp_path / "x.png", {"d": {"dpo": [one, two]}}, ["test"], {0.6: one, 0.9: two}
    )
    assert [[list(side) for side in band] for band in bands] == [
        [[0.6, 0.9], [0.4, 0.7], [0.6, 0.7]]
    ]


NAMES = {
    "dollars": "cost_$5 and $6^2",
    "formula": r"\frac{1}{0}$x$ \$",
    "braces": "{a}_^^{",
    "other letters": "モデル-модель-🍎",
    "no text": "caf\udce9\0\x07",
    "long": "x" * 250,
    "hidden": "_mine",
}


@pytest.mark.process
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_any_name_can_stand_in_a_plot(tmp_path, name, monkeypatch):
    """Names of folders, models, data sets and categories are shown as they are, in one piece."""
    shown = set()

    def texts(figure, path):
        save(figure, path)
        shown.update(text.get_text() for text in figure.findobj(plots.matplotlib.text.Text))

    save = plots._save
    monkeypatch.setattr(plots, "_save", texts)
    half, path = Metric(0.5, [0.4, 0.6], 4), tmp_path / "plot.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert training_plot(TRAIN, path, f"{name}: {name}")
        metrics = {f"{model}/next_step_accuracy/trap": half for model in ("base", name)}
        metrics |= {f"{name}/logp_change/chosen": half, f"{name}2/logp_change/chosen": half}
        plots.credit_plot(path, metrics, ["base", name, f"{name}2"], {"chosen": "chosen"})
        plots.frontier_plot(path, {name: {name: [(half, half)], "other": [(half, half)]}}, [], name)
        answers, bins = [(1, 9, 0.5, name), (2, 8, 0.4, name)], [Bin(0.2, 0.3, 0.2, half)]
        error = {"calibration_error": half}
        plots.response_plot(path, name, answers, bins, {"all": half, name: half}, {}, error)
        card = Card(error, [JudgedStep(1, 0.9, 1, 0)], bins, [("1", half, None)])
        card.policies = [RankedPolicy(name, half, half, 1, 1)]
        judge_plot(path, name, card)
    assert path.read_bytes().startswith(b"\x89PNG")
    if len(name) < 30 and name.isprintable():
        assert any(name.replace("$", r"\$") in text for text in shown), shown


def test_more_models_and_lines_than_colours(tmp_path):
    half, names = Metric(0.5, [0.4, 0.6], 4), [f"model-{k}" for k in range(13)]
    metrics = {f"{name}/next_step_accuracy/trap": half for name in names}
    plots.credit_plot(tmp_path / "credit.png", metrics, names, {"chosen": "chosen"})
    lines = {name: [(half, half)] for name in names}
    plots.frontier_plot(tmp_path / "frontier.png", {"test": lines}, [], "many")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_log_without_bad_steps(tmp_path, drawn):
    """Whatever a log shows may be absent: from the last row, from all rows, or but for held-out."""
    good = {"step": 1, "loss": 0.7, "values/good": 0.6}
    held_out = {"step": 2, "eval_values/bad": 0.2}
    assert training_plot([good, {"step": 2, "loss": 0.6}], tmp_path / "a.png", "none is bad")
    assert training_plot([good, held_out], tmp_path / "b.png", "held-out alone")
    panels = [lines for title, lines in drawn if title == "mean value of steps"]
    assert [*panels[0]] == ["label 0.5 or more"]
    assert [*panels[1]] == ["label 0.5 or more", "label below 0.5, held-out"]
