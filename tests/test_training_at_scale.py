"""Trainings on several processes: FSDP2 against one process, resuming on another number of them.

accelerate shards on GPUs only; tests/helpers/fsdp_on_cpu.py lets it shard on two CPU processes."""

import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands import launch
from safetensors.torch import load_file

from common.errors import UserError
from common.files import ROOT, write_records
from reasoning.splits import is_kept_out
from tests.helpers.scripts import run_script
from tests.helpers.training import STEP_VALUES, flags, make_pairs
from trainer.checkpoints import differences
from trainer.session import Training
from trainer.settings_check import check_settings

CONFIGS = ROOT / "configs/accelerate"
ROWS = [row for row in make_pairs(60) if not is_kept_out(row["prompt"])][:32]
SETTINGS = {
    "model_name_or_path": "model",
    "logs_dir": "logs",
    "bf16": "false",
    "max_steps": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_steps": 2,
    "save_total_limit": 2,
    "disable_tqdm": "true",
}


@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3"])
def test_accelerate_reads_the_configurations(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type.value == ("FSDP" if name == "fsdp2" else "DEEPSPEED")
    assert config.num_processes == -1, "accelerate then asks for --num_processes"
    assert config.mixed_precision == "no", "train.py chooses"
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    else:
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
    command = f"accelerate launch --config_file configs/accelerate/{name}.yaml --num_processes 8"
    assert command in (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")


def test_only_the_rows_of_an_update_tell_two_jobs_apart():
    """Not how many processes share them."""
    two = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "processes": 2}
    one = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "processes": 1}
    before = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}  # an older job
    assert differences(two, one) == differences(before, two) == []
    (found,) = differences(two, {**two, "processes": 4})
    assert found.endswith("(8, now 16)") and "per_device_train_batch_size" in found


@pytest.mark.parametrize("written", ["", "pytorch_model_fsdp.bin", "global_step2"])
@pytest.mark.parametrize("now", ["", "fsdp", "deepspeed"])
def test_a_checkpoint_is_resumed_in_the_way_that_wrote_it(tmp_path, written, now):
    if written:
        (tmp_path / written).touch()
    way = {"": "", "pytorch_model_fsdp.bin": "fsdp", "global_step2": "deepspeed"}[written]
    trainer = SimpleNamespace(
        is_fsdp_enabled=now == "fsdp", is_deepspeed_enabled=now == "deepspeed"
    )
    training = SimpleNamespace(checkpoint=tmp_path)
    if way == now:
        Training._check_checkpoint(training, trainer)  # type: ignore[arg-type]
        return
    with pytest.raises(UserError, match="resume it in this way"):
        Training._check_checkpoint(training, trainer)  # type: ignore[arg-type]


def test_deepspeed_resumes_on_as_many_processes_only(tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / "global_step2").mkdir(parents=True)
    (tmp_path / "training_job.json").write_text('{"processes": 2}')
    trainer = SimpleNamespace(is_fsdp_enabled=False, is_deepspeed_enabled=True)
    with pytest.raises(UserError, match="as many processes as before"):
        Training._check_checkpoint(SimpleNamespace(checkpoint=checkpoint), trainer)  # type: ignore


def test_step_ppo_refuses_shared_weights(monkeypatch):
    from trainer.ppo.config import PPOArgs

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="every process needs all weights"):
        check_settings(PPOArgs(), SimpleNamespace())


# --- two processes ---


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scale")
    write_records(folder / "pairs.jsonl", ROWS)
    write_records(folder / "values.jsonl", STEP_VALUES)
    shutil.copytree(tiny_model_dir, folder / "model")
    return folder


def accelerate_environment(count: int) -> dict[str, str]:
    """What `accelerate launch --config_file configs/accelerate/fsdp2.yaml` tells its processes."""
    parser = launch.launch_command_parser()
    given = ["--config_file", str(CONFIGS / "fsdp2.yaml"), "--num_processes", str(count), "x.py"]
    args, *_ = launch._validate_launch_command(parser.parse_args(given))
    return launch.prepare_multi_gpu_env(args)


def train(folder: Path, way: str, command: str, **settings: object) -> subprocess.CompletedProcess:
    """Run train.py. way: `ddp N`, on N processes (one of them: none is started); `fsdp N`, on N
    processes that share the weights; `launch N`, the same by `accelerate launch` itself.

    The processes of the first two are forked (tests/helpers/scripts.py), with the environment that
    torchrun and accelerate give theirs."""
    kind, count = way.split()
    line = ["train.py", command, *flags(**{**SETTINGS, **settings})]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    if kind == "launch":
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
        launcher += ["--config_file", str(CONFIGS / "fsdp2.yaml"), "--num_processes", count]
        launcher += [str(ROOT / "tests/helpers/fsdp_on_cpu.py"), str(ROOT / line[0]), *line[1:]]
        options = {"cwd": folder, "env": environment, "timeout": 600}
        return subprocess.run(launcher, capture_output=True, text=True, **options)
    if kind == "fsdp":
        environment = {**accelerate_environment(int(count)), **environment}
        line = ["tests/helpers/fsdp_on_cpu.py", str(ROOT / line[0]), *line[1:]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def run_rank(rank: int) -> subprocess.CompletedProcess:
        env = dict(environment)
        if way != "ddp 1":
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count}
            env |= {"LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return run_script(*line, cwd=folder, env=env, timeout=600)

    with ThreadPoolExecutor() as pool:
        done, *others = pool.map(run_rank, range(int(count)))
    for other in others:
        assert "wrote" not in other.stdout, "only the first process writes"
        done.returncode = done.returncode or other.returncode
        done.stderr += other.stderr
    return done


def losses(folder: Path, name: str) -> list[float]:
    log = json.loads((folder / f"logs/{name}/log.json").read_text())
    return [entry["loss"] for entry in log["history"] if "loss" in entry]


def assert_same(folder: Path, name: str, other: str, last: int = 4) -> None:
    """The same losses to 1e-4, and nearly the same weights, which have moved."""
    assert len(losses(folder, name)) == 4
    assert losses(folder, name)[-last:] == pytest.approx(losses(folder, other)[-last:], abs=1e-4)
    one, two = (load_file(folder / each / "model.safetensors") for each in (name, other))
    before = load_file(folder / "model/model.safetensors")
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-4)
        if key in before:  # a PRM has one more embedding, that of the step token
            kept = one[key][: len(before[key])]
            assert not torch.allclose(before[key], kept, rtol=0, atol=5e-4)


def assert_quiet(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote the tuned model") == 1
    for word in ("warning", "traceback", "destroy_process_group"):
        assert word not in done.stderr.lower(), done.stderr


CASES = {
    "dpo": ("dpo", "pairs.jsonl", {}),
    "dpo_rows": ("dpo", "pairs.jsonl", {"pack": "none"}),
    "sft": ("sft", "pairs.jsonl", {}),
    "sft_packed": ("sft", "pairs.jsonl", {"packing": "true", "max_length": 128}),
    "prm": ("prm", "values.jsonl", {}),
    "reward": ("reward", "pairs.jsonl", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_fsdp_on_two_processes_trains_as_one(folder, case):
    command, data, more = CASES[case]
    settings = {"dataset_name": data, "save_strategy": "no", **more}
    one, two = f"{case}_one", f"{case}_two"
    # four whole updates: accelerate fills up an incomplete one with rows from the start of the data
    batch = {"sft_packed": 4, "prm": 2}.get(case, 8)
    sizes = {"per_device_train_batch_size": batch}
    assert_quiet(train(folder, "ddp 1", command, **settings, **sizes, output_dir=one))
    sizes = {"per_device_train_batch_size": batch // 2}
    way = "launch 2" if case == "dpo" else "fsdp 2"
    done = train(folder, way, command, **settings, **sizes, output_dir=two)
    assert_quiet(done)
    assert "2 processes (FSDP)" in done.stdout
    assert "sharded modules: 0" not in done.stdout and "sharded modules: " in done.stdout
    assert_same(folder, one, two)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"), [("ddp 2", "ddp 1"), ("ddp 1", "ddp 2"), ("fsdp 2", "fsdp 1")]
)
def test_a_training_resumes_on_another_number_of_processes(folder, first, then):
    """After two of four updates, with the same number of rows in an update."""
    whole, resumed = (f"{word} {first} {then}".replace(" ", "_") for word in ("whole", "resumed"))
    counts = [int(way.split()[1]) for way in (first, then)]
    settings = {"dataset_name": "pairs.jsonl", "per_device_train_batch_size": 4}
    done = train(
        *(folder, first, "dpo"),
        **settings,
        output_dir=whole,
        gradient_accumulation_steps=2 // counts[0],
    )
    assert_quiet(done)
    (folder / resumed).mkdir()
    shutil.copy(folder / whole / "training_job.json", folder / resumed)
    shutil.copytree(folder / whole / "checkpoint-2", folder / resumed / "checkpoint-2")
    again = {**settings, "output_dir": resumed}

    done = train(folder, then, "dpo", **again, gradient_accumulation_steps=2 // counts[1])
    assert_quiet(done)
    assert f"resuming from {resumed}/checkpoint-2" in done.stdout
    assert_same(folder, whole, resumed, last=2)


@pytest.mark.slow
def test_without_gpus_fsdp_is_ddp_and_says_so(folder):
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        settings = {"dataset_name": "pairs.jsonl", "output_dir": "fallback", "max_steps": 1}
        done = train(folder, "ddp 2", "dpo", **settings)
    assert_quiet(done)
    assert "2 processes (DDP); FSDP needs GPUs and is not used" in done.stdout
