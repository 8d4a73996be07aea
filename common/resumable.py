"""Rows that a long job appends to a file, so that it can resume."""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: files are not locked
    fcntl = None  # type: ignore[assignment]

from common.errors import RecordError, short
from common.files import to_line, write_text
from common.outputs import naming_file


class _Lines:
    """A file of lines that are appended whole or not at all, by one process or by several."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 (stays open)

    def _write(self, lines: str) -> int:
        """Append lines. Returns their place in the file."""
        data = memoryview(lines.encode())
        with naming_file(self.path), self._alone():
            end = place = self._file.seek(0, os.SEEK_END)
            if end and os.pread(self._file.fileno(), 1, end - 1) != b"\n":
                data = memoryview(b"\n" + data)  # a killed process left half a line
                place += 1
            try:
                while data:
                    data = data[self._file.write(data) :]
            except OSError:
                self._file.truncate(end)
                raise
        return place

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process changes the file within the block."""
        with contextlib.suppress(OSError):  # a file system without locks
            if fcntl:
                fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if fcntl and not self._file.closed:
                with contextlib.suppress(OSError):
                    fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        self._file.close()


class AppendedRows(_Lines):
    """Rows that a long job appends to a JSONL file. If the job is killed, no appended row is lost.

    `rows` are the rows of the file, those of earlier runs first. is_row: tells the rows of this
    kind of file from other JSON objects. An incomplete last line is removed, and a line that is no
    such row is skipped: the job computes its row again. Several processes may append to one file.
    The file is never compressed, whatever its name. Raises RecordError if the file has lines but
    none of this kind: it is another file, and stays as it is."""

    def __init__(self, path: str | Path, is_row: Callable[[dict], bool] = lambda row: True):
        super().__init__(path)
        with self._alone():
            self._file.seek(0)
            content = self._file.readall()
            *whole, rest = content.split(b"\n")
            found = [row for row in map(_row, whole) if row is not None and is_row(row)]
            # after a power cut a file may hold zeros
            is_foreign = any(line.strip(b"\0 \r") for line in whole) and not found
            if is_foreign or rest.strip(b"\0")[:1] not in (b"", b"{"):
                self._file.close()
                raise RecordError(
                    f"{path}: holds something else than the rows that are kept there; "
                    "it stays as it is, give another file"
                )
            self.rows: list[dict] = found
            if rest:
                self._file.truncate(len(content) - len(rest))

    def append(self, *rows: dict) -> None:
        """Append rows, all or none of them."""
        self._write("".join(map(to_line, rows)))
        self.rows += rows


def _row(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


_NUMBERED = re.compile(rb'\{"n": (\d{1,18}), "row": \{.*\}\}\n')


def row_number(line: bytes) -> int | None:
    """The number of a row of ResumableRows; None for any other line.

    The row is not parsed, which would take most of the time of a job that resumes."""
    found = _NUMBERED.fullmatch(line)
    if found is None or b"\0" in line:
        return None
    try:
        line.decode()
    except UnicodeDecodeError:
        return None
    return int(found[1])


class ResumableRows(_Lines):
    """Rows of one job, appended to `<output>.partial` until the output is written.

    The first line is the job, so that a different job never continues these rows. Every other line
    has its number, from 0. `unit` rows belong together, for example a batch that is only
    reproducible as a whole: unit k has the rows from k * unit on, and if the job has `total` rows,
    the last one may have fewer. Units may be appended in any order. Iterating gives the rows in
    their order; only the places of the units are kept in memory.

    Whatever a killed run leaves, the next one computes what is missing, so that the result equals
    that of an uninterrupted run: an incomplete unit at the end of the file is dropped, and so is
    everything from a line on that is damaged, lost or from elsewhere. Raises RecordError if the
    file holds something else, unless `overwrite`."""

    def __init__(
        self,
        output: str | Path,
        job: dict,
        unit: int = 1,
        overwrite: bool = False,
        total: int | None = None,
    ):
        path = Path(f"{output}.partial")
        self.may_replace(output, job, overwrite)
        if not self.pending(output, job):
            write_text(path, [to_line({"job": job})])
        super().__init__(path)
        self._unit, self._total, self._count = unit, total, 0
        self._places: dict[int, int] = {}  # number of a unit -> place of its first line in the file
        self._file.truncate(self._find())

    def _size(self, first: int) -> int:
        """The number of rows of the unit that begins with row `first`."""
        return self._unit if self._total is None else min(self._unit, self._total - first)

    def _find(self) -> int:
        """Note the units that are there. Returns the place in the file up to which they go."""
        first = start = size = 0  # of the unit that is read: first number, place, rows so far
        with open(self.path, "rb") as file:
            place = start = len(file.readline())
            for line in file:
                number = row_number(line)
                if size == 0:
                    first = number or 0
                    is_new = first % self._unit == 0 and not self.has(first)
                if number != first + size or not is_new:
                    break
                place, size = place + len(line), size + 1
                if size == self._size(first):
                    self._places[first // self._unit] = start
                    self._count += size
                    start, size = place, 0
        return start

    def has(self, number: int) -> bool:
        """Whether the unit of row `number` is there."""
        return number // self._unit in self._places

    def __len__(self) -> int:
        """The number of rows that are there."""
        return self._count

    def __iter__(self) -> Iterator[dict]:
        with open(self.path, "rb") as file:
            for unit in sorted(self._places):
                file.seek(self._places[unit])
                for line in itertools.islice(file, self._size(unit * self._unit)):
                    if (row := _row(line)) is None:
                        raise RecordError(f"{self.path}: damaged: {short(line[:60].decode())}")
                    yield row["row"]

    @property
    def rows(self) -> list[dict]:
        """All rows that are there, in their order."""
        return list(self)

    @staticmethod
    def pending(output: str | Path, job: dict) -> bool:
        """True if this job was started and not finished, so that running it again resumes it."""
        path = Path(f"{output}.partial")
        header = to_line({"job": job}).encode()
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            return file.readline(len(header) + 1) == header

    @classmethod
    def may_replace(cls, output: str | Path, job: dict, overwrite: bool) -> bool:
        """Whether this job may write the output if that exists: with `overwrite`, or if it resumes.

        Raises RecordError as the constructor does; scripts call it before they load models."""
        path = Path(f"{output}.partial")
        resumes = cls.pending(output, job)
        if not (resumes or overwrite) and path.exists() and not _is_blank(path):
            raise RecordError(
                f"{path}: holds the rows of another job (different arguments, input or models), "
                "or is damaged; finish that job, remove the file, or give --overwrite"
            )
        return resumes or overwrite

    def append(self, *rows: dict, at: int | None = None) -> None:
        """Append rows, all or none of them. at: the number of the first one; without it they follow
        the rows that are there, of which none is missing."""
        first = self._count if at is None else at
        lines = [f'{{"n": {n}, "row": {to_line(row)[:-1]}}}\n' for n, row in enumerate(rows, first)]
        place = self._write("".join(lines))
        for number, line in enumerate(lines, first):
            if number % self._unit == 0:
                self._places[number // self._unit] = place
            place += len(line.encode())
        self._count += len(rows)

    def finish(self) -> None:
        """Remove the partial rows. Call it when the output is written."""
        self.close()
        self.path.unlink()


def _is_blank(path: Path) -> bool:
    """Whether a file holds nothing, or only the zeros that a power cut leaves."""
    with open(path, "rb") as file:
        return not any(block.strip(b"\0") for block in iter(lambda: file.read(1 << 20), b""))
