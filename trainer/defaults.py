"""What the trainers of this project take for granted, in place of TRL's defaults."""

import math
from dataclasses import dataclass, field


@dataclass
class MiniatureDefaults:
    """Fields that a config of TRL's has as well, with the defaults of the embedded miniature: stand in front of it among the bases.
    Raises ValueError for values that make no sense."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Warm-up: optimizer steps, or below 1 a share of all steps."}
    )
    num_train_epochs: float = field(default=2.0, metadata={"help": "Passes over the data."})
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "Rows a device sees at once in training."}
    )
    per_device_eval_batch_size: int = field(
        default=16, metadata={"help": "Rows a device sees at once in evaluation."}
    )
    max_length: int | None = field(
        default=512, metadata={"help": "Longest prompt + response, in tokens; the rest is cut."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Trade compute for memory: for large models."}
    )
    bf16: bool | None = field(
        default=False, metadata={"help": "bf16 autocast; weights stay as --dtype says."}
    )
    logging_steps: float = field(default=5, metadata={"help": "Log every so many optimizer steps."})
    save_steps: float = field(
        default=0.1,
        metadata={"help": "A checkpoint every so many steps, or below 1 a share of all."},
    )
    save_total_limit: int | None = field(
        default=1, metadata={"help": "Checkpoints kept; older ones are deleted."}
    )

    def __post_init__(self):
        self.check_numbers("learning_rate", least="0 or more")
        self.check_numbers(
            *("num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size"),
            *("gradient_accumulation_steps", "max_length"),
        )
        super().__post_init__()

    def check_numbers(self, *names: str, least: str = "above 0") -> None:
        """Raises ValueError for a value that is no finite number, or below 0, or 0 where it has to be above; None passes."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not (
                math.isfinite(value) and (value > 0 or (value == 0 and least == "0 or more"))
            ):
                raise ValueError(
                    f"{name}: expected a number {'of ' * (least == '0 or more')}{least}, got {value}"
                )
