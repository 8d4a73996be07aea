"""Data, models and commands that the tests of the trainings share."""

import itertools
import random
import shutil
import sys
from pathlib import Path

import pytest

import train
from common.cli import run
from reasoning.problems import pretraining_texts, problems
from reasoning.records import StepValue

PROBLEMS = list(itertools.islice(problems("train"), 20, 34))


def step_values_of(problem) -> list[StepValue]:
    """Two steps of the reference with values, a wrong one, and one row twice."""
    first, second = problem.steps[:2]
    wrong = StepValue(problem.prompt, "Step 2: 1 + 1 = 3", 0.0, prefix=[first])
    return [
        StepValue(problem.prompt, first, 0.75),
        wrong,
        StepValue(problem.prompt, second, 0.5, prefix=[first]),
        wrong,
    ]


STEP_VALUES = [value for problem in PROBLEMS for value in step_values_of(problem)]


def make_pairs(count: int) -> list[dict]:
    """Pairs of a reference and a flawed solution with random scores; every third has a prefix."""
    rng, rows = random.Random(0), []
    for problem, flawed in pretraining_texts():
        shared = int(len(rows) % 3 == 2 and flawed[0] == problem.steps[0])
        if flawed != problem.steps:
            sides = {"chosen": problem.steps[shared:], "rejected": flawed[shared:]}
            scores = {
                f"{side}_scores": [round(rng.random(), 3) for _ in steps]
                for side, steps in sides.items()
            }
            rows.append({"prompt": problem.prompt, "prefix": flawed[:shared], **sides, **scores})
        if len(rows) == count:
            return rows
    raise AssertionError("the texts never end")


def taught(model_dir: str, folder: Path, solutions: list[tuple[str, list[str]]]) -> str:
    """Train the tiny model to write these solutions, and save it at `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lm.text_encoding import encode_steps

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    encoded = [encode_steps(tokenizer, prompt, [], steps) for prompt, steps in solutions]
    longest = max(len(ids) for ids, _ in encoded)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in encoded])
    labels = torch.full_like(ids, -100)
    for b, row in enumerate(encoded):
        for place, (token, step) in enumerate(zip(*row, strict=True)):
            if step >= 0:
                labels[b, place] = token
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def flags(**options) -> list[str]:
    """Arguments of a script; a list gives several values."""
    arguments = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *map(str, values)]
    return arguments


def train_here(folder: Path, monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    """Run train.py with these arguments in this process, from `folder`."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    train.main()


def refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *args: object
) -> str:
    """The error line of train.py, which exits with 2 and writes nothing."""
    before = _files(folder)
    with pytest.raises(SystemExit) as stopped:
        run(lambda: train_here(folder, monkeypatch, *args))
    assert stopped.value.code == 2
    assert _files(folder) == before
    line = capsys.readouterr().err
    assert line.startswith("train.py: error: ") and line.count("\n") == 1
    return line


def _files(folder: Path) -> dict[Path, int]:
    """When each file of a folder was written; 0 for a folder (a lock in it comes and goes)."""
    paths = folder.rglob("*")
    return {path: 0 if path.is_dir() else path.stat().st_mtime_ns for path in paths}


def as_if_killed(finished: Path, folder: Path) -> None:
    """Copy a finished training of three checkpoints, as if killed after the first one."""
    shutil.copytree(finished, folder)
    for path in folder.iterdir():
        if path.is_file() and (path.suffix == ".safetensors" or "config" in path.name):
            path.unlink()
    for number in (2, 3):
        (folder / f"checkpoint-{number}/trainer_state.json").unlink()
