"""Trainings for the experiments: a run, its exact accuracy, a file of finished runs.

A run is a dict:

    {"name": "c: DPO",                       shown in tables
     "recipe": "dpo",                        dpo, sft or ppo: a command of train.py
     "rows": "data/compare/c_judge.jsonl",   what it learns from; paths are relative to the root
     "model": "models/policy-mini",          the policy that is trained
     "settings": {"learning_rate": 1e-4},    arguments of train.py
     "seed": 0,
     "measure": {"test": 2000, "hard": 1000},  split, or file of problems -> number of problems
     "samples": 4,                           0: greedy answers only; else also so many samples of
                                             each problem at temperature 1
     "each_epoch": false}                    measure greedy answers after each epoch, or at the end

Its rows are appended to a JSONL file, so a stopped experiment resumes.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import at_root, read_records
from common.identity import identity
from common.progress import Bar
from common.resumable import AppendedRows
from reasoning.grading import is_correct
from reasoning.problems import problems
from reasoning.records import Problem

if TYPE_CHECKING:
    from lm.policy import Policy

BASE = "models/policy-mini"
LOGGED = (
    *("loss", "logps/chosen_vs_ref", "logps/rejected_vs_ref"),
    *("drift/good_steps_less_likely", "rewards/accuracies"),
)


def train_and_measure(run: dict) -> list[dict]:
    """Train once, and measure after each epoch or after the last.

    Returns a row for each measurement: the run, `epoch`, `correct` (`measured`), `logged` (the last
    values of the log), `rows_trained`."""
    # torch would slow --help; the number of threads is set before torch does anything
    import torch

    torch.set_num_threads(run["threads"])
    # these need seconds, too
    from transformers import TrainerCallback

    from lm.policy import Policy
    from train import COMMANDS
    from trainer.session import train

    found: list[dict] = []

    class Measure(TrainerCallback):
        def on_epoch_end(self, args, state, control, model=None, processing_class=None, **kwargs):
            model.eval()
            correct = measured(Policy(model, processing_class), run["measure"], 0)
            model.train()
            found.append({**run, "epoch": round(state.epoch), "correct": correct})

    settings = {
        "dataset_name": at_root(run["rows"]),
        "seed": run["seed"],
        "model_name_or_path": at_root(run["model"]),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **({} if run["recipe"] == "ppo" else {"logging_steps": 1}),
        **run["settings"],
    }
    with tempfile.TemporaryDirectory() as folder:
        settings |= {"output_dir": f"{folder}/model", "logs_dir": f"{folder}/logs"}
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            callbacks = [Measure()] if run["each_epoch"] else []
            recipe = import_module(COMMANDS[run["recipe"]][0]).RECIPE
            train(recipe, as_flags(settings), callbacks=callbacks)
        log = json.loads(Path(folder, "logs/model/log.json").read_text(encoding="utf-8"))
        if not run["each_epoch"]:
            policy = Policy.load(f"{folder}/model")
            correct = measured(policy, run["measure"], run["samples"])
            found.append({**run, "epoch": None, "correct": correct})
    last = next((entry for entry in reversed(log["history"]) if "loss" in entry), {})
    logged = {key: last[key] for key in LOGGED if key in last}
    more = {"logged": logged, "seconds": round(log["seconds"])}
    return [{**row, **more} for row in found]


def measured(policy: "Policy", measure: dict[str, int], samples: int) -> dict[str, str]:
    """Right answers to the first problems of splits, a digit a problem.

    `SPLIT`: 0 or 1 for the greedy answer. `SPLIT, sampled`: how many of `samples` are right."""
    correct = {}
    for split, count in measure.items():
        asked = list(islice(asked_problems(split), count))
        prompts = [problem.prompt for problem in asked]
        ways: dict[str, dict[str, Any]] = {split: {}}
        if samples:
            ways[f"{split}, sampled"] = {"n": samples, "temperature": 1.0}
        for name, options in ways.items():
            answers = zip(asked, policy.generate(prompts, **options), strict=True)
            right = [sum(is_correct(a.steps, problem) for a in own) for problem, own in answers]
            correct[name] = "".join(map(str, right))
    return correct


def asked_problems(split: str) -> Iterable[Problem]:
    """The problems of a split of the problem world, or of a file (`.jsonl`)."""
    return read_records(at_root(split), Problem) if split.endswith(".jsonl") else problems(split)


def as_flags(settings: dict) -> list[str]:
    """Settings as arguments of a script."""
    flags = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        flags += [f"--{name}", *map(str, values)]
    return flags


def bits(correct: str) -> list[float]:
    """`104` -> [1.0, 0.0, 4.0]."""
    return [float(c) for c in correct]


def base_run(measure: dict[str, int], samples: int = 0, model: str = BASE) -> dict:
    """A run that measures a model as it is: its learning rate is 0."""
    settings = {"learning_rate": 0.0, "max_steps": 1}
    named = {"name": "base", "recipe": "dpo", "rows": "data/rewarded.jsonl", "model": model}
    measured = {"measure": measure, "samples": samples, "each_epoch": False}
    return {**named, "settings": settings, "seed": 0, **measured}


def key_of(run: dict) -> str:
    """The identity of a run: its settings and the contents of its rows and of its model."""
    named = {name: value for name, value in run.items() if name not in ("threads", "name")}
    for name in ("rows", "model"):
        named[name] = identity(at_root(run[name]))
    files = [split for split in run["measure"] if split.endswith(".jsonl")]
    if files:
        named["files"] = [identity(at_root(file)) for file in files]
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def row_of_each(runs: Sequence[dict], path: Path, workers: int) -> list[dict]:
    """As `run_all`, for runs that are measured once: their rows, in the order of the runs."""
    by_key = {row["key"]: row for row in run_all(runs, path, workers)}
    return [by_key[key_of(run)] for run in runs]


def run_all(runs: Sequence[dict], path: Path, workers: int) -> list[dict]:
    """All rows of the runs; those in the file `path` are not computed again.

    `workers` runs are trained at once, each on its share of the cores."""
    store = AppendedRows(path, lambda row: "key" in row)
    by_key = {key_of(run): run for run in runs}
    done = {row["key"] for row in store.rows}
    todo = {key: run for key, run in by_key.items() if key not in done}
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        futures = {
            pool.submit(train_and_measure, {**run, "threads": threads}): key
            for key, run in todo.items()
        }
        for future in Bar(as_completed(futures), total=len(todo), unit="run", desc="training"):
            store.append(*({**row, "key": futures[future]} for row in future.result()))
    store.close()
    return [row for row in store.rows if row["key"] in by_key]
