"""Outputs: files and folders that are written whole or not at all, by one run at a time."""

import atexit
import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: outputs are not locked
    fcntl = None  # type: ignore[assignment]

from common.errors import UserError

_moves: list[tuple[str, Path]] | None = None  # within `together`: (temporary file, its place)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file that replaces `path` when the block ends without an error.

    It is in the folder of `path`. After an error it is removed and `path` is unchanged. Missing
    folders are made. A link stays a link: the file that it leads to is replaced."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming_file(path):
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
def naming_file(path: Path) -> Iterator[None]:
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


# --- one run at a time ---

# output -> (the open lock file, the folders that were made for it)
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
