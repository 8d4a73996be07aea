"""evaluation/eval_search.py: a whole run on a tiny budget, resuming, arithmetic, bad input."""

import json
from itertools import islice
from pathlib import Path

import pytest

from common.files import read_records, write_records
from evaluation import eval_search
from evaluation.search_measurement import (
    Outcomes,
    SearchArgs,
    SearchMeasurements,
    Setting,
    choose,
    setting_groups,
)
from evaluation.search_report import Report, matched_budget, trend
from reasoning.records import Problem
from search.candidates import SearchResult
from tests.helpers.judges import FixedJudge
from tests.helpers.mains import call_main

ROOT = Path(__file__).resolve().parents[1]
POLICY, JUDGE, PRM = (
    str(ROOT / f"models/{name}") for name in ("policy-mini", "judge-mini", "prm-mini")
)


def arguments(folder: Path, **more: object) -> list[str]:
    values = {"judge": "hf", "judge_path": JUDGE, "splits": "hard", "choose_on": "hard_validation"}
    values |= {"limit": 2, "choose_limit": 1, "n": "1 2", "samples": 4, "beams": 2}
    values |= {"aggregates": "min prod", "strategies": "majority_vote best_of_n step_greedy"}
    values |= {"output_dir": folder / "results"} | more
    return [
        part
        for name, value in values.items()
        if value is not None
        for part in (f"--{name}", *str(value).split())
    ]


@pytest.mark.process
def test_a_run_is_reported_and_resumed(run_script, tiny_model_dir, tmp_path):
    """The second run measures only the row of which a kill left one half, and reports the same."""
    given = arguments(tmp_path, judge="prm", judge_path=PRM, other_model=tiny_model_dir)
    first = run_script("evaluation/eval_search.py", *given)
    assert first.returncode == 0, first.stderr
    result = json.loads((tmp_path / "results/search.json").read_text())
    metrics = result["metrics"]
    sizes = {"greedy": [1], "majority_vote": [1, 2, 4], "best_of_n": [1, 2, 4]}
    for strategy, ns in (sizes | {"step_greedy": [1, 2]}).items():
        for n in ns:
            name = f"hard/policy-mini/{strategy}/{n}"
            assert metrics[f"{name}/accuracy"]["n"] == 2
            assert metrics[f"{name}/tokens"]["value"] > 50 * n
            if strategy != "greedy":
                assert f"{name}/accuracy_improvement" in metrics
                assert f"{name}/accuracy_over_tiny-model" in metrics
    one_sample = [
        metrics[f"hard/policy-mini/{s}/1/accuracy"] for s in ("best_of_n", "majority_vote")
    ]
    assert one_sample[0] == one_sample[1]
    chosen = result["chosen"]
    best = chosen["strategy"]
    assert best in ("best_of_n", "step_greedy") and chosen["aggregates"]["majority_vote"] is None
    assert len(chosen["accuracies"]) == 5
    for control in ("random", "agreement"):
        assert f"hard/policy-mini/{best}-{control}/2/accuracy_improvement" in metrics
    assert metrics[f"hard/policy-mini/{best}-agreement/2/judged_steps"]["value"] == 0
    assert "hard/policy-mini/best_of_n/trend" in metrics
    assert (tmp_path / "results/search.png").stat().st_size > 10_000
    assert "| greedy " in first.stdout and "over majority vote" in first.stdout

    path = tmp_path / "results/search.jsonl"
    rows = path.read_text()
    keys = [json.loads(line)["key"] for line in rows.splitlines()]
    assert len(set(keys)) == len(keys)
    last = rows.splitlines()[-1]
    path.write_text(rows[: rows.rindex(last)] + last[: len(last) // 2])
    refused = run_script("evaluation/eval_search.py", *given)
    assert refused.returncode == 2 and "search.png exists: give --overwrite" in refused.stderr
    again = run_script("evaluation/eval_search.py", *given, "--overwrite")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "results/search.json").read_text())["chosen"] == chosen
    repeated = [json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()]
    assert repeated == [json.loads(line) | {"seconds": 0} for line in rows.splitlines()]


@pytest.mark.slow
@pytest.mark.process
def test_smollm2_step_by_step_on_two_problems(smollm2, run_script, tmp_path):
    """A real pretrained model, which guides itself as a judge."""
    models = {
        "model_name_or_path": smollm2,
        "judge_path": smollm2,
        "splits": "test",
        "choose_on": "validation",
    }
    small = {
        "limit": 2,
        "choose_limit": 1,
        "n": 2,
        "samples": 2,
        "aggregates": "min",
        "max_steps": 3,
        "max_new_tokens": 96,
    }
    done = run_script(
        "evaluation/eval_search.py",
        *arguments(tmp_path, **models, **small, strategies="step_greedy"),
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "results/search.json").read_text())["metrics"]
    name = f"test/{Path(smollm2).name}/step_greedy"
    assert metrics[f"{name}/2/accuracy"]["n"] == 2 and metrics[f"{name}/2/tokens"]["value"] > 0
    assert (
        0 < metrics[f"{name}/2/judged_steps"]["value"] <= 6
        and metrics[f"{name}-agreement/2/judged_steps"]["value"] == 0
    )


@pytest.fixture
def args(tmp_path) -> SearchArgs:
    return SearchArgs(
        judge="exact", judge_path=SearchArgs.judge_path, n=[2], samples=2, output_dir=str(tmp_path)
    )


def fake(
    measurements: SearchMeasurements, accuracy: dict[str, float], calls: list | None = None
) -> None:
    """Replace the search: the share of right answers by strategy or strategy/aggregate."""

    def search(settings, chunk, policy):
        if calls is not None:
            calls.append((settings, len(chunk)))
        found = {}
        for setting in settings:
            share = accuracy.get(
                f"{setting.strategy}/{setting.aggregate}", accuracy.get(setting.strategy, 0.0)
            )
            right = [(k % 10) < 10 * share for k in range(len(chunk))]
            found[setting] = [
                SearchResult(p.prompt, [f"Answer: {p.answer if ok else -1}"], tokens=10)
                for p, ok in zip(chunk, right, strict=True)
            ]
        return found

    measurements.searcher._search = search


def test_the_choice_is_the_best_on_validation(args, tmp_path):
    problems = list(islice(read_records(ROOT / "data/problems_hard_validation.jsonl", Problem), 20))
    measurements = SearchMeasurements(args, tmp_path / "rows.jsonl")
    fake(
        measurements,
        {
            "majority_vote": 0.9,
            "beam/prod": 0.8,
            "beam": 0.3,
            "dvts/min": 0.5,
            "best_of_n/last": 0.7,
        },
    )
    choice = choose(args, measurements, {"hard_validation": problems})
    assert choice.strategy == "beam", "the best that a judge guides"
    expected = {"majority_vote": None, "beam": "prod", "dvts": "min", "best_of_n": "last"}
    assert expected.items() <= choice.aggregates.items() and choice.accuracies["beam/prod"] == 0.8
    measurements.close()


def test_a_row_is_used_again_only_if_nothing_it_depends_on_changed(args, tmp_path, monkeypatch):
    problems = list(islice(read_records(ROOT / "data/problems_hard_validation.jsonl", Problem), 60))
    setting, vote = Setting("beam", 2, "min"), Setting("majority_vote", 2)
    calls: list = []

    def measure(setting: Setting, count: int = 60, **changes) -> int:
        """How many problems were searched."""
        values = {field: getattr(args, field) for field in vars(args)} | changes
        measurements = SearchMeasurements(SearchArgs(**values), tmp_path / "rows.jsonl")
        fake(measurements, {"beam": 0.5}, calls)
        calls.clear()
        outcomes = measurements.measure([setting], problems[:count], "hard_validation")[setting]
        assert len(outcomes.correct) == len(outcomes.seconds) == count
        return sum(size for _, size in calls)

    assert measure(setting) == 60 and measure(setting) == 0 and measure(vote) == 60
    assert measure(setting, 50) == 0, "the first chunk is known"
    assert measure(setting, beams=3) == 60 and measure(vote, beams=3) == 0, (
        "a majority vote does not depend on the beams"
    )
    assert (
        measure(setting, seed=1) == 60
        and measure(setting, judge="random") == 60
        and measure(vote, judge="random") == 0
    )
    assert measure(setting, model_name_or_path=JUDGE) == 60 and measure(setting) == 0


def test_pools_are_drawn_once(args):
    groups = setting_groups(args, {name: ["min"] for name in args.strategies}, [1, 2, 4])
    assert [len(group) for group in groups] == [9, 1, 1, 1, 1]
    assert {setting.strategy for setting in groups[0]} == {
        "majority_vote",
        "best_of_n",
        "weighted_vote",
    }


def test_a_pool_costs_what_its_part_costs(args, tmp_path):
    from lm.policy import State

    class Sampler:
        def start(self, prompt):
            return State(prompt, (), ())

        def rollouts(self, states, n, *rest):
            texts = ["Answer: 1", "Answer: 2", "Answer: 2", "Answer: 3"]
            return [
                [
                    State(s.prompt, (), (), ("a", text), "finished", 10 + k)
                    for k, text in enumerate(texts[:n])
                ]
                for s in states
            ]

    measurements = SearchMeasurements(args, tmp_path / "rows.jsonl")
    measurements.searcher._opened |= {
        "own": Sampler(),
        "judge": FixedJudge(lambda prompt, step, before: 0.9 if step == "Answer: 3" else 0.5),
    }
    settings = [
        Setting(name, n, how)
        for name, how in (("majority_vote", None), ("best_of_n", "min"))
        for n in (1, 3, 4)
    ]
    problem = Problem("p", "2")
    outcomes = measurements.measure(settings, [problem], "x")
    assert [outcomes[s].tokens for s in settings] == [[10], [33], [46]] * 2
    assert [outcomes[s].judged for s in settings] == [[0], [0], [0], [2], [4], [6]], (
        "equal solutions are scored once"
    )
    assert [outcomes[s].correct for s in settings] == [[0], [1], [1], [0], [0], [0]]


def test_trend_and_matched_budget():
    rising = {
        n: Outcomes(correct=[1.0] * (10 * k) + [0.0] * (40 - 10 * k))
        for k, n in enumerate((1, 4, 16), 1)
    }
    gain, p = trend(rising, 0)
    assert gain.value == pytest.approx(0.25) and gain.ci95[0] > 0.1 and p < 0.001, (
        "from 10 to 30 of 40 in two fourfold steps"
    )
    level = {n: Outcomes(correct=[1.0, 0.0] * 20) for n in (1, 4, 16)}
    gain, p = trend(level, 0)
    assert gain.value == 0 and p > 0.4
    assert trend({n: rising[n] for n in (1, 16)}, 0)[1] is None
    curve = {n: Outcomes(tokens=[100 * n]) for n in (1, 2, 4, 8)}
    assert [
        matched_budget(curve, Outcomes(tokens=[tokens])) for tokens in (0, 130, 150, 900, 9000)
    ] == [1, 1, 2, 8, 8]


def test_report_compares_the_same_problems(args):
    greedy = Outcomes([1, 0, 0, 0], [10] * 4, [0] * 4, [0] * 4, [0.1] * 4)
    beam = Outcomes([1, 1, 1, 0], [200] * 4, [50] * 4, [0, 2, 0, 1], [0.5] * 4)
    vote = Outcomes([0, 0, 1, 0], [190] * 4, [0] * 4, [0] * 4, [0.2] * 4)
    args.other_model = "models/policy-large"
    report = Report(args, {"beam": "min"})
    report.add("hard", {Setting("beam", 2, "min"): beam}, greedy, vote, {2: vote})
    value = {name: metric.value for name, metric in report.metrics.items()}
    name = "hard/policy-mini/beam/2"
    assert (
        value[f"{name}/accuracy"] == 0.75
        and value[f"{name}/tokens"] == 200
        and value[f"{name}/seconds"] == 0.5
    )
    assert (
        value[f"{name}/accuracy_improvement"] == value[f"{name}/accuracy_over_policy-large"] == 0.5
    )
    assert value[f"{name}/accuracy_over_majority_vote"] == 0.5 and report.matched_n == {name: 2}
    assert report.left_out == {name: 3}
    assert [row[0] for row in report.rows("hard")] == [
        "greedy",
        "policy-large, greedy",
        "beam, min",
    ]
    assert all(len(row) == len(report.columns()) for row in report.rows("hard"))
    assert report.frontier("hard").keys() == {"greedy", "policy-large, greedy", "beam"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": "0 4"}, "--n: expected 1 or more, got 0"),
        ({"beams": 0}, "--beams: expected 1 or more"),
        ({"samples": 1}, "--samples: expected 2 or more"),
        ({"temperature": "nan"}, "--temperature: expected a finite number"),
        ({"limit": 0}, "--limit: expected 1 or more"),
        ({"strategies": "climb"}, "invalid choice: 'climb'"),
        ({"judge": "prm", "judge_path": POLICY}, "no process reward model"),
        (
            {"judge": "prm", "judge_path": "saved_model/none"},
            "model directory saved_model/none not found",
        ),
        ({"judge": "shuffled", "judge_path": None}, "the control is random"),
        ({"splits": "none.jsonl"}, "none.jsonl not found"),
        ({"splits": "hard hard_validation"}, "hard_validation is reported, choose on other splits"),
        ({"other_model": "models/policy-large-none"}, "not found"),
        ({"other_model": POLICY}, "--other_model: has the same name as the policy"),
        ({"model_name_or_path": "none"}, "model directory none not found"),
        ({"output_dir": "rows.jsonl/x"}, "cannot be written"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, changes, message):
    write_records(tmp_path / "rows.jsonl", [Problem("p", "1")])
    if "output_dir" in changes:
        changes = {"output_dir": tmp_path / changes["output_dir"]}
    given = arguments(tmp_path, **changes)
    code, _, err = call_main(eval_search.main, *given, monkeypatch=monkeypatch, capsys=capsys)
    # a progress bar starts before a judge is opened
    lines = [line for line in err.splitlines() if line and "problem/s]" not in line]
    assert code == 2 and len(lines) == 1 and message in lines[0], err
    assert not (tmp_path / "results/search.json").exists()


def test_compressed_splits(args, tmp_path):
    for name in ("one", "two"):
        write_records(tmp_path / f"problems_{name}.jsonl.gz", [Problem("p", "1")])
    args.splits = [str(tmp_path / "problems_one.jsonl.gz")]
    args.choose_on = [str(tmp_path / "problems_two.jsonl.gz")]
    reported, for_choosing = eval_search.check(args)
    assert reported == {"one": [Problem("p", "1")]} and list(for_choosing) == ["two"]


def test_names():
    assert (
        Setting("beam", 4, "min").name == "beam"
        and Setting("beam", 4, "min", "random").name == "beam-random"
    )
