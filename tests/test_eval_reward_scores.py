"""Real runs of evaluation/eval_reward_scores.py and eval_judge.py; their numbers are computed again from the answers they keep."""

import itertools
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from common.files import write_records
from lm.text_encoding import PLAIN_TEMPLATE
from reasoning.problems import corrupted, stories
from reasoning.records import PreferencePair, Problem
from reasoning.splits import is_kept_out
from reasoning.steps import shared_prefix

SCRIPT = "evaluation/eval_reward_scores.py"
COUNT, WRONG = 8, 4  # short problems, and how many of them the base was taught wrongly


def teach(model_dir: str, folder: Path, solutions: list[tuple[str, list[str]]]) -> str:
    """A copy of a tiny model that knows these solutions by heart (seconds)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="right")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    texts = [
        PLAIN_TEMPLATE.format(prompt=prompt) + "\n".join(steps) + "</s>"
        for prompt, steps in solutions
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, (prompt, _) in zip(labels, solutions, strict=True):
        row[: len(tokenizer(PLAIN_TEMPLATE.format(prompt=prompt))["input_ids"])] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    return str(folder)


def export_judge(model_dir: str, folder: Path, context: int) -> str:
    """A GGUF judge with random weights and a context of its own."""
    from lm.gguf_export import export_gguf

    shutil.copytree(model_dir, folder / "judge")
    config = json.loads((folder / "judge" / "config.json").read_text())
    (folder / "judge" / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": context})
    )
    export_gguf(folder / "judge", folder / "judge.gguf", "Q8_0")
    return str(folder / "judge.gguf")


@pytest.fixture(scope="module")
def world(tiny_model_dir, tmp_path_factory) -> dict:
    """Eight problems that `tuned` solves and `base` half solves, a ninth too long for the judge, pairs, and a judge."""
    folder = tmp_path_factory.mktemp("world")
    rng = random.Random(0)
    told = list(
        itertools.islice((story for story in stories("test") if len(story.events) == 2), COUNT)
    )
    problems = [story.problem() for story in told]
    wrong = [(problems[k].prompt, corrupted(told[k], rng)) for k in range(WRONG)]
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
        "base": teach(tiny_model_dir, folder / "base", wrong + right[WRONG:]),
        "tuned": teach(tiny_model_dir, folder / "tuned", right),
        "judge": export_judge(tiny_model_dir, folder, context=200),
        "input": str(folder / "problems.jsonl"),
        "problems": problems,
        "pairs": str(folder / "pairs.jsonl"),
        "kept_out": [pair for pair in pairs if is_kept_out(pair.prompt)],
    }


def flags(world: dict, **changes: object) -> list[str]:
    given = {name: world[name] for name in ("input", "pairs")}
    given |= {
        "base_model": world["base"],
        "tuned_model": world["tuned"],
        "judge_path": world["judge"],
        "output_dir": "results",
    }
    given |= {"max_new_tokens": 80} | changes
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def comparison(world, tmp_path_factory) -> dict:
    """One run over everything: what it printed and what it wrote."""
    import os
    import subprocess
    import sys

    root = Path(__file__).resolve().parents[1]
    folder = tmp_path_factory.mktemp("comparison")
    command = [sys.executable, str(root / SCRIPT), *flags(world)]
    process = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"COLUMNS": "80"},
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    results = folder / "results"
    return {
        "folder": folder,
        "stdout": process.stdout,
        "result": json.loads((results / "reward_score_comparison.json").read_text()),
        "rows": [
            json.loads(line)
            for line in (results / "reward_score_comparison.jsonl").read_text().splitlines()
        ],
    }


def test_numbers_are_those_of_the_kept_answers(world, comparison):
    rows, metrics = comparison["rows"], comparison["result"]["metrics"]
    assert [row["prompt"] for row in rows[:COUNT]] == [
        problem.prompt for problem in world["problems"]
    ] and len(rows) == COUNT + 1
    expected = {}
    for side in ("base", "tuned"):
        measures = {
            name: []
            for name in ("reward", "reward_min", "accuracy", "step_accuracy", "unfinished", "steps")
        }
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
    for name in ("reward", "reward_min", "accuracy", "step_accuracy", "unfinished", "steps"):
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
        tokenizer, model = (
            AutoTokenizer.from_pretrained(world[side]),
            AutoModelForCausalLM.from_pretrained(world[side]),
        )

        def mean_logp(pair, steps, tokenizer=tokenizer, model=model):
            before = PLAIN_TEMPLATE.format(prompt=pair.prompt) + "".join(
                step + "\n" for step in pair.prefix
            )
            ids = torch.tensor(
                [[*tokenizer(before + "\n".join(steps))["input_ids"], tokenizer.eos_token_id]]
            )
            start = len(tokenizer(before)["input_ids"])
            with torch.inference_mode():
                logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            return logps[start - 1 :].mean().item()

        margins = [
            mean_logp(pair, pair.chosen) - mean_logp(pair, pair.rejected)
            for pair in world["kept_out"]
        ]
        metric = comparison["result"]["metrics"][f"{side}_logp_margin"]
        assert metric["value"] == pytest.approx(np.mean(margins), abs=1e-4) and metric["n"] == len(
            margins
        )


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


def test_a_problem_too_long_for_the_judge_is_left_out_for_both_and_said(comparison):
    assert (
        "base_scores" not in comparison["rows"][COUNT]
        and "tuned_scores" not in comparison["rows"][COUNT]
    )
    assert "1 of 9 problems left out for both" in comparison["stdout"]


def test_table_and_files(comparison):
    lines = comparison["stdout"].splitlines()
    assert [
        cell.strip()
        for cell in next(line for line in lines if "difference" in line).split("|")[1:-1]
    ] == [*("metric", "base", "tuned", "difference", "n")]
    assert sum(line.startswith("| ") for line in lines) == 8  # header and seven metrics
    assert "wrote " in lines[-1] and "reward_score_comparison.json" in lines[-1]
    names = sorted(
        path.relative_to(comparison["folder"]).as_posix()
        for path in comparison["folder"].rglob("*.*")
    )
    assert names == [
        "plots/reward_score_comparison.png",
        *(f"results/reward_score_comparison.{end}" for end in ("json", "jsonl")),
    ]


def test_limit_seed_and_no_references(world, comparison, run_script, tmp_path):
    """The first three problems without references: their scores are those of the full run, and there is no step_accuracy."""
    write_records(
        tmp_path / "bare.jsonl",
        ({"prompt": p.prompt, "answer": p.answer} for p in world["problems"]),
    )
    (tmp_path / "no_kept_out.jsonl").write_text(
        "".join(
            line
            for line in Path(world["pairs"]).read_text().splitlines(True)
            if not is_kept_out(json.loads(line)["prompt"])
        )
    )
    changes = {"input": "bare.jsonl", "pairs": "no_kept_out.jsonl", "limit": 3, "seed": 7}
    process = run_script(SCRIPT, *flags(world, **changes))
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "results" / "reward_score_comparison.json").read_text())
    rows = [
        json.loads(line)
        for line in (tmp_path / "results" / "reward_score_comparison.jsonl")
        .read_text()
        .splitlines()
    ]
    assert [row["tuned_steps"] for row in rows] == [
        row["tuned_steps"] for row in comparison["rows"][:3]
    ]
    scores = np.concatenate([row["tuned_scores"] for row in rows])
    assert scores == pytest.approx(
        np.concatenate([row["tuned_scores"] for row in comparison["rows"][:3]]), abs=1e-6
    )
    assert result["seeds"] == [7] and result["num_examples"] == 3
    assert (
        "base_step_accuracy" not in result["metrics"]
        and "base_logp_margin" not in result["metrics"]
    )
    assert "none of the pairs kept out" in process.stdout


def test_another_judge_and_the_control(world, run_script, tmp_path):
    """The checker gives tuned full marks and base fewer; with its scores permuted over both, little of the difference is left."""
    folder = {
        "input": world["input"],
        "pairs": world["pairs"],
        "base_model": world["base"],
        "tuned_model": world["tuned"],
    }
    exact = folder | {"judge_problems": world["input"], "limit": COUNT, "max_new_tokens": 80}
    found = {}
    for judge in ({"judge": "exact"}, {"judge": "shuffled", "shuffled_judge": "exact"}):
        changes = exact | judge | {"output_dir": judge["judge"]}
        process = run_script(
            SCRIPT, *(part for name, value in changes.items() for part in (f"--{name}", value))
        )
        assert process.returncode == 0, process.stderr
        found[judge["judge"]] = json.loads(
            (tmp_path / judge["judge"] / "reward_score_comparison.json").read_text()
        )["metrics"]
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
        ({"base_model": "."}, "no model directory"),
        ({"judge_path": "none.gguf"}, "none.gguf not found"),
        ({"judge_path": "json.jsonl"}, "json.jsonl"),
        ({"input": "none.jsonl"}, "none.jsonl not found"),
        ({"pairs": "pairs.jsonl"}, "chosen_scores"),
        ({"output_dir": "json.jsonl/results"}, "cannot be written"),
        ({"limit": 0}, "--limit: expected 1 or more"),
        ({"limit": "x"}, "--limit"),
        ({"unknown": 1}, "unknown argument --unknown"),
        *[({"input": name}, message) for name, (_, message) in BROKEN.items()],
    ],
)
def test_bad_input_is_one_line(world, run_script, tmp_path, change, message):
    for name, (content, _) in BROKEN.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "pairs.jsonl").write_text(
        '{"prompt": "p", "chosen": ["a"], "rejected": ["b"], "chosen_scores": [2], "rejected_scores": [0]}'
    )
    before = sorted(path.name for path in tmp_path.iterdir())
    process = run_script(SCRIPT, *flags(world, **change))
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1 and message in process.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_judge_against_exact_labels(world, run_script, tmp_path):
    arguments = [
        "--judge_path",
        world["judge"],
        "--model_name_or_path",
        world["base"],
        "--input",
        world["input"],
    ]
    process = run_script(
        "evaluation/eval_judge.py",
        *arguments,
        "--limit",
        COUNT,
        "--output_dir",
        "results",
        "--max_new_tokens",
        80,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "results" / "judge_judge.json").read_text())
    for name in ("step_auroc", "decision_accuracy"):
        metric = result["metrics"][name]
        assert 0 <= metric["ci95"][0] <= metric["value"] <= metric["ci95"][1] <= 1
    assert 0 < result["right_steps"] < 1 and "step_auroc" in process.stdout
    failed = run_script("evaluation/eval_judge.py", *arguments, "--samples", 0)
    assert failed.returncode == 2 and "--samples: expected 1 or more" in failed.stderr
