"""trainer/settings_check.py: settings that cannot work end in one line, before any work."""

import importlib.util
from pathlib import Path

import pytest
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.training_args import OptimizerNames

import train
from common.files import write_records
from tests.helpers.training import flags, make_pairs, refused

DATA = flags(dataset_name="none.jsonl", model_name_or_path="none", output_dir="out")


def message(capsys, monkeypatch, folder: Path, *args: str, command: str = "dpo") -> str:
    """The error line of a training whose data set is missing: only settings are found before."""
    return refused(folder, monkeypatch, capsys, command, *DATA, *args)


def is_missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


PACKAGES = [
    ("bitsandbytes", ["--optim", "paged_adamw_8bit"]),
    ("bitsandbytes", ["--optim", "adamw_bnb_8bit"]),
    ("galore_torch", ["--optim", "galore_adamw", "--optim_target_modules", "all-linear"]),
    ("lomo_optim", ["--optim", "lomo"]),
    ("schedulefree", ["--optim", "schedule_free_adamw"]),
    ("torchao", ["--optim", "adamw_torch_8bit"]),
    ("liger_kernel", ["--use_liger_kernel", "true"]),
    ("deepspeed", ["--deepspeed", "zero.json"]),
    ("wandb", ["--report_to", "wandb"]),
    ("mlflow", ["--report_to", "mlflow"]),
]


@pytest.mark.parametrize(("package", "args"), PACKAGES)
def test_a_package_that_is_not_there(tmp_path, monkeypatch, capsys, package, args):
    if not is_missing(package):
        pytest.skip(f"{package} is installed")
    error = message(capsys, monkeypatch, tmp_path, *args)
    # transformers keeps a refused configuration until its memory is freed, for all later trainings
    unset_hf_deepspeed_config()
    assert package in error or args[0] == "--deepspeed"
    assert "none.jsonl" not in error


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--push_to_hub", "true"], "--push_to_hub: "),
        (["--push_to_hub", "true", "--hub_token", "hf_no_token"], "--push_to_hub: "),
        (["--report_to", "my_tracker"], "--report_to: my_tracker is no tracker"),
        (["--tf32", "true"], "tf32"),
        (["--fsdp", "wrong"], "fsdp"),
        (["--optim_args", "foo"], "--optim: "),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "--lr_scheduler_type: "),
        (["--lr_scheduler_type", "warmup_stable_decay"], "--lr_scheduler_type: "),
        (["--lr_scheduler_kwargs", '{"foo": 1}'], "--lr_scheduler_type: "),
        (["--lr_scheduler_kwargs", "{"], "error: "),
        (["--dataloader_persistent_workers", "true"], "--dataloader"),
        (["--dataloader_num_workers", "-1"], "--dataloader_num_workers: expected 0 to 1,024"),
        (["--dataloader_num_workers", "100000"], "--dataloader_num_workers: expected 0 to 1,024"),
        pytest.param(
            ["--torch_compile_backend", "foo"], "--torch_compile: ", marks=pytest.mark.process
        ),
        (["--gradient_checkpointing_kwargs", '{"foo": 1}'], "--activation_checkpointing_kwargs: "),
        (["--activation_checkpointing_kwargs", '{"foo": 1}'], "_checkpointing_kwargs: "),
        (["--activation_checkpointing_kwargs", '{"every_n_layers": 0}'], "expected 1 or more"),
        (["--train_sampling_strategy", "group_by_length"], "goes with sft only"),
        (["--accelerator_config", "none.json"], "none.json"),
        (["--accelerator_config", '{"foo": 1}'], "foo"),
        (["--learning_rate=-1"], "learning_rate: expected a number of 0 or more"),
        (["--learning_rate", "1e300"], "--learning_rate: expected 0 to 1,000,000"),
        (["--num_train_epochs", "1e30"], "--num_train_epochs: expected 0 to 1,000,000"),
        (["--beta", "1e300"], "--beta: expected 0 to 1,000,000"),
        (["--adam_beta1", "1"], "--adam_beta1: expected 0 to 0.999999"),
        (["--weight_decay", "-1"], "--weight_decay: expected 0 to"),
        (["--max_grad_norm", "-1"], "--max_grad_norm: expected 0 to"),
        (["--loss_type", "sigmoid", "--loss_weights", "-1"], "--loss_weights: expected 0 to"),
        (["--save_steps", "0"], "--save_steps: expected above 0 to"),
        (["--max_steps", "0"], "--max_steps: expected 1 or more, or -1"),
        (["--max_steps", "-5"], "--max_steps: expected 1 or more, or -1"),
        (["--lora_r", "0"], "--lora_r: expected 1 to"),
        (["--lora_dropout", "2"], "--lora_dropout: expected 0 to"),
        (["--neftune_noise_alpha", "-1"], "--neftune_noise_alpha: expected 0 to"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps: expected"),
        (["--per_device_train_batch_size", "2000000000"], "train_batch_size: expected 1 to"),
        (["--pad_to_multiple_of", "0"], "--pad_to_multiple_of: expected 1 to"),
        (["--seed", "-1"], "--seed: expected 0 to 4294967295"),
        (["--data_seed", "4294967296"], "--data_seed: expected 0 to 4294967295"),
        (["--max_length", "9" * 22], "--max_length: expected"),
        (["--limit", "9" * 22], "--limit: expected"),
        (["--limit", "9" * 5000], "--limit"),
    ],
)
def test_what_cannot_work(tmp_path, monkeypatch, capsys, args, expected):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    error = message(capsys, monkeypatch, tmp_path, *args)
    assert expected in error and "none.jsonl" not in error and len(error) < 800


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400"])
@pytest.mark.parametrize("command", train.COMMANDS)
def test_no_number_of_a_training_is_nan_or_infinite(tmp_path, monkeypatch, capsys, command, value):
    """Every argument that is a number, of every training."""
    module = importlib.import_module(train.COMMANDS[command][0])
    kinds = (float, float | None, list[float], list[float] | None)
    names = [
        field.name
        for field in module.RECIPE.config.__dataclass_fields__.values()
        if field.type in kinds or field.type in ("float", "float | None", "list[float] | None")
    ]
    assert "learning_rate" in names and len(names) >= 8
    for name in names if value == "nan" else names[:3]:
        error = message(capsys, monkeypatch, tmp_path, f"--{name}={value}", command=command)
        assert f"argument --{name}: expected a finite number" in error


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [each.value for each in OptimizerNames])
def test_every_optimizer_is_made_or_refused(tmp_path, monkeypatch, capsys, optimizer):
    error = message(capsys, monkeypatch, tmp_path, "--optim", optimizer)
    assert "none.jsonl not found" in error or "argument --optim: " in error


def test_step_ppo_checks_its_tracker(tmp_path, monkeypatch, capsys):
    error = message(capsys, monkeypatch, tmp_path, "--report_to", "my_tracker", command="ppo")
    assert "my_tracker is no tracker" in error
    assert "none" in message(capsys, monkeypatch, tmp_path, command="ppo")


def test_possible_settings_pass(tmp_path, monkeypatch, capsys):
    args = flags(optim="sgd", lr_scheduler_type="cosine", report_to="tensorboard", max_steps=-1)
    assert "none.jsonl" in message(capsys, monkeypatch, tmp_path, *args)


@pytest.mark.process
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model_init_kwargs": '{"foo": 1}'}, "unexpected keyword argument 'foo'"),
        ({"model_init_kwargs": "[]"}, "cannot be trained this way"),
        ({"attn_implementation": "foo"}, "is not supported"),
        ({"attn_implementation": "flash_attention_2"}, "cannot be trained this way"),
        ({"attn_implementation": "kernels-community/flash-attn"}, "`kernels`"),
        ({"use_peft": "true", "lora_target_modules": "foo"}, "Target modules foo not found"),
        ({"use_peft": "true", "lora_task_type": "FOO"}, "Invalid task type"),
        ({"fsdp": "full_shard"}, "only works in distributed training"),
    ],
)
def test_what_does_not_fit_the_model(
    tmp_path, tiny_model_dir, monkeypatch, capsys, options, expected
):
    write_records(tmp_path / "pairs.jsonl", make_pairs(12))
    given = {"dataset_name": "pairs.jsonl", "model_name_or_path": tiny_model_dir}
    given |= {"output_dir": "out", "logs_dir": "logs"}
    args = flags(**given, **options)
    assert expected in refused(tmp_path, monkeypatch, capsys, *args)


@pytest.mark.slow
@pytest.mark.process
def test_a_metric_that_is_not_measured(tmp_path, tiny_model_dir, run_script):
    write_records(tmp_path / "pairs.jsonl", make_pairs(30))
    args = flags(
        dataset_name="pairs.jsonl", model_name_or_path=tiny_model_dir, output_dir="out",
        logs_dir="logs", max_steps=1, eval_strategy="steps", eval_steps=1, save_steps=1,
        load_best_model_at_end="true", metric_for_best_model="foo", bf16="false",
    )  # fmt: skip
    done = run_script("train.py", *args)
    errors = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert done.returncode == 2 and "Traceback" not in done.stderr and len(errors) == 1
    assert "argument --metric_for_best_model: " in errors[0]
