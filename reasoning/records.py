"""The records that scripts exchange as files.

`from_row` checks a decoded JSON object and raises RecordError with the field and what was expected;
`common.files.read_records` adds file and line. Above each class is an annotated row of its file.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from common.errors import RecordError
from reasoning.steps import shared_prefix


# One row of data/problems_test.jsonl:
#   {"prompt": "Mia has 12 apples. ...",  the question, plain text
#    "answer": "52",                      the right final answer
#    "steps": ["Step 1: 12 + 14 = 26", "Step 2: 26 * 2 = 52", "Answer: 52"],
#                                         a reference solution (optional)
#    "traps": [false, true, false]}       which steps are traps (optional, only for reports)
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
                row, "traps", lambda v: isinstance(v, bool), "true or false", optional=True
            ),
        )
        if problem.traps and len(problem.traps) != len(problem.steps):
            expected = f"expected one for each of {len(problem.steps)} steps"
            raise RecordError(f"field 'traps': {expected}, got {len(problem.traps)}")
        return problem


# One row of data/rewarded.jsonl. Rows of data/synthetic_dataset.jsonl have no scores.
#   {"prompt": "Mia has 12 apples. ...",                 the question, without a template
#    "prefix": ["Step 1: 12 + 14 = 26"],                 steps that both sides share, which get no
#                                                        loss and no score (optional, default none)
#    "chosen": ["Step 2: 26 * 2 = 52", "Answer: 52"],    the steps of the better continuation
#    "rejected": ["Step 2: 26 + 2 = 28", "Answer: 28"],  the steps of the worse one
#    "chosen_scores": [0.98, 0.97],                      a judge's score of each step of `chosen`,
#                                                        0 (wrong) to 1 (right)
#    "rejected_scores": [0.03, 0.01],                    the same for `rejected`
#    "judge": "prm-mini 0f3a5c90d1e2"}                   the judge of these scores: its name, and a
#                                                        hash of what it is (optional: only of
#                                                        pairs that build_synthetic_dataset.py
#                                                        --pair_by judge has made)
@dataclass(frozen=True)
class PreferencePair:
    prompt: str
    chosen: list[str]
    rejected: list[str]
    prefix: list[str] = field(default_factory=list)
    chosen_scores: list[float] | None = None
    rejected_scores: list[float] | None = None
    judge: str | None = None

    @classmethod
    def from_solutions(cls, prompt: str, better: list[str], worse: list[str]) -> "PreferencePair":
        """A pair of two whole solutions. Its prefix are the steps that both share at the start,
        except that each side keeps at least one step."""
        k = min(shared_prefix(better, worse), len(better) - 1, len(worse) - 1)
        return cls(prompt, better[k:], worse[k:], prefix=better[:k])

    @classmethod
    def from_row(cls, row: Any) -> Self:
        row = _object(row)
        pair = cls(
            prompt=_text(row, "prompt"),
            prefix=_steps(row, "prefix", optional=True),
            chosen=_steps(row, "chosen"),
            rejected=_steps(row, "rejected"),
            chosen_scores=_scores(row, "chosen_scores"),
            rejected_scores=_scores(row, "rejected_scores"),
            judge=_text(row, "judge") if row.get("judge") is not None else None,
        )
        for side in ("chosen", "rejected"):
            steps, scores = getattr(pair, side), getattr(pair, f"{side}_scores")
            if scores is not None and len(scores) != len(steps):
                expected = f"expected one score for each of {len(steps)} steps"
                raise RecordError(f"field '{side}_scores': {expected}, got {len(scores)}")
        if (pair.chosen_scores is None) != (pair.rejected_scores is None):
            raise RecordError(
                "fields 'chosen_scores' and 'rejected_scores': expected both or neither"
            )
        return pair


@dataclass(frozen=True)
class ScoredPair(PreferencePair):
    """A PreferencePair that must have scores, as training on data/rewarded.jsonl needs them."""

    @classmethod
    def from_row(cls, row: Any) -> Self:
        pair = super().from_row(row)
        if pair.chosen_scores is None:
            raise RecordError(
                "field 'chosen_scores' is missing: score the pairs first with "
                "reward_model/evaluate_steps.py"
            )
        return pair


# One row of data/mcts_steps.jsonl.gz; utils/prepare_dataset.py writes such rows too.
#   {"prompt": "Mia has 12 apples. ...",  the question, plain text
#    "prefix": ["Step 1: 12 + 14 = 26"],  the steps before `step` (optional, default none)
#    "step": "Step 2: 26 * 2 = 52",
#    "score": 0.75,                       value of `step`, 0..1: the share of rollouts after it that
#                                         end right, or a label (1 right, 0 wrong)
#    "rollouts": 8,                       number of these rollouts (optional)
#    "visits": 3}                         how often the search visited `step` (optional)
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
            got = _kind(value.score)
            raise RecordError(f"field 'score': expected a score from 0 to 1, got {got}")
        return value


# One row of a file of step labels: by people, or of PRM800K, Math-Shepherd, ProcessBench.
#   {"prompt": "Mia has 12 apples. ...",  the question, plain text
#    "steps": ["Step 1: 12 + 14 = 26", "Step 2: 26 + 2 = 28", "Answer: 28"],
#    "labels": [1, 0, null],              1 right, 0 wrong, null: no label
#    "final_correct": false}              whether the final answer is right (optional)
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
            labels=_list(row, "labels", _is_label, "a label from 0 to 1 or null"),
            final_correct=row.get("final_correct"),
        )
        if len(solution.labels) != len(solution.steps):
            expected = f"expected one label for each of {len(solution.steps)} steps"
            raise RecordError(f"field 'labels': {expected}, got {len(solution.labels)}")
        if not isinstance(solution.final_correct, bool | None):
            got = _kind(solution.final_correct)
            raise RecordError(f"field 'final_correct': expected true or false, got {got}")
        return solution


@dataclass(frozen=True)
class Prompt:
    """The prompt of a row of any file with prompts; the other fields are ignored."""

    prompt: str

    @classmethod
    def from_row(cls, row: Any) -> "Prompt":
        return cls(_text(_object(row), "prompt"))


def _object(row: Any) -> dict:
    if not isinstance(row, dict):
        raise RecordError(f"expected a JSON object, got {_kind(row)}")
    return row


def _kind(value: Any) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}
    names |= {bool: "true or false", type(None): "null"}
    if type(value) in names:
        return names[type(value)]
    try:
        digits = str(value)
    except ValueError:  # Python does not print more than 4,300 digits
        digits = ""
    return f"the number {digits}" if 0 < len(digits) <= 40 else "a number of too many digits"


def _text(row: dict, name: str) -> str:
    if name not in row:
        raise RecordError(f"field '{name}' is missing: expected a text")
    return check_text(row[name], f"field '{name}'")


def check_text(value: Any, where: str) -> str:
    """The value, if it is a text. Raises RecordError, which begins with `where`, if it is none."""
    if not isinstance(value, str):
        raise RecordError(f"{where}: expected a text, got {_kind(value)}")
    if not value.strip():
        raise RecordError(f"{where}: expected a text, got an empty one")
    try:
        value.encode()
    except UnicodeEncodeError:
        got = "half of a Unicode surrogate pair"
        raise RecordError(f"{where}: expected a text, got {got}") from None
    return value


def _list(
    row: dict, name: str, accepts: Callable[[Any], bool], expected: str, optional: bool = False
) -> list:
    values = row.get(name)
    if values is None:
        if optional:
            return []
        raise RecordError(f"field '{name}' is missing: expected a list of {expected}")
    if not isinstance(values, list):
        raise RecordError(f"field '{name}': expected a list, got {_kind(values)}")
    for position, value in enumerate(values, 1):
        if not accepts(value):
            where = f"field '{name}', item {position}"
            raise RecordError(f"{where}: expected {expected}, got {_kind(value)}")
    return values


def _steps(row: dict, name: str, optional: bool = False) -> list[str]:
    steps = _list(row, name, lambda value: True, "texts", optional)
    if not steps and not optional:
        raise RecordError(f"field '{name}': expected at least one step, got an empty list")
    return [check_text(step, f"field '{name}', step {k + 1}") for k, step in enumerate(steps)]


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_label(value: Any) -> bool:
    return value is None or _is_score(value)


def _scores(row: dict, name: str) -> list[float] | None:
    return None if row.get(name) is None else _list(row, name, _is_score, "a score from 0 to 1")


def _count(row: dict, name: str) -> int | None:
    value = row.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise RecordError(f"field '{name}': expected a whole number from 0 on, got {_kind(value)}")
    return value
