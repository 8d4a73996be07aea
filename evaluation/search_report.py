"""What guided search gains and costs: the metrics of evaluation/eval_search.py and the rows of its tables."""

import math
from pathlib import Path

from evaluation.metrics import Metric, mean_metric, rate_metric
from evaluation.search_measurement import Outcomes, SearchArgs, Setting


def trend(outcomes: dict[int, Outcomes], seed: int) -> tuple[Metric, float | None]:
    """What a problem's accuracy gains when n is multiplied by 4: the mean slope over log4(n), with its interval over problems; and
    the p-value of Page's test that it rises with n (Page 1963; ties, which answers of 0 and 1 have, make it conservative), None
    for fewer than three n."""
    import numpy as np
    from scipy.stats import page_trend_test

    table = np.array([outcomes[n].correct for n in sorted(outcomes)]).T  # (problems, n)
    steps = np.log(sorted(outcomes)) / np.log(4)
    steps = steps - steps.mean()
    slopes = table @ steps / (steps @ steps)
    p = (
        page_trend_test(table, method="asymptotic").pvalue
        if table.shape[1] > 2 and len(table) > 1
        else None
    )
    return mean_metric(slopes, seed), None if p is None else float(p)


class Report:
    """The metrics of all splits, and the rows of their tables."""

    def __init__(self, args: SearchArgs, aggregates: dict[str, str | None]):
        self.args, self.aggregates = args, aggregates
        self.policy, self.other = (
            Path(name).name if name else None
            for name in (args.model_name_or_path, args.other_model)
        )
        self.metrics: dict[str, Metric] = {}
        self.equal_tokens: dict[str, int] = {}
        self.trend_p: dict[str, float | None] = {}
        self.left_out: dict[str, int] = {}

    def add(
        self,
        split: str,
        found: dict[Setting, Outcomes],
        greedy: Outcomes,
        other: Outcomes | None,
        curve: dict[int, Outcomes],
    ):
        """One split. `found`: of every setting that is shown. `curve`: majority votes by their n, to compare with at equal cost."""
        seed = self.args.seed
        self._cost(f"{split}/{self.policy}/greedy/1", greedy)
        if other:
            self._cost(f"{split}/{self.other}/greedy/1", other)
            self.metrics[f"{split}/{self.other}/greedy/1/accuracy_improvement"] = difference(
                greedy, other, seed
            )
        for setting, outcomes in found.items():
            name = f"{split}/{self.policy}/{setting.name}/{setting.n}"
            self._cost(name, outcomes)
            self.metrics[f"{name}/accuracy_improvement"] = difference(greedy, outcomes, seed)
            if other:
                self.metrics[f"{name}/accuracy_over_{self.other}"] = difference(
                    other, outcomes, seed
                )
            if curve and setting.strategy != "majority_vote":
                n = matched_budget(curve, outcomes)
                self.equal_tokens[name] = n
                self.metrics[f"{name}/accuracy_over_majority_vote"] = difference(
                    curve[n], outcomes, seed
                )
        for name in dict.fromkeys(setting.name for setting in found):
            by_n = {
                setting.n: outcomes
                for setting, outcomes in found.items()
                if setting.name == name and setting.n in self.args.n
            }
            if len(by_n) > 1:
                key = f"{split}/{self.policy}/{name}/trend"
                self.metrics[key], self.trend_p[key] = trend(by_n, seed)

    def _cost(self, name: str, outcomes: Outcomes) -> None:
        self.metrics[f"{name}/accuracy"] = rate_metric(outcomes.correct)
        self.metrics[f"{name}/tokens"] = mean_metric(outcomes.tokens, self.args.seed)
        self.metrics[f"{name}/judged_steps"] = mean_metric(outcomes.judged, self.args.seed)
        seconds = outcomes.seconds
        self.metrics[f"{name}/seconds"] = Metric(sum(seconds) / len(seconds), None, len(seconds))
        if any(outcomes.left_out):
            self.left_out[name] = sum(outcomes.left_out)

    def rows(self, split: str) -> list[list]:
        rows = []
        for name in self.metrics:
            if not name.startswith(f"{split}/") or not name.endswith("/accuracy"):
                continue
            of = name.removesuffix("/accuracy")
            _, policy, strategy, n = of.split("/")
            majority = self.metrics.get(f"{of}/accuracy_over_majority_vote", "")
            majority = f"{self.equal_tokens[of]}: {majority}" if majority else ""
            better = [
                self.metrics.get(f"{of}/{key}", "")
                for key in ("accuracy_improvement", f"accuracy_over_{self.other}")
            ]
            cost = [
                f"{self.metrics[f'{of}/{key}'].value:,.0f}" for key in ("tokens", "judged_steps")
            ]
            how = self.aggregates.get(strategy.split("-")[0])
            called = (
                f"{policy}, {strategy}"
                if policy != self.policy
                else f"{strategy}, {how}"
                if how
                else strategy
            )
            row = [called, n, self.metrics[name], *cost, *better, majority]
            rows.append(row if self.other else [*row[:-2], majority])
        return rows

    def columns(self) -> list[str]:
        over = ["over greedy", f"over {self.other}"] if self.other else ["over greedy"]
        return ["search", "n", "accuracy", "tokens", "judged", *over, "over majority vote of n"]

    def frontier(self, split: str) -> dict[str, list[tuple[Metric, Metric]]]:
        """Line -> its (tokens, accuracy), by n."""
        lines: dict[str, list] = {}
        for name in self.metrics:
            if name.startswith(f"{split}/") and name.endswith("/accuracy"):
                of = name.removesuffix("/accuracy")
                _, policy, strategy, _ = of.split("/")
                line = strategy if policy == self.policy else f"{policy}, {strategy}"
                lines.setdefault(line, []).append(
                    (self.metrics[f"{of}/tokens"], self.metrics[name])
                )
        return lines


def difference(base: Outcomes, better: Outcomes, seed: int) -> Metric:
    """Mean difference of accuracy over the same problems (paired bootstrap)."""
    return mean_metric(
        [after - before for before, after in zip(base.correct, better.correct, strict=True)], seed
    )


def matched_budget(curve: dict[int, Outcomes], outcomes: Outcomes) -> int:
    """The n of the majority vote whose tokens are nearest, as a ratio."""
    tokens = max(1, sum(outcomes.tokens))
    return min(curve, key=lambda n: abs(math.log(max(1, sum(curve[n].tokens)) / tokens)))
