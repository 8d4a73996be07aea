"""Agreement between the people or models that ranked the same answers."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import krippendorff
import numpy as np

from evaluation.metrics import Metric, mean_metric
from reasoning.datasets.ranking import RankedResponse, groups

# ranker -> prompt -> answer -> rank; tied answers have the mean of their ranks
Ranks = dict[str, dict[str, dict[str, float]]]

AGREEMENT_COLUMNS = ("rankers", "prompts", "Kendall's tau", "n", "Krippendorff's alpha")


@dataclass(frozen=True)
class Agreement:
    """How far rankers agree on the prompts that all of them ranked.

    prompts: their number. tau: Kendall's tau-b of two rankers within a prompt, -1 to 1, mean over
    the prompts where it is defined. alpha: Krippendorff's ordinal alpha over the answers that two
    or more of them ranked, at most 1 (0 is chance)."""

    rankers: tuple[str, ...]
    prompts: int
    tau: Metric | None
    alpha: float | None


def agreement(rows: Sequence[RankedResponse]) -> list[Agreement]:
    """One Agreement for each two rankers with a common prompt, and one for all if they are more.

    Tau-b (Kendall 1945, by scipy) is not defined where a ranker gives all answers of a prompt the
    same rank; such prompts do not count for it. Alpha (Krippendorff 2004, by krippendorff) has
    answers as units. Tied ranks count as their mean, so 1,2,2,4 equals 1,2,2,3. It is None if there
    is nothing to compare."""
    from scipy.stats import kendalltau, rankdata  # slow to import

    ranks: Ranks = defaultdict(dict)
    for (prompt, ranker), group in groups(rows).items():
        means = map(float, rankdata([row.rank for row in group], method="average"))
        ranks[ranker][prompt] = {row.answer: rank for row, rank in zip(group, means, strict=True)}
    found = []
    for first, second in combinations(sorted(ranks), 2):
        pair = {ranker: ranks[ranker] for ranker in (first, second)}
        prompts = [prompt for prompt in ranks[first] if prompt in ranks[second]]
        taus = []
        for prompt in prompts:
            a, b = ranks[first][prompt], ranks[second][prompt]
            answers = [answer for answer in a if answer in b]
            numbers = [[ranking[answer] for answer in answers] for ranking in (a, b)]
            if all(len(set(ranking)) > 1 for ranking in numbers):
                taus.append(kendalltau(*numbers).statistic)
        if prompts:
            tau = mean_metric(taus) if taus else None
            alpha = _alpha(pair, set(prompts))
            found.append(Agreement((first, second), len(prompts), tau, alpha))
    if len(ranks) > 2 and found:
        common = set.intersection(*(set(by_prompt) for by_prompt in ranks.values()))
        found.append(Agreement(tuple(sorted(ranks)), len(common), None, _alpha(ranks)))
    return found


def _alpha(ranks: Ranks, prompts: set[str] | None = None) -> float | None:
    """Krippendorff's alpha, over all prompts or over some."""
    units: dict[tuple[str, str], int] = {}
    cells = []
    for k, by_prompt in enumerate(ranks.values()):
        for prompt, by_answer in by_prompt.items():
            if prompts is None or prompt in prompts:
                for answer, rank in by_answer.items():
                    cells.append((k, units.setdefault((prompt, answer), len(units)), rank))
    table = np.full((len(ranks), len(units)), np.nan)  # (rankers, answers)
    for ranker, unit, rank in cells:
        table[ranker, unit] = rank
    shared = table[:, (~np.isnan(table)).sum(0) >= 2]
    if len(np.unique(shared[~np.isnan(shared)])) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=table, level_of_measurement="ordinal"))


def agreement_rows(rows: Sequence[RankedResponse]) -> list[tuple[str, ...]]:
    """The table of `agreement`: cells as text, in the order of AGREEMENT_COLUMNS."""
    table: list[tuple[str, ...]] = []
    for found in agreement(rows):
        rankers = "all"
        if len(found.rankers) == 2:
            rankers = " and ".join(ranker or "(no name)" for ranker in found.rankers)
        tau, n = (str(found.tau), str(found.tau.n)) if found.tau else ("-", "-")
        alpha = "-" if found.alpha is None else f"{found.alpha:z.3f}"
        table.append((rankers, str(found.prompts), tau, n, alpha))
    return table
