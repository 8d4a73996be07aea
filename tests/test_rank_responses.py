"""Ranking and labelling by people: the saved files, the page's HTML, then the page in a browser.

python tests/test_rank_responses.py    takes the picture of the page, docs/images/ranking_page.png
"""

import gzip
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.cli import run
from common.errors import RecordError, UserError
from common.files import read_rows, write_records
from common.page_server import OPEN_ROUTES, ROUTES
from evaluation.agreement import agreement, agreement_rows
from reasoning.annotation import (
    AnnotationTask,
    AnswerRanking,
    StepLabelling,
    check_name,
    find_task,
    hold,
    load_solutions,
    next_task,
    task_before,
)
from reasoning.datasets.ranking import (
    RankedResponse,
    check_groups,
    groups,
    read_answers,
    write_answers,
)
from reasoning.records import LabelledSolution, PreferencePair
from reward_model.judges.human import HumanJudge
from tests.helpers.browser import PATIENCE, browser, in_browser, requested_hosts
from utils.rank_responses import RANKS, STEPS, agreement_html, main, turn

SCRIPT = "utils/rank_responses.py"
# Text that must stay as it is: hostile to HTML, templates (JavaScript's, Gradio's), Markdown and
# CSV.
EVIL = '<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 1">\n'
EVIL += "**bold** [a](javascript:window.hacked=1) ${window.hacked = 1} `${window.hacked = 1}` "
EVIL += "{{value}} {{#if 1}}x{{/if}} &lt;b&gt; </div></textarea>, \"quoted\"; 'too'"
PROMPTS = ["What is 2 + 3?", "Tell me a story.\n<b>Short</b>, please.", "Why?", "How many?"]


def answer(k: int, prompt: int) -> str:
    """The k-th best answer to a prompt; one of each kind is hostile."""
    return f"{EVIL} {prompt}" if k == 2 else f"Answer {k} to {prompt}"


@pytest.fixture
def table(tmp_path) -> str:
    """Four prompts with four answers each, without ranks, best first in the file."""
    rows = [
        RankedResponse(
            PROMPTS[p],
            answer(k, p),
            category=f"kind {k}",
            generator="model",
            temperature=0.7,
            seed=k,
            split="train",
        )
        for p in range(4)
        for k in range(1, 5)
    ]
    write_answers(tmp_path / "answers.csv", rows)
    return str(tmp_path / "answers.csv")


def by_text(task: AnnotationTask, ranks: str) -> list[str]:
    """Marks in the order shown, given the ranks of the best, second best ... answer."""
    place = PROMPTS.index(task.prompt)
    return [ranks[[answer(k, place) for k in range(1, 5)].index(item)] for item in task.items]


# --- answers ---


def test_first_ranks_fill_empty_cells_and_others_become_new_rows(table):
    before = read_answers(table)
    work = AnswerRanking(table)
    task = next_task(work.tasks("Ann"))
    assert task.prompt == PROMPTS[0] and task.marks == ("",) * 4 and not task.done
    work.save("Ann", task.key, by_text(task, "1223"), "  short,\nclear ")
    filled = [
        replace(row, rank=rank, ranker="Ann", note="short, clear")
        for row, rank in zip(before, (1, 2, 2, 3), strict=False)
    ]
    assert read_answers(table) == filled + before[4:]

    task = next_task(work.tasks("Ben Bo"))
    work.save("Ben Bo", task.key, by_text(task, "4321"))
    rows = read_answers(table)
    assert rows[:4] == filled and rows[8:] == before[4:]
    assert sorted(rows[4:8], key=lambda row: -row.rank) == [
        replace(row, rank=rank, ranker="Ben Bo")
        for row, rank in zip(before, (4, 3, 2, 1), strict=False)
    ]
    check_groups(rows, table)

    # a page that is started again finds the ranks; changed ranks add no row
    again = AnswerRanking(table)
    (done, *open_) = again.tasks("Ann")
    assert done.done and (done.marks, done.note) == (tuple(by_text(done, "1223")), "short, clear")
    assert not any(task.done for task in open_)
    again.save("Ann", done.key, by_text(done, "2111"))
    assert [(row.rank, row.note) for row in groups(read_answers(table))[PROMPTS[0], "Ann"]] == [
        (2, ""),
        (1, ""),
        (1, ""),
        (1, ""),
    ]
    assert read_answers(table)[4:] == rows[4:]


def test_ranks_without_a_ranker_and_notes_of_the_builder_stay(tmp_path):
    """Published tables have ranks without a ranker; an unranked row may have a builder's note."""
    rows = [
        RankedResponse("p", "a", 1),
        RankedResponse("p", "b", 2),
        RankedResponse("q", "c", note="made"),
        RankedResponse("q", "d"),
    ]
    write_answers(tmp_path / "a.csv", rows)
    work = AnswerRanking(tmp_path / "a.csv", tmp_path / "out.csv")
    for prompt in "pq":
        task = next(task for task in work.tasks("Ann") if task.prompt == prompt)
        assert task.note == ""
        work.save("Ann", task.key, ["1", "1"], "mine")
    assert read_answers(tmp_path / "a.csv") == rows
    out = read_answers(tmp_path / "out.csv")
    assert out[:2] == rows[:2] and rows[2] in out
    assert {(row.answer, row.rank, row.note) for row in out if row.ranker == "Ann"} == {
        (x, 1, "mine") for x in "abcd"
    }
    assert all(
        task.done for task in AnswerRanking(tmp_path / "a.csv", tmp_path / "out.csv").tasks("Ann")
    )
    write_answers(tmp_path / "other.csv", rows[:2])
    with pytest.raises(UserError, match="holds other answers than"):
        AnswerRanking(tmp_path / "a.csv", tmp_path / "other.csv")


def test_the_order_is_drawn_for_each_prompt_and_ranker(tmp_path):
    rows = [RankedResponse(f"p{n}", f"a{k}") for n in range(60) for k in range(4)]
    write_answers(tmp_path / "a.csv", rows)
    write_answers(tmp_path / "b.csv", rows[::-1])
    shown = {
        name: {task.prompt: task.items for task in AnswerRanking(tmp_path / "a.csv").tasks(name)}
        for name in ("Ann", "Ben")
    }
    # the order of the file does not matter
    assert shown["Ann"] == {
        task.prompt: task.items for task in AnswerRanking(tmp_path / "b.csv").tasks("Ann")
    }
    for orders in shown.values():
        firsts = [items[0] for items in orders.values()]
        assert min(firsts.count(f"a{k}") for k in range(4)) >= 5 and len(set(orders.values())) >= 15
    assert sum(shown["Ann"][prompt] == shown["Ben"][prompt] for prompt in shown["Ann"]) < 15


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        (["1", "2", "3", ""], "3 of 4 are decided"),
        (["1", "2", "3"], "3 of 4 are decided"),
        (None, "decide all of them"),
        (["1", "2", "3", "5"], "expected ranks from 1 to 4"),
        (["1", "2", "3", "-1"], "expected ranks from 1 to 4"),
        (["1", "2", "3", "x"], "expected ranks from 1 to 4"),
        (["2", "2", "3", "4"], "^ranks 2,2,3,4 by Ann leave one out; write ties as"),
        (["1", "4", "3", "4"], "^ranks 1,3,4,4 by Ann leave one out"),
    ],
)
def test_invalid_ranks_are_not_saved(table, marks, message):
    work, before = AnswerRanking(table), Path(table).read_bytes()
    with pytest.raises(UserError, match=message):
        work.save("Ann", work.tasks("Ann")[0].key, marks)
    assert Path(table).read_bytes() == before


def test_changes_by_others_are_kept(table):
    work = AnswerRanking(table)
    task, other = work.tasks("Ann")[:2]
    rows = read_answers(table)
    changed = [replace(row, category="new") for row in rows[:8]] + [
        replace(rows[8], answer="rewritten"),
        *rows[9:],
    ]
    write_answers(table, changed)
    gone = work.tasks("Ann")[2].key
    work.save("Ann", task.key, by_text(task, "1234"))
    assert [row.category for row in read_answers(table)[:8]] == ["new"] * 8
    write_answers(table, rows)
    with pytest.raises(UserError, match="not in the file any more"):
        work.save("Ann", gone, ["1", "2", "3", "4"])
    Path(table).write_text("prompt,answer\n")
    with pytest.raises(RecordError, match="no rows"):
        work.save("Ann", other.key, ["1", "2", "3", "4"])
    assert Path(table).read_text() == "prompt,answer\n"


def test_compressed_files_work_as_plain_ones(table, tmp_path):
    """A .csv.gz table takes ranks, a .jsonl.gz file gives solutions and takes labels."""
    Path(f"{table}.gz").write_bytes(gzip.compress(Path(table).read_bytes()))
    write_records(tmp_path / "pairs.jsonl.gz", PAIRS)
    solutions = load_solutions(str(tmp_path / "pairs.jsonl.gz"))
    for suffix in ("", ".gz"):
        ranking = AnswerRanking(f"{table}{suffix}")
        for task in ranking.tasks("Ann"):
            ranking.save("Ann", task.key, by_text(task, "1223"))
        assert all(task.done for task in AnswerRanking(f"{table}{suffix}").tasks("Ann"))
        labelling = StepLabelling(solutions, tmp_path / f"labels.jsonl{suffix}")
        for task in labelling.tasks("Ann"):
            labelling.save("Ann", task.key, ["right"] * len(task.items))
        again = StepLabelling(solutions, tmp_path / f"labels.jsonl{suffix}")
        assert all(task.done for task in again.tasks("Ann"))
    for path in (Path(table), tmp_path / "labels.jsonl"):
        compressed = path.with_name(f"{path.name}.gz").read_bytes()
        assert gzip.decompress(compressed) == path.read_bytes()


def test_next_skip_and_back():
    tasks = [
        AnnotationTask(prompt, ("a", "b"), marks)
        for prompt, marks in [("p", ("1", "2")), ("q", ()), ("r", ("1", "")), ("s", ("1", "1"))]
    ]
    p, q, r, s = tasks
    assert (
        next_task(tasks) == q
        and next_task(tasks, q.key) == r
        and next_task(tasks, r.key) == q
        and next_task(tasks, p.key) == q
    )
    assert next_task([p, s]) is None and next_task([p, q], q.key) == q
    assert (
        task_before(tasks, s.key) == r
        and task_before(tasks, p.key) == p
        and task_before(tasks) == s
    )
    with pytest.raises(UserError, match="reload the page"):
        # the same answers in another order are another task
        find_task(tasks, AnnotationTask("p", ("b", "a")).key)


def test_names():
    assert check_name("  Anna  Maria O'Neil-Smith 2. ") == "Anna Maria O'Neil-Smith 2."
    assert check_name("Łukasz") == "Łukasz" and check_name("日本") == "日本"
    for wrong in (
        "",
        " ",
        "rule:exact",
        "LLM:gpt",
        "a:b",
        "=1+1",
        "-x",
        "a,b",
        "a\x00b",
        "<b>",
        "x" * 41,
        "${a}",
        "../x",
    ):
        with pytest.raises(
            UserError,
            match="begin with rule: or llm:"
            if wrong.lower().startswith(("rule", "llm"))
            else "expected a name",
        ):
            check_name(wrong)


def test_one_page_locks_a_file(tmp_path):
    held = hold(tmp_path / "answers.csv")
    (tmp_path / "link.csv").symlink_to(tmp_path / "answers.csv")
    for name in ("answers.csv", "link.csv"):
        with pytest.raises(UserError, match=f"{name}: another process .{os.getpid()}."):
            hold(tmp_path / name)
    hold(tmp_path / "labels.jsonl").close()
    held.close()
    hold(tmp_path / "answers.csv").close()


# --- the page as HTML ---


class Texts(HTMLParser):
    """The tags of a page, and the texts of its elements with their class."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.texts = [], [("", "")]
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.texts.append((dict(attrs).get("class"), ""))
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)

    def handle_endtag(self, tag):
        self.texts.append(("", ""))

    def handle_data(self, data):
        name, text = self.texts[-1]
        self.texts[-1] = (name, text + data)

    def in_class(self, name: str) -> list[str]:
        return [text for text_class, text in self.texts if text_class == name]


def test_turns(table):
    work = AnswerRanking(table)

    def ask(**request):
        return turn(work, RANKS, {"name": "Ann", **request})

    page = Texts(ask(action="open")["html"])
    first, second, *_ = work.tasks("Ann")
    assert page.in_class("text") == list(first.items) and page.in_class("prompt") == [PROMPTS[0]]
    assert any(EVIL in text for text in page.in_class("text")) and not {"script", "img", "a"} & set(
        page.tags
    )
    # the source of an answer is not shown
    assert not any(word in ask(action="open")["html"] for word in ("kind 1", "model", "0.7"))
    assert Texts(ask(action="skip", key=first.key)["html"]).in_class("prompt") == [second.prompt]
    assert Texts(ask(action="back", key=second.key)["html"]).in_class("prompt") == [first.prompt]
    refused = ask(action="save", key=first.key, marks=["1", "", "", ""])
    assert refused == {"error": "Not saved: 1 of 4 are decided: decide all of them, or skip"}
    for task in work.tasks("Ann"):
        assert "All 4" not in ask(action="open")["html"]
        reply = ask(action="save", key=task.key, marks=["1", "1", "3", "4"], note='<i>"n"</i>')
    assert "All 4 prompts are done" in reply["html"] and "4 of 4" in reply["html"]
    page = ask(action="back", key=None)["html"]
    assert (
        Texts(page).in_class("prompt") == [PROMPTS[3]]
        and 'value="&lt;i&gt;&quot;n&quot;&lt;/i&gt;"' in page
        and "Save again" in page
    )
    assert "0 of 4" in turn(work, RANKS, {"name": "Ben", "action": "open"})["html"]
    for name in (None, "", "rule:exact"):
        reply = turn(
            work, RANKS, {"name": name, "action": "save", "key": first.key, "marks": ["1"] * 4}
        )
        assert reply["ask"] and ("rule:" in reply["html"]) == bool(name)
    assert {row.ranker for row in read_answers(table)} == {"Ann"}
    Path(table).unlink()
    assert "answers.csv" in ask(action="open")["error"]


# --- steps ---

PAIRS = [
    PreferencePair(
        "P", ["Step 2: 3", "Answer: 3"], [f"Step 2: {EVIL}", "Answer: 4"], prefix=["Step 1: 1"]
    ),
    PreferencePair("Q", ["Answer: 1"], ["Answer: 2"]),
]
SOLUTIONS = {
    ("P", ("Step 1: 1", "Step 2: 3", "Answer: 3")),
    ("P", ("Step 1: 1", f"Step 2: {EVIL.replace(chr(10), ' ')}", "Answer: 4")),
    ("Q", ("Answer: 1",)),
    ("Q", ("Answer: 2",)),
}


def test_both_sides_of_pairs_are_labelled_once(tmp_path):
    write_records(tmp_path / "pairs.jsonl", [*PAIRS, PAIRS[1]])
    solutions = load_solutions(str(tmp_path / "pairs.jsonl"))
    assert len(solutions) == 4 and {(task.prompt, task.items) for task in solutions} == SOLUTIONS
    # everybody gets the same order
    assert solutions == load_solutions(str(tmp_path / "pairs.jsonl"))
    many = [PreferencePair(f"p{n}", ["right"], ["wrong"]) for n in range(40)]
    write_records(tmp_path / "many.jsonl", many)
    shown = [task.items[0] for task in load_solutions(str(tmp_path / "many.jsonl"))]
    # the sides of a pair are neither together nor in turn
    assert 5 < sum(a == b for a, b in itertools.pairwise(shown)) < 74

    write_records(tmp_path / "labelled.jsonl", [LabelledSolution("P", ["Answer: 1"], [1])])
    # labels are not shown
    assert load_solutions(str(tmp_path / "labelled.jsonl")) == [AnnotationTask("P", ("Answer: 1",))]
    (tmp_path / "problems.jsonl").write_text('{"prompt": "P", "answer": "1"}\n')
    with pytest.raises(RecordError, match=r"problems.jsonl: no solutions with steps"):
        load_solutions(str(tmp_path / "problems.jsonl"))


def test_the_human_judge_reads_the_labels(tmp_path):
    write_records(tmp_path / "pairs.jsonl", PAIRS)
    labels = tmp_path / "out" / "labels.jsonl"
    labels.parent.mkdir()
    foreign = LabelledSolution("Z", ["Answer: 0"], [0.5], final_correct=False)  # made elsewhere
    write_records(labels, [foreign])
    solutions = load_solutions(str(tmp_path / "pairs.jsonl"))
    work = StepLabelling(solutions, labels)
    keys = {task.items: task.key for task in work.tasks("Ann")}
    right, wrong = ("Step 1: 1", "Step 2: 3", "Answer: 3"), ("Answer: 2",)
    work.save("Ann", keys[right], ["right", "unsure", "wrong"], "odd")
    work.save("Ben", keys[right], ["right", "unsure", "right"])
    work.save("Ann", keys[wrong], ["unsure"])
    rows = [row for _, row in read_rows(labels)]
    assert rows[1:] == [
        {
            "prompt": "P",
            "steps": list(right),
            "labels": [1, None, 0],
            "labeller": "Ann",
            "note": "odd",
        },
        {"prompt": "P", "steps": list(right), "labels": [1, None, 1], "labeller": "Ben"},
        {"prompt": "Q", "steps": list(wrong), "labels": [None], "labeller": "Ann"},
    ]
    judge = HumanJudge(labels)
    assert judge.score_steps(
        [("P", right[:1]), ("P", right), ("Q", wrong), ("Z", ["Answer: 0"])]
    ) == [[1], None, None, [0.5]]

    again = StepLabelling(solutions, labels)
    assert (
        sum(task.done for task in again.tasks("Ann")) == 2
        and sum(task.done for task in again.tasks("Ben")) == 1
    )
    done = find_task(again.tasks("Ann"), keys[right])
    assert (done.marks, done.note) == (("right", "unsure", "wrong"), "odd")
    again.save("Ann", done.key, ["right", "right", "wrong"])  # a change replaces the row
    rows[1] = {"prompt": "P", "steps": list(right), "labels": [1, 1, 0], "labeller": "Ann"}
    assert [row for _, row in read_rows(labels)] == rows
    assert HumanJudge(labels).score_steps([("P", right)]) == [[1, 1, 0.5]]
    with pytest.raises(UserError, match="expected right, wrong, unsure"):
        again.save("Ann", done.key, ["right", "1", "wrong"])
    page = turn(again, STEPS, {"name": "Ann", "action": "open"})["html"]
    assert "2 of 4 solutions" in page and "<script>" not in page

    labels.write_text('{"prompt": "P", "steps": ["a"], "labels": [2]}\n')
    with pytest.raises(RecordError, match=r"labels.jsonl:1: field 'labels'"):
        StepLabelling(solutions, labels)


# --- agreement ---


def ranked(**ranks: str) -> list[RankedResponse]:
    """ranker="1234,4321": the ranks of the answers to prompts 0 and 1; "" skips a prompt."""
    return [
        RankedResponse(f"p{p}", f"a{k}", int(rank), name)
        for name, texts in ranks.items()
        for p, group in enumerate(texts.split(","))
        for k, rank in enumerate(group)
    ]


def test_agreement():
    (same,) = agreement(ranked(Ann="1234,4321", Ben="1234,4321"))
    assert (same.rankers, same.prompts, same.tau.value, same.tau.n, same.alpha) == (
        ("Ann", "Ben"),
        2,
        1,
        2,
        1,
    )
    (opposite,) = agreement(ranked(Ann="1234,1234", Ben="4321,4321"))
    assert opposite.tau.value == -1 and opposite.alpha < 0
    # One of six pairs is swapped: tau 4/6. Each rank occurs twice, so the ordinal distance of ranks
    # i and j is (2 |i - j|)^2: observed (0 + 0 + 4 + 4) / 4 = 2, expected
    # (24 * 4 + 16 * 16 + 8 * 36) / 56 = 640 / 56.
    (swapped,) = agreement(ranked(Ann="1234", Ben="1243"))
    assert swapped.tau.value == pytest.approx(4 / 6) and swapped.tau.ci95 is None
    assert swapped.alpha == pytest.approx(1 - 2 / (640 / 56))
    (ties,) = agreement(ranked(Ann="1224", Ben="1223"))  # two ways to write the same ties
    assert ties.tau.value == pytest.approx(1) and ties.alpha == pytest.approx(1)
    (undefined,) = agreement(ranked(Ann="1111,12", Ben="1234,12"))
    assert undefined.prompts == 2 and undefined.tau.n == 1
    (nothing,) = agreement(ranked(Ann="11", Ben="11"))
    assert nothing.tau is None and nothing.alpha is None


def test_agreement_of_several():
    rows = ranked(Ann="1234,1234,12", Ben="1243,1234", Cid=",,12")
    pairs = {found.rankers: found for found in agreement(rows)}
    assert list(pairs) == [("Ann", "Ben"), ("Ann", "Cid"), ("Ann", "Ben", "Cid")]
    assert (
        pairs["Ann", "Ben"].prompts == 2
        and pairs["Ann", "Cid"].prompts == 1
        and pairs["Ann", "Ben", "Cid"].prompts == 0
    )
    assert (
        pairs["Ann", "Cid"].alpha
        == 1
        > pairs["Ann", "Ben", "Cid"].alpha
        > pairs["Ann", "Ben"].alpha
    )
    table = agreement_rows([*rows, *(replace(row, ranker="") for row in rows[:4])])
    assert table[-1][0] == "all" and any(row[0] == "(no name) and Ann" for row in table)
    assert agreement(ranked(Ann="12", Ben=",12")) == [] and "two rankers" in agreement_html([])
    assert "&lt;b&gt;" in agreement_html([("<b>", "", "", "", "")])


# --- the script ---


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--input", "nowhere.csv"], "nowhere.csv not found"),
        (["--input", "."], ". is a folder, expected a file"),
        (["--input", "empty.csv"], "empty.csv:1: expected a header"),
        (["--input", "header.csv"], "header.csv: no rows"),
        (["--input", "picture.csv"], "picture.csv:1: not UTF-8"),
        (["--input", "one.csv"], "has one answer"),
        (["--input", "half.csv"], "some of its answers have no rank by Ann"),
        (["--input", "half.csv", "--agreement"], "some of its answers have no rank by Ann"),
        (["--ranker", "rule:exact"], "rule: or llm: are for rules and models"),
        (["--ranker", ""], "expected a name"),
        (["--ranker", "a<b>"], "expected a name"),
        (["--port", "0"], "--port: expected 1 to 65535"),
        (["--steps", "nowhere.jsonl"], "nowhere.jsonl not found"),
        (["--steps", "empty.csv"], "empty.csv"),
        (["--steps", "pairs.jsonl", "--labels", "half.csv"], "half.csv:1: not JSON"),
        (["--output", "no/such/folder/out.csv"], "out.csv.lock"),
        (["--agreement"], "no prompt is ranked by two rankers"),
        (["--input", "held.csv"], "held.csv: another process ("),
    ],
)
def test_mistakes_are_one_line(table, tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.csv").touch()
    Path("header.csv").write_text("prompt,answer,rank\n")
    Path("picture.csv").write_bytes(b"\x89PNG\xff")
    Path("one.csv").write_text("prompt,answer\np,a\n")
    Path("half.csv").write_text("prompt,answer,rank,ranker\np,a,1,Ann\np,b,,Ann\n")
    write_records("pairs.jsonl", PAIRS)
    held = hold("held.csv")
    shutil.copy(table, "held.csv")
    before = {path: path.read_bytes() for path in Path().glob("*.csv")}
    monkeypatch.setattr("utils.rank_responses.serve", lambda *_: pytest.fail("the page was shown"))
    monkeypatch.setattr(
        "sys.argv", [SCRIPT, *(["--input", "answers.csv"] if "--input" not in args else []), *args]
    )
    with pytest.raises(SystemExit) as end:
        run(main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1, error
    assert {path: path.read_bytes() for path in Path().glob("*.csv")} == before
    held.close()


def test_agreement_on_the_terminal(tmp_path, monkeypatch, capsys):
    write_answers(tmp_path / "answers.csv", ranked(Ann="1234", Ben="1243", rule="1234"))
    monkeypatch.setattr(
        "sys.argv", [SCRIPT, "--input", str(tmp_path / "answers.csv"), "--agreement"]
    )
    run(main)
    table = capsys.readouterr().out
    assert (
        "Ann and Ben" in table
        and "0.667" in table
        and "0.825" in table
        and len(list(tmp_path.iterdir())) == 1
    )


# --- in a browser ---


def free_port() -> int:
    with socket.socket() as any_free:
        any_free.bind(("127.0.0.1", 0))
        return any_free.getsockname()[1]


def printed_address(cwd: Path) -> str:
    """The address, with its token, that the last server has printed."""
    return re.findall(r"\S+token=\S+", (cwd / "server.log").read_text())[-1]


@contextmanager
def server(port: int, *args: str, cwd: Path):
    """The script in a process of its own, as soon as its page can be loaded."""
    command = [sys.executable, str(ROOT / SCRIPT), "--port", str(port), *args]
    with open(cwd / "server.log", "a+", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=cwd, stdout=log, stderr=log)
        try:
            end = time.monotonic() + PATIENCE
            while "(Ctrl-C ends)" not in (cwd / "server.log").read_text().rpartition("#")[2]:
                assert process.poll() is None and time.monotonic() < end, (
                    cwd / "server.log"
                ).read_text()
                time.sleep(0.2)
            log.write("#")  # the next server writes after this
            log.flush()
            yield process
        finally:
            process.kill()
            process.wait()


class Page:
    """What a person sees and does."""

    def __init__(self, driver):
        self.driver = driver

    def all(self, selector: str) -> list:
        return [
            found
            for found in self.driver.find_elements("css selector", selector)
            if found.is_displayed()
        ]

    def wait(self, what, why: str):
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(
            self.driver, PATIENCE, ignored_exceptions=[StaleElementReferenceException]
        )
        return wait.until(lambda _: what(), f"waited for {why}: {self.text()}")

    def text(self) -> str:
        return self.driver.find_element("css selector", "body").text

    def see(self, text: str) -> None:
        self.wait(lambda: text in self.text(), repr(text))

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def items(self) -> list[str]:
        return [item.get_property("textContent") for item in self.all(".item .text")]

    def marks(self) -> list[str]:
        return [item.get_attribute("data-mark") for item in self.all(".item")]

    def prompt(self) -> str:
        (prompt,) = self.all(".prompt")
        return prompt.get_property("textContent")

    def ranks(self, ranks: str) -> str:
        """The keys, from the first answer on, for the ranks of the best, second best ... answer."""
        return "".join(by_text(AnnotationTask(self.prompt(), tuple(self.items())), ranks))

    def network(self) -> set[str]:
        """The hosts to which the browser has sent requests since the last call."""
        return requested_hosts(self.driver)


@in_browser
@pytest.mark.slow
@pytest.mark.process
def test_a_persons_session(table, tmp_path, run_script):
    """One browser and two servers: rank, label, agreement.

    Ann ranks by keyboard; the first server is killed; the second one, with --ranker and --steps,
    saves what was typed, takes ranks by dragging, shows the agreement and takes labels of steps."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with browser(tmp_path / "profile") as driver:
        page = Page(driver)

        def is_safe() -> bool:
            """Whether no script of an answer has run."""
            return driver.execute_script("return window.hacked") is None

        with server(port, "--input", table, cwd=tmp_path) as process:
            driver.get(printed_address(tmp_path))
            page.see("Your name")
            assert driver.current_url == f"{url}/"  # the token is not in the address any more
            page.press("rule:exact", Keys.ENTER)
            page.see("are for rules and models")
            page.press("Ann", Keys.ENTER)
            page.see("0 of 4 prompts done")

            # A script in an answer is shown as text and does not run.
            assert sorted(page.items()) == sorted(answer(k, 0) for k in range(1, 5))
            assert page.prompt() == PROMPTS[0] and is_safe()
            elements = ".work script, .work img, .work .text *, .work .prompt *"
            assert not driver.find_elements("css selector", elements)

            page.press("s")  # skip: the prompt comes again when the others are done
            page.wait(lambda: page.prompt() == PROMPTS[1], "the second prompt")
            page.press(page.ranks("1234"), Keys.ENTER)
            page.see("1 of 4 prompts done")
            page.press(page.ranks("1334"), Keys.ENTER)
            page.see("ranks 1,3,3,4 by Ann leave one out")
            # Nothing was saved; the ranks are corrected from the top.
            page.press(*[Keys.ARROW_UP] * 3, page.ranks("1224"), "n", "a tie", Keys.ENTER)
            page.see("2 of 4 prompts done")
            page.press(page.ranks("4321"), Keys.ENTER)
            page.see("3 of 4 prompts done")
            assert page.prompt() == PROMPTS[0]
            saved = {
                prompt: [row.rank for row in rows]
                for (prompt, _), rows in groups(read_answers(table)).items()
            }
            expected = {PROMPTS[1]: [1, 2, 3, 4], PROMPTS[2]: [1, 2, 2, 4]}
            assert saved == expected | {PROMPTS[3]: [4, 3, 2, 1]}
            driver.get(url)  # loaded again, the page knows the name
            page.see("3 of 4 prompts done")

            # A second page for the same file refuses to start; the first is killed between two
            # keys.
            other = run_script(SCRIPT, "--input", table, "--port", free_port())
            assert other.returncode == 2 and other.stderr.count("\n") == 1
            assert f"(process {process.pid})" in other.stderr
            page.press(page.ranks("1234")[:2])
            before = Path(table).read_bytes()
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert Path(table).read_bytes() == before
            page.press(page.ranks("1234")[2:], Keys.ENTER)
            page.see("the server does not answer")

        # Ben ranks as Ann has.
        ranked_rows = [row for row in read_answers(table) if row.ranker]
        write_answers(
            table, [*read_answers(table), *(replace(row, ranker="Ben") for row in ranked_rows)]
        )
        write_records(tmp_path / "pairs.jsonl", PAIRS)
        steps = ("--steps", "pairs.jsonl", "--labels", "labels.jsonl")
        with server(port, "--input", table, "--ranker", "Ann", *steps, cwd=tmp_path):
            page.press(Keys.ENTER)
            page.see("open its new address")  # the token of the first server is of no use
            assert Path(table).read_bytes() != before  # Ben's ranks alone
            typed = driver.current_window_handle
            driver.switch_to.new_window("tab")
            driver.get(printed_address(tmp_path))
            page.see("prompts done")
            driver.close()
            driver.switch_to.window(typed)
            page.press(Keys.ENTER)  # the page still holds what was typed
            page.see("All 4 prompts are done")
            rows = groups(read_answers(table))[PROMPTS[0], "Ann"]
            assert [row.rank for row in rows] == [1, 2, 3, 4]
            driver.execute_script("sessionStorage.clear()")
            driver.get(url)  # the server knows the name
            page.see("All 4 prompts are done")
            for tab in page.all("button[role=tab]"):
                if tab.text == "Agreement":
                    tab.click()
                    page.see("Ann and Ben")
                    assert "1.000" in page.text()
            page.all("button[role=tab]")[0].click()
            page.see("All 4 prompts are done")
            page.press("b")
            page.wait(lambda: page.all(".item"), "the last prompt")
            page.press("b")
            page.wait(lambda: page.prompt() == PROMPTS[2], "the prompt before")
            assert "".join(page.marks()) == page.ranks("1224")
            assert page.all(".note")[0].get_property("value") == "a tie"

            # Dragged to the end: the order becomes the ranking.
            first, *rest = page.items()
            grips, cards = page.all(".grip"), page.all(".item")
            way = ActionChains(driver).click_and_hold(grips[0]).move_to_element(grips[1])
            way.move_to_element_with_offset(cards[3], 60, 10).release().perform()  # past its middle
            assert page.items() == [*rest, first] and page.marks() == ["1", "2", "3", "4"]
            page.press(Keys.ENTER)
            page.see("All 4 prompts are done")
            rows = groups(read_answers(table))[PROMPTS[2], "Ann"]
            rank_of = {row.answer: row.rank for row in rows}
            assert [rank_of[text] for text in (*rest, first)] == [1, 2, 3, 4]
            assert len(read_answers(table)) == 16 + len(ranked_rows)

            for tab in page.all("button[role=tab]"):
                if tab.text == "Label steps":
                    tab.click()
            page.see("0 of 4 solutions done")
            labelled = {}
            for done in range(1, 5):
                prompt, steps = page.prompt(), tuple(page.items())
                right_steps = ("Step 1: 1", "Step 2: 3", "Answer: 3", "Answer: 1")
                labels = [int(step in right_steps) for step in steps]
                keys = ["w1"[label] if done % 2 else "2r"[label] for label in labels]
                if done == 4:  # unsure of the last step
                    labels[-1], keys[-1] = None, "3"
                page.press(*keys, Keys.ENTER)
                labelled[prompt, steps] = labels
                page.see(f"{done} of 4 solutions done")
            page.see("All 4 solutions are done")
            assert is_safe()
        assert page.network() == {f"127.0.0.1:{port}"}
        failed = {
            entry["message"].split()[0]
            for entry in driver.get_log("browser")
            if entry["level"] == "SEVERE"
        }
        # only the request while no server ran
        assert all(message.startswith(f"{url}/gradio_api/") for message in failed)
    written = [LabelledSolution.from_row(row) for _, row in read_rows(tmp_path / "labels.jsonl")]
    assert {(row.prompt, tuple(row.steps)): row.labels for row in written} == labelled
    assert set(labelled) == SOLUTIONS
    judge = HumanJudge(tmp_path / "labels.jsonl")
    scores = judge.score_steps([(row.prompt, row.steps) for row in written])
    assert scores == [*(row.labels for row in written[:3]), None]


@in_browser
@pytest.mark.slow
@pytest.mark.process
def test_the_page_on_a_phone(tmp_path):
    """390 px wide: nothing is wider, texts have the width, the save bar is in view, formulas are
    drawn."""
    rows = [
        RankedResponse(
            "Solve $x^2 = 9$.", f"Answer {k}: \\(x = \\pm\\frac{{{k}}}{{3}}\\) " + "word " * 90
        )
        for k in range(4)
    ]
    write_answers(tmp_path / "answers.csv", rows)
    write_records(tmp_path / "pairs.jsonl", PAIRS)
    port = free_port()
    files = ("--input", "answers.csv", "--steps", "pairs.jsonl", "--labels", "labels.jsonl")
    with (
        server(port, *files, "--ranker", "Ann", cwd=tmp_path),
        browser(tmp_path / "profile", 390, 844) as driver,
    ):
        metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        page, js = Page(driver), driver.execute_script
        driver.get(printed_address(tmp_path))
        page.see("0 of 1 prompts done")

        def fits() -> None:
            assert js("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]
            assert all(text.rect["width"] > 330 for text in page.all(".item .text"))
            box = "return arguments[0].getBoundingClientRect()"
            (foot,) = (js(box, found) for found in page.all(".foot"))
            assert foot["top"] > 0 and foot["bottom"] <= 844

        fits()
        assert len(page.all(".prompt math msup")) == 1 and len(page.all(".text math mfrac")) == 4
        assert js("return document.documentElement.scrollHeight") > 844
        js("window.scrollTo(0, 300)")
        fits()
        page.press("1111", "\ue007")
        page.see("All 1 prompts are done")
        for tab in page.all("button[role=tab]"):
            if tab.text == "Label steps":
                tab.click()
        page.see("0 of 4 solutions done")
        fits()
        assert page.network() == {f"127.0.0.1:{port}"}
    assert [row.answer for row in read_answers(tmp_path / "answers.csv")] == [
        r.answer for r in rows
    ]


# What a page of another origin can try: to change ranks, and to read a text. TARGET is the server,
# BODY what its own page posts to save ranks.
ATTACK = """
const tried = [];
async function attempt(name, work) {
  let read = "";
  try { read = String(await Promise.race([work(), new Promise(done => setTimeout(done, 1500, ""))])); }
  catch (error) { read = ""; }
  tried.push([name, read]);
}
const save = TARGET + "/gradio_api/component_server/";
const kinds = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/json"];
(async () => {
  for (const path of ["/", "/config", "/theme.css", "/manifest.json", "/gradio_api/info", "/gradio_api/queue/data?session_hash=x"])
    for (const mode of ["cors", "no-cors", "navigate"])
      await attempt("get " + path + mode, async () => (await fetch(TARGET + path, {mode, credentials: "include"})).text());
  for (const body of BODIES)
    for (const kind of kinds)
      for (const mode of ["cors", "no-cors"])
        await attempt("post " + kind + mode, async () => (await fetch(save, {method: "POST", mode, credentials: "include", keepalive: true, headers: {"Content-Type": kind}, body})).text());
  for (const body of BODIES) {
    await attempt("beacon", async () => navigator.sendBeacon(save, body) && "");
    for (const kind of kinds.slice(0, 3)) {
      const frame = document.body.appendChild(Object.assign(document.createElement("iframe"), {name: "f" + Math.random()}));
      const form = document.body.appendChild(Object.assign(document.createElement("form"), {method: "POST", action: save, enctype: kind, target: frame.name}));
      const place = body.indexOf("=") < 0 ? body.length - 1 : body.indexOf("=");
      form.appendChild(Object.assign(document.createElement("input"), {name: body.slice(0, -1), value: body.slice(-1)}));
      form.submit();
    }
  }
  const frame = document.body.appendChild(Object.assign(document.createElement("iframe"), {src: TARGET + "/", id: "framed"}));
  await attempt("frame", () => new Promise(done => { frame.onload = () => { try { done(frame.contentDocument.body.innerText); } catch { done(""); } }; }));
  await attempt("events", () => new Promise((done, no) => {
    const events = new EventSource(TARGET + "/gradio_api/queue/data?session_hash=x", {withCredentials: true});
    events.onmessage = message => done(message.data); events.onerror = no; }));
  await attempt("socket", () => new Promise((done, no) => {
    const socket = new WebSocket(TARGET.replace("http", "ws") + "/gradio_api/queue/join");
    socket.onopen = () => done("opened"); socket.onerror = no; }));
  for (const tag of ["script", "img", "link"])
    await attempt(tag, () => new Promise((done, no) => {
      const element = document.createElement(tag);
      element.onload = () => done("loaded"); element.onerror = no;
      element[tag === "link" ? "href" : "src"] = TARGET + (tag === "link" ? "/theme.css" : tag === "img" ? "/favicon.ico" : "/assets/SCRIPT");
      if (tag === "link") element.rel = "stylesheet";
      document.head.append(element); }));
  await attempt("upload", async () => { const data = new FormData(); data.append("files", new Blob(["x"]), "x.txt");
    return (await fetch(TARGET + "/gradio_api/upload", {method: "POST", credentials: "include", body: data})).text(); });
  document.title = "over"; window.tried = tried;
})();
"""  # noqa: E501 (JavaScript)


REFUSED = "sent by another page\n"  # all that a page may read; Gradio lets pages of localhost read


def find_dicts(value):
    """All dicts in decoded JSON."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value:
        if isinstance(part, dict | list):
            yield from find_dicts(part)


@contextmanager
def attacking_page(target: str, bodies: list[str], script: str):
    """The address of a page on a port of its own, which attacks the target."""
    code = ATTACK.replace("TARGET", json.dumps(target)).replace("BODIES", json.dumps(bodies))
    page = f"<!DOCTYPE html><body><script>{code.replace('SCRIPT', script)}</script>".encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as attacker:
        threading.Thread(target=attacker.serve_forever, daemon=True).start()
        yield attacker.server_port
        attacker.shutdown()


@in_browser
@pytest.mark.slow
@pytest.mark.process
def test_other_pages_change_no_ranks_and_read_no_texts(table, tmp_path):
    """The person's page is open in the same browser, so its cookie is there to be sent."""
    port = free_port()
    target = f"http://127.0.0.1:{port}"
    names = "host-resolver-rules=MAP evil.example 127.0.0.1"
    with (
        server(port, "--input", table, "--ranker", "Ann", cwd=tmp_path),
        browser(tmp_path / "profile", 1280, 1000, names) as driver,
    ):
        page = Page(driver)
        driver.get(printed_address(tmp_path))
        page.see("0 of 4 prompts done")
        page.press(page.ranks("1234")[:4])
        # what the page itself posts for its first prompt, to be posted by others
        driver.execute_script(
            "window.posted = []; const own = window.fetch; window.fetch = (url, more) => {"
            " if (more && more.body) window.posted.push(more.body); return own(url, more); }"
        )
        page.press("\ue007")
        page.see("1 of 4 prompts done")
        (posted,) = [
            body
            for body in driver.execute_script("return window.posted")
            if isinstance(body, str) and "marks" in body
        ]
        script = driver.execute_script(
            "return [...document.scripts].map(s => s.src).find(s => s.includes('/assets/'))"
        )
        saved = Path(table).read_bytes()
        request = json.loads(posted)  # the same task with other ranks
        (ranks,) = [part for part in find_dicts(request) if "marks" in part]
        ranks["marks"].reverse()
        other = json.dumps(request)
        person = driver.current_window_handle
        with attacking_page(target, [other], script.rpartition("/")[2]) as attacker:
            for name in ("127.0.0.1", "localhost", "evil.example"):
                driver.switch_to.new_window("tab")
                driver.get(f"http://{name}:{attacker}/")
                page.wait(lambda: driver.title == "over", "the end of the attack")
                tried = driver.execute_script("return tried")
                read = {what: text for what, text in tried if text not in ("", REFUSED)}
                assert len(tried) > 30 and not read, (name, read)
                time.sleep(1)  # forms
                assert Path(table).read_bytes() == saved, name
        # a name of the attacker's that points to the server
        driver.get(f"http://evil.example:{port}/")
        assert page.text() == "this name is not served"
        # the same post from the page itself is saved
        driver.switch_to.window(person)
        driver.execute_script(
            "fetch('/gradio_api/component_server/', {method: 'POST', body: arguments[0],"
            " headers: {'Content-Type': 'application/json'}})",
            other,
        )
        page.wait(lambda: Path(table).read_bytes() != saved, "the ranks")


@pytest.mark.slow
@pytest.mark.process
def test_the_server_answers_its_own_page_alone(table, tmp_path):
    """Requests as no browser sends them, to the real server and to every route of Gradio."""
    import gradio as gr
    import httpx
    from gradio.routes import App

    with gr.Blocks() as blocks:
        pass
    paths = {route.path for route in App.create_app(blocks).routes if hasattr(route, "path")}
    paths |= {f"/gradio_api/{name}" for name in ("upload", "file=/etc/passwd", "info", "run/turn")}
    paths |= {f"/gradio_api/{name}" for name in ("call/turn", "api/turn", "proxy=x", "stream/x")}
    needed = {route for _, route in ROUTES} | {route for _, route in OPEN_ROUTES}
    port = free_port()
    with server(port, "--input", table, cwd=tmp_path):
        url = f"http://127.0.0.1:{port}"
        token = printed_address(tmp_path).partition("token=")[2]
        cookie = {"cookie": f"ranking_{port}={token}"}
        with httpx.Client(base_url=url, timeout=60) as client:
            assert client.get("/").status_code == client.get("/?token=x").status_code == 401
            page = client.get("/", headers=cookie)
            assert page.status_code == 200 and "frame-ancestors" in str(page.headers)
            for wrong in (
                {"host": f"evil.example:{port}"},
                {"origin": f"http://127.0.0.1:{port + 1}"},
                {"origin": "null"},
                {"cookie": f"ranking_{port}={token[:-1]}"},
            ):
                assert client.get("/", headers={**cookie, **wrong}).status_code == 401
            for path in sorted(paths - needed):
                for method in ("GET", "POST", "PUT", "DELETE"):
                    answer = client.request(method, path, headers=cookie)
                    is_needed = any(path.startswith(p) for p in needed if p[-1] == "/" and p != "/")
                    assert answer.status_code == 404 or is_needed, (method, path)
        with socket.create_connection(("127.0.0.1", port)) as plain:
            plain.sendall(f"GET / HTTP/1.0\r\nCookie: {cookie['cookie']}\r\n\r\n".encode())
            assert b" 401 " in plain.recv(100)  # without a host


@pytest.mark.slow
@pytest.mark.process
def test_a_port_in_use(table, run_script):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run_script(SCRIPT, "--input", table, "--port", taken.getsockname()[1])
    assert done.returncode == 2 and "--port" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


def take_picture(path: Path) -> None:
    """Save the picture of the README: the page in the middle of a ranking."""
    prompt = "Write a story about an AI that learns to garden."
    answers = [
        "Ada had never touched soil. She had sensors for it, twelve of them, and a camera over the "
        "tomato bed. In the first week she watered too much. In the second she asked the "
        "neighbour, and learned to wait.\n\nBy June she had tomatoes.",
        "An AI is a computer program. Gardens have plants. The AI gardened the plants and the "
        "plants were gardened. The end.",
        "Once upon a time there was a robot called Bloom. It planted a seed every day and told "
        "each one its name. When the first leaf came up, Bloom did not know which name to say, so "
        "it said all of them.",
        "As an AI I do not have a garden. Here are 5 tips for gardening: 1. Water. 2. Sun. 3. "
        "Soil. 4. Seeds. 5.",
    ]
    rows = [RankedResponse(f"Done {k}", text, 1, "Ann") for k in range(14) for text in "ab"]
    rows += [RankedResponse(prompt, text) for text in answers]
    rows += [RankedResponse(f"Open {k}", text) for k in range(25) for text in "ab"]
    with tempfile.TemporaryDirectory() as folder:
        write_answers(Path(folder) / "answers.csv", rows)
        port = free_port()
        with (
            browser(Path(folder) / "profile", 1200, 900) as driver,
            server(port, "--input", "answers.csv", "--ranker", "Ann", cwd=Path(folder)),
        ):
            page = Page(driver)
            driver.get(printed_address(Path(folder)))
            page.see("14 of 40")
            page.press("12")
            page.see("2 to go")
            driver.save_screenshot(str(path))


if __name__ == "__main__":
    take_picture(ROOT / "docs/images/ranking_page.png")
