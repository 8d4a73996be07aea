"""Ranked responses: several answers to a prompt, put in order by a person, a rule or a model. A table that a spreadsheet opens.

The file is long: one row for each (prompt, answer, ranker). What a second ranker says of the same answers are further rows.
"""

import csv
import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from common.errors import RecordError
from common.files import write_text
from reasoning.datasets.files import read_table


# One row of data/answers.csv, its cells one under the other (the published shape has the first three columns alone):
#   prompt       Mia has 12 apples. ...      the question or request, plain text; all its answers have the very same
#   answer       Step 1: 12 + 14 = 26 ...    a response, as many lines as it likes (a quoted cell)
#   rank         1                           1 = best; ties as 1,2,2,4 or 1,2,2,3; empty: not ranked yet
#   ranker       rule:exact                  who ranked: a person's name, rule:NAME, or llm:NAME for a model; empty: nobody said
#   category     right                       a kind that evaluation tells apart: of the answer in data/answers.csv, of the prompt in
#                                            data/answers_smollm2.csv
#   generator    policy-mini+error           the model that wrote the answer; +error: one was put in
#   temperature  1.0                         of the sampling, 0 is greedy
#   top_p        0.9                         of the sampling, above 0, at most 1
#   seed         7                           of the sampling
#   split        train                       train, validation or test: a prompt with all its answers is in one of them
#   note         two steps in one            anything the ranker wants to say
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
        """From the cells of a table's row. Raises RecordError with the column and what was expected."""
        for name in ("prompt", "answer"):
            if not row[name].strip():
                raise RecordError(f"column '{name}': expected a text, got an empty one")
        return cls(
            **row
            | {
                "rank": _number(
                    row,
                    "rank",
                    "a whole number from 1 on",
                    lambda value: value >= 1 and value.is_integer(),
                    int,
                ),
                "temperature": _number(
                    row, "temperature", "a number from 0 on", lambda value: value >= 0
                ),
                "top_p": _number(
                    row, "top_p", "a number above 0, at most 1", lambda value: 0 < value <= 1
                ),
                "seed": _number(row, "seed", "a whole number", float.is_integer, int),
            }
        )


# What a reward model learns from: a prompt with all answers that one ranker ranked (1 is the best, ties are allowed), or a pair of
# texts (`prompt`, `chosen`, `rejected`), as preference data is published; a pair is kept as a group of two:
#   {"prompt": "Mia has 12 apples. ...", "answers": ["Step 1: 12 + 14 = 26\\n...", "Step 1: 12 + 14 = 16\\n..."], "ranks": [1, 2]}
@dataclass(frozen=True)
class RankedGroup:
    prompt: str
    answers: list[str]
    ranks: list[int]

    @classmethod
    def from_row(cls, row: Any) -> "RankedGroup":
        """Raises RecordError if the row is neither."""
        if not isinstance(row, dict):
            raise RecordError(f"expected an object, got {str(row)[:60]!r}")
        is_group = "answers" in row and "ranks" in row
        names = ("prompt",) if is_group else ("prompt", "chosen", "rejected")
        for name in names:
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise RecordError(
                    f"field '{name}': expected a text, got {str(row.get(name))[:60]!r}"
                )
        if not is_group:
            return cls(row["prompt"], [row["chosen"], row["rejected"]], [1, 2])
        group = cls(row["prompt"], row["answers"], row["ranks"])
        if len(group.answers) != len(group.ranks):
            raise RecordError(
                f"field 'ranks': expected one for each of {len(group.answers)} answers, got {len(group.ranks)}"
            )
        return group


COLUMNS = [field.name for field in fields(RankedResponse)]


def _number(
    row: dict[str, str], name: str, expected: str, is_right, kind: type = float
) -> float | None:
    """Spreadsheets write 1.0 for 1 beside empty cells, and 0,7 for 0.7."""
    text = row.get(name, "").strip()
    if not text:
        return None
    try:
        value = float(text.replace(",", "."))
        if math.isfinite(value) and is_right(value):
            # int of a float is off above 2**53
            return kind(text) if kind is int and text.isdecimal() else kind(value)
    except ValueError:
        pass
    raise RecordError(f"column '{name}': expected {expected} or an empty cell, got {text[:40]!r}")


def read_answers(path: str | Path) -> list[RankedResponse]:
    """The rows of a table, in the order of the file. Comma, semicolon or tab between the cells, a byte-order mark, rows of nothing
    but empty cells: as spreadsheets write it. Columns but `prompt` and `answer` may be missing; an unknown one is refused, since
    whoever writes the file again would lose it. Raises RecordError with file and line."""
    _, names, rows = read_table(path, ("prompt", "answer"))
    names = [name.strip().lower() for name in names]
    for name in names:
        if name not in COLUMNS or names.count(name) > 1:
            wrong = "two columns are called" if name in COLUMNS else "unknown column"
            raise RecordError(
                f"{path}:1: {wrong} {name!r}; known are {', '.join(COLUMNS)}: rename or remove it"
            )
    answers = []
    for line, cells in rows:
        try:
            answers.append(RankedResponse.from_row(dict(zip(names, cells, strict=True))))
        except RecordError as error:
            raise RecordError(f"{path}:{line}: {error}") from None
    if not answers:
        raise RecordError(
            f"{path}: no rows; expected a header ({', '.join(COLUMNS[:3])} ...) and one row an answer"
        )
    return answers


def write_answers(path: str | Path, rows: Iterable[RankedResponse]) -> None:
    """Write a table, whole or not at all."""
    table: list[str] = []
    # csv quotes a lone \r only where \r ends lines
    writer = csv.DictWriter(_Append(table), COLUMNS, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(map(asdict, rows))
    write_text(path, (row.removesuffix("\r\n") + "\n" for row in table))


class _Append:
    """What csv writes to: every row by itself."""

    def __init__(self, rows: list[str]):
        self.write = rows.append


def groups(rows: Iterable[RankedResponse]) -> dict[tuple[str, str], list[RankedResponse]]:
    """(prompt, ranker) -> what this ranker ranked of the prompt's answers, in the order of the file; rows without a rank are left
    out."""
    found: dict[tuple[str, str], list[RankedResponse]] = defaultdict(list)
    for row in rows:
        if row.rank is not None:
            found[row.prompt, row.ranker].append(row)
    return dict(found)


def split_of(prompt: str) -> str:
    """The split of a prompt where nobody chose one: a fifth of all are `test`, those that records.is_kept_out names among them."""
    return "test" if int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 5 == 0 else "train"


def check_groups(rows: Sequence[RankedResponse], path: str | Path) -> None:
    """Raises RecordError, naming file and prompt, for what is wrong with rows taken together: a prompt with one answer, or one
    answer ranked; ranks missing within a group; ranks that leave one out (2,2,3 or 1,3,4; ties are 1,2,2,4 or 1,2,2,3);
    the same answer twice for one ranker; a prompt in two splits."""
    seen, answers, splits = set(), defaultdict(set), {}
    missing = {(row.prompt, row.ranker) for row in rows if row.rank is None}
    for row in rows:
        if (row.prompt, row.answer, row.ranker) in seen:
            raise _mistake(
                path, row.prompt, f"the same answer twice{_by(row.ranker)}: {row.answer[:40]!r}"
            )
        if splits.setdefault(row.prompt, row.split) != row.split:
            raise _mistake(
                path, row.prompt, f"in two splits, {splits[row.prompt]!r} and {row.split!r}"
            )
        seen.add((row.prompt, row.answer, row.ranker))
        answers[row.prompt].add(row.answer)
    for prompt, texts in answers.items():
        if len(texts) == 1:
            raise _mistake(path, prompt, "has one answer; ranking needs two or more")
    for (prompt, ranker), group in groups(rows).items():
        ranks = sorted(row.rank for row in group)
        if (prompt, ranker) in missing:
            raise _mistake(path, prompt, f"some of its answers have no rank{_by(ranker)}")
        if len(group) == 1:
            raise _mistake(
                path, prompt, f"one of its answers is ranked{_by(ranker)}; a group is two or more"
            )
        dense = sorted(set(ranks)) == list(range(1, len(set(ranks)) + 1))
        if not dense and any(rank != 1 + ranks.index(rank) for rank in ranks):
            shown = ",".join(map(str, ranks))
            raise _mistake(
                path,
                prompt,
                f"ranks {shown}{_by(ranker)} leave one out; ties are written 1,2,2,4 or 1,2,2,3",
            )


def _by(ranker: str) -> str:
    return f" by {ranker}" if ranker else ""


def _mistake(path: str | Path, prompt: str, what: str) -> RecordError:
    return RecordError(f"{path}: prompt {prompt[:60]!r}: {what}")
