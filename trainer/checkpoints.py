"""The output folder of a training: its job, its checkpoints, and its finished model."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from common.cli import holds_something
from common.errors import UserError
from common.files import TRAINING_JOB
from common.outputs import was_killed

JOB = TRAINING_JOB  # in the output folder, so that the same command resumes it
# the last file of a finished training
FINISHED = ("config.json", "adapter_config.json")
# in the output folder: the finished model, until all its files are in their places
STAGING = ".finished.tmp"
# all files of a training but its job, for `clear`: first those that say that it has finished
WRITTEN = (
    *(*FINISHED, "checkpoint-*", "*.safetensors", "*.safetensors.index.json", "*.bin"),
    *("tokenizer*", "chat_template.jinja", "generation_config.json", "README.md"),
)
# their product is the number of rows of an update, however many processes share the work
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")
# where something was read from; what it held is in the job as well
PATHS = ("dataset", "model_name_or_path", "judge_path", "judge_problems", "judge_labels")
# of the processes that torchrun or accelerate starts
IS_MAIN = os.environ.get("RANK", "0") == "0"


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that is complete: its state file, which is written last, can be read."""
    return max(_checkpoints(folder)[0], key=_number, default=None)


def tidy_checkpoints(folder: Path, limit: int | None) -> None:
    """Remove what a kill left: incomplete checkpoints, and others beyond the last `limit`."""
    whole, torn = _checkpoints(folder)
    whole.sort(key=_number, reverse=True)
    for path in [*torn, *whole[limit or len(whole) :]]:
        shutil.rmtree(path)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _checkpoints(folder: Path) -> tuple[list[Path], list[Path]]:
    """The complete and the incomplete checkpoints in a folder."""

    def is_whole(path: Path) -> bool:
        try:
            return bool(json.loads((path / "trainer_state.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return False

    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    whole = list(filter(is_whole, found))
    return whole, [path for path in found if path not in whole]


def checkpoint_to_resume(
    folder: Path, job: dict, overwrite: bool, resume: str | None
) -> Path | None:
    """The checkpoint to resume from, or None for a training from the start.

    resume: the value of --resume_from_checkpoint. Raises UserError if the folder holds files that
    must not be lost, or if there is no whole checkpoint."""
    before = job_in(folder)
    changed = differences(before, job)
    finished = any((folder / name).exists() for name in FINISHED)
    if (folder / STAGING).exists() or (IS_MAIN and was_killed(folder / JOB)):
        finished = False  # killed at its very end
    resume = None if str(resume).lower() in ("none", "false", "") else resume
    if resume:
        if finished and changed and not overwrite:
            raise UserError(
                f"{folder} holds the finished model of another training: give another --output_dir"
            )
        checkpoint = last_checkpoint(folder) if str(resume).lower() == "true" else Path(resume)
        if checkpoint is None or not (checkpoint / "trainer_state.json").is_file():
            place = checkpoint or folder
            raise UserError(f"--resume_from_checkpoint {resume}: no whole checkpoint in {place}")
        # FSDP writes the last two, and reads them with weights_only
        known = {"training_args.bin", "optimizer.bin", "pytorch_model_fsdp.bin"}
        pickles = {path.name for path in checkpoint.rglob("*.bin")} - known
        if pickles or not any(checkpoint.rglob("*.safetensors")):
            found = f"{min(pickles)} is no safetensors" if pickles else "it has no safetensors"
            raise UserError(
                f"--resume_from_checkpoint {resume}: no other weights are read, and {found}"
            )
        job_before = job_in(checkpoint.resolve().parent) or {}
        if "contents" in job_before and job_before["contents"] != job["contents"]:
            names = ", ".join(differences(job_before["contents"], job["contents"]))
            raise UserError(
                f"--resume_from_checkpoint {resume}: it was trained with other files ({names})"
            )
        return checkpoint
    if not changed and not finished:
        return last_checkpoint(folder)  # the same command was stopped before
    if holds_something(folder) and not overwrite:
        message = f"{folder} exists: give --overwrite to replace it, or another output"
        if before and not finished:
            message += f"; its training was stopped, and has changed since: {', '.join(changed)}"
        raise UserError(message)
    return None


def job_in(folder: Path) -> dict:
    """The job of the training in this folder; empty if there is none."""
    try:
        job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return job if isinstance(job, dict) else {}


def differences(before: dict, job: dict) -> list[str]:
    """The names of the settings and contents in which two jobs differ, wherever files lie."""
    found = []
    for name in before.keys() | job.keys():
        first, second = before.get(name), job.get(name)
        if name == "contents" and isinstance(first, dict) and isinstance(second, dict):
            found += differences(first, second)
        elif name not in (*PATHS, *BATCH) and first != second:
            found.append(name)
    rows, rows_now = (math.prod(each.get(name) or 1 for name in BATCH) for each in (before, job))
    if rows != rows_now:
        found.append(f"{' * '.join(BATCH)} ({rows}, now {rows_now})")
    return sorted(set(found))


def clear(folder: Path) -> None:
    """Remove the files of an earlier training, and no others."""
    for pattern in WRITTEN:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def staged_model(trainer: Any, folder: Path, card: str) -> Iterator[list[str]]:
    """Write model, tokenizer and card into a temporary folder; then move them to `folder`. Gives
    the names of these files in the main process.

    The file that marks the model as finished is moved last, and the temporary folder goes after it:
    whenever this is killed, the same command resumes."""
    staging, is_main = folder / STAGING, trainer.is_world_process_zero()
    try:
        if is_main:
            shutil.rmtree(staging, ignore_errors=True)
        trainer.save_model(str(staging))
        if is_main:
            (staging / "README.md").write_text(card, encoding="utf-8")
            (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle of what JOB holds
            shutil.rmtree(staging / "ref", ignore_errors=True)  # TRL's copy of the start adapter
        yield [path.name for path in staging.iterdir()] if is_main else []
        if is_main:
            for path in sorted(staging.iterdir(), key=lambda path: path.name in FINISHED):
                os.replace(path, folder / path.name)
    finally:
        if is_main:
            shutil.rmtree(staging, ignore_errors=True)


class AlreadyTrained(Exception):
    """The checkpoint to resume from is the last one: the model has its weights."""


class NoStepTooMany(TrainerCallback):
    """Raises AlreadyTrained instead of the step that Trainer would add to a finished training.

    Trainer looks whether it has finished after a step only, so it adds one to the last checkpoint
    of a training that ended within an epoch."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise AlreadyTrained


class PlainCheckpoints(TrainerCallback):
    """Removes training_args.bin from checkpoints: a pickle, which resuming does not read."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for path in Path(args.output_dir).glob("checkpoint-*/training_args.bin"):
            path.unlink(missing_ok=True)

    on_train_begin = on_train_end = on_save
