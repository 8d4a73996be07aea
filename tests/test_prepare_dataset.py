"""utils/prepare_dataset.py: all shapes become records, and no problem is on both sides."""

import errno
import gzip
import json
import os
import shlex
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
    ("numina.jsonl", None, "problems", (1, 1)),
    ("svamp.csv", None, "problems", (2, 1)),
    ("mawps.csv", None, "problems", (2, 1)),
    ("asdiv.xml", None, "problems", (4, 1)),
    ("big_math.jsonl", None, "problems", (1, 1)),
    ("ultrafeedback.jsonl", None, "pairs", (1, 1)),
    ("orca.jsonl", None, "pairs", (1, 1)),
    ("alpaca.json", None, "pairs", (1, 0)),
    ("hh_rlhf.jsonl", None, "pairs", (1, 0)),
    ("sharegpt.jsonl", None, "pairs", (1, 0)),
    ("responses.jsonl", None, "pairs", (1, 0)),
    ("ms_swift.jsonl", None, "pairs", (1, 0)),
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
        (["--dataset_name", "torn.jsonl"], "torn.jsonl:1: not JSON"),
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
    Path("torn.jsonl").write_text('{"question": "1?"')
    assert message in prepare(*args, *([] if "--output" in args else ["--output", "out.jsonl"]))


def math_folder(name: str, indent: int | None) -> None:
    """MATH as published: a file for each problem, in folders of the side and the subject."""
    for side, numbers in (("train", range(1, 5)), ("test", range(4, 7))):
        for k in numbers:
            row = {
                "problem": f"What is {k} + 1?",
                "solution": f"$\\boxed{{{k + 1}}}$",
                "level": "1",
            }
            path = Path(name, side, "algebra", f"{k}.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(row, indent=indent))


@pytest.mark.parametrize("indent", [None, 4])
def test_math_as_published_keeps_its_sides(prepare, indent):
    """Test rows land on the test side; a problem of both sides is no training problem."""
    math_folder("MATH", indent)
    printed = prepare("--dataset_name", "MATH", "--output", "out.jsonl")
    train, test = both_sides("problems")
    assert [problem.answer for problem in train] == ["2", "3", "4"]
    assert [problem.answer for problem in test] == ["5", "6", "7"]
    assert "columns not used: level\n" in printed and "not read" not in printed
    again = ("--dataset_name", "MATH", "--output", "out.jsonl", "--overwrite", "--test_size", 0)
    prepare(*again, "--dataset_split", "train")
    assert [problem.answer for problem in both_sides("problems")[0]] == ["2", "3", "4", "5"]


def test_files_without_a_side_are_the_train_side(prepare):
    Path("own").mkdir()
    for name, k in (("rows", 1), ("more_rows", 2), ("rows_test", 3), ("rows_dev", 4)):
        write_records(f"own/{name}.jsonl", [{"question": f"{k}?", "answer": f"{k}"}])
    printed = prepare("--dataset_name", "own", "--output", "out.jsonl")
    train, test = both_sides("problems")
    assert ({p.answer for p in train}, {p.answer for p in test}) == ({"1", "2"}, {"3"})
    assert "1 files not read: of split validation" in printed and "split test" not in printed


def test_what_is_left_out_is_said(prepare):
    rows = [{"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "id": 1}]
    rows += [{"prompt": "a?", "chosen": "4", "rejected": None}] * 2
    rows += [{"prompt": "a?", "chosen": "4", "rejected": [k]} for k in range(5)]
    write_records("rows.jsonl", rows)
    printed = prepare("--dataset_name", "rows.jsonl", "--output", "out.jsonl").splitlines()
    assert [" ".join(line.split()) for line in printed[:7]] == [
        "rows.jsonl: pairs",
        "pairs read 1",
        "dropped, rows with an empty 'rejected' 2",
        "dropped, rows with a wrong 'rejected' 5",
        *(
            f"left out: rows.jsonl:{k + 4}: field 'rejected': expected a text or messages with "
            f"role and content, got [{k}]"
            for k in range(3)
        ),
    ]
    assert printed[7:9] == ["left out: 2 more odd rows", "columns not used: id"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("number", [1, 2])
def test_on_a_full_disk_no_side_is_written(prepare, monkeypatch, number, overwrite):
    """In the first or in the second file; the same command goes on when there is room."""
    old = ("out.jsonl", "out_test.jsonl") if overwrite else ()
    for name in old:
        Path(name).write_text("old")
    args = ("--dataset_name", DATA / "gsm8k.jsonl", "--output", "out.jsonl")
    args += ("--overwrite",) * overwrite
    written = []

    def full(path, side):
        written.append(path)
        if len(written) == number:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_records(path, side)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_dataset, "write_records", full)
        assert "the disk is full" in prepare(*args)
    assert {path.name: path.read_text() for path in Path().iterdir()} == dict.fromkeys(old, "old")
    prepare(*args)
    assert tuple(map(len, both_sides("problems"))) == (3, 1)
    assert {path.name for path in Path().iterdir()} == {"out.jsonl", "out_test.jsonl"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("number", [1, 2])
def test_after_a_kill_the_same_command_goes_on(prepare, monkeypatch, number, overwrite):
    """Killed before the first or the second file gets its name: no side of one run stands beside
    the other side of another."""
    for name in ("out.jsonl", "out_test.jsonl") if overwrite else ():
        Path(name).write_text("old")
    args = ("--dataset_name", DATA / "gsm8k.jsonl", "--output", "out.jsonl")
    args += ("--overwrite",) * overwrite
    moved = []

    def killed(*paths):
        moved.append(paths)
        if len(moved) == number:
            os._exit(9)
        os.rename(*paths)

    child = os.fork()
    if not child:
        monkeypatch.setattr(os, "replace", killed)
        prepare(*args)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not Path("out.jsonl").exists()
    prepare(*args)
    assert tuple(map(len, both_sides("problems"))) == (3, 1)
    assert {path.name for path in Path().iterdir()} == {"out.jsonl", "out_test.jsonl"}


@pytest.mark.process
@pytest.mark.parametrize("name", ["gsm8k", "MATH"])
def test_the_printed_commands_work(run_script, tmp_path, monkeypatch, name):
    """From problems as published to sampling: each command is the one that was printed."""
    monkeypatch.chdir(tmp_path)
    if name == "MATH":
        math_folder("MATH", 4)
    source = tmp_path / "MATH" if name == "MATH" else DATA / "gsm8k.jsonl"
    output = ("--output", "my data/mine.jsonl")
    done = run_script("utils/prepare_dataset.py", "--dataset_name", source, *output)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my data/mine_test.jsonl").exists()
    _, script, *args = shlex.split(done.stdout.splitlines()[-1].removeprefix("next: "))
    script = Path(script).resolve()  # as printed it is relative to the current folder
    done = run_script(script, *args, "--limit", 2, "--samples", 2, "--max_new_tokens", 8)
    assert "no pairs could be made" in done.stderr or done.returncode == 0, done.stderr


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
