"""A real pretrained model, SmolLM2-135M-Instruct, through the scripts of the miniatures: a small part of `make smollm2-run`."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.files import ROOT, write_records
from reasoning.problems import problems
from reasoning.splits import is_kept_out

pytestmark = pytest.mark.slow
TASKS = [
    task
    for task in itertools.islice(problems("train"), 12)
    if len(task.steps) <= 4 and not is_kept_out(task.prompt)
][:6]


@pytest.fixture(scope="module")
def trained(smollm2, tmp_path_factory) -> Path:
    """Three optimizer steps of the warm start, two problems each: `out`, `log.json` in `logs/out`."""
    folder = tmp_path_factory.mktemp("smollm2")
    write_records(folder / "problems.jsonl", TASKS)
    config = ROOT / "configs/smollm2/sft.yaml"
    given = [
        "--model_name_or_path",
        smollm2,
        "--dataset_name",
        "problems.jsonl",
        "--output_dir",
        "out",
        "--logs_dir",
        "logs",
    ]
    small = [
        "--per_device_train_batch_size",
        "2",
        "--save_strategy",
        "no",
        "--logging_steps",
        "1",
        "--warmup_steps",
        "0",
    ]
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "sft",
        "--config",
        str(config),
        *given,
        *small,
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return folder


def test_ids_are_those_of_its_chat_template(smollm2):
    from transformers import AutoTokenizer

    from lm.text_encoding import CHAT_INSTRUCTION, encode_steps

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids, step_of = encode_steps(tokenizer, "1 + 1?", [], ["Step 1: 1 + 1 = 2", "Answer: 2"])
    text = tokenizer.decode(ids)
    assert (
        text.startswith("<|im_start|>system\n")
        and text.count("<|im_start|>") == 3
        and text.count("<|im_end|>") == 3
    )
    assert f"<|im_start|>user\n{CHAT_INSTRUCTION}1 + 1?<|im_end|>\n<|im_start|>assistant\n" in text
    assert tokenizer.decode(ids[step_of.index(0) :]) == "Step 1: 1 + 1 = 2\nAnswer: 2<|im_end|>"
    assert [k for k, _ in itertools.groupby(step_of)] == [-1, 0, 1]


def test_three_steps_of_training_lower_the_loss(trained, smollm2):
    from safetensors.torch import load_file

    log = json.loads((trained / "logs/out/log.json").read_text())
    losses = [entry["loss"] for entry in log["history"] if "loss" in entry]
    assert log["steps"] == len(losses) == 3 and losses[-1] < losses[0] < 3
    before, after = (
        load_file(Path(folder) / "model.safetensors") for folder in (smollm2, trained / "out")
    )
    assert before.keys() == after.keys()
    assert all((after[name] - before[name].float()).abs().max() > 0 for name in before)


def test_four_samples(trained):
    from lm.policy import Policy

    policy = Policy.load(str(trained / "out"))
    start = time.monotonic()
    answers = policy.generate(
        [task.prompt for task in TASKS[:2]], n=2, temperature=1.0, max_new_tokens=64
    )
    tokens = sum(answer.tokens for of_problem in answers for answer in of_problem)
    print(f"4 samples: {tokens} tokens, {tokens / (time.monotonic() - start):.0f} a second")
    assert [len(of_problem) for of_problem in answers] == [2, 2] and all(
        answer.steps for two in answers for answer in two
    )
    assert answers == policy.generate(
        [task.prompt for task in TASKS[:2]], n=2, temperature=1.0, max_new_tokens=64
    )


def test_two_solutions_judged(smollm2):
    from reward_model.judges.hf import HFJudge

    solutions = [
        (TASKS[0].prompt, TASKS[0].steps),
        (TASKS[1].prompt, [*TASKS[1].steps[:-1], "Answer: 999"]),
    ]
    with HFJudge(smollm2) as judge:
        start = time.monotonic()
        scores = judge.score_steps(solutions)
        print(f"2 solutions judged in {time.monotonic() - start:.1f} s: {scores}")
        alone = [judge.score_steps([solution])[0] for solution in solutions]
    assert [len(of_steps) for of_steps in scores] == [len(steps) for _, steps in solutions]
    assert all(0 < score < 1 for of_steps in scores for score in of_steps)
    for together, by_itself in zip(scores, alone, strict=True):
        assert together == pytest.approx(by_itself, abs=1e-3)
