"""The engine of jobs: units a second on Ray, and what this process does for each unit.

    OMP_NUM_THREADS=1 python benchmarks/engine.py      # about 5 minutes on 2 cores

Sampling: `--unit` problems a unit, in this process and on each number of `--workers`, after all
workers have done a unit. The samples have to be the same.

Driver: a job of `--replayed` units without work, of one row each, that of a real pair. The rows are
appended as a run does it, found again as a run that resumes does it, with 1 % of them missing, and
read as the end of a run does it, each in a process of its own, whose memory is its peak. `a call`
is a unit without work that goes to an actor and back.
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.turns import Variant
from common.cli import arg, check_least, check_model, check_output, parse_args, run
from common.engine import EngineArgs, Job, ShardArgs, check_engine, open_engine
from common.files import at_root, read_rows
from evaluation.metrics import Metric
from evaluation.results import print_table, write_result
from reasoning.problems import problems

STEPS = ("append", "resume", "read")


@dataclass
class EngineBenchArguments:
    model_name_or_path: str = arg(at_root("models/policy-mini"), "the policy that samples")
    workers: list[int] = arg([1, 2], "numbers of Ray workers")
    units: int = arg(24, "units that are sampled and timed")
    unit: int = arg(16, "problems of a unit")
    samples: int = arg(4, "samples of a problem")
    max_new_tokens: int = arg(96, "most tokens of a sample")
    calls: int = arg(500, "units without work that are timed")
    replayed: int = arg(100_000, "units of the job whose rows are replayed")
    output_dir: str = arg(at_root("evaluation/results"), "folder of engine.json")
    overwrite: bool = arg(False, "replace an existing result")

    def __post_init__(self) -> None:
        check_least(self, units=1, unit=1, samples=1, max_new_tokens=1, calls=1, replayed=100)
        for workers in self.workers:
            check_engine(EngineArgs(engine="ray", workers=workers))


class Sampling:
    """Samples problems with the policy."""

    def __init__(self, args: EngineBenchArguments):
        # torch would slow --help
        from lm.policy import Policy

        self.args, self.policy = args, Policy.load(args.model_name_or_path)

    def __call__(self, key: int, prompts: list[str]) -> list[dict]:
        args = self.args
        options = {"n": args.samples, "temperature": 1.0, "max_new_tokens": args.max_new_tokens}
        found = self.policy.generate(prompts, seed=key, **options)
        return [{"steps": [answer.steps for answer in answers]} for answers in found]

    def close(self) -> None:
        """Nothing is open."""


class Returning:
    """Returns the items of a unit, which are rows."""

    def __call__(self, key: int, rows: list[dict]) -> list[dict]:
        return rows

    def close(self) -> None:
        """Nothing is open."""


def seconds_of(make_worker: Any, args: EngineArgs, units: list, warm_up: list) -> tuple[float, Any]:
    """(seconds that the units take, their rows by key), after the units of the warm-up."""
    with open_engine(args, make_worker) as engine:
        engine.build(len(units))
        for _ in engine.map(warm_up):
            pass
        started = time.perf_counter()
        found = {key: rows for key, _, rows in engine.map(units)}
        return time.perf_counter() - started, found


@dataclass
class ReplayArguments(ShardArgs):
    output: str
    overwrite: bool = False


def replay(folder: str, count: int, step: str) -> Iterator[dict[str, Any]]:
    """In a process of its own: one step of a job without work, whose rows lie in the folder."""
    path = Path(folder, "rows.jsonl")
    pair = next(read_rows(at_root("data/synthetic_dataset.jsonl")))[1]
    row = {"samples": 8, "ended": 8, "right": 4, "why_not": None, "pair": pair}
    yield {}
    started = time.perf_counter()
    job = Job(ReplayArguments(output=str(path)), {"job": "replay"}, range(count), 1)
    rows = job.open()
    if step == "append":
        for number in range(count):
            if number % 100 != 99:
                rows.append(row, at=number)
    elif step == "resume":
        assert len(job.missing(rows)) == count // 100
    else:
        assert sum(1 for _ in rows) == count - count // 100
    yield {"seconds": time.perf_counter() - started, "bytes": rows.path.stat().st_size}


def main() -> None:
    (args,) = parse_args(EngineBenchArguments, description=__doc__.split("\n\n")[0])
    check_model(args.model_name_or_path)
    output = Path(args.output_dir, "engine.json")
    check_output(output, args.overwrite, [args.model_name_or_path])
    metrics: dict[str, Metric] = {}

    prompts = [problem.prompt for problem in islice(problems("train"), args.units * args.unit)]
    units = [(n, prompts[n * args.unit : (n + 1) * args.unit]) for n in range(args.units)]
    expected, table = None, []
    for workers in (0, *args.workers):
        engine = EngineArgs(engine="ray", workers=workers) if workers else EngineArgs()
        make_worker, warm_up = partial(Sampling, args), units[:1] * (3 * max(1, workers))
        seconds, found = seconds_of(make_worker, engine, units, warm_up)
        expected = expected or found
        assert found == expected, "the samples depend on the workers"
        rate = args.units / seconds
        metrics[f"units_a_second/{workers}"] = Metric(rate, None, args.units)
        ratio = rate / metrics["units_a_second/0"].value
        table.append([workers or "in this process", f"{rate:.2f}", f"{ratio:.2f}"])
    print_table(
        f"sampling, {args.unit} problems a unit, {os.environ.get('OMP_NUM_THREADS', 'all')} "
        "threads a worker",
        ["workers", "units a second", "ratio"],
        table,
    )

    calls = [(n, [{"n": n}]) for n in range(args.calls)]
    engine = EngineArgs(engine="ray", workers=1)
    seconds, _ = seconds_of(Returning, engine, calls, calls[:3])
    metrics["seconds/a call"] = Metric(seconds / args.calls, None, args.calls)
    table = [["a call", f"{1e6 * seconds / args.calls:.0f}", "", ""]]
    with tempfile.TemporaryDirectory() as folder:
        for step in STEPS:
            with Variant(replay, folder, args.replayed, step) as variant:
                found = variant.round(None)
                memory = variant.peak_memory()
            each = found["seconds"] / args.replayed
            metrics[f"seconds/{step}"] = Metric(each, None, args.replayed)
            metrics[f"memory/{step}"] = Metric(memory, None, args.replayed)
            row = [f"{1e6 * each:.1f}", f"{found['seconds']:.1f}", f"{memory:.2f}"]
            table.append([step, *row])
        metrics["bytes_a_row"] = Metric(found["bytes"] / args.replayed, None, args.replayed)
    print_table(
        f"the driver, {args.replayed} units",
        ["step", "microseconds a unit", "seconds", "memory, GB"],
        table,
    )
    write_result(output, metrics, vars(args), [0])
    print(f"wrote {output}")


if __name__ == "__main__":
    run(main)
