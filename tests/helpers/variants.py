"""A job for benchmarks/turns.py, in a module that is fast to import in its process."""

import os
from collections.abc import Iterator
from typing import Any

from common.errors import UserError


def echo(factor: int) -> Iterator[Any]:
    """Multiplies what it is sent; "mistake" is a user's mistake, "end" ends the process."""
    value = yield {}
    while True:
        if value == "mistake":
            raise UserError("no such thing")
        if value == "end":
            os._exit(7)
        value = yield {"times": factor * value, "spins": os.environ.get("GOMP_SPINCOUNT")}
