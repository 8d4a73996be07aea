"""utils/demo.py at a tiny size: the whole loop, and nothing but its own folder is touched."""

import shutil

import pytest

from tests.helpers.scripts import ROOT, run_script

pytestmark = [pytest.mark.process, pytest.mark.slow]


def test_the_demo_writes_into_its_own_folder_alone(tmp_path):
    """In a copy of the repository without its history, in which a user has results."""
    ignored = shutil.ignore_patterns(".git", ".venv", "saved_model", "logs", "results")
    repo = shutil.copytree(ROOT, tmp_path / "repo", ignore=ignored)
    own = [repo / "evaluation/results/mine.json", repo / "saved_model/stepwise_dpo_tinyllama/mine"]
    for path in own:
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    before = {path for path in repo.rglob("*") if "__pycache__" not in path.parts}
    sizes = ("--problems", 40, "--test_problems", 8)
    done = run_script(repo / "utils/demo.py", *sizes, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "| accuracy" in done.stdout and "5/6 Answer: the tuned model" in done.stdout
    page = repo / "data/demo/results/report.html"
    assert page.is_file() and done.stdout.splitlines()[-1].endswith(str(page))
    new = {path for path in repo.rglob("*") if "__pycache__" not in path.parts} - before
    assert all(path.is_relative_to(repo / "data/demo") for path in new), new
    assert (repo / "data/demo/results/reward_score_comparison.json").is_file()
    assert [path.read_text() for path in own] == ["mine", "mine"]
