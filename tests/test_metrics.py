"""Metrics and intervals against theory and against values computed by hand; result files."""

import itertools
import json
import math

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, roc_auc_score

from evaluation.metrics import (
    Metric,
    accuracy_metric,
    auroc_difference,
    auroc_metric,
    best_of_n,
    best_threshold,
    brier_metric,
    calibration_metric,
    clustered_mean_metric,
    compare,
    first_error,
    kappa_metric,
    mean_metric,
    processbench_metrics,
    rate_metric,
    reliability,
    rollouts_equivalent,
    spearman_metric,
)
from evaluation.plots import comparison_plot
from evaluation.results import print_comparison, write_result


def test_mean_interval_is_the_one_of_theory():
    values = np.random.default_rng(1).normal(0.4, 0.2, 400)
    metric = mean_metric(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert metric.value == pytest.approx(values.mean()) and metric.n == 400
    assert metric.ci95 == pytest.approx(
        [values.mean() - half, values.mean() + half], abs=0.1 * half
    )


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
    """Tuned is base plus 0.01 and a little noise: the interval of the difference is narrow."""
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
    pairs = [
        (a, b)
        for (p, a), (q, b) in itertools.product(zip(labels, scores, strict=True), repeat=2)
        if p > q
    ]
    by_hand = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    metric = auroc_metric(labels, scores, [0, 0, 1, 1, 2, 2, 3, 3])
    assert metric.value == pytest.approx(by_hand) and metric.n == 8
    assert metric.ci95[0] <= by_hand <= metric.ci95[1]
    rng = np.random.default_rng(8)
    labels, scores = rng.integers(0, 2, 300), rng.integers(0, 20, 300) / 20  # many ties
    assert auroc_metric(labels, scores, np.arange(300)).value == pytest.approx(
        roc_auc_score(labels, scores)
    )
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


def test_calibration_on_bins_worked_out_by_hand():
    """Bin .2-.3: scores .2, .28, one of two right. Bin .9-1: .9, 1, 1, 1, three of four right."""
    labels, scores, clusters = (
        [0, 1, 1, 1, 0, 1],
        [0.2, 0.28, 0.9, 1.0, 1.0, 1.0],
        [0, 1, 2, 3, 4, 5],
    )
    metric = calibration_metric(labels, scores, clusters)
    assert metric.value == pytest.approx((2 * 0.26 + 4 * 0.225) / 6) and metric.n == 6
    assert 0 <= metric.ci95[0] <= metric.value <= metric.ci95[1]
    low, high = reliability(labels, scores, clusters)
    assert (low.low, low.high, low.right.n, low.right.value) == (0.2, 0.3, 2, 0.5)
    assert (high.low, high.high, high.right.n, high.right.value) == (0.9, 1.0, 4, 0.75)
    assert [low.score, high.score] == pytest.approx([0.24, 0.975])
    squares = 0.2**2 + 0.72**2 + 0.1**2 + 1
    assert brier_metric(labels, scores, clusters).value == pytest.approx(squares / 6)
    assert calibration_metric([1], [0.7], [0]) == Metric(pytest.approx(0.3), None, 1)
    assert calibration_metric([1, 1], [1.0, 1.0], [0, 1]) == Metric(0.0, [0.0, 0.0], 2)


def test_brier_and_calibration_against_other_code():
    rng = np.random.default_rng(4)
    scores = rng.random(500)
    labels = (rng.random(500) < scores**2).astype(float)  # too sure of itself
    assert brier_metric(labels, scores, np.arange(500)).value == pytest.approx(
        brier_score_loss(labels, scores)
    )
    expected = 0
    for k in range(10):
        inside = [(s, y) for s, y in zip(scores, labels, strict=True) if k / 10 <= s < (k + 1) / 10]
        expected += (
            len(inside)
            / 500
            * abs(np.mean([s for s, _ in inside]) - np.mean([y for _, y in inside]))
        )
    metric = calibration_metric(labels, scores, np.arange(500))
    assert metric.value == pytest.approx(expected)
    # the integral of s - s^2: what it is without noise
    assert metric.ci95[0] < 1 / 6 < metric.ci95[1]


def test_the_interval_of_a_clustered_mean_depends_on_the_number_of_clusters():
    values = np.random.default_rng(5).normal(0.4, 0.2, 300)
    metric = clustered_mean_metric(values.repeat(4), np.arange(300).repeat(4))
    half = 1.96 * values.std() / math.sqrt(300)
    assert metric.value == pytest.approx(values.mean()) and metric.n == 1200
    assert metric.ci95 == pytest.approx(
        [values.mean() - half, values.mean() + half], abs=0.15 * half
    )
    assert clustered_mean_metric([0.2, 0.4], [7, 7]) == Metric(pytest.approx(0.3), None, 2)


def test_first_error_is_as_processbench_writes_it():
    assert first_error([1, 1, 1]) == -1 and first_error([]) == -1
    assert first_error([1, 0, 0]) == first_error([1, 0, None]) == first_error([1, 0, 1]) == 1
    assert first_error([1, None, 0]) is None and first_error([1, None]) is None


def test_processbench_with_both_parts_by_hand():
    """Three solutions with an error: reported exactly, reported one step early, not reported.

    Two without an error: none reported, one reported."""
    labels = [[1, 0, None], [1, 0, 0], [1, 1, 0], [1, 1], [1], [1, None]]
    scores = [[0.9, 0.4, 0.9], [0.2, 0.1, 0.9], [0.9, 0.9, 0.5], [0.5, 0.9], [0.49], [0.0, 0.0]]
    metrics = processbench_metrics(labels, scores, clusters=[0, 1, 2, 3, 4, 5])
    values = {name: (metric.value, metric.n) for name, metric in metrics.items()}
    assert values == {
        "processbench_error_accuracy": (pytest.approx(1 / 3), 3),
        "processbench_correct_accuracy": (0.5, 2),
        "processbench_f1": (pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)), 5),
    }
    low, high = metrics["processbench_f1"].ci95
    assert 0 <= low < values["processbench_f1"][0] < high <= 1


def test_processbench_with_other_thresholds():
    """At .3: the first error is found, the second reported early, the third missed.

    At .55 the third is found, and an error is reported for one of two right solutions."""
    labels = [[1, 0, None], [1, 0, 0], [1, 1, 0], [1, 1], [1], [1, None]]
    scores = [[0.9, 0.2, 0.9], [0.2, 0.1, 0.9], [0.9, 0.9, 0.5], [0.55, 0.9], [0.49], [0.0, 0.0]]
    clusters = [0, 1, 2, 3, 4, 5]
    for threshold, error, correct in ((0.3, 1 / 3, 1.0), (0.55, 2 / 3, 0.5)):
        metrics = processbench_metrics(labels, scores, clusters, threshold=threshold)
        assert metrics["processbench_error_accuracy"].value == pytest.approx(error)
        assert metrics["processbench_correct_accuracy"].value == correct
    assert best_threshold(labels, scores) == (0.55, pytest.approx(4 / 7))
    flat = ([1, 0, 1, 1], [0.6, 0.4, 0.3, 0.9], [0, 1, 2, 3])
    assert [accuracy_metric(*flat, threshold=t).value for t in (0.5, 0.35, 0.3)] == [
        0.75,
        0.5,
        0.75,
    ]
    assert kappa_metric(*flat, threshold=0.95).value == 0


def test_processbench_without_one_of_its_parts():
    no_error = processbench_metrics([[1, 1], [1]], [[0.9, 0.9], [0.1]], [0, 1])
    assert {name: metric.value for name, metric in no_error.items()} == {
        "processbench_correct_accuracy": 0.5
    }
    assert list(processbench_metrics([[0]], [[0.1]], [0])) == ["processbench_error_accuracy"]
    assert (
        processbench_metrics([[1, None]], [[0.1, 0.2]], [0])
        == processbench_metrics([], [], [])
        == {}
    )
    nothing_found = processbench_metrics([[0], [1]], [[0.9], [0.1]], [0, 1])
    assert nothing_found["processbench_f1"].value == 0
    assert processbench_metrics([[0], [1]], [[0.1], [0.9]], [3, 3])["processbench_f1"] == Metric(
        1.0, None, 2
    )


def test_best_of_n_shares_ties():
    correct = [[1, 0, 0], [0, 1], [0, 0], [1]]
    assert best_of_n([[0.9, 0.1, 0.2], [0.9, 0.1], [0.3, 0.3], [0.0]], correct) == [1, 0, 0, 1]
    assert best_of_n([[0.9, 0.9, 0.2], [0.1, 0.1], [0.3, 0.3], [0.0]], correct) == [0.5, 0.5, 0, 1]
    # chance
    assert best_of_n([[0] * len(row) for row in correct], correct) == pytest.approx(
        [1 / 3, 0.5, 0, 1]
    )
    assert best_of_n(correct, correct) == [1, 1, 0, 1]  # the oracle
    assert best_of_n([[-math.inf, -2.0]], [[0, 1]]) == [1]


def test_spearman_of_policies_by_hand():
    """Rewards .1, .4, .6, .9 rank 1 2 3 4; accuracies 0, .5, .25, 1 rank 1 3 2 4.

    rho = 1 - 6 * (1 + 1) / (4 * 15)."""
    rewards = [[0.1] * 4, [0.3, 0.5, 0.4, 0.4], [0.6] * 4, [0.8, 1.0, 0.9, 0.9]]
    accuracies = [[0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]]
    metric = spearman_metric(rewards, accuracies)
    assert metric.value == pytest.approx(0.8) and metric.n == 4
    assert metric.ci95[0] <= 0.8 <= metric.ci95[1] <= 1
    assert spearman_metric(rewards[:2], accuracies[:2]) is None  # two say nothing
    assert spearman_metric(rewards, [[1, 0, 0, 1]] * 4) is None  # all equally good
    assert spearman_metric([[0.1], [0.2], [0.3]], [[0], [0], [1]]).ci95 is None  # one problem


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
    assert path.read_text() == written and [file.name for file in path.parent.iterdir()] == [
        "some.json"
    ]


def test_table_and_plot_show_what_there_is(tmp_path, capsys):
    metrics = {
        **{"base_reward": Metric(0.5, [0.41, 0.59], 9), "tuned_reward": Metric(0.7, None, 9)},
        "reward_improvement": Metric(0.2, [-0.1, 0.5], 9),
    }
    print_comparison("base against tuned [n = 9]", metrics)
    shown = capsys.readouterr().out
    assert "base against tuned [n = 9]" in shown
    assert "| reward | 0.500 [0.410, 0.590] | 0.700 | 0.200 [-0.100, 0.500] | 9 |" in " ".join(
        shown.split()
    )
    comparison_plot(
        tmp_path / "plots" / "some.png", metrics, {"reward": "mean step reward"}, "title"
    )
    assert [file.name for file in (tmp_path / "plots").iterdir()] == ["some.png"]
    assert (tmp_path / "plots" / "some.png").read_bytes().startswith(b"\x89PNG")


def test_difference_of_aurocs_by_hand():
    labels, clusters = [1, 1, 0, 0], [0, 0, 1, 1]
    metric = auroc_difference(labels, [4, 3, 2, 1], [1, 4, 3, 2], clusters)
    assert metric.value == pytest.approx(1 - 2 / 4) and metric.n == 4
    assert auroc_difference([1, 1], [1, 2], [2, 1], [0, 1]) is None


def test_rollouts_equivalent_by_hand():
    """One rollout has an AUROC of 0.75, two have 0.875: shares 1 and .5 against .5 and 0."""
    labels, right = [1, 1, 0, 0], np.array([[1, 1], [0, 1], [0, 1], [0, 0]])
    clusters = range(4)
    # 3 of 4 pairs
    assert rollouts_equivalent(labels, [4, 1, 2, 0], right, clusters).value == pytest.approx(1)
    # 3.5 of 4
    assert rollouts_equivalent(labels, [4, 1, 1, 0], right, clusters).value == pytest.approx(2)
    # all of 4: more than there are
    assert rollouts_equivalent(labels, [4, 3, 2, 1], right, clusters).value == 2
    assert rollouts_equivalent(labels, [1, 1, 1, 1], right, clusters).value == 0  # chance


def test_bins_of_equal_mass():
    scores = [k / 100 for k in range(100)]
    rows = reliability([1.0] * 50 + [0.0] * 50, scores, range(100), equal_mass=True)
    assert (
        [row.right.n for row in rows] == [10] * 10
        and rows[1].low == pytest.approx(0.1)
        and rows[1].high == 0.19
    )
    halves = [1.0] * 50 + [0.0] * 50
    by_hand = (
        sum(
            abs(sum(scores[k : k + 10]) / 10 - sum(halves[k : k + 10]) / 10)
            for k in range(0, 100, 10)
        )
        / 10
    )
    assert calibration_metric(halves, scores, range(100), equal_mass=True).value == pytest.approx(
        by_hand
    )
    # equal scores share a bin
    assert len(reliability([1, 0], [0.5, 0.5], [0, 1], equal_mass=True)) == 1
