"""Steps a second of the judges `gguf`, `llamacpp` and `hf` and of the seeds' way; their scores.

    python benchmarks/judge_backends.py --files models/judge-mini/judge-mini.Q8_0.gguf
    python benchmarks/judge_backends.py --files tinyllama.Q4_0 --threads 2 --folder FOLDER
    python benchmarks/judge_backends.py --files SmolLM2-135M-Instruct.Q4_1.gguf

The first takes a minute on 2 cores. `tinyllama.Q4_0` and the like are made at TinyLlama's shape
with random weights (3 GB of disk, a few minutes); --folder keeps them for another call. There one
solution a round is read, and the five rounds take 6 minutes without `hf` on 2 threads.

Each engine has a process of its own. They take turns, on new solutions of 6 steps in every round,
and a rate is the median of the rounds. `seed` is what the student projects do: for every step the
whole text is read anew, and then the model generates its verdict as text, here 16 tokens. It uses
ctransformers with its defaults, and llama.cpp without its cache for a file that ctransformers
refuses. Memory is the peak of the process that holds the model. Scores are compared with those of
`hf`, which computes in float32 with the weights of the file, or of the first engine without it.

Results of an earlier call about other files stay in judge_backends.json.
"""

import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tinyllama_shape import LAYERS, NAME, make_file, peak_memory
from common.cli import arg, check_input, check_least, parse_args, run
from common.errors import ModelError, UserError
from common.files import at_root
from lm.gguf_file import QUANTIZATIONS
from reasoning.problems import problems
from reward_model.judges.native import SMALL, NativeJudge
from reward_model.protocols import Solution, mean

STEPS = 6  # of every solution
SHAPE = "tinyllama"  # the names of the files that are made
GENERATED = 16  # tokens of a verdict in the seeds' way
MANY = 10  # times as many solutions a round for a small file

Score = Callable[[list[Solution]], list[float]]  # the scores of all steps


@dataclass
class BackendArguments:
    files: list[str] = arg(
        [at_root("models/judge-mini/judge-mini.Q8_0.gguf"), f"{SHAPE}.Q4_0", f"{SHAPE}.Q8_0"],
        f"GGUF files; {SHAPE}.Q4_0 and the like are made ({', '.join(QUANTIZATIONS)})",
    )
    engines: list[str] = arg(
        ["seed", "gguf", "llamacpp", "hf"],
        "what is measured",
        choices=["seed", "gguf", "llamacpp", "hf"],
    )
    solutions: int = arg(1, f"solutions a round; {MANY} times as many for a file below 50 MB")
    rounds: int = arg(5, "timings of each engine")
    threads: int = arg(1, "threads of each engine")
    folder: str | None = arg(None, "where made files are kept (default: a temporary folder)")
    output_dir: str = arg(at_root("evaluation/results"), "gets judge_backends.json")


# --- in the process of an engine ---


def serve(connection: Connection, engine: str, path: str, threads: int) -> None:
    """Score the solutions that arrive through the pipe until None arrives."""
    sys.stdout = sys.stderr  # the table alone goes to stdout
    start = time.perf_counter()
    try:
        score, pid = {"seed": seed, "hf": hf}.get(engine, native)(engine, path, threads)
    except ModelError as error:
        connection.send(str(error))
        return
    connection.send(time.perf_counter() - start)
    while (solutions := connection.recv()) is not None:
        start = time.perf_counter()
        scores = score(solutions)
        connection.send((time.perf_counter() - start, scores))
    connection.send(peak_memory(pid))


def judge_class(engine: str) -> type[NativeJudge]:
    from reward_model.judges.llamacpp import LlamaCppJudge
    from reward_model.tinyllama_reward_model import TinyLlamaRewardScorer

    return {"gguf": TinyLlamaRewardScorer, "llamacpp": LlamaCppJudge}[engine]


def flat(judge: Any, solutions: list[Solution]) -> list[float]:
    scores = judge.score_steps(solutions)
    if None in scores:
        raise UserError(f"{judge}: a solution is longer than its context")
    return [score for steps in scores for score in steps]


def native(engine: str, path: str, threads: int) -> tuple[Score, int]:
    judge = judge_class(engine)(path, threads=threads)
    return lambda solutions: flat(judge, solutions), judge._process.pid


def hf(engine: str, path: str, threads: int) -> tuple[Score, int]:
    import torch

    from reward_model.judges.hf import HFJudge

    torch.set_num_threads(threads)
    judge = HFJudge(path, device="cpu")
    return lambda solutions: flat(judge, solutions), os.getpid()


def seed(engine: str, path: str, threads: int) -> tuple[Score, int]:
    """The library in this process, which reads the whole text of a step and then generates."""
    try:
        judge = judge_class("gguf")(path, threads=threads)
    except ModelError:
        judge = judge_class("llamacpp")(path, threads=threads)
    judge.close()  # its template and its encoder are used
    settings = {**judge._settings, "folder": tempfile.mkdtemp()}
    model: Any = sys.modules[type(judge).__module__]._Model(settings)

    def generate(ids: list[int]) -> None:
        if hasattr(model, "llm"):
            tokens = model.llm.generate(ids, top_k=1, threads=threads, reset=True)
            for _ in islice(tokens, GENERATED):
                pass
        else:
            options = {"n_predict": GENERATED, "cache_prompt": False, "ignore_eos": True}
            model.server.handle_completions({"prompt": ids, "top_k": 1, **options})

    def score(solutions: list[Solution]) -> list[float]:
        text, template = judge._text, judge.template
        for prompt, steps in solutions:
            items = text.control(template.before, prompt, is_start=True)
            for step in steps:
                items = [*items, *text.plain(step + "\n")]
                generate(model._ids([*items, *text.control(template.question)]))
        return []  # its verdicts are text

    return score, os.getpid()


# --- in the process of the script ---


@dataclass
class Engine:
    """An engine's process, and what was measured of it."""

    name: str
    process: Any
    pipe: Connection
    load: float = 0.0  # seconds
    rates: list[float] = field(default_factory=list)  # steps a second, by round
    scores: list[float] = field(default_factory=list)
    memory: float = 0.0  # GB


def start(name: str, path: str, threads: int) -> Engine | str:
    """The engine, or why it cannot read the file."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, name, path, threads), daemon=False)
    process.start()
    theirs.close()
    try:
        reply = ours.recv()
    except EOFError:
        raise UserError(f"{path}: the process of {name} ended while it loaded the file") from None
    return reply if isinstance(reply, str) else Engine(name, process, ours, reply)


def measure(path: str, args: BackendArguments) -> list[Engine]:
    """The engines that can read the file, measured in turn."""
    count = args.solutions * (MANY if os.path.getsize(path) < SMALL else 1)
    long = (p for p in problems("hard_validation") if len(p.steps) == STEPS)
    solutions = [(p.prompt, p.steps) for p in islice(long, count * (args.rounds + 1))]
    engines: list[Engine] = []
    for name in args.engines:
        engine = start(name, path, args.threads)
        if isinstance(engine, str):
            print(f"{name}: {engine}", file=sys.stderr)
        else:
            engines.append(engine)
    for number in range(args.rounds + 1):  # the first round is a warm-up, of one solution
        chosen = solutions[number * count : (number + 1) * count]
        chosen = chosen if number else [(chosen[0][0], chosen[0][1][:1])]
        for engine in engines:
            engine.pipe.send(chosen)
            seconds, scores = engine.pipe.recv()
            if number:
                engine.rates.append(STEPS * count / seconds)
                engine.scores += scores
    for engine in engines:
        engine.pipe.send(None)
        engine.memory = engine.pipe.recv()
        engine.process.join()
    return engines


def figures(engines: list[Engine]) -> dict[str, dict[str, float]]:
    """Engine -> name of a figure -> value."""
    by_name = {engine.name: engine for engine in engines}
    reference = by_name.get("hf") or next((e for e in engines if e.scores), None)
    found: dict[str, dict[str, float]] = {}
    for engine in engines:
        values = {
            "steps_per_second": statistics.median(engine.rates),
            "memory_gb": engine.memory,
            "load_seconds": engine.load,
        }
        if "seed" in by_name:
            pairs = zip(engine.rates, by_name["seed"].rates, strict=True)
            values["times_seed"] = statistics.median(ours / seeds for ours, seeds in pairs)
        if reference and engine.scores:
            both = list(zip(engine.scores, reference.scores, strict=True))
            values |= {
                "max_difference": max(abs(a - b) for a, b in both),
                "mean_difference": mean([abs(a - b) for a, b in both]),
                "verdicts_that_differ": mean([(a > 0.5) != (b > 0.5) for a, b in both]),
            }
        found[engine.name] = values
    return found


def main() -> None:
    (args,) = parse_args(BackendArguments, description=__doc__)
    check_least(args, solutions=1, rounds=1, threads=1)
    made = {f"{SHAPE}.{kind}": kind for kind in QUANTIZATIONS}
    for name in args.files:
        if name not in made:
            check_input(name)
    # local: slow to import
    from evaluation.metrics import Metric
    from evaluation.results import print_table, write_result

    output = Path(args.output_dir) / "judge_backends.json"
    earlier = json.loads(output.read_text()) if output.exists() else {"metrics": {}, "config": {}}
    metrics = {name: Metric(**value) for name, value in earlier["metrics"].items()}
    config = earlier["config"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        for name in args.files:
            path = folder / f"{NAME}.{made[name]}.gguf" if name in made else Path(name)
            if name in made and not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                make_file(folder, LAYERS, made[name])
                shutil.rmtree(folder / NAME)
            engines = measure(str(path), args)
            found, label = figures(engines), name if name in made else path.stem
            metrics = {key: m for key, m in metrics.items() if not key.startswith(f"{label}/")}
            for engine in engines:
                for key, value in found[engine.name].items():
                    scored = key.endswith(("difference", "differ"))
                    n = len(engine.scores) if scored else args.rounds
                    metrics[f"{label}/{engine.name}/{key}"] = Metric(value, None, n)
            config[label] = asdict(args)
            columns = list(dict.fromkeys(key for values in found.values() for key in values))
            rows = [
                [engine, *(f"{values[key]:.4g}" if key in values else "" for key in columns)]
                for engine, values in found.items()
            ]
            title = f"{label}: {args.rounds} rounds, {args.threads} threads"
            print_table(title, ["engine", *columns], rows)
            output.parent.mkdir(parents=True, exist_ok=True)
            write_result(output, metrics, config, [])


if __name__ == "__main__":
    run(main)
