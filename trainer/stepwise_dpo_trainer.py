"""Stepwise DPO: TRL's DPOTrainer on pairs whose steps a judge has scored.

The losses are in trainer/losses.py.

    config = StepwiseDPOConfig("saved_model/mine", num_train_epochs=1)
    rows = Dataset.from_list(scored_pairs)  # ScoredPair of reasoning/records.py, as dicts
    StepwiseDPOTrainer(model="models/policy-mini", args=config, train_dataset=rows).train()

It overrides only how TRL turns rows into ids, the collator, the loss and the reference log-probs.
If all losses are TRL's own, TRL's code computes them, on the same ids.
"""

import contextlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import dpo_trainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.utils import get_config_model_id, global_then_local_main_first, use_adapter

from common.cli import arg
from common.progress import QUIET, Bar
from lm.loading import load_tokenizer
from lm.registry import TemplateArgs
from lm.text_encoding import encode_steps, text_encoder
from lm.tree_attention import mask_dtype
from reasoning.records import ScoredPair
from reasoning.steps import shared_prefix
from trainer.defaults import MiniatureDefaults, check_numbers
from trainer.losses import (
    AGGREGATIONS,
    CREDITS,
    StepLoss,
    fork_logratios,
    full_step_dpo_loss,
    step_dpo_loss,
    step_sft_loss,
    stepwise_loss,
    sum_per_step,
)
from trainer.packing import (
    CPU_BLOCK,
    PACKINGS,
    SiblingSampler,
    extend_fused_head,
    pack_batch,
    texts_of,
    why_unpacked,
)
from trainer.session import Recipe, Training

logger = get_logger(__name__)
# TRL's bar of the reference log-probs: off a terminal one line instead of a bar
dpo_trainer.tqdm = partial(Bar, unit="batch", delay=QUIET)

TRL_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
    *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
STEP_LOSSES: dict[str, Callable[..., StepLoss]] = {
    "stepwise": stepwise_loss,
    "step_dpo": step_dpo_loss,
    "full_step_dpo": full_step_dpo_loss,
    "step_sft": step_sft_loss,
}
# the default losses and their weights, chosen on validation problems (docs/LOG.md)
DEFAULT_LOSSES = {"stepwise": 1.0, "step_sft": 4.0}
MIXABLE = (*STEP_LOSSES, "sigmoid", "sft")  # losses that can be combined with a step loss
SIDES = ("chosen", "rejected")
LOGGED_POSITIONS = 8  # the log-probs of steps 1 to 8 are logged one by one
# keys of a batch that TRL does not know; they are removed before the model is called
STEP_KEYS = ("step_ids", "step_mask", "step_scores", "fork_candidates", "truncated_steps")


@dataclass
class StepwiseDPOConfig(MiniatureDefaults, TemplateArgs, DPOConfig):
    """DPOConfig with the step losses. Raises ValueError for impossible values."""

    loss_type: list[str] = arg(
        list(DEFAULT_LOSSES),
        f"Losses, summed with --loss_weights: {', '.join(STEP_LOSSES)}, alone or with "
        f"sigmoid and sft; or any of TRL's own: {', '.join(TRL_LOSSES)}.",
    )
    loss_weights: list[float] | None = arg(
        None,
        "Weight of each loss of --loss_type (default: "
        f"{' and '.join(f'{weight:g}' for weight in DEFAULT_LOSSES.values())} for "
        f"{' and '.join(DEFAULT_LOSSES)}, else 1 each).",
    )
    credit: str = arg(
        "fork",
        "How `stepwise` and `step_sft` compute step weights from step scores (trainer/losses.py). "
        "`fork` weights steps as first_error does, and blames a wrong step only in the token in "
        "which it leaves the right one.",
        choices=list(CREDITS),
    )
    step_agg: str = arg(
        "sum",
        "How `stepwise` and `step_sft` combine the weighted steps of a response into one number.",
        choices=list(AGGREGATIONS),
    )
    margin_gamma: float = arg(
        0.0,
        "Margin, in reward units, for a difference of 1 between the mean scores of "
        "chosen and rejected; 0 or more.",
    )
    anchor_lambda: float = arg(
        0.0,
        "Weight of the penalty for good steps that become less likely than under the "
        "reference (DPO-Positive); 0 or more.",
    )
    pack: str = arg(
        "pairs",
        "How a batch is read. `pairs`: as trees of tokens, so that what its texts share is read "
        "once; the results are those of `none`. `siblings`: also, all pairs with the same prompt "
        "and prefix follow one another, for pairs from search trees. `none`: a row for each text, "
        "as for a model whose attention takes no mask.",
        choices=list(PACKINGS),
    )

    def __post_init__(self) -> None:
        self.loss_type = (
            [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        )
        if self.loss_weights is None and self.loss_type == list(DEFAULT_LOSSES):
            self.loss_weights = list(DEFAULT_LOSSES.values())
        known = (*STEP_LOSSES, *TRL_LOSSES)
        unknown = [name for name in self.loss_type if name not in known]
        if unknown or not self.loss_type:
            names = ", ".join(unknown) or "an empty list"
            raise ValueError(f"loss_type: {names} is no loss; known are {', '.join(known)}")
        if self.has_step_loss:
            self._check_step_losses()
        limits = (("credit", CREDITS), ("step_agg", AGGREGATIONS), ("pack", PACKINGS))
        for name, choices in limits:
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value}")
        if self.pack == "siblings" and self.train_sampling_strategy != "random":
            raise ValueError(
                "train_sampling_strategy: pack siblings orders the rows itself; leave it out"
            )
        check_numbers(self, "margin_gamma", "anchor_lambda", least="of 0 or more")
        check_numbers(self, "beta")
        super().__post_init__()

    def _check_step_losses(self) -> None:
        foreign = [name for name in self.loss_type if name not in MIXABLE]
        if foreign:
            ours = ", ".join(STEP_LOSSES)
            names = ", ".join(foreign)
            raise ValueError(f"loss_type: {ours} mix with sigmoid and sft only, not with {names}")
        # TRL's settings that a step loss would ignore, with their defaults
        ignored: dict[str, Any] = {"ld_alpha": None, "f_divergence_type": "reverse_kl"}
        ignored |= {"use_weighting": False, "label_smoothing": 0.0}
        for name, default in ignored.items():
            if getattr(self, name) != default:
                raise ValueError(f"{name}: not defined for step losses; leave it out")

    @property
    def has_step_loss(self) -> bool:
        return any(name in STEP_LOSSES for name in self.loss_type)


def encode_pair(
    row: dict, tokenizer: Any, max_length: int | None, truncation_mode: str
) -> dict[str, Any]:
    """A scored pair as ids.

    `prompt_ids`: template, prompt and prefix. For each side `*_ids`, `*_steps` (the step of every
    id, -1 outside all steps) and `*_scores`. `truncated_steps`: the number of steps of the pair
    that lose tokens to max_length."""
    pair = ScoredPair.from_row(row)
    chosen, chosen_steps = encode_steps(tokenizer, pair.prompt, pair.prefix, pair.chosen)
    rejected, rejected_steps = encode_steps(tokenizer, pair.prompt, pair.prefix, pair.rejected)
    # the prompt's ids are those that both sides share; where one token holds the end of the prompt
    # and the start of a response, it stays in the response and belongs to no step
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
        **{f"{side}_scores": list(map(float, getattr(pair, f"{side}_scores"))) for side in SIDES},
        "truncated_steps": sum(
            len(set(steps[lost]) - {-1}) for steps in (chosen_steps, rejected_steps)
        ),
    }


def fork_candidates(
    chosen: list[int], rejected: list[int], rejected_steps: list[int]
) -> list[bool]:
    """Whether each token of rejected may be the fork of its step (trainer/losses.py).

    The ids of both sides after what they share, and the steps of those of rejected, all before
    truncation. In the step with the first token that differs it is this token alone: chosen has a
    sibling of that step. In the other steps it may be any token; there the sides parted earlier, or
    not yet.

    The first token that differs may be a word where both sides mean the same. If the step is right,
    its score says so, and it has no blame. If it goes wrong later, the word has the blame and the
    mistake has none."""
    fork = shared_prefix(chosen, rejected)
    forked = rejected_steps[fork] if fork < min(len(chosen), len(rejected)) else None
    return [place == fork or step != forked for place, step in enumerate(rejected_steps)]


@dataclass
class DataCollatorForSteps(DataCollatorForPreference):
    """TRL's batch (chosen, then rejected: 2B rows) and the steps, cut and padded like the ids.

    `step_ids` (2B, L), -1 outside all steps; `step_scores` (2B, K); `step_mask` (2B, K), False for
    padding and for steps without any token left; `fork_candidates` (B, L) of rejected, of which
    truncation may leave none in a step; `truncated_steps` (B,). `completion_mask` is 1 at the
    tokens of steps.

    packs: adds `packed`, the same texts as trees (trainer/packing.py), with masks of the dtype
    `mask_dtype`, in blocks of about `block_tokens`. The pairs of one prompt and prefix are one
    tree."""

    packs: bool = False
    mask_dtype: torch.dtype = torch.bool
    block_tokens: float = math.inf

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        width = batch["input_ids"].size(1)
        step_rows = [
            [-1] * len(example["prompt_ids"]) + example[f"{side}_steps"]
            for side in SIDES
            for example in examples
        ]
        step_ids = self._rows(step_rows, width, -1)
        fork_rows = [
            [False] * len(example["prompt_ids"])
            + fork_candidates(
                *(example[name] for name in ("chosen_ids", "rejected_ids", "rejected_steps"))
            )
            for example in examples
        ]
        scores = [example[f"{side}_scores"] for side in SIDES for example in examples]
        count = max(map(len, scores))
        truncated = [float(example["truncated_steps"]) for example in examples]
        packed = {"packed": self._packed(batch, examples, step_ids)} if self.packs else {}
        return {
            **batch,
            **packed,
            "completion_mask": (step_ids >= 0).long(),
            "step_ids": step_ids,
            "step_scores": torch.tensor([row + [0.0] * (count - len(row)) for row in scores]),
            "step_mask": (step_ids[:, :, None] == torch.arange(count)).any(1),
            "fork_candidates": self._rows(fork_rows, width, False),
            "truncated_steps": torch.tensor(truncated),
        }

    def _rows(self, rows: list[list], width: int, padding: Any) -> Tensor:
        """A value for each token, cut and padded as TRL cuts and pads the ids: (N, width)."""
        if self.max_length is not None:
            keeps_start = self.truncation_mode == "keep_start"
            kept = slice(self.max_length) if keeps_start else slice(-self.max_length, None)
            rows = [row[kept] for row in rows]
        return torch.tensor([row + [padding] * (width - len(row)) for row in rows])

    def _packed(self, batch: dict, examples: list[dict], step_ids: Tensor) -> dict[str, Tensor]:
        texts = texts_of(batch)
        groups = [tuple(example["prompt_ids"]) for example in examples] * 2
        scored = step_ids[:, 1:] >= 0
        more = (self.pad_token_id, self.mask_dtype, self.pad_to_multiple_of or 1)
        return pack_batch(texts, groups, scored, *more, self.block_tokens)


class StepwiseDPOTrainer(DPOTrainer):
    """DPOTrainer with a loss per step; its arguments are the same, with a StepwiseDPOConfig.

    train_dataset, eval_dataset: scored pairs. Raises ModelError for a tokenizer without character
    offsets. It logs, besides TRL's metrics (`rewards/*` are R_w and R_l of the first step loss,
    without the anchor):

    - `scores/chosen`, `scores/rejected`: mean step scores
    - `logps/chosen_vs_ref`, `logps/rejected_vs_ref`: log-ratios of whole responses, in nats; with
      `/step_1` to `/step_8`, of single steps
    - `drift/good_steps_less_likely`: the share of the chosen steps with a score of .5 or more that
      are less likely than under the reference
    - `weights/chosen`, `weights/rejected`: sums of the step weights
    - `rewards/anchor`: the part that the anchor subtracts from R_w
    - `steps/truncated`: steps of a pair that lost tokens to max_length"""

    _tag_names: list[str] = ["trl", "dpo", "stepwise-dpo"]  # noqa: RUF012 (as in TRL)
    _name = "Stepwise DPO"

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: StepwiseDPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        args = StepwiseDPOConfig() if args is None else args
        if processing_class is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            revision = (args.model_init_kwargs or {}).get("revision") or "main"
            processing_class = load_tokenizer(
                name, revision=revision, trust_remote_code=args.trust_remote_code
            )
        text_encoder(processing_class)  # it refuses a tokenizer without offsets
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        if data_collator is None:
            settings = (args.max_length, args.truncation_mode, args.pad_to_multiple_of)
            data_collator = DataCollatorForSteps(processing_class.pad_token_id, *settings)
        if args.pack == "siblings" and isinstance(train_dataset, IterableDataset):
            raise ValueError("pack: siblings needs all rows at once, not a stream; take pairs")
        datasets = (train_dataset, eval_dataset)
        self._ref_width = 0  # see _precompute_ref_logps
        # of the global batch that is trained on: see get_batch_samples
        self._mean_counts: Tensor | None = None
        super().__init__(
            model, ref_model, args, data_collator, *datasets, processing_class, **kwargs
        )
        self._set_packing()

    # --- data ---

    def _set_packing(self) -> None:
        """Let the collator pack, and the models read packed batches, if --pack asks for it and the
        model can. May be called again."""
        collator = self.data_collator
        if self.args.pack == "none" or not isinstance(collator, DataCollatorForSteps):
            return
        models = [self.model] if self.ref_model is None else [self.model, self.ref_model]
        models = [self.accelerator.unwrap_model(model) for model in models]
        if not collator.packs:
            if reason := why_unpacked(models[0], self.args.max_length, self.aux_loss_enabled):
                logger.warning(
                    f"every text is read in a row of its own, as with --pack none, because {reason}"
                )
                self.args.pack = "none"
                return
            collator.packs, collator.mask_dtype = True, mask_dtype(models[0])
            # a GPU is better used by one large block; sharded weights are gathered once for it
            if self.args.device.type == "cpu" and not self.is_fsdp_enabled:
                collator.block_tokens = CPU_BLOCK
        for model in models:
            extend_fused_head(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.pack != "siblings":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        groups = [tuple(ids) for ids in rows["prompt_ids"]]
        return SiblingSampler(groups, seed, lambda: int(self.state.epoch or 0))

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: StepwiseDPOConfig, dataset_name: str
    ) -> Any:
        """Encode the rows; drop and count pairs whose prompt alone reaches max_length."""
        first = next(iter(dataset))
        if "prompt_ids" in first:
            return dataset
        settings = {
            # it distinguishes the cache of reference log-probs per token from that per response
            "row_kind": "tokens" if args.has_step_loss else "responses",
            "tokenizer": processing_class,
            "max_length": args.max_length,
            "truncation_mode": args.truncation_mode,
        }
        streaming = isinstance(dataset, IterableDataset)
        options = {} if streaming else {"num_proc": args.dataset_num_proc}
        describe = {} if streaming else {"desc": f"Tokenizing {dataset_name} dataset"}
        with global_then_local_main_first():
            dataset = dataset.map(
                _encode_row, fn_kwargs=settings, remove_columns=list(first), **options, **describe
            )
            rows = 0 if streaming else len(dataset)
            if args.max_length is not None and args.truncation_mode == "keep_start":
                limit = {"max_length": args.max_length}
                dataset = dataset.filter(_leaves_room, fn_kwargs=limit, **options)
        if streaming:
            return dataset
        if not len(dataset):
            raise ValueError(
                f"{dataset_name}: none of {rows} pairs fits into max_length {args.max_length}; "
                "give a larger one"
            )
        truncated = sum(dataset["truncated_steps"])
        if truncated or len(dataset) < rows:
            logger.warning(
                f"{dataset_name}: {rows - len(dataset)} of {rows} pairs dropped (their prompts "
                f"alone reach max_length {args.max_length}), {truncated} steps of the others cut "
                "or lost; a larger --max_length keeps them"
            )
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        needed = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if needed:
            columns = [f"{side}_{kind}" for side in SIDES for kind in ("steps", "scores")]
            self._signature_columns += [*columns, "truncated_steps"]

    # --- reference ---

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        self._set_packing()  # TRL calls this in its constructor
        # TRL concatenates the batches: the log-probs of all need the same width
        prompts = list(map(len, dataset["prompt_ids"]))
        lengths = (
            prompt + len(ids)
            for side in SIDES
            for prompt, ids in zip(prompts, dataset[f"{side}_ids"], strict=True)
        )
        longest = max(lengths)
        self._ref_width = min(longest, self.args.max_length or longest) - 1
        if not dataset.cache_files:
            # rows in memory get a file with a random name, which all processes have to share
            path = broadcast_object_list([dataset._get_cache_file_path(name)])[0]
            dataset._get_cache_file_path = lambda fingerprint: path
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model: Any, inputs: dict) -> Any:
        """Reference log-probs of chosen and of rejected, in nats.

        (B, L - 1) each, one a token; (B,) each, one a response, if all losses are TRL's own."""
        inputs, _ = _split_batch(inputs)
        if not self.args.has_step_loss:
            return super().compute_ref_log_probs(model, inputs)
        adapter: Any = contextlib.nullcontext()
        # the reference is the policy without its adapter, or with TRL's copy of the first adapter
        if self.ref_model is None and is_peft_model(self.model):
            unwrapped = self.accelerator.unwrap_model(self.model)
            copy = "ref" if "ref" in unwrapped.peft_config else None
            adapter = use_adapter(unwrapped, adapter_name=copy)
        checkpointing_off = disable_gradient_checkpointing(
            self.model, self.args.gradient_checkpointing_kwargs
        )
        with torch.no_grad(), checkpointing_off, adapter, self.accelerator.autocast():
            outputs = model(**_model_inputs(inputs), fused_lm_head=True)
        logps = _token_logps(outputs.log_probs, inputs)
        return _with_width(logps, self._ref_width or logps.size(1)).chunk(2)

    # --- loss ---

    def get_batch_samples(self, *args: Any) -> tuple[list, Any]:
        """The micro-batches of one update. Counts the pairs and chosen tokens in all of them.

        A loss is a mean over the global batch, so a micro-batch with more of them has more weight.
        (TRL's own losses average the means of the micro-batches.)"""
        batches, count = super().get_batch_samples(*args)
        if batches and self.args.has_step_loss:
            counts = torch.stack([_counts(batch) for batch in batches]).sum(0)
            counts = self.accelerator.gather(counts[None]).sum(0)
            self._mean_counts = counts / (len(batches) * self.accelerator.num_processes)
        return batches, count

    def _compute_loss(self, model: Any, inputs: dict, return_outputs: bool) -> Any:
        inputs, steps = _split_batch(inputs)
        # a batch is [chosen, rejected]: each half is (B, K)
        chosen_scores, rejected_scores = steps["step_scores"].chunk(2)
        chosen_mask, rejected_mask = steps["step_mask"].chunk(2)
        mean = AGGREGATIONS["mean"]
        logged: dict[str, tuple[Tensor, Tensor | None]] = {
            "scores/chosen": (mean(chosen_scores, chosen_mask), None),
            "scores/rejected": (mean(rejected_scores, rejected_mask), None),
            "steps/truncated": (steps["truncated_steps"], None),
        }
        if not self.args.has_step_loss:
            self._log_means(logged)
            return super()._compute_loss(model, inputs, return_outputs)

        model_inputs = _model_inputs(inputs)
        if self.aux_loss_enabled:
            model_inputs["output_router_logits"] = True
        outputs = model(**model_inputs, fused_lm_head=True)
        logps = _token_logps(outputs.log_probs, inputs)  # (2B, L - 1)
        if self.precompute_ref_logps:
            stored = [inputs[f"ref_{side}_logps"] for side in SIDES]
            ref_logps = _with_width(torch.cat(stored), logps.size(1))
        else:
            ref_model = self.ref_model or self.model
            ref_logps = torch.cat(self.compute_ref_log_probs(ref_model, inputs))
        step_ids, count = steps["step_ids"][:, 1:], chosen_mask.size(1)
        chosen_logps, rejected_logps = sum_per_step(logps, step_ids, count).chunk(2)
        ref_chosen, ref_rejected = sum_per_step(ref_logps, step_ids, count).chunk(2)
        chosen_logratios = chosen_logps - ref_chosen
        rejected_logratios = blamed = rejected_logps - ref_rejected
        args = self.args
        if args.credit == "fork":
            _, ratios = (logps - ref_logps).chunk(2)
            _, reference = ref_logps.chunk(2)
            _, of_steps = step_ids.chunk(2)
            candidates = steps["fork_candidates"][:, 1:]
            blamed = fork_logratios(ratios, reference, of_steps, candidates, count)

        pair = (chosen_logratios, rejected_logratios)
        judged = (chosen_scores, rejected_scores)
        masks = (chosen_mask, rejected_mask)
        weighting = {"credit": args.credit, "agg": args.step_agg}
        anchor = {"anchor_lambda": args.anchor_lambda}
        options: dict[str, dict[str, Any]] = {
            "stepwise": {**weighting, **anchor, "margin_gamma": args.margin_gamma},
            "step_sft": {**weighting, "chosen_logps": chosen_logps},
        }
        step_losses = {
            name: STEP_LOSSES[name](
                chosen_logratios,
                blamed if name in options else rejected_logratios,
                *judged,
                *masks,
                beta=self.beta,
                **options.get(name, anchor),
            )
            for name in self.loss_types
            if name in STEP_LOSSES
        }
        pairs, chosen_tokens = _counts(inputs)
        mean_pairs, mean_tokens = pairs, chosen_tokens
        if self.model.training and self._mean_counts is not None:
            mean_pairs, mean_tokens = self._mean_counts
        share = pairs / mean_pairs  # 1 if all micro-batches have equally many pairs
        total_logratios = self.beta * (chosen_logratios.sum(1) - rejected_logratios.sum(1))
        losses = {
            "sigmoid": -F.logsigmoid(total_logratios).mean() * share,  # these two as in TRL
            "sft": -chosen_logps.sum() / mean_tokens.clamp(min=1),
            **{name: step_loss.loss.mean() * share for name, step_loss in step_losses.items()},
        }
        weights = zip(self.loss_types, self.loss_weights, strict=True)
        loss = sum(weight * losses[name] for name, weight in weights)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss

        first = next(iter(step_losses.values()))  # the loss whose rewards are logged
        means = {
            "rewards/chosen": first.chosen_rewards,
            "rewards/rejected": first.rejected_rewards,
            "rewards/margins": first.chosen_rewards - first.rejected_rewards,
            "rewards/accuracies": (first.chosen_rewards > first.rejected_rewards).float(),
            "rewards/anchor": first.anchor,
            "logps/chosen": chosen_logps.sum(1),
            "logps/rejected": rejected_logps.sum(1),
            "logps/chosen_vs_ref": chosen_logratios.sum(1),
            "logps/rejected_vs_ref": rejected_logratios.sum(1),
            "weights/chosen": first.chosen_weights.sum(1),
            "weights/rejected": first.rejected_weights.sum(1),
        }
        logged |= {name: (values, None) for name, values in means.items()}
        for side, ratios, mask in zip(SIDES, pair, masks, strict=False):
            # the same names in every process, whatever the length of its batch
            for k in range(LOGGED_POSITIONS):
                column = slice(k, k + 1)  # empty beyond the longest response
                logged[f"logps/{side}_vs_ref/step_{k + 1}"] = (ratios[:, column], mask[:, column])
        good = chosen_mask & (chosen_scores >= 0.5)
        logged["drift/good_steps_less_likely"] = ((chosen_logratios < 0).float(), good)
        self._log_means(logged | self._token_values(inputs, outputs))
        if return_outputs:  # compute_metrics needs the logits, which the fused head does not give
            with torch.no_grad():
                return loss, model(**model_inputs)
        return loss

    def _log_means(self, values: dict[str, tuple[Tensor, Tensor | None]]) -> None:
        """Log the mean of each `values[mask]` over all processes, unless the mask is False
        everywhere.

        values: name -> (values, mask or None), of the same shape. The processes exchange all sums
        in one call."""
        sums = []
        for value, mask in values.values():
            value = value.detach().float()
            mask = torch.ones_like(value) if mask is None else mask.float()
            sums.append(torch.stack([(value * mask).sum(), mask.sum()]))
        # (processes, names, 2) -> (names, 2)
        totals = self.accelerator.gather(torch.stack(sums)[None]).sum(0).tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, (total, count) in zip(values, totals, strict=True):
            if count:
                metrics[name].append(total / count)

    def _token_values(self, inputs: dict, outputs: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """TRL's token metrics, under its names: (values, mask). Also counts the tokens of the
        run."""
        mask = inputs["completion_mask"][:, 1:].bool()  # (2B, L - 1)
        chosen, rejected = mask.clone(), mask.clone()
        chosen[len(mask) // 2 :], rejected[: len(mask) // 2] = False, False
        if self.model.training:
            seen = self.accelerator.gather(inputs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += seen // self._tp_size
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["num_tokens"] = [self._total_train_tokens]
        values = {
            "entropy": (outputs.entropy, mask),
            "logits/chosen": (outputs.mean_logits, chosen),
            "logits/rejected": (outputs.mean_logits, rejected),
            "mean_token_accuracy": (outputs.is_top1, chosen),
        }
        length = mask.size(1)
        return {name: (value[:, -length:], where) for name, (value, where) in values.items()}


def _encode_row(row: dict, row_kind: str, **settings: Any) -> dict[str, Any]:
    return encode_pair(dict(row), **settings)


def _leaves_room(row: dict, max_length: int) -> bool:
    return len(row["prompt_ids"]) < max_length


def _split_batch(inputs: dict) -> tuple[dict, dict]:
    """(the keys of a batch that TRL knows, the keys of the steps)."""
    known = {key: value for key, value in inputs.items() if key not in STEP_KEYS}
    return known, {key: value for key, value in inputs.items() if key in STEP_KEYS}


def _counts(inputs: dict) -> Tensor:
    """(2,) of a batch: the number of pairs, and of tokens in the steps of their chosen sides."""
    chosen = inputs["completion_mask"][:, 1:].chunk(2)[0]
    return torch.stack([torch.ones_like(chosen[:, 0]).sum(), chosen.sum()]).float()


def _model_inputs(inputs: dict) -> dict:
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    names = ("input_ids", "attention_mask", "packed")
    known = {name: inputs[name] for name in names if name in inputs}
    return {**known, "labels": labels, "use_cache": False}


def _token_logps(log_probs: Tensor, inputs: dict) -> Tensor:
    """(2B, L - 1) from the log-probs of the fused head.

    A prompt-learning adapter adds virtual tokens in front, which are cut off."""
    return log_probs[:, 1 - inputs["input_ids"].size(1) :].float()


def _with_width(values: Tensor, width: int) -> Tensor:
    """(N, width), cut or filled up with 0 on the right."""
    return F.pad(values, (0, width - values.size(1)))


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
