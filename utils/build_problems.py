"""Write problems of the embedded world: data/problems_{validation,test,hard_validation,hard}.jsonl, or some of the train split.

python utils/build_problems.py --overwrite
python utils/build_problems.py --split train --limit 480 --output data/smollm2/warm_start.jsonl
"""

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import check_output, parse_args, run
from common.errors import UserError
from common.files import at_root, write_records
from reasoning.problems import SPLITS, problems
from reasoning.splits import HELD_OUT

MOST_EVENTS = 6


@dataclass
class ProblemArguments:
    split: str = field(
        default="held_out",
        metadata={
            "help": "held_out: the four held-out splits; or train",
            "choices": ["held_out", "train"],
        },
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "folder of the four files, or with --split train the file (default: data, data/problems_train.jsonl)"
        },
    )
    skip: int = field(
        default=0, metadata={"help": "with --split train: leave out its first SKIP problems"}
    )
    limit: int | None = field(
        default=None, metadata={"help": "with --split train: problems to write; all if not given"}
    )
    max_events: int = field(
        default=MOST_EVENTS,
        metadata={"help": "with --split train: leave out problems of more events"},
    )
    overwrite: bool = field(
        default=False, metadata={"help": "replace them (they are the same bytes on every machine)"}
    )

    def __post_init__(self):
        if self.split != "train" and (self.skip, self.limit, self.max_events) != (
            0,
            None,
            MOST_EVENTS,
        ):
            raise UserError(
                "arguments --skip, --limit and --max_events go with --split train: held-out splits are whole"
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
        check_output(str(file), args.overwrite)
        # a reference solution has one step for each event, and the closing one
        some = (
            task
            for task in itertools.islice(problems("train"), args.skip, None)
            if len(task.steps) - 1 <= args.max_events
        )
        print(f"wrote {write_records(file, itertools.islice(some, args.limit))} problems to {file}")
        return
    files = {
        split: Path(args.output or at_root("data")) / f"problems_{split}.jsonl"
        for split in HELD_OUT
    }
    for file in files.values():
        check_output(str(file), args.overwrite)
    for split, file in files.items():
        print(f"wrote {write_records(file, problems(split))} problems to {file}")


if __name__ == "__main__":
    run(main)
