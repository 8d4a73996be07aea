"""The problems that a script samples: those of a data set, or the generated train problems."""

import itertools
from collections.abc import Iterable

from common.files import read_records
from reasoning.datasets.files import Dropped, FieldArgs, check_no_fields, load_rows
from reasoning.datasets.loading import load_problems
from reasoning.problems import problems
from reasoning.records import Problem, Prompt
from reasoning.splits import refuse_held_out


def select_problems(
    name: str | None, limit: int | None, default: int, fields: FieldArgs, with_answers: bool = True
) -> list[Problem] | list[Prompt]:
    """The first `limit` problems of a data set, each prompt once.

    name: None for the generated train problems, of which the first `default` are taken if there is
    no limit. with_answers: whether the rows must have answers, else prompts are enough. What is
    left out is printed. Raises RecordError, and UserError if a problem is held out."""
    if name is None:
        check_no_fields(fields)
        return list(itertools.islice(problems("train"), limit or default))
    dropped = Dropped()
    rows: Iterable[Problem] | Iterable[Prompt]
    if with_answers:
        rows = load_problems(name, dropped=dropped, fields=fields.field_names)
    elif fields.field_names:
        loaded = load_rows(name, dropped=dropped, fields=fields.field_names)
        rows = (Prompt.from_row(row) for _, row in loaded)
    else:
        rows = read_records(name, Prompt)
    selected = list(itertools.islice({row.prompt: row for row in rows}.values(), limit))
    dropped.print(name)
    refuse_held_out(name, selected)
    return selected
