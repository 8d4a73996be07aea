"""Load a data set as records: a local file, a folder of files, or a name on the hub.

The shape of a data set is recognized from the fields of its first rows
(reasoning/datasets/shapes.py lists the shapes). A row that is empty or odd is left out, counted and
shown (`Dropped`); a data set in which no row or almost none can be used is a RecordError.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.cli import beside, here
from common.errors import RecordError
from common.files import at_root, file_type, read_records
from reasoning.datasets.files import Dropped, is_local, load_rows
from reasoning.datasets.preference_shapes import group_of
from reasoning.datasets.ranking import RankedGroup
from reasoning.datasets.row_fields import drop_empty
from reasoning.datasets.shapes import KINDS, SHAPES, Shape
from reasoning.records import Problem, StepValue

FIRST_ROWS = 100  # decide on the shape of a data set
ODD_ROWS = 10  # and more are too many if they are nine tenths of the rows

Convert = Callable[[dict, Dropped], Iterable[Any]]


def shape_of(rows: Sequence[tuple[str, dict]]) -> Shape:
    """The shape of most of the (where, row) that have one, so that no single odd row decides.

    Raises RecordError with the fields of the first row and the known shapes."""
    for with_values in (True, False):
        shapes: list[Shape] = []
        for _, row in rows:
            shapes += [shape for shape in SHAPES if shape.fits(row, with_values)][:1]
        if shapes:
            names = Counter(shape.name for shape in shapes)
            return next(shape for shape in shapes if shape.name == names.most_common(1)[0][0])
    (where, row), known = rows[0], "; ".join(map(str, SHAPES))
    found = ", ".join(row) or "none"
    raise RecordError(f"{where}: fields {found[:200]} are of no known shape; known: {known}")


def find_shape(
    name: str,
    config: str | None = None,
    split: str | None = None,
    fields: Mapping[str, str] | None = None,
) -> Shape:
    """The shape of a data set, from its first rows. Raises RecordError."""
    rows = load_rows(name, config, split, fields=fields)
    return shape_of(list(itertools.islice(rows, FIRST_ROWS)))


def convert_rows(
    name: str, rows: Iterable[tuple[str, dict]], convert: Convert, dropped: Dropped
) -> Iterator[tuple[str, Any]]:
    """Stream (where, record) of the records of all rows.

    A row for which `convert` raises RecordError is left out and counted in `dropped`. A column that
    a row lacks is empty there if the first rows have it. Raises RecordError at the end if no row,
    or almost none, gave a record."""
    rows, kept = iter(rows), 0
    first = list(itertools.islice(rows, FIRST_ROWS))
    columns = dict.fromkeys(column for _, row in first for column in row)
    for number, (where, row) in enumerate(itertools.chain(first, rows)):
        seen = _Seen({**columns, **row})
        try:
            records = list(convert(seen, dropped))
        except RecordError as error:
            dropped.add(where, error)
            continue
        kept += bool(records)
        if number < FIRST_ROWS:
            for column in row:
                dropped.columns[column] = dropped.columns.get(column) or column in seen.columns
        yield from ((where, record) for record in records)
    if not kept or (dropped.odd >= ODD_ROWS and dropped.odd > ODD_ROWS * kept):
        reasons = dropped.examples or [
            f"{count} rows left out: {why}" for why, count in dropped.items()
        ]
        used = f"only {kept}" if kept else "none"
        raise RecordError(
            f"{name}: {used} of its {dropped.read} rows can be used; {'; '.join(reasons)}"
        )


class _Seen(dict):
    """A row that remembers which of its columns were looked at."""

    def __init__(self, row: dict):
        super().__init__(row)
        self.columns: set[str] = set()

    def __getitem__(self, column: str) -> Any:
        self.columns.add(column)
        return super().__getitem__(column)

    def get(self, column: str, default: Any = None) -> Any:
        self.columns.add(column)
        return super().get(column, default)


def load_records(
    kinds: Sequence[str],
    name: str,
    config: str | None = None,
    split: str | None = None,
    dropped: Dropped | None = None,
    fields: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, Any]]:
    """Stream (where, record) of a data set, in the first of `kinds` that its shape can give.

    kinds: keys of reasoning.datasets.shapes.KINDS. config: of a hub data set. split: of a hub data
    set or a folder. dropped: counts the rows that are left out, by reason. fields: as in
    `load_rows`. Raises RecordError."""
    dropped = Dropped() if dropped is None else dropped
    rows = load_rows(name, config, split, dropped, fields)
    first = list(itertools.islice(rows, FIRST_ROWS))
    shape = shape_of(first)
    kind = next((kind for kind in kinds if kind in shape.gives), None)
    if kind is None:
        raise RecordError(
            f"{name}: {shape} gives {' or '.join(shape.gives)}, no {' or '.join(kinds)}"
            + _way_to(kinds, shape, name, config)
        )

    def convert(row: dict, dropped: Dropped) -> Iterator[Any]:
        if drop_empty({field: row.get(field) for field in shape.needed}, dropped):
            return
        for record in shape.gives[kind](row, dropped):
            yield KINDS[kind].from_row(vars(record))

    yield from convert_rows(name, itertools.chain(first, rows), convert, dropped)


def load_groups(
    name: str,
    config: str | None = None,
    split: str | None = None,
    dropped: Dropped | None = None,
    fields: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, RankedGroup]]:
    """Stream (where, group) of a data set of ranked groups, or of pairs of any shape that gives
    pairs: a pair is a group of two whole answers. Raises RecordError."""
    dropped = Dropped() if dropped is None else dropped
    rows = load_rows(name, config, split, dropped, fields)
    yield from convert_rows(name, rows, group_of, dropped)


def _way_to(kinds: Sequence[str], shape: Shape, name: str, config: str | None) -> str:
    """The command that makes one of `kinds` of a data set, or nothing if there is none."""
    if "pairs" not in kinds:
        return ""
    pairs = beside(stored_as(name), "pairs")
    if {"step_labels", "step_values"} & shape.gives.keys():
        hub = ["--dataset_config", config] if config else []
        flags = ["--dataset_name", name, *hub, "--to", "pairs", "--output", pairs]
        return f"; `{here('python utils/prepare_dataset.py', *flags)}` makes pairs of it"
    if "problems" in shape.gives:
        flags = ["--input", name, "--output", pairs]
        command = here("python utils/build_synthetic_dataset.py", *flags)
        return f"; `{command}` samples pairs of right and wrong solutions"
    return ""


def stored_as(name: str) -> str:
    """The path of a data set, or for a hub name a path in data/: what is made of it lies beside."""
    return name if is_local(name) else at_root(f"data/{Path(name).name}")


def _load(
    kind: str,
    name: str,
    config: str | None = None,
    split: str | None = None,
    dropped: Dropped | None = None,
    fields: Mapping[str, str] | None = None,
) -> Iterator[Any]:
    """The records of one kind; for step values also the labels of labelled steps."""
    kinds = ["step_values", "step_labels"] if kind == "step_values" else [kind]
    for _, record in load_records(kinds, name, config, split, dropped, fields):
        if kind != "step_values" or isinstance(record, StepValue):
            yield record
            continue
        for k, (step, label) in enumerate(zip(record.steps, record.labels, strict=True)):
            if label is not None:
                yield StepValue(record.prompt, step, label, prefix=record.steps[:k])


# Each takes (name, config, split, dropped, fields) as load_records does, and raises RecordError.
load_problems = partial(_load, "problems")  # Problem; `steps` if the data set has solutions
load_step_labels = partial(_load, "step_labels")  # LabelledSolution
load_pairs = partial(_load, "pairs")  # PreferencePair; scored if the data set labels its steps
load_step_values = partial(_load, "step_values")  # StepValue: Monte Carlo estimates or labels


def problems_of(name: str, limit: int | None = None) -> list[Problem]:
    """The first `limit` problems of a data set of any shape. Prints what is left out.

    Raises RecordError, in a file of this project's own also for an odd row."""
    if file_type(name) == ".jsonl" and find_shape(name).name == "problems":
        return list(itertools.islice(read_records(name, Problem), limit))
    dropped = Dropped()
    problems = list(itertools.islice(load_problems(name, dropped=dropped), limit))
    dropped.print(name)
    return problems
