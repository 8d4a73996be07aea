"""Speed of beam search: many problems together, against one at a time without kept caches.

    python benchmarks/search.py          # a few minutes on 2 cores

One at a time, all caches are emptied before every step. Both ways find the same answers: the seed
of a sample depends on its state only, and the judge's scores differ by rounding at most. The two
ways take turns, and the ratio is that of their medians, because timings vary between runs.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import arg, check_least, check_model, parse_args, run
from common.errors import UserError
from common.files import at_root
from evaluation.results import print_table
from reasoning.problems import problems
from reward_model.protocols import StepJudge
from reward_model.registry import JudgeArgs, check_judge, open_judge
from search.candidates import SearchBudget, SearchResult
from search.strategies import beam


@dataclass
class SearchBenchmarkArguments(JudgeArgs):
    judge: str = field(
        default="prm", metadata=next(f.metadata for f in fields(JudgeArgs) if f.name == "judge")
    )
    model_name_or_path: str = arg(at_root("models/policy-mini"), "the policy")
    limit: int = arg(64, "number of problems")
    n: int = arg(4, "proposals for each beam and step")
    beams: int = arg(4, "number of beams")
    rounds: int = arg(3, "timings of each way")

    def __post_init__(self) -> None:
        SearchBudget(self.n, self.beams)  # checks both
        check_least(self, limit=1, rounds=1)


def main() -> None:
    (args,) = parse_args(SearchBenchmarkArguments, description=__doc__.split("\n\n")[0])
    check_model(args.model_name_or_path)
    check_judge(args)
    # slow to import
    from tqdm import trange

    from lm.policy import Policy

    def empty_caches(policy: Policy, judge: StepJudge) -> None:
        policy.decoder._kept.clear()
        policy.decoder._kept_bytes = 0
        if hasattr(judge, "_kept"):  # a PRM
            judge._kept.clear()

    class CachelessPolicy(Policy):
        """Reads every prefix from its first token at every step, as its judge then does."""

        def next_steps(self, *args: Any, **kwargs: Any) -> Any:
            empty_caches(self, judge)
            return super().next_steps(*args, **kwargs)

    budget = SearchBudget(args.n, args.beams)
    prompts = [problem.prompt for problem in islice(problems("validation"), args.limit)]
    policy = Policy.load(args.model_name_or_path)
    cacheless = CachelessPolicy.load(args.model_name_or_path)
    with open_judge(args) as judge:
        ways: dict[str, Callable[[int], list[SearchResult]]] = {
            "together": lambda seed: beam(prompts, policy, judge, budget, seed),
            "one at a time": lambda seed: [
                beam([prompt], cacheless, judge, budget, seed)[0] for prompt in prompts
            ],
        }
        beam(prompts[:2], policy, judge, budget, args.rounds)  # warm-up
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        tokens: dict[str, int] = {}
        for seed in trange(args.rounds, desc="rounds"):
            found = {}
            for name, search in ways.items():
                empty_caches(policy, judge)
                start = time.perf_counter()
                found[name] = search(seed)
                seconds[name].append(time.perf_counter() - start)
                tokens[name] = sum(answer.tokens for answer in found[name])
            pairs = zip(*found.values(), strict=True)
            differ = [first.prompt for first, second in pairs if first.steps != second.steps]
            if differ:
                raise UserError(
                    f"seed {seed}: {len(differ)} of {len(prompts)} answers differ, the first for "
                    f"{differ[0]!r}"
                )
    median = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [
        (name, f"{took:.2f}", f"{args.limit / took:.1f}", f"{tokens[name] / took:,.0f}")
        for name, took in median.items()
    ]
    title = (
        f"beam, {args.limit} problems, n {args.n}, {args.beams} beams, judge {judge}, "
        f"median of {args.rounds} rounds"
    )
    print_table(title, ["problems", "seconds", "problems a second", "tokens a second"], rows)
    ratio = median["one at a time"] / median["together"]
    print(f"together: {ratio:.1f} times as fast; all answers are the same in every round")


if __name__ == "__main__":
    run(main)
