"""Runs that are killed and started again end with the files of an uninterrupted run.

The fast test kills a training at the moves of its files; `pytest -m slow` kills every kind of job
before each of its changes of files, and after random times.
"""

import random
import shutil
import time
from itertools import islice
from pathlib import Path

import pytest

from common.files import ROOT, write_records
from reasoning.problems import problems
from tests.helpers.kills import limited, run_until
from tests.helpers.training import STEP_VALUES, flags, make_pairs

pytestmark = pytest.mark.process
TRAINING = {"per_device_train_batch_size": 4, "max_steps": 2, "save_steps": 1, "logging_steps": 1}
TRAINING |= {"bf16": "false", "output_dir": "out", "logs_dir": "logs"}
PPO = {"states": "rows", "total_episodes": 16, "per_device_train_batch_size": 4}
PPO |= {"num_mini_batches": 2, "eval_strategy": "no", "max_new_tokens": 8, "save_steps": 1}
PPO |= {"judge": "random", "output_dir": "out", "logs_dir": "logs"}
SAMPLED = {"model_name_or_path": ROOT / "models/policy-mini", "limit": 3, "max_new_tokens": 99}
SAMPLED |= {"input": "problems.jsonl"}
JOBS: dict[str, tuple[str, list[str]]] = {
    name: (script, [*command, *flags(**settings)])
    for name, script, command, settings in (
        ("dpo", "train.py", ["dpo"], TRAINING | {"dataset_name": "pairs.jsonl"}),
        ("sft", "train.py", ["sft"], TRAINING | {"dataset_name": "pairs.jsonl"}),
        ("prm", "train.py", ["prm"], TRAINING | {"dataset_name": "values.jsonl"}),
        ("reward", "train.py", ["reward"], TRAINING | {"dataset_name": "pairs.jsonl"}),
        ("ppo", "train.py", ["ppo"], PPO | {"dataset_name": "values.jsonl"}),
        (
            "synthetic",
            "utils/build_synthetic_dataset.py",
            [],
            SAMPLED | {"pair_by": "judge", "judge": "random", "output": "o.jsonl"},
        ),
        (
            "mcts",
            "utils/build_mcts_dataset.py",
            ["--keep_dropped"],
            SAMPLED
            | {"rollouts_per_state": 2, "budget": 4, "output": "o.jsonl", "trees": "t.jsonl"}
            | {"csv": "o.csv"},
        ),
        (
            "step_pairs",
            "utils/build_step_pairs.py",
            [],
            SAMPLED
            | {"rollouts_per_state": 2, "budget": 4, "output": "o.jsonl", "trees": "t.jsonl"}
            | {"pair_by": "judge", "judge": "random", "min_gap": 0.01},
        ),
        (
            "answers",
            "utils/build_ranked_responses.py",
            [],
            SAMPLED | {"answers": 2, "output": "o.csv"},
        ),
        (
            "score",
            "reward_model/evaluate_steps.py",
            [],
            {"input": "pairs.jsonl", "judge": "hf", "judge_path": "model", "output": "o.jsonl"},
        ),
        ("problems", "utils/build_problems.py", [], {"split": "train", "limit": 50, "output": "o"}),
        (
            "compare",
            "evaluation/eval_reward_scores.py",
            [],
            {"base_model": "model", "tuned_model": "model", "limit": 2, "max_new_tokens": 8}
            | {"pairs": "pairs.jsonl", "input": "problems.jsonl", "judge": "random"}
            | {"output_dir": "results"},
        ),
    )
}
for name in ("dpo", "sft", "prm", "reward", "ppo"):
    JOBS[name][1].extend(("--model_name_or_path", "model"))


@pytest.fixture(scope="module")
def inputs(tokenizer, tmp_path_factory) -> Path:
    """A model of one layer, pairs, step values and problems."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_records(folder / "pairs.jsonl", make_pairs(12))
    write_records(folder / "values.jsonl", STEP_VALUES)
    write_records(folder / "problems.jsonl", islice(problems("train"), 3))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """What a run wrote, without what depends on the time or on the folder.

    Raises AssertionError if temporary files or locks are left."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith("model/"):
            assert not path.name.endswith((".tmp", ".lock", ".partial")), name
            is_timed = path.name in ("log.json", "README.md", "trainer_state.json")
            timed = is_timed or path.suffix in (".png", ".pt", ".pth") or "events.out" in path.name
            data = path.read_bytes().replace(bytes(folder.resolve()), b"")
            found[name] = b"" if timed else data
    return found


def finish(job: str, folder: Path) -> dict[str, bytes]:
    """Give the command again, until it has finished. It never fails."""
    script, args = JOBS[job]
    code, _, error = run_until(script, *args, cwd=folder)
    assert code == 0, error
    return content(folder)


@pytest.fixture
def uninterrupted(inputs, tmp_path):
    """job -> (what it writes, its changes of files) when it is not killed."""

    def run(job: str) -> tuple[dict[str, bytes], list[str]]:
        folder = shutil.copytree(inputs, tmp_path / "whole")
        script, args = JOBS[job]
        code, changes, error = run_until(script, *args, cwd=folder)
        assert code == 0, error
        return content(folder), changes

    return run


ENDS = (
    "/training_job.json",  # the job file is written, and not yet in its place
    "out/model.safetensors",  # the first files of the model are in their places
    "out/.finished.tmp",  # all files are in their places (or the folder is made)
)


def test_a_training_that_is_killed_at_its_ends_goes_on(inputs, tmp_path, uninterrupted):
    expected, changes = uninterrupted("sft")
    script, args = JOBS["sft"]
    for number, end in enumerate(ENDS):
        folder = shutil.copytree(inputs, tmp_path / f"killed-{number}")
        at = max(k for k, change in enumerate(changes) if change.endswith(end))
        code, _, error = run_until(script, *args, cwd=folder, kill_at=at)
        assert code == -9, error
        assert finish("sft", folder) == expected, changes[at]


@pytest.mark.slow
@pytest.mark.parametrize("job", ["dpo", "ppo"])
def test_a_training_on_a_full_disk_is_one_line_and_goes_on(inputs, tmp_path, uninterrupted, job):
    """Whichever library finds the disk full: safetensors, torch, or Python."""
    expected, _ = uninterrupted(job)
    script, args = JOBS[job]
    files = [path for path in (tmp_path / "whole").rglob("*.*") if path.is_file()]
    # the messages of the run are in a file, too
    sizes = sorted({path.stat().st_size for path in files if path.stat().st_size > 20_000})
    folder, failed = shutil.copytree(inputs, tmp_path / "full"), 0
    for size in sizes:
        code, _, error = run_until(str(limited(script, size - 1, tmp_path)), *args, cwd=folder)
        if code == 0:
            break
        failed += 1
        assert error.count("cannot be written whole") == 1, (code, error)  # and progress bars
        assert code == 2 and "Traceback" not in error
    assert failed
    if code == 2:
        assert finish(job, folder) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "job", ["dpo", "ppo", "mcts", "step_pairs", "score", "problems", "compare"]
)
def test_a_job_that_is_killed_before_any_change_goes_on(inputs, tmp_path, uninterrupted, job):
    expected, changes = uninterrupted(job)
    script, args = JOBS[job]
    for at, change in enumerate(changes):
        folder = shutil.copytree(inputs, tmp_path / f"killed-{at}")
        code, _, error = run_until(script, *args, cwd=folder, kill_at=at)
        assert code == -9, error
        code, _, error = run_until(script, *args, cwd=folder)
        # after the last lock is removed, the run is finished
        is_finished = code == 2 and "exists" in error and at > len(changes) - 4
        assert code == 0 or is_finished, (change, error)
        assert content(folder) == expected, change
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_a_job_that_is_killed_at_20_random_times_goes_on(inputs, tmp_path, uninterrupted, job):
    script, args = JOBS[job]
    start = time.monotonic()
    expected, _ = uninterrupted(job)
    seconds, rng = time.monotonic() - start, random.Random(job)
    folder, killed = shutil.copytree(inputs, tmp_path / "killed"), 0
    while killed < 20:
        code, _, error = run_until(script, *args, cwd=folder, seconds=rng.uniform(0.2, seconds))
        assert code in (-9, 0), error
        killed += code == -9
        if code == 0:  # it had finished before: compare, and begin anew
            assert content(folder) == expected
            shutil.rmtree(folder)
            shutil.copytree(inputs, folder)
    assert finish(job, folder) == expected
