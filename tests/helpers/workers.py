"""A worker that takes no model, for tests of the engine.

    python tests/helpers/workers.py COUNT WORKERS SECONDS

squares numbers on Ray, one a unit, and leaves them as the rows of a job in the current folder."""

import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import run
from common.engine import Job, ShardArgs
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
        # with -1 second the larger a number, the longer it takes
        time.sleep(self.seconds if self.seconds >= 0 else sum(items) / 200_000)
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


def main() -> None:
    count, workers, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    job = Job(Arguments(engine="ray", workers=workers), {"seed": 0}, range(count), 1)
    rows = job.open()
    make_worker = partial(Squaring, Path("log").absolute(), seconds)
    job.fill(rows, make_worker, left_out, desc="squaring", noun="number")
    Path("out.txt").write_text("".join(f"{row['square']}\n" for row in rows))
    rows.finish()


if __name__ == "__main__":
    run(main)
