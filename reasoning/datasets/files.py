"""Rows of a data set: of a local file, of a folder of files, or of a data set on the hub.

Files are .jsonl, .json, .csv, .xml or .parquet. All but .parquet may be compressed (.jsonl.gz).
A row that cannot be read is left out, counted and shown (`Dropped`); the others are used.
"""

import ast
import csv
import io
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from common.cli import arg
from common.errors import RecordError, UserError
from common.files import counted, file_stem, file_type, not_utf8, open_bytes, open_text, read_json
from reasoning.steps import one_line

FILE_TYPES = (".jsonl", ".json", ".csv", ".xml", ".parquet")
# Lists of rows in a JSON file that is one object: {"version": 1, "data": [{...}, {...}]}
ROW_LISTS = ("data", "rows", "examples", "items", "records", "instances", "samples", "dataset")

csv.field_size_limit(2**31 - 1)  # a solution may be longer than csv's 131,072 characters


class Dropped(Counter[str]):
    """What a reading leaves out: reason -> number of rows (of parts of a row, where it has many).

    Conversions count rows that have the right form and no use, for example an empty `rejected`.
    `add` counts odd rows: those that do not have the form of the data set."""

    def __init__(self) -> None:
        super().__init__()
        self.read = 0  # rows, the odd ones included
        self.odd = 0
        self.examples: list[str] = []  # the first odd rows
        self.notes: Counter[str] = Counter()  # what else to say, after the number
        self.columns: dict[str, bool] = {}  # column -> whether a conversion looked at it

    def add(self, where: str, error: RecordError) -> None:
        """Count an odd row, and keep its place and error if it is one of the first three."""
        text = str(error)
        field = re.match(r"fields? '([^']+)'", text)
        kind = re.match(r"not (JSON|UTF-8)\b", text)
        wrong = f"with a wrong '{field[1]}'" if field else "of another form"
        self[f"rows {'that are ' + kind[0] if kind else wrong}"] += 1
        self.odd += 1
        if len(self.examples) < 3:
            self.examples.append(f"{where}: {text}")

    def report(self, name: str) -> list[str]:
        """Lines for a person: how many rows were left out and why, and the remarks."""
        lines = [f"{count} rows of {name} left out: {reason}" for reason, count in self.items()]
        return lines + self.remarks()

    def print(self, name: str) -> None:
        """Print the report."""
        for line in self.report(name):
            print(line)

    def remarks(self) -> list[str]:
        """The first odd rows, the notes, and the columns that were not used."""
        lines = [f"left out: {example}" for example in self.examples]
        if self.odd > len(lines):
            lines.append(f"left out: {self.odd - len(lines)} more odd rows")
        lines += [f"{count} {note}" for note, count in self.notes.items()]
        unused = [column for column, used in self.columns.items() if not used]
        return lines + ([f"columns not used: {', '.join(unused)}"] if unused else [])


def is_local(name: str) -> bool:
    """Whether a name is that of a file or folder (which need not exist), not of a hub data set."""
    return (
        Path(name).exists()
        or file_type(name) in FILE_TYPES
        or name.startswith((".", "/"))
        or name.count("/") > 1
    )


OUR_FIELDS = ("prompt", "chosen", "rejected", "answer")


@dataclass(kw_only=True)
class FieldArgs:
    """The fields of a data set of one's own, mixed into the arguments of a script that reads it."""

    prompt_field: str | None = arg(
        None, "field that holds the prompt; `a.b` is the field b within the field a"
    )
    chosen_field: str | None = arg(None, "field that holds the better answer of a pair")
    rejected_field: str | None = arg(None, "field that holds the worse answer of a pair")
    answer_field: str | None = arg(None, "field that holds the right final answer")

    @property
    def field_names(self) -> dict[str, str]:
        """Our name of a field -> its name in the data set, of the fields that were given."""
        given = {name: getattr(self, f"{name}_field") for name in OUR_FIELDS}
        return {ours: theirs for ours, theirs in given.items() if theirs is not None}

    @property
    def field_flags(self) -> list[str]:
        """The flags that were given, for a command to copy."""
        flags = ((f"--{ours}_field", theirs) for ours, theirs in self.field_names.items())
        return [word for flag in flags for word in flag]


def check_no_fields(args: FieldArgs) -> None:
    """Raises UserError for a field of a data set that is not given."""
    for ours in args.field_names:
        raise UserError(f"argument --{ours}_field: goes with a data set of your own")


def load_rows(
    name: str,
    config: str | None = None,
    split: str | None = None,
    dropped: Dropped | None = None,
    fields: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, dict]]:
    """Stream (where, row) of a data set; `where` is `file:line` or similar, for error messages.

    Names of columns are in lower case, without white space around them. config: of a hub data set.
    split: of a folder, see `folder_files`; of a JSON file with several lists of rows, the name of
    one; of a hub data set, its split (default: train, or the only one). All other files have no
    splits. dropped: counts what cannot be read. fields: our name -> name in the data set; such a
    field replaces one that has our name. Raises RecordError, also if the first row lacks one."""
    dropped = Dropped() if dropped is None else dropped
    if not is_local(name):
        rows = _hub_rows(name, config, split)
    elif Path(name).is_dir():
        rows = _folder_rows(name, split, dropped)
    else:
        rows = _file_rows(Path(name), split)
    found, before = False, dropped.odd
    for where, row in counted(rows, name):
        dropped.read += 1
        if isinstance(row, RecordError):
            dropped.add(where, row)
        elif not isinstance(row, dict):
            dropped.add(where, RecordError(f"expected a JSON object, got {show(row)}"))
        else:
            row = _lower(row)
            yield where, _renamed(row, fields, None if found else where) if fields else row
            found = True
    if not found:
        what = "; ".join(dropped.examples) if dropped.odd > before else ""
        raise RecordError(f"{name}: no rows" + (f" that can be read; {what}" if what else ""))


def _lower(row: dict) -> dict:
    lower = {str(name).strip().lower(): value for name, value in row.items()}
    return lower if len(lower) == len(row) else row


def _renamed(row: dict, fields: Mapping[str, str], where: str | None) -> dict:
    """The row with our names of its fields. where: of a row that must have them (RecordError)."""
    values = {}
    for ours, theirs in fields.items():
        first, dot, rest = theirs.strip().partition(".")
        # the names of columns are in lower case, unless two of them would be the same then
        for spelling in (theirs, theirs.strip().lower(), f"{first.lower()}{dot}{rest}"):
            found, value = _value_at(row, spelling)
            if found:
                values[ours] = value
                break
        else:
            if where is not None:
                known = ", ".join(map(str, row))[:200]
                raise RecordError(
                    f"{where}: argument --{ours}_field: no field {theirs!r}; its fields are {known}"
                )
    taken = {*fields.values(), *(name.strip().lower() for name in fields.values()), *fields}
    return {name: value for name, value in row.items() if name not in taken} | values


def _value_at(row: dict, path: str) -> tuple[bool, Any]:
    """(whether there is one, the value) of a field, or of a path like `question.problem`."""
    value: Any = row
    for name in [path] if path in row else path.split("."):
        if not isinstance(value, dict) or name not in value:
            return False, None
        value = value[name]
    return True, value


# --- folders ---

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
NOT_READ = "files not read: of split {}"
_SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]


def split_of(path: Path) -> str | None:
    """The split of a file, from its path relative to the data set: a key of SPLITS, or None.

    A file or folder that is called `test` decides, the one nearest to the file first; otherwise a
    word of such a name does (`test-00000-of-00001`, `gsm8k_test`). A name with words of two splits
    does not count."""
    names = [file_stem(path), *(part for part in reversed(path.parts[:-1]))]
    for name in names:
        if name.lower() in _SPLIT_OF:
            return _SPLIT_OF[name.lower()]
    for name in names:
        splits = {_SPLIT_OF[word] for word in _words(name) if word in _SPLIT_OF}
        if len(splits) == 1:
            return splits.pop()
    return None


def folder_files(name: str, split: str | None = None, dropped: Dropped | None = None) -> list[Path]:
    """The data files of a folder and its subfolders that belong to a split. Raises RecordError.

    The split of a file is that of `split_of`. With other words as `split`, it is the files that
    have them in their name or in that of a folder. With None, it is the train files if there are
    any, otherwise the files without a split, otherwise all; `dropped` notes how many are not read.
    """
    root = Path(name)
    found = sorted(path.relative_to(root) for path in root.rglob("*"))
    visible = [path for path in found if not any(part.startswith(".") for part in path.parts)]
    files = [path for path in visible if file_type(path) in FILE_TYPES and (root / path).is_file()]
    if split is None:
        chosen = [path for path in files if split_of(path) == "train"]
        chosen = chosen or [path for path in files if split_of(path) is None] or files
    else:
        known, words = _SPLIT_OF.get(split.lower()), {*_words(split)}
        chosen = [
            path
            for path in files
            if (split_of(path) == known if known else words <= {*_words(str(path))})
        ]
    if not chosen:
        missing = f" for split '{split}'" if files else ""
        raise RecordError(f"{name}: no {', '.join(FILE_TYPES)} file in this folder{missing}")
    if dropped is not None and split is None:
        for path in {*files} - {*chosen}:
            dropped.notes[NOT_READ.format(split_of(path) or "none")] += 1
    return [root / path for path in chosen]


def _folder_rows(name: str, split: str | None, dropped: Dropped) -> Iterator[tuple[str, Any]]:
    """The rows of all files. A .json file that cannot be read counts as one row."""
    for path in folder_files(name, split, dropped):
        count = 0
        try:
            for where, row in _file_rows(path):
                count += 1
                yield where, row
        except RecordError as error:
            if file_type(path) != ".json":
                raise
            place, _, text = str(error).removeprefix(f"{path}:").partition(": ")
            yield f"{path}:{place}", RecordError(text)
        else:
            if not count:
                yield str(path), RecordError("a file without rows")


# --- files ---


def _file_rows(path: Path, split: str | None = None) -> Iterator[tuple[str, Any]]:
    """(where, row) of a file; a RecordError in place of a row that cannot be read."""
    if not path.is_file():
        raise RecordError(
            f"{path} not found: expected a file, a folder, or the name of a data set on the hub"
        )
    kind = file_type(path)
    if kind == ".parquet":
        yield from _parquet_rows(path)
        return
    if kind not in FILE_TYPES:
        raise RecordError(f"{path}: expected one of {', '.join(FILE_TYPES)}")
    lines = undecoded = 0
    rows: Iterator[tuple[int | str, Any]]
    if kind == ".json" or kind == ".jsonl":
        rows = _json_rows(path, split)
    else:
        rows = _csv_rows(path) if kind == ".csv" else _xml_rows(path)
    for line, row in rows:
        lines += 1
        undecoded += isinstance(row, RecordError) and str(row).startswith("not UTF-8")
        yield f"{path}:{line}", row
    if undecoded > max(1, lines / 100):
        raise RecordError(
            f"{path}: {undecoded} of {lines} rows are not UTF-8, so the file has another encoding; "
            "save it as UTF-8"
        )


def _json_rows(path: Path, split: str | None) -> Iterator[tuple[int | str, Any]]:
    """The rows of a JSON file (see `read_json`), or of the list in a file that is one object."""
    rows = read_json(path)
    start = list(itertools.islice(rows, 2))
    lists = _row_lists(start[0][1]) if len(start) == 1 else {}
    if not lists:
        yield from itertools.chain(start, rows)
        return
    wanted = split if split in lists else next(iter(lists))
    if len(lists) > 1 and split not in lists:
        raise RecordError(
            f"{path}: holds the lists {', '.join(lists)}; choose one as the split of the data set"
        )
    for number, row in enumerate(lists[wanted], 1):
        # as the web page of the hub gives rows: {"row_idx": 0, "row": {...}}
        inner = row["row"] if isinstance(row.get("row"), dict) else row
        yield f"{wanted}[{number}]", inner


def _row_lists(value: Any) -> dict[str, list[dict]]:
    """The lists of rows of an object, by name."""
    known = {*ROW_LISTS, *_SPLIT_OF}
    return {
        name: rows
        for name, rows in (value.items() if isinstance(value, dict) else ())
        if name.lower() in known
        and isinstance(rows, list)
        and rows
        and all(isinstance(row, dict) for row in rows)
    }


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    from pyarrow import ArrowException  # takes a while, and only Parquet needs it
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (ArrowException, OSError, ValueError, RuntimeError) as error:
        raise RecordError(f"{path}: cannot be read as Parquet ({one_line(str(error))})") from None


def _xml_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """The elements that hold nothing but fields; a row also has the element's attributes.

    ASDiv: `<Problem ID="1"><Body>...</Body><Question>...</Question></Problem>`."""
    number, tag = 0, ""
    try:
        with open_bytes(path) as file:
            for _, element in ElementTree.iterparse(file):
                if element.tag == (tag or element.tag) and len(element):
                    tag, number = element.tag, number + 1
                    fields = {child.tag: "".join(child.itertext()).strip() for child in element}
                    yield number, {**element.attrib, **fields}
                    element.clear()
    except ElementTree.ParseError as error:
        raise RecordError(f"{path}: not XML ({error})") from None


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
    try:
        return json.dumps(value, ensure_ascii=False, default=str)[:60]
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"


# --- tables ---


class _Table:
    """A CSV table as spreadsheets and other tools write it, in any of the encodings of `open_text`.

    The delimiter is comma, semicolon or tab: the one that gives the header most columns, or that of
    a first line `sep=;`. `names` are the columns; `rows` yields (number of the first line, cells).
    Rows without any text are skipped. Columns without name and text, as after a comma at the end of
    each line, are left out. In place of a row that is not CSV there is a RecordError."""

    def __init__(self, lines: Iterable[str]):
        numbered = enumerate(lines, 1)
        self._first, header = next(((k, line) for k, line in numbered if line.strip()), (1, ""))
        if given := re.fullmatch(r"\"?sep=(.)\"?\s*", header):
            self.delimiter = given[1]
            self._first, header = next(numbered, (1, ""))
        else:
            self.delimiter = max(
                ",;\t", key=lambda mark: len(next(csv.reader([header], delimiter=mark)))
            )
        rest = (line for _, line in numbered)
        self._reader = csv.reader(
            itertools.chain([header], rest), delimiter=self.delimiter, strict=True
        )
        _, names = next(self._read())
        if isinstance(names, RecordError):
            raise names
        self.names = list(map(unescape_cell, names))
        while self.names and not self.names[-1].strip():
            self.names.pop()

    @property
    def rows(self) -> Iterator[tuple[int, list[str] | RecordError]]:
        width = len(self.names)
        for line, cells in self._read():
            if isinstance(cells, RecordError):
                yield line, cells
            elif not any(cell.strip() for cell in cells):
                continue
            elif len(cells) < width or any(cell.strip() for cell in cells[width:]):
                yield line, RecordError(f"{len(cells)} cells, the header has {width}")
            else:
                yield line, list(map(unescape_cell, cells[:width]))

    def _read(self) -> Iterator[tuple[int, list[str] | RecordError]]:
        while True:
            line = self._reader.line_num + self._first
            try:
                cells = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end of data" in str(error):
                    raise RecordError(
                        f"{line}: not CSV: a quote that begins in this row does not end"
                    ) from None
                yield line, RecordError(f"not CSV ({error})")
                continue
            problem = next(filter(None, map(not_utf8, cells)), None)
            yield line, RecordError(problem) if problem else cells


def _csv_rows(path: Path) -> Iterator[tuple[int | str, Any]]:
    """Cells with a list or an object are decoded, all others are texts; an empty cell is None."""
    with open_text(path, newline="") as lines:
        try:
            table = _Table(lines)
            for line, cells in table.rows:
                if isinstance(cells, RecordError):
                    yield line, cells
                    continue
                try:
                    named = zip(table.names, cells, strict=True)
                    yield line, {name: _cell(name, value) for name, value in named}
                except RecordError as error:
                    yield line, error
        except RecordError as error:
            raise RecordError(f"{path}:{error}") from None


def _cell(name: str, value: str) -> Any:
    """The value of a cell: a list of texts or objects, an object, in the columns `labels` and
    `..._scores` a list of numbers, a text, or None. Lists are JSON, or as Python prints them."""
    if value.lstrip()[:1] not in ("[", "{"):
        return value if value.strip() else None
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            if re.match(r"\s*\[?\s*\{\s*['\"]\w+['\"]\s*:", value):
                raise RecordError(
                    f"field '{name}': expected JSON, got {show(value)}; save the file as JSONL"
                ) from None
            return value
    if isinstance(found, dict):
        return found if found and all(isinstance(key, str) for key in found) else value
    if not isinstance(found, list):
        return value
    of_numbers = name.strip().lower().endswith(("labels", "scores"))
    texts = all(isinstance(item, str | dict) for item in found)
    return found if texts or of_numbers else value


def read_table(
    path: str | Path, needed: Sequence[str]
) -> tuple[str, list[str], list[tuple[int, list[str]]]]:
    """Read a table as spreadsheets write it (see `_Table`): (delimiter, column names, rows).

    Column names are as in the file. A row is (number of its first line, cells); rows with only
    empty cells are left out. needed: columns that the table must have, in lower case; the case in
    the file does not matter. Raises RecordError with file and line."""
    rows = []
    with open_text(path, newline="") as lines:
        try:
            table = _Table(lines)
        except RecordError as error:
            raise RecordError(f"{path}:1: {error}") from None
        if not {*needed} <= {name.strip().lower() for name in table.names}:
            found = ", ".join(table.names)[:60]
            raise RecordError(
                f"{path}:1: expected a header with {', '.join(needed)}, got {found!r}"
            )
        try:
            for line, cells in table.rows:
                if isinstance(cells, RecordError):
                    raise RecordError(f"{line}: {cells}")
                rows.append((line, cells))
        except RecordError as error:
            raise RecordError(f"{path}:{error}") from None
    return table.delimiter, table.names, rows


# A spreadsheet runs a cell that begins with one of these; full-width signs count in some languages.
_FORMULA = re.compile(r"('*)[=+\-@\t\r\n＝＋－＠]")
_PLAIN_NUMBER = re.compile(r"[-+]?(\d+([.,]\d*)?|[.,]\d+)([eE][-+]?\d+)?")


def escape_cell(value: Any) -> Any:
    """A text as it is written to a table: `'` before what a spreadsheet would run as a formula.

    Numbers stay numbers, `-5` as a text too. `unescape_cell` gives the text back."""
    if isinstance(value, str) and _FORMULA.match(value) and not _PLAIN_NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def unescape_cell(text: str) -> str:
    """The text that `escape_cell` was given."""
    found = _FORMULA.match(text)
    return text[1:] if found and found[1] else text


def table_lines(
    columns: Sequence[str], rows: Iterable[Mapping[str, Any]], delimiter: str = ","
) -> Iterator[str]:
    """The lines of a CSV table, the header first, with `escape_cell` on every text."""
    for cells in (columns, *([row.get(name) for name in columns] for row in rows)):
        line = io.StringIO(newline="")
        # csv quotes a lone \r only if it is part of the line terminator
        writer = csv.writer(line, delimiter=delimiter, lineterminator="\r\n")
        writer.writerow(map(escape_cell, cells))
        yield line.getvalue().removesuffix("\r\n") + "\n"
