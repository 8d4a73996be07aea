"""The flag --judge: arguments, name and identity of a judge; the human judge; a failing server."""

import hashlib
import itertools
import json
from pathlib import Path

import pytest
from sklearn.metrics import cohen_kappa_score

from common.errors import RecordError, UserError
from common.files import ROOT, read_records, read_rows, write_records
from common.identity import content_hash
from evaluation.metrics import kappa_metric
from reasoning.problems import problems
from reasoning.records import Problem
from reward_model import evaluate_steps
from reward_model.judges.human import HumanJudge
from reward_model.protocols import aggregate
from reward_model.registry import (
    CHUNK,
    JUDGES,
    SHUFFLED,
    JudgeArgs,
    check_judge,
    judge_identity,
    judge_name,
    open_judge,
    score_all,
)
from tests.helpers.judges import FixedJudge
from tests.helpers.mains import call_main
from tests.helpers.servers import Server, chat, error

TEST_PROBLEMS = str(ROOT / "data/problems_test.jsonl")


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys):
    """Run evaluate_steps.py in tmp_path, in this process; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object):
        main = evaluate_steps.main
        return call_main(main, *arguments, monkeypatch=monkeypatch, capsys=capsys)

    return call


def test_aggregates():
    names = ("mean", "min", "prod", "last")
    scores = [aggregate([0.9, 0.2, 0.5], how) for how in names]
    assert scores == pytest.approx([1.6 / 3, 0.2, 0.09, 0.5])
    assert [aggregate([], how) for how in names] == [0, 0, 0, 0]


@pytest.mark.process
def test_the_default_judge_scores_right_steps_higher_and_the_control_does_not():
    solutions = [
        (problem.prompt, steps)
        for problem in itertools.islice(read_records(TEST_PROBLEMS, Problem), 20)
        for steps in (problem.steps, ["Step 1: 1 + 1 = 3", *problem.steps[1:]])
    ]
    firsts = {}
    for name in ("gguf", "llamacpp", "shuffled", "exact"):
        threads = 1 if name in ("gguf", "llamacpp") else None
        with open_judge(JudgeArgs(judge=name, threads=threads)) as judge:
            firsts[name] = [scores[0] for scores in judge.score_steps(solutions)]
    right = {
        name: sum(a > b for a, b in zip(scores[::2], scores[1::2], strict=True))
        for name, scores in firsts.items()
    }
    assert right["exact"] == 20 and right["shuffled"] <= 16
    assert right["gguf"] >= 18 and right["llamacpp"] >= 18
    # permuted over all steps, not only over the first ones
    assert sorted(firsts["shuffled"]) != sorted(firsts["gguf"])


def test_the_exact_judge_knows_the_embedded_world():
    train = next(problems("train"))
    with open_judge(JudgeArgs(judge="exact")) as judge:
        assert judge.score_steps([(train.prompt, train.steps)]) == [[1.0] * len(train.steps)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"judge_path": "none.gguf"}, "none.gguf not found"),
        ({"judge_path": "."}, "is a folder, expected a file"),
        ({"judge": "hf", "judge_path": "."}, "no config.json"),
        ({"judge": "hf", "judge_path": "none/none.gguf"}, "none.gguf not found"),
        ({"judge": "llamacpp", "judge_path": "none.gguf"}, "none.gguf not found"),
        (
            {"judge": "prm", "judge_path": "saved_model/none"},
            "directory saved_model/none not found",
        ),
        ({"judge": "prm", "judge_template": "plain"}, "--judge_template: --judge prm does not use"),
        ({"judge": "openai"}, "--judge_model: --judge openai needs the name"),
        ({"judge": "openai", "judge_model": "m"}, "--judge_base_url: --judge openai needs the URL"),
        ({"judge_requests": 2}, "--judge_requests: --judge gguf does not use it"),
        ({"judge": "human"}, "--judge_labels: --judge human needs"),
        ({"judge": "human", "judge_labels": "none.jsonl"}, "none.jsonl not found"),
        ({"judge": "exact", "judge_problems": "none.jsonl"}, "none.jsonl not found"),
        ({"judge": "exact", "judge_path": "x.gguf"}, "--judge_path: --judge exact does not use it"),
        ({"judge_labels": "labels.jsonl"}, "--judge_labels: --judge gguf does not use it"),
        ({"shuffled_judge": "exact"}, "--shuffled_judge: --judge gguf does not use it"),
        ({"judge": "shuffled", "shuffled_judge": "human"}, "--judge_labels: --judge human needs"),
    ],
)
def test_a_mistake_in_the_arguments_is_found_before_the_judge_is_opened(
    tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        check_judge(JudgeArgs(**arguments))
    assert "\n" not in str(error.value)


def test_good_arguments_pass(tiny_gguf, tiny_model_dir):
    url = {"judge_base_url": "http://127.0.0.1:1/v1", "judge_model": "m"}
    good = {
        "gguf": ({"judge_path": tiny_gguf, "threads": 1}, "tiny.F32"),
        "llamacpp": ({"judge_path": tiny_gguf, "threads": 1}, "llamacpp-tiny.F32"),
        "hf": ({"judge_path": tiny_model_dir}, "hf-tiny-model"),
        "prm": ({"judge_path": tiny_model_dir}, "prm-tiny-model"),
        "response": ({"judge_path": tiny_model_dir}, "response-tiny-model"),
        "openai": (url, "openai-m"),
        "exact": ({}, "exact"),
        "outcome": ({}, "outcome"),
        "shuffled": ({"shuffled_judge": "openai"} | url, "shuffled-openai-m"),
        "random": ({"seed": 3}, "random-3"),
        "human": ({"judge_labels": TEST_PROBLEMS}, "human-problems_test"),
    }
    assert good.keys() == {*JUDGES, SHUFFLED}
    for judge, (arguments, name) in good.items():
        args = JudgeArgs(judge=judge, **arguments)
        check_judge(args)
        assert judge_name(args) == name


def test_identity_is_what_changes_the_scores(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    files = {"config.json": "{}", "model.safetensors": "weights", "README.md": "a card"}
    for name, text in files.items():
        (model / name).write_text(text)

    def identity(**changes):
        return judge_identity(JudgeArgs(**{"judge": "hf", "judge_path": str(model)} | changes))

    before = identity()
    (model / "README.md").write_text("another")
    assert identity() == identity(threads=3) == before
    shuffled = {"judge": "shuffled", "shuffled_judge": "hf"}
    assert identity(**shuffled, seed=1) != identity(**shuffled, seed=2)
    for change in ({"judge": "gguf"}, {"judge_template": "zephyr"}, {"judge_path": "org/model"}):
        assert identity(**change) != before
    (model / "model.safetensors").write_text("WEIGHTS")
    assert identity() != before
    assert content_hash("org/no-such-folder") is None
    json.dumps(before)


def test_score_all_gives_every_solution_once_and_in_order():
    calls = []
    judge = FixedJudge(lambda prompt, step, previous: int(prompt) / 1000)
    score_steps = judge.score_steps
    judge.score_steps = lambda solutions: calls.append(len(solutions)) or score_steps(solutions)
    scores = score_all(judge, [(str(k), ["x"]) for k in range(CHUNK + 5)], "scores")
    assert scores == [[k / 1000] for k in range(CHUNK + 5)]
    assert calls == [CHUNK, 5]


# --- people's labels


def labels_file(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps({"prompt": "p", **row}) + "\n" for row in rows))
    return path


def test_labels_of_several_people_are_averaged(tmp_path):
    path = labels_file(
        tmp_path / "labels.jsonl",
        {"steps": ["a", "b", "c"], "labels": [1, 1, None], "labeler": "anna"},
        {"steps": ["a", "b", "c"], "labels": [1, 0, 0], "labeler": "ben"},
        {"steps": ["a", "x", "c"], "labels": [None, 0, None]},
    )
    with open_judge(JudgeArgs(judge="human", judge_labels=str(path))) as judge:
        solutions = [
            ("p", ["a", "b", "c"]),
            ("p", ["a", "b"]),
            ("p", ["a", "x"]),
            ("p", ["a", "x", "c"]),
            ("q", ["a"]),
            ("p", []),
        ]
        assert judge.score_steps(solutions) == [[1, 0.5, 0], [1, 0.5], [1, 0], None, None, []]
        assert judge.score_steps(solutions[:2], skip=[2, 1]) == [[0], [0.5]]
    assert str(judge).endswith("labels of 4 steps")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"steps": ["a"], "labels": [1, 0]}, "field 'labels': expected one"),
        ({"steps": ["a"], "labels": [2]}, "field 'labels', item 1"),
        ({"steps": ["a"], "labels": [True]}, "field 'labels', item 1"),
        ({"steps": ["a"]}, "field 'labels' is missing"),
        ({"steps": [], "labels": []}, "field 'steps': expected at least one step"),
    ],
)
def test_a_bad_row_of_labels_names_file_line_and_field(tmp_path, row, message):
    path = labels_file(tmp_path / "labels.jsonl", {"steps": ["a"], "labels": [1]}, row)
    with pytest.raises(RecordError) as error:
        HumanJudge(path)
    assert str(error.value).startswith(f"{path}:2: {message}")


def test_evaluate_steps_by_people_and_by_the_checker(evaluate, tmp_path):
    """The same pairs with labels of the first pair only, then with the exact scores of all."""
    first = next(read_records(TEST_PROBLEMS, Problem))
    second = Problem("Mia has 2 cups.", "2", ["Answer: 2"])
    pairs = [
        {"prompt": problem.prompt, "chosen": problem.steps, "rejected": ["Answer: 1"]}
        for problem in (first, second)
    ]
    write_records(tmp_path / "pairs.jsonl", pairs)
    write_records(tmp_path / "problems.jsonl", [second])
    right = {"prompt": first.prompt, "steps": first.steps, "labels": [1] * len(first.steps)}
    wrong = {"prompt": first.prompt, "steps": ["Answer: 1"], "labels": [0]}
    write_records(tmp_path / "labels.jsonl", [right, wrong])
    labels_file(tmp_path / "others.jsonl", {"steps": ["a"], "labels": [1]})

    def script(*arguments):
        files = ("--input", "pairs.jsonl", "--output", "out/rewarded.jsonl", "--overwrite")
        return evaluate(*files, *arguments)

    code, stdout, stderr = script("--judge", "human", "--judge_labels", "labels.jsonl")
    assert code == 0, stderr
    assert "left out          1 (not labelled step by step by anyone)" in stdout
    rows = [row for _, row in read_rows(tmp_path / "out/rewarded.jsonl")]
    assert [(set(row["chosen_scores"]), row["rejected_scores"]) for row in rows] == [({1}, [0])]
    code, _, stderr = script("--judge", "human", "--judge_labels", "others.jsonl")
    assert code == 2
    assert "no pair was scored, all 2 are not labelled" in stderr.splitlines()[-1]
    code, _, stderr = script("--judge", "exact", "--judge_problems", "problems.jsonl")
    assert code == 2 and "no reference for the problem" in stderr.splitlines()[-1]


def test_kappa_is_agreement_beyond_chance():
    labels, scores = [1] * 25 + [0] * 25, [0.9] * 20 + [0.1] * 5 + [0.9] * 10 + [0.2] * 15
    metric = kappa_metric(labels, scores, [k % 10 for k in range(50)])
    assert metric.value == pytest.approx(0.4) and metric.n == 50  # (0.7 - 0.5) / (1 - 0.5), by hand
    assert metric.value == pytest.approx(
        cohen_kappa_score(labels, [score >= 0.5 for score in scores])
    )
    assert metric.ci95[0] < 0.4 < metric.ci95[1] < 1
    assert kappa_metric(labels, labels, range(50)).value == 1
    assert kappa_metric([1, 1], [0.9, 0.8], [0, 1]) is None
    assert kappa_metric([1, 1], [0.1, 0.2], [0, 1]).value == 0


# --- a server that fails


def test_a_server_that_fails_loses_no_scored_row_and_is_asked_nothing_twice(evaluate, tmp_path):
    # 3 questions for each pair, 32 pairs in a chunk
    pairs = [{"prompt": f"p {k}", "chosen": ["a", "b"], "rejected": ["c"]} for k in range(40)]
    write_records(tmp_path / "pairs.jsonl", pairs)
    with Server() as server:

        def script(output, allowed, cache="answers.jsonl"):
            """The server answers `allowed` requests, then refuses the key."""

            def answer(number, body):
                if number >= allowed:
                    return error(401, "invalid key")
                digest = hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()
                yes = 0.1 + 0.8 * (int(digest, 16) % 100) / 100
                return chat("Yes", {"Yes": yes, "No": 1 - yes})

            server.requests.clear()
            server.answer = answer
            judge = ("--judge", "openai", "--judge_base_url", server.url, "--judge_model", "m")
            options = ("--judge_cache", cache, "--judge_requests", 2)
            return evaluate("--input", "pairs.jsonl", "--output", output, *judge, *options)

        code, _, stderr = script("rewarded.jsonl", 0)
        assert code == 2 and stderr.count("\n") == 1 and "OPENAI_API_KEY" in stderr
        # the failure is found before any row is begun
        assert {path.name for path in tmp_path.iterdir()} <= {"pairs.jsonl", "answers.jsonl"}
        code, _, stderr = script("rewarded.jsonl", 110)
        assert code == 2 and "OPENAI_API_KEY" in stderr.splitlines()[-1]
        code, stdout, stderr = script("rewarded.jsonl", 1000)
        assert code == 0 and "resuming after 32 of 40 pairs" in stdout, stderr
        # one question more, to try the server
        assert len(server.requests) == 3 * 40 + 1 - 110
        assert script("whole.jsonl", 1000, "other.jsonl")[0] == 0
    assert (tmp_path / "rewarded.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
