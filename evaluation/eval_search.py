"""Guided search against what it costs: exact accuracy over n and over sampled tokens, for every strategy, on held-out problems.

Which aggregate a strategy uses, and which guided strategy the controls are run for, is chosen on validation splits at the largest
n; test splits are only reported. Whatever was measured is appended to search.jsonl and never measured again: a stopped run goes on,
and a run with one more strategy does the new part only.
"""

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.metrics import Metric, mean_metric, print_table, rate_metric, write_result
from reasoning.grading import is_correct
from reasoning.problems import HELD_OUT
from reasoning.records import Problem, read_records, to_line
from reward_model.base import AGGREGATES
from search.strategies import NEED_NO_JUDGE, PICKS, STRATEGIES, Answer, Budget, draw, votes
from utils.cli import UserError, at_root, check_input, check_model, check_output, parse_args, run
from utils.judges import JudgeArgs, check_judge, judge_identity, judge_name, open_judge
from utils.policies import PolicyArgs, check_policy, open_policy, policy_identity

NAME = "search"
CHUNK = 50  # problems that are searched together and remembered together
CONTROLS = (
    "random",
    "agreement",
)  # who guides instead of the judge: chance, or the samples among each other
USES_NOT = {"step_greedy": ("beams",)} | dict.fromkeys(
    ("greedy", *PICKS), ("beams", "max_steps")
)  # of the budget
POOL_SIZES = (
    1,
    2,
    3,
    4,
    6,
    8,
    12,
    16,
    24,
    32,
    48,
    64,
    96,
    128,
)  # of majority votes, to find the one that costs as much


@dataclass
class SearchArgs(JudgeArgs, PolicyArgs):
    judge: str = field(
        default="prm", metadata=next(f.metadata for f in fields(JudgeArgs) if f.name == "judge")
    )
    splits: list[str] = field(
        default_factory=lambda: ["test", "hard"],
        metadata={"help": f"what is reported: {', '.join(HELD_OUT)}, or JSONL of problems"},
    )
    choose_on: list[str] = field(
        default_factory=lambda: ["validation", "hard_validation"],
        metadata={"help": "splits on which is chosen"},
    )
    choose_limit: int = field(default=100, metadata={"help": "problems of each of them"})
    strategies: list[str] = field(
        default_factory=lambda: [name for name in STRATEGIES if name != "greedy"],
        metadata={
            "help": "strategies besides greedy",
            "choices": [name for name in STRATEGIES if name != "greedy"],
        },
    )
    aggregates: list[str] = field(
        default_factory=lambda: [*AGGREGATES],
        metadata={"help": "how step scores may become one number", "choices": [*AGGREGATES]},
    )
    controls: list[str] = field(
        default_factory=lambda: [*CONTROLS],
        metadata={
            "help": "who else guides the best strategy: chance, or the samples among each other",
            "choices": [*CONTROLS],
        },
    )
    n: list[int] = field(
        default_factory=lambda: [1, 4, 16],
        metadata={"help": "proposals a step, or whole solutions"},
    )
    samples: int = field(
        default=64,
        metadata={"help": "the largest n of the strategies that share one pool of whole solutions"},
    )
    beams: int = field(
        default=Budget.beams, metadata={"help": "beams of beam, subtrees of dvts, walks of mcts"}
    )
    max_steps: int = field(
        default=Budget.max_steps,
        metadata={"help": "most steps of a solution that is searched step by step"},
    )
    max_new_tokens: int = field(
        default=Budget.max_new_tokens, metadata={"help": "longest answer, in tokens"}
    )
    temperature: float = field(
        default=Budget.temperature, metadata={"help": "of all samples (greedy has 0)"}
    )
    other_model: str | None = field(
        default=None,
        metadata={
            "help": "another policy, unguided, to compare with: a model directory or a hub name"
        },
    )
    output_dir: str = field(
        default=at_root("evaluation/results"),
        metadata={"help": "folder of search.json and search.jsonl; the picture in ../plots"},
    )
    limit: int | None = field(
        default=None, metadata={"help": "use the first LIMIT problems of each split"}
    )
    seed: int = field(default=0, metadata={"help": "seed of samples, bootstrap and random scores"})

    def __post_init__(self):
        for name in ("limit", "choose_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"argument --{name}: expected 1 or more, got {value}")
        if self.seed < 0:
            raise ValueError(f"argument --seed: expected 0 or more, got {self.seed}")
        self.n = sorted({*self.n})
        self.strategies, self.aggregates = (
            list(dict.fromkeys(self.strategies)),
            list(dict.fromkeys(self.aggregates)),
        )
        for n in self.n:
            self.budget(n)
        if self.samples < max(self.n):
            raise ValueError(
                f"argument --samples: expected {max(self.n)} or more, the largest --n, got {self.samples}"
            )
        if self.judge == "shuffled":
            raise ValueError(
                "argument --judge: shuffled scores would depend on what is searched together; the control is random"
            )

    def budget(self, n: int, how: str | None = None) -> Budget:
        values = {
            name: getattr(self, name)
            for name in ("beams", "max_steps", "max_new_tokens", "temperature")
        }
        return Budget(n=n, aggregate=how or Budget.aggregate, **values)


@dataclass(frozen=True)
class Setting:
    """What is measured: a strategy with its n, the aggregate (None: it needs none), and who guides it: judge, random, agreement."""

    strategy: str
    n: int
    aggregate: str | None = None
    guide: str = "judge"

    @property
    def name(self) -> str:
        return self.strategy if self.guide == "judge" else f"{self.strategy}-{self.guide}"


@dataclass
class Outcomes:
    """Of one setting on one split, a value a problem: correct (0 or 1), tokens sampled, steps the judge scored, proposals that it
    left out, seconds."""

    correct: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    judged: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class Laboratory:
    """Measures, and remembers: rows that were measured before are read from `path`, new ones appended. Policy and judges are opened
    when something is missing. `close` gives them back."""

    def __init__(self, args: SearchArgs, path: Path):
        self.args, self.path, self._open, self._stack = args, path, {}, ExitStack()
        self.policies = {"own": policy_identity(args)}
        if args.other_model is not None:
            self.policies["other"] = policy_identity(PolicyArgs(args.other_model))
        self.guide = judge_identity(args)
        self.rows: dict[str, dict] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            whole = [
                line
                for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
                if line.endswith("\n")
            ]
            self.rows = {row["key"]: row for row in map(json.loads, whole)}
            with open(path, "rb+") as file:  # what a killed run left of its last line goes
                file.truncate(sum(len(line.encode()) for line in whole))

    def opened(self, what: str) -> Any:
        if what not in self._open:
            if what == "own":
                self._open[what] = open_policy(self.args)
            elif what == "other":
                self._open[what] = open_policy(PolicyArgs(self.args.other_model))
            else:
                args = (
                    JudgeArgs(judge="random", seed=self.args.seed)
                    if what == "random"
                    else self.args
                )
                self._open[what] = self._stack.enter_context(open_judge(args))
        return self._open[what]

    def close(self) -> None:
        self._stack.close()
        self._open.clear()

    def key(self, setting: Setting, policy: str, chunk: Sequence[Problem]) -> str:
        """All that a row depends on."""
        budget = asdict(self.args.budget(setting.n))
        for name in USES_NOT.get(setting.strategy, ()):
            del budget[name]
        judge = self.guide if setting.guide == "judge" and setting.aggregate else None
        what = {
            "policy": self.policies[policy],
            "judge": judge,
            **budget,
            **asdict(setting),
            "seed": self.args.seed,
        }
        what["problems"] = [(problem.prompt, problem.answer) for problem in chunk]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    def measure(
        self,
        settings: Sequence[Setting],
        problems: Sequence[Problem],
        label: str,
        policy: str = "own",
    ) -> dict[Setting, Outcomes]:
        """The outcomes of settings that are measured together: one setting, or several that choose from one pool."""
        from tqdm import tqdm

        outcomes = {setting: Outcomes() for setting in settings}
        with tqdm(total=len(problems), desc=label, unit="problem") as bar:
            for start in range(0, len(problems), CHUNK):
                chunk = problems[start : start + CHUNK]
                keys = {setting: self.key(setting, policy, chunk) for setting in settings}
                if not all(key in self.rows for key in keys.values()):
                    found = self._search(settings, chunk, policy)
                    self._append(
                        [
                            _row(keys[setting], label, setting, chunk, answers)
                            for setting, answers in found.items()
                        ]
                    )
                for setting, key in keys.items():
                    for name, values in asdict(outcomes[setting]).items():
                        setattr(outcomes[setting], name, values + self.rows[key][name])
                bar.update(len(chunk))
        return outcomes

    def _search(
        self, settings: Sequence[Setting], chunk: Sequence[Problem], policy: str
    ) -> dict[Setting, list[Answer]]:
        (first, *others), prompts = settings, [problem.prompt for problem in chunk]
        if not others:
            judge = (
                self.opened(first.guide) if first.aggregate and first.guide != "agreement" else None
            )
            budget = self.args.budget(first.n, first.aggregate)
            return {
                first: STRATEGIES[first.strategy](
                    prompts, self.opened(policy), judge, budget, self.args.seed
                )
            }
        size = max(setting.n for setting in settings)
        judge = self.opened("judge") if any(setting.aggregate for setting in settings) else None
        drawn, pools = draw(
            prompts, self.opened(policy), judge, self.args.budget(size), self.args.seed
        )
        found: dict[Setting, list[Answer]] = {setting: [] for setting in settings}
        for whole, pool in zip(drawn, pools, strict=True):
            of = votes(pool)
            for setting in settings:
                part, share = pool[: setting.n], setting.n / size
                answer = Answer(
                    whole.prompt,
                    seconds=whole.seconds * share,
                    tokens=sum(sample.tokens for sample in part),
                )
                if setting.aggregate:
                    answer.judged = sum(
                        len(steps) for steps in {sample.state.steps for sample in part}
                    )
                    answer.left_out = sum(sample.scores is None for sample in part)
                answer.take(PICKS[setting.strategy](part, setting.aggregate, of))
                found[setting].append(answer)
        return found

    def _append(self, rows: list[dict]) -> None:
        with open(self.path, "a", encoding="utf-8", newline="\n") as file:
            file.writelines(map(to_line, rows))
        self.rows |= {row["key"]: row for row in rows}


# One row of search.jsonl, the outcomes of one setting on up to 50 problems:
#   {"key": "0f3c...",                                  of everything it depends on; equal keys are never measured twice
#    "what": "hard: beam 16", "strategy": "beam", "n": 16, "aggregate": "min", "guide": "judge",
#    "correct": [1, 0, ...], "tokens": [830, ...], "judged": [95, ...], "left_out": [0, ...], "seconds": [0.21, ...]}
def _row(
    key: str, label: str, setting: Setting, chunk: Sequence[Problem], answers: Sequence[Answer]
) -> dict:
    outcomes = Outcomes(
        [
            int(is_correct(answer.steps, problem))
            for answer, problem in zip(answers, chunk, strict=True)
        ],
        *(
            [getattr(answer, name) for answer in answers]
            for name in ("tokens", "judged", "left_out")
        ),
        [round(answer.seconds, 4) for answer in answers],
    )
    return {"key": key, "what": label, **asdict(setting), **asdict(outcomes)}


def wanted(
    args: SearchArgs, aggregates: dict[str, list[str]], sizes: Sequence[int]
) -> list[list[Setting]]:
    """The settings to be measured, in groups that are measured together: what chooses from a pool of whole solutions, at all
    `sizes`, and everything else by itself, at --n."""
    pool, alone = [], []
    for strategy in args.strategies:
        if strategy in PICKS:
            pool += [Setting(strategy, n, how) for how in aggregates[strategy] for n in sizes]
        else:
            alone += [[Setting(strategy, n, how)] for how in aggregates[strategy] for n in args.n]
    return [*([pool] if pool else []), *alone]


def choose(args: SearchArgs, lab: Laboratory, splits: dict[str, list[Problem]]) -> dict:
    """The aggregate of each strategy and the best guided strategy, by accuracy (the mean over the splits) at the largest n; the
    accuracies that were compared."""
    largest = replace(args, n=args.n[-1:])
    tried = {name: [None] if name in NEED_NO_JUDGE else args.aggregates for name in args.strategies}
    accuracy: dict[Setting, list[float]] = {}
    for split, problems in splits.items():
        for settings in wanted(largest, tried, largest.n):
            label = (
                f"{split}, choosing: {settings[0].strategy} {settings[0].aggregate or ''}"
                if len(settings) == 1
                else split
            )
            for setting, outcomes in lab.measure(settings, problems, label).items():
                accuracy.setdefault(setting, []).append(sum(outcomes.correct) / len(problems))
    mean = {setting: sum(values) / len(values) for setting, values in accuracy.items()}
    best = {
        name: max((s for s in mean if s.strategy == name), key=mean.__getitem__)
        for name in args.strategies
    }
    guided = [setting for setting in best.values() if setting.aggregate]
    return {
        "aggregates": {name: setting.aggregate for name, setting in best.items()},
        "strategy": max(guided, key=mean.__getitem__).strategy if guided else None,
        "accuracies": {
            f"{s.strategy}/{s.aggregate}" if s.aggregate else s.strategy: value
            for s, value in mean.items()
        },
    }


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
                n = as_dear(curve, outcomes)
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


def as_dear(curve: dict[int, Outcomes], outcomes: Outcomes) -> int:
    """The n of the majority vote whose tokens are nearest, as a ratio."""
    tokens = max(1, sum(outcomes.tokens))
    return min(curve, key=lambda n: abs(math.log(max(1, sum(curve[n].tokens)) / tokens)))


def check(
    args: SearchArgs,
) -> tuple[dict[str, list[Problem]], dict[str, list[Problem]], dict[str, Path]]:
    """The problems of the splits that are reported and of those on which is chosen, and where the outputs go; all that can be wrong
    is found here, before any work."""
    check_policy(args)
    check_judge(args)
    if args.other_model is not None:
        check_model(
            args.other_model,
            "make models-large" if Path(args.other_model).name == "policy-large" else None,
        )
        if Path(args.other_model).name == Path(args.model_name_or_path).name:
            raise UserError(
                f"argument --other_model: is called as the policy is, {Path(args.other_model).name}: rename one"
            )
    reported, chosen_on = (
        {Path(name).stem.removeprefix("problems_"): name for name in names}
        for names in (args.splits, args.choose_on)
    )
    if len(reported) < len(args.splits) or len(chosen_on) < len(args.choose_on):
        raise UserError("argument --splits or --choose_on: two splits have the same name")
    if both := reported.keys() & chosen_on.keys():
        raise UserError(
            f"argument --choose_on: nothing is chosen on what is reported, {', '.join(sorted(both))}"
        )
    problems = {}
    for split, name in (reported | chosen_on).items():
        path = at_root(f"data/problems_{name}.jsonl") if name in HELD_OUT else name
        check_input(path, "make data" if name in HELD_OUT else None)
        problems[split] = list(read_records(path, Problem))[: args.limit]
    folder = Path(args.output_dir)
    outputs = {
        "rows": folder / f"{NAME}.jsonl",
        "result": folder / f"{NAME}.json",
        "plot": folder.parent / "plots" / f"{NAME}.png",
    }
    for path in outputs.values():
        check_output(str(path), overwrite=True)
    chosen_on = {split: problems[split][: args.choose_limit] for split in chosen_on}
    return {split: problems[split] for split in reported}, chosen_on, outputs


def main() -> None:
    (args,) = parse_args(SearchArgs, description=__doc__)
    splits, chosen_on, outputs = check(args)

    from evaluation.plots import frontier_plot

    lab = Laboratory(args, outputs["rows"])
    try:
        chosen = choose(args, lab, chosen_on)
        report = Report(args, chosen["aggregates"])
        sizes = sorted(
            {*args.n, *(size for size in POOL_SIZES if size <= args.samples), args.samples}
        )
        shown = {*args.n, args.samples}
        one = {name: [how] for name, how in chosen["aggregates"].items()}
        for split, problems in splits.items():
            (greedy,) = lab.measure([Setting("greedy", 1)], problems, f"{split}: greedy").values()
            other = None
            if args.other_model is not None:
                (other,) = lab.measure(
                    [Setting("greedy", 1)], problems, f"{split}: {report.other}", "other"
                ).values()
            found: dict[Setting, Outcomes] = {}
            for settings in wanted(args, one, sizes):
                label = (
                    "one pool of solutions"
                    if len(settings) > 1
                    else f"{settings[0].strategy} {settings[0].n}"
                )
                found |= lab.measure(settings, problems, f"{split}: {label}")
            for guide in args.controls if chosen["strategy"] else ():
                for n in args.n:
                    setting = Setting(
                        chosen["strategy"], n, chosen["aggregates"][chosen["strategy"]], guide
                    )
                    found |= lab.measure([setting], problems, f"{split}: {setting.name} {n}")
            curve = {
                setting.n: outcomes
                for setting, outcomes in found.items()
                if setting.strategy == "majority_vote"
            }
            report.add(
                split, {s: o for s, o in found.items() if s.n in shown}, greedy, other, curve
            )
    finally:
        lab.close()

    title = f"{report.policy}, guided by {judge_name(args)}"
    controls = [Setting(chosen["strategy"], 1, guide=guide).name for guide in args.controls]
    frontier_plot(
        outputs["plot"], {split: report.frontier(split) for split in splits}, controls, title
    )
    extras = {
        "chosen": chosen,
        "equal_tokens": report.equal_tokens,
        "trend_p": report.trend_p,
        "left_out": report.left_out,
    }
    write_result(outputs["result"], report.metrics, asdict(args), [args.seed], **extras)
    tried = sorted(chosen["accuracies"].items(), key=lambda item: -item[1])
    on = ", ".join(f"{len(problems)} {split}" for split, problems in chosen_on.items())
    print_table(
        f"chosen at n = {args.n[-1]} on {on}",
        ["strategy", "accuracy"],
        [(name, f"{value:.3f}") for name, value in tried],
    )
    for split, problems in splits.items():
        heading = f"{split}: {len(problems):,} problems; {title}; tokens and judged steps a problem; a majority vote of as many tokens"
        print_table(heading, report.columns(), report.rows(split))
    trends = [
        (name.removesuffix("/trend"), report.metrics[name], "" if p is None else f"{p:.2g}")
        for name, p in report.trend_p.items()
    ]
    if trends:
        print_table(
            "accuracy gained when n is multiplied by 4", ["search", "gain", "p (Page)"], trends
        )
    for name, count in report.left_out.items():
        print(f"{name}: {count} proposals were left out by the judge")
    print(f"wrote {outputs['result']}, {outputs['plot']} and {outputs['rows']} (every problem)")


if __name__ == "__main__":
    run(main)
