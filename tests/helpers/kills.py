"""Scripts that are killed: at one of their changes of files, or after some time.

A process counts its changes of files below its folder: files opened to be written, moved, removed,
folders made. It is killed right before one of them, as SIGKILL does, without a handler or cleanup.
"""

import os
import signal
import sys
from pathlib import Path

from tests.helpers.scripts import _FORKSERVER, _run, streams_of

CHANGES = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.truncate": 1}


def run_until(
    script: str, *args: object, cwd: Path, kill_at: int | None, timeout: float = 300
) -> tuple[int, list[str], str]:
    """Run a script and kill it before its change number `kill_at` (from 0; None: never).

    Returns (exit code, its changes, stderr): the code is -9 if it was killed."""
    with streams_of(script, *args) as (argv, streams):
        record = streams[0].with_name("changes")
        target = (argv, str(cwd), dict(os.environ), list(map(str, streams)), str(record), kill_at)
        process = _FORKSERVER.Process(target=_watched, args=target)
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise TimeoutError(f"{argv}: not finished after {timeout} s")
        changes = record.read_text().splitlines() if record.exists() else []
        return process.exitcode, changes, streams[2].read_text(errors="replace")


def _watched(
    argv: list[str],
    cwd: str,
    environment: dict[str, str],
    streams: list[str],
    record: str,
    kill_at: int | None,
) -> None:
    """In the new process: as `_run`, with a hook that counts and kills."""
    root, count = os.path.realpath(cwd) + os.sep, 0
    log = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if event == "open":
            path, mode, flags = args
            writes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            names = [path] if writes and isinstance(path, str | bytes) else []
        else:
            names = [
                name for name in args[: CHANGES.get(event, 0)] if isinstance(name, str | bytes)
            ]
        places = [os.path.join(cwd, os.fsdecode(name)) for name in names]
        if not any(os.path.abspath(place).startswith(root) for place in places):
            return
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        os.write(log, f"{event} {' '.join(map(os.fsdecode, names))}\n".encode())

    sys.addaudithook(hook)
    _run(argv, cwd, environment, streams)
