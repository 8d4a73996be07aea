"""What every judge looks like to the rest of the house."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from reasoning.steps import PLAIN_TEMPLATE

Solution = tuple[str, Sequence[str]]  # (prompt, steps)


class JudgeError(RuntimeError):
    """A judge that cannot score: what is wrong, where, what to do. Scores given before it stay valid."""


class PromptTooLong(JudgeError):
    """A solution outgrows the judge's context: it is left out and counted, never scored wrong."""


class StepJudge(Protocol):
    def score_steps(self, solutions: Sequence[Solution]) -> list[list[float]]:
        """Scores of every step of every solution, 0 (wrong) to 1 (right), each given the problem and all earlier steps.

        Raises PromptTooLong if a solution outgrows the context, JudgeError if the judge itself fails."""
        ...


def mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores) if scores else 0.0


AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": mean,
    "min": lambda scores: min(scores, default=0.0),
}


def aggregate(scores: Sequence[float], how: str = "mean") -> float:
    """One number for a solution from the scores of its steps; an empty solution is worth 0."""
    return AGGREGATES[how](scores)


class FixedJudge:
    """A judge for tests: scores given by a plain function of (prompt, step, earlier steps)."""

    def __init__(self, score: Callable[[str, str, Sequence[str]], float]):
        self.score = score

    def score_steps(self, solutions: Sequence[Solution]) -> list[list[float]]:
        return [[self.score(prompt, step, steps[:k]) for k, step in enumerate(steps)] for prompt, steps in solutions]


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
TEMPLATES: dict[str, JudgeTemplate] = {
    "plain": PLAIN,
    "zephyr": JudgeTemplate("<|user|>\nProblem: {prompt}\nSolution:\n", f"\n{ASK}</s>\n<|assistant|>\n"),
    "llama-2": JudgeTemplate("[INST] Problem: {prompt}\nSolution:\n", f"\n{ASK} [/INST]"),
    "chatml": JudgeTemplate("<|im_start|>user\nProblem: {prompt}\nSolution:\n", f"\n{ASK}<|im_end|>\n<|im_start|>assistant\n"),
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
    return next((name for name, tell in TELLS.items() if re.search(tell, says, re.IGNORECASE)), "plain")
