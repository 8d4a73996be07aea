"""Intervals against what theory and counting by hand say, and the files they are written to."""

import itertools
import json
import math

import numpy as np
import pytest

from evaluation.metrics import (
    Metric,
    accuracy_metric,
    auroc_metric,
    compare,
    mean_metric,
    print_comparison,
    rate_metric,
    write_result,
)
from evaluation.plots import comparison_plot


def test_mean_interval_is_the_one_of_theory():
    values = np.random.default_rng(1).normal(0.4, 0.2, 400)
    metric = mean_metric(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert metric.value == pytest.approx(values.mean()) and metric.n == 400
    assert metric.ci95 == pytest.approx([values.mean() - half, values.mean() + half], abs=0.1 * half)


def test_the_seed_decides_the_resamples():
    values = np.random.default_rng(1).random(50)
    assert mean_metric(values, seed=3) == mean_metric(values, seed=3) != mean_metric(values, seed=4)


def test_degenerate_data():
    assert mean_metric([0.1] * 7) == Metric(pytest.approx(0.1), pytest.approx([0.1, 0.1]), 7)
    assert mean_metric([0.3]) == Metric(0.3, None, 1)  # one value says nothing about its spread
    with pytest.raises(ValueError, match="no values"):
        mean_metric([])
    low, high = rate_metric([0] * 20).ci95  # Wilson: z^2 / (n + z^2)
    assert low == 0 and high == pytest.approx(1.96**2 / (20 + 1.96**2), abs=1e-4)
    assert rate_metric([1]).ci95[1] == 1
    with pytest.raises(ValueError, match="zeros and ones"):
        rate_metric([0, 0.5])


def test_differences_are_paired():
    """Tuned is base plus 0.01 and a little noise: the difference is known far better than either side."""
    rng = np.random.default_rng(2)
    base = rng.random(200)
    metrics = compare("reward", base, base + 0.01 + rng.normal(0, 0.001, 200))
    assert list(metrics) == ["base_reward", "tuned_reward", "reward_improvement"]
    low, high = metrics["reward_improvement"].ci95
    assert 0.0095 < low < metrics["reward_improvement"].value < high < 0.0105
    assert metrics["base_reward"].ci95[1] - metrics["base_reward"].ci95[0] > 20 * (high - low)
    with pytest.raises(ValueError):
        compare("reward", [0.1, 0.2], [0.1])


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    labels, scores = [1, 0, 1, 1, 0, 0, 1, 0], [0.9, 0.8, 0.8, 0.6, 0.3, 0.6, 0.2, 0.1]
    pairs = [(a, b) for (p, a), (q, b) in itertools.product(zip(labels, scores, strict=True), repeat=2) if p > q]
    by_hand = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    metric = auroc_metric(labels, scores, [0, 0, 1, 1, 2, 2, 3, 3])
    assert metric.value == pytest.approx(by_hand) and metric.n == 8
    assert metric.ci95[0] <= by_hand <= metric.ci95[1]
    assert auroc_metric([1, 1], [0.1, 0.9], [0, 1]) is None
    assert auroc_metric([1, 0], [0.9, 0.1], [0, 0]) == Metric(1.0, None, 2)


def test_repeating_the_steps_of_a_cluster_adds_no_certainty():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 60)
    scores = np.clip(0.4 * labels + 0.6 * rng.random(60), 0, 1)
    for metric in (auroc_metric, accuracy_metric):
        once = metric(labels, scores, np.arange(60))
        tenfold = metric(labels.repeat(10), scores.repeat(10), np.arange(60).repeat(10))
        assert tenfold.ci95 == pytest.approx(once.ci95, abs=1e-9) and tenfold.n == 600
    assert accuracy_metric([1, 0, 1, 0], [0.5, 0.4, 0.1, 0.9], [0, 1, 2, 3]).value == 0.5


def test_a_result_file_holds_all_or_nothing(tmp_path):
    path = tmp_path / "results" / "some.json"
    write_result(path, {"accuracy": Metric(0.5, [0.4, 0.6], 9)}, {"limit": 9}, [0], num_examples=9)
    written = path.read_text()
    result = json.loads(written)
    assert list(result) == ["num_examples", "metrics", "config", "seeds", "commit", "versions"]
    assert result["metrics"]["accuracy"] == {"value": 0.5, "ci95": [0.4, 0.6], "n": 9}
    assert result["versions"]["torch"].startswith("2.") and result["seeds"] == [0]
    with pytest.raises(ValueError):
        write_result(path, {"accuracy": Metric(math.nan, None, 9)}, {}, [0])
    assert path.read_text() == written and [file.name for file in path.parent.iterdir()] == ["some.json"]


def test_table_and_plot_show_what_there_is(tmp_path, capsys):
    metrics = {
        **{"base_reward": Metric(0.5, [0.41, 0.59], 9), "tuned_reward": Metric(0.7, None, 9)},
        "reward_improvement": Metric(0.2, [-0.1, 0.5], 9),
    }
    print_comparison("base against tuned [n = 9]", metrics)
    shown = capsys.readouterr().out
    assert "base against tuned [n = 9]" in shown
    assert "| reward | 0.500 [0.410, 0.590] | 0.700 | 0.200 [-0.100, 0.500] | 9 |" in " ".join(shown.split())
    comparison_plot(tmp_path / "plots" / "some.png", metrics, {"reward": "mean step reward"}, "title")
    assert [file.name for file in (tmp_path / "plots").iterdir()] == ["some.png"]
    assert (tmp_path / "plots" / "some.png").read_bytes().startswith(b"\x89PNG")
