"""configs/tinyllama: every file is accepted by its script, they fit together, and all five run."""

import importlib
import json

import pytest
import yaml

from common.files import ROOT, read_rows

FOLDER = ROOT / "configs/tinyllama"
SCRIPTS = {
    "build_synthetic_dataset": "utils/build_synthetic_dataset.py",
    "evaluate_steps": "reward_model/evaluate_steps.py",
    "train": "train.py",
    "eval_reward_scores": "evaluation/eval_reward_scores.py",
    "inference": "inference.py",
}
ARGUMENTS = {
    "build_synthetic_dataset": "PairArguments",
    "evaluate_steps": "EvaluateArguments",
    "eval_reward_scores": "EvalArgs",
    "inference": "InferenceArgs",
}


def content(name: str) -> dict:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def test_there_is_a_file_for_each_command():
    assert {path.stem for path in FOLDER.iterdir()} == set(SCRIPTS)
    for name, script in SCRIPTS.items():
        command = f"python {script} --config configs/tinyllama/{name}.yaml"
        assert command in (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_takes_its_file(name):
    from common.cli import parse_args

    if name == "train":
        from trl import ModelConfig

        from trainer.data import DataArgs
        from trainer.stepwise_dpo_trainer import StepwiseDPOConfig

        classes = (DataArgs, StepwiseDPOConfig, ModelConfig)
    else:
        module = importlib.import_module(SCRIPTS[name].removesuffix(".py").replace("/", "."))
        classes = (getattr(module, ARGUMENTS[name]),)
    parsed = parse_args(
        *classes,
        description="",
        args=["--config", str(FOLDER / f"{name}.yaml")],
        defaults={"use_cpu": True} if name == "train" else None,
    )
    for key, value in content(name).items():
        if (name, key) == ("train", "dataset_name"):
            value = [value]  # it may name several
        assert [getattr(args, key) for args in parsed if hasattr(args, key)] == [value], key


def test_what_one_writes_the_next_reads():
    files = {name: content(name) for name in SCRIPTS}
    sample, score, train, compare, ask = files.values()
    assert sample["output"] == score["input"]
    assert score["output"] == train["dataset_name"] == compare["pairs"]
    assert train["output_dir"] == compare["tuned_model"] == ask["model_name_or_path"]
    (judge,) = {file["judge_path"] for file in (score, compare, ask)}
    assert judge.endswith("tinyllama-1.1b-chat-v1.0.Q4_K_M.gguf")
    models = {sample["model_name_or_path"], train["model_name_or_path"], compare["base_model"]}
    assert models == {"TinyLlama/TinyLlama-1.1B-Chat-v1.0"}


@pytest.fixture(scope="module")
def tinyllama(tmp_path_factory) -> str:
    """A model directory of TinyLlama's shape, tokenizer and chat template, with two layers.

    The weights are random; a larger row for EOS in the head ends an answer every few tokens."""
    import torch
    from safetensors.torch import load_file, save_file

    from benchmarks.tinyllama_shape import write_tinyllama

    folder = tmp_path_factory.mktemp("hub") / "TinyLlama-1.1B-Chat-v1.0"
    write_tinyllama(folder, layers=2)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][2] = weights["lm_head.weight"][2].float().mul(12).to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.slow
@pytest.mark.process
def test_the_five_commands_run(tinyllama, run_script, tmp_path):
    """A dry run with other paths, limits and lengths, and bf16 only where the machine has it.

    The pairs are chosen by a judge, because random weights are never right."""
    from lm.gguf_export import export_gguf
    from lm.loading import pick_device

    judge = tmp_path / "judge.Q4_0.gguf"
    export_gguf(tinyllama, judge, "Q4_0")
    pairs, rewarded = tmp_path / "pairs.jsonl", tmp_path / "rewarded.jsonl"
    tuned = tmp_path / "tuned"
    device, bf16 = pick_device()
    numbers = [] if bf16 else ["--bf16", "false", "--dtype", "float32"]
    short = ["--max_new_tokens", 8]
    test_problems = ROOT / "data/problems_test.jsonl"
    overrides = {
        "build_synthetic_dataset": [
            *("--model_name_or_path", tinyllama, "--output", pairs, "--limit", 4, *short),
            *("--pair_by", "judge", "--judge_path", judge),
        ],
        "evaluate_steps": ["--judge_path", judge, "--input", pairs, "--output", rewarded],
        "train": [
            *("--model_name_or_path", tinyllama, "--dataset_name", rewarded),
            *("--output_dir", tuned, "--logs_dir", tmp_path, "--max_steps", 1),
            *("--use_cpu", str(device == "cpu").lower(), *numbers),
        ],
        "eval_reward_scores": [
            *("--base_model", tinyllama, "--tuned_model", tuned, "--judge_path", judge),
            *("--input", test_problems, "--pairs", rewarded),
            *("--output_dir", tmp_path / "results", "--limit", 2, *short),
        ],
        "inference": [
            *("--model_name_or_path", tuned, "--judge_path", judge, "--prompt", "2 + 2 = ?", *short)
        ],
    }
    printed = {}
    for name, arguments in overrides.items():
        result = run_script(
            SCRIPTS[name], "--config", FOLDER / f"{name}.yaml", *arguments, timeout=1200
        )
        assert result.returncode == 0, f"{name}: {result.stderr[-2000:]}"
        printed[name] = result.stdout
    assert "template chat, context 2048" in printed["evaluate_steps"]
    scores = [
        score
        for _, row in read_rows(rewarded)
        for side in ("chosen", "rejected")
        for score in row[f"{side}_scores"]
    ]
    assert len(set(scores)) > 2 and all(0 < score < 1 for score in scores)
    adapter = json.loads((tuned / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["base_model_name_or_path"]) == (16, tinyllama)
    result = json.loads((tmp_path / "results/reward_score_comparison.json").read_text())
    assert result["num_examples"] == 2
    assert "[0." in printed["inference"]
