"""Numbers with their uncertainty, the file they are kept in and the table they are shown in."""

import json
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from common.files import write_text

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "ctransformers",
    "numpy",
    "scipy",
    "scikit-learn",
)
LEVEL = (2.5, 97.5)  # percentiles of a 95 % interval
BINS = 10  # of scores


# One metric of evaluation/results/*.json:
#   "tuned_accuracy": {"value": 0.615,           rates are 0 to 1, never percent
#                      "ci95": [0.593, 0.636],   95 % interval; null where one observation is all there is
#                      "n": 2000}                observations: problems, pairs or steps
@dataclass(frozen=True)
class Metric:
    value: float
    ci95: list[float] | None
    n: int

    def __str__(self) -> str:
        # z: no -0.000
        return f"{self.value:z.3f}" + (
            f" [{self.ci95[0]:z.3f}, {self.ci95[1]:z.3f}]" if self.ci95 else ""
        )


def _metric(value: float, low: float, high: float, n: int) -> Metric:
    # A resample that is the sample may differ from it in the last bit.
    return Metric(float(value), [min(float(low), float(value)), max(float(high), float(value))], n)


def mean_metric(values: Sequence[float], seed: int = 0) -> Metric:
    """The mean with its bootstrap interval (percentile, 5,000 resamples). Of paired differences this is the paired bootstrap.

    Values that are all the same have an interval of no width; a single one has none. Raises ValueError if there are none."""
    from scipy.stats import bootstrap

    values = np.asarray(values, dtype=float)
    if not len(values):
        raise ValueError("no values: nothing to average")
    if len(values) == 1:
        return Metric(float(values[0]), None, 1)
    rng = np.random.default_rng(seed)
    interval = bootstrap(
        (values,), np.mean, n_resamples=5000, batch=500, method="percentile", rng=rng
    ).confidence_interval
    return _metric(values.mean(), *interval, len(values))


def rate_metric(values: Sequence[float]) -> Metric:
    """The share of ones among zeros and ones with its Wilson interval, which stays honest at 0 and 1.

    Raises ValueError if there are none or one is neither."""
    from scipy.stats import binomtest

    if not set(values) <= {0, 1}:
        raise ValueError("a rate is a share of ones among zeros and ones")
    interval = binomtest(int(sum(values)), len(values)).proportion_ci(method="wilson")
    return _metric(sum(values) / len(values), *interval, len(values))


def compare(
    name: str, base: Sequence[float], tuned: Sequence[float], is_rate: bool = False, seed: int = 0
) -> dict[str, Metric]:
    """base_NAME, tuned_NAME and NAME_improvement, the mean of tuned minus base over the same problems (paired bootstrap)."""
    of = rate_metric if is_rate else lambda values: mean_metric(values, seed)
    difference = [after - before for before, after in zip(base, tuned, strict=True)]
    return {
        f"base_{name}": of(base),
        f"tuned_{name}": of(tuned),
        f"{name}_improvement": mean_metric(difference, seed),
    }


def auroc_metric(
    labels: Sequence[float], scores: Sequence[float], clusters: Sequence[int], seed: int = 0
) -> Metric | None:
    """Area under the ROC curve, 0 to 1 (0.5 is chance), of scores against labels of 0 or 1; n is the number of steps.

    It is the share of pairs of a 1 and a 0 in which the 1 scores higher, ties half (sklearn's roc_auc_score, which takes 4 ms a
    resample where this takes 0.1). Steps of one solution are not independent, so the bootstrap draws whole clusters. None if all
    labels are the same."""
    return (
        _clustered(_auroc(labels, scores), clusters, seed)
        if len({label == 1 for label in labels}) == 2
        else None
    )


def _auroc(
    labels: Sequence[float], scores: Sequence[float]
) -> Callable[[np.ndarray], float | None]:
    labels = np.asarray(labels) == 1
    # the rank of each score; equal ones share it
    levels = np.unique(scores, return_inverse=True)[1]

    def auroc(weights: np.ndarray) -> float | None:
        # weight at each level
        ones, zeros = (
            np.bincount(levels, weights * labels),
            np.bincount(levels, weights * ~labels),
        )
        pairs = ones.sum() * zeros.sum()
        return float(ones @ (zeros.cumsum() - zeros / 2) / pairs) if pairs else None

    return auroc


def auroc_difference(
    labels: Sequence[float],
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[int],
    seed: int = 0,
) -> Metric | None:
    """AUROC of the first scores minus that of the second, of the same steps (paired); None if all labels are the same."""
    one, other = _auroc(labels, first), _auroc(labels, second)

    def difference(weights: np.ndarray) -> float | None:
        value = one(weights)
        return None if value is None else value - other(weights)

    return (
        _clustered(difference, clusters, seed)
        if len({label == 1 for label in labels}) == 2
        else None
    )


def equal_rollouts(
    labels: Sequence[float],
    scores: Sequence[float],
    right: np.ndarray,
    clusters: Sequence[int],
    seed: int = 0,
) -> Metric | None:
    """How many rollouts tell right from wrong steps as well as the scores do: the number m at which the share of right ones among
    the first m of a step's rollouts, `right` (steps, rollouts) of 0 and 1, has the AUROC of the scores. Between whole numbers it
    is interpolated; no rollout has 0.5; where all of them do worse it is their number. None if all labels are the same."""
    of_scores = _auroc(labels, scores)
    estimates = [_auroc(labels, right[:, :m].mean(1)) for m in range(1, right.shape[1] + 1)]

    def equal(weights: np.ndarray) -> float | None:
        wanted, below = of_scores(weights), 0.5
        if wanted is None:
            return None
        for m, estimate in enumerate(estimates):
            reached = estimate(weights)
            if reached >= wanted:
                return (
                    m + max(0.0, (wanted - below) / (reached - below))
                    if reached > below
                    else float(m)
                )
            below = max(below, reached)
        return float(len(estimates))

    return _clustered(equal, clusters, seed) if len({label == 1 for label in labels}) == 2 else None


def accuracy_metric(
    labels: Sequence[float],
    scores: Sequence[float],
    clusters: Sequence[int],
    seed: int = 0,
    threshold: float = 0.5,
) -> Metric:
    """Share of steps that the threshold decides as the label does; clusters as in `auroc_metric`."""
    right = (np.asarray(scores) >= threshold) == (np.asarray(labels) == 1)
    return clustered_mean_metric(right, clusters, seed)


def clustered_mean_metric(
    values: Sequence[float], clusters: Sequence[int], seed: int = 0
) -> Metric:
    """The mean of values of which those in one cluster, such as the steps of one problem, are not independent."""
    values = np.asarray(values, dtype=float)
    return _clustered(lambda weights: float(np.average(values, weights=weights)), clusters, seed)


def brier_metric(
    labels: Sequence[float], scores: Sequence[float], clusters: Sequence[int], seed: int = 0
) -> Metric:
    """Brier score: the mean squared distance of a score from its label, 0 (best) to 1; clusters as in `auroc_metric`."""
    return clustered_mean_metric((np.asarray(scores) - np.asarray(labels)) ** 2, clusters, seed)


def calibration_metric(
    labels: Sequence[float],
    scores: Sequence[float],
    clusters: Sequence[int],
    seed: int = 0,
    equal_mass: bool = False,
) -> Metric:
    """Expected calibration error, 0 (best) to 1: the distance between mean score and mean label (the share of right steps) within a
    bin, averaged over the steps (Naeini et al. 2015; Guo et al. 2017, eq. 3). Ten bins of equal width or, with `equal_mass`, of as
    many steps each; equal scores share a bin.

    Noise adds to it, and in a resample once more. So the interval is the reversed one (2 ECE - percentiles), which takes that out
    but is still too short below 0.02 or so. Clusters as in `auroc_metric`."""
    scores = np.asarray(scores, dtype=float)
    gaps, bins = scores - np.asarray(labels), _bins(scores, equal_mass)

    def error(weights: np.ndarray) -> float:
        return float(np.abs(np.bincount(bins, weights=weights * gaps)).sum() / weights.sum())

    metric = _clustered(error, clusters, seed)
    if not metric.ci95:
        return metric
    return _metric(
        metric.value, *(max(0.0, 2 * metric.value - end) for end in reversed(metric.ci95)), metric.n
    )


def reliability(
    labels: Sequence[float],
    scores: Sequence[float],
    clusters: Sequence[int],
    seed: int = 0,
    equal_mass: bool = False,
) -> list[dict]:
    """The bins of `calibration_metric` that hold a step: `low` and `high` (of the bin or, with `equal_mass`, of its scores),
    `score` (the mean of its scores) and `right` (a Metric: the mean of its labels, the share of right steps)."""
    labels, scores, clusters = (
        np.asarray(labels),
        np.asarray(scores, dtype=float),
        np.asarray(clusters),
    )
    bins = _bins(scores, equal_mass)
    rows = []
    for k in np.unique(bins):
        right, here = (
            clustered_mean_metric(labels[bins == k], clusters[bins == k], seed),
            scores[bins == k],
        )
        low, high = (
            (float(here.min()), float(here.max())) if equal_mass else (k / BINS, (k + 1) / BINS)
        )
        rows.append({"low": low, "high": high, "score": float(here.mean()), "right": right})
    return rows


def _bins(scores: np.ndarray, equal_mass: bool) -> np.ndarray:
    if equal_mass:
        return np.searchsorted(np.quantile(scores, np.arange(1, BINS) / BINS), scores, side="left")
    return np.minimum((scores * BINS).astype(int), BINS - 1)  # a score of 1 belongs to the last bin


def first_error(labels: Sequence[float | None]) -> int | None:
    """The index of the first step labelled wrong (0), -1 if all are right, as ProcessBench writes it. None if it cannot be known
    because a step before it, or of a solution without one, has no label."""
    for k, label in enumerate(labels):
        if label is None:
            return None
        if label == 0:
            return k
    return -1


def processbench_metrics(
    labels: Sequence[Sequence[float | None]],
    scores: Sequence[Sequence[float]],
    clusters: Sequence[int],
    seed: int = 0,
    threshold: float = 0.5,
) -> dict[str, Metric]:
    """What ProcessBench measures (Zheng et al. 2024, arXiv 2412.06559), of labels and scores of the steps of whole solutions; the
    judge reports the first step that it scores below the threshold, which the authors chose on one subset for all others. Clusters:
    the problem of each solution.

    `processbench_error_accuracy`: share of the solutions with an error whose first one is reported exactly;
    `processbench_correct_accuracy`: share of those without in which none is; `processbench_f1`: their harmonic mean, 0 to 1. A part
    that has no solutions is left out, and F1 with it; solutions whose first error is not known (`first_error`) do not count."""
    known = [
        (first_error(row), row_scores, cluster)
        for row, row_scores, cluster in zip(labels, scores, clusters, strict=True)
    ]
    known = [row for row in known if row[0] is not None]
    truth = np.array([row[0] for row in known])
    reported = np.array(
        [next((k for k, score in enumerate(row[1]) if score < threshold), -1) for row in known]
    )
    problems = np.array([row[2] for row in known])
    found, wrong = (truth == reported).astype(float), truth >= 0

    def f1(weights: np.ndarray) -> float | None:
        if not weights[wrong].any() or not weights[~wrong].any():
            return None
        both = (
            np.average(found[wrong], weights=weights[wrong]),
            np.average(found[~wrong], weights=weights[~wrong]),
        )
        return float(2 * both[0] * both[1] / sum(both)) if sum(both) else 0.0

    metrics = {}
    for name, part in (("error", wrong), ("correct", ~wrong)):
        if part.any():
            metrics[f"processbench_{name}_accuracy"] = clustered_mean_metric(
                found[part], problems[part], seed
            )
    if len(metrics) == 2:
        metrics["processbench_f1"] = _clustered(f1, problems, seed)
    return metrics


def best_threshold(
    labels: Sequence[Sequence[float | None]], scores: Sequence[Sequence[float]]
) -> tuple[float, float]:
    """The threshold, in twentieths, at which ProcessBench's F1 is highest, and that F1: to be used on other data. Of solutions with
    an error and without, some of each."""

    def f1(threshold: float) -> float:
        counts: dict[bool, list[bool]] = {True: [], False: []}
        for row, of_row in zip(labels, scores, strict=True):
            truth = first_error(row)
            if truth is not None:
                found = next((k for k, score in enumerate(of_row) if score < threshold), -1)
                counts[truth >= 0].append(found == truth)
        wrong, right = (sum(found) / len(found) for found in counts.values())
        return 2 * wrong * right / (wrong + right) if wrong + right else 0.0

    best = max((k / 20 for k in range(1, 20)), key=f1)
    return best, f1(best)


def best_of_n(scores: Sequence[Sequence[float]], correct: Sequence[Sequence[float]]) -> list[float]:
    """For every problem the exact accuracy, 0 to 1, of the sample with the highest score; of several equally high ones their mean.

    `scores` and `correct` (0 or 1) have one list a problem, one value a sample. With scores that are all the same it is the mean
    of the samples (chance), with `correct` as the scores it is 1 where any is right (the oracle)."""
    accuracies = []
    for values, right in zip(scores, correct, strict=True):
        best = [r for value, r in zip(values, right, strict=True) if value == max(values)]
        accuracies.append(sum(best) / len(best))
    return accuracies


def spearman_metric(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], seed: int = 0
) -> Metric | None:
    """Spearman's rank correlation, -1 to 1, between the means of two measures of the same models, (models, problems) each; the
    interval is over problems, n their number. None for fewer than three models, or if a measure is the same for all of them."""
    from scipy.stats import spearmanr

    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)

    def correlation(weights: np.ndarray) -> float | None:
        ends = (first * weights).sum(1), (second * weights).sum(1)
        return float(spearmanr(*ends).statistic) if all(np.ptp(end) > 0 for end in ends) else None

    count = first.shape[1]
    if len(first) < 3 or correlation(np.ones(count)) is None:
        return None
    return _clustered(correlation, np.arange(count), seed)


def _clustered(
    statistic: Callable[[np.ndarray], float | None], clusters: Sequence[int], seed: int
) -> Metric:
    """A statistic of weighted steps with its cluster bootstrap interval: in each of 1,000 resamples a step weighs as often as its
    cluster was drawn; resamples in which the statistic is undefined (None) are left out."""
    clusters = np.unique(clusters, return_inverse=True)[1]
    count = int(clusters.max()) + 1
    value = statistic(np.ones(len(clusters)))
    if count == 1:
        return Metric(float(value), None, len(clusters))
    rng = np.random.default_rng(seed)
    weights = (
        np.bincount(rng.integers(count, size=count), minlength=count)[clusters] for _ in range(1000)
    )
    drawn = [resampled for weight in weights if (resampled := statistic(weight)) is not None]
    if not drawn:
        return Metric(float(value), None, len(clusters))
    return _metric(value, *np.percentile(drawn, LEVEL), len(clusters))


def commit() -> str | None:
    """The commit of the repository, `-dirty` if tracked files differ from it; None without git."""
    command = [
        "git",
        "-C",
        str(ROOT),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            if (ROOT / ".git").exists()
            else None
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_result(
    path: str | Path, metrics: dict[str, Metric], config: dict, seeds: Sequence[int], **more: object
) -> None:
    """Write a Result as JSON, whole or not at all; `more` are further keys in front. Raises ValueError if a number is nan."""
    result = {
        **more,
        "metrics": {name: asdict(metric) for name, metric in metrics.items()},
        "config": config,
        "seeds": list(seeds),
        "commit": commit(),
        "versions": versions(),
    }
    write_text(path, [json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"])


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on the terminal that is Markdown as well."""
    from rich.box import MARKDOWN
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=MARKDOWN)
    for row in rows:
        table.add_row(*map(str, row))
    console = Console(markup=False, highlight=False, emoji=False)
    # a row is a line, also where nobody looks at a terminal
    console.width = max(console.width, 160)
    console.print(title, "", sep="\n", soft_wrap=True)
    console.print(table)


def print_comparison(title: str, metrics: dict[str, Metric]) -> None:
    """The table base | tuned | difference of what `compare` gave."""
    names = [name.removesuffix("_improvement") for name in metrics if name.endswith("_improvement")]
    rows = [
        (
            name,
            metrics[f"base_{name}"],
            metrics[f"tuned_{name}"],
            metrics[f"{name}_improvement"],
            metrics[f"{name}_improvement"].n,
        )
        for name in names
    ]
    print_table(title, ["metric", "base", "tuned", "difference", "n"], rows)


def kappa_metric(
    labels: Sequence[float],
    scores: Sequence[float],
    clusters: Sequence[int],
    seed: int = 0,
    threshold: float = 0.5,
) -> Metric | None:
    """Cohen's kappa (1960), -1 to 1 (0 is what chance gives): do two raters of the same steps, labels of 0 or 1 and scores cut at
    the threshold, agree? n is the number of steps; clusters as in `auroc_metric`. None if both say the same of every step."""
    labels, decided = np.asarray(labels) == 1, np.asarray(scores) >= threshold

    def kappa(weights: np.ndarray) -> float | None:
        agree, a, b = (
            np.average(values, weights=weights) for values in (labels == decided, labels, decided)
        )
        by_chance = a * b + (1 - a) * (1 - b)
        return (agree - by_chance) / (1 - by_chance) if by_chance < 1 else None

    return _clustered(kappa, clusters, seed) if len({*labels, *decided}) == 2 else None
