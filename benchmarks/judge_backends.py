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

Results about other files stay in judge_backends.json.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tinyllama_shape import LAYERS, NAME, make_file
from benchmarks.turns import Figures, Variant, peak_memory
from common.cli import arg, check_input, check_least, parse_args, run, warn
from common.errors import ModelError, UserError
from common.files import at_root
from lm.gguf_file import QUANTIZATIONS
from reasoning.problems import problems
from reward_model.judges.native import SMALL, NativeJudge
from reward_model.protocols import Solution, mean

STEPS = 6  # of every solution
SHAPE = "tinyllama"  # the names of the files that are made
GENERATED = 16  # tokens of a verdict in the seeds' way
MANY = 10  # a small file gets so many times the solutions of a round

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
    output_dir: str = arg(at_root("evaluation/results"), "folder of judge_backends.json")
    overwrite: bool = arg(False, "replace earlier results about these files")


# --- in the process of an engine ---


def job(engine: str, path: str, threads: int) -> Iterator[Any]:
    """The job of a variant: each round scores the solutions that it is sent."""
    sys.stdout = sys.stderr  # the table alone goes to stdout
    start = time.perf_counter()
    score, pid = {"seed": seed, "hf": hf}.get(engine, native)(engine, path, threads)
    load = time.perf_counter() - start
    solutions = yield {}
    while True:
        start = time.perf_counter()
        scores = score(solutions)
        seconds = time.perf_counter() - start
        memory = peak_memory(pid)  # of the process that holds the model
        steps = STEPS * len(solutions)
        figures = {"seconds": seconds, "steps": steps, "scores": scores}
        solutions = yield {**figures, "memory_gb": memory, "load_seconds": load}


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
    folder = tempfile.TemporaryDirectory()
    judge.close()  # only its template and its text encoder are needed
    settings = {**judge._settings, "folder": folder.name}
    model: Any = sys.modules[type(judge).__module__]._Model(settings)
    model.folder = folder  # it is removed with the model

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


def measure(path: str, args: BackendArguments) -> dict[str, list[Figures]]:
    """Engine -> the figures of its rounds, for the engines that can read the file."""
    count = args.solutions * (MANY if os.path.getsize(path) < SMALL else 1)
    long = (p for p in problems("hard_validation") if len(p.steps) == STEPS)
    solutions = [(p.prompt, p.steps) for p in islice(long, count * (args.rounds + 1))]
    with ExitStack() as stack:
        variants = {}
        for name in args.engines:
            variant = stack.enter_context(Variant(job, name, path, args.threads))
            try:
                variant.wait()
            except ModelError as error:
                warn(f"{name} is left out: {error}")
                continue
            variants[name] = variant
            prompt, steps = solutions[-1]
            variant.round([(prompt, steps[:1])])  # a warm-up
        for number in range(args.rounds):
            for variant in variants.values():
                variant.round(solutions[number * count : (number + 1) * count])
    return {name: variant.figures[1:] for name, variant in variants.items()}


def figures(measured: dict[str, list[Figures]]) -> dict[str, dict[str, tuple[float, int]]]:
    """Engine -> name of a figure -> (value, on how many rounds or scores)."""
    scores = {
        name: [score for each in rounds for score in each["scores"]]
        for name, rounds in measured.items()
    }
    reference = scores.get("hf") or next((own for own in scores.values() if own), [])
    found: dict[str, dict[str, tuple[float, int]]] = {}
    for name, rounds in measured.items():
        seconds = [each["seconds"] for each in rounds]
        values = {
            "steps_per_second": rounds[-1]["steps"] / statistics.median(seconds),
            "memory_gb": rounds[-1]["memory_gb"],
            "load_seconds": rounds[-1]["load_seconds"],
        }
        if "seed" in measured:
            pairs = zip(measured["seed"], seconds, strict=True)
            values["times_seed"] = statistics.median(s["seconds"] / own for s, own in pairs)
        found[name] = {key: (value, len(rounds)) for key, value in values.items()}
        if scores[name]:
            both = list(zip(scores[name], reference, strict=True))
            differences = [abs(a - b) for a, b in both]
            values = {
                "max_difference": max(differences),
                "mean_difference": mean(differences),
                "verdicts_that_differ": mean([(a > 0.5) != (b > 0.5) for a, b in both]),
            }
            found[name] |= {key: (value, len(both)) for key, value in values.items()}
    return found


def earlier_results(output: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metrics, config) of the result file, if there is one. Raises UserError."""
    if not output.exists():
        return {}, {}
    try:
        result = json.loads(output.read_text(encoding="utf-8"))
        return result["metrics"], result["config"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{output} is no result of this script: give another --output_dir"
        ) from None


def made_file(folder: Path, quantization: str) -> Path:
    """A file at TinyLlama's shape in the folder, made if it is not there."""
    path = folder / f"{NAME}.{quantization}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # in a folder of its own: the user's may hold a real TinyLlama of this name
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made, _ = make_file(Path(temporary), LAYERS, quantization)
            shutil.move(made, path)
    return path


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
    stored, config = earlier_results(output)
    metrics = {name: Metric(**value) for name, value in stored.items()}
    labels = {name: name if name in made else Path(name).stem for name in args.files}
    known = [label for label in labels.values() if label in config]
    if known and not args.overwrite:
        raise UserError(f"{output} has results about {known[0]}: --overwrite replaces them")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        for name, label in labels.items():
            path = made_file(folder, made[name]) if name in made else Path(name)
            found = figures(measure(str(path), args))
            metrics = {key: m for key, m in metrics.items() if not key.startswith(f"{label}/")}
            for engine, values in found.items():
                for key, (value, n) in values.items():
                    metrics[f"{label}/{engine}/{key}"] = Metric(value, None, n)
            config[label] = asdict(args)
            columns = list(dict.fromkeys(key for values in found.values() for key in values))
            rows = [
                [engine, *(f"{values[key][0]:.4g}" if key in values else "" for key in columns)]
                for engine, values in found.items()
            ]
            title = f"{label}: {args.rounds} rounds, {args.threads} threads"
            print_table(title, ["engine", *columns], rows)
            output.parent.mkdir(parents=True, exist_ok=True)
            write_result(output, metrics, config, [])
            print(f"wrote {output}")


if __name__ == "__main__":
    run(main)
