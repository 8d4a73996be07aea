"""python train.py ppo: what it writes, resuming, adapters, judges, what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.files import ROOT, write_records
from reasoning.splits import is_kept_out
from tests.helpers.reward_models import make_llama, make_prm
from tests.helpers.scripts import run_script
from tests.helpers.training import (
    PROBLEMS,
    STEP_VALUES,
    as_if_killed,
    flags,
    refused,
    taught,
    train_here,
)

pytestmark = pytest.mark.process
SMALL = {
    "bf16": "false",
    "use_cpu": "true",
    "logs_dir": "logs",
    "max_new_tokens": 32,
    "max_solution_steps": 2,
    "eval_limit": 1,
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
    # the default is relative to the folder in which its module was imported
    "eval_problems": ROOT / "data/problems_hard_validation.jsonl",
    "learning_rate": 1e-3,
    **SMALL,
}


@pytest.fixture(autouse=True)
def accelerator_state():
    """Accelerator keeps its settings for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory) -> Path:
    """Step values, a policy, a PRM, and one finished training of three updates: `out`."""
    folder = tmp_path_factory.mktemp("train_ppo")
    write_records(folder / "values.jsonl", STEP_VALUES)
    write_records(folder / "problems.jsonl", PROBLEMS)
    solutions = [(problem.prompt, problem.steps) for problem in PROBLEMS]
    taught(tiny_model_dir, folder / "model", solutions)
    make_prm(tiny_model_dir, folder / "prm")
    done = run_script("train.py", "ppo", *flags(**GIVEN, output_dir="out"), cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def local_config(folder: Path) -> Path:
    """configs/ppo.yaml for a local file, which has no configurations."""
    text = (ROOT / "configs/ppo.yaml").read_text(encoding="utf-8")
    (folder / "ppo.yaml").write_text(text.replace("dataset_config: main\n", ""))
    return folder / "ppo.yaml"


def log_of(folder: Path, name: str) -> dict:
    return json.loads((folder / f"logs/{name}/log.json").read_text())


def test_a_training_writes_a_policy_that_moved(folder):
    before, after = (load_file(folder / name / "model.safetensors") for name in ("model", "out"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert AutoModelForCausalLM.from_pretrained(folder / "out").dtype == torch.float32
    assert AutoTokenizer.from_pretrained(folder / "out").eos_token == "</s>"
    suffixes = {path.suffix for path in (folder / "out").iterdir() if path.is_file()}
    assert suffixes == {".safetensors", ".jinja", ".json", ".md"}
    checkpoints = sorted(path.name for path in folder.glob("out/checkpoint-*"))
    assert checkpoints == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    log = log_of(folder, "out")
    updates = [row for row in log["history"] if "loss" in row]
    assert log["steps"] == len(updates) == 3
    assert log["job"] == json.loads((folder / "out/training_job.json").read_text())
    evaluated = [row for row in log["history"] if "eval_exact_accuracy" in row]
    assert [row["step"] for row in evaluated] == [0, 1, 2, 3]
    assert all("eval_objective/scores" in row for row in evaluated)
    printed = (folder / "stdout").read_text()
    kept_out = sum(is_kept_out(row.prompt) for row in STEP_VALUES)
    rows = f"{len(STEP_VALUES) - kept_out} prefixes of values.jsonl; {kept_out} more are kept out"
    assert kept_out and rows in printed
    assert "3 updates of 8 prefixes" in printed and "judge's score of a step" in printed
    assert "prm: a PRM (StepTokens)" in printed
    assert (folder / "logs/out/training.png").stat().st_size > 30_000
    card = (folder / "out/README.md").read_text()
    assert "model after step PPO (states both), rewarded by prm-prm, from" in card
    assert "| judge's score of a step |" in card


def test_stopped_in_the_middle_it_ends_with_the_same_weights(folder, monkeypatch, capsys):
    as_if_killed(folder / "out", folder / "killed")
    train_here(folder, monkeypatch, "ppo", *flags(**GIVEN, output_dir="killed"))
    assert "resuming from killed/checkpoint-1" in capsys.readouterr().out
    once, again = (load_file(folder / name / "model.safetensors") for name in ("out", "killed"))
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert log_of(folder, "killed")["history"] == log_of(folder, "out")["history"]


def test_the_example_trains_an_adapter_from_problems(folder, monkeypatch):
    """configs/ppo.yaml with other paths and sizes; then the adapter is merged and trained."""
    options = {
        "config": local_config(folder),
        "dataset_name": "problems.jsonl",
        "dtype": "float32",
        "gradient_accumulation_steps": 1,
        "eval_limit": 0,
        "total_episodes": 8,
        "output_dir": "adapter",
    }
    train_here(folder, monkeypatch, "ppo", *flags(**GIVEN | options))
    names = {path.name for path in (folder / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "model.safetensors" not in names
    weights = load_file(folder / "adapter/adapter_model.safetensors")
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
    log = log_of(folder, "adapter")
    assert log["job"]["states"] == "fresh" and "eval_exact_accuracy" not in log["history"][0]
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {"model_name_or_path": "adapter", "output_dir": "merged"}
    options |= {"total_episodes": 8, "eval_strategy": "no"}
    train_here(folder, monkeypatch, "ppo", *flags(**GIVEN | options))
    first = next(row for row in log_of(folder, "merged")["history"] if "loss" in row)
    # the reference is the adapter, not its base
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert "model.safetensors" in {path.name for path in (folder / "merged").iterdir()}


@pytest.mark.parametrize("judge", ["exact", "outcome", "shuffled", "response"])
def test_any_judge_rewards(folder, monkeypatch, judge):
    if judge == "response":
        make_llama(str(folder / "model"), folder / "reward")
    given = {
        "exact": {"judge_problems": "problems.jsonl"},
        "outcome": {"judge_problems": "problems.jsonl", "states": "fresh"},
        "shuffled": {"judge_path": "prm", "shuffled_judge": "prm"},
        "response": {"judge_path": "reward", "states": "fresh"},
    }[judge]
    options = {name: value for name, value in GIVEN.items() if name != "judge_path"} | given
    options |= {"judge": judge, "output_dir": judge, "total_episodes": 8}
    options |= {"eval_strategy": "no", "save_strategy": "no"}
    train_here(folder, monkeypatch, "ppo", *flags(**options))
    assert log_of(folder, judge)["job"]["judge"] == judge
    assert not list(folder.glob(f"{judge}/checkpoint-*"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset_name": "none.jsonl"}, "none.jsonl not found"),
        ({"dataset_name": "test.jsonl"}, "test.jsonl:1: a held-out problem (problems_test.jsonl)"),
        ({"dataset_name": "bad.jsonl"}, "bad.jsonl:1: field 'score'"),
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
        ({"value_model": "prm"}, "unknown argument --value_model"),
        ({"load_in_4bit": "true"}, "a policy of step PPO is not trained on quantized weights"),
        ({"resume_from_checkpoint": "true"}, "no whole checkpoint"),
    ],
)
def test_mistakes_are_one_line(folder, monkeypatch, capsys, given, message):
    write_records(folder / "bad.jsonl", [{**vars(STEP_VALUES[1]), "score": 2}])
    with open(ROOT / "data/problems_test.jsonl", encoding="utf-8") as file:
        write_records(folder / "test.jsonl", [json.loads(file.readline())])
    options = {**GIVEN, "output_dir": "new", **given}
    assert message in refused(folder, monkeypatch, capsys, "ppo", *flags(**options))


@pytest.mark.slow
def test_smollm2_two_updates_on_two_problems(smollm2, tmp_path):
    """A real pretrained model: an adapter on it, rewarded by the model itself as a judge."""
    solved = [problem for problem in PROBLEMS if not is_kept_out(problem.prompt)]
    write_records(tmp_path / "problems.jsonl", solved[:2])
    options = flags(
        config=local_config(tmp_path),
        dtype="float32",
        bf16="false",
        judge="hf",
        judge_path=smollm2,
        use_cpu="true",
        model_name_or_path=smollm2,
        dataset_name="problems.jsonl",
        output_dir="out",
        logs_dir="logs",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        total_episodes=4,
        max_new_tokens=32,
        max_solution_steps=3,
        eval_strategy="no",
        save_strategy="no",
        num_ppo_epochs=1,
    )
    done = run_script("train.py", "ppo", *options, cwd=tmp_path, timeout=1200)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    updates = log_of(tmp_path, "out")["history"]
    assert len(updates) == 2
    assert all(0 <= row["objective/scores"] <= 1 and row["steps/number"] >= 2 for row in updates)
    assert updates[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    weights = load_file(tmp_path / "out/adapter_model.safetensors")
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)


def test_an_update_without_a_good_step_shows_three_trajectories(folder, run_script, tmp_path):
    """One token is no step: every trajectory is cut."""
    given = GIVEN | {name: folder / GIVEN[name] for name in ("dataset_name", "model_name_or_path")}
    given |= {"judge_path": folder / "prm", "max_new_tokens": 1, "total_episodes": 8}
    done = run_script("train.py", "ppo", *flags(**given, output_dir="my out"))
    assert done.returncode == 0, done.stderr
    assert (
        "warning: all trajectories of the first update end in a step that scores 0" in done.stderr
    )
    assert done.stdout.count("verdict    cut") == 3 and "--max_new_tokens" in done.stdout
    assert len((tmp_path / "my out/first_update.samples.jsonl").read_text().splitlines()) == 3
