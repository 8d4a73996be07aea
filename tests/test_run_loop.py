"""utils/run_loop.py: the cut of the problems, and the whole loop at a tiny size."""

import json
import shutil

import pytest

from common.errors import UserError
from common.files import read_records, write_records
from reasoning.records import Problem
from tests.helpers.scripts import ROOT
from utils import run_loop

SIZES = {"warm_start": 4, "test": 3, "validation": 2}


def write_problems(path, count: int, steps: int) -> str:
    """`count` problems, of which the first `steps` have steps."""
    problems = [
        Problem(f"What is {'x' * k} + 1?", "1", ["Answer: 1"] if k < steps else [])
        for k in range(count)
    ]
    write_records(path, problems)
    return str(path)


def parts_of(folder) -> dict[str, list[Problem]]:
    return {
        name: list(read_records(folder / f"{name}.jsonl", Problem)) for name in [*SIZES, "train"]
    }


def test_the_parts_of_the_cut_share_no_problem(tmp_path):
    problems = write_problems(tmp_path / "problems.jsonl", 20, steps=8)
    others = write_problems(tmp_path / "others.jsonl", 3, steps=0)
    args = run_loop.LoopArguments(problems=problems, test_problems=[others], **SIZES)
    run_loop.cut(args, tmp_path)
    parts = parts_of(tmp_path)
    prompts = [problem.prompt for part in parts.values() for problem in part]
    assert {name: len(parts[name]) for name in SIZES} == SIZES
    assert len(prompts) == len({*prompts}) == 17  # 20 without the 3 of the other test set
    (other,) = run_loop.test_files(args, tmp_path).values()
    assert not {problem.prompt for problem in read_records(other, Problem)} & {*prompts}
    assert all(problem.steps for problem in parts["warm_start"])
    run_loop.cut(args, tmp_path)
    assert parts_of(tmp_path) == parts


def test_problems_that_differ_only_in_numbers_are_in_the_same_part(tmp_path):
    """Also, none of them is trained on if one of them is in another test set."""
    words = [f"{'x' * k} has 7 apples and 1,200.5 pears." for k in range(12)]
    texts = [text.replace("7", str(n)) for text in words for n in (3, 45, 6.5)]
    paths = tmp_path / "problems.jsonl", tmp_path / "others.jsonl"
    write_records(paths[0], [Problem(text, "1", ["Answer: 1"]) for text in texts])
    write_records(paths[1], [Problem(words[0].replace("7", "99"), "1")])
    args = run_loop.LoopArguments(str(paths[0]), [str(paths[1])], warm_start=4, test=7)
    args.validation = 3
    run_loop.cut(args, tmp_path)
    parts = parts_of(tmp_path)
    wordings = [{run_loop.wording(row.prompt) for row in part} for part in parts.values()]
    assert len(set.union(*wordings)) == sum(map(len, wordings)) == 11
    assert [len(parts[name]) for name in ("warm_start", "test", "validation")] == [4, 7, 3]
    assert len(parts["train"]) % 3 == 0


@pytest.mark.parametrize("count, steps", [(9, 9), (20, 3)])
def test_too_few_problems_are_one_line(tmp_path, count, steps):
    problems = write_problems(tmp_path / "problems.jsonl", count, steps)
    args = run_loop.LoopArguments(problems=problems, **SIZES)
    with pytest.raises(UserError, match=f"{count} problems, {steps} of them with steps"):
        run_loop.cut(args, tmp_path)
    assert not (tmp_path / "train.jsonl").exists()


def test_a_folder_of_other_settings_is_one_line(tmp_path):
    run_loop.Stages(tmp_path, {"seed": 0, "dpo.yaml": "beta: 0.1"}).save()
    run_loop.Stages(tmp_path, {"seed": 0, "dpo.yaml": "beta: 0.1"})
    with pytest.raises(UserError, match=r"other settings is there \(dpo.yaml\)"):
        run_loop.Stages(tmp_path, {"seed": 0, "dpo.yaml": "beta: 0.2"})


@pytest.mark.slow
@pytest.mark.process
def test_the_loop_runs_and_resumes(tmp_path, run_script):
    configs = shutil.copytree(ROOT / "configs/real", tmp_path / "configs")
    search = "strategies: [majority_vote, step_greedy]\nsamples: 2\nn: [2]\ncontrols: []\n"
    (configs / "search.yaml").write_text(search)
    for output, skip, limit in (("problems", 5000, 40), ("others", 6000, 6)):
        path = tmp_path / f"{output}.jsonl"
        flags = ("--split", "train", "--skip", skip, "--limit", limit, "--output", path)
        assert run_script("utils/build_problems.py", *flags).returncode == 0
    command = (
        *("utils/run_loop.py", "--problems", tmp_path / "problems.jsonl"),
        *("--test_problems", tmp_path / "others.jsonl", "--output_dir", tmp_path / "loop"),
        *("--model_name_or_path", ROOT / "models/policy-mini", "--configs", configs),
        *("--warm_start", 12, "--validation", 4, "--test", 6),
    )
    done = run_script(*command, timeout=900)
    assert done.returncode == 0, done.stderr
    stages = json.loads((tmp_path / "loop/stages.json").read_text())
    seconds = stages["seconds"]
    assert len(seconds) == 8 and min(seconds.values()) > 0
    for name in ("test", "test_others"):
        result = tmp_path / f"loop/round_1/compare_{name}/reward_score_comparison.json"
        assert json.loads(result.read_text())["metrics"]["tuned_accuracy"]["n"] == 6
    rivals = ("--loop", tmp_path / "loop", "--output_dir", tmp_path, "--seeds", 1, "--methods")
    done = run_script("benchmarks/real.py", *rivals, "SFT on right samples", timeout=900)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "real.json").read_text())["metrics"]
    for name in ("problems", "others"):
        found = metrics[f"{name}/policy-mini/SFT on right samples/accuracy_improvement"]
        assert found["n"] == 6
    again = run_script(*command)
    assert again.returncode == 0 and again.stdout.count("there already") == 8
    assert json.loads((tmp_path / "loop/stages.json").read_text()) == stages
