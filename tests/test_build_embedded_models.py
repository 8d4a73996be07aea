"""The recipe of the miniatures: its batches are what they say, and the script runs, is killed, and goes on."""

import itertools
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from reasoning.problems import problems
from reasoning.records import Problem
from utils.build_embedded_models import (
    bucketed,
    collate_judge,
    collate_text,
    judge_data,
    judge_question,
    policy_data,
)

ROOT = Path(__file__).resolve().parents[1]


def test_batches_hold_everything_once_and_fit():
    lengths = [random.Random(0).randint(50, 200) for _ in range(1000)]
    batches = bucketed(lengths, random.Random(0), tokens=1000, window=256)
    assert sorted(i for batch in batches for i in batch) == list(range(1000))
    assert all(max(lengths[i] for i in batch) * len(batch) <= 1000 for batch in batches)


def test_a_text_batch_has_loss_on_the_solution_alone(tokenizer):
    examples = list(policy_data(tokenizer, 3, seed=0))
    batch = collate_text([examples])
    for b, example in enumerate(examples):
        solution = [
            token
            for token, step in zip(example["ids"], example["step_of"], strict=True)
            if step >= 0
        ]
        assert (
            batch["labels"][b][batch["labels"][b] >= 0].tolist() == solution
            and solution[-1] == tokenizer.eos_token_id
        )


def test_questions_in_one_pass_are_read_as_if_each_stood_alone(tiny_model_dir, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    question, yes, no = judge_question(tokenizer)
    assert tokenizer.convert_ids_to_tokens([*question, yes, no]) == ["Right", "?", "▁Yes", "▁No"]
    wrong = Problem("Mia has 2 apples.", "5", ["Step 1: 2 + 3 = 5", "Answer: 5"])
    solutions = [(problem, problem.steps) for problem in itertools.islice(problems("train"), 3)]
    examples = list(
        judge_data(tokenizer, [*solutions, (wrong, ["Step 1: 2 + 3 = 6", "Answer: 6"])])
    )
    assert examples[-1]["labels"] == [0, 0]
    batch = collate_judge([examples], question, yes, no)
    answers, trunk_labels = batch.pop("answers"), batch.pop("trunk_labels")
    assert (trunk_labels[-1] == -100).all() and answers[-1][answers[-1] >= 0].tolist() == [no, no]
    with torch.inference_mode():
        logits = model(**batch).logits
        for b, example in enumerate(examples):
            ends = [
                max(i for i, step in enumerate(example["step_of"]) if step == k) + 1
                for k in range(len(example["labels"]))
            ]
            asked = (answers[b] >= 0).nonzero()[:, 0].tolist()
            for end, position in zip(ends, asked, strict=True):
                alone = model(torch.tensor([example["ids"][:end] + question])).logits[0, -1]
                torch.testing.assert_close(logits[b, position], alone, atol=1e-4, rtol=1e-4)


def test_the_script_goes_on_after_a_kill(tmp_path):
    """Small enough to learn nothing; killed once the policy is there."""
    counts = [
        "--policy_examples",
        "60",
        "--judge_examples",
        "30",
        "--judge_samples",
        "20",
        "--validation",
        "10",
    ]
    command = [
        sys.executable,
        str(ROOT / "utils/build_embedded_models.py"),
        "--output",
        "models",
        *counts,
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    policy = tmp_path / "models/.build/policy-mini/config.json"
    deadline = time.monotonic() + 200
    while not policy.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert policy.exists(), process.stdout.read()
    before = policy.stat().st_mtime_ns
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "models/policy-mini/config.json").stat().st_mtime_ns == before, (
        "the finished policy was made again"
    )
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"policy-mini", "judge-mini"}
    judge = tmp_path / "models/judge-mini"
    assert (judge / "judge-mini.Q8_0.gguf").is_file() and "greedy accuracy" in (
        tmp_path / "models/policy-mini/README.md"
    ).read_text()
    assert "wrote models/policy-mini and models/judge-mini" in done.stdout.splitlines()[-1]
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2 and "--overwrite" in again.stderr


@pytest.mark.slow
def test_policy_large_has_the_learning_rate_of_the_best_trial(tmp_path):
    counts = [
        "--policy_examples",
        "300",
        "--trial_examples",
        "200",
        "--validation",
        "20",
        "--learning_rate",
        "1e-9",
        "2e-3",
    ]
    command = [
        sys.executable,
        str(ROOT / "utils/build_embedded_models.py"),
        "--size",
        "large",
        "--output",
        "models",
        *counts,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "wrote models/policy-large", (
        done.stderr
    )
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["policy-large"]
    folder = tmp_path / "models/policy-large"
    card = (folder / "README.md").read_text()
    assert (
        "6.1M parameters" in card
        and "peak learning rate 0.002" in card
        and "trial with 1e-09" in card
    )
    assert (folder / "model.safetensors").stat().st_size < 16 * 2**20


@pytest.mark.parametrize("name", ["policy-mini", "judge-mini"])
def test_committed_miniatures_load_and_are_small(name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ROOT / "models" / name
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert (
        model.config.model_type == "llama"
        and 1e6 < model.num_parameters() < 3e6
        and model.dtype == torch.float16
    )
    assert tokenizer("7 + 41")["input_ids"] == tokenizer.convert_tokens_to_ids(
        ["<s>", "▁", "7", "▁+", "▁", "4", "1"]
    )
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8 * 2**20
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".gguf"}


def test_gguf_and_hf_judge_agree_on_200_steps():
    """The committed judge as GGUF Q8_0 in ctransformers against the Hugging Face directory in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from reasoning.problems import stories
    from reward_model.tinyllama_reward_model import TinyLlamaRewardScorer

    folder = ROOT / "models/judge-mini"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    rng, solutions = random.Random(3), []
    for story in stories("validation"):
        solutions.append((story.problem(), story.human_solution(rng)[0]))
        if sum(len(steps) for _, steps in solutions) >= 200:
            break
    question, yes, no = judge_question(tokenizer)
    batch = collate_judge([list(judge_data(tokenizer, solutions))], question, yes, no)
    answers, _ = batch.pop("answers"), batch.pop("trunk_labels")
    with torch.inference_mode():
        logits = model(**batch).logits[answers >= 0]
    hf = logits[:, yes] - logits[:, no]
    with TinyLlamaRewardScorer(str(folder / "judge-mini.Q8_0.gguf")) as judge:
        scored = judge.score_steps([(problem.prompt, steps) for problem, steps in solutions])
    # scores have 6 decimals
    gguf = torch.logit(torch.tensor([score for scores in scored for score in scores]), eps=1e-6)
    hf = hf.clamp(gguf.min(), gguf.max())
    assert len(hf) >= 200
    # a decision may differ where the judge does not know: within the quantization error of the border
    assert ((gguf > 0) == (hf > 0))[hf.abs() > 0.3].all() and (gguf - hf).abs().median() < 0.3
