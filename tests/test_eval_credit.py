"""evaluation/eval_credit.py: which kind every step is, and the whole script on two models."""

import json

import pytest

from common.files import write_records
from evaluation.eval_credit import KINDS, kinds_of
from reasoning.problems import problems
from reasoning.records import PreferencePair, Problem
from reasoning.splits import is_kept_out

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
    kept = [
        problem
        for problem in (p for p, _ in zip(problems("train"), range(200), strict=False))
        if is_kept_out(problem.prompt)
    ]
    rows = [
        PreferencePair(p.prompt, p.steps, [p.steps[0].rpartition("=")[0] + "= 999", "Answer: 999"])
        for p in kept
    ]
    assert len(rows) > 5
    write_records(tmp_path / "pairs.jsonl", rows)
    return tmp_path / "pairs.jsonl"


def test_the_script(run_script, tiny_model_dir, pairs, tmp_path):
    """The base against itself does not move; another model does. (The base here is the miniature's own directory.)"""
    import shutil

    from evaluation.eval_credit import at_root

    base = at_root("models/policy-mini")
    shutil.copytree(base, tmp_path / "same")
    args = [
        "--models",
        tmp_path / "same",
        tiny_model_dir,
        "--pairs",
        pairs,
        "--limit",
        20,
        "--output_dir",
        tmp_path / "results",
    ]
    done = run_script("evaluation/eval_credit.py", *args)
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
    for place, sound in (("elsewhere", 0.9), ("trap", 0.0)):
        assert (
            metrics[f"base/next_step_accuracy/{place}"]
            == metrics[f"same/next_step_accuracy/{place}"]
        )
        assert metrics[f"base/next_step_accuracy/{place}"]["value"] >= sound
    assert (tmp_path / "plots/credit.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--models: name one tuned model or more"),
        (["--models", "nowhere"], "model directory nowhere not found"),
        (["--models", "a/x", "b/x"], "two have the same last part"),
        (["--models", "MODEL", "--input", "none.jsonl"], "none.jsonl not found"),
        (["--models", "MODEL", "--pairs", "foreign.jsonl"], "none of its pairs was kept out"),
    ],
)
def test_mistakes_are_one_line(run_script, tiny_model_dir, tmp_path, args, message):
    write_records(
        tmp_path / "foreign.jsonl", [PreferencePair("How many?", ["Answer: 1"], ["Answer: 2"])]
    )
    done = run_script(
        "evaluation/eval_credit.py", *[tiny_model_dir if arg == "MODEL" else arg for arg in args]
    )
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
