"""train.py as a user runs it, on a tiny model: what it writes, how it is killed and resumed, and what it refuses."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from common.cli import run
from common.files import ROOT, write_records
from reasoning.splits import is_kept_out
from tests.test_stepwise_dpo_trainer import make_rows

ROWS = make_rows(30)
SMALL = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 3,
    "save_steps": 2,
    "logging_steps": 1,
    "bf16": "false",
    "seed": 1,
}


def flags(**options) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory) -> Path:
    """A folder with the pairs, a copy of the model, and one finished training: `out`, `logs/out`, `stdout`."""
    folder = tmp_path_factory.mktemp("training")
    write_records(folder / "pairs.jsonl", ROWS)
    shutil.copytree(tiny_model_dir, folder / "model")
    done = subprocess.run(
        command("--output_dir", "out"),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def command(*args: str) -> list[str]:
    given = flags(dataset_name="pairs.jsonl", model_name_or_path="model", logs_dir="logs", **SMALL)
    return [sys.executable, str(ROOT / "train.py"), *given, *args]


def test_a_training_writes_a_model_that_loads_and_moved(folder):
    before = load_file(folder / "model/model.safetensors")
    after = load_file(folder / "out/model.safetensors")
    assert before.keys() == after.keys() and all(
        not torch.equal(before[name], after[name]) for name in before
    )
    assert AutoModelForCausalLM.from_pretrained(folder / "out").dtype == torch.float32
    assert AutoTokenizer.from_pretrained(folder / "out").eos_token == "</s>"
    kept_out = sum(is_kept_out(row["prompt"]) for row in ROWS)
    assert kept_out
    log = json.loads((folder / "logs/out/log.json").read_text())
    assert log["job"]["pairs"] == len(ROWS) - kept_out and log["job"] == json.loads(
        (folder / "out/training_job.json").read_text()
    )
    losses = [entry["loss"] for entry in log["history"] if "loss" in entry]
    assert (
        len(losses) == log["steps"]
        and losses[0] == pytest.approx(0.693, abs=2e-3)
        and losses[-1] < losses[0]
    )
    said = (folder / "stdout").read_text()
    assert f"{len(ROWS) - kept_out} pairs of pairs.jsonl; {kept_out} more are kept out" in said
    assert said.splitlines()[-1] == (
        "wrote the tuned model to out, the log to logs/out/log.json, its picture to logs/out/training.png"
    )
    assert (folder / "logs/out/training.png").stat().st_size > 10_000
    assert "reward margin" in said and f"{losses[-1]:.3f}" in said
    assert "| loss |" in (folder / "out/README.md").read_text() and not list(
        (folder / "out").glob(".*")
    )
    assert [path.name for path in folder.glob("out/checkpoint-*")] == [f"checkpoint-{log['steps']}"]


def test_killed_and_started_again_ends_with_the_same_weights(folder):
    process = subprocess.Popen(
        command("--output_dir", "killed"),
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not list((folder / "killed").glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "killed/config.json").exists(), "it had finished before it was killed"
    half = folder / "killed/checkpoint-1000"  # a checkpoint that was being written
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")

    again = subprocess.run(
        command("--output_dir", "killed"), cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert again.returncode == 0, again.stderr
    assert (
        "going on from killed/checkpoint-" in again.stdout and "checkpoint-1000" not in again.stdout
    )
    once, twice = (load_file(folder / name / "model.safetensors") for name in ("out", "killed"))
    assert all(torch.equal(once[name], twice[name]) for name in once)
    steps = [
        [
            entry["loss"]
            for entry in json.loads((folder / f"logs/{name}/log.json").read_text())["history"]
            if "loss" in entry
        ]
        for name in ("out", "killed")
    ]
    assert steps[0] == steps[1]


def test_an_adapter_with_evaluation_replaces_a_model(folder):
    """--overwrite removes what the earlier training wrote, and nothing else; YAML gives arguments."""
    shutil.copytree(folder / "out", folder / "again")
    (folder / "again/notes.txt").write_text("mine")
    config = "max_steps: 2\nuse_peft: true\nlora_r: 4\nloss_type: [stepwise, sft]\neval_strategy: steps\neval_steps: 1\n"
    (folder / "lora.yaml").write_text(config)
    args = command(
        "--output_dir", "again", "--overwrite", "--config", "lora.yaml", "--save_strategy", "no"
    )
    done = subprocess.run(args, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (folder / "again").iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "notes.txt",
        "tokenizer.json",
        "README.md",
    } <= names
    assert not {"model.safetensors", "config.json"} & names
    assert AutoModelForCausalLM.from_pretrained(folder / "again") is not None  # base and adapter
    history = json.loads((folder / "logs/again/log.json").read_text())["history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [1, 2]


# --- what it refuses ---


def refused(folder: Path, monkeypatch, capsys, *args: str) -> str:
    """Run train.py in this process; it must exit with 2, say one line, and write nothing."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(SystemExit) as stopped:
        run(train.main)
    assert stopped.value.code == 2
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    line = capsys.readouterr().err
    assert line.startswith("train.py: error: ") and line.count("\n") == 1
    return line


ROW = dict(ROWS[0])


@pytest.mark.slow
def test_two_processes_train_as_one(tiny_model_dir, tmp_path):
    """Half of the pairs each, gradients averaged: the weights after one step of plain SGD are those of one process with all of
    them, and the main process alone writes."""
    write_records(
        tmp_path / "pairs.jsonl", [row for row in ROWS if not is_kept_out(row["prompt"])][:8]
    )
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    settings = {
        "dataset_name": "pairs.jsonl",
        "model_name_or_path": "model",
        "logs_dir": "logs",
        "bf16": "false",
        "max_steps": 1,
    }
    settings |= {
        "optim": "sgd",
        "learning_rate": 0.1,
        "warmup_steps": 0,
        "max_grad_norm": 0,
        "margin_gamma": 1,
        "logging_steps": 1,
    }
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29512",
    ]
    for name, launcher, batch in (("one", [sys.executable], 8), ("two", torchrun, 4)):
        given = flags(**settings, output_dir=name, per_device_train_batch_size=batch)
        done = subprocess.run(
            [*launcher, str(ROOT / "train.py"), *given],
            cwd=tmp_path, capture_output=True, text=True, timeout=600, env={**os.environ, "ACCELERATE_USE_CPU": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote the tuned model") == 1
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    before = load_file(tmp_path / "model/model.safetensors")
    assert any(not torch.equal(before[name], one[name]) for name in one)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-6)
    logs = [
        json.loads((tmp_path / f"logs/{name}/log.json").read_text())["history"][0]
        for name in ("one", "two")
    ]
    for name in (
        "loss",
        "rewards/margins",
        "scores/chosen",
        "logps/chosen_vs_ref/step_1",
        "weights/rejected",
        "entropy",
    ):
        assert logs[1][name] == pytest.approx(logs[0][name], abs=1e-4), name


BAD_ROWS = {
    "missing.jsonl": (None, "missing.jsonl not found"),
    "empty.jsonl": (b"", "no rows"),
    "broken.jsonl": (b'{"prompt": \n', "broken.jsonl:1: not JSON"),
    "latin.jsonl": ('{"prompt": "é"}'.encode("latin-1"), "latin.jsonl:1: not UTF-8"),
    "list.jsonl": (b"[1]", "expected a JSON object"),
    "unscored.jsonl": (
        json.dumps({**ROW, "chosen_scores": None, "rejected_scores": None}).encode(),
        "score the pairs first",
    ),
    "lengths.jsonl": (
        json.dumps({**ROW, "chosen_scores": [1]}).encode(),
        "expected one score for each of",
    ),
    "nan.jsonl": (
        json.dumps(ROW).encode()
        + b"\n"
        + json.dumps({**ROW, "rejected_scores": [float("nan")]}).encode(),
        "nan.jsonl:2: ",
    ),
    "step.jsonl": (json.dumps({**ROW, "chosen": [" "]}).encode(), "'chosen', step 1"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows(tmp_path, tiny_model_dir, monkeypatch, capsys, name):
    content, message = BAD_ROWS[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    args = flags(
        dataset_name=name, model_name_or_path=tiny_model_dir, output_dir="out", logs_dir="logs"
    )
    assert message in refused(tmp_path, monkeypatch, capsys, *args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["sftt"], "unknown command sftt: expected one of dpo"),
        (["--betta", "1"], "unknown argument"),
        (["--beta", "much"], "argument --beta"),
        (["--load_in_4bit"], "4-bit quantization requires bitsandbytes"),
        (["--beta", "-1"], "beta: expected a number above 0"),
        (["--limit", "0"], "--limit: expected 1 or more"),
        (["--credit", "blame"], "argument --credit: invalid choice"),
        (["--loss_type", "stepwise", "hinge"], "mix with sigmoid and sft only"),
        (["--config", "none.yaml"], "config file none.yaml not found"),
        (["--config", "bad.yaml"], "unknown key 'learning_rat'"),
        (["--config"], "argument --config: expected a YAML file"),
        (["--model_name_or_path", "nowhere"], "model directory nowhere not found"),
        (["--model_name_or_path", "empty"], "empty is no model directory"),
        (["--model_name_or_path", "pairs.jsonl"], "is a file, expected a model directory"),
        (["--model_name_or_path", "hollow"], "hollow: cannot be trained so"),
        (["--model_name_or_path", "torn"], "torn: cannot be trained so"),
        (["--model_name_or_path", "partial"], "weights are missing, model.norm.weight for one"),
        (["--output_dir", "pairs.jsonl"], "is a file, expected a folder"),
        (["--output_dir", "pairs.jsonl/out"], "cannot be written"),
        (["--output_dir", "model"], "is the model that training starts from"),
        (["--output_dir", "full"], "full exists: give --overwrite"),
        (
            ["--output_dir", "other", "--resume_from_checkpoint", "true"],
            "finished model of another training",
        ),
        (["--resume_from_checkpoint", "true"], "no whole checkpoint"),
        (["--logs_dir", "pairs.jsonl"], "cannot be written"),
        (
            ["--limit", "5", "--dataset_name", "test.jsonl"],
            "test.jsonl:2: a held-out problem (problems_test.jsonl)",
        ),
    ],
)
def test_bad_arguments(tmp_path, tiny_model_dir, monkeypatch, capsys, args, message):
    write_records(tmp_path / "pairs.jsonl", ROWS)
    with open(ROOT / "data/problems_test.jsonl", encoding="utf-8") as file:
        write_records(
            tmp_path / "test.jsonl", [ROW, {**ROW, "prompt": json.loads(file.readline())["prompt"]}]
        )
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    for name in ("empty", "hollow", "full", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "full/letter.txt").touch()
    shutil.copy(tmp_path / "model/config.json", tmp_path / "hollow")
    shutil.copy(tmp_path / "model/config.json", tmp_path / "other")
    shutil.copytree(tmp_path / "model", tmp_path / "torn")
    (tmp_path / "torn/model.safetensors").write_bytes(
        (tmp_path / "model/model.safetensors").read_bytes()[:5000]
    )
    shutil.copytree(tmp_path / "model", tmp_path / "partial")
    weights = load_file(tmp_path / "model/model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if k != "model.norm.weight"},
        tmp_path / "partial/model.safetensors",
        {"format": "pt"},
    )
    (tmp_path / "bad.yaml").write_text("learning_rat: 1\n")
    given = flags(
        dataset_name="pairs.jsonl", model_name_or_path="model", output_dir="out", logs_dir="logs"
    )
    command = [args.pop(0)] if not args[0].startswith("-") else []
    assert message in refused(tmp_path, monkeypatch, capsys, *command, *given, *args)


def test_a_finished_model_is_not_overwritten(folder, monkeypatch, capsys):
    same = command("--output_dir", "out")[2:]
    assert "out exists: give --overwrite" in refused(folder, monkeypatch, capsys, *same)
    assert "out exists: give --overwrite" in refused(
        folder, monkeypatch, capsys, *same, "--beta", "0.2"
    )


def test_help_is_fast(run_script):
    """In processor seconds, which other work on the machine does not change."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    for args, seconds, word in (
        (["--help"], 2, "commands:"),
        (["dpo", "--help"], 15, "--anchor_lambda"),
    ):
        before = used()
        done = run_script("train.py", *args)
        assert done.returncode == 0 and word in done.stdout and used() - before < seconds
