"""What all trainings share: arguments, data, resuming, writing the model, its card and its log.

Each trainer module exports one `Recipe`; `train` runs it. The training script hands in what lies in
higher layers: a function that plots a log, and one that measures accuracy.
"""

import copy
import hashlib
import json
import os
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.cli import check_input, check_model, check_output, parse_args
from common.errors import RecordError, UserError
from common.files import Readable, at_root, to_line, write_text
from reasoning.datasets.loading import load_records
from reasoning.splits import held_out_prompts, is_kept_out

# in the output folder: what this training is, so that the same command resumes it
JOB = "training_job.json"
FINISHED = ("config.json", "adapter_config.json")  # one of them is written last of all
WRITTEN = (
    *("checkpoint-*", "*.safetensors", "*.safetensors.index.json", "*.bin", "tokenizer*"),
    *("chat_template.jinja", "generation_config.json", JOB, "README.md", *FINISHED),
)
NOT_THE_JOB = (
    *("logging", "log_", "hub_", "push_", "save_", "report_to", "run_name", "disable_tqdm"),
    *("output_dir", "resume", "eval"),
    *("threads", "judge_requests", "judge_cache"),  # of a judge: they change no score
)
ANSWERS = (
    "The model answers the prompt template of `lm/text_encoding.py`, one step a line, "
    "`Answer: ` last."
)
CARD = """---
library_name: {library}
tags: [{tags}]
---

# {name}

{base} after {title}.

| | first | last |
|---|---|---|
{table}

Steps: {steps}, seed {seed}, {seconds:.0f} s. Every setting is in `{job}`.
{use}
"""


@dataclass
class DataArgs:
    dataset_name: str = field(
        default=at_root("data/rewarded.jsonl"),
        metadata={
            "help": "dpo: scored pairs; sft: problems with steps, or pairs; prm: values or labels of "
            "steps; ppo: values of steps, or problems; reward: ranked answers, or pairs. A file, a "
            "folder, or the name of a data set on the hub, of any shape that "
            "reasoning/datasets/shapes.py knows"
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "configuration of a hub data set"}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "split of a hub data set"})
    limit: int | None = field(
        default=None, metadata={"help": "train on the first LIMIT rows; on all if not given"}
    )
    logs_dir: str = field(
        default=at_root("logs"),
        metadata={"help": "folder of the logs; a run writes <its name>/log.json and training.png"},
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "replace what a finished or another training left in output_dir"},
    )

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"argument --limit: expected 1 or more, got {self.limit}")


def read_dataset(recipe: "Recipe", args: DataArgs) -> list:
    """All rows of the data set as records of the recipe, each checked.

    Raises RecordError or UserError, also for a row of a held-out problem."""
    name, dropped = args.dataset_name, Counter()
    held_out, records = held_out_prompts(), []
    source = (name, args.dataset_config, args.dataset_train_split)
    for where, record in load_records(recipe.kinds, *source, dropped):
        try:
            records.append(recipe.record.from_row(asdict(record)))
        except RecordError as error:
            raise RecordError(f"{where}: {error}") from None
        if record.prompt in held_out:
            raise UserError(
                f"{where}: a held-out problem ({held_out[record.prompt]}); training on it would "
                "spoil every comparison"
            )
    for reason, count in dropped.items():
        print(f"{count} rows of {name} left out: {reason}")
    return records


@dataclass(frozen=True)
class Recipe:
    """All that one command of train.py is."""

    command: str
    description: str  # of --help
    config: type  # the dataclass of its arguments
    record: type[Readable]  # a row of the data
    noun: str  # what rows are called: pairs, solutions
    kinds: tuple[str, ...]  # of records that the data may hold (reasoning/datasets), best first
    data: str  # the default data set, and the command that makes it
    made_by: str
    output_dir: str
    make_trainer: Callable[["Training"], Any]
    title: Callable[[Any], str]  # config -> what this training is, up to "on 512 pairs"
    tags: str  # of the model card
    columns: dict[str, str]  # the closing table: name in the trainer's log -> words
    bar: dict[str, str] = field(default_factory=dict)  # the same, beside the progress bar
    model: str = "models/policy-mini"  # the default model to start from
    use: str = ANSWERS  # what the trained model is for
    read: Callable[["Recipe", DataArgs], list] = read_dataset


def train(
    recipe: Recipe,
    argv: list[str],
    plot: Callable[[Sequence[dict], Path, str], bool] | None = None,
    accuracy: Callable[[str, int], Callable] | None = None,
    callbacks: Sequence[Any] = (),
) -> None:
    """Train as the recipe and the arguments say, and write model, card and log.

    plot(log history, path, title): draws the log, returns whether there was anything to draw.
    accuracy(file of problems, limit): a function of a policy that measures its greedy accuracy.
    callbacks: of transformers' trainers. Raises UserError."""
    # remarks of libraries to each other, before they can be silenced by name
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from trl import ModelConfig  # seconds: after the checks of the command

    from lm.loading import pick_device

    device, bf16 = pick_device()
    defaults = {
        "dataset_name": at_root(recipe.data),
        "model_name_or_path": at_root(recipe.model),
        "output_dir": at_root(recipe.output_dir),
        "use_cpu": device == "cpu",
        "bf16": bf16,
    }
    classes = (DataArgs, recipe.config, ModelConfig)
    args, config, model_args = parse_args(
        *classes, description=recipe.description, args=argv, defaults=defaults
    )
    if args.dataset_name == defaults["dataset_name"]:
        check_input(args.dataset_name, recipe.made_by)
    rows = recipe.read(recipe, args)
    with ExitStack() as stack:
        training = Training(recipe, args, config, model_args, rows, stack, accuracy)
        training.run(training.build(), plot, callbacks)


class Training:
    """One training, from parsed arguments to a written model. config: of the recipe's class;
    model_args: TRL's ModelConfig; rows: what `recipe.read` gave; stack: closes what a trainer opens.

    All mistakes of a user are found here, before anything is loaded or written: raises UserError."""

    def __init__(
        self,
        recipe: Recipe,
        args: DataArgs,
        config: Any,
        model_args: Any,
        rows: list,
        stack: ExitStack,
        accuracy: Callable[[str, int], Callable] | None = None,
    ):
        self.recipe, self.args, self.config, self.model_args = recipe, args, config, model_args
        self.stack, self.accuracy = stack, accuracy
        self.folder, self.model = Path(config.output_dir), model_args.model_name_or_path
        run_name = config.run_name or self.folder.resolve().name
        self.log_file = Path(args.logs_dir) / run_name / "log.json"
        check_model(self.model, "make models" if self.model == at_root(recipe.model) else None)
        self.kept_out = [row for row in rows if is_kept_out(row.prompt)]
        self.rows = [row for row in rows if not is_kept_out(row.prompt)][: args.limit]
        if not self.rows or (config.eval_strategy != "no" and not self.kept_out):
            missing = "evaluation" if self.rows else "training"
            raise UserError(
                f"{args.dataset_name}: its {len(rows)} {recipe.noun} leave none for {missing}"
            )
        if Path(self.model).is_dir():
            # an adapter names its base: by a path that is valid everywhere on this machine
            self.model = str(Path(self.model).resolve())
            if self.folder.resolve() == Path(self.model):
                raise UserError(
                    f"--output_dir {self.folder} is the model that training starts from: "
                    "give another one"
                )
        self.job = self._job()
        self.checkpoint = where_to_begin(
            self.folder, self.job, args.overwrite, config.resume_from_checkpoint
        )
        check_output(str(self.log_file), overwrite=True)

    def _job(self) -> dict:
        """All that decides what comes out of the training."""
        noun, settings = self.recipe.noun, self.config.to_dict()
        job = {
            "command": self.recipe.command,
            "dataset": self.args.dataset_name,
            noun: len(self.rows),
            f"{noun}_sha256": hashlib.sha256("".join(map(to_line, self.rows)).encode()).hexdigest(),
            **{k: v for k, v in settings.items() if not k.startswith(NOT_THE_JOB)},
            **asdict(self.model_args),
            "model_name_or_path": self.model,
        }
        return json.loads(json.dumps(job, default=str))

    # --- the trainer ---

    def build(self) -> Any:
        """The recipe's trainer. Raises UserError if the model cannot be loaded, or cannot be trained
        as the arguments say."""
        silence_libraries()
        from safetensors import SafetensorError

        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(self.log_file.parent))
        try:
            return self.recipe.make_trainer(self)
        except UserError:
            raise
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            name = self.model_args.model_name_or_path
            raise UserError(f"{name}: cannot be trained so: {error}") from None

    def datasets(self) -> dict[str, Any]:
        """`train_dataset` and `eval_dataset`."""
        from datasets import Dataset

        evaluates = self.config.eval_strategy != "no"
        return {
            "train_dataset": Dataset.from_list(list(map(asdict, self.rows))),
            "eval_dataset": Dataset.from_list(list(map(asdict, self.kept_out)))
            if evaluates
            else None,
        }

    def weights_dtype(self, kind: str) -> Any:
        """The torch.dtype of the weights that training starts from. Raises ValueError if they are to be
        quantized, which a model of this kind cannot be."""
        import torch

        args = self.model_args
        if args.load_in_4bit or args.load_in_8bit:
            raise ValueError(
                f"{kind} is not trained on quantized weights: leave out --load_in_4bit and "
                "--load_in_8bit"
            )
        return getattr(torch, "float32" if args.dtype in (None, "auto") else args.dtype)

    def set_attention(self, model: Any) -> None:
        """Use the attention that --attn_implementation names."""
        if self.model_args.attn_implementation:
            model.set_attn_implementation(self.model_args.attn_implementation)

    def start_policy(self, needs_reference: bool = False) -> dict[str, Any]:
        """The arguments of TRL's trainers that say what to start from: the name of a model that has all
        its weights, or a loaded adapter."""
        from transformers import AutoModelForCausalLM
        from trl import get_peft_config, get_quantization_config

        from lm.loading import base_of, load_weights

        config, args = self.config, self.model_args
        hub = {"revision": args.model_revision, "trust_remote_code": config.trust_remote_code}
        start = {
            "peft_config": get_peft_config(args),
            "quantization_config": get_quantization_config(args),
        }
        if base_of(self.model, args.model_revision)[1]:
            config.model_init_kwargs = None  # TRL's, for a model that it loads by name
            return start | self._adapter(needs_reference, hub)
        config.model_init_kwargs = {
            "revision": args.model_revision,
            "attn_implementation": args.attn_implementation,
            "dtype": args.dtype,
            **(config.model_init_kwargs or {}),
        }
        # on the meta device: only whether all weights are there
        load_weights(AutoModelForCausalLM, self.model, device_map="meta", **hub)
        return start | {"model": self.model}

    def _adapter(self, needs_reference: bool, hub: dict) -> dict[str, Any]:
        """With --use_peft the adapter itself is trained, and TRL keeps a copy of it as the reference.
        Else it is merged into its base (in float32: 16 bits would round much of it away); the reference
        is a copy too, for TRL would load one from disk, which is the base without the adapter."""
        import torch

        from lm.loading import load_model, merge_adapter

        args = self.model_args
        dtype = "float32" if args.dtype in (None, "auto") else args.dtype
        if args.use_peft:
            model, tokenizer = load_model(self.model, dtype, trainable=True, **hub)
        else:
            model, tokenizer = load_model(self.model, "float32", **hub)
            model = merge_adapter(model, getattr(torch, dtype))
        self.set_attention(model)
        reference = {}
        if needs_reference and not args.use_peft:
            reference = {"ref_model": copy.deepcopy(model)}
        return {"model": model, "processing_class": tokenizer, "peft_config": None, **reference}

    # --- the run ---

    def run(self, trainer: Any, plot: Callable | None = None, callbacks: Sequence = ()) -> None:
        """Train, write model, card and log, and print the closing table."""
        config, recipe = self.config, self.recipe
        main_process = trainer.is_world_process_zero()
        say = print if main_process else lambda *_: None
        if main_process:
            if self.checkpoint is None:
                clear(self.folder)
            write_text(self.folder / JOB, [json.dumps(self.job, indent=1)])
        note = getattr(trainer, "balance", "")
        self._announce(trainer, note, say)
        for callback in callbacks:
            trainer.add_callback(callback)
        # a trainer that is not transformers' has a progress bar of its own
        if recipe.bar and not config.disable_tqdm:
            replace_progress_bar(trainer, recipe.bar)

        started = time.monotonic()
        checkpoint = None if self.checkpoint is None else str(self.checkpoint)
        trainer.train(resume_from_checkpoint=checkpoint)
        seconds = time.monotonic() - started

        state = trainer.state
        history = [log for log in state.log_history if "loss" in log]
        rows = [
            (word, history[0][name], history[-1][name])
            for name, word in recipe.columns.items()
            if history and name in history[0]
        ]
        dataset = Path(self.args.dataset_name).name
        title = f"{recipe.title(config)} {len(self.rows)} {recipe.noun} of {dataset}"
        write_model(trainer, self.folder, self._card(title, rows, state, seconds, note))
        drawn = False
        picture = self.log_file.with_name("training.png")
        if main_process:
            log = {"job": self.job, "seconds": seconds, "steps": state.global_step}
            log["history"] = state.log_history
            write_text(self.log_file, [json.dumps(log, indent=1)])
            name = self.folder.resolve().name
            drawn = bool(plot and plot(state.log_history, picture, f"{name}: {title}"))
        say(f"\n{'':40}{'first':>10}{'last':>10}")
        for word, first, last in rows:
            say(f"{word:40}{first:10.3f}{last:10.3f}")
        say(f"{'seconds':40}{'':10}{seconds:10.0f}")
        if history and "num_tokens" in history[-1]:  # of this run alone; without padding
            say(f"{'tokens a second':40}{'':10}{history[-1]['num_tokens'] / seconds:10.0f}")
        kind = "adapter" if self.model_args.use_peft else "model"
        wrote = f"wrote the tuned {kind} to {self.folder}, the log to {self.log_file}"
        say(wrote + (f", its picture to {picture}" if drawn else ""))

    def _announce(self, trainer: Any, note: str, say: Callable) -> None:
        """Say what is about to be trained, on what."""
        config = self.config
        say(
            f"{len(self.rows)} {self.recipe.noun} of {self.args.dataset_name}; "
            f"{len(self.kept_out)} more are kept out of all training (a tenth of all prompts)"
        )
        if note:
            say(note)
        precision = self.model_args.dtype
        if config.bf16 or config.fp16:
            precision = f"{'bf16' if config.bf16 else 'fp16'} autocast"
        say(f"{config.device.type}, {precision}")
        if "ref" in getattr(trainer.model, "peft_config", {}):
            say(
                f"training the adapter {self.model} further, at its own rank and matrices: "
                "--lora_* are not used"
            )
        if self.checkpoint is not None:
            say(f"resuming from {self.checkpoint}")
        elif config.save_strategy != "no":
            say(
                "if this is stopped, the same command (without --overwrite) resumes from the last "
                "checkpoint"
            )

    def _card(self, title: str, rows: list, state: Any, seconds: float, note: str) -> str:
        return CARD.format(
            library="peft" if self.model_args.use_peft else "transformers",
            tags=self.recipe.tags,
            name=self.folder.resolve().name,
            base=Path(self.model).name if Path(self.model).is_dir() else self.model,
            title=title,
            table="\n".join(f"| {word} | {first:.4g} | {last:.4g} |" for word, first, last in rows),
            steps=state.global_step,
            seed=self.config.seed,
            seconds=seconds,
            job=JOB,
            use=f"{note}. {self.recipe.use}" if note else self.recipe.use,
        )


# --- folders ---


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written whole (its state file is written last)."""

    def number(path: Path) -> int:
        return int(path.name.removeprefix("checkpoint-"))

    def is_whole(path: Path) -> bool:
        try:
            return bool(json.loads((path / "trainer_state.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return False

    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    return max(filter(is_whole, found), key=number, default=None)


def where_to_begin(folder: Path, job: dict, overwrite: bool, resume: str | None) -> Path | None:
    """The checkpoint to resume from, or None to begin at the beginning.

    Raises UserError if the folder holds what must not be lost."""
    try:
        same = json.loads((folder / JOB).read_text(encoding="utf-8")) == job
    except (OSError, ValueError):
        same = False
    finished = any((folder / name).exists() for name in FINISHED)
    resume = None if str(resume).lower() in ("none", "false", "") else resume
    if folder.is_file():
        raise UserError(f"{folder} is a file, expected a folder to write the model to")
    if resume and finished and not same and not overwrite:
        raise UserError(
            f"{folder} holds the finished model of another training: give another --output_dir"
        )
    if resume:
        checkpoint = last_checkpoint(folder) if str(resume).lower() == "true" else Path(resume)
        if checkpoint is None or not (checkpoint / "trainer_state.json").is_file():
            place = checkpoint or folder
            raise UserError(f"--resume_from_checkpoint {resume}: no whole checkpoint in {place}")
        return checkpoint
    if overwrite:
        check_output(str(folder), overwrite=True)
        return None
    if same and not finished:
        return last_checkpoint(folder)  # the same command again, after it was killed
    check_output(str(folder))
    return None


def clear(folder: Path) -> None:
    """Remove what an earlier training wrote, and nothing else."""
    for pattern in WRITTEN:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_model(trainer: Any, folder: Path, card: str) -> None:
    """Write model, tokenizer and card beside the checkpoints, then move them in; the file that marks
    the model as finished comes last."""
    staging = folder / ".finished.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    trainer.save_model(str(staging))
    if trainer.is_world_process_zero():
        (staging / "README.md").write_text(card, encoding="utf-8")
        (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle; JOB says the same
        shutil.rmtree(staging / "ref", ignore_errors=True)  # TRL's copy of the starting adapter
        for path in sorted(staging.iterdir(), key=lambda path: path.name in FINISHED):
            os.replace(path, folder / path.name)
        staging.rmdir()


# --- the libraries' output ---


def silence_libraries() -> None:
    """Turn off what the libraries print and a user does not need."""
    import logging

    import datasets
    import transformers

    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)


def replace_progress_bar(trainer: Any, shown: dict[str, str]) -> None:
    """Give the trainer a progress bar with a few numbers beside it (name in the log -> word), in place
    of one that prints a long line at every log."""
    from transformers import ProgressCallback

    class Progress(ProgressCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if self.training_bar is not None and "loss" in logs:
                numbers = {word: logs[name] for name, word in shown.items() if name in logs}
                self.training_bar.set_postfix({w: f"{value:.3f}" for w, value in numbers.items()})

    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress())
