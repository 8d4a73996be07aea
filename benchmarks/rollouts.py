"""Samples and next steps a second: our decoder, transformers' generate, llama.cpp.

    python benchmarks/rollouts.py          # 4 minutes on 2 cores
    python benchmarks/rollouts.py --model_name_or_path models/smollm2-135m-instruct --kinds steps \
        --counts 16 --steps 1 --max_new_tokens 12 --ways ours --gguf SmolLM2-135M-Instruct.Q4_1.gguf

`samples` are whole solutions of one prompt. `steps` are proposals for the next step: the first one
that can go on is continued, as in a search, so prefixes grow. `together` are rollouts of many
states in one call. All ways sample at temperature 1 from all tokens. They take turns, each in a
process of its own, and a rate is the median of the rounds. The fair peer is `generate, prefix
once`: it reads a prefix once for all its samples and ends a step at its line break. llama.cpp is
its own server with continuous batching and a cache of prompts. Memory includes the libraries."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.turns import Figures, Variant
from common.cli import (
    DtypeArgs,
    arg,
    check_input,
    check_least,
    check_model,
    check_output,
    parse_args,
    run,
)
from common.errors import UserError
from common.files import at_root
from common.progress import Bar
from evaluation.metrics import Metric
from evaluation.results import print_table, write_result
from reasoning.problems import problems

OURS, PEER = "ours", "generate, prefix once"
GENERATE = {
    PEER: "once",
    "generate": "dynamic",
    "generate, static cache": "static",
    "one call a sample": "alone",
}
KINDS = ("samples", "steps", "together")
TOGETHER = 8  # rollouts of each of the states that are given together


@dataclass
class RolloutArguments(DtypeArgs):
    model_name_or_path: str = arg(at_root("models/policy-mini"), "the policy")
    gguf: list[str] = arg(
        [], "the policy as GGUF files, for llama.cpp (default: made from it in F16 and Q8_0)"
    )
    ways: list[str] = arg(
        [OURS, *GENERATE],
        f"ways beside llama.cpp; {OURS} and {PEER} are always there",
        choices=[OURS, *GENERATE],
    )
    kinds: list[str] = arg([*KINDS], "what to measure", choices=[*KINDS])
    counts: list[int] = arg([1, 4, 16], "samples of a prompt, and proposals for a step")
    limit: int = arg(1, "prompts in a round, one after another")
    steps: int = arg(4, "steps that follow one another")
    states: int = arg(16, f"states that are given together, for {TOGETHER} rollouts each")
    max_new_tokens: int = arg(96, "most tokens of a sample, and of a step")
    rounds: int = arg(5, "timings of each way")
    threads: int = arg(1, "threads of each way")
    output_dir: str = arg(at_root("evaluation/results"), "folder of rollouts_MODEL.json")
    overwrite: bool = arg(False, "replace an existing result")

    def __post_init__(self) -> None:
        check_least(self, limit=1, steps=1, states=1, max_new_tokens=1, rounds=1, threads=1)
        if min(self.counts) < 1:
            raise UserError(f"argument --counts: expected 1 or more, got {min(self.counts)}")


# --- the ways, each in a process of its own ---


def generating(args: RolloutArguments, way: str | None) -> Any:
    """Our policy, or that of one of the WAYS to use `generate`."""
    from benchmarks.peers import GeneratePolicy
    from lm.policy import Policy

    if way is None:
        return Policy.load(args.model_name_or_path)
    policy = GeneratePolicy.load(args.model_name_or_path)
    policy.way = way
    return policy


def llamacpp(args: RolloutArguments, path: str) -> Any:
    from benchmarks.peers import LlamaCppPolicy
    from lm.loading import load_tokenizer
    from lm.policy import State
    from lm.text_encoding import encode_prompt

    tokenizer = load_tokenizer(args.model_name_or_path)
    policy: Any = LlamaCppPolicy(path, tokenizer, args.threads, max(args.counts), 512)
    policy.start = lambda prompt: State(prompt, tuple(encode_prompt(tokenizer, prompt)), ())
    return policy


def timed(args: RolloutArguments, load: Callable[..., Any], what: Any) -> Iterator[Any]:
    """The job of a variant: each round is (kind, n, seed)."""
    import torch

    torch.set_num_threads(args.threads)
    policy = load(args, what)
    chosen = list(islice(problems("train"), max(args.limit, args.states)))
    starts = [policy.start(problem.prompt) for problem in chosen[: args.limit]]
    kind, n, seed = yield {}
    if load is generating:  # prefixes of the reference solutions, from no step to all but the last
        parts = [problem.steps[: k % len(problem.steps)] for k, problem in enumerate(chosen)]
        pairs = zip(chosen, parts, strict=True)
        states = [policy.start(problem.prompt, part) for problem, part in pairs][: args.states]
        if what == "alone":
            states = states[:4]
    options = {"max_new_tokens": args.max_new_tokens}
    while True:
        groups: list[Any] = []
        began = time.perf_counter()
        if kind == "together":
            groups += policy.rollouts(states, n, seed=seed, **options)
        elif kind == "samples":
            for state in starts:
                groups += policy.rollouts([state], n, seed=seed, **options)
        else:
            for state in starts:
                for _ in range(args.steps):
                    groups += policy.next_steps([state], n, seed=seed, **options)
                    open_states = [child for child in groups[-1] if child.status == "open"]
                    if not open_states:
                        break
                    state = open_states[0]
        seconds = time.perf_counter() - began
        tokens = sum(child.sampled for group in groups for child in group)
        samples = sum(map(len, groups))
        kind, n, seed = yield {"samples": samples / seconds, "tokens": tokens / seconds}


# --- the measurement ---


def main() -> None:
    (args,) = parse_args(RolloutArguments, description=__doc__.split("\n\n")[0])
    check_model(args.model_name_or_path)
    for path in args.gguf:
        check_input(path)
    model = Path(args.model_name_or_path).resolve().name
    output = Path(args.output_dir, f"rollouts_{model}.json")
    check_output(output, args.overwrite, [args.model_name_or_path, *args.gguf])
    cells = [(kind, n) for kind in args.kinds for n in args.counts if kind != "together"]
    cells += [("together", TOGETHER)] * ("together" in args.kinds)
    rates: dict[str, list[Figures]] = {}
    with ExitStack() as stack:

        def variant(load: Callable[..., Any], what: Any) -> Variant:
            return stack.enter_context(Variant(timed, args, load, what))

        variants = {OURS: variant(generating, None)}
        for name, way in GENERATE.items():
            if name == PEER or name in args.ways:
                variants[name] = variant(generating, way)
        for path in args.gguf or exported(args.model_name_or_path, stack):
            variants[f"llama.cpp, {Path(path).name.split('.')[-2]}"] = variant(llamacpp, path)
        for each in variants.values():
            each.round((cells[0][0], 1, 0))  # a warm-up
        for seed in Bar(range(1, args.rounds + 1), desc="measuring", unit="round"):
            for kind, n in cells:
                for name, each in variants.items():
                    if kind != "together" or name == OURS or name in GENERATE:
                        figures = each.round((kind, n, seed))
                        rates.setdefault(f"{name}/{kind}/{n}", []).append(figures)
        memory = {name: each.peak_memory() for name, each in variants.items()}
    report(args, output, rates, memory, cells)


def exported(model: str, stack: ExitStack) -> list[str]:
    """GGUF files of a model, in a folder that is removed at the end."""
    from lm.gguf_export import export_gguf

    folder = stack.enter_context(TemporaryDirectory())
    paths = [f"{folder}/policy.{quantization}.gguf" for quantization in ("F16", "Q8_0")]
    for path in paths:
        export_gguf(model, path, path.split(".")[-2])
    return paths


def report(
    args: RolloutArguments,
    output: Path,
    rates: dict[str, list[Figures]],
    memory: dict[str, float],
    cells: list[tuple[str, int]],
) -> None:
    """Print the tables, and write the medians and all rounds as JSON."""
    metrics: dict[str, Metric] = {}
    for unit in ("samples", "tokens"):
        middle = {cell: median(x[unit] for x in rounds) for cell, rounds in rates.items()}
        metrics |= {
            f"{cell}/{unit}_a_second": Metric(x, None, args.rounds) for cell, x in middle.items()
        }
        table = []
        for name, peak in memory.items():
            row = [middle.get(f"{name}/{kind}/{n}") for kind, n in cells]
            table.append([name, *("" if x is None else f"{x:.1f}" for x in row), f"{peak:.2f}"])
        title = (
            f"{Path(args.model_name_or_path).name}: {unit} a second, threads: {args.threads}, "
            f"median of {args.rounds} rounds"
        )
        print_table(title, ["", *(f"{kind} {n}" for kind, n in cells), "GB"], table)
    metrics |= {f"{name}/memory_gb": Metric(peak, None, 1) for name, peak in memory.items()}
    for kind, n in cells:
        pairs = zip(rates[f"{OURS}/{kind}/{n}"], rates[f"{PEER}/{kind}/{n}"], strict=True)
        ratio = median(our["samples"] / peer["samples"] for our, peer in pairs)
        metrics[f"{OURS} over {PEER}/{kind}/{n}"] = Metric(ratio, None, args.rounds)
        print(f"{kind} {n}: {OURS} {ratio:.2f} times {PEER}, median of the rounds' ratios")
    write_result(output, metrics, vars(args), [*range(1, args.rounds + 1)], rounds=rates)
    print(f"wrote {output}")


if __name__ == "__main__":
    run(main)
