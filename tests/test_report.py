"""evaluation/report.py: grades, curves and limits of the page, and the page in a browser."""

import base64
import gzip
import json
import random
import re
from pathlib import Path

import pytest

from common.files import write_records
from evaluation import report
from evaluation.report import answer_of, judges, problem_of, searches, trainings
from reasoning.problems import stories
from reasoning.records import Problem
from tests.helpers.browser import browser, in_browser, requested_hosts
from tests.helpers.mains import call_main

# hostile to HTML, to the page's own script element and to JSON
EVIL = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">'
EVIL += "<!-- ${window.hacked = 1} &lt;b&gt; https://example.org/x.png"
PROBLEM = Problem(
    "Mia has 3 apples. She finds 4. Then she has twice as many. How many apples has she now?",
    "14",
    ["Step 1: 3 + 4 = 7", "Step 2: 7 * 2 = 14", "Answer: 14"],
    [False, True, False],
)
RIGHT = PROBLEM.steps
WRONG = ["Step 1: 3 + 4 = 7", "Step 2: 7 + 2 = 9", "Answer: 9"]
METRIC = {"value": 0.5, "ci95": [0.4, 0.6], "n": 10}


def row(base=WRONG, tuned=RIGHT, problem=PROBLEM, **more) -> dict:
    """A row of eval_reward_scores.py, whose judge agrees with the checker unless `more` says so."""
    made = {"prompt": problem.prompt, "answer": problem.answer, "steps": problem.steps}
    made["traps"] = problem.traps
    for side, steps in (("base", base), ("tuned", tuned)):
        scores = [0.9 if step in RIGHT else 0.1 for step in steps]
        made |= {f"{side}_steps": steps, f"{side}_scores": scores, f"{side}_finished": True}
    return made | more


def log(folder: Path, name: str, tuned: str, loss: float = 0.6) -> None:
    history = [{"step": 5, "loss": loss, "rewards/margins": 0.1}, {"step": 10, "loss": 0.5}]
    history += [{"step": 10, "eval_loss": 0.55}, {"train_runtime": 3}]
    made = {"output_dir": tuned, "job": {"command": "dpo"}, "seconds": 3, "steps": 10}
    (folder / name).mkdir(parents=True)
    (folder / name / "log.json").write_text(json.dumps(made | {"history": history}))


def results(folder: Path, rows: list[dict]) -> Path:
    """A folder with everything that the evaluations and trainings leave, of these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    write_records(folder / "reward_score_comparison.jsonl", rows)
    config = {"base_model": "models/base", "tuned_model": str(folder / "tuned"), "judge": EVIL}
    names = ("base_accuracy", "tuned_accuracy", "accuracy_improvement")
    result = {"config": config, "metrics": dict.fromkeys(names, METRIC)}
    (folder / "reward_score_comparison.json").write_text(json.dumps(result))
    metrics = {}
    for strategy in ("greedy/1", "majority_vote/4", "beam/1", "beam/4", "beam-random/4"):
        metrics |= {f"test/mini/{strategy}/{name}": METRIC for name in ("accuracy", "tokens")}
    metrics["test/mini/beam/4/tokens"] = METRIC | {"value": 400.0}
    metrics |= {"test/large/greedy/1/accuracy": METRIC, "test/large/greedy/1/tokens": METRIC}
    metrics["test/mini/beam/trend"] = METRIC
    result = {"config": {"model_name_or_path": "models/mini"}, "metrics": metrics}
    (folder / "search.json").write_text(json.dumps(result))
    bins = [{"low": 0, "high": 0.1, "score": 0.05, "right": METRIC}]
    card = {"judge": EVIL, "metrics": {"kappa": METRIC, "best_of_n/min": METRIC}}
    (folder / "judge_x.json").write_text(json.dumps(card | {"reliability": bins}))
    log(folder / "logs", "other", "elsewhere")
    log(folder / "logs", "tuned", str((folder / "tuned").resolve()))
    return folder


def run_report(folder: Path, *more: object, monkeypatch, capsys) -> tuple[int, str, str]:
    flags = ("--results_dir", folder, "--logs_dir", folder / "logs", *more)
    return call_main(report.main, *flags, monkeypatch=monkeypatch, capsys=capsys)


def data_of(page: str) -> dict:
    (packed,) = re.findall(r'id="data">([^<]*)<', page)
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def test_steps_are_marked_up_to_the_first_error():
    found = answer_of(row(), "base", PROBLEM, 0.5)
    assert found["marks"] == ["right", "wrong", "after"] and found["verdict"] == "wrong"
    assert found["trapped"] and not found["disagrees"]
    found = answer_of(row(), "tuned", PROBLEM, 0.5)
    assert found["marks"] == ["right"] * 3 and found["verdict"] == "right"
    assert not found["trapped"] and not found["disagrees"]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.9, 0.1, 0.9], False),  # the same first error; what follows does not count
        ([0.1, 0.1, 0.1], True),  # an earlier one
        ([0.9, 0.5, 0.1], True),  # a later one: 0.5 is not below the threshold
        ([0.9, 0.9, 0.9], True),  # none
        (None, False),  # not scored
    ],
)
def test_judge_and_checker_disagree_about_the_first_error(scores, expected):
    assert answer_of(row(base_scores=scores), "base", PROBLEM, 0.5)["disagrees"] is expected


def test_without_reference_steps_only_the_answer_is_marked():
    problem = Problem(PROBLEM.prompt, PROBLEM.answer)
    found = problem_of(row(problem=problem), 0.5)
    assert found["base"]["marks"] == ["", "", "wrong"]
    assert found["tuned"]["marks"] == ["", "", "right"]
    assert found["outcome"] == "fixed" and not found["base"]["trapped"]
    trusted = row(problem=problem, base_scores=[0.9, 0.9, 0.9])
    assert problem_of(trusted, 0.5)["base"]["disagrees"]
    old = {k: v for k, v in trusted.items() if k not in ("steps", "traps")}  # of earlier versions
    assert problem_of(old, 0.5) == problem_of(trusted, 0.5)


@pytest.mark.parametrize(
    ("base", "tuned", "outcome"),
    [(WRONG, RIGHT, "fixed"), (RIGHT, WRONG, "broken"), (RIGHT, RIGHT, "both right"),
     (WRONG, [], "both wrong")],
)  # fmt: skip
def test_outcomes(base, tuned, outcome):
    assert problem_of(row(base, tuned), 0.5)["outcome"] == outcome


def test_curves_of_trainings_and_searches(tmp_path):
    folder = results(tmp_path, [row()])
    first, other = trainings(folder / "logs", str(folder / "tuned"))
    assert (first["name"], first["of_tuned"]) == ("tuned", True) and not other["of_tuned"]
    loss = first["panels"][0]
    assert [line["label"] for line in loss["series"]] == ["loss", "loss, held-out"]
    assert loss["series"][0]["points"] == [(5, 0.6), (10, 0.5)]
    (split,) = searches(folder / "search.json")
    (panel,) = split["panels"]
    labels = ["beam", "majority_vote", "beam-random", "greedy", "large, greedy"]
    assert split["split"] == "test" and [line["label"] for line in panel["series"]] == labels
    assert panel["series"][0]["points"] == [[0.5, 0.5, 0.4, 0.6], [400.0, 0.5, 0.4, 0.6]]
    assert len({line["look"] for line in panel["series"]}) == len(labels)
    (card,) = judges(folder)
    assert card["panels"][0]["series"][0]["points"] == [(0.05, 0.5, 0.4, 0.6)]


def test_a_number_that_is_not_finite_is_no_point(tmp_path):
    log(tmp_path, "x", "x", loss=float("nan"))
    (found,) = trainings(tmp_path, None)
    assert found["panels"][0]["series"][0]["points"] == [(10, 0.5)]


def test_the_page_has_no_text_of_a_model_as_html(tmp_path, monkeypatch, capsys):
    rows = [row(), row(problem=Problem(EVIL, "1"), tuned=[EVIL])]
    folder = results(tmp_path / "a<b>&", rows)
    code, out, err = run_report(folder, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0 and not err and "report.html" in out
    page = (folder / "report.html").read_text()
    assert "window.hacked" not in page and "://" not in page.replace(
        "http://www.w3.org/2000/svg", ""
    )
    assert data_of(page)["comparison"]["problems"][1]["tuned"]["steps"] == [EVIL]
    assert "default-src 'none'" in page
    before = (folder / "report.html").read_bytes()
    code, _, err = run_report(folder, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and "--overwrite" in err and (folder / "report.html").read_bytes() == before
    code, *_ = run_report(folder, "--overwrite", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0 and (folder / "report.html").read_bytes() == before


@pytest.mark.process
def test_two_thousand_long_answers_stay_under_ten_megabytes(tmp_path, monkeypatch, capsys):
    """Words of the problem world in random order, 2,000 characters an answer."""
    rng = random.Random(0)
    texts = [story.prompt() for story, _ in zip(stories("test"), range(200), strict=False)]
    words = " ".join(texts).split()

    def text(length: int) -> str:
        return " ".join(rng.choice(words) + str(rng.randrange(100)) for _ in range(length))

    def answer() -> list[str]:
        return [text(28) for _ in range(12)]

    rows = []
    for _ in range(2000):
        base, tuned = answer(), answer()
        made = row(base, tuned, Problem(text(50), "14"))
        for side in ("base", "tuned"):
            made[f"{side}_scores"] = [rng.random() for _ in range(12)]
        rows.append(made)
    assert sum(map(len, rows[0]["base_steps"])) > 2000
    folder = results(tmp_path, rows)
    code, _, err = run_report(folder, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0, err
    assert (folder / "report.html").stat().st_size < 10e6


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "reward_score_comparison.jsonl").write_text('{"prompt": "x"}\n'), ":1: "),
        (lambda f: (f / "reward_score_comparison.jsonl").write_text("[1]\n"), ":1: "),
        (lambda f: write_records(f / "reward_score_comparison.jsonl",
                                 [row(), row(tuned_scores=[0.5])]), ":2: "),
        (lambda f: write_records(f / "reward_score_comparison.jsonl",
                                 [row(base_scores=[2, 0, 0])]), ":1: "),
        (lambda f: (f / "reward_score_comparison.json").write_text("{}"), "comparison.json: not"),
        (lambda f: (f / "search.json").write_text("{"), "search.json: not JSON"),
        (lambda f: (f / "search.json").write_text('{"metrics": 3}'), "search.json: not as"),
        (lambda f: (f / "judge_x.json").write_text('{"metrics": {"a": {}}}'), "judge_x.json: not"),
        (lambda f: (f / "logs/tuned/log.json").write_text('{"history": [1]}'), "log.json: not"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line_and_no_page(tmp_path, monkeypatch, capsys, spoil, message):
    folder = results(tmp_path, [row()])
    spoil(folder)
    code, _, err = run_report(folder, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not (folder / "report.html").exists()


def test_parts_without_files_are_left_out_and_said(tmp_path, monkeypatch, capsys):
    code, _, err = run_report(tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and "nothing to show" in err and err.count("\n") == 1
    log(tmp_path / "logs", "x", "x")
    code, out, err = run_report(tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0 and "no comparison" in out and "no searches" in out and "no judges" in out
    assert data_of((tmp_path / "report.html").read_text())["comparison"] is None


@in_browser
@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize(("width", "columns"), [(390, 1), (1280, 2)])
def test_the_page_in_a_browser(tmp_path, monkeypatch, capsys, width, columns):
    """A phone and a desk: nothing wider than the screen, every filter, no request, no injection."""
    evil = row(problem=Problem(EVIL, "1"), tuned=[EVIL + "x" * 500])
    rows = [row(RIGHT, WRONG), evil, row(RIGHT, [*RIGHT, *["Step 9: 1 + 1 = 2"] * 9])]
    rows += [row(tuned_scores=[0.1, 0.9, 0.9])] + [row() for _ in range(40)]
    folder = results(tmp_path, rows)
    code, _, err = run_report(folder, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0, err
    with browser(tmp_path / "profile", width, 844) as driver:
        metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.get_log("performance")
        driver.get((folder / "report.html").as_uri())
        js = driver.execute_script
        driver.implicitly_wait(20)
        driver.find_element("id", "status")

        def cards(selector: str = "") -> list[str]:
            found = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
            return js(found, f"article {selector}")

        def press(selector: str) -> None:
            driver.find_element("css selector", selector).click()

        def choose(selector: str, value: str) -> None:
            js("const e = document.querySelector(arguments[0]); e.value = arguments[1];"
               "e.dispatchEvent(new Event('change'))", selector, value)  # fmt: skip

        assert js("return document.documentElement.scrollWidth") <= width
        js("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert js("return document.documentElement.scrollWidth") <= width
        grid = "return getComputedStyle(document.querySelector('.answers')).gridTemplateColumns"
        assert len(js(grid).split()) == columns
        assert len(cards(".badge")) == 20
        press("#more")
        assert len(cards(".badge")) == 40
        press("button[value=broken]")
        assert cards(".badge") == ["▼ broken by training · problem 1",
                                   "▼ broken by training · problem 3"]  # fmt: skip
        press("button[value='']")
        press("#disagree")
        assert [text.split()[-1] for text in cards(".badge")] == ["4"]
        press("#disagree")
        choose("#order", "longest first")
        assert cards(".badge")[0].endswith("problem 2")
        choose("#order", "as in the file")
        choose("#trap", "tuned errs at a trap")
        assert [text.split()[-1] for text in cards(".badge")] == ["1"]
        choose("#trap", "any problem")
        # the first problem: marks, numbers and words beside the colours
        first = driver.find_elements("css selector", "article:first-child .tuned li")
        shown = [tuple(re.split(r"\s*\n\s*", line.text)) for line in first]
        assert shown == [("✓", WRONG[0], "0.90"), ("✗", WRONG[1], "0.10"), ("↳", WRONG[2], "0.10")]
        label = js(
            "return document.querySelector('article .mark.wrong').getAttribute('aria-label')"
        )
        assert label == "checker: the first error"
        colors = {line.value_of_css_property("border-left-color") for line in first[:2]}
        assert len(colors) == 2
        # every part is there, and hostile texts are texts
        assert js("return document.querySelectorAll('svg[role=img] .line0').length") >= 4
        assert EVIL[:40] in "".join(cards(".prompt"))
        assert js("return window.hacked") is None
        assert js("return document.querySelectorAll('main img, main script').length") == 0
        assert requested_hosts(driver) == {""}  # the file itself
        problems = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
        assert not problems
