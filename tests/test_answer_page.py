"""The page of `inference.py --serve`: its tree and its HTML, with real models, and in a browser."""

from dataclasses import replace

import pytest

import inference
from common.errors import JudgeError
from common.files import write_records
from evaluation.answer_page import MOST_PROPOSALS, Answer, AnswerPage, answer_html, tree_of
from lm.policy import Policy, State
from reasoning.problems import stories
from reward_model.controls import ExactJudge
from search.candidates import Candidate, SearchBudget
from search.strategies import STRATEGIES
from tests.helpers.browser import browser, in_browser, requested_hosts
from tests.helpers.mains import call_main
from tests.helpers.training import taught
from tests.test_formulas import Page
from tests.test_rank_responses import Page as Person
from tests.test_rank_responses import free_port, printed_address, server

PROBLEM = next(story.problem() for story in stories("test") if len(story.events) == 2)
EVIL = "<img src=x onerror='window.hacked = 1'> ${window.hacked = 1} {{value}} </section>"
BUDGET = SearchBudget(n=4, beams=2)


def candidate(*steps: str, scores: tuple[float, ...] | None = (), count: int = 1, note: str = ""):
    state = State("p", (), (), steps)
    return Candidate(state, None if scores is None else list(scores), count=count, note=note)


def test_the_rounds_of_a_search_become_one_tree():
    first = [
        (candidate("a", scores=(0.9,), count=3), True),
        (candidate("b", scores=(0.2,)), False),
        (candidate("c", scores=None, note="no score"), False),
    ]
    second = [
        (candidate("a", "d", scores=(0.9, 0.8), count=2), True),
        (candidate("a", "e", scores=(0.9, 0.1)), False),
    ]
    root = tree_of([first, second])
    assert [*root.below] == ["a", "b", "c"] and [*root.below["a"].below] == ["d", "e"]
    counts = [(node.count, node.score, node.kept) for node in root.below.values()]
    assert counts == [(3, 0.9, True), (1, 0.2, False), (1, None, False)]
    assert root.below["c"].note == "no score"
    # whole solutions share their first steps
    pool = [(candidate("a", "x", scores=(0.9, 0.4), count=2), False)]
    pool += [(candidate("a", "y", scores=(0.9, 0.7)), True)]
    (shared,) = tree_of([pool]).below.values()
    assert shared.count == 3 and {s: n.score for s, n in shared.below.items()} == {
        "x": 0.4,
        "y": 0.7,
    }


def test_an_answer_is_escaped_and_says_what_colours_say():
    rounds = [[(candidate(EVIL, scores=(0.25,), count=2), True)]]
    rounds[0] += [(candidate(f"{k}", scores=(0.1,)), False) for k in range(20)]
    found = Answer([EVIL, "$x^2$"], [0.25, 1.0], False, "5 proposals", rounds)
    shown = answer_html("base", EVIL, found)
    page = Page(shown)
    assert not {"img", "script"} & set(page.tags) and page.text.count(EVIL) == 3
    assert page.names <= {"class", "style", "dir", "open", "display", "alttext"}
    assert "0.25" in page.text and "1.00" in page.text and "2 x, in the answer" in page.text
    assert "did not end by itself; 5 proposals" in page.text and "and 9 others" in page.text
    assert page.tags.count("math") == 1
    unscored = Page(answer_html("base", "m", Answer(["a"], None, True)))
    assert "the judge cannot score this answer" in unscored.text and "–" in unscored.text


@pytest.fixture(scope="module")
def policy(tiny_model_dir, tmp_path_factory) -> Policy:
    folder = tmp_path_factory.mktemp("taught") / "tuned"
    return Policy.load(taught(tiny_model_dir, folder, [(PROBLEM.prompt, PROBLEM.steps)]))


def page_of(policy: Policy, judge) -> AnswerPage:
    def settings(strategy, n):
        return replace(BUDGET, n=n, temperature=1.0 if strategy else 0.0)

    return AnswerPage(
        {"base": (policy, "b"), "tuned": (policy, "t")}, judge, settings, "beam", 4, 0
    )


@pytest.mark.process
def test_every_search_answers(policy):
    page = page_of(policy, ExactJudge([PROBLEM]))
    request = {"prompt": PROBLEM.prompt, "n": "3", "seed": "1"}
    for strategy in ("", *STRATEGIES):
        reply = page.reply({**request, "strategy": strategy})
        shown = Page(reply["html"])
        assert shown.tags.count("section") == 2, reply
        assert ("The search tree" in shown.text) == (strategy != "")
        assert "kept" in shown.text or "in the answer" in shown.text or not strategy
    plain = Page(page.reply({**request, "strategy": ""})["html"])
    assert all(plain.text.count(step) == 2 for step in PROBLEM.steps)
    assert plain.text.count("1.00") == 2 * len(PROBLEM.steps)


@pytest.mark.process
@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "\udcff"}, "not UTF-8"),
        ({"prompt": "x" * 30_000}, "too long"),
        ({"prompt": "x", "strategy": "none"}, "expected one of greedy"),
        ({"prompt": "x", "n": "many"}, "proposals: expected 1 to 256"),
        ({"prompt": "x", "n": MOST_PROPOSALS + 1}, "proposals: expected 1 to 256"),
        ({"prompt": "x", "seed": "-1"}, "seed: expected 0 to"),
        ({"prompt": "another problem"}, "no reference for the problem"),
        ({"prompt": "word " * 3000}, "context"),
    ],
)
def test_a_bad_request_is_one_line(policy, request_, message):
    reply = page_of(policy, ExactJudge([PROBLEM])).reply({"n": 1, "seed": 0} | request_)
    assert [*reply] == ["error"] and message in reply["error"] and "\n" not in reply["error"], reply


def test_a_judge_that_fails_is_one_line(policy):
    class Broken(ExactJudge):
        def score_steps(self, solutions, skip=None):
            raise JudgeError("the judge has died")

    reply = page_of(policy, Broken([PROBLEM])).reply({"prompt": "x", "n": 1, "seed": 0})
    assert reply == {"error": "the judge has died"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--serve", "--prompt", "x"], "--serve: goes without --prompt"),
        (["--serve", "--input", "x", "--output", "y"], "--serve: goes without"),
        (["--base_model", "x"], "go with --serve"),
        (["--serve", "--port", "0"], "--port: expected 1 to 65535"),
        (["--serve", "--base_model", "none/x/y"], "none/x/y not found"),
        (["--serve", "--judge", "shuffled"], "shuffled"),
    ],
)
def test_wrong_arguments_are_one_line(monkeypatch, capsys, tiny_model_dir, arguments, message):
    given = ["--model_name_or_path", tiny_model_dir, *arguments]
    code, _, err = call_main(inference.main, *given, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and message in err and err.count("\n") == 1, err


@in_browser
@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize(("width", "columns"), [(390, 1), (1280, 2)])
def test_the_page_in_a_browser(tmp_path, tiny_model_dir, monkeypatch, width, columns):
    """A phone and a desk: an answer of two models, one of them hostile; errors; no request
    elsewhere."""
    steps = ["Step 1: <img src=x onerror='window.hacked=1'>", *PROBLEM.steps]
    solutions = [(PROBLEM.prompt, PROBLEM.steps)], [(PROBLEM.prompt, steps)]
    tuned, base = (
        taught(tiny_model_dir, tmp_path / name, solution)
        for name, solution in zip(("tuned", "base"), solutions, strict=True)
    )
    write_records(tmp_path / "problems.jsonl", [PROBLEM])
    port = free_port()
    arguments = ("--serve", "--model_name_or_path", tuned, "--base_model", base, "--n", "4")
    judge = ("--judge", "exact", "--judge_problems", "problems.jsonl")
    monkeypatch.setattr("tests.test_rank_responses.SCRIPT", "inference.py")
    with (
        server(port, *arguments, *judge, cwd=tmp_path),
        browser(tmp_path / "profile", width, 844) as driver,
    ):
        metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        page, js = Person(driver), driver.execute_script
        driver.get(printed_address(tmp_path))
        page.wait(lambda: page.all("textarea"), "the form")
        page.all("textarea")[0].send_keys("another problem\n")
        page.see("no reference for the problem")
        page.all("textarea")[0].clear()
        js("document.querySelector('select').value = ''")
        page.all("textarea")[0].send_keys(PROBLEM.prompt + "\n")
        page.wait(lambda: page.all(".answer"), "the answers")
        shown = [
            [line.text.split("\n") for line in column.find_elements("css selector", "ol li")]
            for column in page.all(".answer")
        ]
        assert [text for _, text in shown[1]] == PROBLEM.steps
        assert [text for _, text in shown[0]] == steps
        assert {score for score, _ in shown[1]} == {"1.00"} and shown[0][0][0] == "0.00"
        assert not page.all(".tree")
        js("document.querySelector('select').value = 'beam'")
        page.all("form button")[0].click()
        page.wait(lambda: page.all(".answer .tree .chosen"), "the tree")
        lines = page.all(".answer:last-child .tree .chosen > details > .step, .chosen > div.step")
        assert any(PROBLEM.steps[0] in line.text for line in lines)
        fold = page.all(".answer .tree details[open] > summary")[0]
        fold.click()
        colors = {line.value_of_css_property("border-left-color") for line in page.all("ol .step")}
        assert len(colors) == 2  # right and wrong
        assert js("return document.documentElement.scrollWidth") <= width
        grid = "return getComputedStyle(document.querySelector('.answers')).gridTemplateColumns"
        assert len(js(grid).split()) == columns
        assert js("return window.hacked") is None
        assert not driver.find_elements("css selector", ".work img, .work script")
        assert requested_hosts(driver) == {f"127.0.0.1:{port}"}
        assert not [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
