"""A judge whose scores a test writes down."""

from collections.abc import Callable, Sequence

from reward_model.protocols import Solution, StepJudge


class FixedJudge(StepJudge):
    """Scores by a plain function of (prompt, step, earlier steps); a None leaves the solution unscored."""

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
