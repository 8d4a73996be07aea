"""What the experiments share: train policy-mini once with given settings in this process, look at its exact accuracy, remember it.

A run is a plain dict: `name`, `pairs` (file of scored pairs), `limit`, `settings` (of StepwiseDPOConfig), `seed`, `split` and
`problems` (what the accuracy is measured on, greedily), `each_epoch` (whether after each, or after the last). The rows it gives are
appended to a JSONL, so a stopped experiment goes on where it was.
"""

import hashlib
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

BASE = str(Path(__file__).resolve().parents[1] / "models/policy-mini")


def train_and_measure(run: dict) -> list[dict]:
    """One training of policy-mini, a row after each epoch or the last: the run, `epoch`, `correct` (a 0 or 1
    a problem), `logged` (what was logged last)."""
    import logging
    import tempfile
    import warnings
    from dataclasses import asdict
    from itertools import islice

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(run["threads"])
    import datasets
    import transformers
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback

    from reasoning.grading import is_correct
    from reasoning.problems import problems
    from reasoning.records import ScoredPair, is_kept_out, read_records
    from search.policy import Policy, pick_device
    from trainer.stepwise_dpo_trainer import StepwiseDPOConfig, StepwiseDPOTrainer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)

    pairs = [
        asdict(pair)
        for pair in read_records(run["pairs"], ScoredPair)
        if not is_kept_out(pair.prompt)
    ][: run["limit"]]
    tasks = list(islice(problems(run["split"]), run["problems"]))
    rows: list[dict] = []
    device, bf16 = pick_device()

    class Look(TrainerCallback):
        def on_epoch_end(self, args, state, control, model=None, processing_class=None, **kwargs):
            if not (run["each_epoch"] or state.global_step == state.max_steps):
                return
            policy = Policy(model, processing_class)
            model.eval()
            answers = policy.generate([task.prompt for task in tasks])
            model.train()
            correct = [
                is_correct(answer.steps, task)
                for task, (answer,) in zip(tasks, answers, strict=True)
            ]
            rows.append(
                {
                    **run,
                    "epoch": round(state.epoch),
                    "correct": "".join(str(int(c)) for c in correct),
                }
            )

    with tempfile.TemporaryDirectory() as folder:
        config = StepwiseDPOConfig(
            folder, use_cpu=device == "cpu", bf16=bf16, disable_tqdm=True, report_to="none", save_strategy="no", seed=run["seed"],
            logging_steps=1, **run["settings"],
        )  # fmt: skip
        trainer = StepwiseDPOTrainer(
            model=BASE, args=config, train_dataset=Dataset.from_list(pairs)
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Look())
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    kept = (
        "loss",
        "logps/chosen_vs_ref",
        "logps/rejected_vs_ref",
        "drift/good_steps_less_likely",
        "rewards/accuracies",
    )
    return [
        {
            **row,
            "pairs_trained": len(pairs),
            "logged": {key: log[-1][key] for key in kept if key in log[-1]},
        }
        for row in rows
    ]


def bits(correct: str) -> list[float]:
    return [float(c) for c in correct]


def base_run(pairs: str, split: str, problems: int) -> dict:
    """The base, as a run that changes nothing."""
    common = {
        "name": "base",
        "pairs": pairs,
        "limit": 16,
        "seed": 0,
        "split": split,
        "problems": problems,
    }
    return {**common, "each_epoch": False, "settings": {"learning_rate": 0.0, "max_steps": 1}}


def key_of(run: dict) -> str:
    """What a run is: its settings and the contents of its pairs."""
    named = {name: value for name, value in run.items() if name != "threads"}
    return json.dumps(
        {**named, "pairs": hashlib.sha256(Path(run["pairs"]).read_bytes()).hexdigest()},
        sort_keys=True,
    )


def run_all(runs: list[dict], path: Path, workers: int) -> list[dict]:
    """All rows of the runs, those that `path` holds already among them; `workers` runs at once, each on its share of the cores."""
    from tqdm import tqdm

    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {row["key"] for row in rows}
    todo = [run for run in runs if key_of(run) not in done]
    threads = max(1, (os.cpu_count() or 1) // workers)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), max_tasks_per_child=1
        ) as pool,
        path.open("a") as file,
    ):
        futures = {pool.submit(train_and_measure, {**run, "threads": threads}): run for run in todo}
        for future in tqdm(as_completed(futures), total=len(todo), unit="run", desc="training"):
            fresh = [{**row, "key": key_of(futures[future])} for row in future.result()]
            rows += fresh
            file.writelines(
                json.dumps(row) + "\n" for row in fresh
            )  # one write a run: all its epochs or none
            file.flush()
    keys = {key_of(run) for run in runs}
    return [row for row in rows if row["key"] in keys]
