"""The pair builder: what makes a pair, what is refused, and that a killed run resumes exactly."""

import gzip
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.cli import run
from common.files import read_records, read_rows, write_records
from reasoning.records import PreferencePair, Problem
from reasoning.samples import Sample
from reward_model.solution_pairs import pair_by_answer, pair_by_judge
from tests.helpers.judges import FixedJudge
from utils.build_synthetic_dataset import main, score_group

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "utils/build_synthetic_dataset.py"
POLICY = str(ROOT / "models/policy-mini")
PROBLEM = Problem("Mia has 2 apples. ...?", "10")
RIGHT = ["Step 1: 2 + 3 = 5", "Step 2: 5 * 2 = 10", "Answer: 10"]
WRONG = ["Step 1: 2 + 3 = 5", "Step 2: 5 + 2 = 7", "Answer: 7"]
EIGHT = [Problem(f"Mia has {k} apples.", str(k), [f"Answer: {k}"]) for k in range(1, 9)]


def test_right_against_wrong_with_the_shared_steps_in_the_prefix():
    pair, _ = pair_by_answer(PROBLEM, [WRONG, RIGHT, WRONG])
    assert pair == PreferencePair(
        PROBLEM.prompt, chosen=RIGHT[1:], rejected=WRONG[1:], prefix=RIGHT[:1]
    )


def test_a_side_that_is_a_prefix_of_the_other_keeps_a_step():
    pair, _ = pair_by_answer(PROBLEM, [RIGHT[:2], RIGHT])
    assert (pair.prefix, pair.chosen, pair.rejected) == (RIGHT[:1], RIGHT[1:], RIGHT[1:2])


@pytest.mark.parametrize(
    ("samples", "why"), [([WRONG], "no right sample"), ([RIGHT, RIGHT], "no wrong sample")]
)
def test_no_pair(samples, why):
    assert pair_by_answer(PROBLEM, samples) == (None, why)


def test_best_against_worst_mean_score():
    scored = [(WRONG, [1, 0.2, 0.1]), (RIGHT, [1, 0.9, 0.8]), (["Answer: 3"], [0.5])]
    pair, _ = pair_by_judge(PROBLEM, scored)
    assert pair.chosen == RIGHT[1:] and pair.rejected == WRONG[1:]
    assert pair_by_judge(PROBLEM, [(RIGHT, [1, 1, 1])] * 2) == (None, "all scores equal")


def test_a_pair_keeps_the_scores_and_says_which_judge_gave_them():
    scored = [(WRONG, [1, 0.2, 0.1]), (RIGHT, [1, 0.9, 0.8])]
    pair, _ = pair_by_judge(PROBLEM, scored, "prm-mini 0f3a")
    assert pair.prefix == RIGHT[:1] and pair.judge == "prm-mini 0f3a"
    assert (pair.chosen_scores, pair.rejected_scores) == ([0.9, 0.8], [0.2, 0.1])
    assert PreferencePair.from_row(vars(pair)) == pair


def test_samples_longer_than_the_judges_context_are_dropped():
    judge = FixedJudge(lambda prompt, step, previous: None if step == "long" else int(step) / 10)
    group, ended = [PROBLEM, PROBLEM], [[["1", "2"], ["long"], ["3"], ["3"]], [["4", "5"]]]
    assert score_group(judge, group, ended) == [
        [(["1", "2"], [0.1, 0.2]), (["3"], [0.3]), (["3"], [0.3])],
        [(["4", "5"], [0.4, 0.5])],
    ]


@pytest.fixture(scope="module")
def half_right(tiny_model_dir, tokenizer, tmp_path_factory) -> tuple[str, str]:
    """(model directory, problems file): a tiny model that gives each of eight problems two answers.

    One of the two is right."""
    import torch
    from transformers import AutoModelForCausalLM

    from lm.text_encoding import encode_steps

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("half")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    texts = [
        encode_steps(tokenizer, problem.prompt, [], [f"Answer: {answer}"])[0]
        for problem in EIGHT
        for answer in (problem.answer, "0")
    ]
    ids = torch.tensor(texts)  # all of one length
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_records(folder / "problems.jsonl", EIGHT * 20)  # repeated problems are used once
    return str(folder / "model"), str(folder / "problems.jsonl")


@pytest.mark.process
def test_the_script(half_right, run_script, tmp_path):
    """Compressed input and output work as plain ones do."""
    model, problems = half_right
    given = ("--model_name_or_path", model, "--max_new_tokens", 30)
    (tmp_path / "problems.jsonl.gz").write_bytes(gzip.compress(Path(problems).read_bytes()))
    for args in (
        ("--input", problems, "--output", "out/pairs.jsonl"),
        ("--input", "problems.jsonl.gz", "--output", "out/pairs.jsonl.gz", "--save_samples"),
    ):
        done = run_script(SCRIPT, *given, *args)
        assert done.returncode == 0, done.stderr
    pairs = list(read_records(tmp_path / "out/pairs.jsonl", PreferencePair))
    assert len(pairs) >= 4 and len({pair.prompt for pair in pairs}) == len(pairs)
    for pair in pairs:
        number = pair.prompt.split()[2]
        assert pair.chosen[-1] == f"Answer: {number}" and pair.rejected[-1] != f"Answer: {number}"
    assert f"wrote {len(pairs)} pairs to out/pairs.jsonl.gz" in done.stdout.splitlines()[-2]
    assert "8 problems, 64 samples" in done.stdout
    assert list(read_records(tmp_path / "out/pairs.jsonl.gz", PreferencePair)) == pairs
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["pairs.jsonl", "pairs.jsonl.gz", "pairs.samples.jsonl"]
    verdicts = [row["verdict"] for _, row in read_rows(tmp_path / "out/pairs.samples.jsonl")]
    assert len(verdicts) == 64 and f"{verdicts.count('right')} samples right" in done.stdout
    assert "wrong" in verdicts

    again = run_script(SCRIPT, *given, *args)
    assert again.returncode == 2 and "--overwrite" in again.stderr


@pytest.mark.process
def test_pairs_by_the_exact_judge_and_by_its_control(half_right, run_script, tmp_path):
    """The exact judge's best sample is right; with shuffled scores it is not always right."""
    write_records(tmp_path / "problems.jsonl", EIGHT)
    given = ("--model_name_or_path", half_right[0], "--input", "problems.jsonl")
    given += ("--max_new_tokens", 30, "--pair_by", "judge", "--judge_problems", "problems.jsonl")
    answers = {problem.prompt: problem.steps[-1] for problem in EIGHT}
    right, made = {}, {}
    for judge in (["exact"], ["shuffled", "--shuffled_judge", "exact"]):
        output = tmp_path / f"{judge[0]}.jsonl"
        more = ("--save_samples",) if judge == ["exact"] else ()
        done = run_script(SCRIPT, *given, "--judge", *judge, "--output", output, *more)
        assert done.returncode == 0, done.stderr
        pairs = made[judge[0]] = list(read_records(output, PreferencePair))
        right[judge[0]] = [pair.chosen[-1] == answers[pair.prompt] for pair in pairs]
    assert len(right["exact"]) >= 4 and all(right["exact"]) and not all(right["shuffled"])
    assert {pair.judge for pair in made["shuffled"]} == {None}, "scores of a control say nothing"

    # --save_samples: every sample with its scores; the answers are not read, so none is graded
    samples = [Sample(**row) for _, row in read_rows(tmp_path / "exact.samples.jsonl")]
    assert len(samples) == 8 * len(EIGHT) and not (tmp_path / "shuffled.samples.jsonl").exists()
    assert {sample.verdict for sample in samples} <= {"not graded", "cut", "no answer", "empty"}
    judged = [sample for sample in samples if sample.scores is not None]
    assert len(judged) > len(samples) / 2
    for sample in judged:
        assert len(sample.scores) == len(sample.steps)
        assert (sample.scores == [1]) == (sample.steps == [answers[sample.prompt]])

    # the pairs have the scores of these samples, and the same judge is not asked again
    scores_of = {(s.prompt, tuple(s.steps)): s.scores for s in samples}
    (record,) = {pair.judge for pair in made["exact"]}
    assert re.fullmatch(r"exact-problems [0-9a-f]{12}", record)
    for pair in made["exact"]:
        for side, scores in (
            (pair.chosen, pair.chosen_scores),
            (pair.rejected, pair.rejected_scores),
        ):
            assert scores_of[pair.prompt, (*pair.prefix, *side)][len(pair.prefix) :] == scores
    score = ("reward_model/evaluate_steps.py", "--input", "exact.jsonl")
    judge = ("--judge", "exact", "--judge_problems", "problems.jsonl")
    done = run_script(*score, *judge, "--output", "same.jsonl")
    count = len(made["exact"])
    assert f"{count} of {count} pairs have the scores of this judge" in done.stdout, done.stderr
    assert (tmp_path / "same.jsonl").read_bytes() == (tmp_path / "exact.jsonl").read_bytes()
    write_records(
        tmp_path / "others.jsonl", [*EIGHT, Problem("Mia has 9 apples.", "9", ["Answer: 9"])]
    )
    done = run_script(*score, *judge[:-1], "others.jsonl", "--output", "other.jsonl")
    assert "scores of this judge" not in done.stdout and done.returncode == 0, done.stderr
    (other,) = {pair.judge for pair in read_records(tmp_path / "other.jsonl", PreferencePair)}
    assert other != record and other.startswith("exact-others ")


@pytest.mark.process
def test_a_killed_run_resumes_and_writes_the_same_file(half_right, run_script, tmp_path):
    """Killed after its first group of problems; a torn row is added to the rows that it left."""
    model, _ = half_right
    texts = [f"Mia has {k % 8 + 1} apples{'!' * (k // 8)}" for k in range(128)]
    write_records(tmp_path / "problems.jsonl", [Problem(text, "1") for text in texts])
    args = ["--model_name_or_path", model, "--input", "problems.jsonl", "--max_new_tokens", "12"]
    whole = run_script(SCRIPT, *args, "--output", "whole.jsonl")
    assert whole.returncode == 0, whole.stderr
    partial = tmp_path / "killed.jsonl.partial"
    args += ["--output", "killed.jsonl"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / SCRIPT), *args],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        partial.exists() and partial.read_bytes().count(b"\n") > 64
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed.jsonl").exists() and partial.exists()
    with open(partial, "ab") as file:
        file.write(b'{"samples": 8, "en')
    weights = Path(model) / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # another model at the same place
    other = run_script(SCRIPT, *args)
    assert other.returncode == 2 and "another job" in other.stderr.splitlines()[-1]
    weights.write_bytes(data)
    resumed = run_script(SCRIPT, *args)
    assert resumed.returncode == 0 and "resuming: 64 of 128" in resumed.stdout
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not partial.exists()


# --- mistakes: one line, exit code 2, and nothing is written


def refused(monkeypatch, capsys, *args: str) -> str:
    """The line on stderr with which the script refuses these arguments."""
    model = [] if "--model_name_or_path" in args else ["--model_name_or_path", POLICY]
    monkeypatch.setattr(sys, "argv", [SCRIPT, *model, *args])
    with pytest.raises(SystemExit) as stopped:
        run(main)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1, error
    return error


def test_held_out_problems_are_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    held_out = (ROOT / "data/problems_hard.jsonl").read_text().splitlines()[7]
    Path("mine.jsonl").write_text('{"prompt": "x", "answer": "1"}\n' + held_out + "\n")
    for pair_by in ("answer", "judge"):
        args = ("--input", "mine.jsonl", "--output", "pairs.jsonl", "--pair_by", pair_by)
        assert "held-out" in refused(monkeypatch, capsys, *args)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--input", "nowhere.jsonl"], "nowhere.jsonl not found"),
        (["--samples", "0"], "--samples: expected 1 or more"),
        (["--samples", "many"], "--samples"),
        (["--temperature", "0"], "--temperature: expected above 0"),
        (["--pair_by", "taste"], "--pair_by"),
        (["--judge", "shuffled"], "with --pair_by judge only"),
        (["--pair_by", "judge", "--judge_path", "none.gguf"], "none.gguf not found"),
        (["--pair_by", "judge", "--judge_path", "empty.jsonl"], "no GGUF file"),
        (["--sampels", "3"], "unknown argument --sampels"),
        (["--config", "nowhere.yaml"], "config file nowhere.yaml not found"),
        (["--config"], "argument --config: expected"),
        (["--config=unknown.yaml"], "unknown key 'sampels'"),
        (["--config", "wrong.yaml"], "key 'samples' takes one value"),
        (["--model_name_or_path", "."], "is no model directory"),
        (["--model_name_or_path", "./nowhere"], "model directory ./nowhere not found"),
        (["--output", "unknown.yaml/pairs.jsonl"], "cannot be written"),
        (["--output", "unknown.yaml"], "--overwrite"),
        (["--input", "empty.jsonl"], "no rows"),
        (["--input", "broken.jsonl"], "broken.jsonl:1: not JSON"),
    ],
)
def test_mistakes(monkeypatch, capsys, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)
    Path("unknown.yaml").write_text("sampels: 3\n")
    Path("wrong.yaml").write_text("samples: [1]\n")
    Path("empty.jsonl").touch()
    Path("broken.jsonl").write_text("{")
    files = sorted(tmp_path.iterdir())
    output = [] if "--output" in args else ["--output", "pairs.jsonl"]
    assert message in refused(monkeypatch, capsys, *args, *output)
    assert sorted(tmp_path.iterdir()) == files


@pytest.mark.process
def test_a_mistake_in_a_process_of_its_own(run_script, tmp_path):
    done = run_script(SCRIPT, "--samples", "0")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "build_synthetic_dataset.py: error: argument --samples" in done.stderr
    assert not list(tmp_path.iterdir())


# --- few pairs: samples with verdicts


@pytest.mark.process
def test_no_pair_shows_three_samples_and_saves_them(half_right, run_script, tmp_path):
    """All answers are wrong, because the references are; a killed run shows the same."""
    problems = [Problem(f"Mia has {k} apples.", "77") for k in range(1, 9)]
    write_records(tmp_path / "problems.jsonl", problems)
    given = ("--model_name_or_path", half_right[0], "--input", "problems.jsonl")
    given += ("--max_new_tokens", 30, "--output", "my pairs.jsonl.gz")
    for _ in range(2):  # the second run replaces its own samples
        done = run_script(SCRIPT, *given)
        assert done.returncode == 2 and "no pairs could be made" in done.stderr.splitlines()[-1]
        for part in ("no right sample: 8", "'Mia has 1 apples.'", "the reference is '77'", "wrong"):
            assert part in done.stdout, done.stdout
        assert "what to do:" in done.stdout and "my pairs.samples.jsonl" in done.stdout
        rows = [row for _, row in read_rows(tmp_path / "my pairs.samples.jsonl")]
        assert len(rows) == 3 and {row["reference"] for row in rows} == {"77"}
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["my pairs.samples.jsonl", "problems.jsonl"]

    done = run_script(SCRIPT, *given, "--max_new_tokens", 2)
    assert done.returncode == 2 and "no sample ended: 8" in done.stdout
    assert "verdict    cut" in done.stdout and "--max_new_tokens: give more" in done.stdout


@pytest.mark.process
def test_a_policy_that_does_not_know_the_words_is_named(half_right, run_script, tmp_path):
    text = "Weng earns twelve dollars an hour babysitting. Yesterday she babysat fifty minutes."
    write_records(tmp_path / "problems.jsonl", [Problem(text, "10")])
    given = ("--model_name_or_path", half_right[0], "--input", "problems.jsonl")
    done = run_script(SCRIPT, *given, "--max_new_tokens", 4, "--output", "pairs.jsonl")
    assert f"the policy {half_right[0]} has not learned the words of 1 of 1 texts" in done.stderr
    assert "--model_name_or_path MODEL" in done.stderr
