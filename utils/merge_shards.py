"""Put the parts of a job together that were made with `--shard K/N`.

    python utils/merge_shards.py --output data/synthetic_dataset.jsonl

Each part has written OUTPUT.shard-K-of-N. The rows of all of them become OUTPUT.partial, as if one
run had made them. The command of the parts without `--shard` then writes the output, without any
work on its rows. A part that is missing, unfinished, of another job or there twice is an error, and
so is a row that is missing or there twice.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import arg, check_output, parse_args, run
from common.engine import Shard, part_of
from common.errors import UserError
from common.files import to_line, write_text
from common.resumable import row_number


@dataclass
class MergeArguments:
    output: str = arg(help="the output of the job, as it was given to all parts")
    overwrite: bool = arg(False, "replace the rows of an unfinished run of this output")


def find_parts(output: str) -> list[Shard]:
    """The parts of an output, from 1 to N. Raises UserError if they are not complete."""
    folder, name = Path(output).parent, re.escape(Path(output).name)
    found = [re.fullmatch(rf"{name}\.shard-(\d+)-of-(\d+)", p.name) for p in folder.glob("*")]
    parts = sorted(
        (Shard(*map(int, match.groups())) for match in found if match),
        key=lambda part: (part.count, part.number),
    )
    if not parts:
        raise UserError(f"no parts {output}.shard-K-of-N are there: --shard K/N makes them")
    counts = {part.count for part in parts}
    if len(counts) > 1:
        first, second = sorted(counts)[:2]
        raise UserError(
            f"{output}: there are parts of {first} and parts of {second}: remove those that do not "
            "belong to it"
        )
    (count,) = counts
    for part in (Shard(number, count) for number in range(1, count + 1)):
        if part not in parts:
            partial = Path(f"{part.file(output)}.partial")
            state = "is not finished" if partial.exists() else "is missing"
            raise UserError(
                f"{part.file(output)} {state}: give the command with --shard {part} (again)"
            )
    return parts


def read_header(path: str) -> dict:
    """The first line of a part, which names its job. Raises UserError for any other file."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.readline())["job"]
        return {name: header[name] for name in ("job", "shard", "unit", "rows")}
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} is no part of a job that --shard made") from None


def merged(output: str, parts: list[Shard], header: dict) -> Iterator[str]:
    """The lines of OUTPUT.partial. header: that of the first part.

    Units stay together, in any order, as ResumableRows reads them. Raises UserError for a row that
    is missing, there twice, or in the wrong part."""
    unit, total = header["unit"], header["rows"]
    seen = bytearray(total)
    yield to_line({"job": header["job"]})
    for part in parts:
        path = part.file(output)
        own = read_header(path)
        if own["shard"] != [part.number, part.count]:
            number, count = own["shard"]
            raise UserError(f"{path} is part {number}/{count}: remove it, make part {part}")
        if own != part_of(header["job"], part, unit, total):
            raise UserError(
                f"{path} is part of another job than the first part: made with other arguments, "
                "input or models"
            )
        with open(path, "rb") as file:
            file.readline()
            for line, content in enumerate(file, 2):
                number = row_number(content)
                if number is None or number >= total:
                    raise UserError(f"{path}:{line}: damaged: remove the file, make the part again")
                if seen[number]:
                    raise UserError(f"{path}:{line}: row {number} is there twice")
                if not part.has(number // unit):
                    raise UserError(f"{path}:{line}: row {number} belongs to another part")
                seen[number] = 1
                yield content.decode()
    if (number := seen.find(0)) >= 0:
        part = next(part for part in parts if part.has(number // unit))
        raise UserError(
            f"{part.file(output)}: row {number} is missing: remove the file, make the part again"
        )


def main() -> None:
    (args,) = parse_args(MergeArguments, description=__doc__)
    parts = find_parts(args.output)
    header = read_header(parts[0].file(args.output))
    partial = f"{args.output}.partial"
    check_output(partial, args.overwrite)
    write_text(partial, merged(args.output, parts, header))
    print(f"put the {header['rows']} rows of {len(parts)} parts together in {partial}")
    print("next: the command of the parts without --shard and --engine, which writes", args.output)


if __name__ == "__main__":
    run(main)
