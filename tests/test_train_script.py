"""train.py as a user runs it, on a tiny model: what it writes, resuming, what it refuses."""

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

from common.files import ROOT, write_records
from reasoning.splits import is_kept_out
from tests.helpers.scripts import run_script
from tests.helpers.training import flags, make_pairs, refused
from trainer.data import DataArgs, read_dataset
from trainer.stepwise_dpo_trainer import RECIPE

pytestmark = pytest.mark.process
ROWS = make_pairs(30)
SMALL = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 3,
    "save_steps": 2,
    "logging_steps": 1,
    "bf16": "false",
    "seed": 1,
}
ARGS = flags(dataset_name="pairs.jsonl", model_name_or_path="model", logs_dir="logs", **SMALL)


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory) -> Path:
    """The pairs, a copy of the model, and one finished training: `out`, `logs/out`, `stdout`."""
    folder = tmp_path_factory.mktemp("training")
    write_records(folder / "pairs.jsonl", ROWS)
    shutil.copytree(tiny_model_dir, folder / "model")
    (folder / "stdout").write_text(trained(folder, *ARGS, "--output_dir", "out"))
    return folder


def trained(folder: Path, *args: str) -> str:
    """What train.py prints in a process of its own."""
    done = run_script("train.py", *args, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(folder: Path, name: str) -> list[float]:
    log = json.loads((folder / f"logs/{name}/log.json").read_text())
    return [entry["loss"] for entry in log["history"] if "loss" in entry]


def test_a_training_writes_a_model_that_loads_and_moved(folder):
    before = load_file(folder / "model/model.safetensors")
    after = load_file(folder / "out/model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert AutoModelForCausalLM.from_pretrained(folder / "out").dtype == torch.float32
    assert AutoTokenizer.from_pretrained(folder / "out").eos_token == "</s>"
    kept_out = sum(is_kept_out(row["prompt"]) for row in ROWS)
    assert kept_out
    log = json.loads((folder / "logs/out/log.json").read_text())
    assert log["job"]["pairs"] == len(ROWS) - kept_out
    assert log["job"] == json.loads((folder / "out/training_job.json").read_text())
    found = losses(folder, "out")
    assert len(found) == log["steps"]
    margins = [entry["rewards/margins"] for entry in log["history"] if "loss" in entry]
    assert margins[0] == pytest.approx(0, abs=1e-3) and margins[-1] > 0.01
    printed = (folder / "stdout").read_text()
    assert f"{len(ROWS) - kept_out} pairs of pairs.jsonl; {kept_out} more are kept out" in printed
    assert printed.splitlines()[-1] == (
        "wrote the tuned model to out, the log to logs/out/log.json, its picture to "
        "logs/out/training.png"
    )
    assert (folder / "logs/out/training.png").stat().st_size > 10_000
    assert "reward margin" in printed and f"{found[-1]:.3f}" in printed
    assert "| loss |" in (folder / "out/README.md").read_text()
    assert not list((folder / "out").glob(".*"))
    assert [path.name for path in folder.glob("out/checkpoint-*")] == [f"checkpoint-{log['steps']}"]


def test_killed_and_started_again_ends_with_the_same_weights(folder):
    args = [*ARGS, "--output_dir", "killed"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *args],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    # its last brace: until then a checkpoint is being written, and is not resumed
    while not any(
        path.read_text().endswith("}\n")
        for path in (folder / "killed").glob("checkpoint-*/trainer_state.json")
    ):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "killed/config.json").exists(), "it had finished before it was killed"
    half = folder / "killed/checkpoint-1000"  # a checkpoint that was being written
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")

    printed = trained(folder, *args)
    assert "resuming from killed/checkpoint-" in printed and "checkpoint-1000" not in printed
    once, twice = (load_file(folder / name / "model.safetensors") for name in ("out", "killed"))
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert losses(folder, "killed") == losses(folder, "out")


def test_an_adapter_with_evaluation_replaces_a_model(folder):
    """--overwrite removes only what the earlier training wrote; YAML gives arguments."""
    shutil.copytree(folder / "out", folder / "again")
    (folder / "again/notes.txt").write_text("mine")
    (folder / "lora.yaml").write_text(
        "max_steps: 2\nuse_peft: true\nlora_r: 4\nloss_type: [stepwise, sft]\n"
        "eval_strategy: steps\neval_steps: 1\n"
    )
    options = flags(output_dir="again", config="lora.yaml", save_strategy="no")
    trained(folder, *ARGS, "--overwrite", *options)
    names = {path.name for path in (folder / "again").iterdir()}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert {*adapter, "notes.txt", "tokenizer.json", "README.md"} <= names
    assert not {"model.safetensors", "config.json"} & names
    assert AutoModelForCausalLM.from_pretrained(folder / "again") is not None  # base and adapter
    history = json.loads((folder / "logs/again/log.json").read_text())["history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [1, 2]


# --- what it refuses ---


def test_what_has_changed_since_it_was_killed_is_refused(folder, monkeypatch, capsys):
    """Not by its path: a model that was moved is the same model."""
    shutil.copytree(folder / "out", folder / "stopped")
    for name in ("config.json", "model.safetensors"):
        (folder / "stopped" / name).unlink()
    shutil.copytree(folder / "model", folder / "moved")
    given = flags(dataset_name="pairs.jsonl", model_name_or_path="moved", logs_dir="logs", **SMALL)
    given += ["--output_dir", "stopped"]
    weights = (folder / "moved/model.safetensors").read_bytes()
    for name, content in {
        "chat_template.jinja": b"{{ messages }}",
        "tokenizer.model": b"another",
        "model.safetensors": weights[:-1] + b"\0\0"[:1],
    }.items():
        path = folder / "moved" / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(content)
        line = refused(folder, monkeypatch, capsys, *given)
        assert "stopped exists" in line and "has changed since: model\n" in line
        line = refused(folder, monkeypatch, capsys, *given, "--resume_from_checkpoint", "true")
        assert "was trained with other files (model)" in line
        if before is None:
            path.unlink()
        else:
            path.write_bytes(before)
    write_records(folder / "fewer.jsonl", ROWS[:9])
    line = refused(folder, monkeypatch, capsys, *given, "--dataset_name", "fewer.jsonl")
    assert "has changed since: pairs, pairs_sha256" in line
    assert "resuming from stopped/checkpoint-" in trained(folder, *given)
    once, twice = (load_file(folder / name / "model.safetensors") for name in ("out", "stopped"))
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_a_log_of_another_training_is_not_replaced(folder, monkeypatch, capsys):
    before = (folder / "logs/out/log.json").read_bytes()
    for more in ([], ["--overwrite"]):
        args = [*ARGS, "--output_dir", "elsewhere/out", *more]
        line = refused(folder, monkeypatch, capsys, *args)
        assert "logs/out holds the log of another training" in line and "--run_name" in line
    assert (folder / "logs/out/log.json").read_bytes() == before


def test_inputs_in_the_output_folder_are_refused(folder, monkeypatch, capsys):
    checkpoint = next((folder / "out").glob("checkpoint-*"))
    shutil.copytree(checkpoint, folder / "mine/checkpoint-1")
    (folder / "mine/tokenizer_pairs.jsonl").write_bytes((folder / "pairs.jsonl").read_bytes())
    for name, value in (
        ("model_name_or_path", "mine/checkpoint-1"),
        ("dataset_name", "mine/tokenizer_pairs.jsonl"),
    ):
        more = ["--output_dir", "mine", "--overwrite", f"--{name}", value]
        assert "lies in the output mine" in refused(folder, monkeypatch, capsys, *ARGS, *more)


def test_checkpoints_hold_no_pickled_arguments(folder):
    names = {path.name for path in folder.glob("out/**/*")}
    assert "optimizer.pt" in names and "training_args.bin" not in names


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"credit": "fork", "loss_type": ["stepwise", "step_sft"]},
        {"credit": "fork", "precompute_ref_log_probs": "true", "precompute_ref_batch_size": 3},
    ],
)
def test_two_processes_train_as_one(tiny_model_dir, tmp_path, more):
    """The weights after one step of plain SGD are those of one process with all pairs.

    Each process has half of the pairs, and only the main process writes."""
    pairs = [row for row in ROWS if not is_kept_out(row["prompt"])][:8]
    write_records(tmp_path / "pairs.jsonl", pairs)
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    settings = {
        "dataset_name": "pairs.jsonl",
        "model_name_or_path": "model",
        "logs_dir": "logs",
        "bf16": "false",
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "warmup_steps": 0,
        "max_grad_norm": 0,
        "margin_gamma": 1,
        "logging_steps": 1,
        **more,
    }
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1"}
    ways = (("one", [], 8, "pairs"), ("two", torchrun, 4, "pairs"), ("rows", torchrun, 4, "none"))
    for name, launcher, batch, pack in ways:
        sizes = {"per_device_train_batch_size": batch, "pack": pack}
        given = flags(**settings, output_dir=name, **sizes)
        command = [sys.executable, *launcher, str(ROOT / "train.py"), *given]
        options = {"cwd": tmp_path, "env": environment, "timeout": 600}
        done = subprocess.run(command, capture_output=True, text=True, **options)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote the tuned model") == 1
    names = ("one", "two", "rows")
    one, two, rows = (load_file(tmp_path / name / "model.safetensors") for name in names)
    before = load_file(tmp_path / "model/model.safetensors")
    assert any(not torch.equal(before[name], one[name]) for name in one)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-6)
        torch.testing.assert_close(rows[name], one[name], rtol=0, atol=2e-6)
    logs = [
        json.loads((tmp_path / f"logs/{name}/log.json").read_text())["history"][0] for name in names
    ]
    for name in (
        *("loss", "rewards/margins", "scores/chosen", "logps/chosen_vs_ref/step_1"),
        *("weights/rejected", "entropy"),
    ):
        expected = pytest.approx(logs[0][name], abs=1e-4)
        assert logs[1][name] == expected and logs[2][name] == expected, name


ROW = ROWS[0]
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
    "nan.jsonl": (json.dumps({**ROW, "rejected_scores": [float("nan")]}).encode(), "nan.jsonl:1: "),
    "step.jsonl": (json.dumps({**ROW, "chosen": [" "]}).encode(), "'chosen', step 1"),
}


def test_an_odd_row_among_others_is_left_out_and_shown(tmp_path, capsys):
    bad = [
        {**ROW, "rejected_scores": [2.0]},
        {**ROW, "chosen_scores": None, "rejected_scores": None},
    ]
    write_records(tmp_path / "rows.jsonl", [ROW, bad[0], ROW, bad[1]])
    records = read_dataset(RECIPE, *DataArgs(dataset_name=[str(tmp_path / "rows.jsonl")]).data_sets)
    assert len(records) == 2
    printed = capsys.readouterr().out
    assert "rows.jsonl:2: field 'rejected_scores'" in printed
    assert "rows.jsonl:4: field 'chosen_scores' is missing: score the pairs first" in printed


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows(tmp_path, tiny_model_dir, monkeypatch, capsys, name):
    content, message = BAD_ROWS[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    names = {"dataset_name": name, "output_dir": "out", "logs_dir": "logs"}
    args = flags(model_name_or_path=tiny_model_dir, **names)
    assert message in refused(tmp_path, monkeypatch, capsys, *args)


@pytest.fixture(scope="module")
def broken(tiny_model_dir, tmp_path_factory) -> Path:
    """A folder with pairs, a model, and whatever a user may confuse with them."""
    folder = tmp_path_factory.mktemp("broken")
    write_records(folder / "pairs.jsonl", ROWS)
    with open(ROOT / "data/problems_test.jsonl", encoding="utf-8") as file:
        held_out = json.loads(file.readline())["prompt"]
    write_records(folder / "test.jsonl", [ROW, {**ROW, "prompt": held_out}])
    (folder / "bad.yaml").write_text("learning_rat: 1\n")
    for name in ("empty", "hollow", "full", "other"):
        (folder / name).mkdir()
    (folder / "full/letter.txt").touch()
    for name in ("model", "torn", "partial"):
        shutil.copytree(tiny_model_dir, folder / name)
    for name in ("hollow", "other"):
        shutil.copy(folder / "model/config.json", folder / name)
    weights = folder / "model/model.safetensors"
    (folder / "torn/model.safetensors").write_bytes(weights.read_bytes()[:5000])
    left = {name: w for name, w in load_file(weights).items() if name != "model.norm.weight"}
    save_file(left, folder / "partial/model.safetensors", {"format": "pt"})
    return folder


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
        (["--config"], "argument --config: expected one argument"),
        (["--run_name", "../other"], "argument --run_name: expected a name, got the path ../other"),
        (["--run_name", ".."], "argument --run_name: expected a name"),
        (["--model_name_or_path", "nowhere"], "model directory nowhere not found"),
        (["--model_name_or_path", "empty"], "empty is no model directory"),
        (["--model_name_or_path", "pairs.jsonl"], "is a file, expected a model directory"),
        (["--model_name_or_path", "hollow"], "hollow: cannot be trained this way"),
        (["--model_name_or_path", "torn"], "torn: cannot be trained this way"),
        (["--model_name_or_path", "partial"], "weights are missing, for example model.norm.weight"),
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
def test_bad_arguments(broken, monkeypatch, capsys, args, message):
    given = flags(
        dataset_name="pairs.jsonl", model_name_or_path="model", output_dir="out", logs_dir="logs"
    )
    command = [] if args[0].startswith("-") else args
    options = [] if command else args
    assert message in refused(broken, monkeypatch, capsys, *command, *given, *options)


def test_a_finished_model_is_not_overwritten(folder, monkeypatch, capsys):
    same = [*ARGS, "--output_dir", "out"]
    for args in (same, [*same, "--beta", "0.2"]):
        assert "out exists: give --overwrite" in refused(folder, monkeypatch, capsys, *args)


def test_help_of_a_command_names_its_arguments(tmp_path):
    assert "--anchor_lambda" in trained(tmp_path, "dpo", "--help")


@pytest.mark.parametrize(
    ("args", "seconds", "word"),
    [
        (["--help"], 2, "commands:"),
        # a process of its own loads all libraries
        pytest.param(["dpo", "--help"], 15, "--anchor_lambda", marks=pytest.mark.slow),
    ],
)
def test_help_is_fast(tmp_path, args, seconds, word):
    """In processor seconds, which other work on the machine does not change."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    command = [sys.executable, str(ROOT / "train.py"), *args]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and word in done.stdout and used() - before < seconds
