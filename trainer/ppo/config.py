"""The arguments of step PPO."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from common.cli import arg
from common.files import at_root
from lm.registry import TemplateArgs
from reward_model.registry import JudgeArgs
from trainer.defaults import check_numbers


@dataclass
class StepPPOConfig:
    """Settings of step PPO, with the names of TRL's last PPOConfig.

    Raises ValueError for impossible values."""

    output_dir: str = arg("saved_model/step_ppo", "Folder of the tuned policy.")
    run_name: str | None = arg(
        None, "Folder of the log in --logs_dir (default: the name of output_dir)."
    )
    states: str = arg(
        "both",
        "Where the episodes start. rows: at the prefixes of the data set, one step "
        "each; fresh: at every step of whole solutions that the policy writes to the prompts; "
        "both: half of each.",
        choices=["rows", "fresh", "both"],
    )
    total_episodes: int = arg(
        2560,
        "Prefixes to sample from, in all. Each gives one step, or a whole solution if "
        "it is a prompt of `fresh`. An update uses per_device_train_batch_size * "
        "gradient_accumulation_steps * num_mini_batches of them on every device.",
    )
    per_device_train_batch_size: int = arg(32, "Trajectories in a batch of a device.")
    gradient_accumulation_steps: int = arg(1, "Batches of every device in an optimizer step.")
    num_mini_batches: int = arg(4, "Optimizer steps of a pass over the trajectories of an update.")
    num_ppo_epochs: int = arg(2, "Passes over the trajectories of an update.")
    learning_rate: float = arg(5e-5, "Peak learning rate of the policy, AdamW.")
    value_learning_rate: float = arg(
        1e-3,
        "Peak learning rate of the weights that only the value function has: a "
        "backbone and a head; with --use_peft only a head.",
    )
    lr_scheduler_type: str = arg(
        "linear", "linear: down to 0 over all updates; or constant.", choices=["linear", "constant"]
    )
    max_grad_norm: float = arg(
        1.0,
        "Largest gradient norm, of the policy's weights and of the value function's "
        "own weights separately; 0: no limit.",
    )
    # with a smaller one, noise in the rewards changed the policy (shuffled rewards, docs/LOG.md)
    kl_coef: float = arg(0.2, "Reward subtracted for each nat of log pi - log pi_ref, 0 or more.")
    cliprange: float = arg(
        0.2, "Distance of the ratio pi / pi_old from 1 beyond which it is clipped."
    )
    cliprange_value: float = arg(
        0.2, "Distance of a value from the old value beyond which it is clipped."
    )
    vf_coef: float = arg(
        0.1,
        "Weight of the value loss with --use_peft, where the value function shares "
        "the policy's weights. Without it, the value function has weights of its own, and "
        "this has no effect.",
    )
    gamma: float = arg(1.0, "Discount of a token.")
    lam: float = arg(0.95, "Lambda of generalized advantage estimation.")
    whiten_advantages: bool = arg(
        True,
        "Shift the advantages of an update to mean 0, and scale them to standard "
        "deviation 1 if they are more than noise.",
    )
    target_kl: float | None = arg(
        0.05,
        "The rest of an update is skipped when the policy is this many nats a token "
        "away from the policy that sampled; empty: never.",
    )
    temperature: float = arg(1.0, "Temperature of sampling and of the log-probs, above 0.")
    max_new_tokens: int = arg(
        64, "Most tokens of a step (TRL's response_length); a longer one scores 0."
    )
    max_solution_steps: int = arg(16, "Most steps of a whole solution.")
    bf16: bool = arg(False, "bf16 autocast; the weights keep the dtype of --dtype.")
    use_cpu: bool = arg(False, "Use no GPU.")
    seed: int = arg(0, "Seed of the order of prefixes, of sampling, of minibatches.")
    eval_strategy: str = arg(
        "steps",
        "steps: evaluate on kept-out prefixes and on eval_problems; no: never.",
        choices=["steps", "no"],
    )
    eval_steps: float = arg(
        0.2, "Updates between two evaluations; below 1: a share of all updates."
    )
    save_strategy: str = arg(
        "steps", "steps: write checkpoints; no: none.", choices=["steps", "no"]
    )
    save_steps: float = arg(
        0.1, "Updates between two checkpoints; below 1: a share of all updates."
    )
    save_total_limit: int | None = arg(
        1, "Checkpoints to keep; older ones are deleted. Empty: all."
    )
    resume_from_checkpoint: str | None = arg(
        None, "true: resume from the last checkpoint; or the folder of a checkpoint."
    )
    report_to: str = arg(
        "none", "A tracker of accelerate, for example tensorboard or wandb; or none."
    )
    disable_tqdm: bool = arg(False, "No progress bar.")

    fp16 = False  # no option; trainer/session.py reads it

    def __post_init__(self) -> None:
        at_least_1 = (
            *("total_episodes", "per_device_train_batch_size", "gradient_accumulation_steps"),
            *("num_mini_batches", "num_ppo_epochs", "max_new_tokens", "max_solution_steps"),
        )
        self._check((*at_least_1, "save_total_limit"), lambda value: value >= 1, "1 or more")
        rates = ("learning_rate", "value_learning_rate", "max_grad_norm", "kl_coef", "vf_coef")
        check_numbers(self, *rates, least="of 0 or more")
        ranges = ("cliprange", "cliprange_value", "target_kl", "temperature")
        check_numbers(self, *ranges, "eval_steps", "save_steps")
        self._check(("gamma", "lam"), lambda value: 0 <= value <= 1, "a number from 0 to 1")
        for name, setting in self.__dataclass_fields__.items():
            choices = setting.metadata.get("choices")
            if choices:
                self._check((name,), choices.__contains__, f"one of {', '.join(choices)}")

    def _check(
        self, names: tuple[str, ...], is_valid: Callable[[Any], bool], expected: str
    ) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not is_valid(value):
                raise ValueError(f"{name}: expected {expected}, got {value}")

    def to_dict(self) -> dict:
        return asdict(self)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.use_cpu or not torch.cuda.is_available() else "cuda")


@dataclass
class PPOArgs(JudgeArgs, TemplateArgs, StepPPOConfig):
    """StepPPOConfig, the judge whose scores are the rewards, and the problems of the evaluation."""

    judge: str = field(default="prm", metadata=JudgeArgs.__dataclass_fields__["judge"].metadata)
    # both bases have it
    seed: int = field(default=0, metadata=StepPPOConfig.__dataclass_fields__["seed"].metadata)
    eval_problems: str = arg(
        at_root("data/problems_hard_validation.jsonl"),
        "problems whose greedy answers are checked during training; they are not trained on",
    )
    eval_limit: int = arg(200, "use the first EVAL_LIMIT of these problems; 0: none")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(("eval_limit",), lambda value: value >= 0, "0 or more")
        if "response" in (self.judge, self.shuffled_judge) and self.states != "fresh":
            raise ValueError("judge: response scores whole answers: give --states fresh")
