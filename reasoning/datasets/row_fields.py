"""Fields of a row of a data set, read with their types checked.

The shapes of data sets (reasoning/datasets/shapes.py) are made with these functions."""

import math
from dataclasses import fields, replace
from typing import Any

from common.errors import RecordError
from reasoning.datasets.files import Dropped, show
from reasoning.steps import one_line

NO_ANSWER = "problems without a checkable answer"

# How programs write that a text is missing. A person's "None" or "N/A" is none of them.
_MISSING = {"null", "nan", "<na>", "#n/a"}


def is_empty(value: Any) -> bool:
    """Whether a field has no value: null, NaN, white space, `null` as a text, an empty list."""
    if isinstance(value, str):
        return not value.strip() or value.strip().lower() in _MISSING
    return value is None or value in ([], {}) or (isinstance(value, float) and math.isnan(value))


def drop_empty(values: dict[str, Any], dropped: Dropped) -> bool:
    """Count a row by the name of its first empty value. False if it has none."""
    empty = next((name for name, value in values.items() if is_empty(value)), None)
    if empty is not None:
        dropped[NO_ANSWER if empty == "answer" else f"rows with an empty '{empty}'"] += 1
    return empty is not None


def field_of(row: Any, path: str, kind: type | tuple, expected: str) -> Any:
    """The value at a path like `question.problem`. Raises RecordError if its type is not `kind`."""
    value = row
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        got = "nothing" if value is None else type(value).__name__
        raise RecordError(f"field '{path}': expected {expected}, got {got}")
    return value


def text_of(row: Any, path: str) -> str:
    """A text, or a number as text: many files have the answer 52 as a number."""
    value = field_of(row, path, (str, int, float), "a text")
    if isinstance(value, bool):
        raise RecordError(f"field '{path}': expected a text, got true or false")
    if is_empty(value):
        raise RecordError(f"field '{path}': expected a text, got an empty one")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RecordError(f"field '{path}': expected a text, got {value}")
        value = int(value) if value.is_integer() else value
    return str(value).strip()


def texts_of(row: Any, path: str) -> list[str]:
    texts = field_of(row, path, list, "a list of texts")
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RecordError(f"field '{path}': expected a list of texts, got {show(texts)}")
    return texts


def in_one_line(record: Any) -> Any:
    """The record with each of its steps in one line."""
    names = [name for name in ("steps", "prefix", "chosen", "rejected") if hasattr(record, name)]
    changes: dict[str, Any] = {
        name: [one_line(step) for step in getattr(record, name)] for name in names
    }
    if hasattr(record, "step"):
        changes["step"] = one_line(record.step)
    return replace(record, **changes)


def fields_of(row: dict, kind: type) -> dict:
    """The fields of a row that a record has."""
    return {field.name: row.get(field.name) for field in fields(kind)}
