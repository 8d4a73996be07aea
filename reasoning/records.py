"""The records that flow between the scripts.

A record is checked where it enters: `from_row` takes a decoded JSON object and raises RecordError
with the field and what was expected; `common.files.read_records` adds file and line. One annotated
row of each file type stands beside its class.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from common.errors import RecordError
from reasoning.steps import shared_prefix


# One row of data/problems_test.jsonl:
#   {"prompt": "Mia has 12 apples. ... How many apples does Mia have now?",   the question, plain text
#    "answer": "52",                                                          the right final answer
#    "steps": ["Step 1: 12 + 14 = 26", "Step 2: 26 * 2 = 52", "Answer: 52"],  a reference solution (optional)
#    "traps": [false, true, false]}                                           which steps are traps (optional, reports only)
@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str
    steps: list[str] = field(default_factory=list)
    traps: list[bool] = field(default_factory=list)

    @classmethod
    def from_row(cls, row: Any) -> "Problem":
        row = _object(row)
        problem = cls(
            prompt=_text(row, "prompt"),
            answer=_text(row, "answer"),
            steps=_steps(row, "steps", optional=True),
            traps=_list(
                row, "traps", lambda value: isinstance(value, bool), "true or false", optional=True
            ),
        )
        if problem.traps and len(problem.traps) != len(problem.steps):
            raise RecordError(
                f"field 'traps': expected one for each of {len(problem.steps)} steps, got {len(problem.traps)}"
            )
        return problem


# One row of data/rewarded.jsonl; data/synthetic_dataset.jsonl has the same row without the two score fields:
#   {"prompt": "Mia has 12 apples. ...",            the question, plain text; the template is added by reasoning/steps.py
#    "prefix": ["Step 1: 12 + 14 = 26"],            steps both sides share (optional, default none): no loss, no score
#    "chosen": ["Step 2: 26 * 2 = 52", "Answer: 52"],      the better continuation, step by step
#    "rejected": ["Step 2: 26 + 2 = 28", "Answer: 28"],    the worse one
#    "chosen_scores": [0.98, 0.97],                 a judge's score of every step of `chosen`, 0 (wrong) to 1 (right)
#    "rejected_scores": [0.03, 0.01]}               the same for `rejected`
@dataclass(frozen=True)
class PreferencePair:
    prompt: str
    chosen: list[str]
    rejected: list[str]
    prefix: list[str] = field(default_factory=list)
    chosen_scores: list[float] | None = None
    rejected_scores: list[float] | None = None

    @classmethod
    def of_solutions(cls, prompt: str, better: list[str], worse: list[str]) -> "PreferencePair":
        """Two whole solutions as a pair: the steps that both begin with are its prefix; each side keeps one step at least."""
        k = min(shared_prefix(better, worse), len(better) - 1, len(worse) - 1)
        return cls(prompt, better[k:], worse[k:], prefix=better[:k])

    @classmethod
    def from_row(cls, row: Any) -> "PreferencePair":
        row = _object(row)
        pair = cls(
            prompt=_text(row, "prompt"),
            prefix=_steps(row, "prefix", optional=True),
            chosen=_steps(row, "chosen"),
            rejected=_steps(row, "rejected"),
            chosen_scores=_scores(row, "chosen_scores"),
            rejected_scores=_scores(row, "rejected_scores"),
        )
        for side in ("chosen", "rejected"):
            steps, scores = getattr(pair, side), getattr(pair, f"{side}_scores")
            if scores is not None and len(scores) != len(steps):
                raise RecordError(
                    f"field '{side}_scores': expected one score for each of {len(steps)} steps, got {len(scores)}"
                )
        if (pair.chosen_scores is None) != (pair.rejected_scores is None):
            raise RecordError(
                "fields 'chosen_scores' and 'rejected_scores': expected both or neither"
            )
        return pair


@dataclass(frozen=True)
class ScoredPair(PreferencePair):
    """A PreferencePair whose scores must be there: what training and evaluation on data/rewarded.jsonl read."""

    @classmethod
    def from_row(cls, row: Any) -> "ScoredPair":
        pair = super().from_row(row)
        if pair.chosen_scores is None:
            raise RecordError(
                "field 'chosen_scores' is missing: score the pairs first (python reward_model/evaluate_steps.py)"
            )
        return pair


# One row of a file of searched steps (and what utils/prepare_dataset.py makes of step labels and Monte Carlo values):
#   {"prompt": "Mia has 12 apples. ...",            the question, plain text
#    "prefix": ["Step 1: 12 + 14 = 26"],            the steps before it (optional, default none)
#    "step": "Step 2: 26 * 2 = 52",                 the step that is valued
#    "score": 0.75,                                 0..1: share of rollouts from here that end right, or a label (1 right, 0 wrong)
#    "rollouts": 8, "visits": 3}                    how many rollouts that was, how often the search came by (both optional)
@dataclass(frozen=True)
class StepValue:
    prompt: str
    step: str
    score: float
    prefix: list[str] = field(default_factory=list)
    rollouts: int | None = None
    visits: int | None = None

    @classmethod
    def from_row(cls, row: Any) -> "StepValue":
        row = _object(row)
        value = cls(
            prompt=_text(row, "prompt"),
            prefix=_steps(row, "prefix", optional=True),
            step=_text(row, "step"),
            score=row.get("score"),
            rollouts=_count(row, "rollouts"),
            visits=_count(row, "visits"),
        )
        if not _is_score(value.score):
            raise RecordError(
                f"field 'score': expected a score from 0 to 1, got {_kind(value.score)}"
            )
        return value


# One row of a file of step labels (made by people, or read from PRM800K, Math-Shepherd, ProcessBench by reasoning/datasets/shapes.py):
#   {"prompt": "Mia has 12 apples. ...",                                      the question, plain text
#    "steps": ["Step 1: 12 + 14 = 26", "Step 2: 26 + 2 = 28", "Answer: 28"],  a solution
#    "labels": [1, 0, null],                                                  1 right, 0 wrong, null: nobody said
#    "final_correct": false}                                                  is its final answer right (optional)
@dataclass(frozen=True)
class LabelledSolution:
    prompt: str
    steps: list[str]
    labels: list[float | None]
    final_correct: bool | None = None

    @classmethod
    def from_row(cls, row: Any) -> "LabelledSolution":
        row = _object(row)
        solution = cls(
            prompt=_text(row, "prompt"),
            steps=_steps(row, "steps"),
            labels=_list(
                row,
                "labels",
                lambda value: value is None or _is_score(value),
                "a label from 0 to 1 or null",
            ),
            final_correct=row.get("final_correct"),
        )
        if len(solution.labels) != len(solution.steps):
            expected = f"expected one label for each of {len(solution.steps)} steps, got {len(solution.labels)}"
            raise RecordError(f"field 'labels': {expected}")
        if not isinstance(solution.final_correct, bool | None):
            raise RecordError(
                f"field 'final_correct': expected true or false, got {_kind(solution.final_correct)}"
            )
        return solution


@dataclass(frozen=True)
class Prompt:
    """A row of any file that holds prompts; its other fields are not read."""

    prompt: str

    @classmethod
    def from_row(cls, row: Any) -> "Prompt":
        return cls(_text(_object(row), "prompt"))


def _object(row: Any) -> dict:
    if not isinstance(row, dict):
        raise RecordError(f"expected a JSON object, got {_kind(row)}")
    return row


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(type(value), f"the number {value}")


def _text(row: dict, name: str) -> str:
    if name not in row:
        raise RecordError(f"field '{name}' is missing: expected a text")
    return _check_text(row[name], f"field '{name}'")


def _check_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{where}: expected a text, got {_kind(value)}")
    if not value.strip():
        raise RecordError(f"{where}: expected a text, got an empty one")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RecordError(
            f"{where}: expected a text, got half of a Unicode surrogate pair"
        ) from None
    return value


def _list(row: dict, name: str, is_right, expected: str, optional: bool = False) -> list:
    values = row.get(name)
    if values is None:
        if optional:
            return []
        raise RecordError(f"field '{name}' is missing: expected a list of {expected}")
    if not isinstance(values, list):
        raise RecordError(f"field '{name}': expected a list, got {_kind(values)}")
    for position, value in enumerate(values):
        if not is_right(value):
            raise RecordError(
                f"field '{name}', item {position + 1}: expected {expected}, got {_kind(value)}"
            )
    return values


def _steps(row: dict, name: str, optional: bool = False) -> list[str]:
    steps = _list(row, name, lambda value: True, "texts", optional)
    if not steps and not optional:
        raise RecordError(f"field '{name}': expected at least one step, got an empty list")
    return [_check_text(step, f"field '{name}', step {k + 1}") for k, step in enumerate(steps)]


def _is_score(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and 0 <= value <= 1
    )


def _scores(row: dict, name: str) -> list[float] | None:
    return None if row.get(name) is None else _list(row, name, _is_score, "a score from 0 to 1")


def _count(row: dict, name: str) -> int | None:
    value = row.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise RecordError(f"field '{name}': expected a whole number from 0 on, got {_kind(value)}")
    return value
