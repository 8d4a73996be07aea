"""Say what takes long: a line where nothing can be counted, a progress bar where it can."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from tqdm import tqdm

QUIET = 3.0  # seconds without a word
EVERY = 15.0  # seconds between two lines
_speaking = False  # whether a block of taking_long is open


@contextmanager
def taking_long(what: str) -> Iterator[None]:
    """Say on stderr what the block does if it takes over 3 seconds, and every 15 seconds again.

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
        return EVERY

    try:
        with _repeating(QUIET, speak):
            yield
    finally:
        _speaking = False


def loading_libraries() -> AbstractContextManager[None]:
    """`taking_long` for imports before the arguments are checked: on a terminal only, because a
    mistake in them is one line."""
    return taking_long("loading the libraries") if sys.stderr.isatty() else nullcontext()


@contextmanager
def progress_bar(**options: Any) -> Iterator[tqdm]:
    """A tqdm bar whose clock goes on while a long unit runs. options: of tqdm."""
    with tqdm(**options) as bar:

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
