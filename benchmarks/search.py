"""Speed of beam search: ours, a batched beam that keeps no caches, and one problem at a time.

    python benchmarks/search.py          # 4 minutes on 2 cores

All ways run the same search (search/strategies.py) with the same policy, judge and budget:

- ours: all problems together; the policy and the PRM keep the caches of the steps;
- batched: all problems together; every step reads its prefix again, in one batch for the policy and
  in one for the judge. The answers are those of `ours`;
- generate: the same with `generate` of transformers, which reads a prefix once for its proposals.
  It draws other random numbers, so its accuracy and tokens are those to compare;
- one at a time: as `batched`, for one problem after another, with the answers of `ours`.

The ways take turns, each in a process of its own. Speed is the median of the rounds."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.turns import Variant
from common.cli import DtypeArgs, arg, check_least, check_model, check_output, parse_args, run
from common.errors import UserError
from common.files import at_root
from common.progress import Bar
from evaluation.metrics import Metric
from evaluation.results import print_table, write_result
from reasoning.grading import is_correct
from reasoning.problems import problems
from reward_model.registry import JudgeArgs, check_judge, judge_files, open_judge
from search.candidates import SearchBudget
from search.strategies import beam

OURS, ONE_AT_A_TIME = "ours", "one at a time"
SAME_ANSWERS = ("batched", ONE_AT_A_TIME)
WAYS = (OURS, "batched", "generate", ONE_AT_A_TIME)


@dataclass
class SearchBenchmarkArguments(JudgeArgs, DtypeArgs):
    judge: str = field(
        default="prm", metadata=next(f.metadata for f in fields(JudgeArgs) if f.name == "judge")
    )
    model_name_or_path: str = arg(at_root("models/policy-mini"), "the policy")
    limit: int = arg(16, "number of problems")
    n: int = arg(4, "proposals for each beam and step")
    beams: int = arg(4, "number of beams")
    rounds: int = arg(5, "timings of each way")
    ways: list[str] = arg([*WAYS], "what to measure, ours included", choices=[*WAYS])
    torch_threads: int = arg(1, "threads of each way")
    output_dir: str = arg(at_root("evaluation/results"), "folder of search_speed.json")
    overwrite: bool = arg(False, "replace an existing result")

    def __post_init__(self) -> None:
        SearchBudget(self.n, self.beams)  # checks both
        check_least(self, limit=1, rounds=1, torch_threads=1)
        if OURS not in self.ways:
            raise UserError(f"argument --ways: {OURS} has to be one of them")


def search(args: SearchBenchmarkArguments, way: str) -> Iterator[Any]:
    """The job of a variant: each round is a seed."""
    import torch

    torch.set_num_threads(args.torch_threads)
    from benchmarks.peers import GeneratePolicy
    from lm.policy import Policy

    def empty_caches() -> None:
        policy.decoder._kept.clear()
        policy.decoder._kept_bytes = 0
        if hasattr(judge, "_kept"):  # a PRM
            judge._kept.clear()

    class Cacheless(GeneratePolicy if way == "generate" else Policy):  # type: ignore[misc]
        """Reads every prefix from its first token at every step, as its judge then does."""

        def next_steps(self, *args: Any, **kwargs: Any) -> Any:
            empty_caches()
            return super().next_steps(*args, **kwargs)

    policy = (Policy if way == OURS else Cacheless).load(args.model_name_or_path)
    chosen = list(islice(problems("validation"), args.limit))
    prompts = [problem.prompt for problem in chosen]
    calls = [[prompt] for prompt in prompts] if way == ONE_AT_A_TIME else [prompts]
    budget = SearchBudget(args.n, args.beams)
    with open_judge(args) as judge:
        beam(prompts[:2], policy, judge, budget, args.rounds)  # a warm-up
        seed = yield {}
        while True:
            empty_caches()
            start = time.perf_counter()
            found = [each for call in calls for each in beam(call, policy, judge, budget, seed)]
            seconds = time.perf_counter() - start
            right = [is_correct(each.steps, p) for each, p in zip(found, chosen, strict=True)]
            seed = yield {
                "seconds": seconds,
                "tokens": sum(each.tokens for each in found),
                "accuracy": sum(right) / len(right),
                "answers": [each.steps for each in found],
            }


def main() -> None:
    (args,) = parse_args(SearchBenchmarkArguments, description=__doc__.split("\n\n")[0])
    check_model(args.model_name_or_path)
    check_judge(args)
    output = Path(args.output_dir, "search_speed.json")
    check_output(output, args.overwrite, [args.model_name_or_path, *judge_files(args)])
    with ExitStack() as stack:
        variants = {way: stack.enter_context(Variant(search, args, way)) for way in args.ways}
        for each in variants.values():
            each.wait()
        for seed in Bar(range(args.rounds), desc="measuring", unit="round"):
            found = {way: each.round(seed).pop("answers") for way, each in variants.items()}
            for way in args.ways:
                if way in SAME_ANSWERS and found[way] != found[OURS]:
                    pairs = zip(found[way], found[OURS], strict=True)
                    count = sum(theirs != our for theirs, our in pairs)
                    raise UserError(f"seed {seed}: {count} answers of {way} differ from {OURS}")
        memory = {way: each.peak_memory() for way, each in variants.items()}
    rounds = {way: each.figures for way, each in variants.items()}
    metrics: dict[str, Metric] = {}
    table = []
    for way, own in rounds.items():
        took, tokens, accuracy = (
            median(x[name] for x in own) for name in ("seconds", "tokens", "accuracy")
        )
        pairs = zip(own, rounds[OURS], strict=True)
        times = median(theirs["seconds"] / our["seconds"] for theirs, our in pairs)
        figures = {
            "seconds": took,
            "problems_a_second": args.limit / took,
            "tokens": tokens,
            "accuracy": accuracy,
            "times_ours": times,
            "memory_gb": memory[way],
        }
        metrics |= {f"{way}/{name}": Metric(x, None, args.rounds) for name, x in figures.items()}
        table.append([way, *(f"{x:.2f}" for x in figures.values())])
    title = (
        f"beam, {args.limit} problems, n {args.n}, {args.beams} beams, judge {args.judge}, "
        f"threads: {args.torch_threads}, median of {args.rounds} rounds"
    )
    print_table(title, ["", *(name.replace("_", " ") for name in figures)], table)
    same = [way for way in args.ways if way in SAME_ANSWERS]
    if same:
        print(f"the answers of {' and '.join(same)} are those of {OURS} in every round")
    write_result(output, metrics, vars(args), [*range(args.rounds)], rounds=rounds)
    print(f"wrote {output}")


if __name__ == "__main__":
    run(main)
