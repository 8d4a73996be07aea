"""The flag --judge: what each judge needs, what identifies it, the human judge and how its agreement is measured."""

import hashlib
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from sklearn.metrics import cohen_kappa_score

from common.errors import RecordError, UserError
from common.files import ROOT, content_hash, read_records
from evaluation.metrics import kappa_metric
from reasoning.problems import problems
from reasoning.records import Problem
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

TEST_PROBLEMS = str(ROOT / "data/problems_test.jsonl")


def test_aggregates():
    assert [
        aggregate([0.9, 0.2, 0.5], how) for how in ("mean", "min", "prod", "last")
    ] == pytest.approx([1.6 / 3, 0.2, 0.09, 0.5])
    assert [aggregate([], how) for how in ("mean", "min", "prod", "last")] == [0, 0, 0, 0]


def test_the_default_judge_tells_right_from_wrong_and_the_control_does_not():
    told = [
        problem for problem, _ in zip(read_records(TEST_PROBLEMS, Problem), range(20), strict=False)
    ]
    solutions = [
        (problem.prompt, steps)
        for problem in told
        for steps in (problem.steps, ["Step 1: 1 + 1 = 3", *problem.steps[1:]])
    ]
    firsts = {}
    for name in ("gguf", "shuffled", "exact"):
        with open_judge(JudgeArgs(judge=name, threads=1 if name == "gguf" else None)) as judge:
            firsts[name] = [scores[0] for scores in judge.score_steps(solutions)]
    right = {
        name: sum(a > b for a, b in zip(scores[::2], scores[1::2], strict=True))
        for name, scores in firsts.items()
    }
    assert right["exact"] == 20 and right["gguf"] >= 18 and right["shuffled"] <= 16
    assert sorted(firsts["shuffled"]) != sorted(firsts["gguf"]), (
        "permuted over all steps, not over the first ones"
    )


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
        (
            {"judge": "prm", "judge_path": "saved_model/none"},
            "model directory saved_model/none not found",
        ),
        (
            {"judge": "prm", "judge_template": "plain"},
            "--judge_template: --judge prm does not use it",
        ),
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
        "gguf": {"judge_path": tiny_gguf, "threads": 1}, "hf": {"judge_path": tiny_model_dir},
        "prm": {"judge_path": tiny_model_dir}, "response": {"judge_path": tiny_model_dir}, "openai": url, "exact": {},
        "shuffled": {"shuffled_judge": "openai"} | url, "random": {"seed": 3}, "human": {"judge_labels": TEST_PROBLEMS},
    }  # fmt: skip
    assert good.keys() == {*JUDGES, SHUFFLED}
    names = []
    for judge, arguments in good.items():
        check_judge(JudgeArgs(judge=judge, **arguments))
        names.append(judge_name(JudgeArgs(judge=judge, **arguments)))
    called = [
        "tiny.F32",
        "hf-tiny-model",
        "prm-tiny-model",
        "response-tiny-model",
        "openai-m",
        "exact",
        "shuffled-openai-m",
    ]
    assert names == [*called, "random-3", "human-problems_test"]


def test_identity_is_what_changes_the_scores(tmp_path):
    (tmp_path / "model").mkdir()
    for name, text in (
        ("config.json", "{}"),
        ("model.safetensors", "weights"),
        ("README.md", "a card"),
    ):
        (tmp_path / "model" / name).write_text(text)

    def identity(**changes):
        return judge_identity(
            JudgeArgs(**{"judge": "hf", "judge_path": str(tmp_path / "model")} | changes)
        )

    before = identity()
    (tmp_path / "model/README.md").write_text("another")
    assert identity() == identity(threads=3) == before
    assert identity(judge="shuffled", shuffled_judge="hf", seed=1) != identity(
        judge="shuffled", shuffled_judge="hf", seed=2
    )
    assert before not in (
        identity(judge="gguf"),
        identity(judge_template="zephyr"),
        identity(judge_path="org/model"),
    )
    (tmp_path / "model/model.safetensors").write_text("WEIGHTS")
    assert identity() != before
    assert content_hash("org/no-such-folder") is None
    json.dumps(before)


def test_score_all_gives_every_solution_once_and_in_order():
    calls = []
    judge = FixedJudge(lambda prompt, step, previous: int(prompt) / 1000)
    score_steps = judge.score_steps
    judge.score_steps = lambda solutions: calls.append(len(solutions)) or score_steps(solutions)
    assert score_all(judge, [(str(k), ["x"]) for k in range(CHUNK + 5)], "scores") == [
        [k / 1000] for k in range(CHUNK + 5)
    ]
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


def test_scripts_judge_by_people_and_by_the_checker(run_script, tmp_path):
    """evaluate_steps.py on the same pairs: labels of the first pair only, then the exact scores of all."""
    told = [
        next(read_records(TEST_PROBLEMS, Problem)),
        Problem("Mia has 2 cups.", "2", ["Answer: 2"]),
    ]
    pairs = [
        {"prompt": problem.prompt, "chosen": problem.steps, "rejected": ["Answer: 1"]}
        for problem in told
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "problems.jsonl").write_text(json.dumps(vars(told[1])) + "\n")
    first = {
        "prompt": pairs[0]["prompt"],
        "steps": pairs[0]["chosen"],
        "labels": [1] * len(pairs[0]["chosen"]),
    }
    labels_file(tmp_path / "labels.jsonl", first, first | {"steps": ["Answer: 1"], "labels": [0]})
    labels_file(tmp_path / "others.jsonl", {"steps": ["a"], "labels": [1]})

    def script(*arguments):
        files = ("--input", "pairs.jsonl", "--output", "out/rewarded.jsonl", "--overwrite")
        return run_script("reward_model/evaluate_steps.py", *files, *arguments)

    done = script("--judge", "human", "--judge_labels", "labels.jsonl")
    assert (
        done.returncode == 0
        and "left out          1 (not labelled step by step by anyone)" in done.stdout
    ), done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out/rewarded.jsonl").read_text().splitlines()]
    assert [(set(row["chosen_scores"]), row["rejected_scores"]) for row in rows] == [({1}, [0])]
    none = script("--judge", "human", "--judge_labels", "others.jsonl")
    assert (
        none.returncode == 2
        and "no pair was scored, all 2 are not labelled" in none.stderr.splitlines()[-1]
    )
    exact = script("--judge", "exact", "--judge_problems", "problems.jsonl")
    assert exact.returncode == 2 and "no reference for the problem" in exact.stderr.splitlines()[-1]


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


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server: answers `allowed` requests from recorded log-probs, then refuses the key."""

    allowed, answered = 0, 0

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        refused = self.server.answered >= self.server.allowed
        self.server.answered += not refused
        yes = (
            0.1
            + 0.8
            * (int(hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest(), 16) % 100)
            / 100
        )
        top = [
            {"token": token, "logprob": math.log(p), "bytes": None}
            for token, p in (("Yes", yes), ("No", 1 - yes))
        ]
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "Yes"},
        }
        choice["logprobs"] = {"content": [top[0] | {"top_logprobs": top}]}
        error = {"error": {"message": "invalid key", "type": "invalid_request_error"}}
        answer = json.dumps(
            error
            if refused
            else {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [choice],
            }
        )
        self.send_response(401 if refused else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *_):
        pass


def test_a_server_that_fails_costs_no_scored_row_and_no_answer_twice(run_script, tmp_path):
    # 3 questions each, 32 pairs a chunk
    pairs = [{"prompt": f"p {k}", "chosen": ["a", "b"], "rejected": ["c"]} for k in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    with Server() as server:
        url = f"http://127.0.0.1:{server.server_port}/v1"

        def script(output, allowed, cache="answers.jsonl"):
            server.allowed, server.answered = allowed, 0
            judge = (
                "--judge",
                "openai",
                "--judge_base_url",
                url,
                "--judge_model",
                "m",
                "--judge_cache",
                cache,
                "--judge_requests",
                2,
            )
            return run_script(
                "reward_model/evaluate_steps.py",
                "--input",
                "pairs.jsonl",
                "--output",
                output,
                *judge,
            )

        refused = script("rewarded.jsonl", 0)
        assert (
            refused.returncode == 2
            and refused.stderr.count("\n") == 1
            and "OPENAI_API_KEY" in refused.stderr
        )
        assert {path.name for path in tmp_path.iterdir()} <= {"pairs.jsonl", "answers.jsonl"}, (
            "found before anything is begun"
        )
        failed = script("rewarded.jsonl", 110)
        assert failed.returncode == 2 and "OPENAI_API_KEY" in failed.stderr.splitlines()[-1]
        resumed = script("rewarded.jsonl", 1000)
        assert resumed.returncode == 0 and "resuming after 32 of 40 pairs" in resumed.stdout, (
            resumed.stderr
        )
        assert server.answered == 3 * 40 + 1 - 110  # one question more, to try the server
        assert script("whole.jsonl", 1000, "other.jsonl").returncode == 0
        server.shutdown()
    assert (tmp_path / "rewarded.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
