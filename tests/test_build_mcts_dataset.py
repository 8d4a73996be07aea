"""utils/build_mcts_dataset.py: its rows and files, its refusals, and a killed run that resumes."""

import csv
import gzip
import json
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

from common.files import open_bytes, read_records, read_rows, write_records
from reasoning.datasets.loading import load_step_values
from reasoning.problems import problems
from reasoning.records import Problem, StepValue
from search.tree_search import DROPPED, Tree
from tests.helpers import scripts

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.process
SCRIPT = "utils/build_mcts_dataset.py"
UNANSWERED, TOO_LONG = "Mia has 2 apples. How many?", "Mia has 2 apples. " * 200
SMALL = ("--rollouts_per_state", 4, "--budget", 16, "--max_new_tokens", 90)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict:
    """policy-mini on nine problems, one whose answer is never right, one that is too long, and a
    duplicate; table and trees are compressed."""
    folder = tmp_path_factory.mktemp("built")
    first = list(islice(problems("train"), 9))
    others = [Problem(UNANSWERED, "none"), Problem(TOO_LONG, "3"), first[3]]
    write_records(folder / "problems.jsonl", [*first, *others])
    args = [*map(str, SMALL), "--input", "problems.jsonl", "--output", "out/steps.jsonl"]
    args += ["--csv", "out/steps.csv.gz", "--trees", "out/trees.jsonl.gz"]
    done = scripts.run_script(SCRIPT, *args, cwd=folder)
    assert done.returncode == 0, done.stderr
    return {"folder": folder, "problems": first, "printed": done.stdout, "args": args}


def test_every_row_is_what_the_trees_say(built):
    folder = built["folder"]
    names = ["steps.csv.gz", "steps.jsonl", "trees.jsonl.gz"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == names
    rows = list(read_records(folder / "out/steps.jsonl", StepValue))
    trees = list(read_records(folder / "out/trees.jsonl.gz", Tree))
    prompts = [problem.prompt for problem in built["problems"]]
    assert [tree.prompt for tree in trees] == [*prompts, UNANSWERED, TOO_LONG]
    assert rows == [row for tree in trees if tree.ended not in DROPPED for row in tree.values()[0]]
    assert [tree.ended for tree in trees[-2:]] == ["never right", "prompt too long"] and all(
        len(tree.rollouts) <= 16 for tree in trees
    )
    answers = {problem.prompt: f"Answer: {problem.answer}" for problem in built["problems"]}
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
        f"wrote {len(rows)} step values to out/steps.jsonl, out/steps.csv.gz, out/trees.jsonl.gz",
    ):
        assert part in built["printed"], (part, built["printed"])


def test_the_table_has_three_columns_and_reads_back(built):
    path = built["folder"] / "out/steps.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        table = csv.DictReader(file)
        assert list(table.fieldnames) == ["question", "next_step", "score"]
    rows = list(read_records(built["folder"] / "out/steps.jsonl", StepValue))
    back = list(load_step_values(str(path)))
    assert [(row.prompt, row.prefix, row.step, row.score) for row in back] == [
        (row.prompt, row.prefix, row.step, row.score) for row in rows
    ]


def test_other_labels_of_the_same_trees(built, run_script, tmp_path):
    args = ("--from_trees", built["folder"] / "out/trees.jsonl.gz")
    again = run_script(SCRIPT, *args, "--output", "again.jsonl.gz")
    assert again.returncode == 0, again.stderr
    with open_bytes(tmp_path / "again.jsonl.gz") as file:
        assert file.read() == (built["folder"] / "out/steps.jsonl").read_bytes()
    rows = list(read_records(tmp_path / "again.jsonl.gz", StepValue))

    done = run_script(SCRIPT, *args, "--output", "relative.jsonl", "--labels", "relative")
    relative = list(read_records(tmp_path / "relative.jsonl", StepValue))
    assert done.returncode == 0 and 0 < len(relative) < len(rows)
    values = {(row.prompt, *row.prefix, row.step): row.score for row in rows}
    for row in relative:
        before = values.get((row.prompt, *row.prefix))
        value = values[(row.prompt, *row.prefix, row.step)]
        assert before is None or row.score == min(1, value / before)
    assert (
        f"wrote {len(relative)} step values" in done.stdout
        and "have no label and are left out" in done.stdout
    )

    kept = run_script(SCRIPT, *args, "--output", "kept.jsonl", "--keep_dropped")
    prompts = {row.prompt for row in read_records(tmp_path / "kept.jsonl", StepValue)}
    assert kept.returncode == 0 and len(prompts) == 10 > len({row.prompt for row in rows})


def test_a_killed_run_resumes_and_writes_the_same_files(built):
    """Killed after a few problems, with a torn row; resumed with fewer problems in flight."""
    folder = built["folder"]
    args = [part.replace("out/", "killed/") for part in built["args"]]
    partial = folder / "killed/steps.jsonl.partial"
    command = [sys.executable, str(ROOT / SCRIPT), *args, "--in_flight", "3"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=folder, **silent)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        partial.exists() and partial.read_bytes().count(b"\n") > 2
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    outputs = ("steps.jsonl", "steps.csv.gz", "trees.jsonl.gz")
    outputs += ("steps.samples.jsonl", "steps.left_out.jsonl")
    locks = {f".{name}.lock" for name in outputs}
    assert {path.name for path in partial.parent.iterdir()} == {partial.name, *locks}
    with open(partial, "ab") as file:
        file.write(b'{"problem": 9, "tr')
    resumed = scripts.run_script(SCRIPT, *args, "--in_flight", 2, cwd=folder)
    assert resumed.returncode == 0 and "resuming: " in resumed.stdout, resumed.stderr
    for name in ("steps.jsonl", "steps.csv.gz", "trees.jsonl.gz"):
        assert (folder / "killed" / name).read_bytes() == (folder / "out" / name).read_bytes()
    assert len(list(partial.parent.iterdir())) == 3  # no partial rows, no locks


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
        (["--csv", "steps.jsonl"], "are the same file"),
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


def test_no_values_show_samples_and_save_them(run_script, tmp_path):
    write_records(tmp_path / "problems.jsonl", [Problem(UNANSWERED, "none")])
    args = (*SMALL, "--input", "problems.jsonl", "--output", "my steps.jsonl")
    done = run_script(SCRIPT, *args)
    assert done.returncode == 2 and "no steps were found" in done.stderr.splitlines()[-1]
    assert UNANSWERED in done.stdout and "what to do:" in done.stdout
    ((_, row),) = read_rows(tmp_path / "my steps.samples.jsonl")
    assert row["prompt"] == UNANSWERED and row["verdict"] in ("wrong", "no answer", "cut")
    assert f"verdict    {row['verdict']}" in done.stdout and row["steps"]
