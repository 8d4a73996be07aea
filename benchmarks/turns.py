"""Variants of a benchmark that take turns, each in a process of its own.

A variant is a generator function. Until its first `yield` it sets itself up; then it does one round
for every value that it is sent, and yields that round's figures. A process of its own gives it its
own peak memory, and its own settings of the libraries.
"""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common.errors import UserError

Figures = dict[str, Any]


class Variant:
    """A process that runs a job round after round.

    variables: environment variables of the process; None removes one. `wait` and `finish` raise
    the UserError of the job, or one if its process has ended."""

    def __init__(
        self, job: Callable[..., Any], *args: Any, variables: Mapping[str, str | None] = {}
    ):
        # libraries are loaded anew, with `variables`
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, job, args), daemon=True)
        before = {name: os.environ.get(name) for name in variables}
        try:
            _set(variables)
            self._process.start()
        finally:
            _set(before)
        other.close()
        self.figures: list[Figures] = []  # of the rounds
        self._is_ready = False

    def wait(self) -> None:
        """Wait until the variant has set itself up."""
        if not self._is_ready:
            self._receive()
            self._is_ready = True

    def start(self, value: Any) -> None:
        """Start a round; `finish` waits for its end."""
        self.wait()
        self._connection.send(value)

    def finish(self) -> Figures:
        self.figures.append(self._receive())
        return self.figures[-1]

    def round(self, value: Any) -> Figures:
        self.start(value)
        return self.finish()

    def peak_memory(self) -> float:
        """The peak of the process's resident memory so far, in GB (Linux)."""
        return peak_memory(self._process.pid)

    def _receive(self) -> Any:
        try:
            received = self._connection.recv()
            if isinstance(received, UserError):
                raise received
            return received
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise UserError(f"a variant ended with exit code {code} (see above)") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, where: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join(0 if error else 5)
        self._process.kill()  # it is in the middle of something


def _serve(connection: Any, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        rounds = job(*args)
        connection.send(next(rounds))
        while True:
            connection.send(rounds.send(connection.recv()))
    except EOFError:
        return  # there are no more rounds
    except UserError as error:
        connection.send(error)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def peak_memory(pid: int | None) -> float:
    """The peak of a running process's resident memory, in GB (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e6 for line in lines if line.startswith("VmHWM:"))
