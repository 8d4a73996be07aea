"""Write the held-out problems of the embedded world: data/problems_{validation,test,hard_validation,hard}.jsonl.

python utils/build_problems.py --overwrite
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reasoning.problems import HELD_OUT, problems
from reasoning.records import write_records
from utils.cli import at_root, check_output, parse_args, run


@dataclass
class ProblemArguments:
    output: str = field(default_factory=lambda: at_root("data"), metadata={"help": "folder of the four files"})
    overwrite: bool = field(default=False, metadata={"help": "replace them (they are the same bytes on every machine)"})


def main() -> None:
    (args,) = parse_args(ProblemArguments, description="Write the held-out problems of the embedded world.")
    files = {split: Path(args.output) / f"problems_{split}.jsonl" for split in HELD_OUT}
    for file in files.values():
        check_output(str(file), args.overwrite)
    for split, file in files.items():
        print(f"wrote {write_records(file, problems(split))} problems to {file}")


if __name__ == "__main__":
    run(main)
