"""Step labels that people made, as a judge."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from common.files import read_records
from reasoning.records import LabelledSolution
from reward_model.protocols import Solution, StepJudge, mean


class HumanJudge(StepJudge):
    """A step's score is the mean of the labels (1 right, 0 wrong) that people gave it: one row a person and solution.

    path: JSONL of LabelledSolution (reasoning/records.py). Raises RecordError with file, line and field. A label belongs to a step
    after one problem and one beginning, so it also scores other solutions that begin alike. A solution with a step that nobody
    labelled gets None."""

    unscored_reason = "not labelled step by step by anyone"

    def __init__(self, path: str | Path):
        self.path = path
        # (prompt, step 1, ..., step k) -> the labels of step k
        self.labels: dict[tuple, list[int]] = defaultdict(list)
        for row in read_records(path, LabelledSolution):
            for k, label in enumerate(row.labels):
                if label is not None:
                    self.labels[row.prompt, *row.steps[: k + 1]].append(label)

    def score_steps(
        self, solutions: Sequence[Solution], skip: Sequence[int] | None = None
    ) -> list[list[float] | None]:
        scored = []
        for (prompt, steps), first in zip(solutions, skip or [0] * len(solutions), strict=True):
            labels = [self.labels.get((prompt, *steps[: k + 1])) for k in range(first, len(steps))]
            scored.append([mean(of_step) for of_step in labels] if all(labels) else None)
        return scored

    def __str__(self) -> str:
        return f"{self.path}: labels of {len(self.labels)} steps"
