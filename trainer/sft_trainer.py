"""Supervised training on step-by-step solutions: TRL's SFTTrainer with the loss on the steps only.

    config = StepSFTConfig("saved_model/mine", num_train_epochs=1)
    rows = Dataset.from_list(solutions)  # Solution, as dicts
    StepSFTTrainer(model="models/policy-mini", args=config, train_dataset=rows).train()

loss = -mean log pi(t) over the tokens of all steps of the global batch, including the EOS of a
finished solution. The template, the prompt and a pair's shared prefix are context without loss. The
rows become ids in lm/text_encoding.py, as for sampling and all other trainings.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import IterableDataset
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import global_then_local_main_first

from common.errors import RecordError
from lm.registry import TemplateArgs
from lm.text_encoding import encode_steps, text_encoder
from lm.tree_attention import mask_dtype
from reasoning.records import PreferencePair, Problem
from reasoning.steps import ends_solution
from trainer.defaults import MiniatureDefaults
from trainer.packing import CPU_BLOCK, extend_fused_head, pack_batch, texts_of, why_unpacked
from trainer.session import Recipe, Training

logger = get_logger(__name__)

IGNORED = -100  # the label of a token without loss


# A row is a problem with its reference solution (`prompt`, `answer`, `steps`), or a preference
# pair, whose `chosen` is the solution (its scores and `rejected` are not used):
@dataclass(frozen=True)
class Solution:
    prompt: str
    steps: list[str]
    prefix: list[str] = field(default_factory=list)

    @classmethod
    def from_row(cls, row: Any) -> "Solution":
        """Raises RecordError if the row is neither, or a problem without `steps`."""
        if isinstance(row, dict) and "chosen" in row:
            pair = PreferencePair.from_row(row)
            return cls(pair.prompt, pair.chosen, pair.prefix)
        problem = Problem.from_row(row)
        if not problem.steps:
            raise RecordError(
                "field 'steps' is missing: expected a solution to learn from (or a pair, with "
                "'chosen')"
            )
        return cls(problem.prompt, problem.steps)


@dataclass
class StepSFTConfig(MiniatureDefaults, TemplateArgs, SFTConfig):
    """SFTConfig with the loss on the steps. Raises ValueError for impossible values."""

    def __post_init__(self) -> None:
        if self.assistant_only_loss or self.completion_only_loss is False:
            raise ValueError(
                "assistant_only_loss, completion_only_loss: the loss is always on the steps' "
                "tokens; leave them out"
            )
        super().__post_init__()


def encode_solution(row: dict, tokenizer: Any) -> dict[str, list[int]]:
    """A solution as `input_ids` and `labels`.

    The labels are the ids of the steps and of the EOS behind them, and IGNORED (-100) elsewhere."""
    ids, step_of = encode_steps(tokenizer, row["prompt"], row["prefix"], row["steps"])
    steps = zip(ids, step_of, strict=True)
    return {"input_ids": ids, "labels": [id_ if step >= 0 else IGNORED for id_, step in steps]}


@dataclass
class PackingCollator:
    """TRL's batch, and the same texts as trees under `packed` (trainer/packing.py).

    The solutions of one prompt are one tree. collator: TRL's own, which pads on the right."""

    collator: Any
    pad_token_id: int
    mask_dtype: torch.dtype

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        texts, scored = texts_of(batch), batch["labels"] != IGNORED
        starts = scored.int().argmax(1).tolist()
        groups = [tuple(ids[:start]) for ids, start in zip(texts, starts, strict=True)]
        settings: dict[str, Any] = {"dtype": self.mask_dtype, "block_tokens": CPU_BLOCK}
        packed = pack_batch(texts, groups, scored[:, 1:], self.pad_token_id, **settings)
        return {**batch, "packed": packed}


class StepSFTTrainer(SFTTrainer):
    """SFTTrainer on rows of Solution; its arguments are the same, with a StepSFTConfig.

    On a CPU a batch is packed as in stepwise DPO, if the model can read trees.

    A dataset that has `input_ids` and `labels` is used as it is. Raises ModelError for a tokenizer
    without character offsets, and ValueError if no solution fits into max_length."""

    _tag_names: list[str] = ["trl", "sft", "reasoning"]  # noqa: RUF012 (as in TRL)
    data_collator: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        extend_fused_head(model)
        if self._packs(model):
            pad_token_id = self.processing_class.pad_token_id
            self.data_collator = PackingCollator(
                self.data_collator, pad_token_id, mask_dtype(model)
            )

    def _packs(self, model: Any) -> bool:
        """Whether batches are packed: of rows in memory, on a CPU, for a model that reads trees."""
        config = self.args
        is_stream = isinstance(self.train_dataset, IterableDataset)
        is_other = config.packing or config.padding_free or is_stream or self.is_fsdp_enabled
        if is_other or config.device.type != "cpu":
            return False
        return not why_unpacked(model, config.max_length, self.aux_loss_enabled)

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: StepSFTConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """Encode the rows; count the solutions without an answer and those that are cut."""
        prepare = super()._prepare_dataset
        settings = (processing_class, args, packing)
        first = next(iter(dataset))
        if "input_ids" in first:
            return prepare(dataset, *settings, formatting_func, dataset_name)
        text_encoder(processing_class)  # it refuses a tokenizer without offsets
        streaming = isinstance(dataset, IterableDataset)
        options = {} if streaming else {"num_proc": args.dataset_num_proc}
        solutions = () if streaming else zip(dataset["prefix"], dataset["steps"], strict=True)
        unfinished = sum(not ends_solution([*prefix, *steps]) for prefix, steps in solutions)
        with global_then_local_main_first():
            encode = {"fn_kwargs": {"tokenizer": processing_class}, "remove_columns": list(first)}
            dataset = dataset.map(encode_solution, **encode, **options)
        prepared = prepare(dataset, *settings, None, dataset_name)
        if unfinished:
            logger.warning(
                f"{dataset_name}: {unfinished} of {len(dataset)} solutions state no final answer "
                "('Answer: ...'): they get no end-of-text token, so the model cannot learn to stop"
            )
        if streaming or packing:  # packing cuts nothing
            return prepared
        if not len(prepared):
            raise ValueError(
                f"{dataset_name}: none of {len(dataset)} solutions fits into max_length "
                f"{args.max_length}"
            )
        cut = sum(len(ids) > (args.max_length or len(ids)) for ids in dataset["input_ids"])
        if cut:
            logger.warning(
                f"{dataset_name}: {cut} of {len(dataset)} solutions are longer than max_length "
                f"{args.max_length} and lose their end, {len(dataset) - len(prepared)} of them all "
                "their steps; a larger --max_length keeps them"
            )
        return prepared


# --- python train.py sft ---


def _make_trainer(training: Training) -> StepSFTTrainer:
    return StepSFTTrainer(args=training.config, **training.datasets(), **training.start_policy())


RECIPE = Recipe(
    command="sft",
    description="Supervised training on step-by-step solutions.",
    config=StepSFTConfig,
    record=Solution,
    noun="solutions",
    kinds=("problems", "pairs"),
    data="data/rewarded.jsonl",
    made_by="python reward_model/evaluate_steps.py",
    output_dir="saved_model/sft",
    make_trainer=_make_trainer,
    title=lambda config: "supervised training (SFT) on",
    tags="trl, sft, reasoning",
    columns={"loss": "loss", "mean_token_accuracy": "accuracy of the greedy token"},
    bar={"loss": "loss", "mean_token_accuracy": "token accuracy"},
)
