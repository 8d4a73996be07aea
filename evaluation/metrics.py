"""Metrics with confidence intervals.

Steps of one problem are not independent. Most functions therefore take `clusters`, the problem of
each step, and the bootstrap draws whole clusters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

LEVEL = (2.5, 97.5)  # percentiles of a 95 % interval
BINS = 10  # bins of scores, for calibration

Numbers = Sequence[float] | np.ndarray
# A function of the weights of the observations; None where it is undefined.
Statistic = Callable[[np.ndarray], float | None]


# One metric of evaluation/results/*.json:
#   "tuned_accuracy": {"value": 0.615,           rates are 0 to 1, never percent
#                      "ci95": [0.593, 0.636],   95 % interval; null for one observation
#                      "n": 2000}                observations: problems, pairs or steps
@dataclass(frozen=True)
class Metric:
    value: float
    ci95: list[float] | None
    n: int

    def __str__(self) -> str:
        # The format option z prints -0.0 as 0.000.
        interval = f" [{self.ci95[0]:z.3f}, {self.ci95[1]:z.3f}]" if self.ci95 else ""
        return f"{self.value:z.3f}{interval}"


@dataclass(frozen=True)
class Bin:
    """One bin of a reliability diagram.

    low, high: the range of the bin, or of its scores for bins of equal mass. score: the mean of its
    scores. right: the mean of its labels, which is the share of right steps."""

    low: float
    high: float
    score: float
    right: Metric


def _with_interval(value: float, ends: Numbers, n: int) -> Metric:
    # The value of a resample that equals the sample may differ from it in the last bit.
    low, high = map(float, ends)
    return Metric(float(value), [min(low, float(value)), max(high, float(value))], n)


# --- means, rates and differences ---


def mean_metric(values: Numbers, seed: int = 0) -> Metric:
    """The mean with its bootstrap interval (percentile, 5,000 resamples).

    For paired differences this is the paired bootstrap. Equal values have an interval of width 0, a
    single value has none. Raises ValueError if there are no values."""
    from scipy.stats import bootstrap  # slow to import

    array = np.asarray(values, dtype=float)
    if not len(array):
        raise ValueError("no values: nothing to average")
    if len(array) == 1:
        return Metric(float(array[0]), None, 1)
    rng = np.random.default_rng(seed)
    interval = bootstrap(
        (array,), np.mean, n_resamples=5000, batch=500, method="percentile", rng=rng
    ).confidence_interval
    return _with_interval(array.mean(), interval, len(array))


def rate_metric(values: Sequence[float]) -> Metric:
    """The share of ones with its Wilson interval, which is valid at 0 and 1 too.

    Raises ValueError if there are no values, or if one is neither 0 nor 1."""
    from scipy.stats import binomtest  # slow to import

    if not set(values) <= {0, 1}:
        raise ValueError("a rate is a share of ones among zeros and ones")
    interval = binomtest(int(sum(values)), len(values)).proportion_ci(method="wilson")
    return _with_interval(sum(values) / len(values), interval, len(values))


def paired_difference(base: Sequence[float], better: Sequence[float], seed: int = 0) -> Metric:
    """The mean of `better` minus `base` over the same problems (paired bootstrap)."""
    return mean_metric([b - a for a, b in zip(base, better, strict=True)], seed)


def compare(
    name: str, base: Sequence[float], tuned: Sequence[float], is_rate: bool = False, seed: int = 0
) -> dict[str, Metric]:
    """base_NAME, tuned_NAME and NAME_improvement, their paired difference."""
    base_metric, tuned_metric = (
        rate_metric(values) if is_rate else mean_metric(values, seed) for values in (base, tuned)
    )
    return {
        f"base_{name}": base_metric,
        f"tuned_{name}": tuned_metric,
        f"{name}_improvement": paired_difference(base, tuned, seed),
    }


def clustered_mean_metric(values: Numbers, clusters: Numbers, seed: int = 0) -> Metric:
    """The mean of values that are not independent within a cluster, such as steps of a problem."""
    array = np.asarray(values, dtype=float)

    def mean(weights: np.ndarray) -> float:
        return float(np.average(array, weights=weights))

    return _clustered(mean, clusters, seed)


def crossed_mean_metric(values: np.ndarray, seed: int = 0) -> Metric:
    """The mean of values (runs, problems), each a run's result on a problem.

    The bootstrap (2,000 resamples) draws runs and problems, each with replacement: training again
    and asking other problems would both change the mean. A single run is not resampled."""
    runs, count = values.shape
    rng = np.random.default_rng(seed)
    by_run = rng.multinomial(runs, [1 / runs] * runs, 2000)  # (resamples, runs)
    by_problem = rng.multinomial(count, [1 / count] * count, 2000)
    means = ((by_run @ values) * by_problem).sum(1) / values.size
    return _with_interval(values.mean(), np.percentile(means, LEVEL), values.size)


def two_sided_p(difference: Metric) -> float:
    """The p-value of a difference against 0: normal, its standard error from the 95 % interval."""
    from scipy.stats import norm  # slow to import

    if not difference.ci95 or difference.ci95[0] == difference.ci95[1]:
        return float(difference.value == 0)
    error = (difference.ci95[1] - difference.ci95[0]) / (2 * norm.ppf(0.975))
    return float(2 * norm.sf(abs(difference.value) / error))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): the k-th smallest of m times m - k + 1.

    None is smaller than the one before it, and none is above 1."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for k, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - k) * p_values[index]))
        corrected[index] = largest
    return corrected


@overload
def _clustered(
    statistic: Callable[[np.ndarray], float], clusters: Numbers, seed: int
) -> Metric: ...
@overload
def _clustered(statistic: Statistic, clusters: Numbers, seed: int) -> Metric | None: ...
def _clustered(statistic: Statistic, clusters: Numbers, seed: int) -> Metric | None:
    """A statistic with its cluster bootstrap interval; None if it is undefined for the sample.

    In each of 1,000 resamples the weight of an observation is the number of times that its cluster
    was drawn. Resamples for which the statistic is undefined are left out."""
    number = np.unique(clusters, return_inverse=True)[1]  # of the cluster of each observation
    value, n = statistic(np.ones(len(number))), len(number)
    if value is None:
        return None
    count = int(number.max()) + 1
    if count == 1:
        return Metric(float(value), None, n)
    rng = np.random.default_rng(seed)
    resampled = []
    for _ in range(1000):
        drawn = np.bincount(rng.integers(count, size=count), minlength=count)
        resampled.append(statistic(drawn[number]))
    defined = [value for value in resampled if value is not None]
    if not defined:
        return Metric(float(value), None, n)
    return _with_interval(value, np.percentile(defined, LEVEL), n)


# --- scores of steps against their labels ---


def auroc_metric(
    labels: Numbers, scores: Numbers, clusters: Numbers, seed: int = 0
) -> Metric | None:
    """Area under the ROC curve, 0 to 1 (0.5 is chance), of scores against labels of 0 or 1.

    It is the share of pairs of a 1 and a 0 in which the 1 has the higher score; ties count half. n
    is the number of steps. None if all labels are the same."""
    return _clustered(_auroc(labels, scores), clusters, seed)


def _auroc(labels: Numbers, scores: Numbers) -> Statistic:
    """As sklearn's roc_auc_score, but 0.1 ms a resample instead of 4 ms."""
    is_one = np.asarray(labels) == 1
    # levels: the rank of each score; equal scores share one
    levels = np.unique(scores, return_inverse=True)[1]

    def auroc(weights: np.ndarray) -> float | None:
        ones = np.bincount(levels, weights * is_one)  # weight at each level
        zeros = np.bincount(levels, weights * ~is_one)
        pairs = ones.sum() * zeros.sum()
        return float(ones @ (zeros.cumsum() - zeros / 2) / pairs) if pairs else None

    return auroc


def auroc_difference(
    labels: Numbers, first: Numbers, second: Numbers, clusters: Numbers, seed: int = 0
) -> Metric | None:
    """AUROC of the first scores minus AUROC of the second, on the same steps (paired).

    None if all labels are the same."""
    first_auroc, second_auroc = _auroc(labels, first), _auroc(labels, second)

    def difference(weights: np.ndarray) -> float | None:
        a, b = first_auroc(weights), second_auroc(weights)
        return None if a is None or b is None else a - b

    return _clustered(difference, clusters, seed)


def rollouts_equivalent(
    labels: Numbers, scores: Numbers, right: np.ndarray, clusters: Numbers, seed: int = 0
) -> Metric | None:
    """The number of rollouts that separate right from wrong steps as well as the scores do.

    right: (steps, rollouts) of 0 and 1, whether a rollout after the step ended right. The result is
    the m at which the share of right ones among the first m rollouts has the AUROC of the scores.
    It is interpolated between whole numbers, starting from AUROC 0.5 at m = 0, and is at most the
    number of rollouts. None if all labels are the same."""
    score_auroc = _auroc(labels, scores)
    share_aurocs = [_auroc(labels, right[:, :m].mean(1)) for m in range(1, right.shape[1] + 1)]

    def equivalent(weights: np.ndarray) -> float | None:
        wanted, below = score_auroc(weights), 0.5
        if wanted is None:
            return None
        for m, share_auroc in enumerate(share_aurocs):
            reached = share_auroc(weights) or 0.0
            if reached >= wanted:
                if reached <= below:
                    return float(m)
                return m + max(0.0, (wanted - below) / (reached - below))
            below = max(below, reached)
        return float(len(share_aurocs))

    return _clustered(equivalent, clusters, seed)


def accuracy_metric(
    labels: Numbers, scores: Numbers, clusters: Numbers, seed: int = 0, threshold: float = 0.5
) -> Metric:
    """The share of steps for which `score >= threshold` agrees with the label."""
    agrees = (np.asarray(scores) >= threshold) == (np.asarray(labels) == 1)
    return clustered_mean_metric(agrees, clusters, seed)


def kappa_metric(
    labels: Numbers, scores: Numbers, clusters: Numbers, seed: int = 0, threshold: float = 0.5
) -> Metric | None:
    """Cohen's kappa (1960), -1 to 1 (0 is chance): how far `score >= threshold` agrees with labels.

    n is the number of steps. None if both sides give the same verdict on every step."""
    is_right, called_right = np.asarray(labels) == 1, np.asarray(scores) >= threshold

    def kappa(weights: np.ndarray) -> float | None:
        agree, a, b = (
            np.average(values, weights=weights)
            for values in (is_right == called_right, is_right, called_right)
        )
        by_chance = a * b + (1 - a) * (1 - b)
        return (agree - by_chance) / (1 - by_chance) if by_chance < 1 else None

    return _clustered(kappa, clusters, seed)


def brier_metric(labels: Numbers, scores: Numbers, clusters: Numbers, seed: int = 0) -> Metric:
    """Brier score, 0 (best) to 1: the mean squared difference of score and label."""
    return clustered_mean_metric((np.asarray(scores) - np.asarray(labels)) ** 2, clusters, seed)


def calibration_metric(
    labels: Numbers, scores: Numbers, clusters: Numbers, seed: int = 0, equal_mass: bool = False
) -> Metric:
    """Expected calibration error, 0 (best) to 1 (Naeini et al. 2015; Guo et al. 2017, eq. 3).

    It is the absolute difference of mean score and mean label within a bin, averaged over the
    steps. There are ten bins of equal width or, with `equal_mass`, of equal numbers of steps; equal
    scores share a bin. Noise increases this error, and a resample adds noise once more. The
    interval is therefore the reversed one (2 ECE - percentiles); below about 0.02 it is still too
    short."""
    array = np.asarray(scores, dtype=float)
    gaps, bins = array - np.asarray(labels), _bins(array, equal_mass)

    def error(weights: np.ndarray) -> float:
        return float(np.abs(np.bincount(bins, weights=weights * gaps)).sum() / weights.sum())

    metric = _clustered(error, clusters, seed)
    if not metric.ci95:
        return metric
    ends = [max(0.0, 2 * metric.value - end) for end in reversed(metric.ci95)]
    return _with_interval(metric.value, ends, metric.n)


def reliability(
    labels: Numbers, scores: Numbers, clusters: Numbers, seed: int = 0, equal_mass: bool = False
) -> list[Bin]:
    """The bins of `calibration_metric` that hold at least one step."""
    label_array, cluster_array = np.asarray(labels), np.asarray(clusters)
    score_array = np.asarray(scores, dtype=float)
    bins = _bins(score_array, equal_mass)
    found = []
    for k in np.unique(bins):
        inside = score_array[bins == k]
        low, high = k / BINS, (k + 1) / BINS
        if equal_mass:
            low, high = float(inside.min()), float(inside.max())
        right = clustered_mean_metric(label_array[bins == k], cluster_array[bins == k], seed)
        found.append(Bin(low, high, float(inside.mean()), right))
    return found


def _bins(scores: np.ndarray, equal_mass: bool) -> np.ndarray:
    """The bin of each score, 0 to BINS - 1."""
    if equal_mass:
        edges = np.quantile(scores, np.arange(1, BINS) / BINS)
        return np.asarray(np.searchsorted(edges, scores, side="left"))
    return np.minimum((scores * BINS).astype(int), BINS - 1)  # a score of 1 is in the last bin


# --- ProcessBench ---


def first_error(labels: Sequence[float | None]) -> int | None:
    """The index of the first step labelled wrong (0), or -1 if all are right, as in ProcessBench.

    None if it is unknown: a step before the first error, or of a solution without one, has no
    label."""
    for k, label in enumerate(labels):
        if label is None:
            return None
        if label == 0:
            return k
    return -1


def reported_error(scores: Sequence[float], threshold: float) -> int:
    """The index of the first step with a score below the threshold, or -1."""
    return next((k for k, score in enumerate(scores) if score < threshold), -1)


def processbench_metrics(
    labels: Sequence[Sequence[float | None]],
    scores: Sequence[Sequence[float]],
    clusters: Sequence[int],
    seed: int = 0,
    threshold: float = 0.5,
) -> dict[str, Metric]:
    """The metrics of ProcessBench (Zheng et al. 2024, arXiv 2412.06559) for whole solutions.

    The judge reports the first step whose score is below the threshold (the authors chose it on one
    subset for all others). clusters: the problem of each solution. `processbench_error_accuracy`:
    share of solutions with an error whose first error is reported exactly;
    `processbench_correct_accuracy`: share of solutions without an error for which none is reported;
    `processbench_f1`: their harmonic mean, 0 to 1. Solutions whose first error is unknown
    (`first_error`) do not count. A kind of which there are no solutions has no metric, and then
    there is no F1."""
    known = [
        (truth, reported_error(solution_scores, threshold), cluster)
        for solution_labels, solution_scores, cluster in zip(labels, scores, clusters, strict=True)
        if (truth := first_error(solution_labels)) is not None
    ]
    if not known:
        return {}
    truth, reported, problems = np.array(known).T
    found, wrong = (truth == reported).astype(float), truth >= 0

    def f1(weights: np.ndarray) -> float | None:
        if not weights[wrong].any() or not weights[~wrong].any():
            return None
        a, b = (np.average(found[part], weights=weights[part]) for part in (wrong, ~wrong))
        return float(2 * a * b / (a + b)) if a + b else 0.0

    metrics = {}
    for name, part in (("error", wrong), ("correct", ~wrong)):
        if part.any():
            accuracy = clustered_mean_metric(found[part], problems[part], seed)
            metrics[f"processbench_{name}_accuracy"] = accuracy
    if f1_metric := _clustered(f1, problems, seed):
        metrics["processbench_f1"] = f1_metric
    return metrics


def best_threshold(
    labels: Sequence[Sequence[float | None]], scores: Sequence[Sequence[float]]
) -> tuple[float, float]:
    """The threshold with the highest ProcessBench F1, in steps of 0.05, and that F1.

    Use the threshold on other data. There must be solutions with an error and solutions without
    one."""

    def f1(threshold: float) -> float:
        found: dict[bool, list[bool]] = {True: [], False: []}
        for solution_labels, solution_scores in zip(labels, scores, strict=True):
            truth = first_error(solution_labels)
            if truth is not None:
                found[truth >= 0].append(reported_error(solution_scores, threshold) == truth)
        wrong, right = (sum(exact) / len(exact) for exact in found.values())
        return 2 * wrong * right / (wrong + right) if wrong + right else 0.0

    best = max((k / 20 for k in range(1, 20)), key=f1)
    return best, f1(best)


# --- selection among samples, and ranking of models ---


def best_of_n(scores: Sequence[Sequence[float]], correct: Sequence[Sequence[float]]) -> list[float]:
    """For every problem the exact accuracy, 0 to 1, of the sample with the highest score.

    Of several highest scores it is the mean of their samples. `scores` and `correct` (0 or 1) have
    one list a problem, one value a sample. Equal scores for all give the mean of the samples
    (chance), and `correct` as the scores gives 1 where any sample is right (the oracle)."""
    accuracies = []
    for values, right in zip(scores, correct, strict=True):
        best = [r for value, r in zip(values, right, strict=True) if value == max(values)]
        accuracies.append(sum(best) / len(best))
    return accuracies


def spearman_metric(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], seed: int = 0
) -> Metric | None:
    """Spearman's rank correlation, -1 to 1, between the means of two measures of the same models.

    first, second: (models, problems). The bootstrap draws problems; n is their number. None for
    fewer than three models, or if a measure is the same for all of them."""
    from scipy.stats import spearmanr  # slow to import

    measures = np.asarray([first, second], dtype=float)  # (2, models, problems)

    def correlation(weights: np.ndarray) -> float | None:
        totals = (measures * weights).sum(2)
        return float(spearmanr(*totals).statistic) if np.ptp(totals, axis=1).all() else None

    return _clustered(correlation, range(measures.shape[2]), seed) if len(first) > 2 else None
