"""A PEFT adapter directory is used like a model directory, and equals the merged model."""

import json
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ModelError
from common.files import ROOT, read_rows, write_records
from lm.gguf_export import export_gguf
from lm.loading import load_model
from lm.policy import Policy
from lm.prompting import plain_chat_template

BASE = str(ROOT / "models/policy-mini")
PROMPTS = [
    "Mia has 12 apples. She buys 3 boxes with 4 apples each. How many apples does Mia have now?",
    "Tom has 40 books. He loses 17 books. He finds 5 books. How many books does Tom have now?",
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> str:
    """A LoRA on every matrix of policy-mini, not zero, as PEFT writes it: without a tokenizer."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        load_model(BASE, torch.float32)[0],
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.15)
    folder = tmp_path_factory.mktemp("adapter") / "model"
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory) -> str:
    """The same as a plain model directory, merged by PEFT itself."""
    from peft import AutoPeftModelForCausalLM

    folder = tmp_path_factory.mktemp("merged") / "model"
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    model.merge_and_unload().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(f"{BASE}/{name}", folder)
    return str(folder)


def test_a_policy_is_its_merged_model(adapter, merged):
    first, second, base = map(Policy.load, (adapter, merged, BASE))
    answers = [policy.generate(PROMPTS, max_new_tokens=60) for policy in (first, second, base)]
    assert answers[0] == answers[1] != answers[2]
    sampling = {"n": 4, "temperature": 1.0, "max_new_tokens": 40, "seed": 3}
    assert first.generate(PROMPTS, **sampling) == second.generate(PROMPTS, **sampling)
    streams = ["".join(p.stream(PROMPTS[0], max_new_tokens=60)) for p in (first, second)]
    assert streams[0] == streams[1]
    rows = [
        (PROMPTS[0], [], ["Step 1: 3 * 4 = 12, 12 + 12 = 24", "Answer: 24"]),
        (PROMPTS[1], ["Step 1: 40 - 17 = 23"], ["x"]),
    ]
    assert first.logps(rows) == pytest.approx(second.logps(rows), abs=1e-4)
    assert first.logps(rows) != pytest.approx(base.logps(rows), abs=0.01)


def test_an_adapters_own_tokenizer_comes_before_its_bases(adapter, tmp_path):
    folder = Path(shutil.copytree(adapter, tmp_path / "model"))
    _, tokenizer = load_model(adapter, "auto")
    assert tokenizer.chat_template == plain_chat_template()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    assert load_model(str(folder), "auto")[1].chat_template == tokenizer.chat_template


def test_a_gguf_of_an_adapter_is_that_of_its_merged_model(adapter, merged, tmp_path):
    """Byte for byte: it is merged in float32, although its base is stored in 16 bits."""
    export_gguf(adapter, tmp_path / "adapter.gguf")
    export_gguf(merged, tmp_path / "merged.gguf")
    assert (tmp_path / "adapter.gguf").read_bytes() == (tmp_path / "merged.gguf").read_bytes()


def train_from(model: str, folder: Path, *more: object, command: str = "dpo") -> list[dict]:
    """A training of 4 steps in this process. Returns the log entries with a loss."""
    import train

    flags = {
        "model_name_or_path": model, "dataset_name": ROOT / "data/rewarded.jsonl", "limit": 8,
        "output_dir": folder / "out", "logs_dir": folder / "logs", "num_train_epochs": 1,
        "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 2,
        "save_total_limit": 9, "learning_rate": 1e-3, "bf16": "false", "disable_tqdm": "true",
    }  # fmt: skip
    if command == "dpo":
        flags["loss_type"] = "stepwise"  # its first loss is ln 2
    argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    with patch.object(sys, "argv", ["train.py", command, *argv, *map(str, more)]):
        train.main()
    history = json.loads((folder / "logs/out/log.json").read_text())["history"]
    return [entry for entry in history if "loss" in entry]


def adapter_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/adapter_model.safetensors")


def assert_all_moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.process
def test_an_adapter_is_trained_further_and_resumes(adapter, tmp_path, capsys):
    """The reference is the adapter as it was: the first loss is ln 2. The result is an adapter on
    the same base, and the same after a stop."""
    history = train_from(adapter, tmp_path, "--use_peft", "--lora_r", 32)
    assert f"training the adapter {adapter} further" in capsys.readouterr().out
    assert len(history) == 4 and history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert history[0]["logps/chosen_vs_ref"] == pytest.approx(0, abs=1e-4)
    out = tmp_path / "out"
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == (BASE, 4)
    assert not (out / "ref").exists() and not (out / "config.json").exists()
    trained = adapter_weights(out)
    assert_all_moved(adapter_weights(adapter), trained)
    policy = Policy.load(str(out))
    assert policy.generate(PROMPTS[:1], max_new_tokens=10) and policy.tokenizer.eos_token == "</s>"

    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        (out / name).unlink()
    shutil.rmtree(out / "checkpoint-4")
    again = train_from(adapter, tmp_path, "--use_peft", "--lora_r", 32)
    assert [entry["loss"] for entry in again] == [entry["loss"] for entry in history]
    resumed = adapter_weights(out)
    assert all(torch.equal(resumed[name], trained[name]) for name in trained)


@pytest.mark.process
@pytest.mark.parametrize("precomputed", ["false", "true"])
def test_without_use_peft_an_adapter_is_merged_first(adapter, merged, tmp_path, precomputed):
    """All weights are trained, and the reference is the merged model, not the base on disk."""
    history = train_from(adapter, tmp_path, "--precompute_ref_log_probs", precomputed)
    assert history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert history[0]["logps/chosen_vs_ref"] == pytest.approx(0, abs=1e-3)
    out = tmp_path / "out"
    assert (out / "config.json").exists() and not (out / "adapter_config.json").exists()
    start, after = (load_file(f"{folder}/model.safetensors") for folder in (merged, out))
    distance = {name: (after[name] - start[name]).abs().max().item() for name in start}
    assert start.keys() == after.keys() and all(0 < far < 0.05 for far in distance.values())


@pytest.mark.process
def test_supervised_training_takes_an_adapter(adapter, tmp_path):
    assert train_from(adapter, tmp_path, "--use_peft", command="sft")
    assert_all_moved(adapter_weights(adapter), adapter_weights(tmp_path / "out"))


def without_weights(folder: Path):
    (folder / "adapter_model.safetensors").unlink()


def without_a_matrix(folder: Path):
    weights = adapter_weights(folder)
    weights.pop(min(weights))
    save_file(weights, folder / "adapter_model.safetensors")


def change_config(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def with_base(base: str | None):
    return lambda folder: change_config(
        folder / "adapter_config.json", base_model_name_or_path=base
    )


def with_half_a_base(folder: Path):
    base = Path(shutil.copytree(BASE, folder.parent / "half"))
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    change_config(base / "config.json", num_hidden_layers=layers + 1)
    with_base(str(base))(folder)


def with_broken_json(folder: Path):
    (folder / "adapter_config.json").write_text("{")


def with_broken_weights(folder: Path):
    (folder / "adapter_model.safetensors").write_bytes(b"rubbish" * 9)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without_weights, "adapter_model.safetensors is missing"),
        (without_a_matrix, "missing adapter keys"),
        (with_base(None), "names no base_model_name_or_path"),
        (with_base("models/gone/away"), "its base models/gone/away"),
        (with_half_a_base, r"its base \S+half \(weights are missing"),
        (with_broken_json, "no model can be loaded"),
        (with_broken_weights, "deserializing"),
    ],
)
def test_a_broken_adapter_is_one_line_that_names_it(adapter, tmp_path, change, expected):
    folder = Path(shutil.copytree(adapter, tmp_path / "model"))
    change(folder)
    with pytest.raises(ModelError, match=expected) as error:
        load_model(str(folder), "auto")
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.process
def test_the_scripts_take_an_adapter(adapter, merged, run_script, tmp_path):
    """Answers, pairs and the comparison are those of the merged model, file by file."""
    write_records(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])

    def run(script: str, **flags: object) -> None:
        arguments = [part for name, value in flags.items() for part in (f"--{name}", value)]
        result = run_script(script, *arguments)
        assert result.returncode == 0, result.stderr

    for name, model in (("adapter", adapter), ("merged", merged)):
        out = tmp_path / name
        run(
            "inference.py", model_name_or_path=model, input=tmp_path / "prompts.jsonl",
            output=out / "answers.jsonl", max_new_tokens=60,
        )  # fmt: skip
        run(
            "utils/build_synthetic_dataset.py", model_name_or_path=model, limit=12, samples=4,
            output=out / "pairs.jsonl",
        )  # fmt: skip
        run(
            "evaluation/eval_reward_scores.py", base_model=BASE, tuned_model=model, limit=6,
            output_dir=out / "results",
        )  # fmt: skip
    for name in ("answers.jsonl", "pairs.jsonl", "results/reward_score_comparison.jsonl"):
        first, second = (
            [row for _, row in read_rows(tmp_path / kind / name)] for kind in ("adapter", "merged")
        )
        assert first == second and first, name
