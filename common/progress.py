"""Say what takes long, where no progress bar can count."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

QUIET = 3.0  # seconds without a word
EVERY = 15.0  # seconds between two lines


@contextmanager
def taking_long(what: str) -> Iterator[None]:
    """Say on stderr what the block does, if it takes over 3 seconds, and every 15 seconds again.

    what: continues "still", for example `loading models/x`. A faster block prints nothing."""
    started, ended = time.monotonic(), threading.Event()

    def speak() -> None:
        wait = QUIET
        while not ended.wait(wait):
            seconds = time.monotonic() - started
            print(f"still {what} ({seconds:.0f} s) ...", file=sys.stderr, flush=True)
            wait = EVERY

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
