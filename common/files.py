"""Read and write JSON lines, write files whole or not at all, append rows so that a job can resume.

A file whose name ends in .gz is compressed: `data/trees.jsonl.gz` works like `data/trees.jsonl`.
"""

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Protocol, Self, TypeVar

from tqdm import tqdm

from common.errors import RecordError
from common.progress import QUIET, taking_long

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
    """Stream (line number, decoded JSON) of a JSONL file; blank lines are skipped.

    Raises RecordError with file and line."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _decode(line, f"{path}:{number}")


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
    yield from tqdm(rows, desc=f"reading {name}", unit=" rows", delay=QUIET, leave=False)


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


# --- whole or not at all ---


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file that replaces `path` when the block ends without an error.

    It is in the folder of `path`. After an error it is removed and `path` is unchanged. Missing
    folders are made."""
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


@contextlib.contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, which replaces it when the block ends without an error.

    After an error the temporary folder is removed. Missing parent folders are made."""
    folder = Path(folder)
    temporary = folder.parent / f".{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, chunks: Iterable[str]) -> None:
    """Write a text file in UTF-8, whole or not at all, compressed if its name ends in .gz."""
    with replacing(path) as temporary, open(temporary, "wb") as raw:
        if str(path).endswith(".gz"):
            # without name and time in the header, equal texts give equal bytes
            with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
                file.writelines(chunk.encode() for chunk in chunks)
        else:
            raw.writelines(chunk.encode() for chunk in chunks)


# --- append and resume ---


class AppendedRows:
    """Rows that a long job appends to a JSONL file. If the job is killed, no appended row is lost.

    `rows` are all rows of the file, those of earlier runs first. An incomplete last line is
    removed. A line that is not a JSON object is skipped: the job computes its row again. The file
    is never compressed, whatever its name."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")  # noqa: SIM115 (stays open)
        self._file.seek(0)
        whole = [line for line in self._file if line.endswith(b"\n")]
        self._file.truncate(sum(map(len, whole)))
        self.rows: list[dict] = [row for row in map(_row, whole) if row is not None]

    def append(self, *rows: dict) -> None:
        """Append rows in one write, and flush."""
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

    The first line is the job, so that a different job never continues these rows. `unit` rows
    belong together, for example a batch that is only reproducible as a whole. An incomplete unit at
    the end is dropped and computed again, so that the result equals that of an uninterrupted run.
    Raises RecordError if the file holds the rows of a different job, unless `overwrite`."""

    def __init__(self, output: str | Path, job: dict, unit: int = 1, overwrite: bool = False):
        path = Path(f"{output}.partial")
        if not self.pending(output, job):
            if path.exists() and not overwrite:
                raise RecordError(
                    f"{path}: holds the rows of another job (different arguments or input); "
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
        del self.rows[0]  # the line with the job

    @staticmethod
    def pending(output: str | Path, job: dict) -> bool:
        """True if this job was started and not finished, so that running it again resumes it."""
        path = Path(f"{output}.partial")
        header = to_line({"job": job}).encode()
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            return file.readline() == header

    def finish(self) -> None:
        """Remove the partial rows. Call it when the output is written."""
        self.close()
        self.path.unlink()


# --- hashes ---


def rows_hash(rows: Iterable[Any]) -> str:
    """SHA-256 of records, as a training's job file has it."""
    return hashlib.sha256("".join(map(to_line, rows)).encode()).hexdigest()


MODEL_FILES = (".json", ".safetensors", ".bin", ".model", ".gguf")


def content_hash(path: str | Path) -> str | None:
    """SHA-256 of a file, or of the configuration, weights and tokenizer files of a model directory.

    None if the path is neither."""
    if Path(path).is_file():
        with open(path, "rb") as file, taking_long(f"reading {path} (its hash)"):
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(file for file in Path(path).glob("*") if file.suffix in MODEL_FILES)
    lines = "".join(f"{file.name} {content_hash(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest() if files else None
