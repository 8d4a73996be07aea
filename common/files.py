"""Files: read and written as JSON lines, written whole or not at all, or appended to so that a killed job resumes.

A name that ends in .gz is compressed: `data/trees.jsonl.gz` works wherever `data/trees.jsonl` does.
"""

import contextlib
import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Protocol, Self, TypeVar

from common.errors import RecordError

ROOT = Path(__file__).resolve().parents[1]


def at_root(path: str) -> str:
    """A default path of the repository, relative to the current directory."""
    return os.path.relpath(ROOT / path)


def file_type(path: str | Path) -> str:
    """The suffix that says what a file holds: `.jsonl` of `trees.jsonl` and of `trees.jsonl.gz`."""
    return Path(str(path).removesuffix(".gz")).suffix


def file_stem(path: str | Path) -> str:
    """`trees` of `data/trees.jsonl` and of `data/trees.jsonl.gz`."""
    return Path(str(path).removesuffix(".gz")).stem


def open_bytes(path: str | Path) -> IO[bytes]:
    """Open a file, compressed or not, to read the bytes of its content."""
    return gzip.open(path, "rb") if str(path).endswith(".gz") else open(path, "rb")


# --- JSON lines ---


class Readable(Protocol):
    """A record class: it checks a decoded JSON value and raises RecordError for a wrong one."""

    @classmethod
    def from_row(cls, row: Any) -> Self: ...


R = TypeVar("R", bound=Readable)


def read_rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Stream (line number, decoded JSON) of a JSONL file; blank lines are skipped.

    Raises RecordError with file and line."""
    number = 0
    try:
        with open_bytes(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _decode(line, f"{path}:{number}")
    except (gzip.BadGzipFile, EOFError) as error:
        raise RecordError(f"{path}:{number + 1}: not a whole gzip file ({error})") from None


def _decode(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        place = f"byte {error.start + 1} of the line"
        raise RecordError(f"{where}: not UTF-8 ({place}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        place = f"{error.msg} at column {error.colno}"
        raise RecordError(f"{where}: not JSON ({place}); expected one object a line") from None
    except RecursionError:
        raise RecordError(f"{where}: nested too deeply; expected one flat object a line") from None


def read_records(path: str | Path, kind: type[R]) -> Iterator[R]:
    """Stream the records of a JSONL file.

    Raises RecordError: `file:line: field ...`, or that the file has no rows."""
    number = 0
    for number, row in read_rows(path):
        try:
            yield kind.from_row(row)
        except RecordError as error:
            raise RecordError(f"{path}:{number}: {error}") from None
    if not number:
        raise RecordError(f"{path}: no rows; expected one JSON object a line")


def to_line(record: Any) -> str:
    """A dataclass or dict as one JSON line; fields that are None are left out."""
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


# --- whole or not at all ---


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file in the folder of `path`, which becomes `path` when the block ends well and is
    removed otherwise. Missing folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, chunks: Iterable[str]) -> None:
    """Write a text file in UTF-8, whole or not at all; compressed if its name ends in .gz."""
    with replacing(path) as temporary, open(temporary, "wb") as raw:
        if str(path).endswith(".gz"):
            # no name and no time in the header: the same text gives the same bytes
            with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
                file.writelines(chunk.encode() for chunk in chunks)
        else:
            raw.writelines(chunk.encode() for chunk in chunks)


# --- appended to, and resumed ---


class AppendedRows:
    """Rows that a long job appends to a JSONL file, each at once, so that a kill loses none of them.

    Opening the file again gives the rows that are there (`rows`). What a killed job left of its last
    line is removed; a line that is not JSON is skipped, so its work is done again."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")  # noqa: SIM115 (open as long as the job runs)
        self._file.seek(0)
        whole = [line for line in self._file if line.endswith(b"\n")]
        self._file.truncate(sum(map(len, whole)))
        self.rows: list[dict] = [row for row in map(_row, whole) if row is not None]

    def append(self, *rows: dict) -> None:
        """Append rows in one write, flushed: all of them or none."""
        self._file.write("".join(map(to_line, rows)).encode())
        self._file.flush()
        self.rows += rows

    def close(self) -> None:
        self._file.close()


def _row(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


class ResumableRows(AppendedRows):
    """Rows of one job, appended to `<output>.partial` until the output is written.

    The first line says what job it is, so that another job's rows are never continued. `unit` rows
    belong together (a batch that is only reproducible as a whole): an incomplete unit at the end is
    dropped and done again, so the result is that of a run without a kill. Raises RecordError if the
    rows of another job are there, unless `overwrite`."""

    def __init__(self, output: str | Path, job: dict, unit: int = 1, overwrite: bool = False):
        path = Path(f"{output}.partial")
        if not self.pending(output, job):
            if path.exists() and not overwrite:
                raise RecordError(
                    f"{path}: holds the rows of another job (other arguments or other input); "
                    "finish that job, remove the file, or give --overwrite"
                )
            write_text(path, [to_line({"job": job})])
        lines = path.read_bytes().splitlines(keepends=True)[1:]
        rows = 0
        while rows < len(lines) and lines[rows].endswith(b"\n") and _row(lines[rows]) is not None:
            rows += 1
        dropped = lines[rows // unit * unit :]
        os.truncate(path, path.stat().st_size - sum(map(len, dropped)))
        super().__init__(path)
        del self.rows[0]  # what job it is

    @staticmethod
    def pending(output: str | Path, job: dict) -> bool:
        """True if this very job was begun and not finished: running it again resumes it."""
        path = Path(f"{output}.partial")
        header = to_line({"job": job}).encode()
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            return file.readline() == header

    def finish(self) -> None:
        """Call after the output was renamed into place: the partial rows are no longer needed."""
        self.close()
        self.path.unlink()


# --- what files hold ---

MODEL_FILES = (".json", ".safetensors", ".bin", ".model", ".gguf")


def content_hash(path: str | Path) -> str | None:
    """SHA-256 of a file, or of the configuration, weights and tokenizer of a model directory; None
    for what is neither."""
    if Path(path).is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(file for file in Path(path).glob("*") if file.suffix in MODEL_FILES)
    lines = "".join(f"{file.name} {content_hash(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest() if files else None
