"""A judge with scores that a test chooses."""

from collections.abc import Callable, Sequence

from reward_model.protocols import Scores, Solution, StepJudge, with_skip


class FixedJudge(StepJudge):
    """Scores by a function of (prompt, step, earlier steps).

    If the function returns None for a step, the solution is left unscored."""

    def __init__(self, score: Callable[[str, str, Sequence[str]], float | None]):
        self.score = score

    def score_steps(
        self, solutions: Sequence[Solution], skip: Sequence[int] | None = None
    ) -> Scores:
        scored = []
        for prompt, steps, first in with_skip(solutions, skip):
            scores = [self.score(prompt, steps[k], steps[:k]) for k in range(first, len(steps))]
            scored.append(None if None in scores else scores)
        return scored
