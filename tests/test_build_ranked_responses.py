"""Prompts to answers: kept fields, groups of four, checker ranks, kills, servers, mistakes."""

import csv
import gzip
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from common.cli import run
from common.errors import PromptTooLong, ServerError
from common.files import read_rows, write_records
from lm.policy import Policy
from lm.server_policy import ServerPolicy
from reasoning.datasets.ranking import check_groups, groups, read_answers
from reasoning.grading import grade_steps, is_correct
from reasoning.problems import problems
from reasoning.records import Problem
from reasoning.splits import default_split, held_out_prompts, is_kept_out
from reasoning.steps import split_steps
from tests.helpers.servers import Server, chat, completion
from utils import build_ranked_responses
from utils.build_ranked_responses import (
    KINDS,
    AnswerArguments,
    Sample,
    add_error,
    group_of_four,
    kind_of,
    main,
    read_tasks,
)

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "utils/build_ranked_responses.py"
POLICY = str(ROOT / "models/policy-mini")
PROBLEM = Problem(
    "Mia has 2 apples. ...?", "10", ["Step 1: 2 + 3 = 5", "Step 2: 5 * 2 = 10", "Answer: 10"]
)
RIGHT = "Step 1: 2 + 3 = 5\nStep 2: 5 * 2 = 10\nAnswer: 10"
WRONG = "Step 1: 2 + 3 = 5\nStep 2: 5 + 2 = 7\nAnswer: 7"


def sample(text: str) -> Sample:
    return Sample(text, True, {"temperature": 1.0, "top_p": 1.0, "seed": 0})


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (RIGHT, "right"),
        (WRONG, "wrong"),
        ("Step 1: 2 + 3 = 6\nStep 2: 5 * 2 = 10\nAnswer: 10", "flawed"),  # a false equation
        ("Step 1: 2 + 8 = 10\nAnswer: 10", "flawed"),  # a step is missing
        ("Step 1: 2 + 3 = 5\nStep 2: 5 * 2 = 10\nAnswer: 12", "wrong"),
        ("Step 1: 2 + 3 = 5\nStep 2: 5 * 2 = 10", "malformed"),
        ("Step 1: 2 + 3 = 5\nStep 2: 5 *", "malformed"),
        ("Step 1: 2 + 3 =\nStep 2: 5 * 2 = 10\nAnswer: 10", "malformed"),
        ("2 + 3 = 5\n5 * 2 = 10\nAnswer: 10", "malformed"),
        ("Answer: 10", "malformed"),
        ("Step 1: 2 + 3 = 5\nAnswer: 10\nStep 2: 5 * 2 = 10", "malformed"),
        ("", "malformed"),
    ],
)
def test_kinds(text, kind):
    assert kind_of(sample(text), PROBLEM) == kind


def test_the_wrong_answer_is_the_one_most_like_the_right_one():
    short, long, alike = (
        "Step 1: 2 + 7 = 9\nAnswer: 9",
        f"{WRONG}0000",
        WRONG.replace("+ 2 = 7", "* 2 = 12").replace("7", "12"),
    )
    group, _ = group_of_four(
        PROBLEM, [sample(text) for text in (short, long, RIGHT, alike)], random.Random(0)
    )
    assert group["wrong"].text == alike and list(group) == list(KINDS)
    assert not group["right"].note and group["flawed"].note and group["malformed"].note
    assert group_of_four(PROBLEM, [sample(RIGHT)], random.Random(0)) == (None, "no wrong sample")
    assert group_of_four(PROBLEM, [sample(WRONG)], random.Random(0)) == (None, "no right sample")


def test_a_sampled_kind_is_not_made():
    texts = [RIGHT, WRONG, "Step 1: 2 + 8 = 10\nAnswer: 10", "Step 1: 2 +"]
    group, _ = group_of_four(PROBLEM, [sample(text) for text in texts], random.Random(0))
    assert [one.note for one in group.values()] == [""] * 4 and group["malformed"].text == texts[3]


def test_added_errors():
    """A flawed answer differs in one number from the right one; malformed ones differ."""
    made = [add_error(sample(RIGHT), "flawed", PROBLEM, random.Random(k)) for k in range(40)]
    assert all(
        len(one.text) == len(RIGHT) and sum(map(str.__ne__, one.text, RIGHT)) <= 2 for one in made
    )
    assert {one.note[-6:] for one in made} == {"step 1", "step 2"} and len(
        {one.text for one in made}
    ) > 8
    broken = [add_error(sample(RIGHT), "malformed", PROBLEM, random.Random(k)) for k in range(40)]
    assert Counter(one.note[:13] for one in broken).keys() == {
        "put in: cut o",
        "put in: no cl",
        "put in: step ",
    }
    assert all(one.text for one in broken)


def script(monkeypatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, args)])
    run(main)


SMALL = ("--model_name_or_path", POLICY, "--input", "problems.jsonl", "--rank_by", "exact")
SMALL += ("--answers", 2, "--max_new_tokens", 100)


def answer_in_units_of_64(folder: Path, *args: object) -> None:
    """The script with 64 prompts answered together instead of 128, as a process of its own."""
    os.chdir(folder)
    build_ranked_responses.UNIT = 64
    sys.argv = [SCRIPT, *map(str, args)]
    run(main)


@pytest.mark.process
def test_exact_groups_and_a_killed_run(monkeypatch, tmp_path, capsys):
    """A run killed after 64 prompts, with a torn row added, resumes and writes the same bytes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build_ranked_responses, "UNIT", 64)
    selected = {problem.prompt: problem for problem in itertools.islice(problems("train"), 66)}
    write_records("problems.jsonl", selected.values())
    script(monkeypatch, *SMALL, "--output", "whole.csv")
    rows = read_answers("whole.csv")
    check_groups(rows, "whole.csv")
    found = groups(rows)
    assert len(found) >= 10 and len(rows) == 4 * len(found)
    assert f"{len(found)} groups" in capsys.readouterr().out
    for (prompt, ranker), group in found.items():
        by_kind = {row.category: row for row in group}
        ranks = {kind: row.rank for kind, row in by_kind.items()}
        assert ranker == "rule:exact" and ranks == {kind: k for k, kind in enumerate(KINDS, 1)}
        steps = {kind: split_steps(row.answer) for kind, row in by_kind.items()}
        scores = {kind: grade_steps(steps[kind], selected[prompt]) for kind in KINDS}
        assert all(scores["right"]) and not all(scores["flawed"]) and not all(scores["wrong"])
        right = {kind: is_correct(steps[kind], selected[prompt]) for kind in KINDS}
        assert right["right"] and right["flawed"] and not right["wrong"]
        assert all(bool(row.note) == row.generator.endswith("+error") for row in group)
        assert {by_kind[kind].generator for kind in ("right", "wrong")} == {"policy-mini"}
        split = default_split(prompt)
        assert {row.split for row in group} == {split}
        assert split == "test" or not is_kept_out(prompt)
    # the order in the file does not show the rank
    assert len({tuple(row.rank for row in group) for group in found.values()}) > 5

    policy = Policy.load(POLICY)  # the settings of a row give its answer again
    for row in [row for row in rows if not row.note][::20]:
        texts = policy.texts([row.prompt], row.temperature, row.top_p, 100, row.seed)
        assert texts[0][0] == row.answer
    assert {(row.temperature, row.seed) for row in rows} == {(0.7, 0), (1.0, 1)}

    partial = tmp_path / "killed.csv.partial"
    killed = (*SMALL, "--output", "killed.csv")
    process = multiprocessing.get_context("forkserver").Process(
        target=answer_in_units_of_64, args=(tmp_path, *killed)
    )
    process.start()
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.is_alive():
        if partial.exists() and partial.read_bytes().count(b"\n") > 64:
            break
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "killed.csv").exists()
    with open(partial, "ab") as file:
        file.write(b'{"answers": [{"prom')
    with pytest.raises(SystemExit):
        script(monkeypatch, *killed, "--seed", 1)
    assert "another job" in capsys.readouterr().err
    script(monkeypatch, *killed)
    assert "resuming: 64 of 66" in capsys.readouterr().out
    assert Path("killed.csv").read_bytes() == Path("whole.csv").read_bytes()
    assert not partial.exists()


def test_prompts_of_any_kind_are_left_to_be_ranked(monkeypatch, tmp_path, tiny_model_dir, capsys):
    """A chat template, categories, a table with quotes; equal greedy answers are kept once.

    Compressed tables work as plain ones do."""
    monkeypatch.chdir(tmp_path)
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "chatty"))
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.content }}]{% endfor %}:"
    )
    cells = [
        ["category", "prompt"],
        ["tale", 'Tell "this",\nplease'],
        ["", "Why?"],
        ["tale", "Why?"],
    ]
    with open("prompts.csv", "w", newline="") as file:
        csv.writer(file).writerows(cells)
    Path("prompts.csv.gz").write_bytes(gzip.compress(Path("prompts.csv").read_bytes()))
    given = ("--model_name_or_path", model, "--chat", "--max_new_tokens", 12)
    sampled = (*given, "--temperature", 0, 0.8, "--top_p", 1, 0.9, 0.8)
    script(monkeypatch, *sampled, "--input", "prompts.csv", "--output", "answers.csv")
    compressed = ("--input", "prompts.csv.gz", "--output", "answers.csv.gz")
    script(monkeypatch, *sampled, *compressed, "--save_samples")
    samples = [row for _, row in read_rows("answers.samples.jsonl")]
    assert len(samples) == 8 and {row["verdict"] for row in samples} <= {"cut", "no answer"}
    rows = read_answers("answers.csv")
    check_groups(rows, "answers.csv")
    assert gzip.decompress(Path("answers.csv.gz").read_bytes()) == Path("answers.csv").read_bytes()
    policy = Policy.load(str(model))
    # the last row counts for a prompt with several
    for prompt, category in (('Tell "this",\nplease', "tale"), ("Why?", "tale")):
        own = [row for row in rows if row.prompt == prompt]
        settings = [(0, 1, 0), (0.8, 0.9, 1), (0, 0.8, 2), (0.8, 1, 3)]
        texts = [policy.texts([prompt], *how[:2], 12, how[2], chat=True)[0][0] for how in settings]
        first = reversed([*zip(texts, settings, strict=True)])
        expected = {text: how for text, how in first if text}
        assert len(expected) == 3  # the two greedy answers are equal
        assert {row.answer: (row.temperature, row.top_p, row.seed) for row in own} == expected
        kept = {(row.rank, row.ranker, row.category, row.generator) for row in own}
        assert kept == {(None, "", category, "chatty")}
    with pytest.raises(SystemExit):
        greedy = ("--temperature", 0, "--input", "prompts.csv", "--output", "answers.csv")
        script(monkeypatch, *given, *greedy, "--overwrite")
    printed = capsys.readouterr()
    assert "all answers equal or empty: 2" in printed.out and "nothing was written" in printed.err
    assert read_answers("answers.csv") == rows and len(list(tmp_path.glob("*.csv*"))) == 4


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_answers_from_a_server(server, monkeypatch, tmp_path):
    """Chats go to /chat/completions; what comes back is text, HTML or not."""
    monkeypatch.chdir(tmp_path)
    server.answer = lambda number, body: chat(
        f" <script>alert({body['seed'] % 97})</script>\n\n'a', \"b\" "
    )
    Path("prompts.jsonl").write_text(
        '{"prompt": "Tell me a story"}\n{"prompt": "Why?", "category": "short"}\n'
    )
    given = (
        "--policy_base_url",
        server.url,
        "--model_name_or_path",
        "./some",
        "--chat",
        "--input",
        "prompts.jsonl",
    )
    script(monkeypatch, *given, "--output", "answers.csv", "--top_p", 0.9, "--max_new_tokens", 50)
    rows = read_answers("answers.csv")
    assert [row.category for row in rows] == [""] * 4 + ["short"] * 4 and {
        row.generator for row in rows
    } == {"./some"}
    assert all(
        row.answer.startswith("<script>alert(") and row.answer.endswith("</script>\n\n'a', \"b\"")
        for row in rows
    )
    asked = [request for request in server.requests if request["max_tokens"] == 50]
    assert len(asked) == 8 == len({request["seed"] for request in asked})
    assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}
    assert {request["temperature"] for request in asked} == {0.7, 1.0, 1.3} and {
        request["top_p"] for request in asked
    } == {0.9}
    assert {request["messages"][0]["content"] for request in asked} == {"Tell me a story", "Why?"}


def test_texts_of_a_server(server):
    policy = ServerPolicy(server.url, "./some", max_retries=0)
    cut = completion("Step 1: 1 + 1 = 2\nAnswer: 2\n")
    cut["choices"][0]["finish_reason"] = "length"
    server.answer = lambda number, body: cut
    assert policy.texts(["1 + 1?"], 0.7, 0.9, 40, 5) == [("Step 1: 1 + 1 = 2\nAnswer: 2", False)]
    (request,) = server.requests
    assert (
        request["path"] == "/v1/completions"
        and request["prompt"].startswith("Problem: 1 + 1?")
        and "stop" not in request
    )
    assert (request["temperature"], request["top_p"], request["max_tokens"]) == (0.7, 0.9, 40)
    policy.texts(["1 + 1?", "1 + 1?"], seed=5), policy.texts(["1 + 1?"], seed=6)
    seeds = [request["seed"] for request in server.requests]
    assert seeds[0] == seeds[1] == seeds[2] != seeds[3]
    server.answer = lambda number, body: chat(None)
    assert policy.texts(["Why?"], chat=True) == [("", True)]
    long = json.dumps({"error": {"message": "maximum context length is 10 tokens"}}).encode()
    server.answer = lambda number, body: (400, {}, long)
    with pytest.raises(PromptTooLong, match="no room in the model's context behind 'Why"):
        policy.texts(["Why?"], chat=True)
    server.answer = lambda number, body: (
        chat("x") | {"choices": [{"message": 3, "finish_reason": "stop"}]}
    )
    with pytest.raises(ServerError, match="no completion"):
        policy.texts(["Why?"], chat=True)


HELD_OUT = (ROOT / "data/problems_test.jsonl").read_text().splitlines()[3]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--input", "nowhere.jsonl"], "nowhere.jsonl not found"),
        (["--input", "held_out.jsonl"], "held-out problem (problems_test.jsonl)"),
        (
            ["--input", "held_out.jsonl", "--rank_by", "exact"],
            "held-out problem (problems_test.jsonl)",
        ),
        (
            ["--input", "bare.jsonl", "--rank_by", "exact"],
            "bare.jsonl: --rank_by exact needs reference steps",
        ),
        (["--input", "empty.jsonl"], "empty.jsonl: no rows"),
        (
            ["--input", "odd.jsonl"],
            "odd.jsonl:1: field 'prompt': expected a text, got an empty one",
        ),
        (["--input", "number.jsonl"], "number.jsonl:1: field 'category': expected a text, got 3"),
        (["--answers", "1"], "--answers: expected 2 or more, got 1"),
        (["--temperature", "1", "-1"], "--temperature: expected 0 or more, got -1"),
        (["--temperature", "nan"], "--temperature: expected a finite number, got nan"),
        (["--top_p", "0"], "--top_p: expected above 0 and at most 1"),
        (["--top_p", "90"], "--top_p: expected above 0 and at most 1"),
        (["--max_new_tokens", "0"], "--max_new_tokens: expected 1 or more"),
        (["--rank_by", "me"], "--rank_by"),
        (["--rank_by", "exact", "--chat"], "argument --chat"),
        (["--chat", "--input", "bare.jsonl"], "policy-mini has no chat template"),
        (
            ["--input", "bare.jsonl", "--model_name_or_path", "./nowhere"],
            "model directory ./nowhere not found",
        ),
        (["--input", "bare.jsonl", "--output", "there.csv"], "there.csv exists: give --overwrite"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    monkeypatch, tmp_path, capsys, given, message
):
    monkeypatch.chdir(tmp_path)
    files = {
        "held_out.jsonl": f'{{"prompt": "x", "answer": "1", "steps": ["Answer: 1"]}}\n{HELD_OUT}\n',
        "bare.jsonl": '{"prompt": "1 + 1?", "answer": "2"}\n',
        "empty.jsonl": "\n",
        "odd.jsonl": '{"prompt": " "}\n',
        "number.jsonl": '{"prompt": "x", "category": 3}\n',
        "there.csv": "mine",
    }
    for name, text in files.items():
        Path(name).write_text(text)
    output = () if "--output" in given else ("--output", "new.csv")
    with pytest.raises(SystemExit) as stopped:
        script(monkeypatch, "--model_name_or_path", POLICY, *given, *output, "--limit", 3)
    error = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and message in error[-1] and "error:" in error[-1]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


@pytest.mark.process
def test_a_mistake_in_a_process_of_its_own(run_script, tmp_path):
    done = run_script(SCRIPT, "--answers", 1)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "build_ranked_responses.py: error: argument --answers" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.process
def test_the_committed_groups_of_four():
    """The script's defaults made them, from problems that are not held out.

    Right and wrong answers are alike in length and form."""
    rows = read_answers(ROOT / "data/answers.csv.gz")
    check_groups(rows, "data/answers.csv.gz")
    tasks = {task.prompt: task for task in read_tasks(AnswerArguments(rank_by="exact"))}
    found = groups(rows)
    splits = Counter(group[0].split for group in found.values())
    assert (
        splits["train"] >= 1000
        and min(splits["validation"], splits["test"]) >= 300
        and len(rows) == 4 * len(found)
    )
    assert {ranker for _, ranker in found} == {"rule:exact"} and not {
        prompt for prompt, _ in found
    } & held_out_prompts().keys()
    alike = 0
    for prompt, _ in found:
        by_kind = {row.category: row for row in found[prompt, "rule:exact"]}
        assert [by_kind[kind].rank for kind in KINDS] == [1, 2, 3, 4] and by_kind[
            "right"
        ].split == tasks[prompt].split
        assert (by_kind["right"].split == "test") == (default_split(prompt) == "test")
        assert [
            kind_of(sample(by_kind[kind].answer), tasks[prompt].problem) for kind in KINDS
        ] == list(KINDS)
        alike += by_kind["right"].answer.count("\n") == by_kind["wrong"].answer.count("\n")
    assert alike / len(found) > 0.95


def test_the_committed_answers_of_a_real_model():
    rows = read_answers(ROOT / "data/answers_smollm2.csv")
    check_groups(rows, "data/answers_smollm2.csv")
    asked = [
        json.loads(line) for line in (ROOT / "data/prompts_real.jsonl").read_text().splitlines()
    ]
    assert Counter(row["category"] for row in asked).most_common() == [
        (category, 8) for category in {row["category"]: 0 for row in asked}
    ]
    assert {(row.prompt, row.category) for row in rows} == {
        (row["prompt"], row["category"]) for row in asked
    }
    assert len(rows) == 160 and {len(group) for group in groups(rows).values()} == {4}
    assert {row.ranker for row in rows} == {"llm:claude"} and {row.generator for row in rows} == {
        "smollm2-135m-instruct"
    }
    assert all(None not in (row.temperature, row.top_p, row.seed) for row in rows)
