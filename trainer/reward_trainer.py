"""Training of a response reward model: TRL's RewardTrainer on all pairs of a ranked group.

    model = from_causal_lm(model, tokenizer, question="Right?")  # response_reward_model.py
    config = ResponseRewardConfig("saved_model/mine", num_train_epochs=1)
    rows = Dataset.from_list(groups)  # RankedGroup of reasoning/datasets/ranking.py, as dicts
    ResponseRewardTrainer(model, config, tokenizer, train_dataset=rows).train()

loss = -mean over the pairs of a batch of log sigmoid(r_better - r_worse - m)
       + center_rewards_coefficient * mean of (r_better + r_worse)^2
m = rank_margin * (rank_worse - rank_better)

All pairs of a group: Ouyang et al. 2022 (arXiv 2203.02155, equation 1); the margin: Touvron et al.
2023 (arXiv 2307.09288, equation 2); centering: Eisenstein et al. 2023 (arXiv 2312.09244, equation
2). Training and scoring use the same ids (reward_model/response_reward_model.py).

The pairs of a group follow each other, so most of a group is in one batch, and the model reads each
answer of a batch once (Ouyang et al., section 3.5: one forward pass an answer, not two a pair).
"""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import RewardConfig, RewardTrainer

from common.cli import arg, check_input
from common.errors import UserError
from common.files import file_type
from lm.loading import base_of, load_model
from lm.text_encoding import PLAIN_QUESTION
from reasoning.datasets.files import Dropped
from reasoning.datasets.loading import load_groups
from reasoning.datasets.ranking import RankedGroup, check_groups, groups, read_answers
from reasoning.splits import refuse_held_out
from reward_model.response_reward_model import (
    ResponseTokens,
    format_of,
    from_causal_lm,
    head_names,
    is_reward_adapter,
    load_reward_model,
    longest,
)
from trainer.data import DataSet
from trainer.defaults import MiniatureDefaults, check_numbers
from trainer.model_card import reward_use
from trainer.session import Recipe, Training

logger = get_logger(__name__)


@dataclass
class ResponseRewardConfig(MiniatureDefaults, RewardConfig):
    """RewardConfig of a response reward model. Raises ValueError for impossible values."""

    learning_rate: float = arg(1.5e-4, "Peak learning rate of AdamW.")
    num_train_epochs: float = arg(2.0, "Passes over the data.")
    per_device_train_batch_size: int = arg(
        24, "Pairs in a training batch of a device; a group of four gives six."
    )
    rank_margin: float = arg(
        0.0, "Margin in the loss for a rank difference of 1, in reward; 0: none."
    )
    question: str = arg(
        PLAIN_QUESTION,
        "Question after the response, if training starts from a causal LM: the head "
        "starts as the logit of 'Yes' minus that of 'No'. '': the end-of-text token instead. "
        "Chat models, encoders and PRMs use their own formats, a reward model keeps its format.",
    )
    shuffle_ranks: bool = arg(
        False, "A control: permute the ranks of each training group at random."
    )

    def __post_init__(self) -> None:
        check_numbers(self, "rank_margin", "center_rewards_coefficient", least="of 0 or more")
        if self.max_length is not None and self.max_length < 16:
            raise ValueError(f"max_length: expected 16 tokens or more, got {self.max_length}")
        super().__post_init__()


def pairs_of(ranks: list[int]) -> list[tuple[int, int]]:
    """(index of the better, index of the worse) of all answers with different ranks."""
    indices = itertools.combinations(range(len(ranks)), 2)
    return [(i, j) if ranks[i] < ranks[j] else (j, i) for i, j in indices if ranks[i] != ranks[j]]


class GroupSampler(torch.utils.data.Sampler):
    """All pairs, group by group, in another random order every epoch.

    sizes: the number of pairs of each group; lengths: of its longest answer, in tokens. Groups of
    similar length come close to each other, so that batches need little padding (a fifth less
    compute on data/answers.csv.gz)."""

    def __init__(self, sizes: list[int], lengths: list[int], seed: int):
        ends = itertools.accumulate(sizes)
        self.groups = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        self.lengths, self.seed, self.epoch = lengths, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = get_length_grouped_indices(self.lengths, batch_size=1, generator=generator)
        return itertools.chain.from_iterable(self.groups[k] for k in order)


class ResponseRewardTrainer(RewardTrainer):
    """RewardTrainer on rows of RankedGroup; same arguments, with a ResponseRewardConfig.

    model: a loaded reward model; processing_class: its tokenizer; peft_config: trains an adapter,
    together with the head. `balance` describes the pairs. Raises ValueError if there are none."""

    _tag_names: list[str] = ["trl", "reward-trainer", "reasoning"]  # noqa: RUF012 (as in TRL)

    def __init__(
        self,
        model: Any,
        args: ResponseRewardConfig,
        processing_class: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ):
        limits = args.max_length, longest(model, processing_class)
        max_length = min(filter(None, limits), default=None)
        self.format = ResponseTokens(processing_class, max_length, *format_of(model))
        self.balance = ""
        self.sizes: list[int] = []  # of the training groups, in pairs
        self.lengths: list[int] = []  # the longest answer of each, in tokens
        if peft_config is not None:
            peft_config.task_type = "SEQ_CLS"
            # the head is trained and saved whole
            peft_config.exclude_modules = peft_config.modules_to_save = head_names(model)
        super().__init__(
            model, args, processing_class=processing_class, peft_config=peft_config, **kwargs
        )

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: ResponseRewardConfig, dataset_name: str
    ) -> Any:
        """Groups to pairs of ids; count ties, cut answers and pairs that are then equal."""
        if "chosen_ids" in dataset.column_names:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        groups = [RankedGroup.from_row(row) for row in dataset]
        if args.shuffle_ranks and dataset_name == "train":
            rng = random.Random(args.seed)
            groups = [
                replace(group, ranks=rng.sample(group.ranks, len(group.ranks))) for group in groups
            ]
        encoded = self.format.encode(
            [(group.prompt, answer) for group in groups for answer in group.answers]
        )
        rows, sizes, lengths, ties, equal, rest = [], [], [], 0, 0, iter(encoded)
        for group in groups:
            ids = [next(rest)[0] for _ in group.answers]
            pairs = pairs_of(group.ranks)
            sizes.append(len(pairs))
            lengths.append(max(map(len, ids)))
            ties += math.comb(len(ids), 2) - len(pairs)
            for better, worse in pairs:
                equal += ids[better] == ids[worse]
                row: dict[str, Any] = {"chosen_ids": ids[better], "rejected_ids": ids[worse]}
                if args.rank_margin:
                    row["margin"] = args.rank_margin * (group.ranks[worse] - group.ranks[better])
                rows.append(row)
        if not rows:
            raise ValueError(
                f"{dataset_name}: none of {len(groups)} groups gives a pair: all ranks are ties"
            )
        cut = sum(over > 0 for _, over in encoded)
        balance = f"{len(rows)} pairs of {len(encoded)} answers"
        if ties:
            balance += f", {ties} ties left out"
        if cut:
            balance += (
                f"; {cut} answers are over {self.format.max_length} tokens with their prompt and "
                "lose tokens at its start"
            )
        if equal:
            balance += f"; {equal} pairs are equal after that"
        if dataset_name == "train":
            self.balance, self.sizes, self.lengths = balance, sizes, lengths
        elif cut:
            logger.warning(f"{dataset_name}: {balance}")
        return Dataset.from_list(rows)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.sizes and self.args.train_sampling_strategy == "random":
            return GroupSampler(self.sizes, self.lengths, self.args.seed)
        return super()._get_train_sampler(train_dataset)

    def compute_loss(self, model: Any, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        """RewardTrainer's loss; the model reads equal texts of a batch only once."""

        def read_once(input_ids: Tensor, attention_mask: Tensor, **rest: Any) -> Any:
            both = torch.cat([input_ids, attention_mask], 1)
            texts, index = torch.unique(both, dim=0, return_inverse=True)
            ids, mask = texts.chunk(2, dim=1)
            outputs = model(input_ids=ids, attention_mask=mask, **rest)
            outputs.logits = outputs.logits[index]
            return outputs

        return super().compute_loss(read_once, inputs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and is_peft_model(self.model):
            # the config has the question
            self.model.config.save_pretrained(output_dir or self.args.output_dir)


# --- python train.py reward ---


def read_ranked(recipe: Recipe, data: DataSet) -> list[RankedGroup]:
    """The training groups of a table of ranked answers; pairs become groups of two answers.

    Raises RecordError, or UserError for a held-out problem."""
    is_table = file_type(data.name) == ".csv" and not data.fields.field_names
    records = _groups_of_table(data.name) if is_table else _groups_of_pairs(data)
    refuse_held_out(data.name, records)
    return records


def _groups_of_table(name: str) -> list[RankedGroup]:
    check_input(name)
    rows = read_answers(name)
    check_groups(rows, name)
    kept = [row for row in rows if row.split in ("", "train")]
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} rows of {name} left out: not of the split train")
    records = []
    for (prompt, _), ranked in groups(kept).items():
        ranks = [row.rank for row in ranked if row.rank is not None]  # all have one
        records.append(RankedGroup(prompt, [row.answer for row in ranked], ranks))
    if not records:
        raise UserError(f"{name}: none of its {len(rows)} rows is ranked and of the split train")
    return records


def _groups_of_pairs(data: DataSet) -> list[RankedGroup]:
    dropped = Dropped()
    loaded = load_groups(*data.source, dropped, data.fields.field_names)
    records = [group for _, group in loaded]
    dropped.print(data.name)
    return records


def _make_trainer(training: Training) -> ResponseRewardTrainer:
    return ResponseRewardTrainer(args=training.config, **training.datasets(), **_start(training))


def _start(training: Training) -> dict[str, Any]:
    """The model to start from: a reward model, an encoder, or a causal LM with a new head.

    Raises ValueError or ModelError."""
    name, model_args = training.model, training.model_args
    dtype, revision = training.weights_dtype("a reward model"), model_args.model_revision
    base, is_adapter = base_of(name, revision)
    (architecture, *_) = PreTrainedConfig.get_config_dict(base)[0].get("architectures") or [""]
    is_causal_lm = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    if is_causal_lm and not (is_adapter and is_reward_adapter(name)):
        convert = partial(from_causal_lm, question=training.config.question)
        return training.start_model(*load_model(name, dtype, revision=revision), convert)
    options = {"trainable": model_args.use_peft, "revision": revision}
    return training.start_model(*load_reward_model(name, dtype, new_head=True, **options))


RECIPE = Recipe(
    command="reward",
    description="A response reward model on ranked answers.",
    config=ResponseRewardConfig,
    record=RankedGroup,
    noun="groups",
    kinds=("pairs",),
    data="data/answers.csv.gz",
    made_by="python utils/build_ranked_responses.py --rank_by exact",
    output_dir="saved_model/response_reward_model",
    make_trainer=_make_trainer,
    title=lambda config: "training as a response reward model on",
    tags="trl, reward-model, reasoning",
    columns={
        "loss": "loss",
        "accuracy": "pairwise accuracy",
        "margin": "reward of the better minus the worse",
        "mean_reward": "mean reward",
    },
    bar={"loss": "loss", "accuracy": "pairwise accuracy"},
    model="models/prm-mini",
    use=reward_use,
    read=read_ranked,
)
