"""Warnings about scores that cannot tell right from wrong, with their numbers."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from math import sqrt
from statistics import fmean, pstdev, stdev

from common.cli import warn
from reasoning.records import PreferencePair
from reward_model.protocols import mean

ALIKE = 0.01  # standard deviation of scores that tell nothing apart
FEW = 10  # fewer scores can be alike by chance
ADVICE = (
    "what to do: give another --judge or --judge_path, or for a language model its own "
    "--judge_template; evaluation/eval_judge.py measures a judge on labelled steps"
)


def alike(scores: Sequence[float]) -> str:
    """Why the scores tell nothing apart, or nothing if they do: all are nearly the same."""
    if len(scores) < FEW or pstdev(scores) >= ALIKE:
        return ""
    return (
        f"all scores are alike, {min(scores):.3f} to {max(scores):.3f} (standard deviation "
        f"{pstdev(scores):.4f}, n = {len(scores)}), so they tell nothing apart"
    )


def not_above(pairs: Sequence[PreferencePair]) -> str:
    """Why the scores do not tell chosen from rejected, or nothing if they do: the 95 % interval of
    the difference of their means is above 0.

    The interval is Student's, over prompts, because pairs of one prompt are no separate evidence.
    pairs: with scores."""
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for pair in pairs:
        difference = mean(pair.chosen_scores or []) - mean(pair.rejected_scores or [])
        by_prompt[pair.prompt].append(difference)
    differences = [fmean(values) for values in by_prompt.values()]
    n, value, interval, low = len(differences), fmean(differences), "no interval", 0.0
    if n > 1:
        from scipy.stats import t  # slow to import

        half = t.ppf(0.975, n - 1) * stdev(differences) / sqrt(n)
        low = value - half
        interval = f"95 % interval {low:.3f} to {value + half:.3f}"
    if (low if n > 1 else value) > 0:
        return ""
    numbers = f"mean difference {value:.3f}, {interval}, n = {n} prompt{'s' * (n > 1)}"
    if value > 0:
        return f"chosen is not clearly scored above rejected ({numbers}): too few pairs or too weak"
    return f"chosen is not scored above rejected ({numbers}): training would learn from noise"


def warn_of_scores(scores: Sequence[float], advice: str = ADVICE) -> None:
    """Warn on stderr if all scores are alike."""
    if reason := alike(scores):
        warn(reason, advice)


def warn_of_pair_scores(pairs: Sequence[PreferencePair]) -> None:
    """Warn on stderr if the scores do not tell the two sides of pairs apart. pairs: with scores."""
    sides = ((*(pair.chosen_scores or []), *(pair.rejected_scores or [])) for pair in pairs)
    reasons = [reason for reason in (alike([*chain(*sides)]), not_above(pairs)) if reason]
    if reasons:
        warn(reasons[0], *reasons[1:], ADVICE)
