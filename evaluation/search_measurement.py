"""Measurements of guided search that are kept: what was measured once is never measured again."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from common.files import AppendedRows, at_root
from lm.registry import PolicyArgs, open_policy, policy_identity
from reasoning.grading import is_correct
from reasoning.records import Problem
from reasoning.splits import HELD_OUT
from reward_model.protocols import SCORE_AGGREGATES
from reward_model.registry import JudgeArgs, judge_identity, open_judge
from search.strategies import (
    NEED_NO_JUDGE,
    PICKS,
    STRATEGIES,
    SearchBudget,
    SearchResult,
    draw,
    votes,
)

CHUNK = 50  # problems that are searched together and remembered together
# who guides instead of the judge: chance, or the samples among each other
CONTROLS = ("random", "agreement")
# of the budget
USES_NOT = {"step_greedy": ("beams",)} | dict.fromkeys(("greedy", *PICKS), ("beams", "max_steps"))
# of majority votes, to find the one that costs as much
POOL_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


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
        default_factory=lambda: [*SCORE_AGGREGATES],
        metadata={"help": "how step scores may become one number", "choices": [*SCORE_AGGREGATES]},
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
        default=SearchBudget.beams,
        metadata={"help": "beams of beam, subtrees of dvts, walks of mcts"},
    )
    max_steps: int = field(
        default=SearchBudget.max_steps,
        metadata={"help": "most steps of a solution that is searched step by step"},
    )
    max_new_tokens: int = field(
        default=SearchBudget.max_new_tokens, metadata={"help": "longest answer, in tokens"}
    )
    temperature: float = field(
        default=SearchBudget.temperature, metadata={"help": "of all samples (greedy has 0)"}
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

    def budget(self, n: int, how: str | None = None) -> SearchBudget:
        values = {
            name: getattr(self, name)
            for name in ("beams", "max_steps", "max_new_tokens", "temperature")
        }
        return SearchBudget(n=n, aggregate=how or SearchBudget.aggregate, **values)


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


class SearchMeasurements:
    """Measures, and remembers: rows that were measured before are read from `path`, new ones appended. Policy and judges are opened
    when something is missing. `close` gives them back."""

    def __init__(self, args: SearchArgs, path: Path):
        self.args, self._open, self._stack = args, {}, ExitStack()
        self.policies = {"own": policy_identity(args)}
        if args.other_model is not None:
            self.policies["other"] = policy_identity(PolicyArgs(args.other_model))
        self.guide = judge_identity(args)
        self._store = AppendedRows(path)
        self.rows: dict[str, dict] = {row["key"]: row for row in self._store.rows}

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
        self._store.close()

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
                    self._store.append(
                        *(
                            _row(keys[setting], label, setting, chunk, answers)
                            for setting, answers in found.items()
                        )
                    )
                    self.rows |= {row["key"]: row for row in self._store.rows[-len(found) :]}
                for setting, key in keys.items():
                    for name, values in asdict(outcomes[setting]).items():
                        setattr(outcomes[setting], name, values + self.rows[key][name])
                bar.update(len(chunk))
        return outcomes

    def _search(
        self, settings: Sequence[Setting], chunk: Sequence[Problem], policy: str
    ) -> dict[Setting, list[SearchResult]]:
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
        found: dict[Setting, list[SearchResult]] = {setting: [] for setting in settings}
        for whole, pool in zip(drawn, pools, strict=True):
            of = votes(pool)
            for setting in settings:
                part, share = pool[: setting.n], setting.n / size
                answer = SearchResult(
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


# One row of search.jsonl, the outcomes of one setting on up to 50 problems:
#   {"key": "0f3c...",                                  of everything it depends on; equal keys are never measured twice
#    "what": "hard: beam 16", "strategy": "beam", "n": 16, "aggregate": "min", "guide": "judge",
#    "correct": [1, 0, ...], "tokens": [830, ...], "judged": [95, ...], "left_out": [0, ...], "seconds": [0.21, ...]}
def _row(
    key: str,
    label: str,
    setting: Setting,
    chunk: Sequence[Problem],
    answers: Sequence[SearchResult],
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


def choose(
    args: SearchArgs, measured: SearchMeasurements, splits: dict[str, list[Problem]]
) -> dict:
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
            for setting, outcomes in measured.measure(settings, problems, label).items():
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
