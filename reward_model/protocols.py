"""The protocols of everything that gives a score: StepJudge for steps, ResponseScorer for whole responses."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Protocol, Self

from common.errors import short

Solution = tuple[str, Sequence[str]]  # (prompt, steps)
Response = tuple[str, str]  # (prompt, response)


class StepJudge(Protocol):
    """Scores every step of a solution.

    A context manager: `with open_judge(args) as judge` (reward_model/registry.py)."""

    # why score_steps returns None for a solution, in words that follow "is" or "are"
    unscored_reason = "longer than the judge's context"

    def score_steps(
        self, solutions: Sequence[Solution], skip: Sequence[int] | None = None
    ) -> list[list[float] | None]:
        """For every solution the scores of its steps, 0 (wrong) to 1 (right), each given the problem
        and all earlier steps.

        The first skip[i] steps of solution i (default 0) are context and get no score; where nothing
        is to be scored the list is empty. None stands for a solution that cannot be scored, usually
        because it is longer than the judge's context; the caller leaves it out and counts it. One
        call with many solutions is cheaper than many calls. Raises JudgeError if the judge itself
        fails; scores returned before stay valid."""
        ...

    def close(self) -> None:
        """Release what the judge holds: processes, connections, memory."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class ResponseScorer(Protocol):
    """Gives a whole response one number. A context manager, as StepJudge is."""

    def score(self, pairs: Sequence[Response]) -> list[float]:
        """For every (prompt, response) a finite number: higher is better, without bounds, comparable
        between responses to one prompt. One call with many pairs is cheaper than many calls. Raises
        JudgeError if the scorer fails."""
        ...

    def score_response(self, prompt: str, response: str) -> float:
        return self.score([(prompt, response)])[0]

    def close(self) -> None:
        """Release what the scorer holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores) if scores else 0.0


# name -> how the scores of its steps become one number for a solution; an empty solution gets 0
SCORE_AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": mean,
    "min": lambda scores: min(scores, default=0.0),
    "prod": lambda scores: prod(scores) if scores else 0.0,
    "last": lambda scores: scores[-1] if scores else 0.0,
}


def aggregate(scores: Sequence[float], how: str = "mean") -> float:
    """One number for a solution from the scores of its steps; `how` is a key of SCORE_AGGREGATES."""
    return SCORE_AGGREGATES[how](scores)


def describe_step(prompt: str, steps: Sequence[str], k: int) -> str:
    """Step k of a solution, for an error message."""
    step = f"step {k + 1} {short(steps[k])} of " if k < len(steps) else ""
    return f"{step}prompt {short(prompt)}"
