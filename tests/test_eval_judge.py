"""The card of a judge: metrics of a small example computed by hand, and runs of the script."""

import json
import math
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import write_records
from evaluation import eval_judge
from evaluation.judge_card import Judged, card, verdict
from evaluation.metrics import Metric
from reasoning.records import LabelledSolution
from tests.helpers.mains import call_main

# prompt, labels, the judge's scores, final answer right, the policy's log-prob
SOLUTIONS = [
    ("A", [1, 1], [0.9, 0.8], True, -0.5),
    ("A", [1, 0], [0.9, 0.3], False, -0.1),
    ("B", [0, 0], [0.7, 0.2], False, -0.3),
    ("B", [1, 0], [0.6, 0.55], False, -0.2),
    ("C", [1, 1], [0.4, 0.9], True, -1.0),
    ("C", [0], [0.1], False, -2.0),
]
BY_HAND = {
    "step_auroc": 27 / 30,  # right .9 .8 .9 .6 .4 .9 against wrong .3 .7 .2 .55 .1
    "decision_accuracy": 8 / 11,
    "kappa": 26 / 59,  # 8/11 agree, (7 * 6 + 4 * 5) / 121 by chance
    "processbench_error_accuracy": 2 / 4,
    "processbench_correct_accuracy": 1 / 2,
    "processbench_f1": 1 / 2,
    "brier": (2 * 0.01 + 0.04 + 0.09 + 0.49 + 0.04 + 0.16 + 0.55**2 + 0.36 + 0.01 + 0.01) / 11,
    "right_step_score/1": (0.9 + 0.9 + 0.6 + 0.4) / 4,
    "right_step_score/2": (0.8 + 0.9) / 2,
    "wrong_step_score/1": (0.7 + 0.1) / 2,
    "wrong_step_score/2": (0.3 + 0.2 + 0.55) / 3,
    "answer_auroc/mean": 1,  # .85 and .65 against .6 .45 .575 .1
    "answer_auroc/min": 7 / 8,  # .8 and .4 against .3 .2 .55 .1
    "answer_auroc/prod": 1,
    "answer_auroc/last": 1,
    "best_of_n/chance": 1 / 3,
    "best_of_n/oracle": 2 / 3,
    "best_of_n/min": 2 / 3,
    "best_of_n_over_chance/min": 1 / 3,
    "best_of_n_below_oracle/min": 0,
}
WITH_LOGPS = {
    "answer_auroc/log-prob": 2 / 8,
    "best_of_n/log-prob": 1 / 3,
    "best_of_n_over_log-prob/min": 1 / 3,
}


def judged(solutions=SOLUTIONS) -> list[Judged]:
    return [
        Judged(
            LabelledSolution(prompt, [f"step {k}" for k in range(len(labels))], labels, correct),
            scores,
            logp,
        )
        for prompt, labels, scores, correct, logp in solutions
    ]


def test_the_card_by_hand():
    found = card(judged(), seed=0)
    metrics = found.metrics
    for name, value in (BY_HAND | WITH_LOGPS).items():
        metric = metrics[name]
        assert metric.value == pytest.approx(value), name
        if metric.n > 1 and name != "right_step_score/2":  # that one is of two problems
            assert metric.ci95[0] <= metric.value <= metric.ci95[1], name
    assert (
        metrics["step_auroc"].n,
        metrics["processbench_f1"].n,
        metrics["answer_auroc/min"].n,
    ) == (11, 6, 6)
    assert metrics["best_of_n/min"].n == metrics["best_of_n_over_chance/min"].n == 3
    assert found.notes == []
    assert [row[0] for row in found.by_position] == ["1", "2"]


def test_late_positions_are_pooled():
    row = ("A", [1] * 12, [k / 100 for k in range(12)], None, None)
    found = card(judged([row]), seed=0)
    assert [name for name, _, _ in found.by_position] == [*map(str, range(1, 10)), "10+"]
    assert found.metrics["right_step_score/10+"].value == pytest.approx((0.09 + 0.10 + 0.11) / 3)


@pytest.mark.parametrize(
    ("solutions", "absent", "note"),
    [
        (
            [("A", [1], [0.9], True, None)],
            {"step_auroc", "kappa", "processbench_f1"},
            "no solution with an error",
        ),
        (
            [("A", [0], [0.9], False, None)],
            {"step_auroc", "processbench_f1"},
            "no solution without an error",
        ),
        (
            [("A", [1, None, 0], [0.9, 0.9, 0.1], None, None)],
            {"processbench_f1"},
            "their first error unknown",
        ),
        (
            [("A", [1, 0.5, 0], [0.9, 0.9, 0.1], None, None)],
            {"answer_auroc/min"},
            "1 steps are not used: their label is between 0 and 1",
        ),
        (
            [("A", [1], [0.9], None, None), ("A", [0], [0.1], None, None)],
            {"best_of_n/min"},
            "nothing says which final answers",
        ),
        (
            [("A", [1], [0.9], True, None), ("B", [0], [0.1], False, None)],
            {"best_of_n/min"},
            "no problem has two",
        ),
        (
            [("A", [1], [0.9], True, None), ("A", [1], [0.1], True, None)],
            {"answer_auroc/min"},
            "all answers are right",
        ),
    ],
)
def test_undefined_metrics_are_left_out_with_a_note(solutions, absent, note):
    found = card(judged(solutions), seed=0)
    assert not absent & set(found.metrics)
    assert any(note in line for line in found.notes), found.notes
    for metric in found.metrics.values():
        assert all(math.isfinite(value) for value in [metric.value, *(metric.ci95 or [])])


def test_a_sample_without_steps_is_wrong_and_never_picked():
    empty = [
        ("A", [], [], False, eval_judge.NEVER),
        ("A", [1], [0.2], True, -3.0),
        ("B", [0], [0.1], False, -1.0),
    ]
    metrics = card(judged(empty), seed=0).metrics
    assert metrics["best_of_n/min"].value == metrics["best_of_n/log-prob"].value == 1
    assert metrics["processbench_f1"].n == 2
    with pytest.raises(UserError, match="no step to judge"):
        card(judged(empty[:1]), seed=0)


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys):
    """Run main: (exit code, stdout, stderr). DIR in an argument means the folder of the test."""

    def evaluate(*args: object) -> tuple[int, str, str]:
        args = ("--output_dir", "DIR/results", *args)
        given = [str(arg).replace("DIR", str(tmp_path)) for arg in args]
        return call_main(eval_judge.main, *given, monkeypatch=monkeypatch, capsys=capsys)

    return evaluate


def labelled(folder: Path, name: str, column: int, skip: int = 0) -> Path:
    """The solutions of the example with one of its columns as labels; all steps are different."""
    rows = [
        {
            "prompt": f"Problem {row[0]}",
            "steps": [f"{k}: step {j}" for j in range(len(row[1]))],
            "labels": row[column],
        }
        | ({"final_correct": row[3]} if column == 1 else {})
        for k, row in enumerate(SOLUTIONS)
    ]
    rows.insert(0, {"prompt": "Problem nobody read", "steps": ["?"], "labels": [1]})
    write_records(folder / name, rows[skip:])
    return folder / name


@pytest.mark.process
def test_any_judge_on_any_labels(evaluate, tmp_path):
    """The scores of the example come from a human judge, the labels from a compressed file."""
    truth, scores = labelled(tmp_path, "1.jsonl.gz", 1), labelled(tmp_path, "2.jsonl", 2, skip=1)
    code, out, err = evaluate("--judge", "human", "--judge_labels", scores, "--labels", truth)
    assert code == 0, err
    result = json.loads((tmp_path / "results" / "judge_human-2_on_1.json").read_text())
    for name, value in BY_HAND.items():
        assert result["metrics"][name]["value"] == pytest.approx(value), name
    assert not set(WITH_LOGPS) & set(result["metrics"])
    assert (result["judge"], result["left_out"], result["right_steps"]) == (
        "human-2",
        1,
        pytest.approx(6 / 11),
    )
    assert sum(row["right"]["n"] for row in result["reliability"]) == 11
    shown = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in out.splitlines()
        if line.startswith("|")
    ]
    assert ["processbench_f1", *shown_value(result, "processbench_f1"), "6"] in shown
    (row,) = [row for row in shown if row[0] == "min"]
    names = ("answer_auroc", "best_of_n", "best_of_n_over_chance", "best_of_n_below_oracle")
    assert row[1:] == [text for name in names for text in shown_value(result, f"{name}/min")]
    assert "1 of 7 solutions left out" in out and out.rstrip().endswith("judge_human-2_on_1.png")
    assert (tmp_path / "results" / "judge_human-2_on_1.png").read_bytes().startswith(b"\x89PNG")


def shown_value(result: dict, name: str) -> list[str]:
    metric = result["metrics"][name]
    return [f"{metric['value']:.3f} [{metric['ci95'][0]:.3f}, {metric['ci95'][1]:.3f}]"]


@pytest.mark.parametrize(
    "ci95, words",
    [
        ([0.72, 0.80], "better than chance, with a step AUROC of at least 0.720"),
        ([0.50, 0.61], "not shown to be better than chance"),
        ([0.45, 0.56], "not shown to be better than chance"),
        ([0.31, 0.42], "worse than chance"),
        (None, "open"),
    ],
)
def test_the_verdict_says_whether_to_train_on_the_scores(ci95, words):
    assert verdict(Metric(0.5, ci95, 40)).startswith(f"verdict: {words}")


@pytest.mark.process
def test_the_exact_judge_has_the_best_metrics(evaluate, tmp_path, tiny_model_dir):
    """Samples of the embedded policy, exact scores; ranks a random policy and this policy twice."""
    policies = ["--policies", tiny_model_dir, *[eval_judge.CardArgs.model_name_or_path] * 2]
    more = ["--limit", 6, "--samples", 3, "--rollouts", 4, "--max_new_tokens", 80]
    code, out, err = evaluate("--judge", "exact", *policies, *more)
    assert code == 0, err
    result = json.loads((tmp_path / "results" / "judge_exact.json").read_text())
    values = {name: metric["value"] for name, metric in result["metrics"].items()}
    for name in ("step_auroc", "decision_accuracy", "kappa", "processbench_f1", "policy_spearman"):
        assert values[name] == 1, name
    assert values["calibration_error"] == values["brier"] == 0
    assert result["verdict"] in out and "better than chance" in result["verdict"]
    assert values["best_of_n/chance"] < values["best_of_n/last"] <= values["best_of_n/oracle"]
    assert values["best_of_n_over_log-prob/last"] == pytest.approx(
        values["best_of_n/last"] - values["best_of_n/log-prob"]
    )
    assert [(row["reward_rank"], row["accuracy_rank"]) for row in result["policies"]] == [
        (3, 3),
        (1, 1),
        (1, 1),
    ]
    assert (
        result["policies"][0]["accuracy"]["value"] == 0 < result["policies"][1]["accuracy"]["value"]
    )
    assert "Spearman 1.000" in out and "prefixes, 4 rollouts each" in out
    assert (
        values["prefix_auroc/judge"]
        == 1
        > values["prefix_auroc/4 rollouts"]
        >= values["prefix_auroc/1 rollouts"]
        > 0.5
    )
    assert values["rollouts_equivalent"] == 4 and values["step_auroc_over_log-prob"] > 0
    rows, n = result["value_reliability"], result["metrics"]["value_calibration_error"]["n"]
    gaps = [abs(row["score"] - row["right"]["value"]) * row["right"]["n"] / n for row in rows]
    assert (
        values["value_calibration_error"] == pytest.approx(sum(gaps))
        and sum(row["right"]["n"] for row in rows) == n
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--policies", "a", "b"], "--policies: expected 3 or more models to rank, got 2"),
        (["--policies", "none", "none", "none"], "model directory none not found"),
        (["--labels", "DIR/1.jsonl", "--samples", 2], "--samples: --labels does not use it"),
        (
            ["--labels", "DIR/1.jsonl", "--policies", "a", "b", "c"],
            "--policies: --labels does not use it",
        ),
        (["--labels", "DIR/none.jsonl"], "none.jsonl not found"),
        (["--labels", "DIR/problems.jsonl"], "no step_labels"),
        (
            ["--labels", "DIR/soft.jsonl"],
            "none of 1 solutions has a step that is labelled right or wrong",
        ),
        (
            ["--labels", "DIR/1.jsonl", "--judge", "human", "--judge_labels", "DIR/strange.jsonl"],
            "each of the 7 solutions is not labelled",
        ),
        (["--labels_split", "test"], "--labels_split"),
        (["--judge", "oracle"], "--judge"),
        (["--judge_path", "DIR/none.gguf"], "none.gguf not found"),
        (["--limit", 0], "--limit: expected 1 or more"),
        (["--samples", 0], "--samples: expected 1 or more"),
        (["--output_dir", "DIR/1.jsonl/results"], "cannot be written"),
        (["--input", "DIR/bare.jsonl"], "without reference steps"),
    ],
)
def test_bad_input_is_one_line(evaluate, tmp_path, args, message):
    labelled(tmp_path, "1.jsonl", 1)
    problem = {"prompt": "Mia has 2 cups.", "answer": "2"}
    write_records(tmp_path / "problems.jsonl", [problem | {"steps": ["Answer: 2"]}])
    write_records(tmp_path / "bare.jsonl", [problem])
    write_records(tmp_path / "soft.jsonl", [{"prompt": "Mia", "steps": ["a"], "labels": [0.5]}])
    write_records(tmp_path / "strange.jsonl", [{"prompt": "Mia", "steps": ["a"], "labels": [1]}])
    before = sorted(path.name for path in tmp_path.rglob("*"))
    code, _, err = evaluate(*args)
    # but for a progress bar
    (line,) = [line for line in err.splitlines() if line.strip() and "scores:" not in line]
    assert code == 2 and message in line
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
