"""Runs of inference.py: one prompt, the loop, a file of prompts, searches."""

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
from common.files import write_records
from reasoning.problems import stories
from tests.helpers.gguf_judges import export_judge
from tests.helpers.mains import call_main
from tests.helpers.training import taught

ROOT = Path(__file__).resolve().parents[1]
SHORT = (story for story in stories("test") if len(story.events) == 2)
PROBLEMS = [story.problem() for story in itertools.islice(SHORT, 4)]
SCORED = re.compile(r"   \[[01]\.\d\d\]$", re.MULTILINE)

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def model(tiny_model_dir, tmp_path_factory) -> str:
    """A policy that solves PROBLEMS."""
    folder = tmp_path_factory.mktemp("taught") / "model"
    return taught(tiny_model_dir, folder, [(problem.prompt, problem.steps) for problem in PROBLEMS])


@pytest.fixture(scope="module")
def judge(tiny_model_dir, tmp_path_factory) -> str:
    return export_judge(tiny_model_dir, tmp_path_factory.mktemp("judge"), context=200)


@pytest.fixture
def answer(model, monkeypatch, capsys):
    """Run main in this process with the model: (exit code, stdout, stderr)."""

    def answer(*args: object) -> tuple[int, str, str]:
        given = ["--model_name_or_path", model, *args]
        return call_main(inference.main, *given, monkeypatch=monkeypatch, capsys=capsys)

    return answer


def test_help_is_quick(tmp_path):
    """A process of its own: others are forked with the libraries loaded."""

    def cpu_seconds():  # of finished child processes: does not depend on the load of the machine
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    start = cpu_seconds()
    command = [sys.executable, str(ROOT / "inference.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "--show_scores" in done.stdout
    assert cpu_seconds() - start < 2


def test_prompt_is_answered_with_scores(run_script, model, judge):
    arguments = ["--prompt", PROBLEMS[0].prompt, "--model_name_or_path", model]
    plain = run_script("inference.py", *arguments)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.split("\n") == [*PROBLEMS[0].steps, ""]
    assert "\r" not in plain.stderr  # no bar of loading weights
    scored = run_script("inference.py", *arguments, "--show_scores", "--judge_path", judge)
    assert SCORED.sub("", scored.stdout) == plain.stdout
    assert len(SCORED.findall(scored.stdout)) == len(PROBLEMS[0].steps)


def test_sampling_follows_the_seed(run_script, tiny_model_dir):
    """Any Unicode is a prompt. In the loop the second question has the next seed."""
    prompt = "Mia 🍎 has ٣ äpples\u2028?"
    arguments = ["--temperature", 1, "--max_new_tokens", 12, "--seed", 1]
    arguments += ["--model_name_or_path", tiny_model_dir]
    single = run_script("inference.py", "--prompt", prompt, *arguments)
    assert single.returncode == 0, single.stderr
    loop = run_script("inference.py", *arguments, input=f"{prompt}\n{prompt}\nQUIT\n")
    _, first, second, _ = loop.stdout.split("> ")
    assert first == single.stdout != second


@pytest.mark.parametrize("end", ["exit\n", ""])
def test_loop_ends(run_script, model, end):
    """It answers, asks again after an empty line, and ends on exit or the end of the input."""
    typed = f"{PROBLEMS[1].prompt}\n\n{PROBLEMS[2].prompt}\n{end}"
    process = run_script("inference.py", "--model_name_or_path", model, input=typed)
    assert process.returncode == 0, process.stderr
    for problem in PROBLEMS[1:3]:
        assert "\n".join(problem.steps) in process.stdout
    assert process.stderr.count("the prompt is empty") == 1 and "Traceback" not in process.stderr


def test_a_judge_that_fails_does_not_end_the_loop(run_script, model, tmp_path):
    """The exact judge knows the second problem only."""
    write_records(tmp_path / "problems.jsonl", [PROBLEMS[2]])
    arguments = ["--show_scores", "--judge", "exact", "--judge_problems", "problems.jsonl"]
    process = run_script(
        "inference.py",
        *arguments,
        "--model_name_or_path",
        model,
        input=f"{PROBLEMS[1].prompt}\n{PROBLEMS[2].prompt}\n",
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("no reference for the problem") == 1, process.stderr
    assert "\n".join(f"{step}   [1.00]" for step in PROBLEMS[2].steps) in process.stdout


def test_loop_ends_on_ctrl_c(model, judge, tmp_path):
    """Ctrl-C reaches the whole process group, also the worker of the judge."""
    command = [sys.executable, str(ROOT / "inference.py"), "--model_name_or_path", model]
    command += ["--show_scores", "--judge_path", judge]
    process = subprocess.Popen(
        command,
        **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
        cwd=tmp_path,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert os.read(process.stdout.fileno(), 2) == b"> "
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=120)  # needs far less on an idle machine
    assert process.returncode == 0 and b"Traceback" not in stderr, stderr.decode()


def test_before_any_training_the_base_answers_with_a_message(
    tiny_model_dir, tmp_path, monkeypatch, capsys
):
    untrained = str(tmp_path / "untrained")
    monkeypatch.setattr(inference, "BASE", tiny_model_dir)
    monkeypatch.setattr(inference.InferenceArgs, "model_name_or_path", untrained)
    args = inference.InferenceArgs(model_name_or_path=untrained)
    assert inference.choose_model(args) == tiny_model_dir
    assert "no trained model yet" in capsys.readouterr().err
    shutil.copytree(tiny_model_dir, untrained)
    assert inference.choose_model(args) == untrained
    assert not capsys.readouterr().err


def test_file_of_prompts(answer, judge, tmp_path):
    long = PROBLEMS[0].prompt + " She waits." * 40  # too long for the judge, not for the policy
    prompts = [PROBLEMS[3].prompt, long, PROBLEMS[0].prompt]
    write_records(tmp_path / "prompts.jsonl.gz", [{"prompt": prompt} for prompt in prompts])
    output = tmp_path / "answers.jsonl"
    arguments = ["--input", tmp_path / "prompts.jsonl.gz", "--output", output]
    arguments += ["--max_new_tokens", 80]
    code, out, err = answer(*arguments, "--show_scores", "--judge_path", judge)
    assert code == 0, err
    assert f"wrote 3 answers to {output}, 1 without scores" in out
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    for row, problem in ((rows[0], PROBLEMS[3]), (rows[2], PROBLEMS[0])):
        assert row["steps"] == problem.steps and row["finished"]
        assert len(row["scores"]) == len(row["steps"])
    assert "scores" not in rows[1]
    code, _, err = answer(*arguments)
    assert code == 2 and "give --overwrite" in err


@pytest.mark.parametrize("search", ["beam", "best_of_n", "majority_vote"])
def test_a_search_shows_its_proposals_and_what_it_kept(answer, judge, search):
    arguments = ["--search", search, "--n", 3, "--beams", 2, "--temperature", 0.3]
    arguments += ["--prompt", PROBLEMS[0].prompt]
    guide = [] if search == "majority_vote" else ["--judge_path", judge]
    code, plain, err = answer(*arguments, *guide)
    assert code == 0, err
    assert plain.split("\n") == [*PROBLEMS[0].steps, ""]
    _, out, err = answer(*arguments, "--show_scores", "--judge_path", judge)
    *rounds, found = out.split("\n\n")
    assert len(rounds) == (len(PROBLEMS[0].steps) if search == "beam" else 1), out
    heading = r"round {}: [36] (proposals|solutions), \d different, kept \(>\) by "
    for k, text in enumerate(rounds):
        assert re.match(heading.format(k + 1), text)
        kept = [line for line in text.splitlines() if line.startswith("  > ")]
        assert 1 <= len(kept) <= 2
        assert all(re.match(r"  > [01]\.\d{3}    [1-3] x  \[[01]\.\d\d", line) for line in kept)
    assert SCORED.sub("", found) == plain
    cost = rf"\({search}: \d+ proposals, \d+ tokens, \d+ steps judged, [\d.]+ s\)"
    assert re.search(cost, err)


def test_the_loop_searches_and_keeps_its_models(run_script, model, judge):
    arguments = ["--model_name_or_path", model, "--search", "beam", "--n", 2, "--beams", 1]
    arguments += ["--judge_path", judge, "--temperature", 0.3]
    typed = f"{PROBLEMS[1].prompt}\n{'Mia has 2 cups. ' * 100}\n{PROBLEMS[2].prompt}\n"
    process = run_script("inference.py", *arguments, input=typed)
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("the policy's context holds") == 1, process.stderr
    for problem in PROBLEMS[1:3]:
        assert "\n".join(problem.steps) in process.stdout


def test_a_file_is_searched(answer, judge, tmp_path):
    write_records(tmp_path / "prompts.jsonl", [{"prompt": p.prompt} for p in PROBLEMS])
    output = tmp_path / "answers.jsonl"
    arguments = ["--input", tmp_path / "prompts.jsonl", "--output", output, "--temperature", 0.3]
    arguments += ["--search", "best_of_n", "--n", 2, "--judge_path", judge, "--show_scores"]
    code, _, err = answer(*arguments)
    assert code == 0, err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    for row, problem in zip(rows, PROBLEMS, strict=True):
        assert (row["prompt"], row["steps"]) == (problem.prompt, problem.steps)
        assert row["finished"] and row["proposals"] == 2
        assert len(row["scores"]) == len(row["steps"]) and row["tokens"] > 40


MIA = ["--prompt", "Mia"]
BEAM = [*MIA, "--search", "beam"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "Mia \udcff"], "not UTF-8"),
        (["--prompt", "Mia has 2 cups. " * 100], "context"),
        ([*MIA, "--model_name_or_path", "none"], "model directory none not found"),
        ([*MIA, "--model_name_or_path", "DIR"], "no model directory"),
        ([*MIA, "--show_scores", "--judge_path", "none.gguf"], "none.gguf not found"),
        (
            [*MIA, "--judge", "exact"],
            "goes with --show_scores, --serve or a --search that it guides",
        ),
        (
            [*MIA, "--judge", "exact", "--search", "majority_vote"],
            "goes with --show_scores, --serve or a --search that it guides",
        ),
        ([*MIA, "--search", "climb"], "invalid choice: 'climb'"),
        ([*BEAM, "--n", "0"], "--n: expected 1 or more, got 0"),
        ([*BEAM, "--beams", "0"], "--beams: expected 1 or more, got 0"),
        ([*BEAM, "--temperature", "0"], "at 0 all proposals are alike"),
        ([*BEAM, "--judge", "shuffled"], "shuffled guides no search"),
        ([*BEAM, "--judge", "prm", "--judge_path", "none/x/y"], "none/x/y not found"),
        ([*MIA, "--n", "3"], "go with --search"),
        ([*MIA, "--show_scores", "--judge", "shuffled"], "needs --input"),
        ([*MIA, "--temperature", "nan"], "--temperature: expected a finite number"),
        ([*MIA, "--temperature", "-1"], "--temperature: expected 0 or more"),
        ([*MIA, "--max_new_tokens", "0"], "--max_new_tokens: expected 1 or more"),
        ([*MIA, "--unknown"], "unknown argument --unknown"),
        ([*MIA, "--config", "none.yaml"], "none.yaml not found"),
        (["--input", "none.jsonl", "--output", "out.jsonl"], "none.jsonl not found"),
        (["--input", "DIR/rows.jsonl"], "--input and --output go together"),
        (
            ["--input", "DIR/rows.jsonl", "--output", "DIR/out.jsonl"],
            "rows.jsonl:2: field 'prompt': expected a text, got an empty one",
        ),
        (["--input", "DIR/rows.jsonl", "--output", "DIR/rows.jsonl/x"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line(answer, tmp_path, arguments, message):
    write_records(tmp_path / "rows.jsonl", [{"prompt": "Mia"}, {"prompt": ""}])
    code, _, err = answer(*(part.replace("DIR", str(tmp_path)) for part in arguments))
    assert code == 2 and len(err.splitlines()) == 1 and message in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_prompt_that_is_not_utf8_is_one_line(run_script):
    process = run_script("inference.py", "--prompt", "Mia \udcff")
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert "not UTF-8" in process.stderr
