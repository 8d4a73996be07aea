"""A worker that takes no model, for tests of the engine."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from common.engine import ShardArgs
from common.errors import JudgeError, UserError


@dataclass(kw_only=True)
class Arguments(ShardArgs):
    output: str = "out.jsonl"
    overwrite: bool = False


class Squaring:
    """Squares numbers and notes every unit in a file. Some items are special:

    "deadly" ends the process, "bug" and "judge" raise errors, "mistake" one of a user."""

    def __init__(self, log: Path, seconds: float = 0.0, fails: str = ""):
        if fails:
            raise UserError(fails)
        self.log, self.seconds = log, seconds

    def __call__(self, start: int, items: list) -> list[dict]:
        with open(self.log, "a") as file:
            file.write(f"{start} {len(items)} {os.getpid()}\n")
        time.sleep(self.seconds)
        if "deadly" in items:
            os._exit(1)
        if "judge" in items:
            raise JudgeError("the judge has gone")
        if "mistake" in items:
            raise UserError("row 3 is wrong")
        return [{"square": item * item if isinstance(item, int) else 1 / 0} for item in items]

    def close(self) -> None:
        with open(self.log, "a") as file:
            file.write("closed\n")


def left_out(item: object, reason: str) -> dict:
    return {"left_out": str(item), "why_not": reason}
