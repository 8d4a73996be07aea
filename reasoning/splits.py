"""What is held out, what is kept out, and which split a prompt belongs to.

Held-out problems are those of the embedded world's validation and test splits: nothing is trained on
them. Of the prompts that training may use, a tenth is kept out of all training, so that log-prob
margins are measured on pairs that no model has seen.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import ROOT, read_records
from reasoning.records import Problem

HELD_OUT = ("validation", "test", "hard_validation", "hard")


def held_out_files() -> list[Path]:
    """The files of held-out problems that are there."""
    files = [ROOT / "data" / f"problems_{split}.jsonl" for split in HELD_OUT]
    return [file for file in files if file.is_file()]


def held_out_prompts() -> dict[str, str]:
    """Prompt -> name of the file that holds it out."""
    return {
        row.prompt: file.name for file in held_out_files() for row in read_records(file, Problem)
    }


def refuse_held_out(name: str, rows: Iterable[Any]) -> None:
    """Raises UserError if a row of the data set `name` has a held-out prompt."""
    held_out = held_out_prompts()
    for row in rows:
        if row.prompt in held_out:
            raise UserError(
                f"{name}: holds a held-out problem ({held_out[row.prompt]}), which nothing may be "
                f"trained on: {row.prompt[:60]!r} ..."
            )


def is_kept_out(prompt: str) -> bool:
    """Whether a prompt is among the tenth that is kept out of all training."""
    return _hash(prompt) % 10 == 0


def default_split(prompt: str) -> str:
    """The split of a prompt for which none was chosen: a fifth of all prompts are `test`, among them
    all that are kept out of training; the others are `train`."""
    return "test" if _hash(prompt) % 5 == 0 else "train"


def _hash(prompt: str) -> int:
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16)
