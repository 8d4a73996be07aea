"""Trainings of policy-mini for the experiments: a run, its exact accuracy, a file of finished runs.

A run is a dict: `name`, `pairs` (file of scored pairs), `limit`, `settings` (arguments of `train.py
dpo`), `seed`, `split` and `problems` (number of problems to measure greedy accuracy on),
`each_epoch` (measure after each epoch, or only after the last). Its rows are appended to a JSONL
file, so a stopped experiment resumes.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from common.files import ROOT, AppendedRows
from evaluation.metrics import Metric, clustered_mean_metric
from reasoning.problems import problems

BASE = str(ROOT / "models/policy-mini")
LOGGED = (
    *("loss", "logps/chosen_vs_ref", "logps/rejected_vs_ref"),
    *("drift/good_steps_less_likely", "rewards/accuracies"),
)


def train_and_measure(run: dict) -> list[dict]:
    """Train policy-mini once, and measure it after each epoch or after the last.

    Returns a row for each measurement: the run, `epoch`, `correct` (a 0 or 1 a problem), `logged`
    (the last values of the log), `pairs_trained`."""
    # torch would slow --help; the number of threads is set before torch does anything
    import torch

    torch.set_num_threads(run["threads"])
    # these need seconds, too
    from transformers import TrainerCallback

    from evaluation.accuracy import correct_answers
    from lm.policy import Policy
    from trainer.session import train
    from trainer.stepwise_dpo_trainer import RECIPE

    measured_on = list(islice(problems(run["split"]), run["problems"]))
    rows: list[dict] = []

    class Measure(TrainerCallback):
        def on_epoch_end(self, args, state, control, model=None, processing_class=None, **kwargs):
            if not (run["each_epoch"] or state.global_step == state.max_steps):
                return
            policy = Policy(model, processing_class)
            model.eval()
            correct = "".join(str(int(right)) for right in correct_answers(policy, measured_on))
            model.train()
            rows.append({**run, "epoch": round(state.epoch), "correct": correct})

    settings = {
        "dataset_name": run["pairs"],
        "limit": run["limit"],
        "seed": run["seed"],
        "model_name_or_path": BASE,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **run["settings"],
    }
    with tempfile.TemporaryDirectory() as folder:
        settings |= {"output_dir": f"{folder}/model", "logs_dir": f"{folder}/logs"}
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            train(RECIPE, as_flags(settings), callbacks=[Measure()])
        log = json.loads(Path(folder, "logs/model/log.json").read_text(encoding="utf-8"))
    last = [entry for entry in log["history"] if "loss" in entry][-1]
    logged = {key: last[key] for key in LOGGED if key in last}
    return [{**row, "pairs_trained": log["job"]["pairs"], "logged": logged} for row in rows]


def as_flags(settings: dict) -> list[str]:
    """Settings as arguments of a script."""
    flags = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        flags += [f"--{name}", *map(str, values)]
    return flags


def bits(correct: str) -> list[float]:
    """`101` -> [1.0, 0.0, 1.0]."""
    return [float(c) for c in correct]


def pooled_accuracy(runs: Sequence[Sequence[float]]) -> Metric:
    """The accuracy over all runs, measured on the same problems.

    The answers to one problem are not independent: the interval is clustered by problem."""
    clusters = [k for correct in runs for k in range(len(correct))]
    return clustered_mean_metric([c for correct in runs for c in correct], clusters)


def pooled_improvement(runs: Sequence[Sequence[float]], base: Sequence[float]) -> Metric:
    """The accuracy over all runs minus the base's accuracy on the same problems."""
    return pooled_accuracy(
        [[c - b for c, b in zip(correct, base, strict=True)] for correct in runs]
    )


def each_accuracy(runs: Sequence[Sequence[float]]) -> str:
    """The accuracy of each run, for a table."""
    return ", ".join(f"{sum(correct) / len(correct):.3f}" for correct in runs)


def base_run(pairs: str, split: str, problems: int) -> dict:
    """A run that measures the base: its learning rate is 0."""
    common = {"name": "base", "pairs": pairs, "limit": 16, "seed": 0, "split": split}
    settings = {"learning_rate": 0.0, "max_steps": 1}
    return {**common, "problems": problems, "each_epoch": False, "settings": settings}


def key_of(run: dict) -> str:
    """The identity of a run: its settings and the contents of its pairs."""
    named = {name: value for name, value in run.items() if name != "threads"}
    pairs = hashlib.sha256(Path(run["pairs"]).read_bytes()).hexdigest()
    return json.dumps({**named, "pairs": pairs}, sort_keys=True)


def run_all(runs: Sequence[dict], path: Path, workers: int) -> list[dict]:
    """All rows of the runs; those in the file `path` are not computed again.

    `workers` runs are trained at once, each on its share of the cores."""
    store = AppendedRows(path, lambda row: "key" in row)
    done = {row["key"] for row in store.rows}
    todo = [run for run in runs if key_of(run) not in done]
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool:
        futures = {pool.submit(train_and_measure, {**run, "threads": threads}): run for run in todo}
        for future in tqdm(as_completed(futures), total=len(todo), unit="run", desc="training"):
            key = key_of(futures[future])
            store.append(*({**row, "key": key} for row in future.result()))
    store.close()
    keys = {key_of(run) for run in runs}
    return [row for row in store.rows if row["key"] in keys]
