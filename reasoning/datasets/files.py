"""Rows of a data set: of a local file, of a folder of files, or of a data set on the hub.

Files are .jsonl, .json, .csv or .parquet. All but .parquet may be compressed (.jsonl.gz).
"""

import csv
import io
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import RecordError
from common.files import counted, file_stem, file_type, open_bytes, read_rows
from common.progress import taking_long
from reasoning.steps import one_line

FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")


def is_local(name: str) -> bool:
    """Whether a name is that of a file or folder (which need not exist), not of a hub data set."""
    return (
        Path(name).exists()
        or file_type(name) in FILE_TYPES
        or name.startswith((".", "/"))
        or name.count("/") > 1
    )


def load_rows(
    name: str, config: str | None = None, split: str | None = None
) -> Iterator[tuple[str, dict]]:
    """Stream (where, row) of a data set; `where` is `file:line` or similar, for error messages.

    config: of a hub data set. split: of a folder, the files that have this word in their name
    (default: train if there are any, else all); of a hub data set, its split (default: train, or
    the only one). A file has no splits. Raises RecordError."""
    if not is_local(name):
        rows = _hub_rows(name, config, split)
    elif Path(name).is_dir():
        rows = itertools.chain.from_iterable(map(_file_rows, folder_files(name, split)))
    else:
        rows = _file_rows(Path(name))
    count = 0
    for where, row in counted(rows, name):
        if not isinstance(row, dict):
            raise RecordError(f"{where}: expected a JSON object, got {show(row)}")
        count += 1
        yield where, row
    if not count:
        raise RecordError(f"{name}: no rows")


def folder_files(name: str, split: str | None = None) -> list[Path]:
    """The data files of a folder and its subfolders that belong to a split (see `load_rows`)."""
    visible = sorted(path for path in Path(name).rglob("*") if not path.name.startswith("."))
    files = [path for path in visible if file_type(path) in FILE_TYPES]
    word = split or "train"
    matching = [path for path in files if word in re.split(r"[^a-zA-Z0-9]+", file_stem(path))]
    if not files or (split and not matching):
        missing = f" for split '{split}'" if files else ""
        raise RecordError(f"{name}: no {', '.join(FILE_TYPES)} file in this folder{missing}")
    return matching or files


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise RecordError(
            f"{path} not found: expected a file, a folder, or the name of a data set on the hub"
        )
    if file_type(path) == ".parquet":
        return _parquet_rows(path)
    if file_type(path) == ".csv":
        return _csv_rows(path)
    if file_type(path) not in FILE_TYPES:
        raise RecordError(f"{path}: expected one of {', '.join(FILE_TYPES)}")
    with open_bytes(path) as file:
        is_list = file.read(64).lstrip().startswith(b"[")
    if is_list:
        return _json_rows(path)
    return ((f"{path}:{number}", row) for number, row in read_rows(path))


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with open_bytes(path) as file, taking_long(f"reading {path}"):
            rows = json.load(file)
    except RecordError:
        raise
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path}: not JSON ({error})") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Cells with a JSON list or object are decoded, all others are texts; an empty cell is None."""
    with open_bytes(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        rows = csv.DictReader(text, strict=True)
        try:
            for row in rows:
                where = f"{path}:{rows.line_num}"
                if None in row or None in row.values():
                    columns = len(rows.fieldnames or [])
                    raise RecordError(f"{where}: expected {columns} cells, as in the first line")
                yield where, {field: _cell(value) for field, value in row.items()}
        except (csv.Error, UnicodeDecodeError) as error:
            raise RecordError(f"{path}:{rows.line_num + 1}: not CSV in UTF-8 ({error})") from None


def _cell(value: str) -> Any:
    if value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value or None


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    from datasets import load_dataset  # takes seconds, and only Parquet needs it

    try:
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{path}, row {number}", row
    except (OSError, ValueError, RuntimeError) as error:
        raise RecordError(f"{path}: cannot be read as Parquet ({one_line(str(error))})") from None


def _hub_rows(name: str, config: str | None, split: str | None) -> Iterator[tuple[str, dict]]:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from datasets import load_dataset  # takes seconds, and only the hub needs it

    try:
        splits = load_dataset(name, config, split=split, streaming=True)
        if split is None:
            split = "train" if "train" in splits else next(iter(splits))
            if split != "train" and len(splits) > 1:
                raise ValueError(f"which split? it has {', '.join(splits)}")
            splits = splits[split]
        for number, row in enumerate(splits, 1):
            yield f"{name} ({split}), row {number}", row
    except (OSError, ValueError, RuntimeError) as error:
        raise RecordError(
            f"data set {name}: not a file, and not available from the hub ({one_line(str(error))})"
        ) from None


def show(value: Any) -> str:
    """The first 60 characters of a value, for an error message."""
    return json.dumps(value, ensure_ascii=False, default=str)[:60]


def read_table(
    path: str | Path, needed: Sequence[str]
) -> tuple[str, list[str], list[tuple[int, list[str]]]]:
    """Read a table as spreadsheets write it: (delimiter, column names, rows).

    The delimiter is comma, semicolon or tab; a byte-order mark is allowed. Column names are as in
    the file. A row is (number of its first line, cells); rows with only empty cells are left out.
    needed: columns that the table must have, in lower case; the case in the file does not matter.
    Raises RecordError with file and line."""
    try:
        with open_bytes(path) as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordError(
            f"{path}: not UTF-8 (byte {error.start + 1}); save the table as CSV UTF-8"
        ) from None
    for delimiter in ",;\t":
        names = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
        if {*needed} <= {name.strip().lower() for name in names}:
            break
    else:
        found = text[:60].splitlines()[:1]
        raise RecordError(f"{path}:1: expected a header with {', '.join(needed)}, got {found}")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, line = [], 1
    try:
        for cells in reader:
            rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise RecordError(f"{path}:{line}: not CSV ({error})") from None
    rows = [(line, cells) for line, cells in rows[1:] if any(cells)]
    for line, cells in rows:
        if len(cells) != len(names):
            raise RecordError(f"{path}:{line}: {len(cells)} cells, the header has {len(names)}")
    return delimiter, names, rows
