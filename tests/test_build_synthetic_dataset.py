"""The pair builder: what makes a pair, what is refused, and that a killed run ends like an undisturbed one."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.files import read_records, write_records
from reasoning.records import PreferencePair, Problem
from tests.helpers.judges import FixedJudge
from utils.build_synthetic_dataset import pair_by_answer, pair_by_judge, score_group

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "utils/build_synthetic_dataset.py"
TASK = Problem("Mia has 2 apples. ...?", "10")
RIGHT = ["Step 1: 2 + 3 = 5", "Step 2: 5 * 2 = 10", "Answer: 10"]
WRONG = ["Step 1: 2 + 3 = 5", "Step 2: 5 + 2 = 7", "Answer: 7"]


def test_right_against_wrong_with_what_they_share_in_the_prefix():
    pair, _ = pair_by_answer(TASK, [WRONG, RIGHT, WRONG])
    assert pair == PreferencePair(
        TASK.prompt, chosen=RIGHT[1:], rejected=WRONG[1:], prefix=RIGHT[:1]
    )


def test_a_side_that_is_a_beginning_of_the_other_keeps_a_step():
    pair, _ = pair_by_answer(TASK, [RIGHT[:2], RIGHT])
    assert (pair.prefix, pair.chosen, pair.rejected) == (RIGHT[:1], RIGHT[1:], RIGHT[1:2])


@pytest.mark.parametrize(
    ("samples", "why"), [([WRONG], "none right"), ([RIGHT, RIGHT], "none wrong")]
)
def test_no_pair(samples, why):
    assert pair_by_answer(TASK, samples) == (None, why)


def test_best_against_worst_mean_score():
    pair, _ = pair_by_judge(
        TASK, [WRONG, RIGHT, ["Answer: 3"]], [[1, 0.2, 0.1], [1, 0.9, 0.8], [0.5]]
    )
    assert pair.chosen == RIGHT[1:] and pair.rejected == WRONG[1:]
    assert pair_by_judge(TASK, [RIGHT, RIGHT], [[1, 1, 1]] * 2) == (None, "all scored alike")


def test_samples_that_outgrow_the_judge_are_dropped():
    judge = FixedJudge(lambda prompt, step, previous: None if step == "long" else int(step) / 10)
    group, ended = [TASK, TASK], [[["1", "2"], ["long"], ["3"], ["3"]], [["4", "5"]]]
    fitting, scores = score_group(judge, group, ended)
    assert fitting == [[["1", "2"], ["3"], ["3"]], [["4", "5"]]] and scores == [
        [[0.1, 0.2], [0.3], [0.3]],
        [[0.4, 0.5]],
    ]


@pytest.fixture(scope="module")
def half_right(tiny_model_dir, tokenizer, tmp_path_factory) -> tuple[str, str]:
    """(model directory, problems file): a tiny model taught two answers to each of eight problems, one of them right."""
    import torch
    from transformers import AutoModelForCausalLM

    from lm.text_encoding import encode_steps

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("half")
    tasks = [Problem(f"Mia has {k} apples.", str(k)) for k in range(1, 9)]
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    texts = [
        encode_steps(tokenizer, task.prompt, [], [f"Answer: {answer}"])[0]
        for task in tasks
        for answer in (task.answer, "0")
    ]
    ids = torch.tensor(texts)  # all of one length
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_records(folder / "problems.jsonl", tasks * 20)  # repeated problems are used once
    return str(folder / "model"), str(folder / "problems.jsonl")


def test_the_script(half_right, run_script, tmp_path):
    model, problems = half_right
    args = (
        "--model_name_or_path",
        model,
        "--input",
        problems,
        "--output",
        "out/pairs.jsonl",
        "--max_new_tokens",
        30,
    )
    done = run_script(SCRIPT, *args)
    assert done.returncode == 0, done.stderr
    pairs = list(read_records(tmp_path / "out/pairs.jsonl", PreferencePair))
    assert len(pairs) >= 4 and len({pair.prompt for pair in pairs}) == len(pairs)
    for pair in pairs:
        number = pair.prompt.split()[2]
        assert pair.chosen[-1] == f"Answer: {number}" and pair.rejected[-1] != f"Answer: {number}"
    assert (
        f"wrote {len(pairs)} pairs to out/pairs.jsonl" in done.stdout.splitlines()[-1]
        and "8 problems, 64 samples" in done.stdout
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pairs.jsonl"]

    again = run_script(SCRIPT, *args)
    assert again.returncode == 2 and "--overwrite" in again.stderr


def test_pairs_by_a_judge_that_knows_and_by_one_that_does_not(half_right, run_script, tmp_path):
    """The checker's best sample is a right one. With its scores permuted over all samples it need not be."""
    model, _ = half_right
    tasks = [Problem(f"Mia has {k} apples.", str(k), [f"Answer: {k}"]) for k in range(1, 9)]
    write_records(tmp_path / "problems.jsonl", tasks)
    args = (
        "--model_name_or_path",
        model,
        "--input",
        "problems.jsonl",
        "--max_new_tokens",
        30,
        "--pair_by",
        "judge",
    )
    right = {}
    for judge in (["exact"], ["shuffled", "--shuffled_judge", "exact"]):
        output = tmp_path / f"{judge[0]}.jsonl"
        done = run_script(
            SCRIPT,
            *args,
            "--judge",
            *judge,
            "--judge_problems",
            "problems.jsonl",
            "--output",
            output,
        )
        assert done.returncode == 0, done.stderr
        answers = {task.prompt: task.steps[-1] for task in tasks}
        right[judge[0]] = [
            pair.chosen[-1] == answers[pair.prompt] for pair in read_records(output, PreferencePair)
        ]
    assert len(right["exact"]) >= 4 and all(right["exact"]) and not all(right["shuffled"])


def test_killed_and_started_again_it_ends_with_the_same_file(half_right, tmp_path):
    """Killed after its first group of problems; a torn row is added to what it left."""
    model, _ = half_right
    write_records(
        tmp_path / "problems.jsonl",
        [Problem(f"Mia has {k % 8 + 1} apples{'!' * (k // 8)}", "1") for k in range(200)],
    )
    command = [
        sys.executable,
        str(ROOT / SCRIPT),
        "--model_name_or_path",
        model,
        "--input",
        "problems.jsonl",
        "--max_new_tokens",
        "12",
    ]
    whole = subprocess.run(
        [*command, "--output", "whole.jsonl"], cwd=tmp_path, capture_output=True, text=True
    )
    assert whole.returncode == 0, whole.stderr
    partial = tmp_path / "killed.jsonl.partial"
    process = subprocess.Popen(
        [*command, "--output", "killed.jsonl"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        partial.exists() and partial.read_bytes().count(b"\n") > 64
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed.jsonl").exists() and partial.exists()
    with open(partial, "ab") as file:
        file.write(b'{"samples": 8, "en')
    weights = Path(model) / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # another model at the same place
    other = subprocess.run(
        [*command, "--output", "killed.jsonl"], cwd=tmp_path, capture_output=True, text=True
    )
    assert other.returncode == 2 and "another job" in other.stderr.splitlines()[-1]
    weights.write_bytes(data)
    resumed = subprocess.run(
        [*command, "--output", "killed.jsonl"], cwd=tmp_path, capture_output=True, text=True
    )
    assert resumed.returncode == 0 and "resuming" in resumed.stdout
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not partial.exists()


def test_held_out_problems_are_refused(run_script, tmp_path, tiny_model_dir):
    held_out = (ROOT / "data/problems_hard.jsonl").read_text().splitlines()[7]
    (tmp_path / "mine.jsonl").write_text(
        json.dumps({"prompt": "x", "answer": "1"}) + "\n" + held_out + "\n"
    )
    for pair_by in ("answer", "judge"):
        done = run_script(
            SCRIPT, "--input", "mine.jsonl", "--output", "pairs.jsonl", "--pair_by", pair_by
        )
        assert done.returncode == 2 and "held-out" in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--input", "nowhere.jsonl"], "nowhere.jsonl not found"),
        (["--samples", "0"], "--samples: expected 1 or more"),
        (["--samples", "many"], "--samples"),
        (["--temperature", "0"], "--temperature: expected above 0"),
        (["--pair_by", "taste"], "--pair_by"),
        (["--judge", "shuffled"], "with --pair_by judge only"),
        (["--pair_by", "judge", "--judge_path", "none.gguf"], "none.gguf not found"),
        (["--pair_by", "judge", "--judge_path", "empty.jsonl"], "no GGUF file"),
        (["--sampels", "3"], "unknown argument --sampels"),
        (["--config", "nowhere.yaml"], "config file nowhere.yaml not found"),
        (["--config"], "expected a YAML file"),
        (["--config=unknown.yaml"], "unknown key 'sampels'"),
        (["--config", "wrong.yaml"], "key 'samples' takes one value"),
        (["--model_name_or_path", "."], "is no model directory"),
        (["--model_name_or_path", "./nowhere"], "model directory ./nowhere not found"),
        (["--output", "unknown.yaml/pairs.jsonl"], "cannot be written"),
        (["--output", "unknown.yaml"], "--overwrite"),
        (["--input", "empty.jsonl"], "no rows"),
        (["--input", "broken.jsonl"], "broken.jsonl:1: not JSON"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(run_script, tmp_path, args, message):
    (tmp_path / "unknown.yaml").write_text("sampels: 3\n")
    (tmp_path / "wrong.yaml").write_text("samples: [1]\n")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text("{")
    files = sorted(tmp_path.iterdir())
    output = [] if "--output" in args else ["--output", "pairs.jsonl"]
    done = run_script(SCRIPT, *args, *output)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, (
        done.stderr
    )
    assert sorted(tmp_path.iterdir()) == files
