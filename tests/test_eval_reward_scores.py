"""Runs of evaluation/eval_reward_scores.py and eval_judge.py, checked against the kept answers."""

import itertools
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from common.files import write_records
from common.identity import rows_hash
from evaluation import eval_judge, eval_reward_scores
from evaluation.eval_reward_scores import training_pairs
from lm.policy import Policy
from lm.prompting import PLAIN_TEMPLATE
from reasoning.problems import corrupted, stories
from reasoning.records import PreferencePair, Problem, ScoredPair
from reasoning.splits import is_kept_out
from reasoning.steps import shared_prefix
from tests.helpers import scripts
from tests.helpers.gguf_judges import export_judge
from tests.helpers.mains import call_main
from tests.helpers.training import taught

SCRIPT = "evaluation/eval_reward_scores.py"
NAME = "reward_score_comparison"
COUNT, WRONG = 8, 4  # short problems, and how many of them the base was taught wrongly
MEASURES = ("reward", "reward_min", "accuracy", "step_accuracy", "unfinished", "steps")

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def world(tiny_model_dir, tmp_path_factory) -> dict:
    """Eight problems that `tuned` solves and `base` half solves, a ninth too long for the judge."""
    folder = tmp_path_factory.mktemp("world")
    rng = random.Random(0)
    short = (story for story in stories("test") if len(story.events) == 2)
    chosen_stories = list(itertools.islice(short, COUNT))
    problems = [story.problem() for story in chosen_stories]
    wrong = [(problems[k].prompt, corrupted(chosen_stories[k], rng)) for k in range(WRONG)]
    right = [(problem.prompt, problem.steps) for problem in problems]
    long = Problem(problems[0].prompt + " She waits." * 40, problems[0].answer, problems[0].steps)
    write_records(folder / "problems.jsonl", [*problems, long])
    pairs = []
    for story in itertools.islice(stories("train"), 60):
        chosen, rejected = story.problem().steps, corrupted(story, rng)
        k = shared_prefix(chosen, rejected)
        pairs.append(PreferencePair(story.prompt(), chosen[k:], rejected[k:], chosen[:k]))
    write_records(folder / "pairs.jsonl", pairs)
    return {
        "base": taught(tiny_model_dir, folder / "base", wrong + right[WRONG:]),
        "tuned": taught(tiny_model_dir, folder / "tuned", right),
        "judge": export_judge(tiny_model_dir, folder, context=200),
        "input": str(folder / "problems.jsonl"),
        "problems": problems,
        "pairs": str(folder / "pairs.jsonl"),
        "kept_out": [pair for pair in pairs if is_kept_out(pair.prompt)],
    }


def flags(world: dict, folder: Path, **changes: object) -> list[str]:
    given = {"base_model": world["base"], "tuned_model": world["tuned"]}
    given |= {name: world[name] for name in ("input", "pairs")}
    given |= {"judge_path": world["judge"], "output_dir": folder / "results"}
    given |= {"max_new_tokens": 80} | changes
    return [
        part
        for name, value in given.items()
        if value is not None
        for part in (f"--{name}", str(value))
    ]


def read_outputs(folder: Path) -> tuple[dict, list[dict]]:
    """The result and the rows of a run."""
    rows = (folder / f"{NAME}.jsonl").read_text().splitlines()
    return json.loads((folder / f"{NAME}.json").read_text()), [json.loads(row) for row in rows]


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """Run the script's main in this process: (exit code, stdout, stderr)."""
    return lambda *args: call_main(
        eval_reward_scores.main, *args, monkeypatch=monkeypatch, capsys=capsys
    )


@pytest.fixture(scope="module")
def comparison(world, tmp_path_factory) -> dict:
    """One run over everything: what it printed and what it wrote."""
    folder = tmp_path_factory.mktemp("comparison")
    arguments = flags(world, folder, output_dir="results")
    process = scripts.run_script(SCRIPT, *arguments, cwd=folder)
    assert process.returncode == 0, process.stderr
    result, rows = read_outputs(folder / "results")
    return {"folder": folder, "stdout": process.stdout, "result": result, "rows": rows}


def test_numbers_are_those_of_the_kept_answers(world, comparison):
    rows, metrics = comparison["rows"], comparison["result"]["metrics"]
    assert len(rows) == COUNT + 1
    assert [row["prompt"] for row in rows[:COUNT]] == [p.prompt for p in world["problems"]]
    expected = {}
    for side in ("base", "tuned"):
        measures = {name: [] for name in MEASURES}
        for row, problem in zip(rows[:COUNT], world["problems"], strict=True):
            steps, scores = row[f"{side}_steps"], row[f"{side}_scores"]
            assert len(steps) == len(scores) and all(0 <= score <= 1 for score in scores)
            right = next(
                (k for k, (a, b) in enumerate(zip(steps, problem.steps, strict=False)) if a != b),
                min(len(steps), len(problem.steps)),
            )
            measures["reward"].append(np.mean(scores))
            measures["reward_min"].append(min(scores))
            measures["accuracy"].append(steps[-1] == f"Answer: {problem.answer}")
            measures["step_accuracy"].append(right / max(len(steps), len(problem.steps)))
            measures["unfinished"].append(not row[f"{side}_finished"])
            measures["steps"].append(len(steps))
        expected |= {f"{side}_{name}": np.mean(values) for name, values in measures.items()}
    for name, value in expected.items():
        assert metrics[name]["value"] == pytest.approx(value, abs=1e-9), name
        assert metrics[name]["n"] == COUNT
    for name in MEASURES:
        difference = expected[f"tuned_{name}"] - expected[f"base_{name}"]
        assert metrics[f"{name}_improvement"]["value"] == pytest.approx(difference, abs=1e-9)
    assert metrics["tuned_accuracy"]["value"] == metrics["tuned_step_accuracy"]["value"] == 1
    assert metrics["base_accuracy"]["value"] == pytest.approx((COUNT - WRONG) / COUNT)
    low, high = metrics["accuracy_improvement"]["ci95"]
    assert 0 < low < WRONG / COUNT < high < 1


def test_log_prob_margins_are_those_of_the_models(world, comparison):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert 0 < len(world["kept_out"]) < 60
    for side in ("base", "tuned"):
        tokenizer = AutoTokenizer.from_pretrained(world[side])
        model = AutoModelForCausalLM.from_pretrained(world[side])

        def mean_logp(pair, steps, tokenizer=tokenizer, model=model):
            prefix = "".join(step + "\n" for step in pair.prefix)
            before = PLAIN_TEMPLATE.format(prompt=pair.prompt) + prefix
            ids = tokenizer(before + "\n".join(steps))["input_ids"]
            ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
            start = len(tokenizer(before)["input_ids"])
            with torch.inference_mode():
                logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            return logps[start - 1 :].mean().item()

        margins = [
            mean_logp(pair, pair.chosen) - mean_logp(pair, pair.rejected)
            for pair in world["kept_out"]
        ]
        metric = comparison["result"]["metrics"][f"{side}_logp_margin"]
        assert metric["value"] == pytest.approx(np.mean(margins), abs=1e-4)
        assert metric["n"] == len(margins)


def test_result_file_has_every_key(world, comparison):
    result = comparison["result"]
    metrics = result["metrics"]
    assert result["base_avg_score_diff"] == metrics["base_reward"]["value"]
    assert result["tuned_avg_score_diff"] == metrics["tuned_reward"]["value"]
    assert result["improvement"] == pytest.approx(
        result["tuned_avg_score_diff"] - result["base_avg_score_diff"]
    )
    assert result["num_examples"] == COUNT and result["left_out"] == 1 and result["seeds"] == [0]
    assert result["config"]["base_model"] == world["base"] and {"commit", "versions"} <= set(result)
    for name, metric in metrics.items():
        assert metric["ci95"][0] <= metric["value"] <= metric["ci95"][1], name


def test_a_problem_too_long_for_the_judge_is_left_out_for_both_with_a_message(comparison):
    assert not {"base_scores", "tuned_scores"} & comparison["rows"][COUNT].keys()
    assert "1 of 9 problems left out for both" in comparison["stdout"]


def test_table_and_files(comparison):
    lines = comparison["stdout"].splitlines()
    header = next(line for line in lines if "difference" in line).split("|")[1:-1]
    columns = ["metric", "base", "tuned", "difference", "n"]
    assert [cell.strip() for cell in header] == columns
    assert sum(line.startswith("| ") for line in lines) == 8  # header and seven metrics
    assert "wrote " in lines[-1] and f"{NAME}.json" in lines[-1]
    folder = comparison["folder"]
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")) == [
        f"results/{NAME}.{end}" for end in ("json", "jsonl", "png")
    ]


def test_limit_seed_and_no_references(world, comparison, evaluate, tmp_path):
    """The first three problems without references have the same scores, but no step_accuracy."""
    bare = [{"prompt": p.prompt, "answer": p.answer} for p in world["problems"]]
    write_records(tmp_path / "bare.jsonl.gz", bare)
    pairs = [json.loads(line) for line in Path(world["pairs"]).read_text().splitlines()]
    trained_on = [pair for pair in pairs if not is_kept_out(pair["prompt"])]
    write_records(tmp_path / "no_kept_out.jsonl", trained_on)
    changes = {"input": tmp_path / "bare.jsonl.gz", "pairs": tmp_path / "no_kept_out.jsonl"}
    code, out, err = evaluate(*flags(world, tmp_path, **changes, limit=3, seed=7))
    assert code == 0, err
    result, rows = read_outputs(tmp_path / "results")
    full_rows = comparison["rows"][:3]
    assert [row["tuned_steps"] for row in rows] == [row["tuned_steps"] for row in full_rows]
    scores, full_scores = (
        np.concatenate([row["tuned_scores"] for row in some]) for some in (rows, full_rows)
    )
    assert scores == pytest.approx(full_scores, abs=1e-6)
    assert result["seeds"] == [7] and result["num_examples"] == 3
    assert not {"base_step_accuracy", "base_logp_margin"} & result["metrics"].keys()
    assert "none of the pairs kept out" in out


def test_the_exact_judge_and_its_shuffled_control(world, evaluate, tmp_path):
    """Exact scores are 1 for tuned and lower for base; shuffled scores hardly differ."""
    found = {}
    for judge in ({"judge": "exact"}, {"judge": "shuffled", "shuffled_judge": "exact"}):
        changes = judge | {"judge_path": None, "judge_problems": world["input"], "limit": COUNT}
        folder = tmp_path / judge["judge"]
        code, _, err = evaluate(*flags(world, folder, **changes))
        assert code == 0, err
        found[judge["judge"]] = read_outputs(folder / "results")[0]["metrics"]
    assert found["exact"]["tuned_reward"]["value"] == 1 > found["exact"]["base_reward"]["value"]
    improvement = {name: metrics["reward_improvement"]["value"] for name, metrics in found.items()}
    assert abs(improvement["shuffled"]) < improvement["exact"] / 2
    assert found["shuffled"]["accuracy_improvement"] == found["exact"]["accuracy_improvement"]


ROW = '{"prompt": "Mia has 2 cups.", "answer": "2", "steps": ["Answer: 2"]}\n'
BROKEN = {
    "empty.jsonl": ("", "no rows"),
    "json.jsonl": (ROW + "{", ":2: not JSON"),
    "field.jsonl": (ROW + '{"prompt": "Mia"}', "field 'answer' is missing"),
    "list.jsonl": ("[1]", "expected a JSON object"),
    "latin.jsonl": (ROW.replace("Mia", "M\xed\xe1").encode("latin-1"), "not UTF-8"),
    "step.jsonl": (ROW.replace('["', '["", "'), "field 'steps', step 1"),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tuned_model": "none"}, "model directory none not found"),
        ({"base_model": "DIR"}, "no model directory"),
        ({"judge_path": "none.gguf"}, "none.gguf not found"),
        ({"judge_path": "DIR/json.jsonl"}, "json.jsonl"),
        ({"input": "none.jsonl"}, "none.jsonl not found"),
        ({"pairs": "DIR/pairs.jsonl"}, "chosen_scores"),
        ({"output_dir": "DIR/json.jsonl/results"}, "cannot be written"),
        ({"limit": 0}, "--limit: expected 1 or more"),
        ({"limit": "x"}, "--limit"),
        ({"unknown": 1}, "unknown argument --unknown"),
        *[({"input": f"DIR/{name}"}, message) for name, (_, message) in BROKEN.items()],
    ],
)
def test_bad_input_is_one_line(world, evaluate, tmp_path, change, message):
    for name, (content, _) in BROKEN.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    pair = {"prompt": "p", "chosen": ["a"], "rejected": ["b"], "chosen_scores": [2]}
    write_records(tmp_path / "pairs.jsonl", [pair | {"rejected_scores": [0]}])
    before = sorted(path.name for path in tmp_path.iterdir())
    change = {name: str(value).replace("DIR", str(tmp_path)) for name, value in change.items()}
    code, _, err = evaluate(*flags(world, tmp_path, **change))
    assert code == 2 and len(err.splitlines()) == 1 and message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_judge_against_exact_labels(world, tmp_path, monkeypatch, capsys):
    arguments = ["--judge_path", world["judge"], "--model_name_or_path", world["base"]]
    arguments += ["--input", world["input"], "--output_dir", tmp_path / "results"]
    arguments += ["--limit", COUNT, "--max_new_tokens", 80]
    code, out, err = call_main(eval_judge.main, *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0, err
    result = json.loads((tmp_path / "results" / "judge_judge.json").read_text())
    for name in ("step_auroc", "decision_accuracy"):
        metric = result["metrics"][name]
        assert 0 <= metric["ci95"][0] <= metric["value"] <= metric["ci95"][1] <= 1
    assert 0 < result["right_steps"] < 1 and "step_auroc" in out


# --- the pairs of the margin


def trained_on(folder: Path, file: Path, **changes: object) -> str:
    """A model folder with the job file of a training on these pairs."""
    rows = [ScoredPair.from_row(json.loads(line)) for line in file.read_text().splitlines()]
    trained = [row for row in rows if not is_kept_out(row.prompt)][:20]
    job = {"command": "dpo", "dataset": str(file), "pairs": len(trained)}
    folder.mkdir(exist_ok=True)
    job = {**job, "pairs_sha256": rows_hash(trained), **changes}
    (folder / "training_job.json").write_text(json.dumps(job))
    return str(folder)


@pytest.fixture
def scored(world, tmp_path) -> Path:
    """The pairs of the world with scores, as a training reads them."""
    rows = [json.loads(line) for line in Path(world["pairs"]).read_text().splitlines()]
    for row in rows:
        row |= {f"{side}_scores": [0.5] * len(row[side]) for side in ("chosen", "rejected")}
    write_records(tmp_path / "scored.jsonl", rows)
    return tmp_path / "scored.jsonl"


def test_the_pairs_are_those_of_the_models_own_training(world, scored, tmp_path, monkeypatch):
    path, pairs, missing = training_pairs(trained_on(tmp_path / "m", scored))
    assert (os.path.realpath(path), len(pairs), missing) == (str(scored), 60, "")
    monkeypatch.chdir(tmp_path)
    model = trained_on(tmp_path / "m", scored, dataset="scored.jsonl")
    assert training_pairs(model)[0] == "scored.jsonl"
    for changes, reason in (
        ({"pairs_sha256": "0" * 64}, "has changed"),
        ({"pairs": 19}, "has changed"),
        ({"dataset": "nowhere.jsonl"}, "is not there any more"),
        ({"dataset": world["pairs"]}, "has changed"),  # without scores: not what was trained on
        ({"pairs": None, "solutions": 20}, "has changed"),
    ):
        path, pairs, missing = training_pairs(trained_on(tmp_path / "m", scored, **changes))
        assert path is None and not pairs and reason in missing, (changes, missing)
    for content in ("{", "[]", "{}", '"x"'):
        (tmp_path / "m/training_job.json").write_text(content)
        assert "no training_job.json" in training_pairs(str(tmp_path / "m"))[2]
    assert "no training_job.json" in training_pairs("org/name")[2]


def test_another_policy_is_not_measured_on_the_miniatures_pairs(
    world, scored, evaluate, tmp_path, monkeypatch
):
    """Without pairs of its own it computes no log-probs; with them the margin is there."""
    read = []
    logps = Policy.logps

    def noted(self, rows, progress=None):
        read.append(rows)
        return logps(self, rows, progress)

    monkeypatch.setattr(Policy, "logps", noted)
    model = Path(shutil.copytree(world["tuned"], tmp_path / "tuned"))
    changes = {"tuned_model": model, "pairs": None, "limit": 2}
    code, out, err = evaluate(*flags(world, tmp_path, **changes))
    assert code == 0, err
    assert not read and f"no logp_margin: {model} has no training_job.json" in out
    metrics = read_outputs(tmp_path / "results")[0]["metrics"]
    assert "tuned_accuracy" in metrics and "tuned_logp_margin" not in metrics
    trained_on(model, scored)
    code, out, err = evaluate(*flags(world, tmp_path, **changes), "--seed", 1, "--overwrite")
    assert code == 0 and "no logp_margin" not in out, err
    result = read_outputs(tmp_path / "results")[0]
    assert result["metrics"]["tuned_logp_margin"]["n"] == len(world["kept_out"]) == len(read[0])
    assert os.path.realpath(result["config"]["pairs"]) == str(scored)


def test_a_policy_that_answers_nothing_right_is_shown(world, evaluate, tmp_path):
    code, out, err = evaluate(*flags(world, tmp_path, base_model=world["tuned"], max_new_tokens=2))
    assert code == 0, err
    assert out.count("no answer is right, or none ended by itself") == 2
    assert "verdict    cut" in out and "--max_new_tokens" in out
