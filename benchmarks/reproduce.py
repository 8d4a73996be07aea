"""Make the results of the documentation again, and compare them with the committed ones.

    python benchmarks/reproduce.py --list                # every result, its commands, its minutes
    python benchmarks/reproduce.py --only judge_prm-mini search
    python benchmarks/reproduce.py                       # everything; the same command resumes it

The results are the sections of docs/results.md. Each is made by its commands, which write to
evaluation/results/. A result that is there is not made again. At the end a table says how many of
a result's metrics lie within the committed 95 % intervals. Times and seeds of another machine move
some of them.
"""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import arg, parse_args, run
from common.errors import UserError
from common.files import ROOT, at_root
from docs.make_results import SECTIONS
from evaluation.results import print_table


@dataclass
class ReproduceArguments:
    only: list[str] = arg([*SECTIONS], "results to make", choices=[*SECTIONS])
    list: bool = arg(False, "only say what would be run, and how long it takes")


def made(name: str) -> Path:
    """Where a result is written when it is made again."""
    return Path(at_root("evaluation/results"), f"{name}.json")


def within(name: str) -> tuple[int, int]:
    """(metrics that lie within the committed interval, metrics that have one) of a result."""
    committed, again = (
        json.loads(path.read_text(encoding="utf-8"))["metrics"]
        for path in (Path(at_root("docs/results"), f"{name}.json"), made(name))
    )
    inside = [
        metric["ci95"][0] <= again[key]["value"] <= metric["ci95"][1]
        for key, metric in committed.items()
        if metric["ci95"] and key in again
    ]
    return sum(inside), len(inside)


def main() -> None:
    (args,) = parse_args(ReproduceArguments, description=__doc__)
    todo = [name for name in args.only if not made(name).exists()]
    rows = []
    for name in args.only:
        first, *others = SECTIONS[name].commands
        rows.append((name, "to do" if name in todo else "made", SECTIONS[name].minutes, first))
        rows += [("", "", "", command) for command in others]
    minutes = sum(SECTIONS[name].minutes for name in todo)
    title = f"{len(todo)} of {len(args.only)} results to make: about {minutes / 60:.1f} hours"
    print_table(title, ["result", "state", "minutes", "command"], rows)
    if args.list:
        return
    for name in todo:
        for command in SECTIONS[name].commands:
            print(f"\n{command}", flush=True)
            words = shlex.split(command)
            words[0] = sys.executable if words[0] == "python" else words[0]
            code = subprocess.run(words, cwd=ROOT).returncode
            if code:
                raise UserError(f"{command} ended with exit code {code}; see its message above")
        if not made(name).exists():
            raise UserError(f"{name}: its commands did not write {made(name)}")
    compared = [(name, "{} of {}".format(*within(name))) for name in args.only]
    print_table("metrics within the committed 95 % intervals", ["result", "within"], compared)


if __name__ == "__main__":
    run(main)
