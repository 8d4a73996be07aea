"""Defaults of the trainers' settings, in place of TRL's."""

import math
from dataclasses import dataclass
from typing import Any


def check_numbers(config: Any, *names: str, least: str = "above 0") -> None:
    """Raises ValueError unless each of these settings is None, or finite and large enough.

    least: "above 0" or "of 0 or more"."""
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        is_large_enough = value > 0 if least == "above 0" else value >= 0
        if not (math.isfinite(value) and is_large_enough):
            raise ValueError(f"{name}: expected a number {least}, got {value}")


from common.cli import arg


@dataclass
class MiniatureDefaults:
    """Defaults for the embedded miniature models, of settings that TRL's configs have too.

    The first base class of a config, in front of TRL's. Raises ValueError for impossible values."""

    learning_rate: float = arg(1e-4, "Peak learning rate of AdamW.")
    warmup_steps: float = arg(0.1, "Warm-up in optimizer steps; below 1: a share of all steps.")
    num_train_epochs: float = arg(2.0, "Passes over the data.")
    per_device_train_batch_size: int = arg(16, "Rows in a training batch of a device.")
    per_device_eval_batch_size: int = arg(16, "Rows in an evaluation batch of a device.")
    max_length: int | None = arg(512, "Most tokens of prompt + response; the rest is cut.")
    gradient_checkpointing: bool = arg(
        False, "Save memory at the cost of compute, for large models."
    )
    bf16: bool | None = arg(False, "bf16 autocast; the weights keep the dtype of --dtype.")
    logging_steps: float = arg(5, "Optimizer steps between two logs.")
    save_steps: float = arg(0.1, "Steps between two checkpoints; below 1: a share of all steps.")
    save_total_limit: int | None = arg(1, "Checkpoints to keep; older ones are deleted.")

    def __post_init__(self) -> None:
        check_numbers(self, "learning_rate", least="of 0 or more")
        check_numbers(
            self,
            *("num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size"),
            *("gradient_accumulation_steps", "max_length"),
        )
        super().__post_init__()  # type: ignore[misc]  # the next base class has it
