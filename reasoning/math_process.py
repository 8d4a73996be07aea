"""math-verify in a process of its own, which bounds every comparison.

sympy catches exceptions and computes in C, so no limit inside of a process is sure to hold. Here
the kernel ends the process after SECONDS of processor time, refuses it more than MEMORY bytes, and
the next comparison starts a new one. The process starts with the first comparison that needs it,
which takes a second, serves all threads in turn, and ends with the process that started it.
"""

import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import lru_cache

SECONDS = 5.0  # of processor time for one comparison; not wall-clock time, which depends on load
MEMORY = 1 << 30  # bytes of address space
_ENDED_FROM_OUTSIDE = (0, *(-s for s in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)))


class _Client:
    """Starts the process, asks it, and replaces it when it has ended."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None

    def ask(self, request: bytes) -> bool:
        """Sends one line. True if the two expressions in it are the same; False if they are not,
        or if the process ended before it could say."""
        with self.lock:
            for _ in range(2):
                if self.process is None or self.process.poll() is not None:
                    self.close()
                    self.process = self._start()
                try:
                    reply = self._send(self.process, request)
                except BaseException:  # Ctrl-C: the reply to come must not answer the next request
                    self.close()
                    raise
                if reply:
                    return reply == b"1"
                if self.process.wait() not in _ENDED_FROM_OUTSIDE:
                    return False
            return False

    @staticmethod
    def _send(process: subprocess.Popen, request: bytes) -> bytes:
        """The reply of one byte; none if the process has ended."""
        assert process.stdin and process.stdout
        try:
            process.stdin.write(request)
            return process.stdout.read(1)
        except BrokenPipeError:
            return b""

    @staticmethod
    def _start() -> subprocess.Popen:
        # -P: the modules of this folder must not hide others; the hash seed: sympy sorts by hashes
        process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            process_group=0,  # Ctrl-C goes to the program that asks
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        assert process.stdout
        if process.stdout.read(1) != b"r":
            raise RuntimeError(
                f"math-verify's process did not start (exit code {process.wait()}); "
                "try: python -c 'import math_verify'"
            )
        return process

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe:
                    pipe.close()
            self.process = None

    def forget(self) -> None:
        """In a forked process: the process is the parent's, and a thread may hold the lock."""
        if self.process is not None:
            self.process.returncode = 0  # it is not this process's child to wait for
        self.__init__()  # type: ignore[misc]


_client = _Client()
os.register_at_fork(after_in_child=_client.forget)


@lru_cache(maxsize=4096)
def same_expression(first: str, second: str) -> bool:
    """Whether math-verify says in both directions that two LaTeX expressions are equal.

    Expressions that take more than SECONDS or MEMORY count as different. Raises RuntimeError if
    math-verify cannot be started."""
    return _client.ask(json.dumps([SECONDS, first, second]).encode() + b"\n")


# --- what runs in the process; it imports nothing of this project ---


def _requests() -> Iterator[bytes]:
    """The lines of standard input. Ends with the process that writes them, even if a forked copy
    of that process holds the pipe open."""
    parent, received = os.getppid(), b""
    while True:
        while not select.select([0], [], [], 10)[0]:
            if os.getppid() != parent:
                return
        part = os.read(0, 1 << 16)
        if not part:
            return
        received += part
        while b"\n" in received:
            line, _, received = received.partition(b"\n")
            yield line


def _held() -> int:
    """Bytes of memory that this process holds now; 0 where the system does not say.

    Not ru_maxrss: a process begins with that of the program that started it."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def _serve() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the kernel ends the process when it is out
    import logging

    import math_verify
    import sympy

    logging.disable()  # math-verify warns that its own time limit is off
    latex = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]

    def same(first: str, second: str) -> bool:
        parsed = [
            math_verify.parse(f"${text}$", latex, parsing_timeout=None) for text in (first, second)
        ]
        return all(
            math_verify.verify(*pair, allow_set_relation_comp=True, timeout_seconds=None)
            for pair in (parsed, parsed[::-1])
        ) and not _far_apart(parsed[0][0], parsed[1][0])

    def _far_apart(first: object, second: object) -> bool:
        """Whether two numbers differ although their first six decimals are the same."""
        if not all(isinstance(x, sympy.Expr) and x.is_number for x in (first, second)):
            return False
        exact = [abs(sympy.N(x.doit())) for x in (first, second)]  # type: ignore[attr-defined]
        small, large = sorted(exact)
        return bool(large < 1 and large - small > large / 10**5 and large < 50 * small) or (
            small == 0 < large
        )

    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.write(replies, b"r")
    os.dup2(1, 2)  # a crash for lack of memory says so; the reply is all that counts
    for request in _requests():
        seconds, first, second = json.loads(request)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            reply = b"1" if same(first, second) else b"0"
        except Exception:  # whatever sympy raises: it could not compare the two
            reply = b"0"
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(replies, reply)
        if _held() > MEMORY / 2:
            return  # sympy's caches may hold what it computed


if __name__ == "__main__":
    _serve()
