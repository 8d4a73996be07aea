"""Held-out problems, kept-out prompts, and the split of a prompt.

Held-out problems are those of the validation and test splits of the embedded problem world; nothing
is trained on them. A tenth of all other prompts is kept out of all training, so that log-prob
margins can be measured on pairs that no model was trained on.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import ROOT, read_records
from reasoning.records import Problem

HELD_OUT = ("validation", "test", "hard_validation", "hard")
MAKES_HELD_OUT = "python utils/build_problems.py --overwrite"  # the same files on every machine


def held_out_files() -> list[Path]:
    """The files of held-out problems that exist."""
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
                f"{name}: contains a held-out problem ({held_out[row.prompt]}), and held-out "
                f"problems may not be trained on: {row.prompt[:60]!r} ..."
            )


def is_kept_out(prompt: str) -> bool:
    """Whether a prompt is in the tenth that is kept out of all training."""
    return _hash(prompt) % 10 == 0


def default_split(prompt: str) -> str:
    """The split of a prompt, if nobody has chosen one: `test` for a fifth of all prompts.

    The fifth includes all kept-out prompts. The other prompts are `train`."""
    return "test" if _hash(prompt) % 5 == 0 else "train"


def _hash(prompt: str) -> int:
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16)
