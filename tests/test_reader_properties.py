"""Readers of rows: no bytes and no row end in a traceback, counts add up, valid rows read back."""

import copy
import csv
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import RecordError
from common.files import read_rows, write_records
from reasoning.datasets.files import (
    Dropped,
    escape_cell,
    load_rows,
    read_table,
    table_lines,
    unescape_cell,
)
from reasoning.datasets.loading import load_groups, load_records
from reasoning.datasets.ranking import RankedGroup, RankedResponse, read_answers, write_answers
from reasoning.datasets.shapes import KINDS, SHAPES
from reasoning.records import LabelledSolution, PreferencePair, Problem, Prompt, StepValue
from reasoning.steps import one_line
from tests.helpers import properties  # noqa: F401 (loads the profile)

pytestmark = pytest.mark.property

DATA = Path(__file__).parent / "data"
NO_ROWS = ("answer_pairs.jsonl", "final_answers.jsonl")  # tables of tests, not data sets
FILES = sorted(
    path
    for path in DATA.iterdir()
    if path.suffix in (".jsonl", ".json", ".csv", ".xml") and path.name not in NO_ROWS
)
ROWS = [row for path in FILES for _, row in load_rows(str(path))]

texts = st.text(st.characters(codec="utf-8"), max_size=20)
# `[]` is left out: in a table it is an empty list
filled = (
    st.text("ab 0=-+@'\",;:[]{}\\$é猫🐱", min_size=1, max_size=8)
    .map(one_line)
    .filter(lambda text: text and not re.fullmatch(r"\[\s*\]", text))
)
numbers = st.integers() | st.just(10**400) | st.just(int("9" * 4300)) | st.floats()
odd_texts = st.sampled_from(
    ["", " ", "null", "nan", "=1", "\ud83d", "[1", '{"a": 1}', "ки", "Step 1:"]
)
scalars = st.none() | st.booleans() | numbers | texts | odd_texts
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            texts | st.sampled_from(["role", "content", "text", "steps"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The paths to all values inside of a row."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, inner in items:
        found.append((*path, key))
        if isinstance(inner, dict | list):
            found += places(inner, (*path, key))
    return found


@st.composite
def mutated_rows(draw: st.DrawFn) -> tuple[dict, dict]:
    """(a valid row, the same with some of its values replaced or removed)."""
    row = draw(st.sampled_from(ROWS))
    changed = copy.deepcopy(row)
    for _ in range(draw(st.integers(1, 3))):
        paths = places(changed)
        if not paths:
            break
        *way, last = draw(st.sampled_from(paths))
        holder = changed
        for key in way:
            holder = holder[key]
        if draw(st.booleans()):
            holder[last] = draw(values)
        else:
            del holder[last]
    return row, changed


def read_all(path: Path) -> None:
    """All kinds of records of a file: RecordError or records, and every row is accounted for."""
    for kind in KINDS:
        dropped = Dropped()
        try:
            found = {where for where, _ in load_records([kind], str(path), dropped=dropped)}
        except RecordError as error:
            assert "\n" not in str(error)
            continue
        assert found and len(found) <= dropped.read <= len(found) + dropped.total()
        if kind in ("problems", "pairs"):  # one record a row
            assert dropped.read == len(found) + dropped.total()
        assert not any("\n" in line for line in dropped.report("rows"))
    try:
        dropped = Dropped()
        groups = list(load_groups(str(path), dropped=dropped))
        assert dropped.read == len(groups) + dropped.total()
    except RecordError as error:
        assert "\n" not in str(error)


@given(pair=mutated_rows(), first=st.booleans(), indent=st.sampled_from([None, 2]))
def test_a_changed_row_never_ends_a_file(tmp_path, pair, first, indent):
    """Whatever is wrong with one row, the other one is read."""
    good, bad = pair
    rows = [bad, good] if first else [good, bad]
    path = tmp_path / ("rows.json" if indent else "rows.jsonl")
    texts = [json.dumps(row, indent=indent) for row in rows]
    path.write_text("[" + ",".join(texts) + "]" if indent else "\n".join(texts))
    read_all(path)
    path.write_text("\n".join([json.dumps(good)] * 3 + [json.dumps(bad)]))
    shape = next(shape for shape in SHAPES if shape.fits(good, False))
    kind = next(iter(shape.gives))
    alone = tmp_path / "alone.jsonl"
    alone.write_text(json.dumps(good))
    try:
        expected = [record for _, record in load_records([kind], str(alone))]
    except RecordError:
        return  # a row of tests/data that is dropped
    found = [record for _, record in load_records([kind], str(path))]
    assert found[: 3 * len(expected)] == expected * 3


@given(
    content=st.binary(max_size=60) | texts.map(str.encode) | texts.map(lambda t: t.encode("utf-16"))
)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_any_bytes_are_rows_or_one_line(tmp_path, suffix, content):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(content)
    dropped = Dropped()
    try:
        found = list(load_rows(str(path), dropped=dropped))
        assert dropped.read == len(found) + dropped.odd
    except RecordError as error:
        assert "\n" not in str(error)


@given(
    name=st.sampled_from([path.name for path in FILES]),
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=3)), min_size=1, max_size=5),
)
def test_damaged_files_are_rows_or_one_line(tmp_path, name, edits):
    content = (DATA / name).read_bytes()
    for place, new in edits:
        place %= len(content)
        content = content[:place] + new + content[place + 1 :]
    path = tmp_path / name
    path.write_bytes(content)
    read_all(path)


@given(content=st.binary(max_size=60) | texts.map(str.encode))
def test_own_records_are_rows_or_one_line(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    try:
        list(read_rows(path))
    except RecordError as error:
        assert "\n" not in str(error) and str(path) in str(error)


@given(row=values, kind=st.sampled_from([*KINDS.values(), RankedGroup, Prompt]))
def test_any_value_is_a_record_or_one_line(row, kind):
    try:
        kind.from_row(row)
    except RecordError as error:
        assert "\n" not in str(error)


scores = st.floats(0, 1)
steps = st.lists(filled, min_size=1, max_size=3)
RECORDS = {
    "pairs": st.builds(PreferencePair, filled, steps, steps, st.lists(filled, max_size=2)),
    "step_values": st.builds(StepValue, filled, filled, scores, st.lists(filled, max_size=2)),
    "step_labels": steps.flatmap(
        lambda s: st.builds(
            LabelledSolution,
            filled,
            st.just(s),
            st.lists(scores | st.none(), min_size=len(s), max_size=len(s)).filter(
                lambda labels: labels.count(None) < len(labels)
            ),
            st.none() | st.booleans(),
        )
    ),
    "problems": st.builds(Problem, filled, st.integers().map(str), st.lists(filled, max_size=2)),
}


def rewritten(folder: Path, records: list, suffix: str) -> Path:
    """The records as a list in another encoding, as CSV, as Parquet, or as lines."""
    path, rows = folder / f"rows.{suffix}", [vars(record) for record in records]
    if suffix == "json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-16")
    elif suffix == "csv":
        cells = [
            {
                name: json.dumps(cell) if isinstance(cell, list) else cell
                for name, cell in row.items()
            }
            for row in rows
        ]
        path.write_text("".join(table_lines([*rows[0]], cells, ";")), "utf-8-sig", newline="")
    elif suffix == "parquet":
        import pyarrow as pa
        from pyarrow.parquet import write_table

        write_table(pa.Table.from_pylist(rows), path)
    else:
        write_records(path, records)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
@given(data=st.data())
def test_valid_records_read_back(tmp_path, suffix, data):
    kind = data.draw(st.sampled_from([*RECORDS]))
    records = data.draw(st.lists(RECORDS[kind], min_size=1, max_size=2))
    path = rewritten(tmp_path, records, suffix)
    assert [record for _, record in load_records([kind], str(path))] == records


# --- cells of a table ---

cells = st.text("aé猫 =+-@\t\r\n'\"＝,;0123456789.eE ", max_size=8)


@given(text=cells)
def test_no_written_cell_is_a_formula(text):
    written = escape_cell(text)
    assert unescape_cell(written) == text
    if written[:1] in ("=", "+", "-", "@", "\t", "\r", "\n") and written:
        float(written.replace(",", "."))  # a plain number


@given(number=st.integers() | st.floats(allow_nan=False))
def test_numbers_stay_numbers(number):
    assert escape_cell(number) is number and escape_cell(str(number)) in (str(number), f"'{number}")


@given(
    rows=st.lists(st.lists(cells, min_size=2, max_size=2), max_size=4),
    delimiter=st.sampled_from(",;\t"),
)
def test_a_table_reads_back(tmp_path, rows, delimiter):
    named = [dict(zip(("prompt", "note"), row, strict=True)) for row in rows]
    path = tmp_path / "table.csv"
    path.write_text("".join(table_lines(["prompt", "note"], named, delimiter)), newline="")
    used, names, found = read_table(path, ["prompt"])
    assert (used, names) == (delimiter, ["prompt", "note"])
    kept = [row for row in rows if any(escape_cell(cell).strip() for cell in row)]
    assert [row for _, row in found] == kept
    with open(path, newline="") as file:
        for row in csv.reader(file, delimiter=delimiter):
            assert not any(cell.startswith(("=", "@")) for cell in row)


@given(
    rows=st.lists(
        st.builds(
            RankedResponse,
            cells.filter(str.strip),
            cells.filter(str.strip),
            st.none() | st.integers(1, 9),
            cells,
            cells,
            seed=st.none() | st.integers(),
            temperature=st.none() | st.floats(0, 10),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_ranked_answers_read_back(tmp_path, rows):
    write_answers(tmp_path / "answers.csv", rows)
    assert read_answers(tmp_path / "answers.csv") == rows
