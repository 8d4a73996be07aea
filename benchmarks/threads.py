"""Threads of torch: work a second with idle cores, beside a busy core, and beside a second copy.

    python benchmarks/threads.py          # 3 minutes on 2 cores

The scripts start torch with as many threads as there are cores. Threads that wait for one another
spin before they sleep: for milliseconds by OpenMP's own default (300000 spins), only shortly if the
cores are busy when the script starts (common/threads.py). The table compares both with
one thread; `--spins` adds other numbers of spins. Rates are relative to one thread on idle cores.
`busy` is an endless loop in another process, `copy` a second process that
does the same work; all ways take turns."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.turns import Variant
from common.cli import arg, check_least, check_model, check_output, parse_args, run
from common.files import at_root
from common.progress import Bar
from common.threads import FEW_SPINS, WAIT_VARIABLES
from evaluation.metrics import Metric
from evaluation.results import print_table, write_result
from reasoning.problems import problems

JOBS = ("sampling", "training")
BESIDE = ("idle", "busy", "copy")
ONE = "1 thread"


@dataclass
class ThreadArguments:
    model_name_or_path: str = arg(at_root("models/policy-mini"), "the model that works")
    jobs: list[str] = arg([*JOBS], "what it does", choices=[*JOBS])
    threads: int = arg(os.cpu_count() or 1, "threads to compare with one")
    spins: list[str] = arg([], "numbers of spins to compare as well")
    rows: int = arg(16, "solutions that are sampled, or trained on, together")
    tokens: int = arg(32, "length of a solution, at most")
    seconds: float = arg(1.0, "of a measurement, at least")
    rounds: int = arg(5, "measurements of each kind")
    output_dir: str = arg(at_root("evaluation/results"), "folder of threads_MODEL.json")
    overwrite: bool = arg(False, "replace an existing result")

    def __post_init__(self) -> None:
        check_least(self, threads=1, rows=1, tokens=2, rounds=1)


def busy() -> Iterator[Any]:
    """A round keeps one core busy for some seconds."""
    seconds = yield {}
    while True:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        seconds = yield {}


def work(args: ThreadArguments) -> Iterator[Any]:
    """A round is (job, seconds): the job is done again and again for at least so long."""
    import torch

    from lm.policy import Policy

    policy = Policy.load(args.model_name_or_path)
    chosen = list(islice(problems("train"), args.rows))
    states = [policy.start(problem.prompt) for problem in chosen]
    solutions = [policy.start(problem.prompt, problem.steps).ids for problem in chosen]
    length = min(args.tokens, *map(len, solutions))
    batch = torch.tensor([ids[:length] for ids in solutions])
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=1e-6)

    def train() -> None:
        policy.model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    jobs = {
        "sampling": lambda: policy.rollouts(states, max_new_tokens=args.tokens, seed=0),
        "training": train,
    }
    for job in args.jobs:
        jobs[job]()  # a warm-up
    job, seconds = yield {}
    while True:
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            jobs[job]()
            done += 1
        job, seconds = yield {"rate": done / (time.perf_counter() - start)}


def main() -> None:
    (args,) = parse_args(ThreadArguments, description=__doc__.split("\n\n")[0])
    check_model(args.model_name_or_path)
    model = Path(args.model_name_or_path).resolve().name
    output = Path(args.output_dir, f"threads_{model}.json")
    check_output(output, args.overwrite, [args.model_name_or_path])
    own: dict[str, str | None] = dict.fromkeys(WAIT_VARIABLES)  # None removes a variable
    threads = {"OMP_NUM_THREADS": str(args.threads)}
    settings = {
        ONE: {**own, "OMP_NUM_THREADS": "1"},
        f"{args.threads} threads, OpenMP's default": {**own, **threads},
        f"{args.threads} threads, {FEW_SPINS} spins": {
            **own,
            **threads,
            "GOMP_SPINCOUNT": FEW_SPINS,
        },
    }
    for spins in args.spins:
        settings[f"{args.threads} threads, {spins} spins"] = {
            **own,
            **threads,
            "GOMP_SPINCOUNT": spins,
        }
    rates: dict[str, list[float]] = {}
    with ExitStack() as stack:
        load = stack.enter_context(Variant(busy))
        pairs = {
            name: [stack.enter_context(Variant(work, args, variables=variables)) for _ in range(2)]
            for name, variables in settings.items()
        }
        for both in pairs.values():
            for each in both:
                each.wait()
        for _ in Bar(range(args.rounds), desc="measuring", unit="round"):
            for job in args.jobs:
                for name, (first, second) in pairs.items():
                    value = (job, args.seconds)
                    found = {"idle": first.round(value)["rate"]}
                    load.start(2 * args.seconds)
                    found["busy"] = first.round(value)["rate"]
                    load.finish()
                    second.start(value)
                    found["copy"] = first.round(value)["rate"]
                    second.finish()
                    for beside, rate in found.items():
                        rates.setdefault(f"{name}/{job}/{beside}", []).append(rate)
    metrics, table = {}, []
    for name in settings:
        row = []
        for job in args.jobs:
            for beside in BESIDE:
                cell = f"{name}/{job}/{beside}"
                relative = median(rates[cell]) / median(rates[f"{ONE}/{job}/idle"])
                metrics[cell] = Metric(relative, None, args.rounds)
                row.append(f"{relative:.2f}")
        table.append([name, *row])
    title = f"{model}: rates relative to {ONE} on idle cores, median of {args.rounds} rounds"
    columns = [f"{job}, {beside}" for job in args.jobs for beside in BESIDE]
    print_table(title, ["", *columns], table)
    write_result(output, metrics, vars(args), [0], rounds=rates)
    print(f"wrote {output}")


if __name__ == "__main__":
    run(main)
