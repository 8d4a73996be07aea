"""How far the people (or models) who ranked the same answers agree."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from evaluation.metrics import Metric, mean_metric
from reasoning.datasets.ranking import RankedResponse, groups


@dataclass(frozen=True)
class Agreement:
    """How far rankers agree on the prompts that they all ranked."""

    rankers: tuple[str, ...]
    prompts: int  # ranked by each of them
    # Kendall's tau-b of two rankers within a prompt, -1 to 1, mean over prompts; n: where it is defined
    tau: Metric | None
    # Krippendorff's alpha, ordinal, of answers that two or more of them ranked; at most 1, 0 is chance
    alpha: float | None


def agreement(rows: Sequence[RankedResponse]) -> list[Agreement]:
    """One for each two rankers with a prompt in common, and one for all of them if they are more than two.

    Tau-b (Kendall 1945, by scipy) is not defined where a ranker puts all answers of a prompt on one rank: such prompts are left out
    of it. Alpha (Krippendorff 2004, by krippendorff) takes an answer for a unit and counts ranks that are tied as their mean, so
    that 1,2,2,4 and 1,2,2,3 are the same; it is None where there is nothing to compare."""
    from scipy.stats import kendalltau, rankdata

    # ranker -> prompt -> answer -> rank
    ranks: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for (prompt, ranker), group in groups(rows).items():
        shared = rankdata([row.rank for row in group], method="average")
        ranks[ranker][prompt] = dict(
            zip((row.answer for row in group), map(float, shared), strict=True)
        )
    found = []
    for one, other in combinations(sorted(ranks), 2):
        prompts = [prompt for prompt in ranks[one] if prompt in ranks[other]]
        taus = []
        for prompt in prompts:
            answers = [answer for answer in ranks[one][prompt] if answer in ranks[other][prompt]]
            pair = [[ranks[who][prompt][answer] for answer in answers] for who in (one, other)]
            if all(len(set(of_one)) > 1 for of_one in pair):
                taus.append(kendalltau(*pair).statistic)
        if prompts:
            both = {who: ranks[who] for who in (one, other)}
            found.append(
                Agreement(
                    (one, other),
                    len(prompts),
                    mean_metric(taus) if taus else None,
                    _alpha(both, set(prompts)),
                )
            )
    if len(ranks) > 2 and found:
        every = set.intersection(*(set(of_ranker) for of_ranker in ranks.values()))
        found.append(Agreement(tuple(sorted(ranks)), len(every), None, _alpha(ranks)))
    return found


def _alpha(
    ranks: dict[str, dict[str, dict[str, float]]], prompts: set[str] | None = None
) -> float | None:
    import krippendorff
    import numpy as np

    units: dict[tuple[str, str], int] = {}
    for of_ranker in ranks.values():
        for prompt, answers in of_ranker.items():
            for answer in answers if prompts is None or prompt in prompts else ():
                units.setdefault((prompt, answer), len(units))
    table = np.full((len(ranks), len(units)), np.nan)  # (rankers, answers)
    for k, of_ranker in enumerate(ranks.values()):
        for prompt, answers in of_ranker.items():
            for answer, rank in answers.items():
                if (prompt, answer) in units:
                    table[k, units[prompt, answer]] = rank
    shared = (~np.isnan(table)).sum(0) >= 2
    if not shared.any() or len(np.unique(table[:, shared][~np.isnan(table[:, shared])])) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=table, level_of_measurement="ordinal"))


AGREEMENT_COLUMNS = ("rankers", "prompts", "Kendall's tau", "n", "Krippendorff's alpha")


def agreement_rows(rows: Sequence[RankedResponse]) -> list[tuple[str, ...]]:
    """The table of `agreement`, a text a cell."""
    table = []
    for found in agreement(rows):
        who = (
            " and ".join(ranker or "(no name)" for ranker in found.rankers)
            if len(found.rankers) == 2
            else "all"
        )
        tau, n = (str(found.tau), str(found.tau.n)) if found.tau else ("-", "-")
        table.append(
            (who, str(found.prompts), tau, n, "-" if found.alpha is None else f"{found.alpha:z.3f}")
        )
    return table
