"""python train.py ppo: what it writes, stopping and going on, adapters, value models, what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from common.cli import run
from common.files import write_records
from reasoning.splits import is_kept_out
from tests.conftest import ROOT
from tests.helpers.reward_models import make_llama, make_prm
from tests.test_smollm2 import TASKS
from tests.test_step_ppo_trainer import taught
from tests.test_train_prm import PROBLEMS, ROWS, flags

SMALL = {
    "bf16": "false",
    "use_cpu": "true",
    "logs_dir": "logs",
    "max_new_tokens": 32,
    "max_solution_steps": 2,
    "eval_limit": 1,
}
SMALL |= {
    "per_device_train_batch_size": 4,
    "num_mini_batches": 2,
    "total_episodes": 24,
    "save_steps": 1,
    "save_total_limit": 3,
}
GIVEN = {
    "dataset_name": "values.jsonl",
    "model_name_or_path": "model",
    "judge_path": "prm",
    "learning_rate": 1e-3,
    **SMALL,
}


def train_here(folder: Path, monkeypatch, **options: object) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py", "ppo", *flags(**GIVEN | options)])
    train.main()


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory) -> Path:
    """Step values, a policy, a PRM, and one finished training of three updates: `out`."""
    folder = tmp_path_factory.mktemp("train_ppo")
    write_records(folder / "values.jsonl", ROWS)
    write_records(folder / "problems.jsonl", PROBLEMS)
    taught(
        tiny_model_dir, folder / "model", [(problem.prompt, problem.steps) for problem in PROBLEMS]
    )
    make_prm(tiny_model_dir, folder / "prm")
    command = [sys.executable, str(ROOT / "train.py"), "ppo", *flags(**GIVEN, output_dir="out")]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=1200, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    yield folder
    AcceleratorState._reset_state(reset_partial_state=True)


def local_config(folder: Path) -> Path:
    """configs/ppo.yaml for a local file, which has no configurations."""
    text = (ROOT / "configs/ppo.yaml").read_text(encoding="utf-8")
    (folder / "ppo.yaml").write_text(text.replace("dataset_config: main\n", ""))
    return folder / "ppo.yaml"


def log_of(folder: Path, name: str) -> dict:
    return json.loads((folder / f"logs/{name}/log.json").read_text())


def test_a_training_writes_a_policy_that_moved(folder):
    before, after = (load_file(folder / name / "model.safetensors") for name in ("model", "out"))
    assert before.keys() == after.keys() and all(
        not torch.equal(before[name], after[name]) for name in before
    )
    assert AutoModelForCausalLM.from_pretrained(folder / "out").dtype == torch.float32
    assert AutoTokenizer.from_pretrained(folder / "out").eos_token == "</s>"
    assert {path.suffix for path in (folder / "out").iterdir() if path.is_file()} == {
        ".safetensors",
        ".json",
        ".md",
    }
    assert sorted(path.name for path in folder.glob("out/checkpoint-*")) == [
        f"checkpoint-{k}" for k in (1, 2, 3)
    ]
    log = log_of(folder, "out")
    updates = [row for row in log["history"] if "loss" in row]
    assert log["steps"] == len(updates) == 3 and log["job"] == json.loads(
        (folder / "out/training_job.json").read_text()
    )
    watched = [row for row in log["history"] if "eval_exact_accuracy" in row]
    assert [row["step"] for row in watched] == [0, 1, 2, 3] and all(
        "eval_objective/scores" in row for row in watched
    )
    said = (folder / "stdout").read_text()
    kept_out = sum(is_kept_out(row.prompt) for row in ROWS)
    assert (
        kept_out
        and f"{len(ROWS) - kept_out} beginnings of values.jsonl; {kept_out} more are kept out"
        in said
    )
    assert (
        "3 updates of 8 beginnings" in said
        and "judge's score of a step" in said
        and "prm: a PRM (StepTokens)" in said
    )
    assert (folder / "logs/out/training.png").stat().st_size > 30_000
    card = (folder / "out/README.md").read_text()
    assert (
        "model after step PPO (states both), rewarded by prm-prm, from" in card
        and "| judge's score of a step |" in card
    )


def test_stopped_in_the_middle_it_ends_with_the_same_weights(folder, monkeypatch, capsys):
    shutil.copytree(folder / "out", folder / "killed")
    for left in (
        "config.json",
        "model.safetensors",
        "checkpoint-2/trainer_state.json",
        "checkpoint-3/trainer_state.json",
    ):
        (folder / "killed" / left).unlink()
    train_here(folder, monkeypatch, output_dir="killed")
    assert "going on from killed/checkpoint-1" in capsys.readouterr().out
    once, again = (load_file(folder / name / "model.safetensors") for name in ("out", "killed"))
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert log_of(folder, "killed")["history"] == log_of(folder, "out")["history"]


def test_the_example_trains_an_adapter_from_problems(folder, monkeypatch, capsys):
    """configs/ppo.yaml, but for what it reads and writes, its sizes and its precision; then the adapter goes on, merged."""
    given = {
        "config": local_config(folder),
        "dataset_name": "problems.jsonl",
        "dtype": "float32",
        "gradient_accumulation_steps": 1,
    }
    train_here(folder, monkeypatch, **given, output_dir="adapter", eval_limit=0, total_episodes=8)
    names = {path.name for path in (folder / "adapter").iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
    } <= names and "model.safetensors" not in names
    weights = load_file(folder / "adapter/adapter_model.safetensors")
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
    log = log_of(folder, "adapter")
    assert log["job"]["states"] == "fresh" and "eval_exact_accuracy" not in log["history"][0]
    capsys.readouterr()
    train_here(
        folder,
        monkeypatch,
        model_name_or_path="adapter",
        output_dir="merged",
        total_episodes=8,
        eval_strategy="no",
    )
    first = next(row for row in log_of(folder, "merged")["history"] if "loss" in row)
    # the reference is the adapter, not its base
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert "model.safetensors" in {path.name for path in (folder / "merged").iterdir()}


def test_a_value_function_may_begin_elsewhere(folder, monkeypatch):
    """The PRM has one token more than the policy, at the end: the policy's ids mean the same to it."""
    given = {
        "value_model": "prm",
        "total_episodes": 8,
        "eval_strategy": "no",
        "save_total_limit": 1,
    }
    train_here(folder, monkeypatch, **given, output_dir="valued")
    (checkpoint,) = folder.glob("valued/checkpoint-*")
    tokens = load_file(checkpoint / "trained.safetensors")["backbone.embed_tokens.weight"]
    assert (
        tokens.shape
        == load_file(folder / "prm/model.safetensors")["model.embed_tokens.weight"].shape
    )


@pytest.mark.parametrize("judge", ["exact", "shuffled", "response"])
def test_any_judge_rewards(folder, monkeypatch, judge):
    if judge == "response":
        make_llama(str(folder / "model"), folder / "reward")
    given = {
        "exact": {"judge_problems": "problems.jsonl"},
        "shuffled": {"judge_path": "prm", "shuffled_judge": "prm"},
        "response": {"judge_path": "reward", "states": "fresh"},
    }[judge]
    options = {name: value for name, value in GIVEN.items() if name != "judge_path"} | given
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(folder)
    rest = flags(
        judge=judge,
        output_dir=judge,
        eval_strategy="no",
        save_strategy="no",
        **options | {"total_episodes": 8},
    )
    monkeypatch.setattr(sys, "argv", ["train.py", "ppo", *rest])
    train.main()
    assert log_of(folder, judge)["job"]["judge"] == judge and not list(
        folder.glob(f"{judge}/checkpoint-*")
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset_name": "none.jsonl"}, "none.jsonl not found"),
        ({"dataset_name": "test.jsonl"}, "test.jsonl:1: a held-out problem (problems_test.jsonl)"),
        ({"dataset_name": "bad.jsonl"}, "bad.jsonl:2: field 'score'"),
        ({"total_episodes": 0}, "total_episodes: expected 1 or more, got 0"),
        ({"temperature": 0}, "temperature: expected a number above 0"),
        ({"states": "some"}, "argument --states: invalid choice"),
        ({"beta": 0.1}, "unknown argument --beta"),
        ({"eval_limit": -1}, "eval_limit: expected 0 or more"),
        ({"eval_problems": "none.jsonl"}, "none.jsonl not found"),
        ({"output_dir": "model"}, "is the model that training starts from"),
        ({"output_dir": "out"}, "out exists: give --overwrite"),
        ({"model_name_or_path": "nowhere"}, "model directory nowhere not found"),
        ({"judge_path": "nowhere"}, "model directory nowhere not found"),
        (
            {"judge_path": "model"},
            "model is no process reward model: its config.json names no step_token",
        ),
        ({"judge": "response"}, "response scores whole answers: give --states fresh"),
        ({"judge": "gguf"}, "prm is a folder, expected a file"),
        ({"value_model": "nowhere"}, "model directory nowhere not found"),
        ({"value_model": "strange"}, "--value_model strange has another tokenizer than the policy"),
        ({"value_model": "prm", "use_peft": "true"}, "shares the policy's weights"),
        ({"load_in_4bit": "true"}, "a policy of step PPO is not trained on quantized weights"),
        ({"resume_from_checkpoint": "true"}, "no whole checkpoint"),
    ],
)
def test_mistakes_are_one_line(folder, monkeypatch, capsys, given, message):
    write_records(folder / "bad.jsonl", [ROWS[0], {**vars(ROWS[1]), "score": 2}])
    with open(ROOT / "data/problems_test.jsonl", encoding="utf-8") as file:
        write_records(folder / "test.jsonl", [json.loads(file.readline())])
    if not (folder / "strange").exists():
        shutil.copytree(folder / "model", folder / "strange")
        tokenizer = json.loads((folder / "strange/tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        first, second = (token for token, index in vocabulary.items() if index in (400, 401))
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        (folder / "strange/tokenizer.json").write_text(json.dumps(tokenizer))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(SystemExit) as stopped:
        run(lambda: train_here(folder, monkeypatch, **{"output_dir": "new"} | given))
    assert (
        stopped.value.code == 2
        and {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    )
    line = capsys.readouterr().err
    assert message in line and line.startswith("train.py: error: ") and line.count("\n") == 1


@pytest.mark.slow
def test_smollm2_two_updates_on_two_problems(smollm2, tmp_path):
    """A real pretrained model, its adapter rewarded by itself as a judge, then by the checker, which knows the answers."""
    write_records(tmp_path / "problems.jsonl", TASKS[:2])
    config = ["--config", str(local_config(tmp_path)), "--dtype", "float32", "--bf16", "false"]
    given = {
        "model_name_or_path": smollm2,
        "dataset_name": "problems.jsonl",
        "output_dir": "out",
        "logs_dir": "logs",
    }
    small = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "num_mini_batches": 1,
        "total_episodes": 4,
    }
    small |= {
        "max_new_tokens": 32,
        "max_solution_steps": 3,
        "eval_strategy": "no",
        "save_strategy": "no",
        "num_ppo_epochs": 1,
    }
    rest = flags(judge="hf", judge_path=smollm2, use_cpu="true", **given, **small)
    command = [sys.executable, str(ROOT / "train.py"), "ppo", *config, *rest]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    updates = log_of(tmp_path, "out")["history"]
    assert len(updates) == 2 and all(
        0 <= row["objective/scores"] <= 1 and row["steps/number"] >= 2 for row in updates
    )
    assert updates[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    weights = load_file(tmp_path / "out/adapter_model.safetensors")
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
