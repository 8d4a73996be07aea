"""What every scorer implements: StepJudge scores steps, ResponseScorer scores whole responses."""

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Protocol, Self

from common.errors import JudgeError, short

Solution = tuple[str, Sequence[str]]  # (prompt, steps)
Response = tuple[str, str]  # (prompt, response)
Scores = list[list[float] | None]  # for every solution the scores of its steps, see StepJudge


class Closing(Protocol):
    """A context manager that closes itself at the end."""

    def close(self) -> None:
        """Release what is held: processes, connections, memory."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Scorer(Closing, Protocol):
    """What judges and response scorers have in common."""

    def count_tokens(self, texts: Sequence[str]) -> list[int] | None:
        """As in lm/known_words.py; None by default, for what reads no tokens or does not show
        them."""
        return None


class StepJudge(Scorer, Protocol):
    """Scores every step of a solution.

    A context manager: `with open_judge(args) as judge` (reward_model/registry.py)."""

    # why score_steps returns None for a solution, in words that follow "is" or "are"
    unscored_reason: str = "longer than the judge's context"

    def can_read(self, prompt: str, steps: Sequence[str]) -> bool:
        """Whether all texts are Unicode: half of a surrogate pair (`"\\ud83d"` in JSON) is not.

        If not, `unscored_reason` names this reason too."""
        try:
            "".join((prompt, *steps)).encode()
        except UnicodeEncodeError:
            self.unscored_reason = f"{type(self).unscored_reason} or not Unicode text"
            return False
        return True

    def score_steps(
        self, solutions: Sequence[Solution], skip: Sequence[int] | None = None
    ) -> Scores:
        """For every solution the scores of its steps, 0 (wrong) to 1 (right), each given the
        problem and all earlier steps.

        The first skip[i] steps of solution i (default 0) are context and get no score; if no step
        is left, the list is empty. None means that the judge cannot score the solution, usually
        because it is longer than the judge's context; the caller leaves the solution out and counts
        it. So does a judge with a text that is not Unicode. One call with many solutions is cheaper
        than many calls. Raises JudgeError if the judge itself fails; scores returned before stay
        valid."""
        ...


class ResponseScorer(Scorer, Protocol):
    """Gives a whole response one number. A context manager, as StepJudge is."""

    def score(self, pairs: Sequence[Response]) -> list[float]:
        """For every (prompt, response) a finite number: higher is better, without bounds,
        comparable between responses to one prompt. One call with many pairs is cheaper than many
        calls. Raises JudgeError if the scorer fails."""
        ...

    def score_response(self, prompt: str, response: str) -> float:
        """The score of one response."""
        return self.score([(prompt, response)])[0]


# --- from the scores of the steps to one number for the solution ---


def mean(scores: Sequence[float]) -> float:
    """The mean; 0 for no scores."""
    return sum(scores) / len(scores) if scores else 0.0


# name -> how the scores of the steps become one number; a solution without steps gets 0
SCORE_AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": mean,
    "min": lambda scores: min(scores, default=0.0),
    "prod": lambda scores: prod(scores) if scores else 0.0,
    "last": lambda scores: scores[-1] if scores else 0.0,
}


def aggregate(scores: Sequence[float], how: str = "mean") -> float:
    """One number for a solution from its steps' scores; `how` is a key of SCORE_AGGREGATES."""
    return SCORE_AGGREGATES[how](scores)


# --- what the judges share ---


def with_skip(
    solutions: Sequence[Solution], skip: Sequence[int] | None
) -> Iterator[tuple[str, Sequence[str], int]]:
    """(prompt, steps, index of the first step to score) of every solution."""
    for (prompt, steps), first in zip(solutions, skip or [0] * len(solutions), strict=True):
        yield prompt, steps, first


def check_positive(**arguments: int | None) -> None:
    """Raises JudgeError for an argument below 1; None stands for a default."""
    for name, value in arguments.items():
        if value is not None and value < 1:
            raise JudgeError(f"{name} must be at least 1, got {value}")


def describe_step(prompt: str, steps: Sequence[str], k: int) -> str:
    """Step k of a solution, for an error message."""
    step = f"step {k + 1} {short(steps[k])} of " if k < len(steps) else ""
    return f"{step}prompt {short(prompt)}"


def nan_error(judge: str, prompt: str, steps: Sequence[str], k: int) -> JudgeError:
    """The error for logits at step k that are infinite or NaN."""
    place = describe_step(prompt, steps, k)
    return JudgeError(f"{judge}: the model's logits are not finite at {place}")
