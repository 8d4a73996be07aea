"""The episodes of step PPO: from a question and the beginning of a solution the policy writes a step, or all that are left, and a
judge scores them. An episode is one step; the steps of a solution that is written to its end are one row."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lm.policy import Policy, State
from reasoning.records import Problem, StepValue
from reasoning.steps import STEP_NUMBER, ends_solution
from reward_model.protocols import StepJudge

# what the last step of a row may be, so that it scores 0 and no step follows it; `unanswered`: the text ends, and it is no answer,
# which a judge that reads steps cannot see
FLAWS = ("empty", "too_long", "repeated", "unanswered")


# A row is a searched step (`prompt`, `prefix`, `step`, `score`), of which the beginning is kept, or a problem, whose solution
# has not begun:
@dataclass(frozen=True)
class EpisodeStart:
    prompt: str
    prefix: list[str] = field(default_factory=list)

    @classmethod
    def from_row(cls, row: Any) -> "EpisodeStart":
        """Raises RecordError if the row is neither."""
        if isinstance(row, dict) and "step" in row:
            value = StepValue.from_row(row)
            return cls(value.prompt, value.prefix)
        return cls(Problem.from_row(row).prompt)


@dataclass
class Trajectory:
    """A beginning and what the policy wrote after it: one episode a step. The actions are `state.ids[begin:]`, T tokens.

    given: steps of the beginning; begin: its tokens. ends[k]: tokens up to the end of the k-th new step, from `begin` on. flaw: one
    of FLAWS, if that is why the last step scores 0. scores: one a new step, None if the judge could not read them. twin: how many
    rows before this one have the same beginning, which keeps their samples apart."""

    state: State
    is_fresh: bool
    twin: int = 0
    ends: list[int] = field(default_factory=list)
    flaw: str = ""
    scores: list[float] | None = None
    logps: Tensor | None = (
        None  # (T,) each, under the policy that sampled, and of its reference and its value function
    )
    ref_logps: Tensor | None = None
    values: Tensor | None = None
    entropy: Tensor | None = None

    def __post_init__(self):
        self.given, self.begin = len(self.state.steps), len(self.state.ids)

    def add(self, child: State, max_steps: int) -> bool:
        """Take the next step; returns whether another one is to follow."""
        before, self.state = self.state, child
        self.ends.append(len(child.ids) - self.begin)
        if len(child.steps) == len(before.steps):
            self.flaw = "empty"
        elif child.status == "cut":
            self.flaw = "too_long"
        elif _without_number(child.steps[-1]) in map(_without_number, before.steps):
            self.flaw = "repeated"
        elif child.status == "finished" and not ends_solution(list(child.steps)):
            self.flaw = "unanswered"
        return (
            self.is_fresh
            and not self.flaw
            and child.status == "open"
            and len(self.ends) < max_steps
        )

    def judged(self) -> tuple[str, tuple[str, ...]]:
        """The solution as the judge is to see it: without a step that scores 0 in any case."""
        return self.state.prompt, self.state.steps[: self.given + len(self.ends) - bool(self.flaw)]


def _without_number(step: str) -> str:
    """`Step 3: 2 + 2 = 4` -> `2 + 2 = 4`: to count on does not make a step new."""
    return STEP_NUMBER.sub("", step, count=1).strip()


def roll_out(
    policy: Policy,
    rows: Sequence[Trajectory],
    temperature: float,
    max_new_tokens: int,
    max_steps: int,
    seed: int,
) -> None:
    """Let the policy write after every row's beginning: one step, or to the end where the row is fresh. A row's samples come from
    the seed, its beginning and its `twin` alone."""
    going = list(rows)
    while going:
        further = []
        for twin in sorted({row.twin for row in going}):
            group = [row for row in going if row.twin == twin]
            children = policy.next_steps(
                [row.state for row in group], 1, temperature, max_new_tokens, (seed << 20) + twin
            )
            further += [
                row
                for row, (child,) in zip(group, children, strict=True)
                if row.add(child, max_steps)
            ]
        going = further


def judge_rows(judge: StepJudge, rows: Sequence[Trajectory]) -> None:
    """The judge's scores of the new steps, in one call; a flawed step scores 0."""
    scored = judge.score_steps([row.judged() for row in rows], skip=[row.given for row in rows])
    for row, scores in zip(rows, scored, strict=True):
        row.scores = None if scores is None else [*scores, *[0.0] * bool(row.flaw)]


def number_twins(rows: list[Trajectory]) -> list[Trajectory]:
    seen: Counter[tuple[int, ...]] = Counter()
    for row in rows:
        row.twin = seen[row.state.ids]
        seen[row.state.ids] += 1
    return rows
