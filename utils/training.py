"""What every training of train.py shares: its data, where it writes, how it resumes, what it leaves behind."""

import copy
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from reasoning.loaders import load_records
from reasoning.records import Record, RecordError, is_kept_out, to_line, write_text
from utils.cli import UserError, at_root, check_input, check_model, check_output, held_out_prompts

JOB = "training_job.json"  # in the output folder: what this training is, so that the same command resumes it
FINISHED = ("config.json", "adapter_config.json")  # one of them is written last of all
WRITTEN = (
    *(
        "checkpoint-*",
        "*.safetensors",
        "*.safetensors.index.json",
        "*.bin",
        "tokenizer*",
        "chat_template.jinja",
    ),
    *("generation_config.json", JOB, "README.md", *FINISHED),
)
NOT_THE_JOB = (
    *(
        "logging",
        "log_",
        "hub_",
        "push_",
        "save_",
        "report_to",
        "run_name",
        "disable_tqdm",
        "output_dir",
        "resume",
        "eval",
    ),
    *("threads", "judge_requests", "judge_cache"),  # of a judge: they change no score
)


@dataclass
class DataArgs:
    dataset_name: str = field(
        default=at_root("data/rewarded.jsonl"),
        metadata={
            "help": "dpo: scored pairs; sft: problems with steps, or pairs; prm: values or labels of steps; ppo: values of steps "
            "or problems. A file, a folder, or the name of a data set on the hub, of any shape that reasoning/loaders.py knows"
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
        metadata={
            "help": "folder of the logs; a run writes <its name>/log.json and training.png there"
        },
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "replace what a finished or another training left in output_dir"},
    )

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"argument --limit: expected 1 or more, got {self.limit}")


def read_dataset(
    args: DataArgs, kinds: list[str], record_type: type[Record], made_by: str | None
) -> list[Record]:
    """All rows as records of `record_type`, made of the first of the loaders' `kinds` that the data set gives; every one checked.
    Raises RecordError or UserError, also for a row of a held-out problem. `made_by` is the command that makes the default file."""
    name, dropped = args.dataset_name, Counter()
    if made_by:
        check_input(name, made_by)
    held_out, records = held_out_prompts(), []
    for where, record in load_records(
        kinds, name, args.dataset_config, args.dataset_train_split, dropped
    ):
        try:
            records.append(record_type.from_row(asdict(record)))
        except RecordError as error:
            raise RecordError(f"{where}: {error}") from None
        if record.prompt in held_out:
            problem = f"a held-out problem ({held_out[record.prompt]})"
            raise UserError(f"{where}: {problem}; training on it would spoil every comparison")
    for reason, count in dropped.items():
        print(f"{count} rows of {name} left out: {reason}")
    return records


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written whole (its state file comes last)."""

    def is_whole(path: Path) -> bool:
        try:
            return bool(json.loads((path / "trainer_state.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return False

    whole = [
        path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit() and is_whole(path)
    ]
    return max(whole, key=lambda path: int(path.name[11:]), default=None)


def where_to_begin(folder: Path, job: dict, overwrite: bool, resume: str | None) -> Path | None:
    """The checkpoint to go on from, None to begin at the beginning. Raises UserError if the folder holds what must not be lost."""
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
            raise UserError(
                f"--resume_from_checkpoint {resume}: no whole checkpoint in {checkpoint or folder}"
            )
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


def write_model(trainer, folder: Path, card: str) -> None:
    """Model, tokenizer and card: written beside the checkpoints, then moved in, what marks them as finished last."""
    staging = folder / ".finished.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    trainer.save_model(str(staging))
    if trainer.is_world_process_zero():
        (staging / "README.md").write_text(card, encoding="utf-8")
        (staging / "training_args.bin").unlink(
            missing_ok=True
        )  # a pickle; JOB says the same in JSON
        shutil.rmtree(
            staging / "ref", ignore_errors=True
        )  # TRL's copy of the adapter that training started from
        for path in sorted(staging.iterdir(), key=lambda path: path.name in FINISHED):
            os.replace(path, folder / path.name)
        staging.rmdir()


def quiet() -> None:
    """What the libraries say that a user does not need."""
    import logging
    import warnings

    import datasets
    import transformers

    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)


def progress_bar(shown: dict[str, str]):
    """Trainer's progress bar with a few numbers beside it (name in the log -> word), not its long line at every log."""
    from transformers import ProgressCallback

    class Progress(ProgressCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if self.training_bar is not None and "loss" in logs:
                self.training_bar.set_postfix(
                    {word: f"{logs[name]:.3f}" for name, word in shown.items() if name in logs}
                )

    return Progress()


CARD = """---
library_name: {library}
tags: [{tags}]
---

# {name}

{base} after {what}.

| | first | last |
|---|---|---|
{table}

Steps: {steps}, seed {seed}, {seconds:.0f} s. Every setting is in `{job}`.
{use}
"""
ANSWERS = "The model answers the prompt template of `reasoning/steps.py`, one step a line, `Answer: ` last."


class Training:
    """One training, from parsed arguments to a written model. `config` is one of TRL's, `model_args` a ModelConfig, `rows` what
    `read_dataset` gave, and `noun` what they are called (pairs, solutions).

    Everything that a user can get wrong is found here, before anything is loaded or written: raises UserError."""

    def __init__(
        self,
        command: str,
        args: DataArgs,
        config,
        model_args,
        rows: list,
        noun: str,
        default_model: str,
    ):
        self.args, self.config, self.model_args, self.noun = args, config, model_args, noun
        self.folder, self.model = Path(config.output_dir), model_args.model_name_or_path
        self.log_file = (
            Path(args.logs_dir) / (config.run_name or self.folder.resolve().name) / "log.json"
        )
        check_model(
            self.model,
            "python utils/build_embedded_models.py" if self.model == default_model else None,
        )
        self.kept_out = [row for row in rows if is_kept_out(row.prompt)]
        self.rows = [row for row in rows if not is_kept_out(row.prompt)][: args.limit]
        if not self.rows or (config.eval_strategy != "no" and not self.kept_out):
            missing = "evaluation" if self.rows else "training"
            raise UserError(f"{args.dataset_name}: its {len(rows)} {noun} leave none for {missing}")
        if Path(self.model).is_dir():
            # an adapter names its base: by a path that holds everywhere on this machine
            self.model = str(Path(self.model).resolve())
            if self.folder.resolve() == Path(self.model):
                raise UserError(
                    f"--output_dir {self.folder} is the model that training starts from: give another one"
                )
        settings = {k: v for k, v in config.to_dict().items() if not k.startswith(NOT_THE_JOB)}
        digest = hashlib.sha256("".join(map(to_line, self.rows)).encode()).hexdigest()
        job = {
            "command": command,
            "dataset": args.dataset_name,
            noun: len(self.rows),
            f"{noun}_sha256": digest,
        }
        self.job = json.loads(
            json.dumps(
                {**job, **settings, **asdict(model_args), "model_name_or_path": self.model},
                default=str,
            )
        )
        self.checkpoint = where_to_begin(
            self.folder, self.job, args.overwrite, config.resume_from_checkpoint
        )
        check_output(str(self.log_file), overwrite=True)

    def build(self, make_trainer, needs_reference: bool = False, load=None):
        """make_trainer(model=..., args=..., train_dataset=..., eval_dataset=...), on a model whose weights are all there; more is
        given, and None for peft_config, where training starts from an adapter. load(name, model_args): what the trainer is given to
        start from, for a trainer that is no TRL's. Raises UserError if the model cannot be loaded, or not be trained as the
        arguments say."""
        quiet()
        from datasets import Dataset
        from safetensors import SafetensorError

        config, model_args = self.config, self.model_args
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(self.log_file.parent))
        try:
            start = load(self.model, model_args) if load else self._start(needs_reference)
            return make_trainer(
                **start,
                args=config,
                train_dataset=Dataset.from_list(list(map(asdict, self.rows))),
                eval_dataset=Dataset.from_list(list(map(asdict, self.kept_out)))
                if config.eval_strategy != "no"
                else None,
            )
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            raise UserError(
                f"{model_args.model_name_or_path}: cannot be trained so: {error}"
            ) from None

    def _start(self, needs_reference: bool) -> dict:
        """What one of TRL's trainers is given to start from: a name, found to hold all weights, or a loaded adapter."""
        from transformers import AutoModelForCausalLM

        from search.policy import base_of

        config, model_args = self.config, self.model_args
        hub = {"revision": model_args.model_revision, "trust_remote_code": config.trust_remote_code}
        config.model_init_kwargs = {
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
            **(config.model_init_kwargs or {}),
        }
        if base_of(self.model, model_args.model_revision)[1]:
            return self._adapter(needs_reference, hub)
        _, loading = AutoModelForCausalLM.from_pretrained(
            self.model, **hub, device_map="meta", output_loading_info=True
        )
        if loading["missing_keys"]:  # transformers would fill them with random numbers
            raise ValueError(f"weights are missing, {min(loading['missing_keys'])} for one")
        return {"model": self.model}

    def _adapter(self, needs_reference: bool, hub: dict) -> dict:
        """What a trainer is given to start from an adapter. With --use_peft the adapter goes on, and TRL keeps a copy of it as the
        reference. Else it is merged into its base (in float32: in 16 bits much of it would be rounded away), and its reference is
        a copy too: TRL would load one from disk, which is the base without the adapter."""
        import torch

        from search.policy import load_model

        config, model_args = self.config, self.model_args
        config.model_init_kwargs = None  # TRL's, for a model that it loads by name
        dtype = "float32" if model_args.dtype in (None, "auto") else model_args.dtype
        if model_args.use_peft:
            model, tokenizer = load_model(self.model, dtype, trainable=True, **hub)
        else:
            merging, tokenizer = load_model(self.model, "float32", **hub)
            model = (
                merging.merge_and_unload().to(getattr(torch, dtype)).requires_grad_(True)
            )  # PEFT had frozen the base
        if model_args.attn_implementation:
            model.set_attn_implementation(model_args.attn_implementation)
        reference = (
            {"ref_model": copy.deepcopy(model)}
            if needs_reference and not model_args.use_peft
            else {}
        )
        return {"model": model, "processing_class": tokenizer, "peft_config": None, **reference}

    def run(
        self,
        trainer,
        what: str,
        tags: str,
        shown: dict[str, str],
        in_bar: dict[str, str],
        use: str = ANSWERS,
        note: str = "",
    ) -> None:
        """Train, write model, card and log, and print the closing table. `what`, `tags` and `use` are the card's, `note` is said of
        the data; `shown` and `in_bar` say which numbers of the log stand in the table and beside the progress bar (name in the
        log -> words)."""
        from transformers import ProgressCallback

        config, model_args = self.config, self.model_args
        main_process = trainer.is_world_process_zero()
        say = print if main_process else lambda *_: None
        if main_process:
            if self.checkpoint is None:
                clear(self.folder)
            write_text(self.folder / JOB, [json.dumps(self.job, indent=1)])
        kept_out = (
            f"{len(self.kept_out)} more are kept out of all training (a tenth of all prompts)"
        )
        say(f"{len(self.rows)} {self.noun} of {self.args.dataset_name}; {kept_out}")
        if note:
            say(note)
        say(
            f"{config.device.type}, {'bf16 autocast' if config.bf16 else 'fp16 autocast' if config.fp16 else model_args.dtype}"
        )
        if "ref" in getattr(trainer.model, "peft_config", {}):
            say(
                f"going on with the adapter {self.model}, at its own rank and matrices: --lora_* are not used"
            )
        if self.checkpoint is not None:
            say(f"going on from {self.checkpoint}")
        elif config.save_strategy != "no":
            say(
                "if this is stopped, the same command (without --overwrite) goes on from the last checkpoint"
            )
        if (
            in_bar and not config.disable_tqdm
        ):  # a trainer that is not transformers' has a bar of its own
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(progress_bar(in_bar))

        started = time.monotonic()
        trainer.train(
            resume_from_checkpoint=None if self.checkpoint is None else str(self.checkpoint)
        )
        seconds = time.monotonic() - started

        state = trainer.state
        history = [log for log in state.log_history if "loss" in log]
        rows = [
            (word, history[0][name], history[-1][name])
            for name, word in shown.items()
            if history and name in history[0]
        ]
        what = f"{what} {len(self.rows)} {self.noun} of {Path(self.args.dataset_name).name}"
        card = CARD.format(
            library="peft" if model_args.use_peft else "transformers",
            tags=tags,
            name=self.folder.resolve().name,
            base=Path(self.model).name if Path(self.model).is_dir() else self.model,
            what=what,
            table="\n".join(f"| {word} | {first:.4g} | {last:.4g} |" for word, first, last in rows),
            steps=state.global_step,
            seed=config.seed,
            seconds=seconds,
            job=JOB,
            use=use,
        )
        write_model(trainer, self.folder, card)
        if main_process:
            log = {
                "job": self.job,
                "seconds": seconds,
                "steps": state.global_step,
                "history": state.log_history,
            }
            write_text(self.log_file, [json.dumps(log, indent=1)])
            from evaluation.plots import training_picture

            picture = self.log_file.with_name("training.png")
            drawn = training_picture(
                state.log_history, picture, f"{self.folder.resolve().name}: {what}"
            )
        say(f"\n{'':40}{'first':>10}{'last':>10}")
        for word, first, last in rows:
            say(f"{word:40}{first:10.3f}{last:10.3f}")
        say(f"{'seconds':40}{'':10}{seconds:10.0f}")
        if (
            history and "num_tokens" in history[-1]
        ):  # counted from where this run began; padding is not
            say(f"{'tokens a second':40}{'':10}{history[-1]['num_tokens'] / seconds:10.0f}")
        wrote = f"wrote the tuned {'adapter' if model_args.use_peft else 'model'} to {self.folder}, the log to {self.log_file}"
        say(wrote + (f", its picture to {picture}" if main_process and drawn else ""))
