"""Controls that must fail: the same numbers without what they know."""

import random
from collections.abc import Sequence


def shuffle_scores(scores: Sequence[Sequence[float]], seed: int) -> list[list[float]]:
    """The same scores, permuted over all steps of all solutions; each solution keeps its number of steps."""
    pool = [score for solution in scores for score in solution]
    random.Random(seed).shuffle(pool)
    drawn = iter(pool)
    return [[next(drawn) for _ in solution] for solution in scores]
