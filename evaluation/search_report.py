"""Accuracy and cost of guided search: the metrics of evaluation/eval_search.py and their tables."""

import math
from pathlib import Path

import numpy as np

from evaluation.metrics import Metric, mean_metric, paired_difference, rate_metric
from evaluation.results import print_table
from evaluation.search_measurement import Outcomes, SearchArgs, Setting


def trend(outcomes: dict[int, Outcomes], seed: int) -> tuple[Metric, float | None]:
    """The accuracy gained when n is multiplied by 4, and the p-value of Page's trend test.

    outcomes: by n. The gain is the mean slope over log4(n), with its interval over problems. The
    test (Page 1963) is that accuracy rises with n; ties, which outcomes of 0 and 1 have, make it
    conservative. No p-value for fewer than three n."""
    from scipy.stats import page_trend_test  # slow to import

    correct = np.array([outcomes[n].correct for n in sorted(outcomes)]).T  # (problems, n)
    places = np.log(sorted(outcomes)) / np.log(4)
    places = places - places.mean()
    gain = mean_metric(correct @ places / (places @ places), seed)
    if correct.shape[1] < 3 or len(correct) < 2:
        return gain, None
    return gain, float(page_trend_test(correct, method="asymptotic").pvalue)


def matched_budget(votes: dict[int, Outcomes], outcomes: Outcomes) -> int:
    """The n of the majority vote with the nearest number of tokens, by ratio. votes: by n."""
    tokens = max(1, sum(outcomes.tokens))
    return min(votes, key=lambda n: abs(math.log(max(1, sum(votes[n].tokens)) / tokens)))


class Report:
    """The metrics of all splits, and the rows of their tables.

    The keys of a search are SPLIT/POLICY/STRATEGY/N. matched_n: key -> n of the majority vote with
    the same token budget. trend_p: key of a trend -> p-value. left_out: key -> proposals that the
    judge could not score."""

    def __init__(self, args: SearchArgs, aggregates: dict[str, str | None]) -> None:
        self.args, self.aggregates = args, aggregates
        self.policy = Path(args.model_name_or_path).name
        self.other = Path(args.other_model).name if args.other_model else None
        self.keys: list[str] = []
        self.metrics: dict[str, Metric] = {}
        self.matched_n: dict[str, int] = {}
        self.trend_p: dict[str, float | None] = {}
        self.left_out: dict[str, int] = {}

    def add(
        self,
        split: str,
        found: dict[Setting, Outcomes],
        greedy: Outcomes,
        other: Outcomes | None,
        votes: dict[int, Outcomes],
    ) -> None:
        """Add one split.

        found: the settings to show. greedy, other: greedy answers of the policy and of the other
        policy. votes: majority votes by n, for comparisons at a matched token budget."""
        self._add_costs(f"{split}/{self.policy}/greedy/1", greedy)
        if other:
            key = f"{split}/{self.other}/greedy/1"
            self._add_costs(key, other)
            self.metrics[f"{key}/accuracy_improvement"] = self._gain(greedy, other)
        for setting, outcomes in found.items():
            key = f"{split}/{self.policy}/{setting.name}/{setting.n}"
            self._add_costs(key, outcomes)
            self.metrics[f"{key}/accuracy_improvement"] = self._gain(greedy, outcomes)
            if other:
                self.metrics[f"{key}/accuracy_over_{self.other}"] = self._gain(other, outcomes)
            if votes and setting.strategy != "majority_vote":
                n = self.matched_n[key] = matched_budget(votes, outcomes)
                gain = self._gain(votes[n], outcomes)
                self.metrics[f"{key}/accuracy_over_majority_vote"] = gain
        by_name: dict[str, dict[int, Outcomes]] = {}
        for setting, outcomes in found.items():
            by_n = by_name.setdefault(setting.name, {})
            if setting.n in self.args.n:
                by_n[setting.n] = outcomes
        for name, by_n in by_name.items():
            if len(by_n) > 1:
                key = f"{split}/{self.policy}/{name}/trend"
                self.metrics[key], self.trend_p[key] = trend(by_n, self.args.seed)

    def _gain(self, base: Outcomes, better: Outcomes) -> Metric:
        return paired_difference(base.correct, better.correct, self.args.seed)

    def _add_costs(self, key: str, outcomes: Outcomes) -> None:
        self.keys.append(key)
        self.metrics[f"{key}/accuracy"] = rate_metric(outcomes.correct)
        self.metrics[f"{key}/tokens"] = mean_metric(outcomes.tokens, self.args.seed)
        self.metrics[f"{key}/judged_steps"] = mean_metric(outcomes.judged, self.args.seed)
        seconds = outcomes.seconds
        self.metrics[f"{key}/seconds"] = Metric(sum(seconds) / len(seconds), None, len(seconds))
        if any(outcomes.left_out):
            self.left_out[key] = sum(outcomes.left_out)

    def columns(self) -> list[str]:
        """The columns of the table of a split."""
        over = ["over greedy", f"over {self.other}"] if self.other else ["over greedy"]
        return ["search", "n", "accuracy", "tokens", "judged", *over, "over majority vote of n"]

    def rows(self, split: str) -> list[list[object]]:
        """The rows of the table of a split."""
        rows: list[list[object]] = []
        for key in self._keys_of(split):
            _, policy, strategy, n = key.split("/")
            name = self._line(policy, strategy)
            aggregate = self.aggregates.get(strategy.split("-")[0])
            if aggregate and policy == self.policy:
                name += f", {aggregate}"
            costs = [self.metrics[f"{key}/{cost}"].value for cost in ("tokens", "judged_steps")]
            baselines = ["improvement", *([f"over_{self.other}"] if self.other else [])]
            gains = [self.metrics.get(f"{key}/accuracy_{baseline}", "") for baseline in baselines]
            vote = self.metrics.get(f"{key}/accuracy_over_majority_vote")
            over_vote = f"{self.matched_n[key]}: {vote}" if vote else ""
            row = [name, n, self.metrics[f"{key}/accuracy"], *(f"{cost:,.0f}" for cost in costs)]
            rows.append([*row, *gains, over_vote])
        return rows

    def frontier(self, split: str) -> dict[str, list[tuple[Metric, Metric]]]:
        """Line of the plot -> its points (tokens, accuracy), by n."""
        lines: dict[str, list[tuple[Metric, Metric]]] = {}
        for key in self._keys_of(split):
            _, policy, strategy, _ = key.split("/")
            point = (self.metrics[f"{key}/tokens"], self.metrics[f"{key}/accuracy"])
            lines.setdefault(self._line(policy, strategy), []).append(point)
        return lines

    def print_tables(self, title: str) -> None:
        """Print a table for each split, the trends, and what the judge could not score."""
        for split in dict.fromkeys(key.split("/")[0] for key in self.keys):
            count = self.metrics[f"{split}/{self.policy}/greedy/1/accuracy"].n
            heading = f"{split}: {count:,} problems; {title}; tokens and judged steps a problem"
            heading += "; the majority vote has a matched token budget"
            print_table(heading, self.columns(), self.rows(split))
        trends = [
            (key.removesuffix("/trend"), self.metrics[key], "" if p is None else f"{p:.2g}")
            for key, p in self.trend_p.items()
        ]
        if trends:
            heading = "accuracy gained when n is multiplied by 4"
            print_table(heading, ["search", "gain", "p (Page)"], trends)
        for key, count in self.left_out.items():
            print(f"{key}: the judge could not score {count} proposals")

    def _keys_of(self, split: str) -> list[str]:
        return [key for key in self.keys if key.startswith(f"{split}/")]

    def _line(self, policy: str, strategy: str) -> str:
        return strategy if policy == self.policy else f"{policy}, {strategy}"
