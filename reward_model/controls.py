"""Judges for the ends of the scale: one that knows the answers (a ceiling), two that know nothing (controls, must fail)."""

import json
import random
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from common.errors import JudgeError
from reasoning.grading import grade_steps
from reasoning.records import Problem
from reward_model.protocols import Solution, StepJudge


class ExactJudge(StepJudge):
    """The checker as a judge: 1 for a right step, 0 from the first error on (reasoning/grading.py).

    problems: with reference steps; read only as far as prompts are asked for. Raises JudgeError for a prompt it does not know."""

    def __init__(self, problems: Iterable[Problem]):
        self._unread, self._known = iter(problems), {}

    def score_steps(
        self, solutions: Sequence[Solution], skip: Sequence[int] | None = None
    ) -> list[list[float] | None]:
        skip = skip or [0] * len(solutions)
        return [
            grade_steps(list(steps), self._problem(prompt))[first:]
            for (prompt, steps), first in zip(solutions, skip, strict=True)
        ]

    def _problem(self, prompt: str) -> Problem:
        while prompt not in self._known:
            problem = next(self._unread, None)
            if problem is None:
                raise JudgeError(
                    f"judge exact: no reference for the problem {prompt[:60]!r} ...: give it in --judge_problems"
                )
            self._known[problem.prompt] = problem
        if not self._known[prompt].steps:
            raise JudgeError(
                f"judge exact: the problem {prompt[:60]!r} ... has no reference steps to check against"
            )
        return self._known[prompt]

    def __str__(self) -> str:
        return "exact: the checker"


class RandomJudge(StepJudge):
    """Scores drawn evenly from 0 to 1. They come from seed, prompt and steps up to the scored one alone: a step has the same
    score whatever else it is asked with: what a guided search must not gain from."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def score_steps(
        self, solutions: Sequence[Solution], skip: Sequence[int] | None = None
    ) -> list[list[float] | None]:
        skip = skip or [0] * len(solutions)
        return [
            [self._draw(prompt, steps[: k + 1]) for k in range(first, len(steps))]
            for (prompt, steps), first in zip(solutions, skip, strict=True)
        ]

    def _draw(self, prompt: str, steps: Sequence[str]) -> float:
        key = json.dumps([self.seed, prompt, *steps]).encode()
        return int.from_bytes(blake2b(key, digest_size=4).digest()) / 2**32

    def __str__(self) -> str:
        return f"random scores, seed {self.seed}"


class ShuffledJudge(StepJudge):
    """Another judge's scores, permuted over all scored steps of a call: give it many solutions at once. The permutation depends on
    the seed and on the solutions of the call alone, so that a resumed run repeats it."""

    def __init__(self, judge: StepJudge, seed: int = 0):
        self.judge, self.seed, self.unscored_reason = judge, seed, judge.unscored_reason

    def score_steps(
        self, solutions: Sequence[Solution], skip: Sequence[int] | None = None
    ) -> list[list[float] | None]:
        scores = self.judge.score_steps(solutions, skip)
        pool = [score for solution in scores if solution for score in solution]
        random.Random(json.dumps([self.seed, solutions, skip])).shuffle(pool)
        drawn = iter(pool)
        return [
            None if solution is None else [next(drawn) for _ in solution] for solution in scores
        ]

    def close(self) -> None:
        self.judge.close()

    def __str__(self) -> str:
        return f"shuffled scores of {self.judge}"
