"""Load a data set as records: a local file, a folder of files, or a name on the hub.

The shape of a data set is recognized from the fields of its first row (reasoning/datasets/shapes.py
lists the shapes). Every error is a RecordError with file and line.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.cli import beside, here
from common.errors import RecordError
from common.files import at_root
from reasoning.datasets.files import is_local, load_rows
from reasoning.datasets.shapes import SHAPES, Shape
from reasoning.records import StepValue


def shape_of(row: dict, where: str) -> Shape:
    """The shape of a row. Raises RecordError with the fields of the row and the known shapes."""
    for shape in SHAPES:
        if all(row.get(field) is not None for field in shape.fields) and shape.test(row):
            return shape
    found, known = ", ".join(row) or "none", "; ".join(map(str, SHAPES))
    raise RecordError(f"{where}: fields {found} are of no known shape; known: {known}")


def find_shape(name: str, config: str | None = None, split: str | None = None) -> Shape:
    """The shape of a data set, from its first row. Raises RecordError."""
    where, row = next(load_rows(name, config, split))
    return shape_of(row, where)


def load_records(
    kinds: Sequence[str],
    name: str,
    config: str | None = None,
    split: str | None = None,
    dropped: Counter | None = None,
) -> Iterator[tuple[str, Any]]:
    """Stream (where, record) of a data set, in the first of `kinds` that its shape can give.

    kinds: keys of reasoning.datasets.shapes.KINDS. config: of a hub data set. split: of a hub data
    set or a folder. dropped: counts the rows that are left out, by reason. Raises RecordError."""
    convert, dropped = None, Counter() if dropped is None else dropped
    for where, row in load_rows(name, config, split):
        if convert is None:
            shape = shape_of(row, where)
            convert = next((shape.gives[kind] for kind in kinds if kind in shape.gives), None)
            if convert is None:
                raise RecordError(
                    f"{name}: {shape} gives {' or '.join(shape.gives)}, no {' or '.join(kinds)}"
                    + _way_to(kinds, shape, name, config)
                )
        missing = [field for field in shape.fields if field not in row]
        if missing:
            raise RecordError(f"{where}: field '{missing[0]}' is missing in a file of {shape}")
        try:
            for record in convert(row, dropped):
                yield where, record
        except RecordError as error:
            raise RecordError(f"{where}: {error}") from None


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
    dropped: Counter | None = None,
) -> Iterator[Any]:
    """The records of one kind; for step values also the labels of labelled steps."""
    kinds = ["step_values", "step_labels"] if kind == "step_values" else [kind]
    for _, record in load_records(kinds, name, config, split, dropped):
        if kind != "step_values" or isinstance(record, StepValue):
            yield record
            continue
        for k, (step, label) in enumerate(zip(record.steps, record.labels, strict=True)):
            if label is not None:
                yield StepValue(record.prompt, step, label, prefix=record.steps[:k])


# Each takes (name, config, split, dropped) as load_records does, and raises RecordError.
load_problems = partial(_load, "problems")  # Problem; `steps` if the data set has solutions
load_step_labels = partial(_load, "step_labels")  # LabelledSolution
load_pairs = partial(_load, "pairs")  # PreferencePair; scored if the data set labels its steps
load_step_values = partial(_load, "step_values")  # StepValue: Monte Carlo estimates or labels
