"""The response scorer a script uses, and its argument: `check_scorer` before any work, then `with open_scorer(args) as scorer`."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import at_root, check_model
from utils.judges import MINIATURES

if TYPE_CHECKING:
    from reward_model.response_reward_model import ResponseRewardModel

MINIATURE, MADE_BY = MINIATURES["response"]


@dataclass
class ScorerArgs:
    """Mixed into a script's own arguments."""

    scorer: str = field(
        default=at_root("saved_model/response_reward_model"),
        metadata={
            "help": "a response reward model: a folder, or any of the hub's for sequence classification with one label; before any "
            "training the default is models/reward-mini"
        },
    )


def check_scorer(args: ScorerArgs) -> None:
    """Raises UserError if there is no such model. Where none was trained yet, fills in the miniature."""
    trained = any(
        (Path(args.scorer) / name).is_file() for name in ("config.json", "adapter_config.json")
    )
    if args.scorer == ScorerArgs.scorer and not trained:
        print(
            f"no trained reward model yet (`python train.py reward` makes one): {MINIATURE} scores",
            file=sys.stderr,
        )
        args.scorer = MINIATURE
    check_model(args.scorer, MADE_BY if args.scorer == MINIATURE else None)


def open_scorer(args: ScorerArgs) -> "ResponseRewardModel":
    """Raises JudgeError if the model cannot be had."""
    from reward_model.response_reward_model import ResponseRewardModel

    return ResponseRewardModel(args.scorer)
