"""Real runs of inference.py: one prompt, the loop, a file of prompts."""

import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import inference
from reasoning.problems import stories
from tests.test_eval_reward_scores import export_judge, teach

ROOT = Path(__file__).resolve().parents[1]
PROBLEMS = [
    story.problem()
    for story in itertools.islice((story for story in stories("test") if len(story.events) == 2), 4)
]


@pytest.fixture(scope="module")
def model(tiny_model_dir, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("taught") / "model"
    return teach(tiny_model_dir, folder, [(problem.prompt, problem.steps) for problem in PROBLEMS])


@pytest.fixture(scope="module")
def judge(tiny_model_dir, tmp_path_factory) -> str:
    return export_judge(tiny_model_dir, tmp_path_factory.mktemp("judge"), context=200)


def test_help_is_quick(run_script):
    def cpu_seconds():  # of finished children: a busy machine is no reason to fail
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    start = cpu_seconds()
    assert "--show_scores" in run_script("inference.py", "--help").stdout
    assert cpu_seconds() - start < 2


def test_prompt_is_answered_with_scores(run_script, model, judge):
    plain = run_script(
        "inference.py", "--prompt", PROBLEMS[0].prompt, "--model_name_or_path", model
    )
    assert plain.returncode == 0 and plain.stdout.split("\n") == [*PROBLEMS[0].steps, ""], (
        plain.stderr
    )
    scored = run_script(
        "inference.py",
        "--prompt",
        PROBLEMS[0].prompt,
        "--model_name_or_path",
        model,
        "--show_scores",
        "--judge_path",
        judge,
    )
    assert re.sub(r"   \[[01]\.\d\d\]$", "", scored.stdout, flags=re.MULTILINE) == plain.stdout
    assert len(re.findall(r"\[[01]\.\d\d\]$", scored.stdout, re.MULTILINE)) == len(
        PROBLEMS[0].steps
    )


def test_sampling_follows_the_seed(run_script, tiny_model_dir):
    """Any Unicode is a prompt. In the loop the second question has the next seed, so asking again gives another answer."""
    prompt = "Mia 🍎 has ٣ äpples\u2028?"
    arguments = [
        "--temperature",
        1,
        "--max_new_tokens",
        12,
        "--seed",
        1,
        "--model_name_or_path",
        tiny_model_dir,
    ]
    single = run_script("inference.py", "--prompt", prompt, *arguments)
    assert single.returncode == 0, single.stderr
    loop = run_script("inference.py", *arguments, stdin=None, input=f"{prompt}\n{prompt}\nQUIT\n")
    _, first, second, _ = loop.stdout.split("> ")
    assert first == single.stdout != second


@pytest.mark.parametrize("end", ["exit\n", ""])
def test_loop_ends(run_script, model, end):
    """It answers, asks again after an empty line, and ends on exit or the end of the input."""
    typed = f"{PROBLEMS[1].prompt}\n\n{PROBLEMS[2].prompt}\n{end}"
    process = run_script("inference.py", "--model_name_or_path", model, stdin=None, input=typed)
    assert process.returncode == 0, process.stderr
    for problem in PROBLEMS[1:3]:
        assert "\n".join(problem.steps) in process.stdout
    assert process.stderr.count("the prompt is empty") == 1 and "Traceback" not in process.stderr


def test_a_judge_that_fails_does_not_end_the_loop(run_script, model, tmp_path):
    """The checker knows the second problem only."""
    (tmp_path / "problems.jsonl").write_text(json.dumps(vars(PROBLEMS[2])) + "\n")
    arguments = [
        "--show_scores",
        "--judge",
        "exact",
        "--judge_problems",
        "problems.jsonl",
        "--model_name_or_path",
        model,
    ]
    process = run_script(
        "inference.py",
        *arguments,
        stdin=None,
        input=f"{PROBLEMS[1].prompt}\n{PROBLEMS[2].prompt}\n",
    )
    assert process.returncode == 0 and process.stderr.count("no reference for the problem") == 1, (
        process.stderr
    )
    assert "\n".join(f"{step}   [1.00]" for step in PROBLEMS[2].steps) in process.stdout


def test_loop_ends_on_ctrl_c(model, judge, tmp_path):
    """Ctrl-C reaches the whole process group, the judge's worker as well."""
    command = [
        sys.executable,
        str(ROOT / "inference.py"),
        "--model_name_or_path",
        model,
        "--show_scores",
        "--judge_path",
        judge,
    ]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert os.read(process.stdout.fileno(), 2) == b"> "
    os.killpg(process.pid, signal.SIGINT)
    # far less, but on a machine that has much else to do
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0 and b"Traceback" not in stderr, stderr.decode()


def test_before_any_training_the_base_answers_and_says_so(
    tiny_model_dir, tmp_path, monkeypatch, capsys
):
    untrained = str(tmp_path / "untrained")
    monkeypatch.setattr(inference, "BASE", tiny_model_dir)
    monkeypatch.setattr(inference.InferenceArgs, "model_name_or_path", untrained)
    assert (
        inference.choose_model(inference.InferenceArgs(model_name_or_path=untrained))
        == tiny_model_dir
    )
    assert "no trained model yet" in capsys.readouterr().err
    shutil.copytree(tiny_model_dir, untrained)
    assert (
        inference.choose_model(inference.InferenceArgs(model_name_or_path=untrained)) == untrained
    )
    assert not capsys.readouterr().err


def test_file_of_prompts(run_script, model, judge, tmp_path):
    long = PROBLEMS[0].prompt + " She waits." * 40  # too long for the judge, not for the policy
    prompts = [PROBLEMS[3].prompt, long, PROBLEMS[0].prompt]
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    )
    arguments = [
        "--input",
        "prompts.jsonl",
        "--output",
        "answers.jsonl",
        "--model_name_or_path",
        model,
        "--max_new_tokens",
        80,
    ]
    process = run_script("inference.py", *arguments, "--show_scores", "--judge_path", judge)
    assert (
        process.returncode == 0
        and "wrote 3 answers to answers.jsonl, 1 without scores" in process.stdout
    ), process.stderr
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    for row, problem in ((rows[0], PROBLEMS[3]), (rows[2], PROBLEMS[0])):
        assert (
            row["steps"] == problem.steps
            and row["finished"]
            and len(row["scores"]) == len(row["steps"])
        )
    assert "scores" not in rows[1]
    again = run_script("inference.py", *arguments)
    assert again.returncode == 2 and "give --overwrite" in again.stderr


@pytest.mark.parametrize("search", ["beam", "best_of_n", "majority_vote"])
def test_a_search_shows_what_it_was_proposed_and_what_it_kept(run_script, model, judge, search):
    arguments = [
        "--model_name_or_path",
        model,
        "--search",
        search,
        "--n",
        3,
        "--beams",
        2,
        "--temperature",
        0.3,
    ]
    prompt = ["--prompt", PROBLEMS[0].prompt]
    guide = [] if search == "majority_vote" else ["--judge_path", judge]
    plain = run_script("inference.py", *arguments, *prompt, *guide)
    assert plain.returncode == 0 and plain.stdout.split("\n") == [*PROBLEMS[0].steps, ""], (
        plain.stderr
    )
    shown = run_script("inference.py", *arguments, *prompt, "--show_scores", "--judge_path", judge)
    *rounds, answer = shown.stdout.split("\n\n")
    assert len(rounds) == (len(PROBLEMS[0].steps) if guide and search != "best_of_n" else 1), (
        shown.stdout
    )
    for k, text in enumerate(rounds):
        assert re.match(
            rf"round {k + 1}: [36] (proposals|solutions), \d different, kept \(>\) by ", text
        )
        kept = [line for line in text.splitlines() if line.startswith("  > ")]
        assert 1 <= len(kept) <= 2 and all(
            re.match(r"  > [01]\.\d{3}    [1-3] x  \[[01]\.\d\d", line) for line in kept
        )
    assert re.sub(r"   \[[01]\.\d\d\]$", "", answer, flags=re.MULTILINE) == plain.stdout
    assert re.search(
        rf"\({search}: \d+ proposals, \d+ tokens, \d+ steps judged, [\d.]+ s\)", shown.stderr
    )


def test_the_loop_searches_with_models_that_stay(run_script, model, judge):
    arguments = [
        "--model_name_or_path",
        model,
        "--search",
        "beam",
        "--n",
        2,
        "--beams",
        1,
        "--judge_path",
        judge,
    ]
    typed = f"{PROBLEMS[1].prompt}\n{'Mia has 2 cups. ' * 100}\n{PROBLEMS[2].prompt}\n"
    process = run_script("inference.py", *arguments, "--temperature", 0.3, stdin=None, input=typed)
    assert process.returncode == 0 and process.stderr.count("the policy's context holds") == 1, (
        process.stderr
    )
    for problem in PROBLEMS[1:3]:
        assert "\n".join(problem.steps) in process.stdout


def test_a_file_is_searched(run_script, model, judge, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": problem.prompt}) + "\n" for problem in PROBLEMS)
    )
    arguments = [
        "--input",
        "prompts.jsonl",
        "--output",
        "answers.jsonl",
        "--model_name_or_path",
        model,
        "--temperature",
        0.3,
    ]
    process = run_script(
        "inference.py",
        *arguments,
        "--search",
        "best_of_n",
        "--n",
        2,
        "--judge_path",
        judge,
        "--show_scores",
    )
    assert process.returncode == 0, process.stderr
    for row, problem in zip(
        map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines()),
        PROBLEMS,
        strict=True,
    ):
        assert (row["prompt"], row["steps"], row["finished"], row["proposals"]) == (
            problem.prompt,
            problem.steps,
            True,
            2,
        )
        assert len(row["scores"]) == len(row["steps"]) and row["tokens"] > 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", b"Mia \xff"], "not UTF-8"),
        (["--prompt", "Mia has 2 cups. " * 100], "context"),
        (["--prompt", "Mia", "--model_name_or_path", "none"], "model directory none not found"),
        (["--prompt", "Mia", "--model_name_or_path", "."], "no model directory"),
        (["--prompt", "Mia", "--show_scores", "--judge_path", "none.gguf"], "none.gguf not found"),
        (
            ["--prompt", "Mia", "--judge", "exact"],
            "goes with --show_scores or a --search that it guides",
        ),
        (
            ["--prompt", "Mia", "--judge", "exact", "--search", "majority_vote"],
            "goes with --show_scores or a --search that it guides",
        ),
        (["--prompt", "Mia", "--search", "climb"], "invalid choice: 'climb'"),
        (["--prompt", "Mia", "--search", "beam", "--n", "0"], "--n: expected 1 or more, got 0"),
        (
            ["--prompt", "Mia", "--search", "beam", "--beams", "0"],
            "--beams: expected 1 or more, got 0",
        ),
        (
            ["--prompt", "Mia", "--search", "beam", "--temperature", "0"],
            "at 0 all proposals are alike",
        ),
        (
            ["--prompt", "Mia", "--search", "beam", "--judge", "shuffled"],
            "shuffled guides no search",
        ),
        (
            ["--prompt", "Mia", "--search", "beam", "--judge", "prm", "--judge_path", "none/x/y"],
            "none/x/y not found",
        ),
        (["--prompt", "Mia", "--n", "3"], "go with --search"),
        (["--prompt", "Mia", "--show_scores", "--judge", "shuffled"], "needs --input"),
        (["--prompt", "Mia", "--temperature", "nan"], "--temperature: expected 0 or more"),
        (["--prompt", "Mia", "--max_new_tokens", "0"], "--max_new_tokens: expected 1 or more"),
        (["--prompt", "Mia", "--unknown"], "unknown argument --unknown"),
        (["--prompt", "Mia", "--config", "none.yaml"], "none.yaml not found"),
        (["--input", "none.jsonl", "--output", "out.jsonl"], "none.jsonl not found"),
        (["--input", "rows.jsonl"], "--input and --output go together"),
        (
            ["--input", "rows.jsonl", "--output", "out.jsonl"],
            "rows.jsonl:2: field 'prompt': expected a text, got an empty one",
        ),
        (["--input", "rows.jsonl", "--output", "rows.jsonl/out.jsonl"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line(tiny_model_dir, tmp_path, arguments, message):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Mia"}\n{"prompt": ""}\n')
    command = [
        sys.executable,
        str(ROOT / "inference.py"),
        "--model_name_or_path",
        tiny_model_dir,
        *arguments,
    ]
    process = subprocess.run(
        command, capture_output=True, cwd=tmp_path, stdin=subprocess.DEVNULL, timeout=60
    )
    stderr = process.stderr.decode()
    assert process.returncode == 2 and len(stderr.splitlines()) == 1 and message in stderr, stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
