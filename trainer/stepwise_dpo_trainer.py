"""Stepwise DPO: TRL's DPOTrainer on pairs whose steps a judge has scored. The equations are in trainer/losses.py.

    config = StepwiseDPOConfig("saved_model/mine", num_train_epochs=1)
    StepwiseDPOTrainer(model="models/policy-mini", args=config, train_dataset=Dataset.from_list(rows)).train()

The rows are scored pairs (reasoning/records.py). Only TRL's narrow seams are overridden: how rows become ids, the collator, the
loss and the reference log-probs. A list of TRL's own losses goes to TRL's code, on the same ids.
"""

import contextlib
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import AutoTokenizer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.utils import get_config_model_id, global_then_local_main_first, use_adapter

from lm.text_encoding import encode_steps
from reasoning.records import ScoredPair
from trainer.defaults import MiniatureDefaults
from trainer.losses import (
    AGGREGATIONS,
    CREDITS,
    full_step_dpo_loss,
    step_dpo_loss,
    stepwise_loss,
    sum_per_step,
)
from trainer.session import Recipe, Training

logger = get_logger(__name__)

TRL_LOSSES = (
    *(
        "sigmoid",
        "hinge",
        "ipo",
        "exo_pair",
        "nca_pair",
        "robust",
        "bco_pair",
        "sppo_hard",
        "aot",
        "aot_unpaired",
    ),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
STEP_LOSSES = {
    "stepwise": stepwise_loss,
    "step_dpo": step_dpo_loss,
    "full_step_dpo": full_step_dpo_loss,
}
MIXABLE = (*STEP_LOSSES, "sigmoid", "sft")  # what may stand in one list with a step loss

LOGGED_POSITIONS = 8  # steps whose log-probs are logged each by itself

# what a batch holds besides TRL's keys; none may reach the model, which would swallow it
STEP_KEYS = ("step_ids", "step_mask", "step_scores", "truncated_steps")


@dataclass
class StepwiseDPOConfig(MiniatureDefaults, DPOConfig):
    """DPOConfig with the step losses. Raises ValueError for values that make no sense."""

    loss_type: list[str] = field(
        default_factory=lambda: ["stepwise"],
        metadata={
            "help": f"Losses, summed with --loss_weights: {', '.join(STEP_LOSSES)}, alone or mixed with sigmoid and sft; or any of "
            f"TRL's own: {', '.join(TRL_LOSSES)}."
        },
    )
    credit: str = field(
        default="first_error",
        metadata={
            "help": "How step scores become step weights in `stepwise` (trainer/losses.py).",
            "choices": list(CREDITS),
        },
    )
    step_agg: str = field(
        default="sum",
        metadata={
            "help": "How the weighted steps of a response become one number in `stepwise`.",
            "choices": list(AGGREGATIONS),
        },
    )
    margin_gamma: float = field(
        default=0.0,
        metadata={
            "help": "Margin asked for per unit of difference of the mean scores, in reward units, 0 or more."
        },
    )
    anchor_lambda: float = field(
        default=5.0,
        metadata={
            "help": "Pull on good steps that become less likely than under the reference (DPO-Positive), 0 or more."
        },
    )

    def __post_init__(self):
        self.loss_type = (
            [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        )
        known = (*STEP_LOSSES, *TRL_LOSSES)
        unknown = [name for name in self.loss_type if name not in known]
        if unknown or not self.loss_type:
            raise ValueError(
                f"loss_type: {', '.join(unknown) or 'an empty list'} is no loss; known are {', '.join(known)}"
            )
        if self.has_step_loss:
            foreign = [name for name in self.loss_type if name not in MIXABLE]
            if foreign:
                ours = ", ".join(STEP_LOSSES)
                raise ValueError(
                    f"loss_type: {ours} mix with sigmoid and sft only, not with {', '.join(foreign)}"
                )
            ignored = {
                "ld_alpha": None,
                "f_divergence_type": "reverse_kl",
                "use_weighting": False,
                "label_smoothing": 0.0,
            }
            for name, default in ignored.items():
                if getattr(self, name) != default:
                    raise ValueError(f"{name}: not defined for step losses; leave it out")
        for name, known in (("credit", CREDITS), ("step_agg", AGGREGATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)}"
                )
        self.check_numbers("margin_gamma", "anchor_lambda", least="0 or more")
        self.check_numbers("beta")
        super().__post_init__()

    @property
    def has_step_loss(self) -> bool:
        return any(name in STEP_LOSSES for name in self.loss_type)


def encode_pair(
    row: dict, tokenizer, max_length: int | None, truncation_mode: str
) -> dict[str, Any]:
    """A scored pair as ids. `prompt_ids` (template, prompt, prefix), then for each side `*_ids`, `*_steps` (the step of every id,
    -1 for one of no step) and `*_scores`; `truncated_steps`: how many steps of the pair lose tokens to max_length."""
    pair = ScoredPair.from_row(row)
    chosen, chosen_steps = encode_steps(tokenizer, pair.prompt, pair.prefix, pair.chosen)
    rejected, rejected_steps = encode_steps(tokenizer, pair.prompt, pair.prefix, pair.rejected)
    # both sides share the prompt, but for a token that straddles its end: such a one stays in the response, as a token of no step
    both = zip(chosen, rejected, chosen_steps, rejected_steps, strict=False)
    cut = sum(1 for _ in itertools.takewhile(lambda t: t[0] == t[1] and t[2] == t[3] == -1, both))
    lost = slice(0, 0)
    if max_length is not None:
        lost = slice(max_length, None) if truncation_mode == "keep_start" else slice(0, -max_length)
    return {
        "prompt_ids": chosen[:cut],
        "chosen_ids": chosen[cut:],
        "rejected_ids": rejected[cut:],
        "chosen_steps": chosen_steps[cut:],
        "rejected_steps": rejected_steps[cut:],
        "chosen_scores": [float(score) for score in pair.chosen_scores],
        "rejected_scores": [float(score) for score in pair.rejected_scores],
        "truncated_steps": sum(
            len(set(steps[lost]) - {-1}) for steps in (chosen_steps, rejected_steps)
        ),
    }


@dataclass
class DataCollatorForSteps(DataCollatorForPreference):
    """TRL's batch (chosen, then rejected: 2B rows) with what belongs to the steps, sliced and padded exactly as the ids:

    `step_ids` (2B, L), -1 for tokens of no step; `step_scores` (2B, K) and `step_mask` (2B, K), False for padding and for steps of
    which truncation left no token; `truncated_steps` (B,). `completion_mask` covers the tokens of steps. K is at least `min_steps`.
    """

    min_steps: int = 1

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        like_ids = DataCollatorForPreference(
            -1, self.max_length, self.truncation_mode, self.pad_to_multiple_of
        )
        batch["step_ids"] = like_ids.torch_call(
            [
                {
                    "prompt_ids": [-1] * len(example["prompt_ids"]),
                    "chosen_ids": example["chosen_steps"],
                    "rejected_ids": example["rejected_steps"],
                }
                for example in examples
            ]
        )["input_ids"]
        batch["completion_mask"] = (batch["step_ids"] >= 0).long()
        scores = [
            example[f"{side}_scores"] for side in ("chosen", "rejected") for example in examples
        ]
        steps = max(self.min_steps, *map(len, scores))
        batch["step_scores"] = torch.tensor([row + [0.0] * (steps - len(row)) for row in scores])
        batch["step_mask"] = (batch["step_ids"][:, :, None] == torch.arange(steps)).any(1)
        batch["truncated_steps"] = torch.tensor(
            [float(example["truncated_steps"]) for example in examples]
        )
        return batch


class StepwiseDPOTrainer(DPOTrainer):
    """DPOTrainer whose loss is weighted step by step; takes the same arguments, with a StepwiseDPOConfig and scored pairs.

    Logged beside TRL's metrics (rewards are R_w and R_l of the first step loss, without the anchor): `scores/chosen`,
    `scores/rejected`, mean step scores; `logps/chosen_vs_ref`, `logps/rejected_vs_ref`, log-probs of whole responses against the
    reference, in nats, and with `/step_1`, `/step_2` ... those of single steps; `drift/good_steps_less_likely`, the share of
    chosen steps with a score of .5 or more that are less likely than under the reference; `weights/chosen`, `weights/rejected`,
    sums of the step weights; `rewards/anchor`; `steps/truncated`, steps a pair that lost tokens to max_length. Raises ValueError
    for a tokenizer without offsets."""

    _tag_names: list[str] = ["trl", "dpo", "stepwise-dpo"]  # noqa: RUF012 (as in TRL)
    _name = "Stepwise DPO"

    def __init__(
        self,
        model,
        ref_model=None,
        args: StepwiseDPOConfig | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        **kwargs,
    ):
        args = StepwiseDPOConfig() if args is None else args
        if processing_class is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            revision = (args.model_init_kwargs or {}).get("revision") or "main"
            processing_class = AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=args.trust_remote_code
            )
        if not getattr(processing_class, "is_fast", False):
            raise ValueError(
                "the tokenizer gives no character offsets, which steps are cut by: use a fast one (tokenizer.json)"
            )
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        if data_collator is None:
            data_collator = DataCollatorForSteps(
                processing_class.pad_token_id,
                args.max_length,
                args.truncation_mode,
                args.pad_to_multiple_of,
            )
        super().__init__(
            model,
            ref_model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            **kwargs,
        )

    # --- data ---

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """Rows to ids (encode_pair). Pairs whose prompt leaves no room for a response are dropped; what is lost is said."""
        first = next(iter(dataset))
        if "prompt_ids" in first:
            return dataset
        settings = {
            "tokenizer": processing_class,
            "max_length": args.max_length,
            "truncation_mode": args.truncation_mode,
        }
        # the fingerprint of the result names cached reference log-probs, which are per step or per response
        settings = {"row_kind": "steps" if args.has_step_loss else "responses", **settings}
        streaming = isinstance(dataset, IterableDataset)
        options = {} if streaming else {"num_proc": args.dataset_num_proc}
        describe = {} if streaming else {"desc": f"Tokenizing {dataset_name} dataset"}
        with global_then_local_main_first():
            dataset = dataset.map(
                _encode_row, fn_kwargs=settings, remove_columns=list(first), **options, **describe
            )
            rows = None if streaming else len(dataset)
            if args.max_length is not None and args.truncation_mode == "keep_start":
                dataset = dataset.filter(
                    _leaves_room, fn_kwargs={"max_length": args.max_length}, **options
                )
        if not streaming:
            if not len(dataset):
                raise ValueError(
                    f"{dataset_name}: none of {rows} pairs fits into max_length {args.max_length}; give a larger one"
                )
            truncated = sum(dataset["truncated_steps"])
            if truncated or len(dataset) < rows:
                logger.warning(
                    f"{dataset_name}: {rows - len(dataset)} of {rows} pairs dropped (their prompts alone fill max_length "
                    f"{args.max_length}), {truncated} steps of the others cut or lost; a larger --max_length keeps them"
                )
        return dataset

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            of_steps = [
                f"{side}_{what}" for side in ("chosen", "rejected") for what in ("steps", "scores")
            ]
            self._signature_columns += [*of_steps, "truncated_steps"]

    # --- reference ---

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        # the batches are concatenated: all need the same number of steps
        self.data_collator.min_steps = max(
            len(scores) for side in ("chosen", "rejected") for scores in dataset[f"{side}_scores"]
        )
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self.data_collator.min_steps = 1

    def compute_ref_log_probs(self, model, inputs):
        """Reference log-probs of chosen and of rejected: (B, K) per step, in nats; (B,) per response for TRL's own losses."""
        inputs, steps = _split_batch(inputs)
        if not self.args.has_step_loss:
            return super().compute_ref_log_probs(model, inputs)
        adapter = contextlib.nullcontext()
        # the reference is the model without its adapter, or its first copy
        if self.ref_model is None and is_peft_model(self.model):
            unwrapped = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(
                unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None
            )
        checkpointing_off = disable_gradient_checkpointing(
            self.model, self.args.gradient_checkpointing_kwargs
        )
        with torch.no_grad(), checkpointing_off, adapter, self.accelerator.autocast():
            outputs = model(**_model_inputs(inputs), fused_lm_head=True)
        return _step_logps(outputs.log_probs, steps).chunk(2)

    # --- loss ---

    def _compute_loss(self, model, inputs, return_outputs):
        inputs, steps = _split_batch(inputs)
        # (B, K) each, and so on: the batch is [chosen, rejected]
        chosen_scores, rejected_scores = steps["step_scores"].chunk(2)
        chosen_mask, rejected_mask = steps["step_mask"].chunk(2)
        mean = AGGREGATIONS["mean"]
        of_batch = {
            "scores/chosen": mean(chosen_scores, chosen_mask),
            "scores/rejected": mean(rejected_scores, rejected_mask),
            "steps/truncated": steps["truncated_steps"],
        }
        if not self.args.has_step_loss:
            self._log_means({name: (values, None) for name, values in of_batch.items()})
            return super()._compute_loss(model, inputs, return_outputs)

        model_inputs = _model_inputs(inputs)
        if self.aux_loss_enabled:
            model_inputs["output_router_logits"] = True
        outputs = model(**model_inputs, fused_lm_head=True)
        chosen_logps, rejected_logps = _step_logps(outputs.log_probs, steps).chunk(2)
        if self.precompute_ref_logps:
            count = chosen_logps.size(1)
            ref_chosen, ref_rejected = (
                inputs["ref_chosen_logps"][:, :count],
                inputs["ref_rejected_logps"][:, :count],
            )
        else:
            ref_chosen, ref_rejected = self.compute_ref_log_probs(
                self.ref_model or self.model, {**inputs, **steps}
            )
        chosen_logratios, rejected_logratios = (
            chosen_logps - ref_chosen,
            rejected_logps - ref_rejected,
        )
        pair = (
            chosen_logratios,
            rejected_logratios,
            chosen_scores,
            rejected_scores,
            chosen_mask,
            rejected_mask,
        )
        options = {"beta": self.beta, "anchor_lambda": self.args.anchor_lambda}
        of_stepwise = {
            "credit": self.args.credit,
            "agg": self.args.step_agg,
            "margin_gamma": self.args.margin_gamma,
        }
        step_losses = {
            name: STEP_LOSSES[name](*pair, **options, **(of_stepwise if name == "stepwise" else {}))
            for name in self.loss_types
            if name in STEP_LOSSES
        }
        chosen_tokens = inputs["completion_mask"][:, 1:].chunk(2)[0].sum()
        losses = {  # sigmoid and sft as TRL has them
            "sigmoid": -F.logsigmoid(
                self.beta * (chosen_logratios.sum(1) - rejected_logratios.sum(1))
            ).mean(),
            "sft": -chosen_logps.sum() / chosen_tokens.clamp(min=1),
            **{name: step_loss.loss.mean() for name, step_loss in step_losses.items()},
        }
        loss = sum(
            weight * losses[name]
            for name, weight in zip(self.loss_types, self.loss_weights, strict=True)
        )
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss

        shown = next(iter(step_losses.values()))  # the rewards of the first step loss
        of_batch |= {
            "rewards/chosen": shown.chosen_rewards,
            "rewards/rejected": shown.rejected_rewards,
            "rewards/margins": shown.chosen_rewards - shown.rejected_rewards,
            "rewards/accuracies": (shown.chosen_rewards > shown.rejected_rewards).float(),
            "rewards/anchor": shown.anchor,
            "logps/chosen": chosen_logps.sum(1),
            "logps/rejected": rejected_logps.sum(1),
            "logps/chosen_vs_ref": chosen_logratios.sum(1),
            "logps/rejected_vs_ref": rejected_logratios.sum(1),
            "weights/chosen": shown.chosen_weights.sum(1),
            "weights/rejected": shown.rejected_weights.sum(1),
        }
        of_steps = {
            f"logps/{side}_vs_ref/step_{k + 1}": (ratios[:, k], mask[:, k])
            if k < ratios.size(1)
            else (ratios[:0, 0], mask[:0, 0])
            for side, ratios, mask in (
                ("chosen", chosen_logratios, chosen_mask),
                ("rejected", rejected_logratios, rejected_mask),
            )
            # the same names in every process, whatever the length of its batch
            for k in range(LOGGED_POSITIONS)
        }
        good = chosen_mask & (chosen_scores >= 0.5)
        of_steps["drift/good_steps_less_likely"] = ((chosen_logratios < 0).float(), good)
        self._log_means(
            {name: (values, None) for name, values in of_batch.items()}
            | of_steps
            | self._token_values(inputs, outputs)
        )
        if return_outputs:  # the logits, for compute_metrics: the fused head does not build them
            with torch.no_grad():
                return loss, model(**model_inputs)
        return loss

    def _log_means(self, values: dict[str, tuple[Tensor, Tensor | None]]) -> None:
        """Log means over all processes, of (values, where): two tensors of one shape, or None for everywhere. What holds nowhere is
        not logged. One exchange between the processes for all of them."""
        sums = []
        for value, where in values.values():
            value = value.detach().float()
            where = torch.ones_like(value) if where is None else where.float()
            sums.append(torch.stack([(value * where).sum(), where.sum()]))
        # (processes, names, 2) -> (names, 2)
        totals = self.accelerator.gather(torch.stack(sums)[None]).sum(0).tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, (total, count) in zip(values, totals, strict=True):
            if count:
                metrics[name].append(total / count)

    def _token_values(self, inputs, outputs) -> dict[str, tuple[Tensor, Tensor]]:
        """TRL's metrics of tokens, under its names: entropy, logits, accuracy of the greedy token; and count the tokens seen."""
        mask = inputs["completion_mask"][:, 1:].bool()  # (2B, L - 1)
        chosen, rejected = mask.clone(), mask.clone()
        chosen[len(mask) // 2 :], rejected[: len(mask) // 2] = False, False
        if self.model.training:
            seen = self.accelerator.gather(inputs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += seen // self._tp_size
        self._metrics["train" if self.model.training else "eval"]["num_tokens"] = [
            self._total_train_tokens
        ]
        return {
            name: (values[:, -mask.size(1) :], where)
            for name, values, where in (
                ("entropy", outputs.entropy, mask),
                ("logits/chosen", outputs.mean_logits, chosen),
                ("logits/rejected", outputs.mean_logits, rejected),
                ("mean_token_accuracy", outputs.is_top1, chosen),
            )
        }


def _encode_row(row: dict, row_kind: str, **settings) -> dict[str, Any]:
    return encode_pair(dict(row), **settings)


def _leaves_room(row: dict, max_length: int) -> bool:
    return len(row["prompt_ids"]) < max_length


def _split_batch(inputs: dict) -> tuple[dict, dict]:
    """(what TRL's code expects, what belongs to the steps)."""
    return {k: v for k, v in inputs.items() if k not in STEP_KEYS}, {
        k: v for k, v in inputs.items() if k in STEP_KEYS
    }


def _model_inputs(inputs: dict) -> dict:
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    return {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "labels": labels,
        "use_cache": False,
    }


def _step_logps(log_probs: Tensor, steps: dict) -> Tensor:
    """(2B, K) from the per-token log-probs (2B, L - 1) of the fused head. Prompt-learning adapters put virtual tokens in front."""
    step_ids = steps["step_ids"][:, 1:]
    return sum_per_step(
        log_probs[:, -step_ids.size(1) :].float(), step_ids, steps["step_mask"].size(1)
    )


# --- python train.py dpo ---


def _make_trainer(training: Training) -> StepwiseDPOTrainer:
    start = training.start_policy(needs_reference=True)
    return StepwiseDPOTrainer(args=training.config, **training.datasets(), **start)


def _title(config: StepwiseDPOConfig) -> str:
    credit = f", credit {config.credit}" if config.has_step_loss else ""
    return f"stepwise DPO ({' + '.join(config.loss_type)}{credit}), steps scored by a judge, on"


RECIPE = Recipe(
    command="dpo",
    description="Stepwise DPO on scored pairs.",
    config=StepwiseDPOConfig,
    record=ScoredPair,
    noun="pairs",
    kinds=("pairs",),
    data="data/rewarded.jsonl",
    made_by="python reward_model/evaluate_steps.py",
    output_dir="saved_model/stepwise_dpo_tinyllama",
    make_trainer=_make_trainer,
    title=_title,
    tags="trl, dpo, stepwise-dpo, reasoning",
    columns={
        "loss": "loss",
        "rewards/margins": "reward margin",
        "rewards/accuracies": "pairwise accuracy",
        "logps/chosen_vs_ref": "log-prob of chosen against reference",
        "logps/rejected_vs_ref": "log-prob of rejected against reference",
    },
    bar={"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"},
)
