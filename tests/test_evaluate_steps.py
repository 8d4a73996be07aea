"""The script reward_model/evaluate_steps.py."""

import gzip
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from common.files import ROOT, read_records, write_records
from reasoning.records import PreferencePair, ScoredPair
from reward_model import evaluate_steps
from reward_model.tinyllama_reward_model import TinyLlamaRewardScorer
from tests.helpers.judges import FixedJudge
from tests.helpers.mains import call_main

pytestmark = pytest.mark.process  # the default judge has a process of its own

ROWS = [
    {
        "prompt": "Mia has 12 apples.",
        "prefix": ["Step 1: 1"],
        "chosen": ["Step 2: 2", "Answer: 2"],
        "rejected": ["Answer: 3"],
    },
    {"prompt": "كم؟ 🙂", "chosen": ["Step 1: é\u0301"], "rejected": ["a\0b", "</s>"]},
    {"prompt": "Ann has 3 pens.", "chosen": ["Answer: 3"], "rejected": ["Answer: 4"]},
]
LONG = {"prompt": "a long one", "chosen": ["Answer: 1"], "rejected": ["Step 1: " + "9" * 600]}


def write(path: Path, rows: list[dict]) -> Path:
    write_records(path, rows)
    return path


@pytest.fixture
def evaluate(tiny_gguf, tmp_path, monkeypatch, capsys):
    """Run the script's main in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments: object, judge: object = tiny_gguf):
        flags = ["--judge_path", judge, "--output", tmp_path / "rewarded.jsonl", "--threads", 1]
        main, options = evaluate_steps.main, {"monkeypatch": monkeypatch, "capsys": capsys}
        return call_main(main, *flags, *arguments, **options)

    return call


def test_the_script_scores_every_step(run_script, tiny_gguf, tmp_path):
    write(tmp_path / "pairs.jsonl", [*ROWS, LONG])
    files = ("--input", "pairs.jsonl", "--output", "out/r.jsonl")
    script = "reward_model/evaluate_steps.py"
    result = run_script(script, *files, "--judge_path", tiny_gguf)
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-2]
    assert last == "wrote out/r.jsonl: 3 pairs with a score for every step"
    assert "left out          1" in result.stdout
    pairs = list(read_records(tmp_path / "out" / "r.jsonl", ScoredPair))
    with TinyLlamaRewardScorer(tiny_gguf, threads=1) as judge:
        for pair, row in zip(pairs, ROWS, strict=True):
            prefix, chosen, rejected = row.get("prefix", []), row["chosen"], row["rejected"]
            steps = (pair.prompt, pair.prefix, pair.chosen, pair.rejected)
            assert steps == (row["prompt"], prefix, chosen, rejected)
            solutions = [(row["prompt"], prefix + side) for side in (chosen, rejected)]
            expected = [scores[len(prefix) :] for scores in judge.score_steps(solutions)]
            assert [pair.chosen_scores, pair.rejected_scores] == expected
    assert json.loads((tmp_path / "out" / "r.left_out.jsonl").read_text()) == {**LONG, "prefix": []}
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["r.jsonl", "r.left_out.jsonl"]


def test_the_scores_of_the_same_judge_are_kept():
    """Only the other pairs are judged; they get the record of the judge if they had one."""
    asked = []

    def score(prompt: str, step: str, previous: list[str]) -> float | None:
        asked.append(prompt)
        return None if step == "</s>" else 0.5

    pairs = [PreferencePair.from_row(row) for row in ROWS]
    scores = {"chosen_scores": [0.9, 0.8], "rejected_scores": [0.1]}
    pairs[0] = replace(pairs[0], **scores, judge="a 1")
    pairs[2] = replace(pairs[2], chosen_scores=[0.9], rejected_scores=[0.1], judge="b 2")
    found = evaluate_steps.score_pairs(FixedJudge(score), pairs, "a 1")
    assert found[0] == pairs[0] and pairs[0].prompt not in asked
    assert found[1] == pairs[1], "the judge cannot read it"
    half = {"chosen_scores": [0.5], "rejected_scores": [0.5]}
    assert found[2] == replace(pairs[2], **half, judge="a 1")
    again = evaluate_steps.score_pairs(FixedJudge(score), pairs)  # a control has no record
    assert again[2] == replace(pairs[2], **half, judge=None) and pairs[0].prompt in asked


def test_compressed_files(evaluate, tmp_path):
    """With .jsonl.gz the rows are the same, and the rows left out are compressed as well."""
    write(tmp_path / "pairs.jsonl", [*ROWS, LONG])
    write(tmp_path / "pairs.jsonl.gz", [*ROWS, LONG])
    assert (tmp_path / "pairs.jsonl.gz").read_bytes()[:2] == b"\x1f\x8b"
    assert evaluate("--input", tmp_path / "pairs.jsonl", "--output", tmp_path / "a.jsonl")[0] == 0
    files = ("--input", tmp_path / "pairs.jsonl.gz", "--output", tmp_path / "b.jsonl.gz")
    code, stdout, _ = evaluate(*files)
    assert code == 0 and f"scores to {tmp_path / 'b.left_out.jsonl.gz'}" in stdout
    for name in ("", ".left_out"):
        compressed = (tmp_path / f"b{name}.jsonl.gz").read_bytes()
        assert gzip.decompress(compressed) == (tmp_path / f"a{name}.jsonl").read_bytes()
    assert evaluate(*files)[0] == 2  # both outputs exist
    assert {path.name for path in tmp_path.glob("b*")} == {"b.jsonl.gz", "b.left_out.jsonl.gz"}


def test_help_is_quick(run_script):
    def cpu_seconds():  # of finished children: a busy machine is no reason to fail
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    start = cpu_seconds()
    assert "--judge_template" in run_script("reward_model/evaluate_steps.py", "--help").stdout
    assert cpu_seconds() - start < 2


BAD_ROWS = {
    "missing field": (b'{"prompt": "p", "chosen": ["a"]}', "field 'rejected' is missing"),
    "unequal lengths": (
        b'{"prompt": "p", "chosen": ["a"], "rejected": ["b"], "chosen_scores": [1, 1],'
        b' "rejected_scores": [0]}',
        "one score for each of 1 steps, got 2",
    ),
    "nan score": (
        b'{"prompt": "p", "chosen": ["a"], "rejected": ["b"], "chosen_scores": [NaN],'
        b' "rejected_scores": [0]}',
        "a score from 0 to 1",
    ),
    "not UTF-8": (b'{"prompt": "\xff", "chosen": ["a"], "rejected": ["b"]}', "not UTF-8"),
    "broken JSON": (b'{"prompt": "p", "chosen": ["a"], ', "not JSON"),
    "empty step": (
        b'{"prompt": "p", "chosen": ["a", " "], "rejected": ["b"]}',
        "field 'chosen', step 2",
    ),
    "no object": (b'["p"]', "expected a JSON object"),
    "half a surrogate": (b'{"prompt": "\\ud800", "chosen": ["a"], "rejected": ["b"]}', "surrogate"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_ends_it_before_any_row_is_scored(evaluate, tmp_path, name):
    content, expected = BAD_ROWS[name]
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n" + content + b"\n")
    code, _, stderr = evaluate("--input", path)
    assert code == 2 and len(stderr.splitlines()) == 1, stderr
    assert f"{path}:2: " in stderr and expected in stderr
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_bad_files_and_flags(evaluate, tiny_gguf, tmp_path):
    good, empty = write(tmp_path / "pairs.jsonl", ROWS), write(tmp_path / "empty.jsonl", [])
    data = Path(tiny_gguf).read_bytes()
    judges = {
        "cut": data[:-5000],
        "text": b"no model",
        "other": data.replace(b"llama", b"qwen2", 1),
        "notok": data.replace(b".tokens", b".tokenz"),
    }
    for name, content in judges.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
    before = sorted(tmp_path.iterdir())
    cases = [
        (["--input", tmp_path / "none.jsonl"], {}, "build_synthetic_dataset.py"),
        (["--input", tmp_path], {}, "is a folder"),
        (["--input", empty], {}, "no rows"),
        (["--input", good], {"judge": tmp_path / "none.gguf"}, "none.gguf not found"),
        (["--input", good], {"judge": tmp_path / "cut.gguf"}, "cut off"),
        (["--input", good], {"judge": tmp_path / "text.gguf"}, "no GGUF"),
        (["--input", good], {"judge": tmp_path / "other.gguf"}, "expected 'llama'"),
        (["--input", good], {"judge": tmp_path / "notok.gguf"}, "token types are missing"),
        (["--input", good, "--judge_template", "x"], {}, "invalid choice: 'x'"),
        (["--input", good, "--threads", "0"], {}, "threads must be at least 1"),
        (["--input", good, "--limit", "0"], {}, "argument --limit: expected 1 or more"),
        (["--input", good, "--output", good], {}, "which this run reads"),
        (["--input", good, "--output", good / "r.jsonl"], {}, "cannot be written"),
        (["--input", good, "--nonsense"], {}, "--nonsense"),
    ]
    for arguments, options, expected in cases:
        code, stdout, stderr = evaluate(*arguments, **options)
        assert (code, stdout, len(stderr.splitlines())) == (2, "", 1) and expected in stderr, stderr
        assert sorted(tmp_path.iterdir()) == before


def test_an_output_is_replaced_only_with_overwrite(evaluate, tmp_path):
    path, output = write(tmp_path / "pairs.jsonl", ROWS), tmp_path / "rewarded.jsonl"
    output.write_text("mine")
    code, _, stderr = evaluate("--input", path)
    assert code == 2 and "--overwrite" in stderr and output.read_text() == "mine"
    assert evaluate("--input", path, "--overwrite")[0] == 0
    assert len(list(read_records(output, ScoredPair))) == 3
    left_out = tmp_path / "rewarded.left_out.jsonl"
    left_out.write_text("of an earlier run")
    assert evaluate("--input", path, "--overwrite")[0] == 0
    assert not left_out.exists()


def test_limit_draws_with_the_seed(evaluate, tmp_path):
    path = write(tmp_path / "pairs.jsonl", [ROWS[0] | {"prompt": f"p {k}"} for k in range(30)])

    def drawn(seed):
        assert evaluate("--input", path, "--limit", 5, "--seed", seed, "--overwrite")[0] == 0
        return [pair.prompt for pair in read_records(tmp_path / "rewarded.jsonl", ScoredPair)]

    first = drawn(0)
    assert len(first) == 5 and first == sorted(first, key=lambda prompt: int(prompt[2:]))
    assert drawn(0) == first and drawn(1) != first


def test_the_control_permutes_the_scores(evaluate, tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", ROWS)
    scores = []
    for control in ([], ["--judge", "shuffled"]):
        assert evaluate("--input", pairs, "--overwrite", *control)[0] == 0
        read = list(read_records(tmp_path / "rewarded.jsonl", ScoredPair))
        scores.append(
            [score for pair in read for score in (*pair.chosen_scores, *pair.rejected_scores)]
        )
    assert sorted(scores[0]) == sorted(scores[1]) and scores[0] != scores[1]


def test_a_judge_that_dies_keeps_what_was_scored(evaluate, tmp_path, monkeypatch):
    path, score = write(tmp_path / "pairs.jsonl", ROWS), TinyLlamaRewardScorer._score

    def deadly(self, prompt, *rest):
        if prompt == ROWS[2]["prompt"]:
            os.kill(self._process.pid, signal.SIGKILL)
        return score(self, prompt, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(TinyLlamaRewardScorer, "_score", deadly)
        code, _, stderr = evaluate("--input", path)
    last = stderr.splitlines()[-1]
    assert code == 2 and "SIGKILL" in last and ROWS[2]["prompt"] in last
    assert not (tmp_path / "rewarded.jsonl").exists()
    code, stdout, _ = evaluate("--input", path)
    assert code == 0 and "resuming after 2 of 3 pairs" in stdout


def test_a_judge_that_scores_in_chunks_dies_and_resumes(evaluate, tmp_path, monkeypatch):
    """32 rows (64 solutions) in a call; the control permutes within a call, so that a resumed run
    gives the same rows."""
    rows = [{**ROWS[k % 3], "prompt": f"{ROWS[k % 3]['prompt']} {k}"} for k in range(70)]
    path, score = write(tmp_path / "pairs.jsonl", rows), TinyLlamaRewardScorer._score
    assert evaluate("--input", path, "--judge", "shuffled")[0] == 0
    undisturbed = (tmp_path / "rewarded.jsonl").read_bytes()
    (tmp_path / "rewarded.jsonl").unlink()

    def deadly(self, prompt, *rest):
        if prompt == rows[50]["prompt"]:
            os.kill(self._process.pid, signal.SIGKILL)
        return score(self, prompt, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(TinyLlamaRewardScorer, "_score", deadly)
        code, _, stderr = evaluate("--input", path, "--judge", "shuffled")
    assert code == 2 and "SIGKILL" in stderr.splitlines()[-1]
    code, stdout, _ = evaluate("--input", path, "--judge", "shuffled")
    assert code == 0 and "resuming after 32 of 70 pairs" in stdout
    assert (tmp_path / "rewarded.jsonl").read_bytes() == undisturbed


def test_another_judge_does_not_continue_the_rows(evaluate, tiny_gguf, tmp_path, monkeypatch):
    path, judge = write(tmp_path / "pairs.jsonl", ROWS), tmp_path / "judge.gguf"
    judge.write_bytes(Path(tiny_gguf).read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(evaluate_steps, "score_pairs", lambda *_: exec("raise KeyboardInterrupt"))
        assert evaluate("--input", path, judge=judge)[0] == 130
    data = bytearray(judge.read_bytes())
    data[-1] ^= 1  # the same name and size, another weight
    judge.write_bytes(data)
    for arguments in ([], ["--judge", "shuffled"], ["--judge_template", "zephyr"]):
        code, _, stderr = evaluate("--input", path, *arguments, judge=judge)
        assert code == 2 and "another job" in stderr


def test_only_left_out_rows(evaluate, tmp_path):
    code, _, stderr = evaluate("--input", write(tmp_path / "pairs.jsonl", [LONG]))
    reason = "no pair was scored, all 1 are longer than the judge's context"
    assert code == 2 and reason in stderr.splitlines()[-1]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["pairs.jsonl", "rewarded.left_out.jsonl"]


def test_killed_and_started_again_it_writes_the_same_file(evaluate, tiny_gguf, tmp_path):
    rows = [{**ROWS[k % 3], "prompt": f"{ROWS[k % 3]['prompt']} {k}"} for k in range(400)]
    path = write(tmp_path / "pairs.jsonl", [*rows[:10], LONG, *rows[10:]])
    output, partial = tmp_path / "rewarded.jsonl", tmp_path / "rewarded.jsonl.partial"
    assert evaluate("--input", path)[0] == 0
    undisturbed = output.read_bytes()
    output.unlink()
    (tmp_path / "rewarded.left_out.jsonl").unlink()

    flags = ["--input", path, "--output", output, "--judge_path", tiny_gguf, "--threads", 1]
    process = subprocess.Popen(
        [sys.executable, evaluate_steps.__file__, *map(str, flags)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not partial.exists() or partial.read_bytes().count(b"\n") < 20:
        assert process.poll() is None
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not output.exists()
    done = partial.read_bytes().count(b"\n") - 1
    assert 0 < done < len(rows)
    with partial.open("ab") as file:
        file.write(b'{"prompt": "torn')

    code, _, stderr = evaluate("--input", path, "--limit", 7)
    assert code == 2 and "another job" in stderr  # other arguments do not continue these rows
    code, stdout, _ = evaluate("--input", path)
    assert code == 0 and f"resuming after {done} of 401 pairs" in stdout
    assert output.read_bytes() == undisturbed
    assert json.loads((tmp_path / "rewarded.left_out.jsonl").read_text())["prompt"] == "a long one"
    assert not partial.exists()
    maps = [Path(f"/proc/{pid}/maps") for pid in workers]
    alive = [path for path in maps if path.exists() and "ctransformers" in path.read_text()]
    assert not alive  # the judge's process ended with its parent


# --- warnings


FOREIGN = {
    "prompt": "Weng earns twelve dollars an hour babysitting. Yesterday she babysat fifty minutes.",
    "chosen": ["She earned twelve times five sixths, which makes ten dollars."],
    "rejected": ["She earned twelve plus fifty, which makes sixty-two dollars."],
}


def test_a_judge_of_another_world_and_scores_that_tell_nothing_are_warned_of(evaluate, tmp_path):
    """Blocks on stderr, with exit code 0 and the same output."""
    rows = [{**FOREIGN, "prompt": f"{FOREIGN['prompt']} {k}"} for k in range(12)]
    path = write(tmp_path / "pairs.jsonl", rows)
    mini = ROOT / "models/judge-mini/judge-mini.Q8_0.gguf"
    code, out, err = evaluate("--input", path, judge=mini)
    assert code == 0 and "12 pairs with a score for every step" in out
    assert "judge-mini.Q8_0.gguf" in err and "has not learned the words of 24 of 24 texts" in err
    assert "--judge_path MODEL" in err and "Weng earns" in err
    # the two sides of all rows score the same: one difference, far from 0 or not
    scored = list(read_records(tmp_path / "rewarded.jsonl", ScoredPair))
    is_higher = scored[0].chosen_scores[0] > scored[0].rejected_scores[0]
    assert is_higher != ("chosen is not" in err)

    same = [{**row, "rejected": row["chosen"]} for row in rows]
    path = write(tmp_path / "pairs.jsonl", same)
    code, out, err = evaluate("--input", path, "--overwrite", judge=mini)
    assert code == 0 and "chosen is not scored above rejected (mean difference 0.000" in err
    assert "n = 12 prompts" in err and "what to do: give another --judge" in err
    code, out, err = evaluate("--input", path, "--overwrite", "--judge", "shuffled", judge=mini)
    assert code == 0 and "chosen is not" not in err  # a control


def test_the_miniature_in_its_own_world_warns_of_nothing(evaluate, tmp_path):
    mini = ROOT / "models/judge-mini/judge-mini.Q8_0.gguf"
    pairs = itertools.islice(
        read_records(ROOT / "data/synthetic_dataset.jsonl", PreferencePair), 40
    )
    path = tmp_path / "pairs.jsonl"
    write_records(path, pairs)
    code, _, err = evaluate("--input", path, judge=mini)
    assert code == 0 and "warning" not in err
