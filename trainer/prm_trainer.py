"""Training of a process reward model: binary cross-entropy with soft labels on steps.

    prm = from_causal_lm(model, tokenizer)  # reward_model/process_reward_model.py
    config = PRMConfig("saved_model/mine", num_train_epochs=1)
    rows = Dataset.from_list(labelled_steps)  # LabelledSteps, as dicts
    PRMTrainer(model=prm, args=config, train_dataset=rows, processing_class=tokenizer).train()

loss = -mean over all labelled steps of the global batch of [y log v + (1 - y) log(1 - v)], where y,
0 to 1, is the label of a step and v = sigmoid(logit at its last token) its value: the loss of
Math-Shepherd (Wang et al. 2024, arXiv 2312.08935, equation 2), with labels that may lie between 0
and 1. Training and scoring use the same ids (reward_model/process_reward_model.py).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from peft import TaskType, get_peft_model
from torch import Tensor
from transformers import PreTrainedConfig, Trainer, TrainingArguments

from common.cli import arg
from lm.loading import load_model
from lm.tree_attention import (
    add_sequence,
    mask_dtype,
    shared_head,
    supports_tree_attention,
    tree_inputs,
)
from reasoning.records import LabelledSolution, StepValue
from reward_model.prm_formats import StepTokens
from reward_model.process_reward_model import from_causal_lm, head_names, load_prm
from trainer.defaults import MiniatureDefaults
from trainer.model_card import prm_use
from trainer.packing import CPU_BLOCK
from trainer.session import Recipe, Training

logger = get_logger(__name__)

IGNORED = -100.0  # the label of a token without a label


# A row is a step with its value (`prompt`, `prefix`, `step`, `score`), or a solution with labelled
# steps (`prompt`, `steps`, `labels`; null: no label). Both become the second kind:
@dataclass(frozen=True)
class LabelledSteps(LabelledSolution):
    @classmethod
    def from_row(cls, row: Any) -> "LabelledSteps":
        """Raises RecordError if the row is neither."""
        if isinstance(row, dict) and "step" in row:
            value = StepValue.from_row(row)
            labels = [None] * len(value.prefix) + [float(value.score)]
            return cls(value.prompt, [*value.prefix, value.step], labels)
        solution = LabelledSolution.from_row(row)
        return cls(solution.prompt, solution.steps, solution.labels)


@dataclass
class PRMConfig(MiniatureDefaults, TrainingArguments):
    """TrainingArguments of a PRM. Raises ValueError for impossible values."""

    learning_rate: float = arg(1e-3, "Peak learning rate of AdamW.")
    hard_labels: float | None = arg(
        None,
        "Labels of this value or more become 1, the others 0; above 0, up to 1. "
        "Without it the labels stay soft.",
    )
    running_min: bool = arg(
        False,
        "The labels are relative to the value before the step "
        "(utils/build_mcts_dataset.py --labels relative), so the score of a step is the "
        "minimum of all values up to it.",
    )

    def __post_init__(self) -> None:
        if self.hard_labels is not None and not 0 < self.hard_labels <= 1:
            raise ValueError(
                f"hard_labels: expected a number above 0, up to 1, got {self.hard_labels}"
            )
        super().__post_init__()
        self.label_names = ["labels"]
        self.remove_unused_columns = False  # the collator needs `parents`


def pack(rows: Iterable[LabelledSolution]) -> tuple[list[LabelledSolution], int]:
    """Merge labels into as few solutions as possible: (solutions, number of repeated labels).

    The steps of one prompt form a tree, and every leaf gives one solution. A labelled step is
    labelled in the first solution that contains it. A step with several labels gets their mean; the
    labels beyond the first are counted."""
    trees: dict[str, dict] = {}  # prompt -> step -> [children, labels]
    repeated = 0
    for row in rows:
        children = trees.setdefault(row.prompt, {})
        for step, label in zip(row.steps, row.labels, strict=True):
            children, labels = children.setdefault(step, ({}, []))
            if label is not None:
                repeated += bool(labels)
                labels.append(label)
    packed = []
    for prompt, tree in trees.items():
        # (children of the last step, steps, labels that no earlier path has); a stack: depth first
        paths: list[tuple[dict, list[str], list[float | None]]] = [(tree, [], [])]
        while paths:
            children, steps, labels = paths.pop()
            if not children and any(label is not None for label in labels):
                packed.append(LabelledSolution(prompt, steps, labels))
            for k, (step, (grandchildren, values)) in reversed([*enumerate(children.items())]):
                label = sum(values) / len(values) if values else None
                # only the path of the first child keeps the labels so far
                before = labels if k == 0 else [None] * len(labels)
                paths.append((grandchildren, [*steps, step], [*before, label]))
    return packed, repeated


def add_labelled(
    row: dict[str, list], path: list[int], ids: list[int], labels: list[float]
) -> list[int]:
    """Add a solution as a branch to a row with other solutions of the same prompt.

    path: the places of the tokens of the solution added last. The two solutions share their first
    tokens as long as the ids agree and no token would get two labels. Returns the places of the new
    solution's tokens."""
    shared = 0
    for place, token, label in zip(path, ids, labels, strict=False):
        if row["input_ids"][place] != token or IGNORED not in (label, row["labels"][place]):
            break
        row["labels"][place] = max(label, row["labels"][place])
        shared += 1
    row["labels"] += labels[shared:]
    return add_sequence(row["input_ids"], row["parents"], path, ids, shared)


@dataclass
class DataCollatorForStepValues:
    """The inputs of `tree_inputs`, and `labels` (B, L): IGNORED except where a value is trained.

    most: rows with a common start (`shared_head`), such as that of a chat template, are put
    together to trees of at most so many tokens, which read it once; 0: every row stays as it is."""

    pad_token_id: int
    mask_dtype: torch.dtype = torch.bool
    most: int = 0

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        examples = self._together(examples)
        ids, parents = ([row[name] for row in examples] for name in ("input_ids", "parents"))
        inputs = tree_inputs(ids, parents, self.pad_token_id, dtype=self.mask_dtype)
        labels = torch.full(inputs["input_ids"].shape, IGNORED)
        for b, row in enumerate(examples):
            labels[b, : len(row["labels"])] = torch.tensor(row["labels"])
        return {**inputs, "labels": labels}

    def _together(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows, or fewer and larger ones."""
        head = shared_head([row["input_ids"] for row in rows]) if self.most else 0
        if not head or any(label != IGNORED for row in rows for label in row["labels"][:head]):
            return rows
        larger: list[dict[str, Any]] = []
        for row in rows:
            own = {name: values[head:] for name, values in row.items()}
            if not larger or len(larger[-1]["input_ids"]) + len(own["labels"]) > self.most:
                larger.append({name: [*values] for name, values in row.items()})
                continue
            moved = len(larger[-1]["input_ids"]) - head
            own["parents"] = [place + moved * (place >= head) for place in own["parents"]]
            for name, values in larger[-1].items():
                values.extend(own[name])
        return larger


class PRMTrainer(Trainer):
    """transformers' Trainer on rows of LabelledSteps; its arguments are the same, with a PRMConfig.

    model: a PRM; processing_class: the tokenizer that has its step token; peft_config: trains an
    adapter, together with the head and the embedding of the step token. Raises ValueError if no
    label is left.

    It logs, besides the loss: `values/good`, `values/bad`: the mean values of steps labelled .5 or
    more, and below; `accuracy`: the share of steps whose value and label are on the same side of
    .5. `balance` describes the labels."""

    def __init__(
        self,
        model: Any,
        args: PRMConfig,
        data_collator: Any = None,
        train_dataset: Iterable[dict] | None = None,
        eval_dataset: Iterable[dict] | None = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ):
        self.format = StepTokens(processing_class, model.config.step_token)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = min(filter(None, (args.max_length, context)), default=None)
        self.shares_prefixes = supports_tree_attention(model, self.max_length)
        model.config.running_min = args.running_min  # stored with the model, for scoring
        self.balance = ""
        self._sums: dict[str, Tensor] = {}  # train, eval -> sums since the last log
        if peft_config is not None:
            model = _with_new_adapter(model, peft_config, self.format.tag_id)
        if is_peft_model(model):
            # peft would save all embeddings, because the step token is not in the base; the adapter
            # already has that one row
            model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
        if data_collator is None:
            pad_token_id = processing_class.pad_token_id or 0
            # several processes need as many rows of a batch each, at least in an evaluation
            puts_together = self.shares_prefixes and args.world_size == 1
            most = CPU_BLOCK if puts_together and args.device.type == "cpu" else 0
            data_collator = DataCollatorForStepValues(pad_token_id, mask_dtype(model), most)
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset=self._prepare(train_dataset, "train", args.hard_labels),
            eval_dataset=self._prepare(eval_dataset, "eval", args.hard_labels),
            processing_class=processing_class,
            compute_loss_func=self._loss,
            **kwargs,
        )
        # _loss divides by the number of steps itself; the model does not know that argument
        self.model_accepts_loss_kwargs = False

    def _prepare(
        self, dataset: Iterable[dict] | None, name: str, hard_labels: float | None
    ) -> list[dict] | None:
        """Encode the rows; count the labels beyond max_length; describe the labels in `balance`."""
        if dataset is None:
            return None
        solutions, repeated = pack(map(LabelledSteps.from_row, dataset))
        encoded = self.format.encode([(solution.prompt, solution.steps) for solution in solutions])
        limit = self.max_length or math.inf
        examples: list[dict[str, list]] = []
        learned: list[float] = []
        path: list[int] = []
        lost, dropped, prompt = 0, 0, None
        for solution, (ids, places) in zip(solutions, encoded, strict=True):
            # place of the token where a value is read -> its label
            labels = {
                place: label if hard_labels is None else float(label >= hard_labels)
                for place, label in zip(places, solution.labels, strict=True)
                if label is not None
            }
            kept = {place: label for place, label in labels.items() if place < limit}
            lost += len(labels) - len(kept)
            if not kept:
                dropped += 1
                continue
            learned += kept.values()
            end = max(kept) + 1  # tokens after the last label do not change the loss
            is_new_row = solution.prompt != prompt or not self.shares_prefixes
            if is_new_row or len(examples[-1]["input_ids"]) + end > limit:
                examples.append({"input_ids": [], "labels": [], "parents": []})
                path, prompt = [], solution.prompt
            token_labels = [kept.get(place, IGNORED) for place in range(end)]
            path = add_labelled(examples[-1], path, ids[:end], token_labels)
        if not examples:
            raise ValueError(
                f"{name}: none of {len(solutions)} solutions has a labelled step within "
                f"{self.max_length} tokens"
            )
        if lost:
            logger.warning(
                f"{name}: {lost} of {len(learned) + lost} labelled steps end after max_length "
                f"{self.max_length} and are left out, {dropped} of {len(solutions)} solutions with "
                "all of theirs"
            )
        if name == "train":
            good = sum(label >= 0.5 for label in learned) / len(learned)
            self.balance = (
                f"{len(learned)} labelled steps on {len(solutions) - dropped} solutions in "
                f"{len(examples)} rows: mean label {sum(learned) / len(learned):.3f}, {good:.1%} "
                "of them .5 or more"
            )
            if repeated:
                self.balance += f"; {repeated} labels of a step that had one were averaged"
        return examples

    def _loss(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The mean over the labelled steps of the global batch: its part from this batch."""
        known = labels != IGNORED  # (B, L)
        logits, labels = outputs.logits[..., 0].float()[known], labels[known]  # (N,), (N,)
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        with torch.no_grad():
            values, good = logits.sigmoid(), labels >= 0.5
            right = ((values >= 0.5) == good).float()
            everywhere = torch.ones_like(good)
            # in the order of the names in `log`
            logged = [(losses, everywhere), (values, good), (values, ~good), (right, everywhere)]
            sums = [torch.stack([(value * mask).sum(), mask.sum()]) for value, mask in logged]
            mode = "train" if self.model.training else "eval"
            self._sums[mode] = self._sums.get(mode, 0) + torch.stack(sums).double()
        return losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over the steps of all processes since the last log."""
        mode, prefix = ("eval", "eval_") if "eval_loss" in logs else ("train", "")
        if f"{prefix}loss" in logs and mode in self._sums:
            # (processes, names, 2) -> (names, 2)
            sums = self.accelerator.gather(self._sums.pop(mode)[None]).sum(0).tolist()
            names = ("loss", "values/good", "values/bad", "accuracy")
            means = {
                f"{prefix}{name}": total / count
                for name, (total, count) in zip(names, sums, strict=True)
                if count
            }
            if mode == "train":
                means.pop(
                    "loss", None
                )  # Trainer's is this one too; in an evaluation it averages batches
            logs |= means
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and is_peft_model(self.model):
            # the config has the step token
            self.model.config.save_pretrained(output_dir or self.args.output_dir)


def _with_new_adapter(model: Any, peft_config: Any, step_token_id: int) -> Any:
    head = head_names(model)
    peft_config.task_type = TaskType.TOKEN_CLS  # the head is trained and saved whole
    peft_config.exclude_modules = head
    peft_config.trainable_token_indices = [step_token_id]
    return get_peft_model(model, peft_config)


# --- python train.py prm ---


def _make_trainer(training: Training) -> PRMTrainer:
    return PRMTrainer(args=training.config, **training.datasets(), **_start(training))


def _start(training: Training) -> dict[str, Any]:
    """The model to start from: a PRM, or a causal LM that becomes one. Raises ValueError."""
    name, revision = training.model, training.model_args.model_revision
    dtype = training.weights_dtype("a PRM")
    config, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    if "step_token" in config:
        model, form = load_prm(name, dtype, trainable=True, revision=revision)
        return training.start_model(model, form.tokenizer)
    return training.start_model(*load_model(name, dtype, revision=revision), from_causal_lm)


def _warning(last: dict[str, float]) -> str:
    """For a model that has learned how many steps are good, but not which."""
    difference = last.get("values/good", 1.0) - last.get("values/bad", 0.0)
    if difference >= 0.05:
        return ""
    return (
        f"good and bad steps have the same value (difference {difference:.3f}): the model cannot "
        "tell them apart yet; train on more steps, for more epochs or with a higher --learning_rate"
    )


RECIPE = Recipe(
    command="prm",
    description="A process reward model (PRM) on step values.",
    config=PRMConfig,
    record=LabelledSteps,
    noun="rows",
    kinds=("step_values", "step_labels"),
    data="data/mcts_steps.jsonl.gz",
    made_by="python utils/build_mcts_dataset.py",
    output_dir="saved_model/prm",
    make_trainer=_make_trainer,
    title=lambda config: "training as a process reward model (PRM) on",
    tags="prm, process-reward-model, reasoning",
    columns={
        "loss": "loss",
        "accuracy": "accuracy at .5",
        "values/good": "mean value of steps labelled .5 or more",
        "values/bad": "mean value of the other steps",
    },
    bar={"loss": "loss", "values/good": "good steps", "values/bad": "bad steps"},
    use=prm_use,
    warning=_warning,
)
