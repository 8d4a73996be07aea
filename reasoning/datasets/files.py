"""Rows of a data set, whatever it lies in: a local file (.jsonl, .json, .csv, .parquet), a folder of such, or a name on the hub."""

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
from common.files import read_rows
from reasoning.steps import one_line

FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")


def is_local(name: str) -> bool:
    """Whether a data set's name means a file or a folder, there or not, rather than one on the hub."""
    return (
        Path(name).exists()
        or name.endswith(FILE_TYPES)
        or name.startswith((".", "/"))
        or name.count("/") > 1
    )


def load_rows(
    name: str, config: str | None = None, split: str | None = None
) -> Iterator[tuple[str, dict]]:
    """(where, row) of every row; `where` is `file:line` or the nearest thing to it, for errors.

    `split`: of a folder, the files whose name has this word in it (default: train if there are such, else all); of a hub data
    set, its split (default: train, or the only one). A file has none. Raises RecordError."""
    if not is_local(name):
        rows = _hub_rows(name, config, split)
    elif Path(name).is_dir():
        rows = itertools.chain.from_iterable(map(_file_rows, folder_files(name, split)))
    else:
        rows = _file_rows(Path(name))
    count = 0
    for where, row in rows:
        if not isinstance(row, dict):
            raise RecordError(f"{where}: expected a JSON object, got {show(row)}")
        count += 1
        yield where, row
    if not count:
        raise RecordError(f"{name}: no rows")


def folder_files(name: str, split: str | None = None) -> list[Path]:
    """The data files of a folder and of what it holds, or those with the word `split` in their names."""
    files = sorted(
        path
        for path in Path(name).rglob("*")
        if path.suffix in FILE_TYPES and not path.name.startswith(".")
    )
    of_split = [
        path for path in files if (split or "train") in re.split(r"[^a-zA-Z0-9]+", path.stem)
    ]
    if not files or (split and not of_split):
        raise RecordError(
            f"{name}: no {', '.join(FILE_TYPES)} file in this folder"
            + (f" for split '{split}'" if files else "")
        )
    return of_split or files


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise RecordError(
            f"{path} not found: expected a file, a folder, or the name of a data set on the hub"
        )
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.suffix == ".csv":
        return _csv_rows(path)
    if path.suffix not in FILE_TYPES:
        raise RecordError(f"{path}: expected one of {', '.join(FILE_TYPES)}")
    with open(path, "rb") as file:
        is_list = file.read(64).lstrip().startswith(b"[")
    if is_list:
        return _json_rows(path)
    return ((f"{path}:{number}", row) for number, row in read_rows(path))


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path}: not JSON ({error})") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Cells that hold a JSON list or object are decoded, all others are texts; an empty cell is null."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            for row in rows:
                where = f"{path}:{rows.line_num}"
                if None in row or None in row.values():
                    raise RecordError(
                        f"{where}: not as many cells as the {len(rows.fieldnames or [])} fields of the first line"
                    )
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
    from datasets import load_dataset

    try:
        for number, row in enumerate(
            load_dataset("parquet", data_files=str(path), split="train", streaming=True), 1
        ):
            yield f"{path}, row {number}", row
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{path}: cannot be read as Parquet ({one_line(str(error))})") from None


def _hub_rows(name: str, config: str | None, split: str | None) -> Iterator[tuple[str, dict]]:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from datasets import load_dataset

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
        if isinstance(error, RecordError):
            raise
        raise RecordError(
            f"data set {name}: neither a file nor to be had from the hub ({one_line(str(error))})"
        ) from None


def show(value: Any) -> str:
    """The beginning of a value, for an error."""
    return json.dumps(value, ensure_ascii=False, default=str)[:60]


def read_table(
    path: str | Path, needed: Sequence[str]
) -> tuple[str, list[str], list[tuple[int, list[str]]]]:
    """(delimiter, names of the columns as they stand there, (number of its first line, cells) of every row behind them) of a table
    as spreadsheets write it: comma, semicolon or tab between the cells, with or without a byte-order mark; rows of nothing but
    empty cells are left out. needed: columns that must be there, in whatever case. Raises RecordError with file and line."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordError(
            f"{path}: not UTF-8 (byte {error.start + 1}); save the table as CSV UTF-8"
        ) from None
    for delimiter in ",;\t":
        names = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
        if {*needed} <= {name.strip().lower() for name in names}:
            break
    else:
        raise RecordError(
            f"{path}:1: expected a header with {', '.join(needed)}, got {text[:60].splitlines()[:1]}"
        )
    reader, rows, line = (
        csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True),
        [],
        1,
    )
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
