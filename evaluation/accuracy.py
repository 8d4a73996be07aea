"""Exact accuracy of a policy's greedy answers, for trainings and benchmarks."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from common.cli import check_input
from common.progress import taking_long
from reasoning.datasets.loading import problems_of
from reasoning.grading import is_correct
from reasoning.records import Problem

if TYPE_CHECKING:
    from lm.policy import Policy


def correct_answers(
    policy: "Policy",
    problems: Sequence[Problem],
    temperature: float = 0.0,
    progress: str | None = None,
) -> list[bool]:
    """For each problem whether the policy's answer is right; greedy at temperature 0."""
    prompts = [problem.prompt for problem in problems]
    answers = policy.generate(prompts, temperature=temperature, progress=progress)
    return [
        is_correct(answer.steps, problem)
        for (answer,), problem in zip(answers, problems, strict=True)
    ]


def greedy_accuracy(path: str, limit: int) -> Callable[["Policy"], dict[str, float]]:
    """A function that measures a policy's `exact_accuracy` (0 to 1) on problems of a file.

    path: problems in any known shape, of which the first `limit` are used. Raises UserError or
    RecordError if the file cannot be read."""
    check_input(path)
    problems = problems_of(path, limit)

    def evaluate(policy: "Policy") -> dict[str, float]:
        with taking_long(f"answering {len(problems)} problems of {path}"):
            correct = correct_answers(policy, problems)
        return {"exact_accuracy": sum(correct) / len(correct)}

    return evaluate
