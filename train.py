"""Train a model: python train.py [COMMAND] [ARGUMENTS]

    python train.py                     stepwise DPO of models/policy-mini on data/rewarded.jsonl
    python train.py prm --help          all arguments of a command, with their defaults
    python train.py --config my.yaml    arguments from a file; flags override it

If a training is stopped, the same command resumes it.
"""

import os
import sys
from importlib import import_module
from pathlib import Path

from common.cli import run
from common.errors import UserError
from common.progress import loading_libraries

# command -> (the module that exports its RECIPE, what the command trains)
COMMANDS = {
    "dpo": (
        "trainer.stepwise_dpo_trainer",
        "a policy, by stepwise DPO on pairs whose steps a judge has scored (the default)",
    ),
    "sft": ("trainer.sft_trainer", "a policy, supervised on step-by-step solutions"),
    "prm": (
        "trainer.prm_trainer",
        "a process reward model, which gives every step of a solution a value",
    ),
    "ppo": (
        "trainer.ppo.trainer",
        "a policy, by step PPO: the reward of a step is its score by a judge",
    ),
    "reward": ("trainer.reward_trainer", "a response reward model, on ranked answers"),
}


def main() -> None:
    argv = sys.argv[1:]
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        print("commands:", *(f"  {name:8}{what}" for name, (_, what) in COMMANDS.items()), sep="\n")
        return
    command = argv.pop(0) if argv and not argv[0].startswith("-") else "dpo"
    if command not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise UserError(f"unknown command {command}: expected one of {known} (see --help)")

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported
    # heavy libraries, which --help and an unknown command do not need
    with loading_libraries():
        from evaluation.accuracy import greedy_accuracy
        from trainer.session import train

        recipe = import_module(COMMANDS[command][0]).RECIPE
    train(recipe, argv, plot=plot, accuracy=greedy_accuracy)


def plot(history: list[dict], path: Path, title: str) -> bool:
    """Draw the log of a training; returns whether it holds anything to draw."""
    from evaluation.plots import training_plot  # matplotlib would slow `COMMAND --help`

    return training_plot(history, path, title)


if __name__ == "__main__":
    run(main)
