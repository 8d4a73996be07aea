"""The script reward_model/score_responses.py: its commands and their files."""

import csv
import gzip
import io
import json
import sys
from pathlib import Path

import pytest

from common.cli import run
from common.errors import RecordError, UserError
from common.files import read_rows, write_records
from reasoning.datasets.ranking import RankedResponse, write_answers
from reasoning.problems import problems
from reward_model import score_responses
from reward_model.response_reward_model import ResponseRewardModel
from tests.helpers.mains import call_main
from tests.helpers.reward_models import make_llama

TEXTS = [
    "Step 1: 1 + 1 = 2\nAnswer: 2",
    "Step 1: 1 + 1 = 3\nAnswer: 3",
    'A "quoted", <b>text</b>;\nof lines',
]
ROWS = [{"prompt": prompt, "answer": text} for prompt in ("1 + 1?", "Count; me") for text in TEXTS]


@pytest.fixture(scope="module")
def scorer(tiny_model_dir, tmp_path_factory) -> str:
    return make_llama(tiny_model_dir, tmp_path_factory.mktemp("reward") / "scorer")


@pytest.fixture(scope="module")
def scores(scorer) -> list[float]:
    responses = [(row["prompt"], row["answer"]) for row in ROWS]
    return ResponseRewardModel(scorer, device="cpu").score(responses)


def run_here(folder: Path, monkeypatch, scorer: str, command: str, *args: object) -> None:
    monkeypatch.chdir(folder)
    argv = ["score_responses.py", command, "--scorer", scorer, *map(str, args)]
    monkeypatch.setattr(sys, "argv", argv)
    score_responses.main()


@pytest.mark.process
def test_help_lists_the_commands_and_their_arguments(run_script, monkeypatch, capsys):
    def output(*args):
        return call_main(score_responses.main, *args, monkeypatch=monkeypatch, capsys=capsys)[1]

    text = run_script("reward_model/score_responses.py").stdout
    assert text == output() == output("--help")
    assert all(f"  {command}" in text for command in score_responses.COMMANDS)
    assert "--threshold" in output("filter", "--help")
    text = " ".join(output("pairs", "--help").split())
    assert "--threshold" not in text and "--scorer" in text and "best response" in text


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_gets_a_column_and_keeps_the_others(
    tmp_path, monkeypatch, scorer, scores, delimiter
):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["id", "prompt", "answer"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows({"id": k, **row} for k, row in enumerate(ROWS))
    (tmp_path / "in.csv").write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())
    run_here(tmp_path, monkeypatch, scorer, "score", "--input", "in.csv", "--output", "out.csv")
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file, delimiter=delimiter))
    assert [{name: row[name] for name in ("prompt", "answer")} for row in found] == ROWS
    assert [row["id"] for row in found] == [str(k) for k in range(6)]
    assert [float(row["score"]) for row in found] == pytest.approx(scores, abs=2e-6)
    # a scored table is an input as well
    run_here(tmp_path, monkeypatch, scorer, "filter", "--input", "out.csv", "--output", "best.csv")
    with open(tmp_path / "best.csv", newline="", encoding="utf-8") as file:
        best = [int(row["id"]) for row in csv.DictReader(file, delimiter=delimiter)]
    assert best == [max(range(3), key=scores.__getitem__), max(range(3, 6), key=scores.__getitem__)]


def test_rows_of_json_and_answers_in_steps(tmp_path, monkeypatch, scorer, scores):
    rows = [
        {"prompt": row["prompt"], "steps": row["answer"].split("\n"), "finished": True}
        for row in ROWS[:2]
    ]
    rows += [{"prompt": row["prompt"], "response": row["answer"]} for row in ROWS[2:]]
    write_records(tmp_path / "in.jsonl", rows)
    run_here(tmp_path, monkeypatch, scorer, "score", "--input", "in.jsonl", "--output", "out.jsonl")
    found = [row for _, row in read_rows(tmp_path / "out.jsonl")]
    assert [row.pop("score") for row in found] == pytest.approx(scores, abs=2e-6) and found == rows
    threshold = sorted(scores)[3]
    options = ["--input", "in.jsonl", "--output", "over.jsonl", f"--threshold={threshold - 1e-5}"]
    run_here(tmp_path, monkeypatch, scorer, "filter", *options)
    found = [row["score"] for _, row in read_rows(tmp_path / "over.jsonl")]
    assert len(found) == 3 and min(found) >= threshold - 1e-4


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_compressed_files(tmp_path, monkeypatch, scorer, suffix):
    """A compressed input gives the same rows; an output is compressed if its name ends in .gz."""
    if suffix == "csv":
        write_answers(tmp_path / "in.csv", [RankedResponse(**row) for row in ROWS])
    else:
        write_records(tmp_path / "in.jsonl", ROWS)
    content = (tmp_path / f"in.{suffix}").read_bytes()
    (tmp_path / f"in.{suffix}.gz").write_bytes(gzip.compress(content))
    commands = {"score": suffix, "filter": suffix, "pairs": "jsonl"}
    for command, kind in commands.items():
        for source, target in ((f"in.{suffix}", "a"), (f"in.{suffix}.gz", "b")):
            output = f"{command}_{target}.{kind}{'.gz' if target == 'b' else ''}"
            files = ("--input", source, "--output", output)
            run_here(tmp_path, monkeypatch, scorer, command, *files)
        compressed = (tmp_path / f"{command}_b.{kind}.gz").read_bytes()
        assert gzip.decompress(compressed) == (tmp_path / f"{command}_a.{kind}").read_bytes()


def test_pairs_are_the_best_against_the_worst(tmp_path, monkeypatch, scorer, scores, capsys):
    rows = [RankedResponse(row["prompt"], row["answer"], split="train") for row in ROWS[:3]]
    rows += [RankedResponse(row["prompt"], row["answer"], split="test") for row in ROWS[3:]]
    rows += [RankedResponse("Alone", "Answer: 1", split="train")]
    write_answers(tmp_path / "in.csv", rows)
    run_here(tmp_path, monkeypatch, scorer, "pairs", "--input", "in.csv", "--output", "pairs.jsonl")
    (pair,) = [row for _, row in read_rows(tmp_path / "pairs.jsonl")]
    best, worst = (choose(range(3), key=scores.__getitem__) for choose in (max, min))
    assert pair["prefix"] + pair["chosen"] == TEXTS[best].split("\n")
    assert pair["prefix"] + pair["rejected"] == TEXTS[worst].split("\n")
    assert {*pair["chosen_scores"]} == {1 - score for score in pair["rejected_scores"]}
    assert pair["chosen_scores"][0] > 0.5
    printed = capsys.readouterr().out
    assert "1 prompts left out: they are not of the split train" in printed
    assert "1 prompts left out: they have one response" in printed


FILES = ["--input", "in.csv", "--output", "x.csv"]
GOOD = "prompt,answer\np,a\n"
MISTAKES = [
    (["score", "--input", "in.csv"], GOOD, "argument --output"),
    (["score", "--output", "x.csv", "--input", "none.csv"], "", "none.csv not found"),
    (["score", *FILES], "question,answer\np,a\n", "in.csv:1: expected a header"),
    (["score", *FILES], "prompt,text\np,a\n", "in.csv:2: expected a field answer"),
    (["score", *FILES], "prompt,answer\np,\n", "in.csv:2: field 'answer': expected a text"),
    (["score", *FILES], "prompt,answer\np,a,b\n", "in.csv:2: 3 cells, the header has 2"),
    (["score", "--input", "in.csv", "--output", "in.csv"], GOOD, "which this run reads"),
    (["pairs", *FILES], GOOD, "expected a .jsonl file"),
    (["rank"], "", "unknown command rank"),
]


@pytest.mark.parametrize(("args", "content", "message"), MISTAKES)
def test_mistakes_are_one_line_and_nothing_is_written(
    tmp_path, monkeypatch, scorer, capsys, args, content, message
):
    (tmp_path / "in.csv").write_text(content)
    with pytest.raises((UserError, RecordError), match=message):
        run_here(tmp_path, monkeypatch, scorer, *args)
    with pytest.raises(SystemExit) as stopped:
        run(score_responses.main)
    assert stopped.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv"]


def test_a_threshold_is_finite(tmp_path, monkeypatch, scorer, capsys):
    (tmp_path / "in.csv").write_text(GOOD)
    with pytest.raises(SystemExit) as stopped:
        run_here(tmp_path, monkeypatch, scorer, "filter", *FILES, "--threshold", "nan")
    assert stopped.value.code == 2
    assert "--threshold: expected a finite number, got nan" in capsys.readouterr().err


def test_held_out_problems_give_no_pairs(tmp_path, monkeypatch, scorer):
    problem = next(problems("test"))
    rows = [{"prompt": problem.prompt, "response": text} for text in TEXTS]
    write_records(tmp_path / "in.jsonl", rows)
    files = ("--input", "in.jsonl", "--output", "pairs.jsonl")
    with pytest.raises(UserError, match="held-out problem"):
        run_here(tmp_path, monkeypatch, scorer, "pairs", *files)


@pytest.mark.slow
def test_dpo_takes_the_pairs(run_script, tmp_path, scorer, tiny_model_dir):
    rows = [{"prompt": f"{k} + 1?", "response": text} for k in range(12) for text in TEXTS]
    write_records(tmp_path / "in.jsonl", rows)
    pairs = ["pairs", "--scorer", scorer, "--input", "in.jsonl", "--output", "pairs.jsonl"]
    dpo = ["dpo", "--dataset_name", "pairs.jsonl", "--loss_type", "sigmoid"]
    dpo += ["--model_name_or_path", tiny_model_dir, "--max_steps", 1, "--bf16", "false"]
    dpo += ["--output_dir", "tuned", "--logs_dir", "logs"]
    for script, *args in (["reward_model/score_responses.py", *pairs], ["train.py", *dpo]):
        done = run_script(script, *args, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
    job = json.loads((tmp_path / "tuned" / "training_job.json").read_text())
    assert job["loss_type"] == ["sigmoid"] and (tmp_path / "tuned" / "model.safetensors").is_file()
