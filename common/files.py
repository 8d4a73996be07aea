"""Paths, and files of JSON lines.

A file whose name ends in .gz is compressed: `data/trees.jsonl.gz` works like `data/trees.jsonl`.
"""

import codecs
import contextlib
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Protocol, Self, TypeVar

from common.errors import RecordError
from common.outputs import replacing
from common.progress import QUIET, Bar

ROOT = Path(__file__).resolve().parents[1]
# in the folder of a model that train.py made: describes the training
TRAINING_JOB = "training_job.json"


def at_root(path: str) -> str:
    """A path inside the repository, relative to the current directory: for default arguments."""
    return os.path.relpath(ROOT / path)


def file_type(path: str | Path) -> str:
    """The suffix without .gz: `.jsonl` for `trees.jsonl` and for `trees.jsonl.gz`."""
    return Path(str(path).removesuffix(".gz")).suffix


def file_stem(path: str | Path) -> str:
    """The name without suffixes: `trees` for `data/trees.jsonl` and for `data/trees.jsonl.gz`."""
    return Path(str(path).removesuffix(".gz")).stem


@contextlib.contextmanager
def open_bytes(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a file to read the bytes of its content, decompressed if its name ends in .gz.

    Raises RecordError if a compressed file is damaged."""
    opener: Callable[..., Any] = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RecordError(f"{path}: not a complete gzip file ({error})") from None


# --- JSON lines ---


class Readable(Protocol):
    """A record class: `from_row` checks a decoded JSON value and raises RecordError."""

    @classmethod
    def from_row(cls, row: Any) -> Self: ...


R = TypeVar("R", bound=Readable)
T = TypeVar("T")


def read_rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Stream (line number, decoded JSON) of a file of JSON (see `read_json`).

    Raises RecordError with file and line at the first value that cannot be read."""
    for number, value in read_json(path):
        if isinstance(value, RecordError):
            raise RecordError(f"{path}:{number}: {value}")
        yield number, value


def read_json(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Stream (number of its first line, value) of a file of JSON; blank lines are skipped.

    The file has one value a line, or one list, or values that go over several lines. It is UTF-8,
    or UTF-16 or UTF-32, with or without a byte-order mark, with any line ends. In place of a line
    that cannot be read there is a RecordError that says why, and the lines after it follow. Raises
    RecordError if a list, or a value of several lines, is not JSON."""
    with open_text(path) as lines:
        start = list(itertools.islice(filter(str.strip, lines), 2))
    first = _decode(start[0]) if start else None
    if isinstance(first, _NotJSON) or (isinstance(first, list) and len(start) == 1):
        with open_text(path) as file:
            text = file.read()
        try:
            yield from list(_values(text))
            return
        except _NotJSON as error:
            # Perhaps the file has one value a line and only the first is damaged. Lines within a
            # list do not show that.
            is_list = re.match(r"\s*\[\s*[{\n]", text)
            of_lines = len(start) == 1 or any(
                isinstance(_decode(x), dict) for x in text.split("\n")
            )
            if is_list or not of_lines:
                raise RecordError(f"{path}:{error.line}: {error}") from None
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            value = _decode(line) if line.strip() else None
            several = _objects(line) if isinstance(value, _NotJSON) else []
            yield from ((number, found) for found in several)
            if line.strip() and not several:
                yield number, value


@contextlib.contextmanager
def open_text(path: str | Path, newline: str | None = None) -> Iterator[IO[str]]:
    """Open a text file of UTF-8, UTF-16 or UTF-32. A byte that is not UTF-8 becomes a surrogate
    escape, which `not_utf8` finds. newline: as in `open`."""
    with open_bytes(path) as file:
        encoding = _encoding(file.read(4))
        file.seek(0)
        try:
            yield io.TextIOWrapper(file, encoding, errors="surrogateescape", newline=newline)
        except UnicodeDecodeError as error:
            raise RecordError(f"{path}: not {encoding.upper()} ({error.reason})") from None


def _encoding(start: bytes) -> str:
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    # without a byte-order mark: a text of data begins with an ASCII character, and has no NUL
    if start[1:2] == b"\0" != start[:1]:
        return "utf-32-le" if start[2:4] == b"\0\0" else "utf-16-le"
    if start[:1] == b"\0":
        return "utf-32-be" if start[1:2] == b"\0" else "utf-16-be"
    return "utf-8-sig"


def not_utf8(line: str) -> str | None:
    """Where a line of `open_text` is not UTF-8, and what to do; None if it is UTF-8."""
    try:
        line.encode()
        return None
    except UnicodeEncodeError:
        pass
    try:
        line.encode(errors="surrogateescape").decode()
    except UnicodeDecodeError as error:
        place = f"byte {error.start + 1} of the line"
        return f"not UTF-8 ({place}); save the file as UTF-8"
    return None


class _NotJSON(RecordError):
    line = 1  # of the file


def _whole_number(digits: str) -> int | float:
    """Python refuses to convert more than 4,300 digits; such a number is no value of any field."""
    return int(digits) if len(digits) <= 4000 else float(digits)


_DECODER = json.JSONDecoder(parse_int=_whole_number)
_BETWEEN = re.compile(r"[\s,\ufeff]*")


def _decode(line: str) -> Any:
    """The value of a line, or a RecordError that says why there is none."""
    if problem := not_utf8(line):
        return RecordError(problem)
    try:
        return _DECODER.decode(line.strip())
    except json.JSONDecodeError as error:
        place = f"{error.msg} at column {error.colno}"
        return _NotJSON(f"not JSON ({place}); expected one object a line")
    except RecursionError:
        return _NotJSON("nested too deeply; expected one flat object a line")


def _objects(line: str) -> list[dict]:
    """The objects of a line that holds nothing but objects; otherwise none."""
    try:
        found = [value for _, value in _values(line)]
    except _NotJSON:
        return []
    return found if all(isinstance(value, dict) for value in found) else []


def _values(text: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of the items of a list, or of values one after another. Raises _NotJSON."""
    place, line, in_list = 0, 1, False

    def wrong(error: _NotJSON) -> _NotJSON:
        error.line = line
        return error

    if problem := not_utf8(text):
        raise wrong(_NotJSON(problem.replace(" of the line", "")))
    while True:
        between = _BETWEEN.match(text, place)
        line += text.count("\n", place, between.end()) if between else 0
        place = between.end() if between else place
        if place == len(text):
            break
        if text[place] == "[" and not in_list:
            in_list, place = True, place + 1
            continue
        if text[place] == "]" and in_list:
            in_list, place = False, place + 1
            continue
        try:
            value, end = _DECODER.raw_decode(text, place)
        except json.JSONDecodeError as error:
            line = error.lineno
            raise wrong(_NotJSON(f"not JSON ({error.msg} at column {error.colno})")) from None
        except RecursionError:
            raise wrong(_NotJSON("nested too deeply; expected a flat object")) from None
        yield line, value
        line += text.count("\n", place, end)
        place = end
    if in_list:
        raise wrong(_NotJSON("not JSON (the list does not end); the file is not complete"))


def read_records(path: str | Path, kind: type[R]) -> Iterator[R]:
    """Stream the records of a JSONL file.

    Raises RecordError with `file:line: field ...`, or if the file has no rows."""
    number = 0
    for number, row in counted(read_rows(path), path):
        try:
            yield kind.from_row(row)
        except RecordError as error:
            raise RecordError(f"{path}:{number}: {error}") from None
    if not number:
        raise RecordError(f"{path}: no rows; expected one JSON object a line")


def counted(rows: Iterable[T], name: str | Path) -> Iterator[T]:
    """The rows of a file or data set, with a progress bar if they take over 3 seconds."""
    yield from Bar(rows, desc=f"reading {name}", unit=" row", delay=QUIET, leave=False)


def to_line(record: Any) -> str:
    """A dataclass or dict as one JSON line, without the fields that are None."""
    row = record if isinstance(record, dict) else asdict(record)
    row = {key: value for key, value in row.items() if value is not None}
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_records(path: str | Path, records: Iterable[Any]) -> int:
    """Write records as JSONL, whole or not at all. Returns the number of rows."""
    count = 0

    def lines() -> Iterator[str]:
        nonlocal count
        for record in records:
            count += 1
            yield to_line(record)

    write_text(path, lines())
    return count


def write_text(path: str | Path, chunks: Iterable[str]) -> None:
    """Write a text file in UTF-8, whole or not at all, compressed if its name ends in .gz."""
    with replacing(path) as temporary, open(temporary, "wb") as raw:
        if str(path).endswith(".gz"):
            # without name and time in the header, equal texts give equal bytes
            with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
                file.writelines(chunk.encode() for chunk in chunks)
        else:
            raw.writelines(chunk.encode() for chunk in chunks)
