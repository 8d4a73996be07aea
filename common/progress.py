"""Say what takes long: a line where nothing can be counted, a progress bar where it can.

A bar is for a terminal. Elsewhere (a log file, a pipe) a stage prints one line when it ends."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from tqdm import tqdm

QUIET = 3.0  # seconds without a word
EVERY = 15.0  # seconds between two lines
EVERY_IN_LOG = 300.0  # the same where no terminal shows them
_speaking = False  # whether a block of taking_long is open


@contextmanager
def taking_long(what: str) -> Iterator[None]:
    """Say on stderr what the block does if it takes over 3 seconds, and every 15 seconds again (off
    a terminal every 5 minutes).

    what: continues "still", for example `loading models/x`. A faster block prints nothing, and so
    does a block inside another one."""
    global _speaking
    if _speaking:
        yield
        return
    started, _speaking = time.monotonic(), True

    def speak() -> float:
        seconds = time.monotonic() - started
        print(f"still {what} ({seconds:.0f} s) ...", file=sys.stderr, flush=True)
        return EVERY if sys.stderr.isatty() else EVERY_IN_LOG

    try:
        with _repeating(QUIET, speak):
            yield
    finally:
        _speaking = False


def loading_libraries() -> AbstractContextManager[None]:
    """`taking_long` for imports before the arguments are checked: on a terminal only, because a
    mistake in them is one line."""
    return taking_long("loading the libraries") if sys.stderr.isatty() else nullcontext()


class Bar(tqdm):
    """A tqdm bar on a terminal. Elsewhere one line when it ends, and before that one every 5
    minutes.

    A bar with a `delay` that ends earlier prints nothing, and so does one that an error ends within
    3 seconds: a user's mistake is one line."""

    def __init__(self, *args: Any, **options: Any):
        self.began = self.said = time.monotonic()
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        if self.fp.isatty():
            return super().display(msg, pos)
        if time.monotonic() - self.said >= EVERY_IN_LOG:
            self._say()
        return True

    def close(self) -> None:
        if getattr(self, "disable", True) or self.fp.isatty():
            return super().close()
        self.disable = True
        self._decr_instances(self)  # type: ignore[attr-defined]  # as its own close
        if time.monotonic() - self.began >= (self.delay or 0):
            self._say()

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is not None:
            self.delay = max(getattr(self, "delay", None) or 0, QUIET)  # none if it is disabled
        super().__exit__(kind, *error)

    def _say(self) -> None:
        """`sampling: 700 problems in 23 s`; while some are left `350 of 700 problems`."""
        self.said = time.monotonic()
        of_all = "" if self.total in (None, self.n) else f" of {self.total:,}"
        unit = self.unit.strip()
        if (self.total or self.n) != 1:
            unit += "es" if unit.endswith("ch") else "s"
        before = f", {self.initial:,} of them before" if self.initial else ""
        numbers = f", {self.postfix}" if self.postfix else ""
        line = f"{self.n:,}{of_all} {unit} in {self.said - self.began:.0f} s{before}{numbers}"
        print(f"{self.desc}: {line}" if self.desc else line, file=self.fp, flush=True)


@contextmanager
def progress_bar(**options: Any) -> Iterator[Bar]:
    """A bar whose clock goes on while a long unit runs. options: of tqdm."""
    with Bar(**options) as bar:

        def refresh() -> float:
            bar.refresh()
            return QUIET

        with _repeating(QUIET, refresh):
            yield bar


@contextmanager
def _repeating(first: float, action: Callable[[], float]) -> Iterator[None]:
    """Call the action from another thread during the block, `first` seconds after its start; it
    returns the seconds until the next call."""
    ended = threading.Event()

    def repeat() -> None:
        wait = first
        while not ended.wait(wait):
            wait = action()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
