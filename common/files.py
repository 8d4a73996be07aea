"""Read and write JSON lines, write files whole or not at all, append rows so that a job can resume.

A file whose name ends in .gz is compressed: `data/trees.jsonl.gz` works like `data/trees.jsonl`.
"""

import atexit
import codecs
import contextlib
import errno
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Protocol, Self, TypeVar

try:
    import fcntl
except ImportError:  # Windows: outputs are not locked
    fcntl = None  # type: ignore[assignment]


from common.errors import RecordError, UserError, short
from common.progress import QUIET, Bar, taking_long

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


# --- whole or not at all ---

_moves: list[tuple[str, Path]] | None = None  # within `together`: (temporary file, its place)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file that replaces `path` when the block ends without an error.

    It is in the folder of `path`. After an error it is removed and `path` is unchanged. Missing
    folders are made. A link stays a link: the file that it leads to is replaced."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _names(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        try:
            yield Path(name)
            with open(name, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
            if _moves is None:
                os.replace(name, path)
            else:
                _moves.append((name, path))
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Within the block, files are written beside their places and moved there at its end, in order.

    So a full disk or an error leaves all of them as they were. A run writes the file that says it
    has finished last."""
    global _moves
    _moves = []
    try:
        yield
        for name, path in _moves:
            os.replace(name, path)
    finally:
        for name, _ in _moves:
            Path(name).unlink(missing_ok=True)
        _moves = None


@contextlib.contextmanager
def _names(path: Path) -> Iterator[None]:
    """Errors of the system within the block name this file if they name none."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, which replaces it when the block ends without an error.

    After an error the temporary folder is removed. Missing parent folders are made. A process that
    is killed between two renames leaves the old folder as `.NAME.old.tmp`; the next call puts it
    back."""
    folder = Path(os.path.realpath(folder))
    temporary, old = (folder.parent / f".{folder.name}.{kind}.tmp" for kind in ("new", "old"))
    if old.is_dir() and not folder.exists():
        os.replace(old, folder)
    for left in (temporary, old):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    finally:
        if old.is_dir() and not folder.exists():
            os.replace(old, folder)
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)


def write_text(path: str | Path, chunks: Iterable[str]) -> None:
    """Write a text file in UTF-8, whole or not at all, compressed if its name ends in .gz."""
    with replacing(path) as temporary, open(temporary, "wb") as raw:
        if str(path).endswith(".gz"):
            # without name and time in the header, equal texts give equal bytes
            with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
                file.writelines(chunk.encode() for chunk in chunks)
        else:
            raw.writelines(chunk.encode() for chunk in chunks)


# --- one run at a time ---

# output -> the handle that locks it, and the folders that were made for it
_held: dict[Path, tuple[IO[str], list[Path]]] = {}
NO_LOCKS = {
    errno.ENOLCK,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
}  # the errors of a file system that has no locks


ADVICE = "wait until it ends, or give another output"


def _lock_file(path: str | Path) -> Path:
    target = Path(os.path.realpath(path))
    return target.with_name(f".{target.name}.lock")


def _command() -> str:
    """A hash of the command of this process and its folder."""
    command = json.dumps([os.getcwd(), sys.argv])
    return hashlib.sha256(command.encode(errors="surrogateescape")).hexdigest()


def _flock(path: str | Path, handle: IO[str], how: str, advice: str) -> None:
    """Lock an open lock file. Raises UserError if another process holds the lock."""
    try:
        if fcntl:
            fcntl.flock(handle, getattr(fcntl, how) | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        process = handle.read().partition(" ")[0].strip() or "unknown"
        handle.close()
        raise UserError(f"{path}: another process ({process}) writes to it: {advice}") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            handle.close()
            raise


def lock(path: str | Path, advice: str = ADVICE) -> IO[str]:
    """Lock a file or folder against other processes as long as the returned handle is open.

    The lock is on the file .NAME.lock beside it, and ends with the process, however that ends. A
    killed process leaves this file, which locks nothing. Raises UserError if another handle holds
    the lock, OSError if the lock file cannot be made."""
    place = _lock_file(path)
    while True:
        handle = open(place, "a+", encoding="utf-8")  # noqa: SIM115 (returned)
        _flock(path, handle, "LOCK_EX", advice)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samefile(place, handle.fileno()):
                break
        handle.close()  # its holder removed it in between
    handle.truncate(0)
    handle.write(f"{os.getpid()} {_command()}\n")
    handle.flush()
    return handle


def was_killed(path: str | Path) -> bool:
    """Whether the same command was killed while it held this output: what is there is its own.

    Changes nothing. Raises UserError if another process holds the output now."""
    if Path(os.path.realpath(path)) in _held:
        return False
    try:
        with open(_lock_file(path), encoding="utf-8", errors="replace") as handle:
            _flock(path, handle, "LOCK_SH", ADVICE)
            return handle.read().partition(" ")[2].strip() == _command()
    except OSError:
        return False  # no lock file, or none that can be read: `hold` reports it


def hold(path: str | Path) -> None:
    """Lock an output until `release`, and remove the temporary files that a killed run left for it.

    Missing folders are made; `release` removes those that stay empty. Raises UserError if another
    process holds it, OSError if nothing can be written there."""
    target = Path(os.path.realpath(path))
    if target in _held:
        return
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _held[target] = (lock(path), made)
    except BaseException:
        _remove_empty(made)
        raise
    for name in (target.name, f"{target.name}.partial"):
        for left in target.parent.glob(f".{glob.escape(name)}.????????.tmp"):  # by mkstemp
            left.unlink()


def release() -> None:
    """Unlock everything that `hold` locked."""
    while _held:
        _, (handle, made) = _held.popitem()
        Path(handle.name).unlink(missing_ok=True)
        handle.close()
        _remove_empty(made)


def _remove_empty(folders: list[Path]) -> None:
    """Remove these folders, each of which is in the next one, as long as they are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _forget() -> None:
    """In a forked process: the locks are the parent's."""
    for handle, _ in _held.values():
        handle.close()
    _held.clear()


atexit.register(release)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# --- append and resume ---


class _Lines:
    """A file of lines that are appended whole or not at all, by one process or by several."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 (stays open)

    def _write(self, lines: str) -> int:
        """Append lines. Returns their place in the file."""
        data = memoryview(lines.encode())
        with _names(self.path), self._alone():
            end = place = self._file.seek(0, os.SEEK_END)
            if end and os.pread(self._file.fileno(), 1, end - 1) != b"\n":
                data = memoryview(b"\n" + data)  # behind what another process left when killed
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


def rows_hash(rows: Iterable[Any]) -> str:
    """SHA-256 of records, as a training's job file has it."""
    return hashlib.sha256("".join(map(to_line, rows)).encode()).hexdigest()


# --- identities: what a job was computed from, whatever its path ---

# the suffixes and names of a model's configuration, weights, tokenizer, chat templates and code
MODEL_SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".jinja", ".tiktoken", ".py")
VOCABULARIES = ("vocab.txt", "merges.txt")
NO_MODEL_FILES = ("training_job.json", "trainer_state.json", "training_args.bin")


def model_files(folder: str | Path) -> list[Path]:
    """The files of a model directory that change what the model does, sorted by name."""
    found = [*Path(folder).glob("*"), *Path(folder, "additional_chat_templates").glob("*.jinja")]
    return sorted(
        file
        for file in found
        if (file.suffix in MODEL_SUFFIXES or file.name in VOCABULARIES)
        and file.name not in NO_MODEL_FILES
        and file.is_file()
    )


def content_hash(path: str | Path) -> str | None:
    """SHA-256 of a file, or of the `model_files` of a folder, for an adapter with its base.

    None if the path is neither a file nor a model directory."""
    if Path(path).is_file():
        with open(path, "rb") as file, taking_long(f"reading {path} (its hash)"):
            return hashlib.file_digest(file, "sha256").hexdigest()
    lines = [f"{file.name} {content_hash(file)}\n" for file in model_files(path)]
    if base := _base_identity(Path(path)):
        lines.append(f"base {base}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else None


def adapter_base(folder: str | Path) -> tuple[str | None, str | None]:
    """(base model, its revision) that the adapter in a folder names; (None, None) without one."""
    try:
        config = json.loads(Path(folder, "adapter_config.json").read_bytes())
        base, revision = config["base_model_name_or_path"], config.get("revision")
    except (OSError, ValueError, TypeError, KeyError):
        return None, None
    return (base, revision) if isinstance(base, str) else (None, None)


def _base_identity(folder: Path) -> str:
    """What the base of an adapter is; "" for a folder without an adapter."""
    base, revision = adapter_base(folder)
    if base is None:
        return ""
    hashes = [f"{file.name} {content_hash(file)}" for file in model_files(base)]
    return "\n".join(hashes) if hashes else hub_identity(base, revision)


def identity(name: str, revision: str | None = None) -> str:
    """What a model is, for the `job` of a run that can resume: the hash of a local file or
    directory, or the name of a hub model with its commit."""
    return content_hash(name) or hub_identity(name, revision)


def hub_identity(name: str, revision: str | None = None) -> str:
    """NAME@COMMIT, for an adapter with its base; NAME alone if the hub and its cache lack it."""
    from huggingface_hub import hf_hub_download  # would slow --help

    for file in ("adapter_config.json", "config.json"):
        try:
            found = Path(hf_hub_download(name, file, revision=revision))
        except (OSError, ValueError):
            continue  # no such file; if there is no such model, the loader says so
        return f"{name}@{found.parent.name} {_base_identity(found.parent)}".strip()
    return name
