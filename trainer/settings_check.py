"""Checks of a training's settings before any work: what they need is there, numbers are possible.

Most settings are transformers' and TRL's, which find a missing package or an impossible number late
in a training, with a traceback.
"""

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.tracking import get_available_trackers
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations

from common.errors import UserError, first_line
from trainer.hub import check_hub

LARGE, SMALL = 10**9, 1e-9
# (least, largest value) -> arguments; None is always possible
RANGES: dict[tuple[float, float], tuple[str, ...]] = {
    (0, LARGE): (
        *("weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps", "neftune_noise_alpha"),
        *("eval_delay", "loss_weights"),
    ),
    (0, 10**6): ("learning_rate", "beta", "num_train_epochs"),
    (0, 0.999999): ("adam_beta1", "adam_beta2", "lora_dropout"),
    (0, 1): (
        *("label_smoothing_factor", "label_smoothing", "ld_alpha", "ref_model_mixup_alpha"),
        "f_alpha_divergence_coef",
    ),
    (SMALL, LARGE): ("logging_steps", "save_steps", "eval_steps", "discopop_tau"),
    (1, LARGE): (
        *("save_total_limit", "torch_empty_cache_steps", "eval_accumulation_steps", "ddp_timeout"),
        *("pad_to_multiple_of", "precompute_ref_batch_size", "ref_model_sync_steps"),
        *("lora_r", "lora_alpha", "dataloader_prefetch_factor"),
    ),
    (1, 10**6): (
        *("per_device_train_batch_size", "per_device_eval_batch_size"),
        "gradient_accumulation_steps",
    ),
    (0, 1024): ("dataloader_num_workers",),
    (1, 1024): ("dataset_num_proc",),
}
# switch -> the package that it needs
PACKAGES = {"use_liger_kernel": "liger_kernel", "deepspeed": "deepspeed"}


def check_settings(config: Any, model_args: Any) -> None:
    """Raises UserError for the first setting with which a training cannot run on this machine.

    config: the arguments of a training; model_args: TRL's ModelConfig."""
    settings = {**vars(model_args), **vars(config)}
    limits = [(name, limits) for limits, names in RANGES.items() for name in names]
    for name, (least, most) in limits:
        value = settings.get(name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not least <= number <= most:
                low = "above 0" if least == SMALL else least
                raise UserError(f"argument --{name}: expected {low} to {most:,}, got {number}")
    steps = settings.get("max_steps", -1)
    if steps < 1 and steps != -1:
        raise UserError(f"argument --max_steps: expected 1 or more, or -1 for none, got {steps}")
    for name, package in PACKAGES.items():
        if settings.get(name) and importlib.util.find_spec(package) is None:
            raise UserError(f"argument --{name}: needs {package}, which is not installed")
    # step PPO reports through accelerate
    is_trainer = isinstance(config, TrainingArguments)
    known = get_available_reporting_integrations() if is_trainer else get_available_trackers()
    for way in ("FSDP", "DEEPSPEED"):
        if not is_trainer and os.environ.get(f"ACCELERATE_USE_{way}", "").lower() == "true":
            raise UserError(
                "step PPO samples from the policy that it trains, so every process needs all "
                "weights: use accelerate launch without FSDP and DeepSpeed, or torchrun"
            )
    given = config.report_to or "none"
    for tracker in [given] if isinstance(given, str) else given:
        if tracker not in {*map(str, known), "none", "all"}:
            raise UserError(f"argument --report_to: {tracker} is no tracker, or not installed")
    if is_trainer:
        optimizer = _try("--optim", _make_optimizer, config)
        _try("--lr_scheduler_type", partial(_make_schedule, optimizer), config)
        _try("--dataloader_...", _make_loader, config)
        if config.activation_checkpointing_kwargs:
            _try("--activation_checkpointing_kwargs", _recompute, config)
        if config.train_sampling_strategy == "group_by_length" and "packing" not in settings:
            raise UserError(
                "argument --train_sampling_strategy: group_by_length goes with sft only"
            )
        if config.torch_compile:
            _try("--torch_compile", _compile, config)
        if config.push_to_hub:
            check_hub(config)


def _try(name: str, use: Callable[[Any], Any], config: Any) -> Any:
    """Use a setting on something tiny."""
    try:
        return use(config)
    except Exception as error:  # the libraries raise many kinds of errors for a setting
        raise UserError(f"argument {name}: {first_line(error)}") from None


def _make_optimizer(config: Any) -> Any:
    model = torch.nn.Linear(1, 1)
    make, options = Trainer.get_optimizer_cls_and_kwargs(config, model)
    return make(model.parameters(), **options)


def _make_schedule(optimizer: Any, config: Any) -> None:
    more = config.lr_scheduler_kwargs
    get_scheduler(config.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=more)


def _make_loader(config: Any) -> None:
    workers = config.dataloader_num_workers
    ahead = config.dataloader_prefetch_factor if workers else None
    persistent = config.dataloader_persistent_workers
    DataLoader([0], num_workers=workers, prefetch_factor=ahead, persistent_workers=persistent)


def _recompute(config: Any) -> None:
    own = ("every_n_layers", "offload")  # those of transformers, not of torch
    given = config.activation_checkpointing_kwargs
    if given.get("every_n_layers", 1) < 1:
        raise ValueError(f"every_n_layers: expected 1 or more, got {given['every_n_layers']}")
    options = {"use_reentrant": False}
    options |= {name: value for name, value in given.items() if name not in own}
    checkpoint(lambda x: x * 2, torch.ones(1), **options)


def _compile(config: Any) -> None:
    options = {"backend": config.torch_compile_backend, "mode": config.torch_compile_mode}
    torch.compile(lambda x: x * 2 + 1, **options)(torch.ones(2))
