"""Map units of work over workers: in this process, or on Ray actors (`--engine ray`).

A unit is some items that are worked on together, for example 64 problems, and each item gives one
row. What a unit gives depends on its items alone, so neither the number of workers nor the order
matters, and the rows are those of one worker in this process. A worker holds the models, and is
built once in its process.

On Ray every worker is a plain actor that gets its next unit when it has finished the last one, so
that long units hold up one worker and no other. This process alone hands out units and keeps rows.
Workers may die. What happens then:

- A new worker takes the place of one that died, and its unit is tried again.
- A unit whose workers died twice is worked on item by item. An item whose workers died twice is
  left out, and the others are not.
- If many workers die and no unit is finished in between, the run ends: then it is no item's fault.

An error while a worker works counts as its death: the model or the server may be what is broken.
Only a mistake that a user can fix, or an error while a worker is built, ends the run at once.
"""

import contextlib
import importlib.util
import io
import itertools
import logging
import os
import pickle
import re
import signal
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from common.cli import DTYPE_VARIABLE, arg, check_least, here
from common.errors import ModelError, ServerError, UserError, first_line
from common.files import ROOT, file_stem, write_records
from common.progress import progress_bar, taking_long
from common.resumable import ResumableRows

TRIES = 2  # how often a unit is tried, and then each of its items alone
FATAL = f"fatal to {TRIES} workers"  # why an item is left out, in words that follow "is" or "are"
MOST_DEATHS = 10  # for each worker, without a finished unit in between
STORE = 128 * 2**20  # bytes of the object store of a local Ray: units are small
# environment variables that a worker gets from this process: results or speed depend on them
VARIABLES = ("OMP_NUM_THREADS", DTYPE_VARIABLE)


class Worker(Protocol):
    """What works on units. It is built once in each process."""

    def __call__(self, key: Any, items: list, /) -> list[dict]:
        """One row for each item; any rows if no item may be left out (`map` without `left_out`).

        key: what the unit is called, for example its first number."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


# without arguments, and such that it can be pickled: functools.partial(CLASS, ARGUMENTS)
MakeWorker = Callable[[], Worker]
Unit = tuple[Any, list]  # (key, items)
LeftOut = Callable[[Any, str], dict]  # (item, reason) -> the row of an item that is left out


@dataclass(kw_only=True)
class EngineArgs:
    """Where the units of a job are worked on, mixed into the arguments of a script."""

    engine: str = arg(
        "local",
        "local: in this process; ray: on --workers Ray actors, here or on the cluster that the "
        "environment variable RAY_ADDRESS names (needs requirements-ray.txt)",
        choices=["local", "ray"],
    )
    workers: int = arg(
        1,
        "with --engine ray: actors, each with its own models, on a GPU each if there are GPUs; "
        "OMP_NUM_THREADS sets the threads of one",
    )


@dataclass(kw_only=True)
class ShardArgs(EngineArgs):
    """`EngineArgs` of a script whose job can be cut into parts that know nothing of each other."""

    shard: str | None = arg(
        None,
        "K/N: work on part K of N only, K from 1 to N, and write OUTPUT.shard-K-of-N; "
        "utils/merge_shards.py puts the parts together",
    )


def check_engine(args: EngineArgs) -> None:
    """Raises UserError for a mistake in the arguments. Imports nothing heavy."""
    check_least(args, workers=1)
    if args.engine == "local" and args.workers != 1:
        raise UserError("argument --workers: needs --engine ray")
    if args.engine == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError(
            "argument --engine: ray is not installed: pip install -r requirements-ray.txt"
        )
    if isinstance(args, ShardArgs):
        shard_of(args)


# --- engines ---


class Engine(AbstractContextManager):
    """Workers in this process: a single one, which is built when the first unit comes."""

    def __init__(self, make_worker: MakeWorker):
        self._make = make_worker
        self.worker: Any = None  # a Worker, if it is in this process and built

    def build(self, units: int = 1) -> None:
        """Build what so many units need, if it is not there."""
        if units and self.worker is None:
            self.worker = self._make()

    def map(self, units: Iterable[Unit], left_out: LeftOut | None = None) -> Iterator[tuple]:
        """(key, items, rows) of every unit, when it is finished, in any order.

        left_out: makes the rows of items that are left out. Without it such an item ends the run
        with a ModelError."""
        for key, items in units:
            self.build()
            assert self.worker is not None
            yield key, items, self.worker(key, items)

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_engine(args: EngineArgs, make_worker: MakeWorker) -> Engine:
    """The engine that the arguments name, a context manager that builds workers when needed."""
    if args.engine == "ray":
        return _RayEngine(make_worker, args.workers)
    return Engine(make_worker)


# --- Ray ---


@dataclass
class _Task:
    """A unit, or one item of a unit that is worked on item by item.

    whole: the unit, and place: that of the item in it. rows: those that are found, by place."""

    key: Any
    items: list
    tries: int = 0
    whole: "_Task | None" = None
    place: int = 0
    rows: dict[int, dict] = field(default_factory=dict)


class _RayEngine(Engine):
    """Workers in Ray actors."""

    def __init__(self, make_worker: MakeWorker, workers: int):
        super().__init__(make_worker)
        self._most = workers
        self._ray: Any = None
        self._actor: Any = None
        self._building: dict[Any, Any] = {}  # the reference to its answer -> actor
        self._idle: list[Any] = []
        self._said: set[str] = set()
        self._deaths = 0  # since the last unit that was finished

    def build(self, units: int = 1) -> None:
        """Build at least one worker, and no more than there are units."""
        self._most = min(self._most, units) or self._most
        while units and not self._idle:
            self._start_missing(0)
            with taking_long("starting the first worker"):
                self._next_answer({})

    def map(self, units: Iterable[Unit], left_out: LeftOut | None = None) -> Iterator[tuple]:
        new, again = itertools.starmap(_Task, units), deque[_Task]()
        running: dict[Any, tuple[Any, _Task]] = {}  # the reference to its answer -> actor, task
        upcoming: _Task | None = None
        while True:
            upcoming = upcoming or next(new, None) or (again.popleft() if again else None)
            if upcoming and self._idle:
                actor, task, upcoming = self._idle.pop(), upcoming, None
                running[actor.work.remote(task.key, task.items)] = actor, task
                continue
            if not (upcoming or running):
                return
            if upcoming:
                self._start_missing(len(running))
            ended, reason, rows = self._next_answer(running)
            if ended is None:  # a worker was built, or died before
                continue
            if reason:
                ended.tries += 1
                if ended.tries < TRIES:
                    again.append(ended)
                    continue
                if left_out is None:
                    raise ModelError(f"unit {ended.key}: its worker died {TRIES} times ({reason})")
                if len(ended.items) > 1:
                    alone = enumerate(ended.items)
                    again += [_Task(ended.key, [item], 0, ended, n) for n, item in alone]
                    continue
                rows = [left_out(ended.items[0], FATAL)]
            else:
                self._deaths = 0
            if (whole := ended.whole) is None:
                yield ended.key, ended.items, rows
                continue
            whole.rows |= enumerate(rows, ended.place)
            if len(whole.rows) == len(whole.items):
                yield whole.key, whole.items, [whole.rows[n] for n in range(len(whole.items))]

    def _start_missing(self, running: int) -> None:
        """Start actors until there are as many as there may be."""
        if self._ray is None:
            self._connect()
        variables = {name: os.environ.get(name) for name in VARIABLES}
        for _ in range(self._most - running - len(self._building) - len(self._idle)):
            actor = self._actor.remote(str(ROOT), os.getcwd(), variables)
            self._building[actor.build.remote(self._pickled)] = actor

    def _next_answer(self, running: dict) -> tuple[_Task | None, str, list[dict]]:
        """Wait until an actor has worked on its task, or was built, or died.

        Returns (its task, if it had one; why it died, or ""; the rows)."""
        (answer,), _ = self._ray.wait([*running, *self._building], num_returns=1)
        if answer in running:
            actor, task = running.pop(answer)
        else:
            actor, task = self._building.pop(answer), None
        try:
            kind, value, said = self._ray.get(answer)
        except self._ray.exceptions.RayError as error:
            kind, value, said = "died", f"{type(error).__name__}: {_exit_detail(error)}", ""
        for line in said.splitlines():
            if line not in self._said:  # all workers say the same
                self._said.add(line)
                print(line, file=sys.stderr, flush=True)
        if kind == "user":
            raise pickle.loads(value)
        if kind == "died":
            self._ray.kill(actor)
            self._died(f"{value} (unit {task.key})" if task else value)
            return task, value, []
        self._idle.append(actor)
        return task, "", value

    def _died(self, reason: str) -> None:
        self._deaths += 1
        print(f"a worker died: {reason}", file=sys.stderr, flush=True)
        if self._deaths > MOST_DEATHS * self._most:
            raise ModelError(
                f"{self._deaths} workers died and no unit was finished in between: {reason}; "
                "what is finished is kept, give the same command again to go on"
            )

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's own 15 is for workers beside other jobs; these have the priority of this process
        os.environ.setdefault("RAY_worker_niceness", "0")
        address = os.environ.get("RAY_ADDRESS") or "local"
        local: dict[str, Any] = {
            "num_cpus": self._most,
            "include_dashboard": False,
            "object_store_memory": STORE,
        }
        if address != "local":
            check_address(address)
        with taking_long(f"starting Ray ({address})"), _keeping_signals():
            import ray  # heavy, and not everybody has it
            import ray.cloudpickle

            try:
                ray.init(
                    address,
                    log_to_driver=False,  # the actors give back what they say
                    logging_level=logging.ERROR,
                    **(local if address == "local" else {}),
                )
            except Exception as error:  # Ray raises plain Exception if its start takes too long
                raise ServerError(f"Ray at {address} cannot be used: {first_line(error)}") from None
        self._ray = ray
        self._pickled = ray.cloudpickle.dumps(self._make)
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        self._actor = ray.remote(_actor_class()).options(num_cpus=1, num_gpus=gpus)

    def close(self) -> None:
        if self._ray is not None:
            self._ray.shutdown()  # ends the actors, and a Ray that was started here
            self._ray, self._building, self._idle = None, {}, []


def _actor_class() -> type:
    """The class of the actors. Being local it is pickled whole: a process of Ray can import nothing
    of this project before `__init__` has told it where that lies."""

    class Actor:
        def __init__(self, root: str, folder: str, variables: dict[str, str | None]):
            import os
            import sys

            sys.path.insert(0, root)
            os.chdir(folder)
            for name, value in variables.items():  # Ray has set some of them itself
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

        def build(self, pickled: bytes) -> tuple:
            from common.engine import answer_of
            from common.errors import UserError
            from common.threads import share_cores

            def build() -> list:
                import pickle

                share_cores()
                self.worker = pickle.loads(pickled)()
                return []

            return answer_of(build, ends=UserError)

        def work(self, key: Any, items: list) -> tuple:
            from common.engine import answer_of

            return answer_of(lambda: self.worker(key, items))

    return Actor


def answer_of(work: Callable[[], list], ends: type | None = None) -> tuple[str, Any, str]:
    """In an actor: (kind, value, what was printed).

    kind: `rows`; `user` with the pickled error that ends the run; or `died` with the reason. ends:
    the errors that end the run; without it those of a user, but none of a model or a server."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            return "rows", work(), _last_lines(said)
        except Exception as error:
            if isinstance(error, ends or UserError) and (ends or not isinstance(error, ModelError)):
                return "user", pickle.dumps(error), _last_lines(said)
            if not isinstance(error, UserError):
                traceback.print_exc()
            return "died", f"{type(error).__name__}: {first_line(error)}", _last_lines(said)


def _last_lines(said: Any) -> str:
    """What was printed, without progress: what a `\\r` overwrites, and `still loading ...`."""
    lines = [line.rpartition("\r")[2] for line in said.getvalue().split("\n")]
    kept = [line for line in lines if not re.match(r"still .* \(\d+ s\) \.\.\.$", line)]
    return "\n".join(kept)


def _exit_detail(error: BaseException) -> str:
    """What Ray says about a process that died, in one line."""
    found = re.search(r"Worker exit detail: ([^.\n]*)|cause of failure: ([^\n]*)", str(error))
    return next(filter(None, found.groups())) if found else first_line(error)


def check_address(address: str) -> None:
    """Raises ServerError if nothing answers at RAY_ADDRESS: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # `auto`, which Ray looks up
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ServerError(
            f"RAY_ADDRESS: no Ray cluster answers at {address} ({first_line(error)}): "
            "start one with `ray start --head`, or unset RAY_ADDRESS"
        ) from None


@contextlib.contextmanager
def _keeping_signals() -> Iterator[None]:
    """ray.init replaces the handler of SIGTERM: put back the one of the script."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


# --- shards ---


@dataclass(frozen=True)
class Shard:
    """Part `number` of `count`, from 1: every count-th unit."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def file(self, output: str | Path) -> str:
        return f"{output}.shard-{self.number}-of-{self.count}"

    def has(self, unit: int) -> bool:
        """Whether a unit, counted from 0, is in this part."""
        return unit % self.count == self.number - 1


WHOLE = Shard(1, 1)


def shard_of(args: EngineArgs) -> Shard:
    """The part of the job that the arguments name. Raises UserError for a mistake in --shard."""
    text = getattr(args, "shard", None)
    if text is None:
        return WHOLE
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise UserError(f"argument --shard: expected K/N with K from 1 to N, got {text}")
    return Shard(number, count)


class Job:
    """The rows of a job, one for each item, or those of a part of it (`--shard`).

    args: ShardArgs with `output` and `overwrite`. identity: all that the rows depend on. unit: how
    many items are worked on together. file: what is written: the output, or the rows of the part,
    which utils/merge_shards.py puts together. Raises UserError for a mistake in the arguments."""

    def __init__(self, args: Any, identity: dict, items: Sequence, unit: int, output: str = ""):
        check_engine(args)
        self.args, self.items, self.unit = args, items, unit
        self.shard = shard_of(args)
        self.is_part = getattr(args, "shard", None) is not None
        self.output = output or str(args.output)
        self.file = self.shard.file(self.output) if self.is_part else self.output
        self.identity = identity
        if self.is_part:
            self.identity = part_of(identity, self.shard, unit, len(items))

    @property
    def left_out_path(self) -> Path:
        return Path(self.output).with_name(f"{file_stem(self.output)}.left_out.jsonl")

    @property
    def outputs(self) -> list[str | Path]:
        """The files that the job may write."""
        return [self.file] if self.is_part else [self.output, self.left_out_path]

    def write_left_out(self, items: Sequence) -> None:
        """Write the items that are left out, or remove the file of an earlier run."""
        if items:
            write_records(self.left_out_path, items)
            print(f"left out: {len(items)} ({FATAL}), written to {self.left_out_path}")
        else:
            self.left_out_path.unlink(missing_ok=True)

    def some(self, count: int) -> list:
        """At most so many of the items, evenly spaced."""
        return list(self.items[:: -(-len(self.items) // count) or 1])

    def may_replace(self) -> bool:
        """As ResumableRows.may_replace."""
        return ResumableRows.may_replace(self.file, self.identity, self.args.overwrite)

    def open(self) -> ResumableRows:
        """The rows that are there."""
        total = len(self.items)
        return ResumableRows(self.file, self.identity, self.unit, self.args.overwrite, total)

    def fill(
        self, rows: ResumableRows, make_worker: MakeWorker, left_out: LeftOut, desc: str, noun: str
    ) -> None:
        """Append the rows of all units that are missing. A part is then finished.

        desc, noun: `scoring`, `pair`, for the progress bar. The workers are called with the number
        of the unit's first item."""
        missing = self.missing(rows)
        units = ((start, list(self.items[start : start + self.unit])) for start in missing)
        with (
            self.working(rows, make_worker, len(missing)) as engine,
            self.bar(rows, desc, noun) as bar,
        ):
            for start, _, found in engine.map(units, left_out):
                rows.append(*found, at=start)
                bar.update(len(found))

    def missing(self, rows: ResumableRows) -> list[int]:
        """The first item of each unit that is not there."""
        return [start for start in self._starts() if not rows.has(start)]

    def bar(self, rows: ResumableRows, desc: str, noun: str) -> AbstractContextManager[Any]:
        total = sum(min(self.unit, len(self.items) - start) for start in self._starts())
        return progress_bar(total=total, initial=len(rows), desc=desc, unit=noun)

    @contextlib.contextmanager
    def working(self, rows: ResumableRows, make_worker: MakeWorker, units: int) -> Iterator[Engine]:
        """The engine with workers for so many units. In the block all rows are appended; a part is
        finished then."""
        with open_engine(self.args, make_worker) as engine:
            try:
                engine.build(units)
            except BaseException:
                if not len(rows):  # nothing to resume
                    rows.finish()
                raise
            yield engine
        if self.is_part:
            rows.close()
            os.replace(rows.path, self.file)
            merge = here("python utils/merge_shards.py", "--output", self.output)
            print(f"wrote {len(rows)} rows, part {self.shard}, to {self.file}")
            print(f"next, when all {self.shard.count} parts are there: {merge}")

    def _starts(self) -> Iterator[int]:
        """The first item of each unit of this part."""
        starts = range(0, len(self.items), self.unit)
        return (start for start in starts if self.shard.has(start // self.unit))


def part_of(identity: dict, shard: Shard, unit: int, total: int) -> dict:
    """The identity of a part of a job, which names the job."""
    return {"job": identity, "shard": [shard.number, shard.count], "unit": unit, "rows": total}
