"""The builder of step values: its rows, its files, what it refuses, and that a killed run ends like an undisturbed one."""

import csv
import json
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

from common.files import read_records, write_records
from reasoning.datasets.loading import load_step_values
from reasoning.problems import problems
from reasoning.records import Problem, StepValue
from reasoning.steps import ends_solution
from search.tree_search import DROPPED, Tree

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "utils/build_mcts_dataset.py"
UNANSWERED, TOO_LONG = "Mia has 2 apples. How many?", "Mia has 2 apples. " * 200
SMALL = ("--rollouts_per_state", 4, "--budget", 16, "--max_new_tokens", 90)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict:
    """policy-mini on nine problems, one more that is said to have another answer, one that is too long, and one that was there."""
    folder = tmp_path_factory.mktemp("built")
    tasks = list(islice(problems("train"), 9))
    write_records(
        folder / "problems.jsonl",
        [*tasks, Problem(UNANSWERED, "none"), Problem(TOO_LONG, "3"), tasks[3]],
    )
    command = [
        sys.executable,
        str(ROOT / SCRIPT),
        *map(str, SMALL),
        "--input",
        "problems.jsonl",
        "--output",
        "out/steps.jsonl",
    ]
    command += ["--csv", "out/steps.csv", "--trees", "out/trees.jsonl"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {"folder": folder, "tasks": tasks, "printed": done.stdout, "command": command}


def test_every_row_is_what_the_trees_say(built):
    folder = built["folder"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "steps.csv",
        "steps.jsonl",
        "trees.jsonl",
    ]
    rows = list(read_records(folder / "out/steps.jsonl", StepValue))
    trees = list(read_records(folder / "out/trees.jsonl", Tree))
    assert [tree.prompt for tree in trees] == [task.prompt for task in built["tasks"]] + [
        UNANSWERED,
        TOO_LONG,
    ]
    assert rows == [row for tree in trees if tree.ended not in DROPPED for row in tree.values()[0]]
    assert [tree.ended for tree in trees[-2:]] == ["never right", "prompt too long"] and all(
        len(tree.rollouts) <= 16 for tree in trees
    )
    answers = {task.prompt: f"Answer: {task.answer}" for task in built["tasks"]}
    closing = [row for row in rows if row.step.startswith("Answer:")]
    assert closing and all(row.score == (row.step == answers[row.prompt]) for row in closing)
    searched = [tree for tree in trees if tree.ended not in DROPPED]
    assert len(searched) >= 4 and {row.prompt for row in rows} == {tree.prompt for tree in searched}
    rollouts = [rollout for tree in trees for rollout in tree.rollouts]
    for part in (
        f"11 problems: {len(searched)} searched",
        "1 prompt too long",
        f"{len(rollouts)} rollouts (",
        f"{sum(rollout.outcome == 'cut' for rollout in rollouts)} cut at the token limit",
        f"{sum(rollout.tokens for rollout in rollouts)} tokens",
        f"{len(rows)} rows",
        f"wrote {len(rows)} step values to out/steps.jsonl, out/steps.csv, out/trees.jsonl",
    ):
        assert part in built["printed"], (part, built["printed"])


def test_the_table_has_three_columns_and_reads_back(built):
    with open(built["folder"] / "out/steps.csv", encoding="utf-8", newline="") as file:
        table = csv.DictReader(file)
        assert list(table.fieldnames) == ["question", "next_step", "score"]
    rows = list(read_records(built["folder"] / "out/steps.jsonl", StepValue))
    back = list(load_step_values(str(built["folder"] / "out/steps.csv")))
    assert [(row.prompt, row.prefix, row.step, row.score) for row in back] == [
        (row.prompt, row.prefix, row.step, row.score) for row in rows
    ]


def test_other_labels_of_the_same_trees(built, run_script, tmp_path):
    args = ("--from_trees", built["folder"] / "out/trees.jsonl")
    again = run_script(SCRIPT, *args, "--output", "again.jsonl")
    assert (
        again.returncode == 0
        and (tmp_path / "again.jsonl").read_bytes()
        == (built["folder"] / "out/steps.jsonl").read_bytes()
    )
    rows = list(read_records(tmp_path / "again.jsonl", StepValue))

    done = run_script(
        SCRIPT, *args, "--output", "relative.jsonl", "--labels", "relative", "--min_rollouts", 3
    )
    relative = list(read_records(tmp_path / "relative.jsonl", StepValue))
    assert done.returncode == 0 and 0 < len(relative) < len(rows)
    values = {(row.prompt, *row.prefix, row.step): row.score for row in rows}
    for row in relative:
        before = values.get((row.prompt, *row.prefix))
        assert (row.rollouts >= 3 or ends_solution([row.step])) and (
            before is None
            or row.score == min(1, values[(row.prompt, *row.prefix, row.step)] / before)
        )
    assert (
        f"wrote {len(relative)} step values" in done.stdout
        and "have no label and are left out" in done.stdout
    )

    kept = run_script(SCRIPT, *args, "--output", "kept.jsonl", "--keep_dropped")
    prompts = {row.prompt for row in read_records(tmp_path / "kept.jsonl", StepValue)}
    assert kept.returncode == 0 and len(prompts) == 10 > len({row.prompt for row in rows})


def test_killed_and_started_again_it_ends_with_the_same_files(built):
    """Killed when a few problems are done, three in flight; a torn row is added; other ones are in flight when it goes on."""
    folder = built["folder"]
    command = [part.replace("out/", "killed/") for part in built["command"]]
    partial = folder / "killed/steps.jsonl.partial"
    process = subprocess.Popen(
        [*command, "--in_flight", "3"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        partial.exists() and partial.read_bytes().count(b"\n") > 2
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in partial.parent.iterdir()] == [partial.name]
    with open(partial, "ab") as file:
        file.write(b'{"problem": 9, "tr')
    resumed = subprocess.run(
        [*command, "--in_flight", "2"], cwd=folder, capture_output=True, text=True
    )
    assert resumed.returncode == 0 and "resuming: " in resumed.stdout, resumed.stderr
    for name in ("steps.jsonl", "steps.csv", "trees.jsonl"):
        assert (folder / "killed" / name).read_bytes() == (folder / "out" / name).read_bytes()
    assert not partial.exists()


@pytest.mark.slow
def test_a_search_without_steps_is_kept_for_other_arguments(run_script, tmp_path):
    write_records(tmp_path / "problems.jsonl", [Problem(UNANSWERED, "none")])
    args = ("--input", "problems.jsonl", "--output", "steps.jsonl", *SMALL, "--search", "per_step")
    done = run_script(SCRIPT, *args)
    assert done.returncode == 2 and "1 never right" in done.stdout
    assert "steps.jsonl.partial keeps the search" in done.stderr.splitlines()[-1]
    done = run_script(SCRIPT, *args, "--keep_dropped")
    assert done.returncode == 0 and "resuming: 1 of 1" in done.stdout
    assert {row.score for row in read_records(tmp_path / "steps.jsonl", StepValue)} == {0}
    assert not (tmp_path / "steps.jsonl.partial").exists()


def test_held_out_problems_are_refused(built, run_script, tmp_path):
    held_out = json.loads((ROOT / "data/problems_hard.jsonl").read_text().splitlines()[7])
    write_records(tmp_path / "mine.jsonl", [{"prompt": "x", "answer": "1"}, held_out])
    write_records(
        tmp_path / "trees.jsonl", [Tree(held_out["prompt"], "omegaprm", "never right").to_row()]
    )
    files = sorted(tmp_path.iterdir())
    for args in (["--input", "mine.jsonl"], ["--from_trees", "trees.jsonl"]):
        done = run_script(SCRIPT, *args, "--output", "steps.jsonl")
        assert done.returncode == 2 and "held-out" in done.stderr and done.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == files


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--input", "nowhere.jsonl"], "nowhere.jsonl not found"),
        (["--budget", "15"], "--budget: 15 rollouts are not enough"),
        (["--rollouts_per_state", "0"], "--rollouts_per_state: expected 1 or more"),
        (["--temperature", "0"], "--temperature: expected above 0"),
        (["--search", "beam"], "--search"),
        (["--labels", "hard"], "--labels"),
        (["--model_name_or_path", "."], "is no model directory"),
        (["--csv", "steps.jsonl"], "expected different files"),
        (["--csv", "there.csv"], "--overwrite"),
        (["--from_trees", "nowhere.jsonl"], "nowhere.jsonl not found"),
        (["--from_trees", "there.csv"], "there.csv:1: no search tree"),
        (["--from_trees", "there.csv", "--trees", "more.jsonl"], "which reads existing trees"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(run_script, tmp_path, args, message):
    (tmp_path / "there.csv").write_text("[1]\n")
    done = run_script(SCRIPT, "--output", "steps.jsonl", *args)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, (
        done.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["there.csv"]
