"""Ranked responses: several answers to a prompt, ranked by a person, a rule or a model.

The file is a CSV table that spreadsheets can open, with one row for each (prompt, answer, ranker).
The ranks of a second ranker are further rows with the same answers. A text that a spreadsheet would
run as a formula (`=1+1`) is written with `'` before it, and read back without.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from common.errors import RecordError
from common.files import write_text
from reasoning.datasets.files import read_table, table_lines
from reasoning.records import check_text


# One row of data/answers.csv.gz, one line for each cell. Published tables have only the first three
# columns.
#   prompt       Mia has 12 apples. ...    the question, plain text; the same for all its answers
#   answer       Step 1: 12 + 14 = 26 ...  a response of any number of lines (a quoted cell)
#   rank         1                         1 = best; ties as 1,2,2,4 or 1,2,2,3; empty: not ranked
#   ranker       rule:exact                a person's name, rule:NAME, or llm:NAME for a model;
#                                          empty: unknown
#   category     right                     reported separately; a category of answers in
#                                          data/answers.csv.gz, of prompts in
#                                          data/answers_smollm2.csv
#   generator    policy-mini+error         the model that wrote the answer; +error: with an
#                                          inserted error
#   temperature  1.0                       of the sampling; 0 is greedy
#   top_p        0.9                       of the sampling; above 0, at most 1
#   seed         7                         of the sampling
#   split        train                     train, validation or test; the same for all answers to
#                                          a prompt
#   note         two steps in one          a free remark of the ranker
@dataclass(frozen=True)
class RankedResponse:
    prompt: str
    answer: str
    rank: int | None = None
    ranker: str = ""
    category: str = ""
    generator: str = ""
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    split: str = ""
    note: str = ""

    @classmethod
    def from_row(cls, row: dict[str, str]) -> "RankedResponse":
        """From the cells of a row. Raises RecordError with the column and what was expected."""
        for name in ("prompt", "answer"):
            if not row[name].strip():
                raise RecordError(f"column '{name}': expected a text, got an empty one")
        numbers: dict[str, Any] = {name: _number(row, name) for name in _NUMBERS}
        return cls(**{**row, **numbers})


# The training data of a reward model: a prompt and all answers that one ranker ranked.
#   {"prompt": "Mia has 12 apples. ...",
#    "answers": ["Step 1: 12 + 14 = 26\\n...", "Step 1: 12 + 14 = 16\\n..."],
#    "ranks": [1, 2]}                              1 = best; ties are allowed
# A pair of any shape of reasoning/datasets/shapes.py becomes a group of two.
@dataclass(frozen=True)
class RankedGroup:
    prompt: str
    answers: list[str]
    ranks: list[int]

    @classmethod
    def from_row(cls, row: Any) -> "RankedGroup":
        """Raises RecordError if the row is no group."""
        row = row if isinstance(row, dict) else {}
        answers, ranks = row.get("answers"), row.get("ranks")
        if not isinstance(answers, list) or len(answers) < 2:
            raise RecordError("field 'answers': expected a list of two texts or more")
        for k, answer in enumerate(answers, 1):
            check_text(answer, f"field 'answers', item {k}")
        if not isinstance(ranks, list) or any(type(rank) is not int or rank < 1 for rank in ranks):
            raise RecordError("field 'ranks': expected a list of whole numbers from 1 on")
        group = cls(check_text(row.get("prompt"), "field 'prompt'"), answers, ranks)
        if len(group.answers) != len(group.ranks):
            expected = f"one for each of {len(group.answers)} answers"
            raise RecordError(f"field 'ranks': expected {expected}, got {len(group.ranks)}")
        return group


COLUMNS = [field.name for field in fields(RankedResponse)]

# column -> (what is expected, test of the value, type)
_NUMBERS: dict[str, tuple[str, Callable[[float], bool], type]] = {
    "rank": ("a whole number from 1 on", lambda value: value >= 1 and value.is_integer(), int),
    "temperature": ("a number from 0 on", lambda value: value >= 0, float),
    "top_p": ("a number above 0, at most 1", lambda value: 0 < value <= 1, float),
    "seed": ("a whole number", float.is_integer, int),
}


def _number(row: dict[str, str], name: str) -> float | None:
    """The number in a cell. Spreadsheets may write 1.0 for 1, and 0,7 for 0.7."""
    expected, accepts, kind = _NUMBERS[name]
    text = row.get(name, "").strip()
    if not text:
        return None
    try:
        value = float(text.replace(",", "."))
        if math.isfinite(value) and accepts(value):
            # a float is not exact above 2**53
            return kind(text) if kind is int and text.isdecimal() else kind(value)
    except ValueError:
        pass
    raise RecordError(f"column '{name}': expected {expected} or an empty cell, got {text[:40]!r}")


def read_answers(path: str | Path) -> list[RankedResponse]:
    """The rows of a table as spreadsheets write it (see `read_table`), in the order of the file.

    All columns except `prompt` and `answer` may be missing. An unknown column is refused, because
    it would be lost when the file is written again. Raises RecordError with file and line."""
    _, names, rows = read_table(path, ("prompt", "answer"))
    names = [name.strip().lower() for name in names]
    for name in names:
        if name not in COLUMNS or names.count(name) > 1:
            mistake = "two columns are called" if name in COLUMNS else "unknown column"
            known = ", ".join(COLUMNS)
            raise RecordError(
                f"{path}:1: {mistake} {name!r}; known are {known}: rename or remove it"
            )
    answers = []
    for line, cells in rows:
        try:
            answers.append(RankedResponse.from_row(dict(zip(names, cells, strict=True))))
        except RecordError as error:
            raise RecordError(f"{path}:{line}: {error}") from None
    if not answers:
        header = ", ".join(COLUMNS[:3])
        raise RecordError(f"{path}: no rows; expected a header ({header} ...) and a row per answer")
    return answers


def write_answers(path: str | Path, rows: Iterable[RankedResponse]) -> None:
    """Write a table, whole or not at all."""

    write_text(path, table_lines(COLUMNS, map(asdict, rows)))


def groups(rows: Iterable[RankedResponse]) -> dict[tuple[str, str], list[RankedResponse]]:
    """(prompt, ranker) -> the rows that this ranker ranked, in the order of `rows`.

    Rows without a rank are left out."""
    found: dict[tuple[str, str], list[RankedResponse]] = defaultdict(list)
    for row in rows:
        if row.rank is not None:
            found[row.prompt, row.ranker].append(row)
    return dict(found)


def check_groups(rows: Sequence[RankedResponse], path: str | Path) -> None:
    """Check the rows of each prompt and ranker together. Raises RecordError with file and prompt.

    Mistakes are: only one answer to a prompt, or only one that is ranked; some ranks missing in a
    group; ranks that skip a number (2,2,3 or 1,3,4; ties are 1,2,2,4 or 1,2,2,3); the same answer
    twice for one ranker; a prompt in two splits."""
    seen, answers, splits = set(), defaultdict(set), dict[str, str]()
    incomplete = {(row.prompt, row.ranker) for row in rows if row.rank is None}
    for row in rows:
        if (row.prompt, row.answer, row.ranker) in seen:
            what = f"the same answer twice{_by(row.ranker)}: {row.answer[:40]!r}"
            raise _mistake(path, row.prompt, what)
        if splits.setdefault(row.prompt, row.split) != row.split:
            what = f"in two splits, {splits[row.prompt]!r} and {row.split!r}"
            raise _mistake(path, row.prompt, what)
        seen.add((row.prompt, row.answer, row.ranker))
        answers[row.prompt].add(row.answer)
    for prompt, texts in answers.items():
        if len(texts) == 1:
            raise _mistake(path, prompt, "has one answer; ranking needs two or more")
    for (prompt, ranker), group in groups(rows).items():
        ranks = sorted(row.rank for row in group if row.rank is not None)
        if (prompt, ranker) in incomplete:
            raise _mistake(path, prompt, f"some of its answers have no rank{_by(ranker)}")
        if len(group) == 1:
            what = f"only one of its answers is ranked{_by(ranker)}; a group is two or more"
            raise _mistake(path, prompt, what)
        dense = sorted(set(ranks)) == list(range(1, len(set(ranks)) + 1))
        if not dense and any(rank != 1 + ranks.index(rank) for rank in ranks):
            shown = ",".join(map(str, ranks))
            what = f"ranks {shown}{_by(ranker)} leave one out; write ties as 1,2,2,4 or 1,2,2,3"
            raise _mistake(path, prompt, what)


def _by(ranker: str) -> str:
    return f" by {ranker}" if ranker else ""


def _mistake(path: str | Path, prompt: str, what: str) -> RecordError:
    return RecordError(f"{path}: prompt {prompt[:60]!r}: {what}")
