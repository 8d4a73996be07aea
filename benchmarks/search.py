"""Beam search over many problems together, against one problem at a time with all kept caches thrown away at every step.

    python benchmarks/search.py          # a few minutes on 2 cores

Both find the same answers: the policy seeds its samples by state, the judge's scores differ by rounding at most. They take turns;
the ratio is that of the medians of the rounds, for these machines are noisy.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import check_model, parse_args, run
from common.errors import UserError
from common.files import at_root
from reward_model.registry import JudgeArgs, check_judge, open_judge
from search.strategies import SearchBudget, SearchResult, beam


@dataclass
class SearchBenchmarkArguments(JudgeArgs):
    judge: str = field(
        default="prm", metadata=next(f.metadata for f in fields(JudgeArgs) if f.name == "judge")
    )
    model_name_or_path: str = field(
        default=at_root("models/policy-mini"), metadata={"help": "the policy"}
    )
    limit: int = field(default=64, metadata={"help": "problems"})
    n: int = field(default=4, metadata={"help": "next steps proposed for each beam"})
    beams: int = field(default=4, metadata={"help": "beams"})
    rounds: int = field(default=3, metadata={"help": "how often each takes its turn"})

    def __post_init__(self):
        SearchBudget(self.n, self.beams)
        for name in ("limit", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"argument --{name}: expected 1 or more, got {getattr(self, name)}"
                )


def main() -> None:
    (args,) = parse_args(SearchBenchmarkArguments, description=__doc__.split("\n\n")[0])
    check_model(args.model_name_or_path)
    check_judge(args)
    from tqdm import trange

    from evaluation.metrics import print_table
    from lm.policy import Policy
    from reasoning.problems import problems

    def forget(policy: Policy, judge) -> None:
        policy.decoder._kept.clear()
        policy.decoder._kept_bytes = 0
        if hasattr(judge, "_kept"):  # a PRM
            judge._kept.clear()

    class Forgetful(Policy):
        """Reads every beginning from its first token on, each time, and makes the judge do the same."""

        def next_steps(self, *rest, **named):
            forget(self, judge)
            return super().next_steps(*rest, **named)

    budget = SearchBudget(args.n, args.beams)
    prompts = [task.prompt for task in islice(problems("validation"), args.limit)]
    kept, forgetful = Policy.load(args.model_name_or_path), Forgetful.load(args.model_name_or_path)
    with open_judge(args) as judge:
        ways: dict[str, Callable[[int], list[SearchResult]]] = {
            "together": lambda seed: beam(prompts, kept, judge, budget, seed),
            "one at a time": lambda seed: [
                beam([prompt], forgetful, judge, budget, seed)[0] for prompt in prompts
            ],
        }
        beam(prompts[:2], kept, judge, budget, args.rounds)  # whatever the first call has to set up
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        tokens: dict[str, int] = {}
        for seed in trange(args.rounds, desc="rounds"):
            found = {}
            for name, search in ways.items():
                forget(kept, judge)
                start = time.perf_counter()
                found[name] = search(seed)
                seconds[name].append(time.perf_counter() - start)
                tokens[name] = sum(answer.tokens for answer in found[name])
            differ = [
                prompt
                for prompt, one, other in zip(prompts, *found.values(), strict=True)
                if one.steps != other.steps
            ]
            if differ:
                raise UserError(
                    f"seed {seed}: {len(differ)} of {len(prompts)} answers differ, the first for {differ[0]!r}"
                )
    median = {name: statistics.median(of_rounds) for name, of_rounds in seconds.items()}
    rows = [
        (
            name,
            f"{median[name]:.2f}",
            f"{args.limit / median[name]:.1f}",
            f"{tokens[name] / median[name]:,.0f}",
        )
        for name in ways
    ]
    title = f"beam, {args.limit} problems, n {args.n}, {args.beams} beams, judge {judge}, median of {args.rounds} rounds"
    print_table(title, ["problems", "seconds", "a second", "tokens a second"], rows)
    ratio = median["one at a time"] / median["together"]
    print(
        f"together: {ratio:.1f} times as fast; all {args.limit} answers are the same in every round"
    )


if __name__ == "__main__":
    run(main)
