"""What every judge looks like to the rest of the house."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol, Self

from reasoning.steps import PLAIN_TEMPLATE

Solution = tuple[str, Sequence[str]]  # (prompt, steps)
Response = tuple[str, str]  # (prompt, response)


class JudgeError(RuntimeError):
    """A judge that cannot score: what is wrong, where, what to do. Scores given before it stay valid."""


class PromptTooLong(JudgeError):
    """A prompt that leaves no room in a model's context."""


class StepJudge(Protocol):
    """What gives every step of a solution a score. It is a context manager: `with open_judge(args) as judge` (utils/judges.py)."""

    left_out = "longer than the judge's context"  # what solutions that get None are

    def score_steps(
        self, solutions: Sequence[Solution], skip: Sequence[int] | None = None
    ) -> list[list[float] | None]:
        """For every solution the scores of its steps, 0 (wrong) to 1 (right), each given the problem and all earlier steps.

        The first skip[i] steps of solution i (default none) are context and get no score; where nothing is to be scored the list is
        empty. None stands for a solution that cannot be scored, usually because it outgrows the judge's context: the caller
        leaves it out and counts it. Many solutions at once are cheaper than one by one. Raises JudgeError, one line, if the judge
        itself fails; scores returned before stay valid."""
        ...

    def close(self) -> None:
        """Give back what the judge holds: processes, connections, memory."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class ResponseScorer(Protocol):
    """What gives a whole response one number. It is a context manager, as StepJudge is."""

    def score(self, pairs: Sequence[Response]) -> list[float]:
        """For every (prompt, response) a finite number: higher is better, without bounds, and comparable between responses to one
        prompt. Many at once are cheaper than one by one. Raises JudgeError, one line, if the scorer fails."""
        ...

    def score_response(self, prompt: str, response: str) -> float:
        return self.score([(prompt, response)])[0]

    def close(self) -> None:
        """Give back what the scorer holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores) if scores else 0.0


AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": mean,
    "min": lambda scores: min(scores, default=0.0),
    "prod": lambda scores: prod(scores) if scores else 0.0,
    "last": lambda scores: scores[-1] if scores else 0.0,
}


def aggregate(scores: Sequence[float], how: str = "mean") -> float:
    """One number for a solution from the scores of its steps; an empty solution is worth 0."""
    return AGGREGATES[how](scores)


class FixedJudge(StepJudge):
    """A judge for tests: scores given by a plain function of (prompt, step, earlier steps); a None leaves the solution out."""

    def __init__(self, score: Callable[[str, str, Sequence[str]], float | None]):
        self.score = score

    def score_steps(
        self, solutions: Sequence[Solution], skip: Sequence[int] | None = None
    ) -> list[list[float] | None]:
        scored = []
        for (prompt, steps), first in zip(solutions, skip or [0] * len(solutions), strict=True):
            scores = [self.score(prompt, steps[k], steps[:k]) for k in range(first, len(steps))]
            scored.append(None if None in scores else scores)
        return scored


@dataclass(frozen=True)
class JudgeTemplate:
    """How a judge is asked about a step. The text it reads is

        before.format(prompt=...) + step 1 + "\\n" + ... + step k + "\\n" + question

    and the score of step k is P(yes) / (P(yes) + P(no)) of the token that follows. Everything up to `question` is shared with the
    steps that come after, so it is evaluated once. `before` and `question` may hold control tokens of the model (`</s>`)."""

    before: str
    question: str


PLAIN = JudgeTemplate(before=PLAIN_TEMPLATE, question="Right?")
ASK = "Is the last step of this solution right? Answer Yes or No."
CHAT = JudgeTemplate(
    before=PLAIN_TEMPLATE, question=f"\n{ASK}"
)  # what a chat model's own template makes a user's message of
TEMPLATES: dict[str, JudgeTemplate] = {
    "plain": PLAIN,
    "zephyr": JudgeTemplate(
        "<|user|>\nProblem: {prompt}\nSolution:\n", f"\n{ASK}</s>\n<|assistant|>\n"
    ),
    "llama-2": JudgeTemplate("[INST] Problem: {prompt}\nSolution:\n", f"\n{ASK} [/INST]"),
    "chatml": JudgeTemplate(
        "<|im_start|>user\nProblem: {prompt}\nSolution:\n",
        f"\n{ASK}<|im_end|>\n<|im_start|>assistant\n",
    ),
}
# What a model says of itself (its chat template, its name) when it wants a template other than plain; the first that fits is taken.
TELLS = {
    "chatml": r"<\|im_start\|>|chatml",
    "zephyr": r"<\|user\|>|zephyr|tinyllama.*chat",
    "llama-2": r"\[INST\]|llama[-_ ]?2.*chat|mistral.*instruct",
}
YES, NO = ("Yes", "yes", "YES"), ("No", "no", "NO")


def fitting_template(says: str) -> str:
    """The name in TEMPLATES that fits what a model says of itself: its chat template, its name."""
    return next(
        (name for name, tell in TELLS.items() if re.search(tell, says, re.IGNORECASE)), "plain"
    )


def short(text: str) -> str:
    """A text as an error message shows it."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def where(prompt: str, steps: Sequence[str], k: int) -> str:
    """Step k of a solution, for an error message."""
    step = f"step {k + 1} {short(steps[k])} of " if k < len(steps) else ""
    return f"{step}prompt {short(prompt)}"
