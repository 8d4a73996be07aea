"""The episodes of step PPO: the policy continues a prefix, and a judge scores the new steps.

An episode is one step. A trajectory is a prefix with one new step, or a whole solution to a prompt:
then each of its steps is an episode, whose prefix is the text before it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lm.policy import Policy, State
from reasoning.records import Problem, StepValue
from reasoning.steps import STEP_NUMBER, ends_solution
from reward_model.protocols import StepJudge

# Flaws of the last step of a trajectory: the step scores 0, and no step follows it. `unanswered`:
# the text ends without an answer, which a judge that reads single steps cannot see.
FLAWS = ("empty", "too_long", "repeated", "unanswered")


# A row is a searched step (`prompt`, `prefix`, `step`, `score`), of which prompt and prefix are
# kept, or a problem, whose prefix is empty:
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
    """A prefix and the steps that the policy wrote after it; T action tokens, `state.ids[first:]`.

    is_rollout: the solution is written to its end, not for one step. duplicate: the number of
    earlier trajectories of the batch with the same prefix; it makes their samples differ."""

    state: State
    is_rollout: bool
    duplicate: int = 0
    ends: list[int] = field(default_factory=list)  # action tokens up to the end of each new step
    flaw: str = ""  # one of FLAWS, of the last step
    scores: list[float] | None = None  # one a new step; None if the judge could not read them
    # (T,) each: log-probs of the policy that sampled and of the reference, values, entropies
    logps: Tensor = field(init=False, repr=False)
    ref_logps: Tensor = field(init=False, repr=False)
    values: Tensor = field(init=False, repr=False)
    entropy: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # steps of the prefix, and the place of the first action token
        self.prefix_steps, self.first = len(self.state.steps), len(self.state.ids)

    def add(self, child: State, max_steps: int) -> bool:
        """Add the next step. Returns whether the policy should write another one."""
        before, self.state = self.state, child
        self.ends.append(len(child.ids) - self.first)
        if len(child.steps) == len(before.steps):
            self.flaw = "empty"
        elif child.status == "cut":
            self.flaw = "too_long"
        elif _without_number(child.steps[-1]) in map(_without_number, before.steps):
            self.flaw = "repeated"
        elif child.status == "finished" and not ends_solution(list(child.steps)):
            self.flaw = "unanswered"
        is_open = child.status == "open" and not self.flaw
        return self.is_rollout and is_open and len(self.ends) < max_steps

    def judged(self) -> tuple[str, tuple[str, ...]]:
        """The solution for the judge, without a step that scores 0 because of its flaw."""
        count = self.prefix_steps + len(self.ends) - bool(self.flaw)
        return self.state.prompt, self.state.steps[:count]


def _without_number(step: str) -> str:
    """`Step 3: 2 + 2 = 4` -> `2 + 2 = 4`: a step with a new number alone is a repeated step."""
    return STEP_NUMBER.sub("", step, count=1).strip()


def roll_out(
    policy: Policy,
    trajectories: Sequence[Trajectory],
    temperature: float,
    max_new_tokens: int,
    max_steps: int,
    seed: int,
) -> None:
    """Sample the steps of all trajectories: one step each, all steps where `is_rollout`.

    A sample depends only on the seed, the prefix and `duplicate`."""
    unfinished = list(trajectories)
    while unfinished:
        remaining = []
        for duplicate in sorted({each.duplicate for each in unfinished}):
            group = [each for each in unfinished if each.duplicate == duplicate]
            states = [each.state for each in group]
            group_seed = (seed << 20) + duplicate
            children = policy.next_steps(states, 1, temperature, max_new_tokens, group_seed)
            remaining += [
                each
                for each, (child,) in zip(group, children, strict=True)
                if each.add(child, max_steps)
            ]
        unfinished = remaining


def judge_trajectories(judge: StepJudge, trajectories: Sequence[Trajectory]) -> None:
    """Set the scores of the new steps in one call of the judge; a step with a flaw scores 0."""
    solutions = [each.judged() for each in trajectories]
    scored = judge.score_steps(solutions, skip=[each.prefix_steps for each in trajectories])
    for trajectory, scores in zip(trajectories, scored, strict=True):
        flawed = [0.0] if trajectory.flaw else []
        trajectory.scores = None if scores is None else [*scores, *flawed]


def number_duplicates(trajectories: list[Trajectory]) -> list[Trajectory]:
    """Set `duplicate` of every trajectory; returns the same list."""
    seen: Counter[tuple[int, ...]] = Counter()
    for trajectory in trajectories:
        trajectory.duplicate = seen[trajectory.state.ids]
        seen[trajectory.state.ids] += 1
    return trajectories
