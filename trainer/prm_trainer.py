"""Training of a process reward model: binary cross-entropy with soft labels on the steps of solutions.

    prm = from_causal_lm(model, tokenizer)                     # reward_model/process_reward_model.py
    config = PRMConfig("saved_model/mine", num_train_epochs=1)
    PRMTrainer(model=prm, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()

loss = -mean over all labelled steps of the global batch of [y log v + (1 - y) log(1 - v)], with y in 0..1 the label of a step and
v = sigmoid(logit at its last token) its value: Math-Shepherd's (Wang et al. 2024, arXiv 2312.08935, equation 2) with labels that
may lie between 0 and 1. Solutions become ids in reward_model/process_reward_model.py, for training as for scoring.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import PreTrainedConfig, Trainer, TrainingArguments
from trl import get_peft_config

from lm.loading import load_model, merge_adapter
from lm.tree_attention import add_sequence, mask_dtype, supports_tree_attention, tree_inputs
from reasoning.records import LabelledSolution, StepValue
from reward_model.prm_formats import StepTokens
from reward_model.process_reward_model import from_causal_lm, load_prm
from reward_model.response_reward_model import head_names
from trainer.defaults import MiniatureDefaults
from trainer.session import Recipe, Training

logger = get_logger(__name__)

IGNORED = -100.0  # the label of a token that no label belongs to


# A row is a step with its value (`prompt`, `prefix`, `step`, `score`), or a solution whose steps are labelled (`prompt`, `steps`,
# `labels`; null: unlabelled). Both are kept as the second:
@dataclass(frozen=True)
class LabelledSteps(LabelledSolution):
    @classmethod
    def from_row(cls, row: Any) -> "LabelledSteps":
        """Raises RecordError if the row is neither."""
        if isinstance(row, dict) and "step" in row:
            value = StepValue.from_row(row)
            return cls(
                value.prompt,
                [*value.prefix, value.step],
                [None] * len(value.prefix) + [float(value.score)],
            )
        return super().from_row(row)


@dataclass
class PRMConfig(MiniatureDefaults, TrainingArguments):
    """TrainingArguments of a PRM. Raises ValueError for values that make no sense."""

    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    hard_labels: float | None = field(
        default=None,
        metadata={
            "help": "Labels become 1 from this value on and 0 below it (above 0, up to 1); without it they stay soft."
        },
    )

    running_min: bool = field(
        default=False,
        metadata={
            "help": "Labels say what a step keeps of the value before it (utils/build_mcts_dataset.py --labels relative): a step's "
            "score is then the least of all steps so far."
        },
    )

    def __post_init__(self):
        if self.hard_labels is not None and not 0 < self.hard_labels <= 1:
            raise ValueError(
                f"hard_labels: expected a number above 0, up to 1, got {self.hard_labels}"
            )
        super().__post_init__()
        self.label_names = ["labels"]
        self.remove_unused_columns = False  # the collator needs `parents`


def pack(rows: Iterable[LabelledSolution]) -> tuple[list[LabelledSolution], int]:
    """The same labels on as few solutions as hold them all, and how many labels were of a step that had one already.

    The solutions of one prompt are a tree of steps: one comes out for every leaf, one after the other, and every labelled step is
    labelled in exactly one of them, the first that passes by. A step that is labelled several times has the mean."""
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
        # a path is its steps and the labels that none before it took; the last child of a node is looked at first, so put it last
        open_paths = [(tree, [], [])]
        while open_paths:
            children, steps, labels = open_paths.pop()
            if not children and any(label is not None for label in labels):
                packed.append(LabelledSolution(prompt, steps, labels))
            for k, (step, (further, given)) in reversed([*enumerate(children.items())]):
                label = sum(given) / len(given) if given else None
                # only the first child's path carries the labels so far
                before = labels if k == 0 else [None] * len(labels)
                open_paths.append((further, [*steps, step], [*before, label]))
    return packed, repeated


def add_labelled(
    row: dict[str, list], path: list[int], ids: list[int], labels: list[float]
) -> list[int]:
    """Put a solution into a row that has others of the same prompt, as a branch: what it begins with like the last of them, whose
    tokens lie at `path`, is there already, as far as no token has two labels. Returns where its tokens lie."""
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
    """`labels` (B, L), IGNORED but where the value of a labelled step is read, and the inputs of `tree_inputs`."""

    pad_token_id: int
    mask_dtype: torch.dtype = torch.bool

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        inputs = tree_inputs(
            *([row[name] for row in examples] for name in ("input_ids", "parents")),
            self.pad_token_id,
            dtype=self.mask_dtype,
        )
        labels = torch.full(inputs["input_ids"].shape, IGNORED)
        for b, row in enumerate(examples):
            labels[b, : len(row["labels"])] = torch.tensor(row["labels"])
        return {**inputs, "labels": labels}


class PRMTrainer(Trainer):
    """transformers' Trainer on rows of LabelledSteps; takes the same arguments, with a PRMConfig, a PRM, and the tokenizer that has
    its step token. peft_config: an adapter is trained, with the head and the step token's row of the embeddings.

    Logged beside the loss: `values/good`, `values/bad`, mean values of steps labelled .5 and more, and below; `accuracy`, the share
    of steps whose value is on the same side of .5 as their label. `balance` says what the labels are like. Raises ValueError if
    nothing is left to learn from."""

    def __init__(
        self,
        model,
        args: PRMConfig,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        peft_config=None,
        **kwargs,
    ):
        self.format = StepTokens(processing_class, model.config.step_token)
        limits = (
            args.max_length,
            getattr(model.config.get_text_config(), "max_position_embeddings", None),
        )
        self.max_length = min(filter(None, limits), default=None)
        self.shares_prefixes = supports_tree_attention(model, self.max_length)
        model.config.running_min = args.running_min  # it is read where the model scores
        self.balance = ""
        self._sums: dict[str, Tensor] = {}  # train, eval -> sums since the last log
        if peft_config is not None:
            model = _with_new_adapter(model, peft_config, self.format.tag_id)
        # peft would save all embeddings, since there are more than the base has: one row is new
        if is_peft_model(model):
            model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
        super().__init__(
            model,
            args,
            data_collator
            or DataCollatorForStepValues(processing_class.pad_token_id or 0, mask_dtype(model)),
            train_dataset=self._prepare(train_dataset, "train", args.hard_labels),
            eval_dataset=self._prepare(eval_dataset, "eval", args.hard_labels),
            processing_class=processing_class,
            compute_loss_func=self._loss,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = (
            False  # _loss divides; the model would swallow the number of steps
        )

    def _prepare(
        self, dataset: Iterable[dict] | None, name: str, hard_labels: float | None
    ) -> list[dict] | None:
        """Rows to ids. What is lost, and what the labels are like, is said."""
        if dataset is None:
            return None
        solutions, repeated = pack(map(LabelledSteps.from_row, dataset))
        encoded = self.format.encode([(solution.prompt, solution.steps) for solution in solutions])
        examples, learned, lost, cut, path, prompt = [], [], 0, 0, [], None
        for solution, (ids, places) in zip(solutions, encoded, strict=True):
            labels = {
                place: label
                for place, label in zip(places, solution.labels, strict=True)
                if label is not None
            }
            kept = {
                place: label
                for place, label in labels.items()
                if place < (self.max_length or len(ids))
            }
            lost += len(labels) - len(kept)
            if hard_labels is not None:
                kept = {place: float(label >= hard_labels) for place, label in kept.items()}
            if not kept:
                cut += 1
                continue
            learned += kept.values()
            end = max(kept) + 1  # what stands behind the last label teaches nothing
            if (
                solution.prompt != prompt
                or not self.shares_prefixes
                or len(examples[-1]["input_ids"]) + end > (self.max_length or math.inf)
            ):
                examples.append({"input_ids": [], "labels": [], "parents": []})
                path, prompt = [], solution.prompt
            path = add_labelled(
                examples[-1], path, ids[:end], [kept.get(place, IGNORED) for place in range(end)]
            )
        if not examples:
            raise ValueError(
                f"{name}: none of {len(solutions)} solutions has a labelled step within {self.max_length} tokens"
            )
        if lost:
            logger.warning(
                f"{name}: {lost} of {len(learned) + lost} labelled steps end behind max_length {self.max_length} and are left out, "
                f"{cut} of {len(solutions)} solutions with all of theirs"
            )
        if name == "train":
            good = sum(label >= 0.5 for label in learned) / len(learned)
            self.balance = (
                f"{len(learned)} labelled steps on {len(solutions) - cut} solutions in {len(examples)} rows: "
                f"mean label {sum(learned) / len(learned):.3f}, {good:.1%} of them .5 or more"
                + (f"; {repeated} labels of a step that had one were averaged" * bool(repeated))
            )
        return examples

    def _loss(
        self, outputs, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Sum over the labelled steps of this batch, divided by their number in the global batch; Trainer does the rest."""
        known = labels != IGNORED  # (B, L)
        logits, labels = outputs.logits[..., 0].float()[known], labels[known]  # (N,), (N,)
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        with torch.no_grad():
            values, good = logits.sigmoid(), labels >= 0.5
            of = [
                (losses, known[known]),
                (values, good),
                (values, ~good),
                (((values >= 0.5) == good).float(), known[known]),
            ]
            sums = torch.stack(
                [torch.stack([(value * where).sum(), where.sum()]) for value, where in of]
            ).double()
            mode = "train" if self.model.training else "eval"
            self._sums[mode] = self._sums.get(mode, 0) + sums
        return losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode, prefix = ("eval", "eval_") if "eval_loss" in logs else ("train", "")
        if f"{prefix}loss" in logs and mode in self._sums:
            # (processes, names, 2) -> (names, 2)
            sums = self.accelerator.gather(self._sums.pop(mode)[None]).sum(0).tolist()
            names = (
                "eval_loss",
                f"{prefix}values/good",
                f"{prefix}values/bad",
                f"{prefix}accuracy",
            )
            means = {
                name: total / count
                for name, (total, count) in zip(names, sums, strict=True)
                if count
            }
            if mode == "train":
                del means["eval_loss"]  # Trainer's own is this one too
            logs |= means  # Trainer's loss of an evaluation is a mean of means
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and is_peft_model(self.model):
            # it names the step token
            self.model.config.save_pretrained(output_dir or self.args.output_dir)


def _with_new_adapter(model, peft_config, step_token_id: int):
    from peft import TaskType, get_peft_model

    head = head_names(model)
    peft_config.task_type = TaskType.TOKEN_CLS  # the head is trained and saved whole
    peft_config.exclude_modules = head
    peft_config.trainable_token_indices = [step_token_id]
    return get_peft_model(model, peft_config)


# --- python train.py prm ---


def _make_trainer(training: Training) -> PRMTrainer:
    return PRMTrainer(args=training.config, **training.datasets(), **_start(training))


def _start(training: Training) -> dict[str, Any]:
    """What to start from: a PRM that is trained further, or a causal LM made into one. An adapter is
    merged into its base; with --use_peft that of a PRM is trained further. Raises ValueError."""
    name, model_args = training.model, training.model_args
    dtype, revision = training.weights_dtype("a PRM"), model_args.model_revision
    peft_config = get_peft_config(model_args)
    config, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    is_prm = "step_token" in config
    if is_prm:
        model, form = load_prm(name, dtype, trainable=True, revision=revision)
        tokenizer = form.tokenizer
    else:
        model, tokenizer = load_model(name, dtype, revision=revision)
    if is_peft_model(model) and model_args.use_peft:
        if not is_prm:
            raise ValueError(
                "it is an adapter, and a PRM's adapter needs a base that is on disk: leave out "
                "--use_peft"
            )
        peft_config = None
    else:
        model = merge_adapter(model)
    if not is_prm:
        model = from_causal_lm(model, tokenizer)
    training.set_attention(model)
    return {"model": model, "processing_class": tokenizer, "peft_config": peft_config}


RECIPE = Recipe(
    command="prm",
    description="A process reward model (PRM) on step values.",
    config=PRMConfig,
    record=LabelledSteps,
    noun="rows",
    kinds=("step_values", "step_labels"),
    data="data/mcts_steps.jsonl",
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
    use="The model gives every step a value, 0 to 1: `--judge prm --judge_path FOLDER` in the "
    "scripts that judge.",
)
