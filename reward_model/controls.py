"""Judges to compare with: `exact` and `outcome` know the answers, `random` and `shuffled` do not.

`exact` is a ceiling, and `outcome` shows what is left if only final answers are known. A method
that gains from scores must not gain from the scores of the last two.
"""

import json
import random
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from common.errors import JudgeError
from reasoning.grading import grade_steps, is_correct
from reasoning.records import Problem
from reward_model.protocols import Scores, Solution, StepJudge, with_skip


class _ReferenceJudge(StepJudge):
    """A judge that knows the problems, which have answers.

    problems: read only until the prompts that are asked for are found."""

    name: str

    def __init__(self, problems: Iterable[Problem]):
        self._unread = iter(problems)
        self._by_prompt: dict[str, Problem] = {}

    def _problem(self, prompt: str) -> Problem:
        while prompt not in self._by_prompt:
            problem = next(self._unread, None)
            if problem is None:
                raise JudgeError(
                    f"judge {self.name}: no reference for the problem {prompt[:60]!r} ...: "
                    "give it in --judge_problems"
                )
            self._by_prompt[problem.prompt] = problem
        return self._by_prompt[prompt]


class ExactJudge(_ReferenceJudge):
    """The exact checker: 1 for a right step, 0 from the first error on (reasoning/grading.py).

    Raises JudgeError for a prompt that is not among the problems, or that has no reference
    steps."""

    name = "exact"

    def score_steps(
        self, solutions: Sequence[Solution], skip: Sequence[int] | None = None
    ) -> Scores:
        return [
            grade_steps(list(steps), self._problem(prompt))[first:]
            for prompt, steps, first in with_skip(solutions, skip)
        ]

    def _problem(self, prompt: str) -> Problem:
        problem = super()._problem(prompt)
        if not problem.steps:
            raise JudgeError(
                f"judge exact: the problem {prompt[:60]!r} ... has no reference steps: "
                "give them in --judge_problems"
            )
        return problem

    def __str__(self) -> str:
        return "exact: the checker"


class OutcomeJudge(_ReferenceJudge):
    """1 for every step of a solution whose final answer is right, else 0: no step is looked at.

    As the judge of `train.py ppo --states fresh` it gives the reward of outcome-based methods.
    Raises JudgeError for a prompt that is not among the problems."""

    name = "outcome"

    def score_steps(
        self, solutions: Sequence[Solution], skip: Sequence[int] | None = None
    ) -> Scores:
        return [
            [float(is_correct(list(steps), self._problem(prompt)))] * (len(steps) - first)
            for prompt, steps, first in with_skip(solutions, skip)
        ]

    def __str__(self) -> str:
        return "outcome: the checker of final answers"


class RandomJudge(StepJudge):
    """Scores drawn uniformly from [0, 1).

    A score depends only on the seed, the prompt and the steps up to the scored one. So a step gets
    the same score whichever other solutions are in the call."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def score_steps(
        self, solutions: Sequence[Solution], skip: Sequence[int] | None = None
    ) -> Scores:
        return [
            [self._draw(prompt, steps[: k + 1]) for k in range(first, len(steps))]
            for prompt, steps, first in with_skip(solutions, skip)
        ]

    def _draw(self, prompt: str, steps: Sequence[str]) -> float:
        key = json.dumps([self.seed, prompt, *steps]).encode()
        return int.from_bytes(blake2b(key, digest_size=4).digest()) / 2**32

    def __str__(self) -> str:
        return f"random scores, seed {self.seed}"


class ShuffledJudge(StepJudge):
    """Another judge's scores, permuted over all scored steps of a call.

    Give it many solutions in one call. The permutation depends only on the seed and the solutions
    of the call, so a resumed run repeats it."""

    def __init__(self, judge: StepJudge, seed: int = 0):
        self.judge, self.seed, self.unscored_reason = judge, seed, judge.unscored_reason

    def score_steps(
        self, solutions: Sequence[Solution], skip: Sequence[int] | None = None
    ) -> Scores:
        scores = self.judge.score_steps(solutions, skip)
        pool = [score for solution in scores if solution for score in solution]
        random.Random(json.dumps([self.seed, solutions, skip])).shuffle(pool)
        drawn = iter(pool)
        return [
            None if solution is None else [next(drawn) for _ in solution] for solution in scores
        ]

    def count_tokens(self, texts: Sequence[str]) -> list[int] | None:
        return self.judge.count_tokens(texts)

    def close(self) -> None:
        self.judge.close()

    def __str__(self) -> str:
        return f"shuffled scores of {self.judge}"
