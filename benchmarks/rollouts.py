"""Rollouts a second: all states in one batch of the engine, against one `generate` call of transformers for every rollout.

    python benchmarks/rollouts.py          # a minute on 2 cores

States are beginnings of reference solutions of train problems, from no step to all but the last. The two take turns; a rate is
the median of the rounds, for these machines are noisy. Both sample at temperature 1.
"""

import statistics
import sys
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import check_model, parse_args, run
from common.files import at_root


@dataclass
class RolloutArguments:
    model_name_or_path: str = field(
        default_factory=lambda: at_root("models/policy-mini"), metadata={"help": "the policy"}
    )
    limit: int = field(default=64, metadata={"help": "states"})
    rollouts: int = field(default=8, metadata={"help": "rollouts a state"})
    one_by_one: int = field(
        default=32, metadata={"help": "rollouts with a call of their own, in every round"}
    )
    rounds: int = field(default=3, metadata={"help": "how often each takes its turn"})


def main() -> None:
    (args,) = parse_args(RolloutArguments, description=__doc__.split("\n\n")[0])
    check_model(args.model_name_or_path)
    import torch
    from tqdm import trange

    from evaluation.metrics import print_table
    from lm.policy import Policy
    from reasoning.problems import problems

    policy = Policy.load(args.model_name_or_path)
    tasks = list(islice(problems("train"), args.limit))
    states = [
        policy.start(task.prompt, task.steps[: k % len(task.steps)]) for k, task in enumerate(tasks)
    ]

    def together(seed: int) -> int:
        wholes = policy.rollouts(states, args.rollouts, seed=seed)
        return sum(whole.sampled for group in wholes for whole in group)

    def one_by_one(seed: int) -> int:
        torch.manual_seed(seed)
        tokens = 0
        for k in range(args.one_by_one):
            ids = torch.tensor([states[k % len(states)].ids], device=policy.device)
            tokens += policy.model.generate(ids, do_sample=True, top_k=0, max_new_tokens=256).size(
                1
            ) - ids.size(1)
        return tokens

    ways = {
        "in one batch": (together, args.limit * args.rollouts),
        "one call each": (one_by_one, args.one_by_one),
    }
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    together(args.rounds)  # whatever the first call has to set up
    for seed in trange(args.rounds, desc="rounds"):
        for name, (sample, count) in ways.items():
            start = time.perf_counter()
            tokens = sample(seed)
            seconds = time.perf_counter() - start
            rates[name].append((count / seconds, tokens / seconds))
    median = {
        name: [statistics.median(column) for column in zip(*of_rounds, strict=True)]
        for name, of_rounds in rates.items()
    }
    table = [
        (name, f"{rollouts:.1f}", f"{tokens:.0f}") for name, (rollouts, tokens) in median.items()
    ]
    title = f"{args.limit} states, {args.rollouts} rollouts each, median of {args.rounds} rounds"
    print_table(title, ["rollouts", "a second", "tokens a second"], table)
    print(
        f"in one batch: {median['in one batch'][0] / median['one call each'][0]:.1f} times as many"
    )


if __name__ == "__main__":
    run(main)
