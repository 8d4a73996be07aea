"""utils/prepare_dataset.py: all shapes become records, and no problem is on both sides."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from common.cli import here, run, unused
from common.files import at_root, read_records, write_records
from reasoning.datasets.shapes import KINDS
from reasoning.records import ScoredPair
from utils import prepare_dataset

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).parent / "data"


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """Run the script's main in this process; returns its output, or its one line of error."""
    monkeypatch.chdir(tmp_path)

    def main(*args: object) -> str:
        monkeypatch.setattr(sys, "argv", ["prepare_dataset.py", *map(str, args)])
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        try:
            run(prepare_dataset.main)
        except SystemExit as stopped:
            assert stopped.code == 2
            assert {
                path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
            } == before
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            return error
        return capsys.readouterr().out

    return main


def both_sides(kind: str) -> tuple[list, list]:
    train, test = (
        list(read_records(name, KINDS[kind])) if Path(name).exists() else []
        for name in ("out.jsonl", "out_test.jsonl")
    )
    assert not {record.prompt for record in train} & {record.prompt for record in test}
    return train, test


SHAPES = [  # file, --to, kind of record that comes out, how many in train and test
    ("gsm8k.jsonl", None, "problems", (3, 1)),
    ("math.jsonl", None, "problems", (1, 1)),
    ("step_dpo.jsonl", None, "pairs", (1, 1)),
    ("step_dpo.jsonl", "problems", "problems", (2, 1)),
    ("trl_preference.jsonl", None, "pairs", (1, 0)),
    ("trl_conversational.jsonl", None, "pairs", (1, 0)),
    ("trl_implicit.jsonl", None, "pairs", (1, 1)),
    ("prm800k.jsonl", None, "pairs", None),
    ("prm800k.jsonl", "step_labels", "step_labels", None),
    ("prm800k.jsonl", "step_values", "step_values", None),
    ("math_shepherd.jsonl", None, "pairs", (1, 0)),
    ("math_shepherd.jsonl", "step_values", "step_values", None),
    ("processbench.json", "step_labels", "step_labels", (1, 1)),
    ("trl_stepwise.jsonl", None, "pairs", (1, 0)),
    ("omegaprm.jsonl", None, "step_values", (3, 0)),
]


@pytest.mark.parametrize(("name", "to", "kind", "counts"), SHAPES)
def test_every_shape(prepare, name, to, kind, counts):
    printed = prepare(
        "--dataset_name", DATA / name, "--output", "out.jsonl", *(["--to", to] if to else [])
    )
    train, test = both_sides(kind)
    assert train and f"wrote {len(train)} {kind} of " in printed
    assert counts in (None, (len(train), len(test)))


def test_labelled_steps_become_scored_pairs(prepare):
    """PRM800K: after each prefix, all right steps with a wrong one; the other steps are counted."""
    printed = prepare(
        "--dataset_name", DATA / "prm800k.jsonl", "--output", "out.jsonl", "--test_size", 0
    )
    pairs, _ = both_sides("pairs")
    pencil = [pair for pair in pairs if pair.prompt.startswith("Three pencils")]
    assert [pair.chosen for pair in pencil] == [["We have $3p+e=1.24$ and $5p+e=1.82$."]] * 5
    assert len({pair.rejected[0] for pair in pencil}) == 5 and all(
        len(pair.prefix) == 1 for pair in pencil
    )
    assert all((pair.chosen_scores, pair.rejected_scores) == ([1.0], [0.0]) for pair in pairs)
    # one wrong step against each of three right ones
    assert len(pairs) == 8 and len({pair.chosen[0] for pair in pairs[5:]}) == 3
    rows = [" ".join(line.split()) for line in printed.splitlines()]
    assert (
        "labelled steps read 25" in rows
        and "steps without a wrong one after the same prefix 15" in rows
    )
    trained = unused(at_root("saved_model/out"))
    flags = ("--dataset_name", "out.jsonl", "--output_dir", trained)
    assert rows[-1] == f"next: {here('python train.py dpo', *flags)}"


def values(*steps: tuple[str, float]) -> list[dict]:
    return [{"prompt": "x", "step": step, "score": score} for step, score in steps]


def test_duplicates_and_contradictions(prepare):
    write_records(
        "values.jsonl", values(("a", 1), ("a", 0.5), ("b", 0), ("c", 1), ("c", 0), ("c", 0))
    )
    printed = prepare(
        "--dataset_name", "values.jsonl", "--to", "pairs", "--output", "out.jsonl", "--test_size", 0
    )
    assert "step seen before" in printed and "called right and wrong, dropped" in printed
    (pair,), _ = both_sides("pairs")
    assert (pair.chosen, pair.rejected, pair.chosen_scores) == (["a"], ["b"], [0.75])
    prepare(
        "--dataset_name", "values.jsonl", "--output", "out.jsonl", "--test_size", 0, "--overwrite"
    )
    assert [(value.step, value.score) for value in both_sides("step_values")[0]] == [
        ("a", 0.75),
        ("b", 0),
        ("c", 1 / 3),
    ]

    problems = [
        ("x?", "1/2"),
        ("X  ?", "0.5"),
        ("x?", r"\frac{2}{4}"),
        ("y?", "1"),
        ("y?", "2"),
        ("z?", "3"),
    ]
    write_records(
        "problems.jsonl", [{"prompt": prompt, "answer": answer} for prompt, answer in problems]
    )
    printed = prepare(
        "--dataset_name", "problems.jsonl", "--output", "out.jsonl", "--test_size", 0, "--overwrite"
    )
    assert {problem.prompt for problem in both_sides("problems")[0]} == {"x?", "X  ?", "z?"}
    assert "problem seen before" in printed and "problem that contradicts another" in printed

    pair = {"prompt": "x", "chosen": ["a"], "rejected": ["b"]}
    other = {"prompt": "x", "chosen": ["a"], "rejected": ["c"]}
    write_records("pairs.jsonl", [pair, other, other, {**pair, "chosen": ["b"], "rejected": ["a"]}])
    printed = prepare(
        "--dataset_name", "pairs.jsonl", "--output", "out.jsonl", "--test_size", 0, "--overwrite"
    )
    assert [pair.rejected for pair in both_sides("pairs")[0]] == [["c"]]
    # these have no scores yet
    flags = ("--input", "out.jsonl", "--output", "out_scored.jsonl")
    assert printed.endswith(f"next: {here('python reward_model/evaluate_steps.py', *flags)}\n")


def test_compressed_files(prepare):
    """The test file of out.jsonl.gz is out_test.jsonl.gz; compressed input gives the same rows."""
    Path("in.jsonl.gz").write_bytes(gzip.compress((DATA / "gsm8k.jsonl").read_bytes()))
    prepare("--dataset_name", DATA / "gsm8k.jsonl", "--output", "out.jsonl")
    printed = prepare("--dataset_name", "in.jsonl.gz", "--output", "out.jsonl.gz")
    assert "1 problem to out_test.jsonl.gz" in printed
    for name in ("out.jsonl", "out_test.jsonl"):
        assert gzip.decompress(Path(f"{name}.gz").read_bytes()) == Path(name).read_bytes()


def test_split_by_problem(prepare):
    rows = [
        {"prompt": f"problem {k % 40}" + " " * (k // 40), "answer": "1", "steps": [f"{k}"]}
        for k in range(80)
    ]
    write_records("rows.jsonl", [{**row, "labels": [1]} for row in rows])
    args = ("--dataset_name", "rows.jsonl", "--to", "step_labels", "--output", "out.jsonl")
    prepare(*args, "--test_size", 0.25)
    train, test = both_sides("step_labels")
    assert (len(train), len(test)) == (60, 20)
    assert not {record.prompt.strip() for record in train} & {
        record.prompt.strip() for record in test
    }
    first = Path("out_test.jsonl").read_bytes()
    prepare(*args, "--test_size", 0.25, "--overwrite")
    assert Path("out_test.jsonl").read_bytes() == first
    prepare(*args, "--test_size", 0.25, "--overwrite", "--seed", 1)
    assert Path("out_test.jsonl").read_bytes() != first
    prepare(*args, "--test_size", 0, "--overwrite", "--limit", 7)
    assert len(both_sides("step_labels")[0]) == 7 and not Path("out_test.jsonl").exists()


def test_a_folder_keeps_its_sides(prepare):
    """A user's own train.jsonl and test.jsonl: a problem in both stays only in test."""
    Path("own").mkdir()
    write_records(
        "own/train.jsonl", [{"question": f"{k} + 1?", "answer": f"{k + 1}"} for k in range(5)]
    )
    write_records(
        "own/test.jsonl", [{"question": f"{k} + 1?", "answer": f"{k + 1}"} for k in range(4, 6)]
    )
    printed = prepare("--dataset_name", "own", "--output", "out.jsonl")
    train, test = both_sides("problems")
    assert (len(train), len(test)) == (
        4,
        2,
    ) and "dropped from train, problem is on the test side" in printed
    prepare(
        "--dataset_name", "own", "--dataset_split", "test", "--output", "out.jsonl", "--overwrite"
    )
    assert sum(map(len, both_sides("problems"))) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "the following arguments are required: --dataset_name"),
        (["--dataset_name", "none.jsonl"], "none.jsonl not found"),
        (
            ["--dataset_name", "odd.jsonl"],
            "odd.jsonl:1: fields a, b are of no known shape; known: ",
        ),
        (["--dataset_name", "torn.jsonl"], "torn.jsonl:2: field 'answer' is missing"),
        (
            ["--dataset_name", DATA / "gsm8k.jsonl", "--to", "pairs"],
            "gives problems, which cannot become pairs",
        ),
        (["--dataset_name", DATA / "gsm8k.jsonl", "--to", "cake"], "argument --to: invalid choice"),
        (
            ["--dataset_name", DATA / "processbench.json"],
            "no pairs were found (see above), nothing was written",
        ),
        (
            ["--dataset_name", DATA / "gsm8k.jsonl", "--output", "old.jsonl"],
            "old.jsonl exists: give --overwrite",
        ),
        (
            ["--dataset_name", DATA / "gsm8k.jsonl", "--output", "older.jsonl"],
            "older_test.jsonl exists: give --overwrite",
        ),
        (
            ["--dataset_name", DATA / "gsm8k.jsonl", "--test_size", "1"],
            "argument --test_size: expected 0 to below 1, got 1.0",
        ),
        (
            ["--dataset_name", DATA / "gsm8k.jsonl", "--limit", "0"],
            "argument --limit: expected 1 or more, got 0",
        ),
    ],
)
def test_refusals(prepare, args, message):
    for name in ("old.jsonl", "older_test.jsonl"):
        Path(name).write_text("mine")
    write_records("odd.jsonl", [{"a": 1, "b": 2}])
    write_records("torn.jsonl", [{"question": "1?", "answer": "1"}, {"question": "2?"}])
    assert message in prepare(*args, *([] if "--output" in args else ["--output", "out.jsonl"]))


@pytest.mark.process
def test_prepared_pairs_train(run_script, tmp_path):
    """Real rows of PRM800K become scored pairs in a compressed file, for one optimizer step."""
    source = ("--dataset_name", DATA / "prm800k.jsonl", "--test_size", 0)
    done = run_script("utils/prepare_dataset.py", *source, "--output", "pairs.jsonl.gz")
    assert done.returncode == 0, done.stderr
    pairs = list(read_records(tmp_path / "pairs.jsonl.gz", ScoredPair))
    done = run_script(
        "train.py",
        *("--dataset_name", "pairs.jsonl.gz", "--output_dir", "tuned", "--logs_dir", "logs"),
        *("--max_steps", 1, "--max_length", 512, "--per_device_train_batch_size", 2),
        *("--save_strategy", "no", "--report_to", "none"),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tuned/model.safetensors").exists()
    log = json.loads((tmp_path / "logs/tuned/log.json").read_text())
    assert log["steps"] == 1 and log["job"]["pairs"] == len(pairs)
