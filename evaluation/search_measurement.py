"""Measurements of guided search that are kept in a file, so that none is repeated."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import arg, check_least
from common.engine import EngineArgs, check_engine, open_engine
from common.files import at_root
from common.progress import progress_bar
from common.resumable import AppendedRows
from lm.registry import PolicyArgs, PromptArgs, open_policy, policy_identity
from reasoning.grading import graded, is_correct
from reasoning.records import Problem
from reasoning.samples import Sample
from reasoning.splits import HELD_OUT
from reward_model.protocols import SCORE_AGGREGATES, StepJudge
from reward_model.registry import JudgeArgs, judge_identity, open_judge, warn_of_foreign_text
from search.candidates import SearchBudget, SearchResult
from search.strategies import NEED_NO_JUDGE, PICKS, STRATEGIES, draw, votes

if TYPE_CHECKING:
    from lm.policy import Policy

CHUNK = 50  # problems of one row of the file; they are searched together
CONTROLS = ("random", "agreement")  # guides other than the judge
# limits of the budget that a strategy does not use: its rows do not depend on them
UNUSED_LIMITS = {name: ["beams", "max_steps"] for name in ("greedy", *PICKS)}
UNUSED_LIMITS["step_greedy"] = ["beams"]
# n of majority votes: for every search, the one with the nearest number of tokens is its baseline
POOL_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass
class SearchArgs(JudgeArgs, PolicyArgs, EngineArgs):
    judge: str = field(
        default="prm", metadata=next(f.metadata for f in fields(JudgeArgs) if f.name == "judge")
    )
    splits: list[str] = arg(
        ["test", "hard"], f"reported splits: {', '.join(HELD_OUT)}, or files of problems"
    )
    choose_on: list[str] = arg(
        ["validation", "hard_validation"],
        "splits on which aggregates and the strategy of the controls are chosen",
    )
    choose_limit: int = arg(100, "use the first problems of each split of --choose_on")
    strategies: list[str] = arg(
        [name for name in STRATEGIES if name != "greedy"],
        "strategies besides greedy",
        choices=[name for name in STRATEGIES if name != "greedy"],
    )
    aggregates: list[str] = arg(
        [*SCORE_AGGREGATES], "aggregates of step scores to choose from", choices=[*SCORE_AGGREGATES]
    )
    controls: list[str] = arg(
        [*CONTROLS],
        "controls of the best guided strategy: random scores, or the agreement of the "
        "samples with each other",
        choices=[*CONTROLS],
    )
    n: list[int] = arg([1, 4, 16], "proposals for each step, or whole solutions")
    samples: int = arg(64, "largest n of the strategies that choose from a pool of whole solutions")
    beams: int = arg(SearchBudget.beams, "beams of beam, subtrees of dvts, walks of mcts")
    max_steps: int = arg(
        SearchBudget.max_steps, "most steps of a solution that is searched step by step"
    )
    max_new_tokens: int = arg(SearchBudget.max_new_tokens, "longest answer, in tokens")
    temperature: float = arg(SearchBudget.temperature, "of all samples (greedy: 0)")
    other_model: str | None = arg(
        None, "another policy to compare with, greedy: a directory or a hub name"
    )
    output_dir: str = arg(
        at_root("evaluation/results"),
        "folder of search.json, its plot, and the measurements, which are kept: search.jsonl",
    )
    limit: int | None = arg(None, "use the first LIMIT problems of each split")
    seed: int = arg(0, "seed of samples, bootstrap and random scores")
    overwrite: bool = arg(False, "replace an existing search.json and its plot")

    def __post_init__(self) -> None:
        check_least(self, limit=1, choose_limit=1, seed=0)
        check_engine(self)
        self.n = sorted({*self.n})
        self.strategies = list(dict.fromkeys(self.strategies))
        self.aggregates = list(dict.fromkeys(self.aggregates))
        for n in self.n:
            self.budget(n)  # checks the limits
        if self.samples < max(self.n):
            raise ValueError(
                f"argument --samples: expected {max(self.n)} or more, the largest --n, "
                f"got {self.samples}"
            )
        if self.judge == "shuffled":
            raise ValueError(
                "argument --judge: shuffled scores would depend on which problems are searched "
                "together; the control is random"
            )

    def budget(self, n: int, aggregate: str | None = None) -> SearchBudget:
        """The budget of one search. Raises ValueError for a limit out of range."""
        names = ("beams", "max_steps", "max_new_tokens", "temperature")
        limits = {name: getattr(self, name) for name in names}
        return SearchBudget(n=n, aggregate=aggregate or SearchBudget.aggregate, **limits)


@dataclass(frozen=True)
class Setting:
    """One measurement: a strategy, its n, its aggregate and its guide.

    aggregate: None for a strategy that needs no scores. guide: `judge`, or one of CONTROLS."""

    strategy: str
    n: int
    aggregate: str | None = None
    guide: str = "judge"

    @property
    def name(self) -> str:
        return self.strategy if self.guide == "judge" else f"{self.strategy}-{self.guide}"


@dataclass
class Outcomes:
    """The outcomes of one setting on one split, one value a problem.

    correct: 0 or 1. tokens: sampled. judged: steps that the judge scored. left_out: proposals that
    it could not score. seconds: share of the problem in the time of its chunk."""

    correct: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    judged: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def extend(self, row: dict) -> None:
        """Append the outcomes of a row of search.jsonl."""
        for name, values in vars(self).items():
            values += row[name]


class SearchMeasurements:
    """Measures settings. Rows that `path` has are read from it, new rows are appended to it.

    Workers with policy and judges are opened when a row is missing; `close` closes them."""

    def __init__(self, args: SearchArgs, path: Path) -> None:
        self.args = args
        self._policies = {
            name: policy_identity(own) for name, own in policy_arguments(args).items()
        }
        self._judge = judge_identity(args)
        self.searcher = Searcher(args)  # in this process
        is_here = args.engine == "local"
        self._engine = open_engine(
            args, (lambda: self.searcher) if is_here else partial(Searcher, args)
        )
        self._store = AppendedRows(path, _is_measurement)
        self._rows: dict[str, dict] = {row["key"]: row for row in self._store.rows}

    def close(self) -> None:
        self._engine.close()
        self.searcher.close()
        self._store.close()

    def key(self, setting: Setting, policy: str, chunk: Sequence[Problem]) -> str:
        """A hash of everything that a row depends on."""
        limits = asdict(self.args.budget(setting.n))
        for name in UNUSED_LIMITS.get(setting.strategy, ()):
            del limits[name]
        judge = self._judge if setting.guide == "judge" and setting.aggregate else None
        parts = {"policy": self._policies[policy], "judge": judge, **limits, **asdict(setting)}
        parts["seed"] = self.args.seed
        parts["problems"] = [(problem.prompt, problem.answer) for problem in chunk]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def measure(
        self,
        settings: Sequence[Setting],
        problems: Sequence[Problem],
        label: str,
        policy: str = "own",
    ) -> dict[Setting, Outcomes]:
        """The outcomes of one setting, or of several that choose from one pool of solutions."""
        chunks = [problems[start : start + CHUNK] for start in range(0, len(problems), CHUNK)]
        keys = [[self.key(setting, policy, chunk) for setting in settings] for chunk in chunks]
        missing = [k for k, of_chunk in enumerate(keys) if not self._rows.keys() >= {*of_chunk}]
        units = (((label, policy, settings, keys[k]), list(chunks[k])) for k in missing)
        measured = len(problems) - sum(len(chunks[k]) for k in missing)
        with progress_bar(total=len(problems), initial=measured, desc=label, unit="problem") as bar:
            for _, chunk, rows in self._engine.map(units):
                self._store.append(*rows)
                self._rows |= {row["key"]: row for row in rows}
                bar.update(len(chunk))
        outcomes = {setting: Outcomes() for setting in settings}
        for of_chunk in keys:
            for setting, key in zip(settings, of_chunk, strict=True):
                outcomes[setting].extend(self._rows[key])
        return outcomes

    def examples(self, problems: Sequence[Problem]) -> list[Sample]:
        """Greedy answers of the policy with their verdicts."""
        prompts = [problem.prompt for problem in problems]
        policy = self.searcher.open_policy("own", prompts)
        answers = policy.generate(prompts, max_new_tokens=self.args.max_new_tokens)
        return [
            graded(problem.prompt, answer.steps, answer.finished, problem)
            for problem, (answer,) in zip(problems, answers, strict=True)
        ]


def policy_arguments(args: SearchArgs) -> dict[str, PolicyArgs]:
    """The arguments of the policies `own` and, if there is one to compare with, `other`."""
    found: dict[str, PolicyArgs] = {"own": args}
    if args.other_model is not None:
        settings = {f.name: getattr(args, f.name) for f in fields(PromptArgs)}
        found["other"] = PolicyArgs(model_name_or_path=args.other_model, **settings)
    return found


class Searcher:
    """Searches problems with the policies and judges that it opens when it needs them."""

    def __init__(self, args: SearchArgs) -> None:
        self.args = args
        self._opened: dict[str, Any] = {}  # policies `own` and `other`, and judges
        self._stack = ExitStack()
        self._checked = False  # whether the judge was seen to know the words of the answers

    def __call__(
        self, key: tuple[str, str, Sequence[Setting], Sequence[str]], chunk: list[Problem]
    ) -> list[dict]:
        """A row for each setting. key: (label, policy, settings, the key of each row)."""
        label, policy, settings, keys = key
        found = self._search(settings, chunk, policy)
        self._check_judge(found)
        return [
            _row(key_of_row, label, setting, chunk, found[setting])
            for setting, key_of_row in zip(settings, keys, strict=True)
        ]

    def close(self) -> None:
        self._stack.close()
        self._opened.clear()

    def _search(
        self, settings: Sequence[Setting], chunk: Sequence[Problem], policy: str
    ) -> dict[Setting, list[SearchResult]]:
        prompts = [problem.prompt for problem in chunk]
        if len(settings) > 1:
            return self._search_pool(settings, prompts, policy)
        (setting,) = settings
        judge = None
        if setting.aggregate and setting.guide != "agreement":
            judge = self._open_judge(setting.guide)
        budget = self.args.budget(setting.n, setting.aggregate)
        strategy = STRATEGIES[setting.strategy]
        opened = self.open_policy(policy, prompts)
        return {setting: strategy(prompts, opened, judge, budget, self.args.seed)}

    def _search_pool(
        self, settings: Sequence[Setting], prompts: Sequence[str], policy: str
    ) -> dict[Setting, list[SearchResult]]:
        """Each setting picks from the first n solutions of one pool, at their share of its cost."""
        size = max(setting.n for setting in settings)
        judge = None
        if any(setting.aggregate for setting in settings):
            judge = self._open_judge("judge")
        budget = self.args.budget(size)
        drawn, pools = draw(
            prompts, self.open_policy(policy, prompts), judge, budget, self.args.seed
        )
        found: dict[Setting, list[SearchResult]] = {setting: [] for setting in settings}
        for whole, pool in zip(drawn, pools, strict=True):
            same_answers = votes(pool)
            for setting in settings:
                part = pool[: setting.n]
                answer = SearchResult(whole.prompt)
                answer.seconds = whole.seconds * (setting.n / size)
                answer.tokens = sum(sample.tokens for sample in part)
                if setting.aggregate:
                    different = {sample.state.steps for sample in part}
                    answer.judged = sum(map(len, different))
                    answer.left_out = sum(sample.scores is None for sample in part)
                answer.take(PICKS[setting.strategy](part, setting.aggregate, same_answers))
                found[setting].append(answer)
        return found

    def _check_judge(self, found: dict[Setting, list[SearchResult]]) -> None:
        """Warn if the judge does not know the words of the first answers that it has guided."""
        judge = self._opened.get("judge")
        if judge is not None and not self._checked:
            self._checked = True
            results = itertools.chain.from_iterable(found.values())
            warn_of_foreign_text(judge, [(result.prompt, result.steps) for result in results])

    def open_policy(self, name: str, prompts: Sequence[str]) -> "Policy":
        if name not in self._opened:
            self._opened[name] = open_policy(policy_arguments(self.args)[name], prompts)
        return self._opened[name]

    def _open_judge(self, guide: str) -> StepJudge:
        if guide not in self._opened:
            args: JudgeArgs = self.args
            if guide == "random":
                args = JudgeArgs(judge="random", seed=self.args.seed)
            self._opened[guide] = self._stack.enter_context(open_judge(args))
        return self._opened[guide]


# One row of search.jsonl, the outcomes of one setting on up to 50 problems:
#   {"key": "0f3c...",                     hash of everything that the outcomes depend on
#    "what": "hard: beam 16", "strategy": "beam", "n": 16, "aggregate": "min", "guide": "judge",
#    "correct": [1, 0, ...], "tokens": [830, ...], "judged": [95, ...], "left_out": [0, ...],
#    "seconds": [0.21, ...]}
def _row(
    key: str,
    label: str,
    setting: Setting,
    chunk: Sequence[Problem],
    answers: Sequence[SearchResult],
) -> dict:
    correct = [int(is_correct(a.steps, problem)) for a, problem in zip(answers, chunk, strict=True)]
    counts = {
        name: [getattr(a, name) for a in answers] for name in ("tokens", "judged", "left_out")
    }
    outcomes = {"correct": correct, **counts, "seconds": [round(a.seconds, 4) for a in answers]}
    return {"key": key, "what": label, **asdict(setting), **outcomes}


def _is_measurement(row: dict) -> bool:
    return {"key", *vars(Outcomes())} <= row.keys()


def setting_groups(
    args: SearchArgs, aggregates: dict[str, list[str | None]], sizes: Sequence[int]
) -> list[list[Setting]]:
    """All settings, in groups that are measured together.

    The strategies that choose from a pool of whole solutions are one group, at all `sizes`; every
    other strategy is measured alone, at --n. aggregates: strategy -> aggregates to measure."""
    pool: list[Setting] = []
    alone: list[list[Setting]] = []
    for strategy in args.strategies:
        for aggregate in aggregates[strategy]:
            if strategy in PICKS:
                pool += [Setting(strategy, n, aggregate) for n in sizes]
            else:
                alone += [[Setting(strategy, n, aggregate)] for n in args.n]
    return [pool, *alone] if pool else alone


@dataclass(frozen=True)
class Choice:
    """What the validation splits decide.

    aggregates: strategy -> its best aggregate. strategy: the best of those that a judge guides.
    accuracies: the compared accuracies."""

    aggregates: dict[str, str | None]
    strategy: str | None
    accuracies: dict[str, float]


def choose(
    args: SearchArgs, measurements: SearchMeasurements, splits: dict[str, list[Problem]]
) -> Choice:
    """Choose by exact accuracy at the largest n, the mean over the splits."""
    largest = replace(args, n=args.n[-1:])
    tried: dict[str, list[str | None]] = {
        name: [None] if name in NEED_NO_JUDGE else [*args.aggregates] for name in args.strategies
    }
    by_split: dict[Setting, list[float]] = {}
    for split, problems in splits.items():
        for settings in setting_groups(largest, tried, largest.n):
            label = split
            if len(settings) == 1:
                label = f"{split}, choosing: {settings[0].strategy} {settings[0].aggregate or ''}"
            for setting, outcomes in measurements.measure(settings, problems, label).items():
                by_split.setdefault(setting, []).append(sum(outcomes.correct) / len(problems))
    accuracy = {setting: sum(values) / len(values) for setting, values in by_split.items()}
    best = {
        name: max((s for s in accuracy if s.strategy == name), key=accuracy.__getitem__)
        for name in args.strategies
    }
    guided = [setting for setting in best.values() if setting.aggregate]
    return Choice(
        {name: setting.aggregate for name, setting in best.items()},
        max(guided, key=accuracy.__getitem__).strategy if guided else None,
        {"/".join(filter(None, (s.strategy, s.aggregate))): a for s, a in accuracy.items()},
    )
