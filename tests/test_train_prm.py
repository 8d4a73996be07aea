"""python train.py prm: packing, the loss by hand, outputs, adapters, resuming, mistakes."""

import contextlib
import copy
import json
import logging
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from common.cli import here
from common.errors import RecordError, UserError
from common.files import ROOT, write_records
from reasoning.datasets.loading import load_step_values
from reasoning.records import LabelledSolution, StepValue
from reasoning.splits import is_kept_out
from reward_model.process_reward_model import ProcessRewardModel
from tests.helpers.reward_models import make_prm
from tests.helpers.training import PROBLEMS, STEP_VALUES, as_if_killed, flags, refused, train_here
from trainer import prm_trainer
from trainer.prm_trainer import (
    IGNORED,
    RECIPE,
    DataCollatorForStepValues,
    LabelledSteps,
    PRMConfig,
    PRMTrainer,
    add_labelled,
    pack,
)
from trainer.session import train

pytestmark = pytest.mark.process
SMALL = {"bf16": "false", "seed": 1, "logging_steps": 1, "logs_dir": "logs", "warmup_steps": 0}
ACCUMULATED = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 7,
    "num_train_epochs": 3,
    "save_steps": 1,
}
ARGS = flags(
    dataset_name="values.jsonl",
    model_name_or_path="model",
    save_total_limit=3,
    **ACCUMULATED,
    **SMALL,
)
LORA = [
    "--use_peft",
    *flags(
        running_min="true",
        lora_r=4,
        lora_dropout=0,
        lora_target_modules="all-linear",
        learning_rate=0.01,
    ),
]


def history(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"logs/{name}/log.json").read_text())["history"]


# --- packing


def test_a_row_is_a_value_or_a_labelled_solution():
    value = {"prompt": "p", "prefix": ["a", "b"], "step": "c", "score": 1, "rollouts": 8}
    assert LabelledSteps.from_row(value) == LabelledSteps("p", ["a", "b", "c"], [None, None, 1.0])
    solution = {"prompt": "p", "steps": ["a", "b"], "labels": [0.5, None]}
    assert LabelledSteps.from_row(solution) == LabelledSteps("p", ["a", "b"], [0.5, None])
    assert LabelledSteps.from_row(asdict(LabelledSteps.from_row(value))) == LabelledSteps.from_row(
        value
    )
    for row, message in (
        ({"prompt": "p", "step": "c"}, "field 'score'"),
        ({"prompt": "p"}, "field 'steps'"),
    ):
        with pytest.raises(RecordError, match=message):
            LabelledSteps.from_row(row)


def test_a_tree_of_steps_written_out():
    rows = [
        ("p", ["a"], 1.0), ("p", ["a", "b"], 0.5), ("p", ["a", "c"], 0.0), ("q", ["a"], 0.25),
        ("p", ["a", "c", "d"], 0.0), ("p", ["a", "b"], 0.0), ("p", ["x", "y"], 1.0),
    ]  # fmt: skip
    solutions, repeated = pack(
        LabelledSolution(prompt, steps, [None] * (len(steps) - 1) + [label])
        for prompt, steps, label in rows
    )
    assert repeated == 1
    assert solutions == [
        LabelledSolution("p", ["a", "b"], [1.0, 0.25]),
        LabelledSolution("p", ["a", "c", "d"], [None, 0.0, 0.0]),
        LabelledSolution("p", ["x", "y"], [None, 1.0]),
        LabelledSolution("q", ["a"], [0.25]),
    ]


def test_every_label_stands_once_and_paths_are_as_few_as_leaves():
    rng = random.Random(0)
    values = {}
    for _ in range(300):
        steps = tuple(rng.choice("abc") for _ in range(rng.randint(1, 5)))
        values[rng.choice("pq"), steps] = rng.random()
    rows = [
        LabelledSolution(prompt, list(steps), [None] * (len(steps) - 1) + [v])
        for (prompt, steps), v in values.items()
    ]
    solutions, repeated = pack(rows)
    found = [
        ((s.prompt, tuple(s.steps[: k + 1])), label)
        for s in solutions
        for k, label in enumerate(s.labels)
        if label is not None
    ]
    assert repeated == 0 and len(found) == len(values) and dict(found) == values
    leaves = {
        key
        for key in values
        if not any(p == key[0] and s[: len(key[1])] == key[1] and s != key[1] for p, s in values)
    }
    assert len(solutions) == len(leaves)


def test_a_row_of_branches_written_out():
    row = {"input_ids": [], "labels": [], "parents": []}
    no = IGNORED
    path = add_labelled(row, [], [5, 6, 7, 8], [no, 1.0, no, 0.5])
    path = add_labelled(row, path, [5, 6, 9], [no, no, 0.0])
    path = add_labelled(row, path, [5, 6, 9, 9, 4], [no, no, no, no, 0.25])
    assert path == [0, 1, 4, 5, 6]
    assert row == {
        "input_ids": [5, 6, 7, 8, 9, 9, 4],
        "labels": [no, 1.0, no, 0.5, 0.0, no, 0.25],
        "parents": [-1, 0, 1, 2, 1, 4, 5],
    }
    # a token that has a label already keeps it: the other one gets a token of its own
    add_labelled(row, path, [5, 6], [no, 0.0])
    assert row["parents"][7:] == [0] and row["labels"][7:] == [0.0] and row["labels"][1] == 1.0
    batch = DataCollatorForStepValues(0)(
        [row, {"input_ids": [1, 2], "labels": [no, 1.0], "parents": [-1, 0]}]
    )
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 4, 1], [0, 1, *[0] * 6]]
    seen = [[k for k in range(8) if batch["attention_mask"][0, 0, place, k]] for place in range(8)]
    assert seen == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 4],
        [0, 1, 4, 5],
        [0, 1, 4, 5, 6],
        [0, 7],
    ]
    assert batch["attention_mask"][1, 0].int().tolist() == [
        [1, *[0] * 7],
        [1, 1, *[0] * 6],
        *torch.eye(8).int()[2:].tolist(),
    ]


def test_rows_with_a_common_head_become_one_tree(tiny_model_dir):
    """Every labelled token has the same hidden state and the same label as in a row of its own."""
    head, no = [*range(5, 25)], IGNORED
    rows = []
    for k in range(1, 6):  # a branch of 3 tokens, one of 2 behind its first token, one at the head
        row: dict[str, list] = {"input_ids": [], "labels": [], "parents": []}
        first = [*head, 40 * k, 40 * k + 1, 40 * k + 2]
        path = add_labelled(row, [], first, [no] * 22 + [0.1 * k])
        add_labelled(row, path, [*first[:21], 9, 8], [no] * 22 + [0.2])
        add_labelled(row, path, [*head[:18], 7], [no] * 18 + [0.3])
        rows.append(row)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).base_model.eval()
    found = []
    for most in (0, 50):
        batch = DataCollatorForStepValues(0, most=most)(copy.deepcopy(rows))
        labels = batch.pop("labels")
        with torch.no_grad():
            states = model(**batch).last_hidden_state
        found.append((labels.shape, states[labels != no], labels[labels != no]))
    (apart, *alone), (together, *merged) = found
    # 20 + 3 + 2 + 1 tokens a row, or 20 + 5 * 6 in one
    assert apart == (5, 26) and together == (1, 50)
    torch.testing.assert_close(merged, alone, atol=1e-5, rtol=1e-5)


# --- the script


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory) -> Path:
    """Rows, a PRM with a random head, and a training of three updates on all solutions: `out`."""
    folder = tmp_path_factory.mktemp("train_prm")
    write_records(folder / "values.jsonl", STEP_VALUES)
    make_prm(tiny_model_dir, folder / "model")
    shutil.copytree(tiny_model_dir, folder / "lm")
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        open(folder / "stdout", "w") as stdout,
        contextlib.redirect_stdout(stdout),
    ):
        train_here(folder, monkeypatch, "prm", *ARGS, *flags(output_dir="out"))
    return folder


def by_hand(model_dir: Path, rows: list[StepValue]) -> dict[str, float]:
    """The mean loss over all different steps and the other metrics, in float64, step by step."""
    model = AutoModelForTokenClassification.from_pretrained(model_dir, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    labels: dict[tuple, list[float]] = {}
    for row in rows:
        labels.setdefault((row.prompt, *row.prefix, row.step), []).append(row.score)
    losses, values = [], {True: [], False: []}
    for (prompt, *steps), scores in labels.items():
        text = f"Problem: {prompt}\nSolution:\n" + "".join(f"<next>{step}\n" for step in steps)
        with torch.no_grad():
            logit = model(**tokenizer(text, return_tensors="pt")).logits[0, -1, 0]
        value, label = float(1 / (1 + torch.exp(-logit))), sum(scores) / len(scores)
        losses.append(-label * math.log(value) - (1 - label) * math.log(1 - value))
        values[label >= 0.5].append(value)
    right = sum(v >= 0.5 for v in values[True]) + sum(v < 0.5 for v in values[False])
    means = {
        name: sum(found) / len(found)
        for name, found in (("values/good", values[True]), ("values/bad", values[False]))
    }
    return {"loss": sum(losses) / len(losses), "accuracy": right / len(losses), **means}


def test_the_loss_is_the_one_computed_by_hand(folder):
    """The mean over the labelled steps of the global batch, however it is cut into smaller ones."""
    rows = [row for row in STEP_VALUES if not is_kept_out(row.prompt)]
    assert len(rows) < len(STEP_VALUES)
    expected = by_hand(folder / "model", rows)
    first, *_, last = [row for row in history(folder, "out") if "loss" in row]
    assert {name: first[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert abs(expected["loss"] - math.log(2)) > 0.1 and last["loss"] < first["loss"]


@pytest.mark.parametrize(
    "last, is_warned",
    [
        ({"values/good": 0.34, "values/bad": 0.338}, True),
        ({"values/good": 0.2, "values/bad": 0.6}, True),
        ({"values/good": 0.7, "values/bad": 0.3}, False),
        ({"values/good": 0.7}, False),  # no bad step in the last batches
    ],
)
def test_a_prm_that_learned_nothing_is_named(last, is_warned):
    assert bool(RECIPE.warning(last)) == is_warned


def test_a_training_writes_a_prm_that_moved(folder):
    before, after = (load_file(folder / name / "model.safetensors") for name in ("model", "out"))
    assert before.keys() == after.keys() and all(
        not torch.equal(before[name], after[name]) for name in before
    )
    prompts = sum(not is_kept_out(problem.prompt) for problem in PROBLEMS)
    printed = (folder / "stdout").read_text()
    kept_out = 4 * (len(PROBLEMS) - prompts)
    assert f"{4 * prompts} rows of values.jsonl; {kept_out} more are kept out" in printed
    assert (
        f"{3 * prompts} labelled steps on {2 * prompts} solutions in {prompts} rows: mean label "
        f"0.417, 66.7% of them .5 or more; {prompts} labels of a step that had one were averaged"
    ) in printed
    assert "mean value of the other steps" in printed
    *_, last = [row for row in history(folder, "out") if "loss" in row]
    is_alike = last["values/good"] - last["values/bad"] < 0.05
    assert ("warning: good and bad steps have the same value" in printed) == is_alike
    assert "its picture to logs/out/training.png" in printed.splitlines()[-1]
    card = (folder / "out/README.md").read_text()
    assert (
        "model after training as a process reward model (PRM) on" in card
        and "--judge prm" in card
        and "mean label" in card
    )
    # no pickle
    assert {path.suffix for path in (folder / "out").iterdir() if path.is_file()} == {
        ".safetensors",
        ".jinja",
        ".json",
        ".md",
    }
    config = json.loads((folder / "out/config.json").read_text())
    assert config["step_token"] == "<next>" and config["architectures"] == [
        "LlamaForTokenClassification"
    ]
    solutions = [(row.prompt, [*row.prefix, row.step]) for row in STEP_VALUES[:6]]
    first, last = (
        ProcessRewardModel(folder / name, device="cpu").score_steps(solutions)
        for name in ("model", "out")
    )
    assert first != last


def test_stopped_in_the_middle_it_ends_with_the_same_weights(folder, monkeypatch, capsys):
    as_if_killed(folder / "out", folder / "killed")
    train_here(folder, monkeypatch, "prm", *ARGS, "--output_dir", "killed")
    assert "resuming from killed/checkpoint-1" in capsys.readouterr().out
    once, again = (load_file(folder / name / "model.safetensors") for name in ("out", "killed"))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_a_metric_that_the_last_log_lacks_does_not_end_a_training(folder, monkeypatch, capsys):
    """One row a batch: an update has a good or a bad step, so each log lacks one of the values."""
    first = [row for row in STEP_VALUES if not is_kept_out(row.prompt)]
    good = next(row for row in first if row.score >= 0.5)
    bad = next(row for row in first if row.score < 0.5 and row.prompt != good.prompt)
    write_records(folder / "two.jsonl", [good, bad])
    given = flags(
        dataset_name="two.jsonl", model_name_or_path="model", output_dir="two", max_steps=2, **SMALL
    )
    one_row = flags(per_device_train_batch_size=1, save_strategy="no")
    train_here(folder, monkeypatch, "prm", *given, *one_row)
    kinds = [
        {"values/good", "values/bad"} & row.keys()
        for row in history(folder, "two")
        if "loss" in row
    ]
    assert sorted(map(sorted, kinds)) == [["values/bad"], ["values/good"]]
    assert (folder / "two/model.safetensors").is_file() and "wrote" in capsys.readouterr().out


def test_a_causal_lm_learns_its_labels(folder, monkeypatch):
    """From a head of zeros: steps with different labels get different values."""
    given = flags(
        dataset_name="values.jsonl",
        model_name_or_path="lm",
        output_dir="learned",
        max_steps=40,
        **SMALL,
    )
    train_here(
        folder,
        monkeypatch,
        "prm",
        *given,
        *flags(save_strategy="no", learning_rate=3e-3, hard_labels=0.6),
    )
    log = [row for row in history(folder, "learned") if "loss" in row]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and log[-1]["loss"] < 0.1
    assert log[-1]["values/good"] > 0.9 and log[-1]["values/bad"] < 0.1 and log[-1]["accuracy"] == 1
    judge = ProcessRewardModel(folder / "learned", device="cpu")
    training = [problem for problem in PROBLEMS if not is_kept_out(problem.prompt)]
    for first, second in judge.score_steps(
        [(problem.prompt, problem.steps[:2]) for problem in training]
    ):
        assert first > 0.9 and second < 0.1  # hard labels: .75 is above .6, .5 is not


FILES = (
    "prm800k.jsonl",
    "math_shepherd.jsonl",
    "trl_stepwise.jsonl",
    "processbench.json",
    "omegaprm.jsonl",
    "three_columns.csv",
)
LONG = ("prm800k.jsonl", "omegaprm.jsonl")  # more than the 512 tokens of the tiny model's context


@pytest.mark.parametrize("name", FILES)
def test_every_shape_of_step_values_is_learned_from(folder, monkeypatch, name):
    """Every value of the file once; what a tiny context cannot hold is left out."""
    made = []
    monkeypatch.setattr(
        "trainer.session.Training.run",
        lambda training, trainer, *args, **kwargs: made.append((training, trainer)),
    )
    data = ROOT / "tests/data" / name
    train_here(
        folder,
        monkeypatch,
        "prm",
        *flags(dataset_name=data, model_name_or_path="lm", output_dir="new", **SMALL),
    )
    ((training, trainer),) = made
    values = {}
    for value in load_step_values(str(data)):
        values.setdefault((value.prompt, *value.prefix, value.step), []).append(value.score)
    solutions, _ = pack(training.rows)
    packed = Counter(
        label for solution in solutions for label in solution.labels if label is not None
    )
    expected = Counter(
        sum(scores) / len(scores)
        for (prompt, *_), scores in values.items()
        if not is_kept_out(prompt)
    )
    assert packed == expected
    learned = [
        label
        for example in trainer.train_dataset
        for label in example["labels"]
        if label != IGNORED
    ]
    assert learned and (len(learned) < packed.total()) == (name in LONG)
    assert trainer.balance.startswith(f"{len(learned)} labelled steps")


# --- adapters


@pytest.fixture(scope="module")
def adapter(folder) -> Path:
    """An adapter on the causal LM, of three steps."""
    given = flags(
        dataset_name="values.jsonl",
        model_name_or_path="lm",
        output_dir="adapter",
        max_steps=3,
        save_steps=1,
        **SMALL,
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        train_here(folder, monkeypatch, "prm", *given, *LORA, "--save_total_limit", 3)
    return folder / "adapter"


def test_an_adapter_holds_head_and_step_token_and_judges(folder, adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    names = [name for name in weights if "lora" not in name]
    assert len(weights) - len(names) == 2 * 7 * 2
    assert sorted(name.removeprefix("base_model.model.") for name in names) == [
        "model.embed_tokens.token_adapter.trainable_tokens_delta", "score.bias", "score.weight",
    ]  # fmt: skip
    assert all(weight.abs().max() > 0 for name, weight in weights.items())
    tokens = weights["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    mean = load_file(folder / "lm/model.safetensors")["model.embed_tokens.weight"].mean(0)
    assert tokens.shape == (1, 64) and not torch.allclose(tokens[0], mean, atol=1e-4)
    judge = ProcessRewardModel(adapter, device="cpu")
    assert judge.model.config.step_token == "<next>" and len(judge.format.tokenizer) == 650
    assert judge.running_min  # from the adapter's folder: its base is no PRM
    solutions = [(row.prompt, [*row.prefix, row.step]) for row in STEP_VALUES[:6]]
    scores = judge.score_steps(solutions)
    merged = judge.model.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    judge.format.tokenizer.save_pretrained(folder / "merged")
    plain = ProcessRewardModel(folder / "merged", device="cpu").score_steps(solutions)
    for ours, theirs in zip(scores, plain, strict=True):
        assert (
            ours == pytest.approx(theirs, abs=1e-5)
            and max(abs(score - 0.5) for score in ours) > 1e-3
        )


def test_an_adapter_resumes_and_is_trained_further(folder, adapter, monkeypatch, capsys):
    as_if_killed(adapter, folder / "killed_adapter")
    given = flags(
        dataset_name="values.jsonl", model_name_or_path="lm", max_steps=3, save_steps=1, **SMALL
    )
    options = flags(save_total_limit=3, output_dir="killed_adapter")
    train_here(folder, monkeypatch, "prm", *given, *LORA, *options)
    assert "resuming from killed_adapter/checkpoint-1" in capsys.readouterr().out
    once, again = (
        load_file(folder / name / "adapter_model.safetensors")
        for name in ("adapter", "killed_adapter")
    )
    assert all(torch.equal(once[name], again[name]) for name in once)

    more = flags(
        dataset_name="values.jsonl",
        model_name_or_path="adapter",
        max_steps=1,
        save_strategy="no",
        **SMALL,
    )
    train_here(folder, monkeypatch, "prm", *more, "--output_dir", "further", "--use_peft")
    further = load_file(folder / "further/adapter_model.safetensors")
    assert further.keys() == once.keys() and any(
        not torch.equal(further[name], once[name]) for name in once
    )
    assert history(folder, "further")[0]["loss"] < history(folder, "adapter")[0]["loss"]
    train_here(folder, monkeypatch, "prm", *more, "--output_dir", "whole")
    assert "score.weight" in load_file(folder / "whole/model.safetensors")
    assert history(folder, "whole")[0]["loss"] == pytest.approx(
        history(folder, "further")[0]["loss"], abs=1e-4
    )


# --- lengths, evaluation


def trainer_on(folder: Path, rows: list[dict], **options) -> PRMTrainer:
    model, tokenizer = (
        AutoModelForTokenClassification.from_pretrained(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    config = PRMConfig(folder / "trainer", use_cpu=True, report_to="none", **options)
    return PRMTrainer(
        model, config, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )


def test_a_solution_that_is_too_long_is_cut_by_whole_steps(folder, caplog):
    labels = [1.0, None, 0.0, 0.5]
    rows = [
        {
            "prompt": "1 + 1?",
            "steps": ["1 + 1 = 2", "2 = 2", "2 = 3", "Answer: 2"],
            "labels": labels,
        }
    ]
    rows += [{"prompt": "1 + 1" * 20, "prefix": [], "step": "Answer: 2", "score": 1.0}]
    with caplog.at_level(logging.WARNING):
        trainer = trainer_on(folder, rows, max_length=40)
    (example,) = trainer.train_dataset
    # 13 tokens of context, 10 of the first step, 7 of the second, 7 of the third, 7 of the last
    known = {place: label for place, label in enumerate(example["labels"]) if label != IGNORED}
    assert known == {22: 1.0, 36: 0.0} and len(example["input_ids"]) == 37
    assert (
        "train: 2 of 4 labelled steps end after max_length 40 and are left out, 1 of 2 solutions "
        "with all of theirs"
    ) in caplog.text
    assert trainer.balance.startswith("2 labelled steps on 1 solutions in 1 rows: mean label 0.500")
    assert example["parents"] == [*range(-1, 36)]
    batch = DataCollatorForStepValues(0)(
        [example, {"input_ids": [1, 5], "labels": [IGNORED, 0.5], "parents": [-1, 0]}]
    )
    assert "attention_mask" not in batch  # no row branches
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 37) and batch["labels"][
        1
    ].tolist()[:3] == [-100, 0.5, -100]
    with pytest.raises(
        ValueError, match="none of 2 solutions has a labelled step within 10 tokens"
    ):
        trainer_on(folder, rows, max_length=10)


def test_an_evaluation_has_the_mean_over_its_steps(folder):
    """However unequal its batches are."""
    rows = STEP_VALUES[:2] + STEP_VALUES[5:8]
    metrics = trainer_on(
        folder, [asdict(row) for row in rows], per_device_eval_batch_size=2
    ).evaluate()
    assert {
        name: metrics[f"eval_{name}"] for name in by_hand(folder / "model", rows)
    } == pytest.approx(by_hand(folder / "model", rows), abs=1e-5)


def test_solutions_that_share_a_row_teach_what_they_teach_alone(folder, monkeypatch):
    """Loss and gradients are the same; a model with a short window gets one solution a row."""
    rows = [asdict(row) for row in STEP_VALUES]
    found = []
    for window in (None, 60):
        monkeypatch.setattr("transformers.LlamaConfig.sliding_window", window, raising=False)
        trainer = trainer_on(folder, rows)
        batch = trainer.data_collator(trainer.train_dataset)
        loss = trainer._loss(
            trainer.model(**{k: v for k, v in batch.items() if k != "labels"}), batch["labels"]
        )
        loss.backward()
        found.append(
            (
                loss.item(),
                {name: weight.grad for name, weight in trainer.model.named_parameters()},
                batch,
            )
        )
    (together, gradients, branches), (alone, expected, plain) = found
    assert len(branches["input_ids"]) == len(PROBLEMS) and len(plain["input_ids"]) == 2 * len(
        PROBLEMS
    )
    assert "attention_mask" in branches and "attention_mask" not in plain
    assert together == pytest.approx(alone, abs=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


def test_a_row_is_no_longer_than_the_limit(folder):
    rows = [asdict(row) for row in STEP_VALUES[:4]]
    (whole,) = trainer_on(folder, rows, max_length=200).train_dataset
    shorter = len(whole["input_ids"]) - 1
    cut = trainer_on(folder, rows, max_length=shorter)
    assert cut.balance.startswith("3 labelled steps on 2 solutions in 2 rows")
    assert max(len(row["input_ids"]) for row in cut.train_dataset) <= shorter


@pytest.mark.slow
def test_two_processes_train_as_one(folder):
    """The weights after one step of plain SGD are those of one process with all solutions.

    The processes have unequal numbers of steps."""
    longer = [
        StepValue(
            PROBLEMS[0].prompt,
            "Step 3: 1 + 1 = 2",
            0.5,
            prefix=["Step 2: 1 + 1 = 3", "Step 1: 3 = 3"],
        )
    ]
    rows = [row for row in STEP_VALUES if not is_kept_out(row.prompt)][:14] + longer
    assert (
        not is_kept_out(PROBLEMS[0].prompt)
        and len(pack(LabelledSteps.from_row(asdict(row)) for row in rows)[0]) == 8
    )
    write_records(folder / "eight.jsonl", rows)
    settings = {
        "dataset_name": "eight.jsonl",
        "model_name_or_path": "model",
        "max_steps": 1,
        "optim": "sgd",
        **SMALL,
    }
    settings |= {"learning_rate": 0.1, "max_grad_norm": 0, "save_strategy": "no"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = {"cwd": folder, "env": {**os.environ, "ACCELERATE_USE_CPU": "1"}, "timeout": 600}
    for name, launcher, batch, accumulated in (("one", [], 8, 1), ("two", torchrun, 2, 2)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        given = flags(**settings, **sizes, output_dir=name)
        command = [sys.executable, *launcher, str(ROOT / "train.py"), "prm", *given]
        done = subprocess.run(command, capture_output=True, text=True, **options)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote the tuned model") == 1
    one, two = (load_file(folder / name / "model.safetensors") for name in ("one", "two"))
    before = load_file(folder / "model/model.safetensors")
    assert any(not torch.equal(before[name], one[name]) for name in one)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-6)
    first, second = (history(folder, name)[0] for name in ("one", "two"))
    for name in ("loss", "values/good", "values/bad", "accuracy"):
        assert second[name] == pytest.approx(first[name], abs=1e-4), name


# --- what it refuses


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dataset_name", "none.jsonl"], "none.jsonl not found"),
        (["--dataset_name", "pairs.jsonl"], "gives pairs, no step_values or step_labels"),
        (["--dataset_name", "bad.jsonl"], "bad.jsonl:1: field 'score'"),
        (
            ["--dataset_name", "test.jsonl"],
            "test.jsonl:1: a held-out problem (problems_test.jsonl)",
        ),
        (["--hard_labels", "0"], "hard_labels: expected a number above 0, up to 1, got 0.0"),
        (["--hard_labels", "1.5"], "hard_labels: expected a number above 0, up to 1, got 1.5"),
        (["--learning_rate", "-1"], "learning_rate: expected a number of 0 or more"),
        (["--beta", "0.1"], "unknown argument --beta"),
        (["--output_dir", "model"], "is the model that training starts from"),
        (["--output_dir", "out"], "out exists: give --overwrite"),
        (["--model_name_or_path", "nowhere"], "model directory nowhere not found"),
        (["--load_in_4bit", "true"], "a PRM is not trained on quantized weights"),
        (["--max_length", "5"], "has a labelled step within 5 tokens"),
    ],
)
def test_mistakes_are_one_line(folder, monkeypatch, capsys, args, message):
    write_records(folder / "pairs.jsonl", [{"prompt": "p", "chosen": ["a"], "rejected": ["b"]}])
    write_records(folder / "bad.jsonl", [{**asdict(STEP_VALUES[1]), "score": 2}])
    with open(ROOT / "data/problems_test.jsonl", encoding="utf-8") as file:
        write_records(
            folder / "test.jsonl", [StepValue(json.loads(file.readline())["prompt"], "a", 1.0)]
        )
    given = flags(
        dataset_name="values.jsonl", model_name_or_path="model", output_dir="new", **SMALL
    )
    assert message in refused(folder, monkeypatch, capsys, "prm", *given, *args)


def test_the_example_trains_an_adapter(folder, monkeypatch):
    """configs/prm.yaml with other paths, a shorter length and another precision."""
    config = ["--config", str(ROOT / "configs/prm.yaml")]
    given = flags(
        dataset_name="values.jsonl",
        model_name_or_path="lm",
        output_dir="example",
        max_steps=1,
        limit=20,
        **SMALL,
    )
    train_here(
        folder, monkeypatch, "prm", *config, *given, "--dtype", "float32", "--save_strategy", "no"
    )
    assert json.loads((folder / "example/adapter_config.json").read_text())["r"] == 16
    assert history(folder, "example")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_missing_default_data_names_the_command_that_makes_it():
    recipe = replace(prm_trainer.RECIPE, data="none.jsonl")
    command = here("python utils/build_mcts_dataset.py")
    with pytest.raises(UserError, match=f"none.jsonl not found: run `{re.escape(command)}` first"):
        train(recipe, [])
