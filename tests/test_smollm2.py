"""A real pretrained model, SmolLM2-135M-Instruct: a small part of `make real`."""

import itertools
import json
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from common.files import ROOT, write_records
from lm.policy import Policy
from lm.text_encoding import CHAT_INSTRUCTION, encode_steps
from reasoning.problems import problems
from reasoning.splits import is_kept_out
from reward_model.judges.hf import HFJudge
from tests.helpers.scripts import run_script

pytestmark = [pytest.mark.slow, pytest.mark.process]
PROBLEMS = [
    problem
    for problem in itertools.islice(problems("train"), 12)
    if len(problem.steps) <= 4 and not is_kept_out(problem.prompt)
][:6]


@pytest.fixture(scope="module")
def trained(smollm2, tmp_path_factory) -> Path:
    """Three steps of the warm start, two problems each: `out`, and `log.json` in `logs/out`."""
    folder = tmp_path_factory.mktemp("smollm2")
    write_records(folder / "problems.jsonl", PROBLEMS)
    flags = {
        "config": ROOT / "configs/real/sft.yaml", "model_name_or_path": smollm2,
        "dataset_name": "problems.jsonl", "output_dir": "out", "logs_dir": "logs",
        "per_device_train_batch_size": 2, "save_strategy": "no", "logging_steps": 1,
        "warmup_steps": 0, "num_train_epochs": 1,
    }  # fmt: skip
    arguments = [part for name, value in flags.items() for part in (f"--{name}", value)]
    done = run_script("train.py", "sft", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return folder


def test_ids_are_those_of_its_chat_template(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids, step_of = encode_steps(tokenizer, "1 + 1?", [], ["Step 1: 1 + 1 = 2", "Answer: 2"])
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\n")
    assert (text.count("<|im_start|>"), text.count("<|im_end|>")) == (3, 3)
    assert f"<|im_start|>user\n{CHAT_INSTRUCTION}1 + 1?<|im_end|>\n<|im_start|>assistant\n" in text
    assert tokenizer.decode(ids[step_of.index(0) :]) == "Step 1: 1 + 1 = 2\nAnswer: 2<|im_end|>"
    assert [k for k, _ in itertools.groupby(step_of)] == [-1, 0, 1]


def test_three_steps_of_training_lower_the_loss(trained, smollm2):
    log = json.loads((trained / "logs/out/log.json").read_text())
    losses = [entry["loss"] for entry in log["history"] if "loss" in entry]
    assert log["steps"] == len(losses) == 3 and losses[-1] < losses[0] < 3
    before, after = (
        load_file(Path(folder) / "model.safetensors") for folder in (smollm2, trained / "out")
    )
    assert before.keys() == after.keys()
    assert all((after[name] - before[name].float()).abs().max() > 0 for name in before)


def test_four_samples(trained):
    policy = Policy.load(str(trained / "out"))
    prompts = [problem.prompt for problem in PROBLEMS[:2]]
    sampling = {"n": 2, "temperature": 1.0, "max_new_tokens": 64}
    start = time.monotonic()
    groups = policy.generate(prompts, **sampling)
    tokens = sum(sample.tokens for group in groups for sample in group)
    print(f"4 samples: {tokens} tokens, {tokens / (time.monotonic() - start):.0f} a second")
    assert [len(group) for group in groups] == [2, 2]
    assert all(sample.steps for group in groups for sample in group)
    assert groups == policy.generate(prompts, **sampling)


def test_two_solutions_judged(smollm2):
    first, second = PROBLEMS[:2]
    solutions = [(first.prompt, first.steps), (second.prompt, [*second.steps[:-1], "Answer: 999"])]
    with HFJudge(smollm2) as judge:
        start = time.monotonic()
        scores = judge.score_steps(solutions)
        print(f"2 solutions judged in {time.monotonic() - start:.1f} s: {scores}")
        alone = [judge.score_steps([solution])[0] for solution in solutions]
    assert [len(group) for group in scores] == [len(steps) for _, steps in solutions]
    assert all(0 < score < 1 for group in scores for score in group)
    for together, by_itself in zip(scores, alone, strict=True):
        assert together == pytest.approx(by_itself, abs=1e-3)
