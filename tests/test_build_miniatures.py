"""The recipes of policy-mini and judge-mini: their batches, and resuming after a kill."""

import itertools
import random
import subprocess
import sys
import time

import pytest
import torch

from common.files import ROOT
from lm.loading import load_model
from reasoning.problems import problems, stories
from reasoning.records import Problem
from reward_model.tinyllama_reward_model import TinyLlamaRewardScorer
from utils.build_judge import collate_judge, judge_data, judge_question
from utils.build_policy import TOKENS_PER_BATCH, bucketed, collate_text, policy_data

SCRIPT = "utils/build_policy.py"


def test_batches_hold_everything_once_and_fit():
    lengths = [random.Random(k).randint(50, 200) for k in range(6000)]
    batches = bucketed(lengths, random.Random(0))
    assert sorted(i for batch in batches for i in batch) == list(range(6000))
    assert all(max(lengths[i] for i in batch) * len(batch) <= TOKENS_PER_BATCH for batch in batches)
    assert len(batches) < 1.2 * sum(lengths) / TOKENS_PER_BATCH  # similar lengths are together


def test_a_text_batch_has_loss_on_the_solution_alone(tokenizer):
    examples = list(policy_data(tokenizer, 3, seed=0))
    batch = collate_text([examples])
    assert batch["input_ids"].shape == (3, max(len(example["ids"]) for example in examples))
    for b, example in enumerate(examples):
        pairs = zip(example["ids"], example["step_of"], strict=True)
        solution = [token for token, step in pairs if step >= 0]
        assert batch["labels"][b][batch["labels"][b] >= 0].tolist() == solution
        assert solution[-1] == tokenizer.eos_token_id
        assert batch["input_ids"][b][batch["attention_mask"][b] > 0].tolist() == example["ids"]


def test_questions_in_one_pass_are_read_as_if_each_stood_alone(tiny_model_dir, tokenizer):
    model, _ = load_model(tiny_model_dir, torch.float32)
    question, yes, no = judge_question(tokenizer)
    assert tokenizer.convert_ids_to_tokens([*question, yes, no]) == ["Right", "?", "▁Yes", "▁No"]
    wrong = Problem("Mia has 2 apples.", "5", ["Step 1: 2 + 3 = 5", "Answer: 5"])
    solutions = [(problem, problem.steps) for problem in itertools.islice(problems("train"), 3)]
    solutions.append((wrong, ["Step 1: 2 + 3 = 6", "Answer: 6"]))
    examples = list(judge_data(tokenizer, solutions))
    assert examples[-1]["labels"] == [0, 0]
    batch = collate_judge([examples], question, yes, no)
    answers, trunk_labels = batch.pop("answers"), batch.pop("trunk_labels")
    assert (trunk_labels[-1] == -100).all() and answers[-1][answers[-1] >= 0].tolist() == [no, no]
    with torch.inference_mode():
        logits = model(**batch).logits
        for b, example in enumerate(examples):
            last = {step: place for place, step in enumerate(example["step_of"])}
            asked = (answers[b] >= 0).nonzero()[:, 0].tolist()
            for k, position in zip(range(len(example["labels"])), asked, strict=True):
                text = example["ids"][: last[k] + 1] + question
                alone = model(torch.tensor([text])).logits[0, -1]
                torch.testing.assert_close(logits[b, position], alone, atol=1e-4, rtol=1e-4)


def kill_when_there(folder, path, script, *flags):
    """Start a script in `folder`, and kill it as soon as the file `path` is there."""
    process = subprocess.Popen(
        [sys.executable, ROOT / script, *flags],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 200
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert path.exists(), process.stdout.read()


@pytest.mark.process
def test_the_policy_is_made_and_not_made_again_after_a_kill(run_script, tmp_path):
    """Too small to learn anything; killed when the model is finished, before its card."""
    flags = ["--output", "models", "--policy_examples", "20", "--validation", "4"]
    config = tmp_path / "models/.policy-mini.build/policy-mini/config.json"
    kill_when_there(tmp_path, config, SCRIPT, *flags)
    before = config.stat().st_mtime_ns
    done = run_script(SCRIPT, *flags)
    assert done.returncode == 0, done.stderr
    policy = tmp_path / "models/policy-mini"
    assert (policy / "config.json").stat().st_mtime_ns == before
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["policy-mini"]
    assert "greedy accuracy" in (policy / "README.md").read_text()
    assert "wrote models/policy-mini" in done.stdout.splitlines()[-1]
    again = run_script(SCRIPT, *flags)
    assert again.returncode == 2 and "--overwrite" in again.stderr


@pytest.mark.process
def test_the_judge_is_made_and_goes_on_after_a_kill(run_script, tmp_path, tiny_model_dir):
    """Too small to learn anything; killed when the model is finished, before its GGUF file."""
    flags = ["--output", "models", "--model_name_or_path", tiny_model_dir, "--policy"]
    flags += [tiny_model_dir, "--examples", "12", "--samples", "8", "--validation", "4"]
    config = tmp_path / "models/.judge-mini.build/judge-mini/config.json"
    kill_when_there(tmp_path, config, "utils/build_judge.py", *flags)
    done = run_script("utils/build_judge.py", *flags)
    assert done.returncode == 0, done.stderr
    judge = tmp_path / "models/judge-mini"
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["judge-mini"]
    assert (judge / "judge-mini.Q8_0.gguf").is_file()
    assert "step accuracy" in (judge / "README.md").read_text()
    assert "8 policy-mini samples" in (judge / "README.md").read_text()
    assert "wrote models/judge-mini" in done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.process
def test_policy_large_has_the_learning_rate_of_the_best_trial(run_script, tmp_path):
    flags = ["--size", "large", "--output", "models", "--learning_rate", "1e-9", "2e-3"]
    flags += ["--policy_examples", "300", "--trial_examples", "200", "--validation", "20"]
    done = run_script(SCRIPT, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "wrote models/policy-large"
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["policy-large"]
    folder = tmp_path / "models/policy-large"
    card = (folder / "README.md").read_text()
    for text in ("6.1M parameters", "learning rate 0.002", "trial with 1e-09"):
        assert text in " ".join(card.split())
    assert (folder / "model.safetensors").stat().st_size < 16 * 2**20


@pytest.mark.parametrize("name", ["policy-mini", "judge-mini"])
def test_committed_miniatures_load_and_are_small(name):
    folder = ROOT / "models" / name
    model, tokenizer = load_model(str(folder), "auto")
    assert (model.config.model_type, model.dtype) == ("llama", torch.float16)
    assert 1e6 < model.num_parameters() < 3e6
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("7 + 41")["input_ids"])
    assert tokens == ["<s>", "▁", "7", "▁+", "▁", "4", "1"]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8 * 2**20
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".gguf", ".jinja"}


@pytest.mark.process
def test_gguf_and_hf_judge_agree_on_200_steps():
    """The committed judge as GGUF Q8_0 in ctransformers, and in float32 in transformers."""
    folder = ROOT / "models/judge-mini"
    model, tokenizer = load_model(str(folder), torch.float32)
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
    # decisions may differ near the border, within the quantization error
    assert ((gguf > 0) == (hf > 0))[hf.abs() > 0.3].all() and (gguf - hf).abs().median() < 0.3
