"""README.md, CONTRIBUTING.md, CHANGELOG.md, docs/*.md: form, links, paths, commands, flags."""

import json
import os
import re
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.helpers.scripts import run_script

PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
PAGES += sorted((ROOT / "docs").glob("*.md"))
# what scripts write: named in the pages, absent from a fresh clone
GENERATED = (
    *("saved_model/", "logs/", "evaluation/results", "docs/_build", "walk/"),
    *(
        "data/demo",
        "data/compare/",
        "data/rounds_",
        "data/tinyllama/",
        "data/mcts_values.jsonl",
        "data/step_pairs",
    ),
    *("data/mine", "data/prepared", "data/step_labels.jsonl", "models/smollm2-135m-instruct"),
)
WRITTEN = {"log.json", "training.png", "training_job.json", "search.jsonl"}
WRITTEN |= {"adapter_config.json", "config.json"}
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()}
FLAG = re.compile(r"(?<![\w-])--([A-Za-z][\w-]*)")
REMOVED = re.compile(r"`[^`]*` \([^)]*(?:option|script) since removed\)")

# `0.925 [0.914, 0.936]`, the value perhaps in bold
FIGURE = re.compile(r"(-?\d+\.\d+)\**\s*\[(-?\d+\.\d+), (-?\d+\.\d+)\]")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def blocks(text: str) -> tuple[list[str], list[str]]:
    """(lines of prose, code blocks); tables and comments are neither."""
    prose, code, fence, previous = [], [], "", ""
    for line in re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL).splitlines():
        if fence:
            if line.strip() == fence:
                fence = ""
            else:
                code[-1] += line + "\n"
        elif opened := re.match(r"\s*(```+|:::+)", line):
            fence = opened[1]
            code.append("")
        elif line.startswith("    ") and (not previous.strip() or previous.startswith("    ")):
            if not previous.startswith("    "):
                code.append("")
            code[-1] += line.strip() + "\n"
        elif not line.startswith("|"):
            prose.append(line)
        previous = line
    return prose, code


def spans(prose: list[str]) -> list[str]:
    """The texts in backticks; one may go over a line break."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", "\n".join(prose))]


@every_page
def test_one_sentence_a_line_of_at_most_120_characters(page):
    for line in blocks(page.read_text(encoding="utf-8"))[0]:
        if line.startswith(("#", "[", "![")):
            continue
        assert len(line) <= 120, line
        text = re.sub(r"`[^`]*`", "X", re.sub(r"^\s*(?:[-*]|\d+\.) ", "", line))
        assert not re.search(r"(?<!et al)(?<!e\.g)(?<!i\.e)[.!?][\"')]* +[A-Z\"(\[]", text), line


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


@every_page
def test_relative_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http:", "https:", "mailto:", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


@cache
def file_names() -> set[str]:
    names = set()
    for _, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names.update(files)
    return names


@every_page
def test_paths_in_backticks_exist(page):
    text = REMOVED.sub("", page.read_text(encoding="utf-8"))
    for span in spans(text.splitlines()):
        path = re.sub(r"::.*|:\d+$", "", span)
        if not re.fullmatch(r"[\w.*/-]+", path) or path.startswith(GENERATED):
            continue
        if "/" in path and path.split("/")[0] in FOLDERS:
            found = any(ROOT.glob(path.rstrip("/"))) if "*" in path else (ROOT / path).exists()
            assert found, f"{page.name}: `{span}` does not exist"
        elif re.fullmatch(r"[\w.-]+\.(py|md|ya?ml|toml|txt|jsonl?|csv|cff|css|js|png)", path):
            assert path in file_names() | WRITTEN, f"{page.name}: `{span}` does not exist"


@cache
def flags_of(script: str, command: str = "") -> frozenset[str]:
    """The flags that `--help` of a script names."""
    done = run_script(script, *command.split(), "--help", cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr
    return frozenset(FLAG.findall(done.stdout)) | {"help", "config"}


def commands(page: Path) -> list[str]:
    """All `python X.py ...` of a page, each on one line, without the options since removed."""
    prose, code = blocks(REMOVED.sub("", page.read_text(encoding="utf-8")))
    lines = [line for block in code for line in block.replace("\\\n", " ").splitlines()]
    lines = [re.sub(r"\s+#.*", "", line) for line in lines] + spans(prose)
    found = re.findall(r"\bpython (\S+\.py(?:(?! &&|\bpython ).)*)", "\n".join(lines))
    return [command.replace("$REPO/", "") for command in found]


@pytest.mark.process
@every_page
def test_commands_name_scripts_and_flags_that_exist(page):
    for command in commands(page):
        script, *words = command.split()
        assert (ROOT / script).is_file(), f"{page.name}: python {command}"
        if given := set(FLAG.findall(command)):
            named = words[0] if words[0].isalpha() else "dpo" * (script == "train.py")
            unknown = given - flags_of(script, named)
            assert not unknown, f"{page.name}: python {command}: no {sorted(unknown)}"


def figures_of_results() -> set[tuple[str, ...]]:
    """(value, low, high) of every metric with an interval, with two and with three digits.

    Besides the result files, model cards are results: the scripts that make models write them."""
    found = set()
    for path in (ROOT / "docs/results").glob("**/*.json"):
        result = json.loads(path.read_text("utf-8"))
        figures = [(m["value"], *(m["ci95"] or ())) for m in result.get("metrics", {}).values()]
        figures += [(c["difference"], *c["ci95"]) for c in result.get("contrasts", [])]
        for numbers in figures:
            found |= {tuple(f"{number:.{digits}f}" for number in numbers) for digits in (2, 3)}
    for card in (ROOT / "models").glob("*/README.md"):
        found |= {match.groups() for match in FIGURE.finditer(card.read_text("utf-8"))}
    return found


@every_page
def test_figures_with_intervals_stand_in_a_result(page):
    if page.name == "LOG.md":
        return  # it also has what was measured before
    known = figures_of_results()
    figures = [match.groups() for match in FIGURE.finditer(page.read_text("utf-8"))]
    missing = [figure for figure in figures if figure not in known]
    # figures from before results were kept as files; each is gone when its experiment runs again
    unfiled = {"pipeline.md": 3, "reward_model.md": 2, "step_values_and_prm.md": 16}
    assert len(missing) <= unfiled.get(page.name, 0), missing


@pytest.mark.process
def test_the_results_page_is_up_to_date():
    done = run_script("docs/make_results.py", "--check", cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr
