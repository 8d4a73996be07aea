"""Rollouts a second: all states in one batch, against one `generate` call of transformers for each.

    python benchmarks/rollouts.py          # a minute on 2 cores

States are prefixes of the reference solutions of train problems, from no step to all but the last.
Both ways sample at temperature 1. They take turns, and a rate is the median of the rounds, because
timings vary.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import trange

from common.cli import arg, check_model, parse_args, run
from common.files import at_root
from evaluation.results import print_table
from reasoning.problems import problems


@dataclass
class RolloutArguments:
    model_name_or_path: str = arg(at_root("models/policy-mini"), "the policy")
    limit: int = arg(64, "states")
    rollouts: int = arg(8, "rollouts a state")
    one_by_one: int = arg(32, "rollouts with a call of their own, in every round")
    rounds: int = arg(3, "timings of each way")


def main() -> None:
    (args,) = parse_args(RolloutArguments, description=__doc__.split("\n\n")[0])
    check_model(args.model_name_or_path)
    # heavy: would slow --help
    import torch

    from lm.policy import Policy

    policy = Policy.load(args.model_name_or_path)
    states = [
        policy.start(problem.prompt, problem.steps[: k % len(problem.steps)])
        for k, problem in enumerate(islice(problems("train"), args.limit))
    ]

    def together(seed: int) -> int:
        groups = policy.rollouts(states, args.rollouts, seed=seed)
        return sum(solution.sampled for group in groups for solution in group)

    def one_by_one(seed: int) -> int:
        torch.manual_seed(seed)
        tokens = 0
        for k in range(args.one_by_one):
            ids = torch.tensor([states[k % len(states)].ids], device=policy.device)
            whole = policy.model.generate(ids, do_sample=True, top_k=0, max_new_tokens=256)
            tokens += whole.size(1) - ids.size(1)
        return tokens

    ways = {
        "in one batch": (together, args.limit * args.rollouts),
        "one call each": (one_by_one, args.one_by_one),
    }
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    together(args.rounds)  # the first call includes setup, so it is not timed
    for seed in trange(args.rounds, desc="rounds"):
        for name, (sample, count) in ways.items():
            start = time.perf_counter()
            tokens = sample(seed)
            seconds = time.perf_counter() - start
            rates[name].append((count / seconds, tokens / seconds))
    median = {
        name: [statistics.median(column) for column in zip(*pairs, strict=True)]
        for name, pairs in rates.items()
    }
    table = [
        (name, f"{rollouts:.1f}", f"{tokens:.0f}") for name, (rollouts, tokens) in median.items()
    ]
    title = f"{args.limit} states, {args.rollouts} rollouts each, median of {args.rounds} rounds"
    print_table(title, ["rollouts", "a second", "tokens a second"], table)
    ratio = median["in one batch"][0] / median["one call each"][0]
    print(f"in one batch: {ratio:.1f} times as many")


if __name__ == "__main__":
    run(main)
