"""docs/reward_model.md: its commands, run in their order from an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.files import ROOT, read_records
from reasoning.datasets.ranking import read_answers
from reasoning.records import PreferencePair

PAGE = (ROOT / "docs/reward_model.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if line
]


def test_the_page_has_every_stage():
    scripts = [re.search(r"\$REPO/(\S+)", command)[1] for command in COMMANDS]
    assert [name for k, name in enumerate(scripts) if scripts[:k].count(name) == 0] == [
        *("utils/build_ranked_responses.py", "train.py", "evaluation/eval_response_reward.py"),
        *("reward_model/score_responses.py", "inference.py"),
    ]
    assert all((ROOT / name).is_file() for name in scripts)


@pytest.mark.slow
@pytest.mark.process
def test_its_commands_run(tmp_path):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"REPO": str(ROOT), "PATH": path}
    options = {"cwd": tmp_path, "env": environment, "stdin": subprocess.DEVNULL, "timeout": 1200}
    for command in COMMANDS:
        done = subprocess.run(command, shell=True, capture_output=True, text=True, **options)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    walk = Path(tmp_path) / "walk"
    assert {row.split for row in read_answers(walk / "answers.csv")} == {"train", "test"}
    assert (walk / "results/response_reward.png").is_file()
    assert (walk / "results/response_reward.json").is_file()
    assert list(read_records(walk / "pairs.jsonl", PreferencePair))
    assert (walk / "tuned/model.safetensors").is_file()
    assert done.stdout.startswith("round 1: 8 solutions") and "by the scorer" in done.stdout
    assert "score " in done.stderr
