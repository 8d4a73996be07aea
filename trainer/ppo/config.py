"""The arguments of step PPO."""

import math
from dataclasses import asdict, dataclass, field

import torch

from common.files import at_root
from reward_model.registry import JudgeArgs


@dataclass
class StepPPOConfig:
    """What a run of step PPO may be told; names as in TRL's last PPOConfig where it has them. Raises ValueError for values that
    make no sense."""

    output_dir: str = field(
        default="saved_model/step_ppo", metadata={"help": "Where the tuned policy goes."}
    )
    run_name: str | None = field(
        default=None,
        metadata={"help": "Folder of its log in --logs_dir (default: output_dir's name)."},
    )
    states: str = field(
        default="both",
        metadata={
            "help": "Where episodes begin: rows: at the beginnings of the data set, one step each; fresh: at every step of "
            "solutions that the policy itself writes to the questions; both: half of each.",
            "choices": ["rows", "fresh", "both"],
        },
    )
    total_episodes: int = field(
        default=2560,
        metadata={
            "help": "Beginnings that the policy goes on from in all, by one step, or from a fresh one to the end. An update takes "
            "per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches of them on every device."
        },
    )
    per_device_train_batch_size: int = field(
        default=32, metadata={"help": "Rows a device sees at once."}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Such batches on every device to an optimizer step."}
    )
    num_mini_batches: int = field(
        default=4,
        metadata={"help": "Optimizer steps an update and epoch, each on rows of its own."},
    )
    num_ppo_epochs: int = field(default=2, metadata={"help": "Passes over the rows of an update."})
    learning_rate: float = field(
        default=5e-5, metadata={"help": "Peak learning rate of the policy, AdamW."}
    )
    value_learning_rate: float = field(
        default=1e-3,
        metadata={
            "help": "That of the value function's own weights; with --use_peft these are its head."
        },
    )
    lr_scheduler_type: str = field(
        default="linear",
        metadata={
            "help": "linear: down to 0 over all updates; or constant.",
            "choices": ["linear", "constant"],
        },
    )
    max_grad_norm: float = field(
        default=1.0,
        metadata={
            "help": "Longest gradient, of the policy's and of the value function's own weights each; 0: any."
        },
    )
    # with less, noise in the rewards moved the policy (shuffled rewards, docs/LOG.md)
    kl_coef: float = field(
        default=0.2,
        metadata={"help": "Reward taken off for a nat of log pi - log pi_ref, 0 or more."},
    )
    cliprange: float = field(
        default=0.2, metadata={"help": "How far from 1 a ratio pi / pi_old is still followed."}
    )
    cliprange_value: float = field(
        default=0.2, metadata={"help": "How far from the old value a value is followed, in reward."}
    )
    vf_coef: float = field(
        default=0.1,
        metadata={
            "help": "Weight of the value loss where the value function shares the policy's weights, with --use_peft; elsewhere it "
            "has weights and a learning rate of its own, and this does nothing."
        },
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount a token."})
    lam: float = field(
        default=0.95, metadata={"help": "Lambda of generalized advantage estimation."}
    )
    whiten_advantages: bool = field(
        default=True,
        metadata={
            "help": "Advantages of an update to mean 0, and to deviation 1 if it is more than noise."
        },
    )
    target_kl: float | None = field(
        default=0.05,
        metadata={
            "help": "Nats a token from the policy that sampled at which the rest of an update is skipped; empty: never."
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Of sampling, and of the log-probs of what was sampled; above 0."},
    )
    max_new_tokens: int = field(
        default=64,
        metadata={"help": "Longest step (TRL's response_length); a longer one scores 0."},
    )
    max_solution_steps: int = field(
        default=16, metadata={"help": "Steps after which a fresh solution is left as it is."}
    )
    bf16: bool = field(
        default=False, metadata={"help": "bf16 autocast; weights stay as --dtype says."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Use no GPU."})
    seed: int = field(
        default=0, metadata={"help": "Of the order of beginnings, of sampling, of minibatches."}
    )
    eval_strategy: str = field(
        default="steps",
        metadata={
            "help": "steps: look at kept-out beginnings and validation problems; no.",
            "choices": ["steps", "no"],
        },
    )
    eval_steps: float = field(
        default=0.2,
        metadata={"help": "Look every so many updates, or below 1 every such share of all."},
    )
    save_strategy: str = field(
        default="steps",
        metadata={"help": "steps: write checkpoints; no.", "choices": ["steps", "no"]},
    )
    save_steps: float = field(
        default=0.1,
        metadata={"help": "A checkpoint every so many updates, or below 1 a share of all."},
    )
    save_total_limit: int | None = field(
        default=1, metadata={"help": "Checkpoints kept; older ones are deleted. Empty: all."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "true: go on from the last checkpoint; or the folder of one."},
    )
    report_to: str = field(
        default="none",
        metadata={"help": "A tracker that accelerate knows, as tensorboard or wandb; or none."},
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    fp16 = False  # not offered; what is said of a training asks

    def __post_init__(self):
        whole = (
            "total_episodes",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "num_mini_batches",
        )
        for name in (
            *whole,
            "num_ppo_epochs",
            "max_new_tokens",
            "max_solution_steps",
            "save_total_limit",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        for name in ("learning_rate", "value_learning_rate", "max_grad_norm", "kl_coef", "vf_coef"):
            if getattr(self, name) is not None and not (
                math.isfinite(getattr(self, name)) and getattr(self, name) >= 0
            ):
                raise ValueError(
                    f"{name}: expected a number of 0 or more, got {getattr(self, name)}"
                )
        for name in (
            "cliprange",
            "cliprange_value",
            "target_kl",
            "temperature",
            "eval_steps",
            "save_steps",
        ):
            if getattr(self, name) is not None and not (
                math.isfinite(getattr(self, name)) and getattr(self, name) > 0
            ):
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name}: expected a number from 0 to 1, got {getattr(self, name)}"
                )
        for name, of_field in self.__dataclass_fields__.items():
            choices = of_field.metadata.get("choices")
            if choices and getattr(self, name) is not None and getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)}"
                )

    def to_dict(self) -> dict:
        return asdict(self)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.use_cpu or not torch.cuda.is_available() else "cuda")


@dataclass
class PPOArgs(JudgeArgs, StepPPOConfig):
    """StepPPOConfig, the judge whose scores are the rewards, and the problems that are watched."""

    judge: str = field(default="prm", metadata=JudgeArgs.__dataclass_fields__["judge"].metadata)
    seed: int = field(default=0, metadata=StepPPOConfig.__dataclass_fields__["seed"].metadata)
    eval_problems: str = field(
        default=at_root("data/problems_hard_validation.jsonl"),
        metadata={
            "help": "problems whose greedy answers are checked now and then: they are watched, not "
            "learned from"
        },
    )
    eval_limit: int = field(default=200, metadata={"help": "the first so many of them; 0: none"})

    def __post_init__(self):
        super().__post_init__()
        if self.eval_limit < 0:
            raise ValueError(f"eval_limit: expected 0 or more, got {self.eval_limit}")
        if "response" in (self.judge, self.shuffled_judge) and self.states != "fresh":
            raise ValueError("judge: response scores whole answers: give --states fresh")
