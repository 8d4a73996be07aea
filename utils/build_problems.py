"""Write problems of the embedded problem world: the held-out splits, or a part of the train split.

    python utils/build_problems.py --overwrite
    python utils/build_problems.py --split train --limit 480 --output data/mine.jsonl

The held-out splits are data/problems_{validation,test,hard_validation,hard}.jsonl.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import arg, check_output, check_outputs, parse_args, run
from common.errors import UserError
from common.files import at_root, write_records
from common.outputs import together
from reasoning.problems import SPLITS, problems
from reasoning.splits import HELD_OUT

MOST_EVENTS = 6


@dataclass
class ProblemArguments:
    split: str = arg(
        "held_out", "held_out: all four held-out splits; or train", choices=["held_out", "train"]
    )
    output: str | None = arg(
        None,
        "folder of the four files (if not given: data); with --split train the file "
        "(if not given: data/problems_train.jsonl)",
    )
    skip: int = arg(0, "with --split train: skip the first SKIP problems")
    limit: int | None = arg(None, "with --split train: number of problems; all if not given")
    max_events: int = arg(MOST_EVENTS, "with --split train: leave out problems with more events")
    overwrite: bool = arg(False, "replace existing files; they are the same on every machine")

    def __post_init__(self):
        selects = (self.skip, self.limit, self.max_events) != (0, None, MOST_EVENTS)
        if self.split != "train" and selects:
            raise UserError(
                "arguments --skip, --limit and --max_events: only with --split train, because "
                "held-out splits are always complete"
            )
        if self.skip < 0 or self.max_events < 2 or (self.limit is not None and self.limit < 1):
            raise UserError("arguments --skip, --limit, --max_events: expected at least 0, 1 and 2")
        if self.skip >= (size := SPLITS["train"][2]):
            raise UserError(
                f"argument --skip: the train split has {size} problems, got {self.skip}"
            )


def main() -> None:
    (args,) = parse_args(ProblemArguments, description="Write problems of the embedded world.")
    if args.split == "train":
        file = Path(args.output or at_root("data/problems_train.jsonl"))
        check_output(file, args.overwrite)
        rest = itertools.islice(problems("train"), args.skip, None)
        # a reference solution has a step for each event, and the step with the answer
        selected = (problem for problem in rest if len(problem.steps) - 1 <= args.max_events)
        count = write_records(file, itertools.islice(selected, args.limit))
        print(f"wrote {count} problems to {file}")
        return
    folder = Path(args.output or at_root("data"))
    files = {split: folder / f"problems_{split}.jsonl" for split in HELD_OUT}
    check_outputs([*files.values()], overwrite=args.overwrite)
    with together():
        counts = {file: write_records(file, problems(split)) for split, file in files.items()}
    for file, count in counts.items():
        print(f"wrote {count} problems to {file}")


if __name__ == "__main__":
    run(main)
