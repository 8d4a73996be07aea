"""evaluation/eval_credit.py: the kind of every step, and the whole script on two models."""

import itertools
import json
import shutil

import pytest

from common.files import at_root, write_records
from evaluation import eval_credit
from evaluation.eval_credit import KINDS, kinds_of
from reasoning.problems import problems
from reasoning.records import PreferencePair, Problem
from reasoning.splits import is_kept_out
from tests.helpers.mains import call_main

PROBLEM = Problem(
    "Mia has 12 apples. ...",
    "13",
    [
        "Step 1: 3 * 4 = 12, 12 + 12 = 24",
        "Step 2: 24 + 5 = 29",
        "Step 3: 29 - 16 = 13",
        "Answer: 13",
    ],
    [True, False, True, False],
)


def test_kinds_of_steps():
    wrong = ["Step 2: 24 + 5 = 29", "Step 3: 29 - 16 = 23", "Answer: 23"]
    pair = PreferencePair(PROBLEM.prompt, PROBLEM.steps[1:], wrong, prefix=PROBLEM.steps[:1])
    assert kinds_of(pair, PROBLEM, "chosen") == [
        "chosen_elsewhere",
        "chosen_trap",
        "chosen_elsewhere",
    ]
    assert kinds_of(pair, PROBLEM, "rejected") == [
        "rejected_right",
        "rejected_error_trap",
        "rejected_after",
    ]
    slip = PreferencePair(
        PROBLEM.prompt,
        PROBLEM.steps,
        [PROBLEM.steps[0], "Step 2: 24 + 5 = 30", "Step 3: 30 - 16 = 14"],
    )
    assert kinds_of(slip, PROBLEM, "rejected") == [
        "rejected_right",
        "rejected_error_elsewhere",
        "rejected_after",
    ]


@pytest.fixture
def pairs(tmp_path):
    train = itertools.islice(problems("train"), 100)
    rows = [
        PreferencePair(p.prompt, p.steps, [p.steps[0].rpartition("=")[0] + "= 999", "Answer: 999"])
        for p in train
        if is_kept_out(p.prompt)
    ]
    assert len(rows) > 5
    write_records(tmp_path / "pairs.jsonl", rows)
    return tmp_path / "pairs.jsonl"


@pytest.mark.process
def test_the_script(run_script, tiny_model_dir, pairs, tmp_path):
    """The base and a copy of it have the same log-probs; another model has others."""
    shutil.copytree(at_root("models/policy-mini"), tmp_path / "same")
    args = ["--models", tmp_path / "same", tiny_model_dir, "--pairs", pairs, "--limit", 12]
    done = run_script("evaluation/eval_credit.py", *args, "--output_dir", tmp_path / "results")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "results/credit.json").read_text())["metrics"]
    changes = {
        name: metric["value"]
        for name, metric in metrics.items()
        if name.startswith("same/logp_change/")
    }
    assert set(changes) <= {f"same/logp_change/{kind}" for kind in KINDS} and len(changes) >= 4
    assert all(abs(value) < 1e-4 for value in changes.values())
    assert metrics["tiny-model/logp_change/chosen_elsewhere"]["value"] < -1
    for place, least in (("elsewhere", 0.9), ("trap", 0.0)):
        base, same = (metrics[f"{name}/next_step_accuracy/{place}"] for name in ("base", "same"))
        assert base == same and base["value"] >= least
    assert (tmp_path / "results/credit.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--models: name one tuned model or more"),
        (["--models", "nowhere"], "model directory nowhere not found"),
        (["--models", "a/x", "b/x"], "two have the same last part"),
        (["--models", "MODEL", "--input", "none.jsonl"], "none.jsonl not found"),
        (["--models", "MODEL", "--pairs", "FOREIGN"], "none of its pairs was kept out"),
    ],
)
def test_bad_input_is_one_line(tiny_model_dir, tmp_path, monkeypatch, capsys, args, message):
    foreign = tmp_path / "foreign.jsonl"
    write_records(foreign, [PreferencePair("How many?", ["Answer: 1"], ["Answer: 2"])])
    given = [{"MODEL": tiny_model_dir, "FOREIGN": foreign}.get(arg, arg) for arg in args]
    code, _, err = call_main(eval_credit.main, *given, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and message in err and len(err.splitlines()) == 1
