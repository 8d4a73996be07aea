"""Training of a response reward model on ranked groups: TRL's RewardTrainer on all pairs of a group.

    model = from_causal_lm(model, tokenizer, question="Right?")          # reward_model/response_reward_model.py
    config = ResponseRewardConfig("saved_model/mine", num_train_epochs=1)
    ResponseRewardTrainer(model=model, args=config, train_dataset=Dataset.from_list(groups), processing_class=tokenizer).train()

loss = -mean over the pairs of a batch of log sigmoid(r_better - r_worse - m), m = rank_margin * (rank_worse - rank_better), and
center_rewards_coefficient * mean of (r_better + r_worse)^2, if it is given. All pairs of a group: Ouyang et al. 2022 (arXiv
2203.02155, equation 1); the margin: Touvron et al. 2023 (arXiv 2307.09288, equation 2); centering: Eisenstein et al. 2023 (arXiv
2312.09244, equation 2). Responses become ids in reward_model/response_reward_model.py, for training as for scoring.

The pairs of a group come one after the other, so that most of its answers are in one batch, and there each is read once (Ouyang et
al., section 3.5: a forward pass an answer, not two a pair).
"""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import PreTrainedConfig
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import RewardConfig, RewardTrainer, get_peft_config

from common.cli import check_input
from common.errors import RecordError, UserError
from common.files import file_type
from lm.loading import base_of, load_model, merge_adapter
from lm.text_encoding import PLAIN_QUESTION
from reasoning.datasets.files import load_rows
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
from trainer.defaults import MiniatureDefaults
from trainer.session import DataArgs, Recipe, Training

logger = get_logger(__name__)


@dataclass
class ResponseRewardConfig(MiniatureDefaults, RewardConfig):
    """RewardConfig of a response reward model. Raises ValueError for values that make no sense."""

    learning_rate: float = field(default=1.5e-4, metadata={"help": "Peak learning rate of AdamW."})
    num_train_epochs: float = field(default=2.0, metadata={"help": "Passes over the data."})
    per_device_train_batch_size: int = field(
        default=24, metadata={"help": "Pairs a device sees at once: six of a group of four."}
    )
    rank_margin: float = field(
        default=0.0,
        metadata={
            "help": "Margin in the loss, for each rank that the two of a pair are apart; 0: none."
        },
    )
    question: str = field(
        default=PLAIN_QUESTION,
        metadata={
            "help": "Stands after the response where training starts from a causal LM, whose 'Yes' and 'No' the head begins "
            "with; '': the end-of-text token. Chat models, encoders and PRMs have formats of their own, a reward model goes on "
            "with its."
        },
    )
    shuffle_ranks: bool = field(
        default=False,
        metadata={
            "help": "The control: each training group's ranks are dealt out to its answers by chance."
        },
    )

    def __post_init__(self):
        self.check_numbers("rank_margin", "center_rewards_coefficient", least="0 or more")
        if self.max_length is not None and self.max_length < 16:
            raise ValueError(f"max_length: expected 16 tokens or more, got {self.max_length}")
        super().__post_init__()


def pairs_of(ranks: list[int]) -> list[tuple[int, int]]:
    """(better, worse) of all answers that do not share a rank, by their places."""
    places = itertools.combinations(range(len(ranks)), 2)
    return [(i, j) if ranks[i] < ranks[j] else (j, i) for i, j in places if ranks[i] != ranks[j]]


class GroupSampler(torch.utils.data.Sampler):
    """All rows, the groups of `sizes` rows in random order, another one every epoch; groups whose `lengths` are alike are near each
    other, so that batches need little padding (a fifth less to compute for data/answers.csv)."""

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
    """RewardTrainer on rows of RankedGroup; takes the same arguments, with a ResponseRewardConfig, a model that is loaded, and its
    tokenizer. peft_config: an adapter is trained, and the head with it.

    `balance` says how many pairs there are, of what. Raises ValueError if there are none."""

    _tag_names: list[str] = ["trl", "reward-trainer", "reasoning"]  # noqa: RUF012 (as in TRL)

    def __init__(
        self, model, args: ResponseRewardConfig, processing_class=None, peft_config=None, **kwargs
    ):
        limits = args.max_length, longest(model, processing_class)
        self.format = ResponseTokens(
            processing_class, min(filter(None, limits), default=None), *format_of(model)
        )
        self.balance, self.sizes, self.lengths = "", [], []
        if peft_config is not None:
            head = head_names(model)
            peft_config.task_type = "SEQ_CLS"
            peft_config.exclude_modules = peft_config.modules_to_save = (
                head  # trained and saved whole
            )
        super().__init__(
            model, args, processing_class=processing_class, peft_config=peft_config, **kwargs
        )

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """Groups to pairs of ids. What is cut is said."""
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
        rows, sizes, lengths, ties, alike, rest = [], [], [], 0, 0, iter(encoded)
        for group in groups:
            ids = [next(rest)[0] for _ in group.answers]
            pairs = pairs_of(group.ranks)
            sizes.append(len(pairs))
            lengths.append(max(map(len, ids)))
            ties += math.comb(len(ids), 2) - len(pairs)
            for better, worse in pairs:
                alike += ids[better] == ids[worse]
                row = {"chosen_ids": ids[better], "rejected_ids": ids[worse]}
                if args.rank_margin:
                    row["margin"] = args.rank_margin * (group.ranks[worse] - group.ranks[better])
                rows.append(row)
        if not rows:
            raise ValueError(
                f"{dataset_name}: none of {len(groups)} groups gives a pair: all ranks are ties"
            )
        cut = sum(over > 0 for _, over in encoded)
        said = f"{len(rows)} pairs of {len(encoded)} answers" + (
            f", {ties} ties left out" if ties else ""
        )
        if cut:
            said += f"; {cut} answers are over {self.format.max_length} tokens with their prompt and lose its beginning"
        if alike:
            said += f"; {alike} pairs are alike after that"
        if dataset_name == "train":
            self.balance, self.sizes, self.lengths = said, sizes, lengths
        elif cut:
            logger.warning(f"{dataset_name}: {said}")
        return Dataset.from_list(rows)

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler | None:
        if self.sizes and self.args.train_sampling_strategy == "random":
            return GroupSampler(self.sizes, self.lengths, self.args.seed)
        return super()._get_train_sampler(train_dataset)

    def compute_loss(self, model, inputs, *args, **kwargs):
        """RewardTrainer's, of a model that reads what stands in the batch several times once."""

        def each_once(input_ids, attention_mask, **rest):
            texts, place = torch.unique(
                torch.cat([input_ids, attention_mask], 1), dim=0, return_inverse=True
            )
            ids, mask = texts.chunk(2, dim=1)
            outputs = model(input_ids=ids, attention_mask=mask, **rest)
            outputs.logits = outputs.logits[place]
            return outputs

        return super().compute_loss(each_once, inputs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and is_peft_model(self.model):
            # it names the question
            self.model.config.save_pretrained(output_dir or self.args.output_dir)


# --- python train.py reward ---


def read_ranked(recipe: Recipe, args: DataArgs) -> list[RankedGroup]:
    """The training groups of a table of ranked answers, or preference pairs of texts as groups of two.

    Raises RecordError or UserError, also for a held-out problem."""
    name = args.dataset_name
    records = _groups_of_table(name) if file_type(name) == ".csv" else _groups_of_pairs(args)
    refuse_held_out(name, records)
    return records


def _groups_of_table(name: str) -> list[RankedGroup]:
    check_input(name)
    rows = read_answers(name)
    check_groups(rows, name)
    kept = [row for row in rows if row.split in ("", "train")]
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} rows of {name} left out: not of the split train")
    records = [
        RankedGroup(prompt, [row.answer for row in ranked], [row.rank for row in ranked])
        for (prompt, _), ranked in groups(kept).items()
    ]
    if not records:
        raise UserError(f"{name}: none of its {len(rows)} rows is ranked and of the split train")
    return records


def _groups_of_pairs(args: DataArgs) -> list[RankedGroup]:
    source = (args.dataset_name, args.dataset_config, args.dataset_train_split)
    records = []
    for where, row in load_rows(*source):
        try:
            records.append(RankedGroup.from_row(row))
        except RecordError as error:
            raise RecordError(f"{where}: {error}") from None
    return records


def _make_trainer(training: Training) -> ResponseRewardTrainer:
    return ResponseRewardTrainer(args=training.config, **training.datasets(), **_start(training))


def _start(training: Training) -> dict[str, Any]:
    """What to start from: a reward model that is trained further, an encoder, or a causal LM made into
    a reward model. An adapter is merged into its base; with --use_peft that of a reward model is trained
    further. Raises ValueError or ModelError."""
    name, model_args = training.model, training.model_args
    dtype, revision = training.weights_dtype("a reward model"), model_args.model_revision
    peft_config = get_peft_config(model_args)
    base, is_adapter = base_of(name, revision)
    (kind, *_) = PreTrainedConfig.get_config_dict(base)[0].get("architectures") or [""]
    is_causal_lm = kind.endswith(("ForCausalLM", "LMHeadModel"))
    is_causal_lm = is_causal_lm and not (is_adapter and is_reward_adapter(name))
    if is_causal_lm:
        model, tokenizer = load_model(name, dtype, revision=revision)
    else:
        options = {"trainable": model_args.use_peft, "revision": revision}
        model, tokenizer = load_reward_model(name, dtype, new_head=True, **options)
    if is_peft_model(model) and model_args.use_peft:
        if is_causal_lm:
            raise ValueError(
                "it is an adapter, and a reward model's adapter needs a base that is on disk: leave "
                "out --use_peft"
            )
        peft_config = None
    else:
        model = merge_adapter(model)
    if is_causal_lm:
        model = from_causal_lm(model, tokenizer, training.config.question)
    training.set_attention(model)
    return {"model": model, "processing_class": tokenizer, "peft_config": peft_config}


RECIPE = Recipe(
    command="reward",
    description="A response reward model on ranked answers.",
    config=ResponseRewardConfig,
    record=RankedGroup,
    noun="groups",
    kinds=("pairs",),
    data="data/answers.csv",
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
    use="It scores whole responses: `python reward_model/score_responses.py score --scorer FOLDER`.",
    read=read_ranked,
)
