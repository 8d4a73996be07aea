"""evaluation/lm_eval_tasks: lm-evaluation-harness gives the figures of this repository."""

import json
import os
import subprocess
import sys

import pytest

from common.files import write_records
from evaluation.accuracy import correct_answers
from evaluation.metrics import processbench_metrics
from lm.policy import Policy
from lm.prompting import is_chat, plain_chat_template
from lm.text_encoding import format_prompt
from reasoning.datasets.loading import load_step_labels, problems_of
from reasoning.grading import grade_steps
from reasoning.records import LabelledSolution
from reward_model.judges.hf import HFJudge
from tests.conftest import ROOT
from tests.helpers.chat_models import CHATML, THINKING, chat_model

pytest.importorskip("lm_eval", reason="requirements-lm-eval.txt is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.process]

TASKS = ROOT / "evaluation/lm_eval_tasks"
POLICY, JUDGE = str(ROOT / "models/policy-mini"), str(ROOT / "models/judge-mini")


def harness(model: str, task: str, metadata: dict | None = None, **options) -> dict:
    """The harness's results of one task, with its samples."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    return simple_evaluate(
        model="hf", model_args={"pretrained": model, "dtype": "float32", **options.pop("args", {})},
        tasks=[task], task_manager=manager, batch_size=32, device="cpu", bootstrap_iters=0,
        **options,
    )  # fmt: skip


def test_the_harness_gives_our_accuracy_to_the_digit(tmp_path):
    """The command of the documentation, without a network, on 150 problems of each set."""
    files = {
        "stepwise_test": "data/problems_test.jsonl",
        "stepwise_hard": "data/problems_hard.jsonl",
        "stepwise_gsm8k": "tests/data/gsm8k.jsonl",
        "stepwise_svamp": "tests/data/svamp.csv",
    }
    own_files = {name: str(ROOT / path) for name, path in list(files.items())[2:]}
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={POLICY},dtype=float32", "--batch_size", "32"]
    command += ["--include_path", str(TASKS), "--tasks", ",".join(files), "--limit", "150"]
    command += ["--metadata", json.dumps(own_files), "--output_path", "out", "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("out/*/results_*.json")
    results = json.loads(written.read_text("utf-8"))["results"]

    policy = Policy.load(POLICY)
    for name, path in files.items():
        problems = problems_of(str(ROOT / path), 150)
        right = correct_answers(policy, problems)
        assert results[name]["accuracy,strict-match"] == sum(right) / len(right)
        assert results[name]["accuracy,flexible-extract"] >= results[name]["accuracy,strict-match"]
        (samples,) = tmp_path.glob(f"out/*/samples_{name}_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
        strict = {row["doc_id"]: row for row in rows if row["filter"] == "strict-match"}
        texts = policy.texts([problem.prompt for problem in problems])
        assert len(strict) == len(problems)
        for k, (text, _) in enumerate(texts):
            assert strict[k]["resps"][0][0].strip() == text
            assert strict[k]["accuracy"] == right[k]
    hard, test = (results[f"stepwise_{name}"]["accuracy,strict-match"] for name in ("hard", "test"))
    assert 0.1 < hard < test < 0.8


def test_processbench_gives_the_f1_of_our_judge(tmp_path):
    """Solutions of policy-mini with exact labels, judged by judge-mini."""
    problems = problems_of(str(ROOT / "data/problems_test.jsonl"), 60)
    answers = Policy.load(POLICY).generate([p.prompt for p in problems], temperature=1.0)
    solutions = [
        LabelledSolution(problem.prompt, answer.steps, grade_steps(answer.steps, problem))
        for problem, (answer,) in zip(problems, answers, strict=True)
    ]
    write_records(tmp_path / "labels.jsonl", solutions)
    metadata = {"stepwise_processbench": str(tmp_path / "labels.jsonl")}
    found = harness(JUDGE, "stepwise_processbench", metadata)["results"]["stepwise_processbench"]

    scores = HFJudge(JUDGE).score_steps([(row.prompt, row.steps) for row in solutions])
    labels = [row.labels for row in solutions]
    ours = processbench_metrics(labels, scores, range(len(scores)))
    assert len(ours) == 3 and 0.5 < ours["processbench_f1"].value < 1
    for name, metric in ours.items():
        assert found[f"{name},none"] == metric.value


@pytest.mark.parametrize(
    "template", [CHATML, THINKING, plain_chat_template()], ids=["chatml", "thinking", "plain"]
)
def test_a_chat_model_is_asked_as_here(tmp_path, tiny_model_dir, template):
    folder = chat_model(tiny_model_dir, tmp_path / "chat", template)
    options = {"apply_chat_template": True, "args": {"enable_thinking": False}}
    found = harness(folder, "stepwise_test", limit=3, gen_kwargs="max_gen_toks=4", **options)
    tokenizer = Policy.load(folder).tokenizer
    for sample in found["samples"]["stepwise_test"]:
        bos = "" if is_chat(tokenizer) else "<s>"
        assert sample["arguments"][0][0] == bos + format_prompt(sample["doc"]["prompt"], tokenizer)

    labels = ROOT / "tests/data/processbench.json"
    metadata = {"stepwise_processbench": str(labels)}
    found = harness(folder, "stepwise_processbench", metadata, **options)
    solutions = list(load_step_labels(str(labels)))
    scores = HFJudge(folder).score_steps([(row.prompt, row.steps) for row in solutions])
    samples = sorted(found["samples"]["stepwise_processbench"], key=lambda row: row["doc_id"])
    for sample, expected in zip(samples, scores, strict=True):
        assert sample["processbench_f1"][1] == pytest.approx(expected, abs=1e-5)
