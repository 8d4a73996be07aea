"""Training, every kind of it: python train.py [COMMAND] ...

python train.py                      stepwise DPO of models/policy-mini on data/rewarded.jsonl
python train.py dpo --help           all of its arguments
"""

import hashlib
import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from reasoning.records import RecordError, ScoredPair, is_kept_out, read_records, to_line, write_text
from utils.cli import UserError, at_root, check_input, check_model, check_output, held_out_prompts, parse_args, run

HELP = """usage: python train.py [COMMAND] [ARGUMENTS]

commands:
  dpo    stepwise DPO on pairs whose steps a judge has scored (the default)

main arguments of dpo (all of them: python train.py dpo --help):
  --dataset_name FILE_OR_NAME    scored pairs: a JSONL file or a hub name      [data/rewarded.jsonl]
  --model_name_or_path MODEL     the policy to start from, and the reference   [models/policy-mini]
  --output_dir FOLDER            where the tuned model goes                    [saved_model/stepwise_dpo_tinyllama]
  --config FILE.yaml             arguments from a file; flags beat it
  --loss_type LOSS [LOSS ...]    stepwise, mixed with sigmoid or sft; or TRL's own
  --credit, --step_agg, --margin_gamma, --anchor_lambda, --beta    the stepwise loss (trainer/losses.py)
  --learning_rate, --num_train_epochs, --per_device_train_batch_size, --seed
  --use_peft                     train a LoRA adapter only
  --overwrite                    replace a finished model
  --resume_from_checkpoint true  go on from the last checkpoint
"""

JOB = "training_job.json"  # in the output folder: what this training is, so that the same command resumes it
FINISHED = ("config.json", "adapter_config.json")  # one of them is written last of all
WRITTEN = ("checkpoint-*", "*.safetensors", "*.safetensors.index.json", "*.bin", "tokenizer*", JOB, "README.md", *FINISHED)
NOT_THE_JOB = ("logging", "log_", "hub_", "push_", "save_", "report_to", "run_name", "disable_tqdm", "output_dir", "resume", "eval")


@dataclass
class DataArgs:
    dataset_name: str = field(
        default=at_root("data/rewarded.jsonl"),
        metadata={"help": "scored pairs: a JSONL file, or the name of a data set on the hub"},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a hub data set"})
    dataset_train_split: str = field(default="train", metadata={"help": "split of a hub data set"})
    limit: int | None = field(default=None, metadata={"help": "train on the first LIMIT pairs; on all if not given"})
    logs_dir: str = field(default=at_root("logs"), metadata={"help": "folder of the logs; a run writes <its name>/log.json there"})
    overwrite: bool = field(default=False, metadata={"help": "replace what a finished or another training left in output_dir"})

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"argument --limit: expected 1 or more, got {self.limit}")


def read_pairs(args: DataArgs) -> list[ScoredPair]:
    """All pairs, every row checked. Raises RecordError or UserError, also for a pair of a held-out problem."""
    name = args.dataset_name
    if Path(name).exists() or name.endswith((".jsonl", ".json")) or name.startswith((".", "/")) or name.count("/") > 1:
        check_input(name, "python reward_model/evaluate_steps.py" if name == DataArgs.dataset_name else None)
        pairs = list(read_records(name, ScoredPair))
    else:
        from datasets import load_dataset

        try:
            rows = load_dataset(name, args.dataset_config, split=args.dataset_train_split)
        except (OSError, ValueError) as error:
            raise UserError(f"data set {name}: neither a file nor found on the hub ({error})") from None
        pairs = []
        for number, row in enumerate(rows, 1):
            try:
                pairs.append(ScoredPair.from_row(dict(row)))
            except RecordError as error:
                raise RecordError(f"{name}, row {number}: {error}") from None
    held_out = held_out_prompts()
    for number, pair in enumerate(pairs, 1):
        if pair.prompt in held_out:
            where = f"{name}, row {number}: a held-out problem ({held_out[pair.prompt]})"
            raise UserError(f"{where}; training on it would spoil every comparison")
    return pairs


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written whole (its state file comes last)."""

    def is_whole(path: Path) -> bool:
        try:
            return bool(json.loads((path / "trainer_state.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return False

    whole = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit() and is_whole(path)]
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
        raise UserError(f"{folder} holds the finished model of another training: give another --output_dir")
    if resume:
        checkpoint = last_checkpoint(folder) if str(resume).lower() == "true" else Path(resume)
        if checkpoint is None or not (checkpoint / "trainer_state.json").is_file():
            raise UserError(f"--resume_from_checkpoint {resume}: no whole checkpoint in {checkpoint or folder}")
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
        (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle; JOB says the same in JSON
        for path in sorted(staging.iterdir(), key=lambda path: path.name in FINISHED):
            os.replace(path, folder / path.name)
        staging.rmdir()


CARD = """---
library_name: {library}
tags: [trl, dpo, stepwise-dpo, reasoning]
---

# {name}

{base} after stepwise DPO ({loss}) on {pairs} pairs of {dataset}, whose steps a judge has scored.

| | first | last |
|---|---|---|
{table}

Steps: {steps}, seed {seed}, {seconds:.0f} s. Every setting is in `{job}`.
The model answers the prompt template of `reasoning/steps.py`, one step a line, `Answer: ` last.
"""

SHOWN = {  # what the closing table shows: name in the log -> in words
    "loss": "loss",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "pairs told apart",
    "logps/chosen_vs_ref": "log-prob of chosen against reference",
    "logps/rejected_vs_ref": "log-prob of rejected against reference",
}


def progress_bar():
    """Trainer's progress bar with three numbers beside it, where Trainer prints a long line at every log."""
    from transformers import ProgressCallback

    class Progress(ProgressCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if self.training_bar is not None and "loss" in logs:
                shown = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
                self.training_bar.set_postfix({word: f"{logs[name]:.3f}" for name, word in shown.items() if name in logs})

    return Progress()


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


def train_dpo(argv: list[str]) -> None:
    """Stepwise DPO, or any other loss of StepwiseDPOTrainer: scored pairs -> tuned policy."""
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' notes to each other, before `quiet` below
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from trl import ModelConfig

    from search.policy import pick_device
    from trainer.stepwise_dpo_trainer import StepwiseDPOConfig

    device, bf16 = pick_device()
    defaults = {
        "model_name_or_path": at_root("models/policy-mini"),
        "output_dir": at_root("saved_model/stepwise_dpo_tinyllama"),
        "use_cpu": device == "cpu",
        "bf16": bf16,
    }
    args, config, model_args = parse_args(
        *(DataArgs, StepwiseDPOConfig, ModelConfig), description="Stepwise DPO on scored pairs.", args=argv, defaults=defaults
    )

    # everything a user can get wrong is found before anything is loaded or written
    folder, model = Path(config.output_dir), model_args.model_name_or_path
    run_name = config.run_name or folder.resolve().name
    log_file = Path(args.logs_dir) / run_name / "log.json"
    is_default = model == defaults["model_name_or_path"]
    check_model(model, "python utils/build_embedded_models.py" if is_default else None)
    pairs = read_pairs(args)
    kept_out = [pair for pair in pairs if is_kept_out(pair.prompt)]
    training = [pair for pair in pairs if not is_kept_out(pair.prompt)][: args.limit]
    if not training or (config.eval_strategy != "no" and not kept_out):
        raise UserError(f"{args.dataset_name}: its {len(pairs)} pairs leave none for {'evaluation' if training else 'training'}")
    if Path(model).is_dir():
        model = str(Path(model).resolve())  # an adapter names its base: by a path that holds everywhere on this machine
        if folder.resolve() == Path(model):
            raise UserError(f"--output_dir {folder} is the model that training starts from: give another one")
    settings = {k: v for k, v in config.to_dict().items() if not k.startswith(NOT_THE_JOB)}
    digest = hashlib.sha256("".join(map(to_line, training)).encode()).hexdigest()
    job = {"command": "dpo", "dataset": args.dataset_name, "pairs": len(training), "pairs_sha256": digest}
    job = json.loads(json.dumps({**job, **settings, **asdict(model_args), "model_name_or_path": model}, default=str))
    checkpoint = where_to_begin(folder, job, args.overwrite, config.resume_from_checkpoint)
    check_output(str(log_file), overwrite=True)

    quiet()
    from datasets import Dataset
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, ProgressCallback
    from trl import get_peft_config, get_quantization_config

    from trainer.stepwise_dpo_trainer import StepwiseDPOTrainer

    config.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(config.model_init_kwargs or {}),
    }
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(log_file.parent))
    try:
        hub = {"revision": model_args.model_revision, "trust_remote_code": config.trust_remote_code}
        _, loading = AutoModelForCausalLM.from_pretrained(model, **hub, device_map="meta", output_loading_info=True)
        if loading["missing_keys"]:  # transformers would fill them with random numbers
            raise ValueError(f"weights are missing, {min(loading['missing_keys'])} for one")
        trainer = StepwiseDPOTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(list(map(asdict, training))),
            eval_dataset=Dataset.from_list(list(map(asdict, kept_out))) if config.eval_strategy != "no" else None,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"{model_args.model_name_or_path}: cannot be trained so: {error}") from None

    main_process = trainer.is_world_process_zero()
    say = print if main_process else lambda *_: None
    if main_process:
        if checkpoint is None:
            clear(folder)
        write_text(folder / JOB, [json.dumps(job, indent=1)])
    say(f"{len(training)} pairs of {args.dataset_name}; {len(kept_out)} more are kept out of all training (a tenth of all prompts)")
    say(f"{config.device.type}, {'bf16 autocast' if config.bf16 else 'fp16 autocast' if config.fp16 else model_args.dtype}")
    if checkpoint is not None:
        say(f"going on from {checkpoint}")
    elif config.save_strategy != "no":
        say("if this is stopped, the same command (without --overwrite) goes on from the last checkpoint")
    if not config.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(progress_bar())

    started = time.monotonic()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.monotonic() - started

    history = [log for log in trainer.state.log_history if "loss" in log]
    rows = [(word, history[0][name], history[-1][name]) for name, word in SHOWN.items() if history and name in history[0]]
    card = CARD.format(
        library="peft" if model_args.use_peft else "transformers",
        name=folder.resolve().name,
        base=Path(model).name if Path(model).is_dir() else model,
        loss=" + ".join(config.loss_type) + (f", credit {config.credit}" if config.has_step_loss else ""),
        pairs=len(training),
        dataset=Path(args.dataset_name).name,
        table="\n".join(f"| {word} | {first:.4g} | {last:.4g} |" for word, first, last in rows),
        steps=trainer.state.global_step,
        seed=config.seed,
        seconds=seconds,
        job=JOB,
    )
    write_model(trainer, folder, card)
    if main_process:
        log = {"job": job, "seconds": seconds, "steps": trainer.state.global_step, "history": trainer.state.log_history}
        write_text(log_file, [json.dumps(log, indent=1)])
    say(f"\n{'':40}{'first':>10}{'last':>10}")
    for word, first, last in rows:
        say(f"{word:40}{first:10.3f}{last:10.3f}")
    say(f"{'seconds':40}{'':10}{seconds:10.0f}")
    say(f"wrote the tuned {'adapter' if model_args.use_peft else 'model'} to {folder}, the log to {log_file}")


COMMANDS = {"dpo": train_dpo}


def main() -> None:
    argv = sys.argv[1:]
    if argv[:1] in (["-h"], ["--help"]):
        print(HELP, end="")
        return
    command = argv.pop(0) if argv and not argv[0].startswith("-") else "dpo"
    if command not in COMMANDS:
        raise UserError(f"unknown command {command}: expected one of {', '.join(COMMANDS)} (see --help)")
    COMMANDS[command](argv)


if __name__ == "__main__":
    run(main)
