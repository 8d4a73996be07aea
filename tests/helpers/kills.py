"""Scripts that are killed: at one of their changes of files, or after some time.

A process counts its changes of files below its folder: files opened to be written, moved, removed,
folders made. It is killed right before one of them, as SIGKILL does, without a handler or cleanup.
"""

import os
import signal
import sys
from pathlib import Path

from tests.helpers.scripts import _FORKSERVER, ROOT, _run, streams_of

# audit event -> how many of its arguments are paths; `open` is looked at separately
CHANGES = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.truncate": 1}


def run_until(
    script: str,
    *args: object,
    cwd: Path,
    kill_at: int | str | None = None,
    seconds: float | None = None,
) -> tuple[int, list[str], str]:
    """Run a script, and kill it before a change of a file, or after some seconds.

    kill_at: the number of the change from 0 on, or the end of the line that describes it ("EVENT
    PATHS"). Returns (exit code, the lines of its changes, stderr): the code is -9 if it was
    killed."""
    with streams_of(script, *args) as (argv, streams):
        record = streams[0].with_name("changes")
        target = (argv, str(cwd), dict(os.environ), list(map(str, streams)), str(record), kill_at)
        process = _FORKSERVER.Process(target=_watched, args=target)
        process.start()
        process.join(300 if seconds is None else seconds)
        if process.is_alive():
            process.kill()
            process.join()
            if seconds is None:
                raise TimeoutError(f"{argv}: not finished after 300 s")
        changes = record.read_text().splitlines() if record.exists() else []
        return process.exitcode, changes, streams[2].read_text(errors="replace")


def _watched(
    argv: list[str],
    cwd: str,
    environment: dict[str, str],
    streams: list[str],
    record: str,
    kill_at: int | str | None,
) -> None:
    """In the new process: as `_run`, with a hook that counts and kills."""
    root, count = os.path.realpath(cwd) + os.sep, 0
    log = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        paths = args[: CHANGES.get(event, 0)]
        if event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            paths = args[:1]
        names = [os.fsdecode(path) for path in paths if isinstance(path, str | bytes | os.PathLike)]
        if not any(os.path.abspath(os.path.join(cwd, name)).startswith(root) for name in names):
            return
        line = f"{event} {' '.join(names)}"
        if count == kill_at or (isinstance(kill_at, str) and line.endswith(kill_at)):
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        os.write(log, f"{line}\n".encode())

    sys.addaudithook(hook)
    _run(argv, cwd, environment, streams)


LIMITED = """
import resource, runpy, sys
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, most))
sys.argv[0] = {script!r}
sys.path[0] = {folder!r}
try:
    runpy.run_path({script!r}, run_name="__main__")
finally:  # the coverage of this process is written after it
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
"""


def limited(script: str, size: int, folder: Path) -> Path:
    """A script that runs another one, in which no file may have more than `size` bytes."""
    path = folder / "limited.py"
    script = str(ROOT / script)
    values = {"script": script, "size": size, "folder": str(Path(script).parent)}
    path.write_text(LIMITED.format(**values))
    return path
