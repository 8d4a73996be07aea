"""Variants of a benchmark that take turns, each in a process of its own.

So each has its own peak of memory, and a change in the machine's speed meets all of them alike.
"""

import multiprocessing
import os
import resource
import traceback
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from common.errors import UserError

Measure = Callable[[], Any]


def in_turns(
    variants: dict[str, Callable[[], Measure]], rounds: int, title: str
) -> dict[str, tuple[list[Any], float]]:
    """For each variant its results, one a round, and its peak of memory in GB.

    variants: name -> a function that can be pickled; it prepares what is measured and returns
    `measure`, which is called once to warm up and then once a round. Raises UserError if one
    fails."""
    context = multiprocessing.get_context("spawn")
    pipes, workers = {}, []
    results: dict[str, list[Any]] = {name: [] for name in variants}
    memory: dict[str, float] = {}
    try:
        for name, make in variants.items():
            pipes[name], theirs = context.Pipe()
            workers.append(context.Process(target=_serve, args=(theirs, make), daemon=True))
            workers[-1].start()
            theirs.close()
            _answer(name, pipes[name])  # it is ready, and waits
        for _ in tqdm(range(rounds), desc=title, unit="round"):
            for name, pipe in pipes.items():
                pipe.send(None)
                result, memory[name] = _answer(name, pipe)
                results[name].append(result)
    finally:
        for pipe in pipes.values():
            pipe.close()  # ends the worker, if it waits
        for worker in workers:
            worker.join(10)
            worker.kill()
    return {name: (results[name], memory[name]) for name in variants}


def _answer(name: str, pipe: Any) -> Any:
    try:
        kind, value = pipe.recv()
    except EOFError:
        raise UserError(f"{name}: its process died") from None
    if kind == "failed":
        raise UserError(f"{name} failed: {value}")
    return value


def _serve(pipe: Any, make: Callable[[], Measure]) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):  # the libraries' bars and warnings
        os.dup2(nowhere, output)
    try:
        measure = make()
        measure()
        pipe.send(("ready", None))
        while True:
            pipe.recv()
            result = measure()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux
            pipe.send(("done", (result, peak)))
    except EOFError:
        return
    except Exception:
        pipe.send(("failed", traceback.format_exc()))
