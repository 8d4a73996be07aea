"""utils/show_tree.py: the lines, the first errors, and a page that escapes the text of a model."""

import gzip
import re
from html.parser import HTMLParser

import pytest

from common.files import write_records
from search.tree_search import Rollout, Tree, TreeNode
from tests.helpers.mains import call_main
from utils import show_tree
from utils.show_tree import as_page, as_text

SCRIPT = "utils/show_tree.py"
EVIL = "Step 2: <script>alert(1)</script> & more"


@pytest.fixture
def tree() -> Tree:
    """`Step 2: bad` is the first error of the first rollout."""
    good, bad = ("Step 1: good",), ("Step 1: good", "Step 2: bad")
    nodes = [
        TreeNode(
            (),
            [Rollout((*bad, "Answer: 0"), "wrong", 30), Rollout((*good, "Answer: 1"), "right", 20)],
            2,
        ),
        TreeNode(
            good,
            [Rollout(("Answer: 1",), "right", 10), Rollout((EVIL, "Answer: 2"), "wrong", 20)],
            1,
        ),
        TreeNode(bad, [Rollout(("Answer: 0",), "wrong", 10), Rollout(("Answer: 3",), "wrong", 10)]),
    ]
    return Tree("How many\napples?", "omegaprm", "budget", {node.steps: node for node in nodes})


TEXT = """\
omegaprm: 6 rollouts, 100 tokens, 3 states; ended: budget

value   right/all  visits  step
 0.50         1/2       2  How many apples?
 0.50         2/4       1    Step 1: good
 0.00         0/3       0      Step 2: bad   <-- first error
 0.00         0/2       -        Answer: 0
 0.00         0/1       -        Answer: 3
 1.00         2/2       -      Answer: 1
 0.00         0/1       -      Step 2: <script>alert(1)</script> & more   <-- first error, \
here or below
 0.00         0/1       -        Answer: 2"""


def test_text(tree):
    assert as_text(tree) == TEXT


def test_a_terminal_gets_no_control_characters(tree, tmp_path, monkeypatch, capsys):
    tree.nodes[()].rollouts[0] = Rollout(("Step 1: \x1b[2J\u202e", "Answer: 0"), "wrong", 30)
    write_records(tmp_path / "trees.jsonl", [tree.to_row()])
    arguments = ["--trees", tmp_path / "trees.jsonl"]
    code, out, _ = call_main(show_tree.main, *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0 and "Step 1: \\x1b[2J\\u202e" in out and "\x1b" not in out


def test_a_closing_step_can_be_the_first_error():
    root = TreeNode(
        (),
        [
            Rollout(("Step 1", "Answer: 0"), "wrong", 30),
            Rollout(("Step 1", "Answer: 1"), "right", 20),
        ],
    )
    lines = as_text(Tree("?", "per_step", "budget", {(): root})).splitlines()
    assert [line for line in lines if "first error" in line] == [
        " 0.00         0/1       -      Answer: 0   <-- first error"
    ]


class Outline(HTMLParser):
    """The tags of a page, their depth, and its text."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.depth, self.deepest = [], "", 0, 0

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not {name for name, _ in attrs} & {"src", "href"} and not any(
            name.startswith("on") for name, _ in attrs
        )
        if tag == "details":
            self.depth += 1
            self.deepest = max(self.deepest, self.depth)

    def handle_endtag(self, tag):
        self.depth -= tag == "details"

    def handle_data(self, data):
        self.text += data


def test_page_is_self_contained_and_runs_no_text_of_the_model(tree):
    page = Outline()
    page.feed(as_page(tree))
    assert "script" not in page.tags and not {"link", "img", "iframe"} & set(page.tags)
    assert (
        EVIL in page.text
        and "How many apples?" in page.text
        and "first error, here or below" in page.text
    )
    assert (page.tags.count("details"), page.deepest, page.depth) == (4, 3, 0)
    shares = set(re.findall(r"color-mix\(in oklab, #\w+ (\d+%), #\w+\)", as_page(tree)))
    assert shares == {"100%", "50%", "0%"}


@pytest.mark.process
def test_the_script(tree, run_script, tmp_path):
    other = Tree(
        "What is left?",
        "omegaprm",
        "always right",
        {(): TreeNode((), [Rollout(("Answer: 1",), "right", 5)])},
    )
    write_records(
        tmp_path / "trees.jsonl",
        [row.to_row() for row in (other, tree, Tree("Long?", "omegaprm", "prompt too long"))],
    )
    packed = tmp_path / "trees.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "trees.jsonl").read_bytes()))
    for name in ("trees.jsonl", "trees.jsonl.gz"):
        select = ("--trees", name, "--prompt", "apples")
        done = run_script(SCRIPT, *select, "--html", "out/tree.html", "--overwrite")
        assert done.returncode == 0 and done.stdout == TEXT + "\n\nwrote out/tree.html\n"
        assert (tmp_path / "out/tree.html").read_text() == as_page(tree)
    assert run_script(SCRIPT, "--trees", "trees.jsonl", "--index", 1).stdout == TEXT + "\n"
    assert "What is left?" in run_script(SCRIPT, "--trees", "trees.jsonl").stdout

    for args, message in [
        (["--trees", "trees.jsonl", "--index", "3"], "holds 3 trees, none at --index 3"),
        (["--trees", "trees.jsonl", "--prompt", "pears"], "holds 0 trees of problems with 'pears'"),
        (["--trees", "trees.jsonl", "--index", "-1"], "--index: expected 0 or more"),
        (["--trees", "trees.jsonl", "--index", "2"], "was not searched (prompt too long)"),
        (["--trees", "trees.jsonl", "--html", "out/tree.html"], "--overwrite"),
        (["--trees", "nowhere.jsonl"], "nowhere.jsonl not found"),
        (["--trees", "out/tree.html"], "out/tree.html:1: not JSON"),
    ]:
        done = run_script(SCRIPT, *args)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, (
            done.stderr
        )


def test_a_tree_that_is_too_deep_is_one_line(run_script, tmp_path):
    steps = tuple(f"Step {k}: 1" for k in range(1500))
    root = TreeNode((), [Rollout(steps, "right", 9)], 1)
    write_records(tmp_path / "trees.jsonl", [Tree("q", "omegaprm", "budget", {(): root}).to_row()])
    done = run_script(SCRIPT, "--trees", "trees.jsonl")
    assert done.returncode == 2 and "trees.jsonl: this tree has a solution of 1500" in done.stderr
