"""Scripts of the repository, run in a process of their own that need not load the libraries.

The processes are forked from a server that has imported torch, transformers and trl, and nothing of
this project: a script starts in a tenth of a second, from any folder, as `python SCRIPT` would.
"""

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["tests.helpers.preload"])


def run_script(
    script: str | Path,
    *args: object,
    cwd: str | Path,
    input: str = "",
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess:
    """Run a script, given by its path from the root of the repository.

    Returns what subprocess.run would, the output as text. Raises subprocess.TimeoutExpired."""
    environment = dict(os.environ if env is None else env)
    with streams_of(script, *args, input=input) as (argv, streams):
        target = (argv, str(cwd), environment, list(map(str, streams)))
        process = _FORKSERVER.Process(target=_run, args=target)
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(argv, timeout)
        out, err = (path.read_bytes().decode(errors="replace") for path in streams[1:])
        return subprocess.CompletedProcess(argv, process.exitcode, out, err)


@contextlib.contextmanager
def streams_of(
    script: str | Path, *args: object, input: str = ""
) -> Iterator[tuple[list[str], list[Path]]]:
    """The command line of a script, and files for its stdin, stdout and stderr."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        streams[0].write_text(input, encoding="utf-8", errors="surrogateescape")
        yield [str(ROOT / script), *map(str, args)], streams


def _run(argv: list[str], cwd: str, environment: dict[str, str], streams: list[str]) -> None:
    """In the new process: become `python *argv`."""
    for descriptor, (path, mode) in enumerate(zip(streams, ("rb", "wb", "wb"), strict=True)):
        with open(path, mode) as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = (
        open(k, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
        for k in (1, 2)
    )
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = argv
    sys.path = [str(Path(argv[0]).parent), *(p for p in sys.path if p not in ("", str(ROOT)))]
    runpy.run_path(argv[0], run_name="__main__")
