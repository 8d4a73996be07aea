"""What all trainings share: arguments, data, resuming, and writing the model, its card and its log.

Each trainer module exports one `Recipe`, and `train` runs it. The training script passes two
functions from a higher layer: one plots the log, one measures accuracy.
"""

import copy
import json
import logging
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, ProgressCallback
from trl import ModelConfig, get_peft_config, get_quantization_config

from common.cli import check_different, check_input, check_model, hold_output, parse_args
from common.errors import UserError, first_line
from common.files import Readable, at_root, write_text
from common.identity import content_hash, identity, rows_hash
from common.outputs import release, was_killed
from common.progress import Bar, taking_long
from lm.known_words import tokens_of, warn_of_unknown_words
from lm.loading import (
    base_of,
    fit_tokenizer,
    load_model,
    load_tokenizer,
    load_weights,
    merge_adapter,
    pick_device,
)
from lm.prompting import set_prompts
from lm.registry import TemplateArgs, given_prompts
from reasoning.splits import is_kept_out
from reward_model.registry import JudgeArgs, check_judge, judge_files, judge_identity
from trainer.checkpoints import (
    IS_MAIN,
    JOB,
    AlreadyTrained,
    NoStepTooMany,
    PlainCheckpoints,
    checkpoint_to_resume,
    clear,
    job_in,
    staged_model,
    tidy_checkpoints,
)
from trainer.data import DataArgs, DataSet, mix, read_dataset
from trainer.hub import open_repo, push
from trainer.model_card import About, Figure, Use, model_card, policy_use
from trainer.settings_check import check_settings

# the way to share a model's weights between processes -> files of its checkpoints
SHARDED = {"FSDP": "pytorch_model_fsdp*", "DeepSpeed": "global_step*"}
# settings that do not change the weights: the names begin with one of these
NOT_THE_JOB = (
    *("logging", "log_", "hub_", "push_", "save_", "report_to", "run_name", "disable_tqdm"),
    *("output_dir", "resume", "eval", "ddp_"),
    *("threads", "judge_requests", "judge_cache"),
)
SETTINGS_IN_FILES = ("chat_template_path", "prompt_template", "deepspeed", "fsdp_config")
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Recipe:
    """Everything that distinguishes one command of train.py from the others."""

    command: str
    description: str  # the first line of --help
    config: type  # the dataclass of the command's own arguments
    record: type[Readable]  # the class of a row of the data
    noun: str  # the plural name of the rows: pairs, solutions
    kinds: tuple[str, ...]  # of records (reasoning/datasets/shapes.py), the preferred kind first
    data: str  # the default data set
    made_by: str  # the command that makes the default data set
    output_dir: str
    make_trainer: Callable[["Training"], Any]
    title: Callable[[Any], str]  # config -> the start of a title that ends in "512 pairs of ..."
    tags: str  # of the model card
    columns: dict[str, str]  # log key -> words, of the closing table
    bar: dict[str, str] = field(default_factory=dict)  # log key -> word, beside the progress bar
    model: str = "models/policy-mini"  # the default model to start from
    use: Callable[[Any, Any, bool], Use] = policy_use  # of the card
    read: Callable[["Recipe", DataSet], list] = read_dataset
    # the last log entry -> what is wrong with the finished training, or nothing
    warning: Callable[[dict[str, float]], str] = lambda last: ""


def train(
    recipe: Recipe,
    argv: list[str],
    plot: Callable[[Sequence[dict], Path, str], bool] | None = None,
    accuracy: Callable[[str, int], Callable] | None = None,
    callbacks: Sequence[Any] = (),
) -> None:
    """Train by a recipe and arguments from a command line; write the model, its card and the log.

    plot(log history, path, title): draws the log, returns False if there is nothing to draw.
    accuracy(file of problems, limit): returns a function that measures a policy's greedy accuracy.
    callbacks: for transformers' trainers. Raises UserError."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    device, bf16 = pick_device()
    defaults = {
        "dataset_name": [at_root(recipe.data)],
        "model_name_or_path": at_root(recipe.model),
        "output_dir": at_root(recipe.output_dir),
        "use_cpu": device == "cpu",
        "bf16": bf16,
    }
    classes = (DataArgs, recipe.config, ModelConfig)
    shown = {"description": recipe.description, "command": recipe.command}
    args, config, model_args = parse_args(*classes, **shown, args=argv, defaults=defaults)
    check_settings(config, model_args)
    if args.dataset_name == defaults["dataset_name"]:
        check_input(args.dataset_name[0], recipe.made_by)
    with ExitStack() as stack:
        stack.callback(release)
        if IS_MAIN:
            was_killed(Path(config.output_dir, JOB))  # another process is told before it reads
        sets = [recipe.read(recipe, data) for data in args.data_sets]
        training = Training(recipe, args, config, model_args, sets, stack, accuracy)
        training.run(training.build(), plot, callbacks)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # torch warns if nobody does


class Training:
    """One training, from parsed arguments to a written model.

    config: an instance of recipe.config; model_args: TRL's ModelConfig; sets: the rows of each data
    set, as recipe.read returns them; stack: closes what a trainer opens. The constructor checks the
    arguments before anything is loaded or written: it raises UserError."""

    def __init__(
        self,
        recipe: Recipe,
        args: DataArgs,
        config: Any,
        model_args: Any,
        sets: list[list],
        stack: ExitStack,
        accuracy: Callable[[str, int], Callable] | None = None,
    ):
        self.recipe, self.args, self.config, self.model_args = recipe, args, config, model_args
        self.stack, self.accuracy = stack, accuracy
        self.folder, self.model = Path(config.output_dir), model_args.model_name_or_path
        run_name = config.run_name or self.folder.resolve().name
        # the log lies in a folder of this name in logs_dir
        if run_name != Path(run_name).name or run_name == "..":
            raise UserError(f"argument --run_name: expected a name, got the path {run_name}")
        self.log_file = Path(args.logs_dir) / run_name / "log.json"
        self.picture = self.log_file.with_name("training.png")
        check_model(self.model, "make models" if self.model == at_root(recipe.model) else None)
        self.kept_out = [row for rows in sets for row in rows if is_kept_out(row.prompt)]
        self.sets = [[row for row in rows if not is_kept_out(row.prompt)] for rows in sets]
        mixed = mix(self.sets, args.dataset_weights, config.seed)[: args.limit]
        self.rows = [row for _, row in mixed]
        self.used = Counter(number for number, _ in mixed)  # number of a data set -> of its rows
        self._check_rows()
        if Path(self.model).is_dir():
            # absolute, because an adapter stores the path of its base
            self.model = str(Path(self.model).resolve())
            if self.folder.resolve() == Path(self.model):
                raise UserError(
                    f"--output_dir {self.folder} is the model that training starts from: "
                    "give another one"
                )
        self._check_files()
        self.pushes = getattr(config, "push_to_hub", False)
        if self.pushes:
            config.push_to_hub = False  # transformers' own: see trainer/hub.py
        self.job = self._job()
        resume = config.resume_from_checkpoint
        self.checkpoint = checkpoint_to_resume(self.folder, self.job, args.overwrite, resume)
        if IS_MAIN:
            for path in (self.folder / JOB, self.log_file, self.picture):
                hold_output(path)

    def _check_rows(self) -> None:
        """Raises UserError if nothing is left to train on, to evaluate on, or of a data set."""
        names, noun = self.args.dataset_name, self.recipe.noun
        evaluates = self.config.eval_strategy != "no"
        if not self.rows or (evaluates and not self.kept_out):
            missing = "evaluation" if self.rows else "training"
            count = len(self.kept_out) + sum(map(len, self.sets))
            raise UserError(f"{', '.join(names)}: its {count} {noun} leave none for {missing}")
        for number, (name, rows) in enumerate(zip(names, self.sets, strict=True)):
            if not self.used[number]:
                raise UserError(
                    f"{name}: none of its {len(rows)} {noun} is trained on: give it a larger share "
                    "with --dataset_weights, a larger --limit, or leave it out"
                )

    def _check_files(self) -> None:
        """Raises UserError if an output is an input, or if the log would replace another one."""
        config = self.config
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file, expected a folder to write the model to")
        read = [*self.args.dataset_name, self.model, getattr(config, "eval_problems", None)]
        read += [getattr(config, name, None) for name in SETTINGS_IN_FILES]
        if isinstance(config, JudgeArgs):
            check_judge(config)
            read += judge_files(config)
        read = [path for path in read if isinstance(path, str)]
        check_different([self.folder, self.log_file, self.picture], read)
        if not (self.log_file.exists() or self.picture.exists()):
            return
        try:
            owner = json.loads(self.log_file.read_text(encoding="utf-8")).get("output_dir")
        except (OSError, ValueError, AttributeError):
            owner = None
        is_own = owner == str(self.folder.resolve())
        is_nobodys = not (isinstance(owner, str) and Path(owner).exists())
        if not is_own and not (self.args.overwrite and is_nobodys):
            of = f" (of {owner})" if owner else ""
            raise UserError(
                f"{self.log_file.parent} holds the log of another training{of}: give another "
                "--run_name or --logs_dir" + (", or --overwrite" if is_nobodys else "")
            )

    def _job(self) -> dict:
        """The command, the data, and all settings and files that change the trained weights."""
        noun, settings = self.recipe.noun, self.config.to_dict()
        sets = self.args.data_sets
        counts = {data.label: self.used[number] for number, data in enumerate(sets)}
        contents = {"model": identity(self.model, self.model_args.model_revision)}
        if isinstance(self.config, TemplateArgs):
            given_prompts(self.config)  # checked before any work
        if isinstance(self.config, JudgeArgs):
            contents |= judge_identity(self.config)
        for name in SETTINGS_IN_FILES:
            if isinstance(path := getattr(self.config, name, None), str):
                contents[name] = content_hash(path) or path
        job = {
            "command": self.recipe.command,
            "dataset": sets[0].name if len(sets) == 1 else counts,
            noun: len(self.rows),
            f"{noun}_sha256": rows_hash(self.rows),
            **{k: v for k, v in settings.items() if not k.startswith(NOT_THE_JOB)},
            **asdict(self.model_args),
            "processes": PROCESSES,
            "model_name_or_path": self.model,
            "contents": contents,
        }
        return json.loads(json.dumps(job, default=str))

    # --- the trainer ---

    def build(self) -> Any:
        """Make the trainer. Raises UserError if the model cannot be loaded or trained this way."""
        silence_libraries()
        if getattr(self.config, "ddp_find_unused_parameters", False) is None:
            # the losses reach all weights; torch warns of a slower search that finds none unused
            self.config.ddp_find_unused_parameters = False
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(self.log_file.parent))
        try:
            with taking_long(f"loading {self.model} and preparing {len(self.rows)} rows"):
                return self.recipe.make_trainer(self)
        except UserError:
            raise
        except (
            *(OSError, ValueError, RuntimeError, ImportError, SafetensorError, ArithmeticError),
            *(AttributeError, LookupError, TypeError),
        ) as error:  # the libraries raise any of these for a setting or a model
            name = self.model_args.model_name_or_path
            raise UserError(f"{name}: cannot be trained this way: {error}") from None

    def datasets(self) -> dict[str, Any]:
        """`train_dataset`, and `eval_dataset` of the kept-out rows (None without evaluation)."""

        def as_dataset(rows: list) -> Dataset:
            return Dataset.from_list(list(map(asdict, rows)))

        evaluates = self.config.eval_strategy != "no"
        return {
            "train_dataset": as_dataset(self.rows),
            "eval_dataset": as_dataset(self.kept_out) if evaluates else None,
        }

    def weights_dtype(self, kind: str) -> Any:
        """The torch.dtype in which the model to start from is loaded.

        kind: the kind of model, for the message. Raises ValueError for --load_in_4bit and
        --load_in_8bit."""
        args = self.model_args
        if args.load_in_4bit or args.load_in_8bit:
            raise ValueError(
                f"{kind} is not trained on quantized weights: leave out --load_in_4bit and "
                "--load_in_8bit"
            )
        return getattr(torch, "float32" if args.dtype in (None, "auto") else args.dtype)

    def set_attention(self, model: Any) -> None:
        """Apply --attn_implementation to a loaded model."""
        if self.model_args.attn_implementation:
            model.set_attn_implementation(self.model_args.attn_implementation)

    def set_prompts(self, tokenizer: Any) -> None:
        """Apply --system_prompt and --prompt_template to the tokenizer, which is saved with them.

        Raises UserError."""
        if isinstance(self.config, TemplateArgs):
            set_prompts(tokenizer, given_prompts(self.config))

    def start_model(
        self, model: Any, tokenizer: Any, convert: Callable[[Any, Any], Any] | None = None
    ) -> dict[str, Any]:
        """The model to start from, as arguments of a trainer.

        convert(model, tokenizer): makes the loaded model into one that the trainer trains; None if
        it is one already. With --use_peft the adapter of such a model is trained further. Any other
        adapter is merged into its base. Raises ValueError for --use_peft with an adapter to
        convert."""
        self.set_prompts(tokenizer)
        peft_config = self._new_adapter(model.config.model_type)
        if is_peft_model(model) and self.model_args.use_peft:
            if convert:
                raise ValueError(
                    "it is an adapter, and a new adapter needs a base that is on disk: leave out "
                    "--use_peft"
                )
            peft_config = None
        else:
            model = merge_adapter(model)
        if convert:
            model = convert(model, tokenizer)
        self.set_attention(model)
        return {"model": model, "processing_class": tokenizer, "peft_config": peft_config}

    def start_policy(self, needs_reference: bool = False) -> dict[str, Any]:
        """The model to start from, as arguments of TRL's trainers: a name, or a loaded adapter.

        needs_reference: the trainer compares the policy with a reference. Raises ValueError if
        weights are missing."""
        config, args = self.config, self.model_args
        hub = {"revision": args.model_revision, "trust_remote_code": config.trust_remote_code}
        start: dict[str, Any] = {
            "peft_config": None,
            "quantization_config": get_quantization_config(args),
        }
        if base_of(self.model, args.model_revision)[1]:
            config.model_init_kwargs = None  # TRL refuses it for a loaded model
            return start | self._adapter(needs_reference, hub)
        config.model_init_kwargs = {
            "revision": args.model_revision,
            "attn_implementation": args.attn_implementation,
            "dtype": args.dtype,
            **(config.model_init_kwargs or {}),
            "use_safetensors": True,
        }
        # on the meta device: this only checks the weights and the tokenizer
        model = load_weights(AutoModelForCausalLM, self.model, device_map="meta", **hub)
        tokenizer = fit_tokenizer(load_tokenizer(self.model, **hub), model)
        self.set_prompts(tokenizer)
        start["peft_config"] = self._new_adapter(model.config.model_type)
        return start | {"model": self.model, "processing_class": tokenizer}

    def _new_adapter(self, model_type: str) -> Any:
        """The configuration of the adapter that --use_peft asks for, or None.

        Where PEFT knows no usual layers of this type of model, all linear layers are adapted."""
        config = get_peft_config(self.model_args)
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        if config is not None and config.target_modules is None and model_type not in known:
            config.target_modules = "all-linear"
        return config

    def _adapter(self, needs_reference: bool, hub: dict) -> dict[str, Any]:
        """The arguments of TRL's trainers to start from an adapter.

        With --use_peft the adapter itself is trained, and TRL keeps a copy of it as the reference.
        Without it the adapter is merged into its base, in float32, because 16 bits would round much
        of it away. The reference is then a copy of the merged model, because TRL would load it from
        disk: the base without the adapter."""
        args = self.model_args
        dtype = "float32" if args.dtype in (None, "auto") else args.dtype
        if args.use_peft:
            model, tokenizer = load_model(self.model, dtype, trainable=True, **hub)
        else:
            model, tokenizer = load_model(self.model, "float32", **hub)
            model = merge_adapter(model, getattr(torch, dtype))
        self.set_attention(model)
        self.set_prompts(tokenizer)
        reference = {}
        if needs_reference and not args.use_peft:
            reference = {"ref_model": copy.deepcopy(model)}
        return {"model": model, "processing_class": tokenizer, "peft_config": None, **reference}

    # --- the run ---

    def run(self, trainer: Any, plot: Callable | None = None, callbacks: Sequence = ()) -> None:
        """Train, write model, card and log, and print the closing table."""
        config, recipe = self.config, self.recipe
        main_process = trainer.is_world_process_zero()
        self._check_checkpoint(trainer)
        say = print if main_process else lambda *_: None
        if main_process:
            if self.checkpoint is None:
                clear(self.folder)
            elif self.checkpoint.resolve().parent == self.folder.resolve():
                best = getattr(config, "load_best_model_at_end", False)
                tidy_checkpoints(self.folder, None if best else config.save_total_limit)
            write_text(self.folder / JOB, [json.dumps(self.job, indent=1)])
        note = getattr(trainer, "balance", "")
        self._announce(trainer, note, say)
        # now, because an error would lose a finished training
        use = recipe.use(trainer.model, trainer.processing_class, self.model_args.use_peft)
        repo = open_repo(config, self.folder) if self.pushes and main_process else ""
        if isinstance(trainer, transformers.Trainer):
            trainer.add_callback(PlainCheckpoints())
            trainer.add_callback(NoStepTooMany())
        for callback in callbacks:
            trainer.add_callback(callback)
        # step PPO shows a progress bar of its own
        if recipe.bar and not config.disable_tqdm:
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(ProgressBar(recipe.bar))

        started = time.monotonic()
        checkpoint = None if self.checkpoint is None else str(self.checkpoint)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except AlreadyTrained:
            if config.load_best_model_at_end:
                trainer._load_best_model()
        except Exception as error:
            name = "metric_for_best_model" if "metric_for_best_model" in str(error) else None
            is_known = isinstance(error, UserError | OSError)  # a full disk is no compiler's error
            if getattr(config, "torch_compile", False) and not is_known:
                name = "torch_compile"  # the compiler raises many kinds of errors
            if "find_unused_parameters" in str(error):
                raise UserError(
                    "argument --ddp_find_unused_parameters: the loss does not reach all weights of "
                    "this model: give true"
                ) from None
            if name is None:
                raise
            raise UserError(f"argument --{name}: {first_line(error)}") from None
        seconds = time.monotonic() - started

        state = trainer.state
        history = [log for log in state.log_history if "loss" in log]
        rows = []
        for name, word in recipe.columns.items():
            values = [log[name] for log in history if name in log]
            if values:
                rows.append((name, word, values[0], values[-1]))
        title = f"{recipe.title(config)} {len(self.rows)} {recipe.noun} of {self._data(short=True)}"
        drawn = False
        card = self._card(title, use, rows, state.global_step, seconds, note)
        with (
            taking_long(f"writing {self.folder}"),
            staged_model(trainer, self.folder, card) as files,
        ):
            if main_process:
                log: dict[str, Any] = {"output_dir": str(self.folder.resolve()), "job": self.job}
                log |= {"seconds": seconds, "steps": state.global_step}
                log["history"] = state.log_history
                write_text(self.log_file, [json.dumps(log, indent=1)])
                name = self.folder.resolve().name
                drawn = bool(plot and plot(state.log_history, self.picture, f"{name}: {title}"))
                if not drawn:
                    self.picture.unlink(missing_ok=True)  # of an earlier training
        say(f"\n{'':40}{'first':>10}{'last':>10}")
        for _, word, first, last in rows:
            say(f"{word:40}{first:10.3f}{last:10.3f}")
        say(f"{'seconds':40}{'':10}{seconds:10.0f}")
        if history and "num_tokens" in history[-1]:  # of this run alone; without padding
            say(f"{'tokens a second':40}{'':10}{history[-1]['num_tokens'] / seconds:10.0f}")
        if warning := recipe.warning(history[-1]) if history else "":
            say(f"warning: {warning}")
        kind = "adapter" if self.model_args.use_peft else "model"
        wrote = f"wrote the tuned {kind} to {self.folder}, the log to {self.log_file}"
        say(wrote + (f", its picture to {self.picture}" if drawn else ""))
        if repo:
            with taking_long(f"pushing {self.folder} to {repo}"):
                say(f"pushed it: {push(config, self.folder, repo, files)}")

    def _check_checkpoint(self, trainer: Any) -> None:
        """Raises UserError for a checkpoint of FSDP or DeepSpeed to resume without it, or for one
        without them to resume with one: their files differ."""
        if self.checkpoint is None:
            return
        before = next((k for k, file in SHARDED.items() if any(self.checkpoint.glob(file))), "DDP")
        now = [k for k in SHARDED if getattr(trainer, f"is_{k.lower()}_enabled", False)]
        if now != [before] * (before in SHARDED):
            way = before if before in SHARDED else "neither FSDP nor DeepSpeed"
            raise UserError(f"{self.checkpoint} is of a training with {way}: resume it in this way")
        count = job_in(self.checkpoint.resolve().parent).get("processes", PROCESSES)
        if before == "DeepSpeed" and count != PROCESSES:
            raise UserError(
                f"{self.checkpoint}: DeepSpeed resumes on as many processes as before ({count}), "
                f"not on {PROCESSES}"
            )

    def _announce(self, trainer: Any, note: str, say: Callable) -> None:
        """Print the data, the precision, and how the training can be resumed."""
        config = self.config
        say(
            f"{len(self.rows)} {self.recipe.noun} of {self._data()}; "
            f"{len(self.kept_out)} more are kept out of all training (a tenth of all prompts)"
        )
        if unused := sum(map(len, self.sets)) - len(self.rows):
            given = {"--dataset_weights": self.args.dataset_weights, "--limit": self.args.limit}
            why = " and ".join(flag for flag, value in given.items() if value is not None)
            say(f"{unused} more are not used, because of {why}")
        if note:
            say(note)
        precision = self.model_args.dtype
        if config.bf16 or config.fp16:
            precision = f"{'bf16' if config.bf16 else 'fp16'} autocast"
        say(f"{config.device.type}, {precision}{_spread(trainer)}")
        if say is print:
            warn_of_unknown_words(
                partial(tokens_of, trainer.processing_class),
                f"model {self.model_args.model_name_or_path}",
                [row.prompt for row in self.rows],
                "start from a model that has learned such text, --model_name_or_path MODEL",
            )
        if "ref" in getattr(trainer.model, "peft_config", {}):
            say(f"training the adapter {self.model} further: --lora_* are not used")
        if self.checkpoint is not None:
            say(f"resuming from {self.checkpoint}")
        elif config.save_strategy != "no":
            say("if this is stopped, the same command resumes from the last checkpoint")

    def _data(self, short: bool = False) -> str:
        """The names of the data sets, each with the number of its rows if there are several.

        short: without their folders."""
        sets = self.args.data_sets
        names = [sets[0].name] if len(sets) == 1 else [data.label for data in sets]
        if short:
            names = [Path(name).name for name in names]
        if len(names) == 1:
            return names[0]
        return " and ".join(f"{name} ({self.used[number]})" for number, name in enumerate(names))

    def _card(self, title: str, use: Use, rows: list, steps: int, seconds: float, note: str) -> str:
        """The model card. rows: (log key, word, first, last) of the closing table."""
        recipe = self.recipe
        about = About(
            name=self.folder.resolve().name,
            base=self.model,
            data=self.args.dataset_name[0] if len(self.sets) == 1 else self._data(short=True),
            split="train",
            library="peft" if self.model_args.use_peft else "transformers",
            tags=recipe.tags.split(", "),
        )
        training = [
            f"- Base model: {about.base_name}.",
            f"- Data: {len(self.rows)} {recipe.noun} of {self._data(short=True)}."
            + f" {note}." * bool(note),
            f"- {steps} steps, seed {self.config.seed}, {seconds:.0f} s.",
            f"- Every setting is in `{JOB}`, in the folder of the training.",
        ]
        table = [
            "Of the training batches, at the first and at the last log:\n",
            "| | first | last |\n|---|---|---|",
            *(f"| {word} | {first:.4g} | {last:.4g} |" for _, word, first, last in rows),
        ]
        return model_card(
            about,
            f"{about.base_name} after {title}.",
            use,
            "\n".join(training),
            [Figure(kind, word, last) for kind, word, _, last in rows],
            "\n".join(table),
        )


def _spread(trainer: Any) -> str:
    """How a training is spread over processes, as the end of a line; empty if there is only one."""
    accelerator = trainer.accelerator
    kind = accelerator.distributed_type.value.replace("_", " ")  # FSDP, DEEPSPEED, MULTI GPU ...
    if kind == "NO":
        return ""
    count = f"{accelerator.num_processes} process" + "es" * (accelerator.num_processes > 1)
    if kind in ("FSDP", "DEEPSPEED"):
        return f", {count} ({kind.replace('SPEED', 'Speed')})"
    wanted = [k for k in SHARDED if os.environ.get(f"ACCELERATE_USE_{k.upper()}") == "true"]
    not_used = f"; {wanted[0]} needs GPUs and is not used" if wanted else ""
    return f", {count} (DDP){not_used}"


# --- the libraries' output ---


def silence_libraries() -> None:
    """Turn off progress bars and warnings of the libraries."""
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)


class ProgressBar(ProgressCallback):
    """A bar with a few numbers beside it (log key -> word), not the whole log as a line.

    Off a terminal it is one line; the bars of evaluations are for terminals only."""

    def __init__(self, shown: dict[str, str]):
        super().__init__()
        self.shown = shown

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.current_step = done = state.global_step
        if state.is_world_process_zero:
            options = {"desc": "training", "unit": "step", "dynamic_ncols": True}
            self.training_bar = Bar(total=state.max_steps, initial=done, **options)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        if sys.stderr.isatty():
            super().on_prediction_step(*args, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in logs:
            numbers = {word: logs[name] for name, word in self.shown.items() if name in logs}
            self.training_bar.set_postfix({w: f"{value:.3f}" for w, value in numbers.items()})
