"""Step labels made by people, used as a judge."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from common.files import read_records
from reasoning.records import LabelledSolution
from reward_model.protocols import Scores, Solution, StepJudge, mean, with_skip


class HumanJudge(StepJudge):
    """The score of a step is the mean of the labels (1 right, 0 wrong) that people gave it.

    path: JSONL of LabelledSolution (reasoning/records.py), one row for each person and solution.
    Raises RecordError with file, line and field. A label belongs to a step after one prompt and one
    prefix, so it also scores other solutions with the same prefix. A solution with a step that
    nobody labelled gets None."""

    unscored_reason = "not labelled step by step by anyone"

    def __init__(self, path: str | Path):
        self.path = path
        # (prompt, step 1, ..., step k) -> the labels of step k
        self.labels: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for row in read_records(path, LabelledSolution):
            for k, label in enumerate(row.labels):
                if label is not None:
                    self.labels[row.prompt, *row.steps[: k + 1]].append(label)

    def score_steps(
        self, solutions: Sequence[Solution], skip: Sequence[int] | None = None
    ) -> Scores:
        scored: Scores = []
        for prompt, steps, first in with_skip(solutions, skip):
            keys = [(prompt, *steps[: k + 1]) for k in range(first, len(steps))]
            is_labelled = all(key in self.labels for key in keys)
            scored.append([mean(self.labels[key]) for key in keys] if is_labelled else None)
        return scored

    def __str__(self) -> str:
        return f"{self.path}: labels of {len(self.labels)} steps"
