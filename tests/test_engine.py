"""Units of work in this process, in parts (`--shard`), and on Ray actors."""

import importlib.util
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from common import engine
from common.engine import FATAL, Job, Shard, answer_of, check_address, check_engine, shard_of
from common.errors import JudgeError, ModelError, ServerError, UserError
from common.files import ROOT, write_records
from common.resumable import ResumableRows
from evaluation import eval_search
from reasoning.problems import problems
from reward_model import evaluate_steps, score_responses
from tests.helpers.mains import call_main
from tests.helpers.training import make_pairs
from tests.helpers.workers import Arguments, Squaring, left_out
from utils import build_mcts_dataset, build_ranked_responses, build_synthetic_dataset, merge_shards

# --- rows in any order ---


def test_units_may_be_appended_in_any_order(tmp_path):
    output, job = tmp_path / "out.jsonl", {"seed": 0}
    rows = ResumableRows(output, job, unit=2, total=5)
    for first in (4, 2, 0):  # the last unit has one row
        rows.append(*({"i": i} for i in range(first, min(first + 2, 5))), at=first)
    rows.close()
    again = ResumableRows(output, job, unit=2, total=5)
    assert again.rows == [{"i": i} for i in range(5)] and len(again) == 5
    assert all(again.has(first) for first in (0, 2, 4))


def test_only_units_that_are_missing_are_missing(tmp_path):
    output, job = tmp_path / "out.jsonl", {"seed": 0}
    rows = ResumableRows(output, job, unit=2, total=8)
    for first in (6, 0, 4):
        rows.append({"i": first}, {"i": first + 1}, at=first)
    with open(rows.path, "ab") as file:
        file.write(b'{"n": 2, "row": {"i": 2}}\n{"n": 3, "ro')  # killed within a unit
    again = ResumableRows(output, job, unit=2, total=8)
    assert [again.has(first) for first in (0, 2, 4, 6)] == [True, False, True, True]
    again.append({"i": 2}, {"i": 3}, at=2)
    assert ResumableRows(output, job, unit=2, total=8).rows == [{"i": i} for i in range(8)]


@pytest.mark.parametrize("lost", [2, 3])
def test_a_unit_of_which_a_row_is_lost_is_computed_again(tmp_path, lost):
    output, job = tmp_path / "out.jsonl", {"seed": 0}
    rows = ResumableRows(output, job, unit=2, total=8)
    for first in (6, 2, 0, 4):
        rows.append({"i": first}, {"i": first + 1}, at=first)
    lines = rows.path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if f'"n": {lost},'.encode() not in line]
    assert len(kept) == len(lines) - 1
    rows.path.write_bytes(b"".join(kept))
    again = ResumableRows(output, job, unit=2, total=8)
    assert again.rows == [{"i": 6}, {"i": 7}] and not again.has(2)


# --- in this process ---


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fill(
    items: list, unit: int = 2, seconds: float = 0.0, fails: str = "", **arguments
) -> ResumableRows:
    """Square numbers; the units that were worked on are in the file `log`."""
    job = Job(Arguments(**arguments), {"seed": 0}, items, unit)
    rows = job.open()
    make_worker = partial(Squaring, Path("log").absolute(), seconds, fails)
    job.fill(rows, make_worker, left_out, desc="squaring", noun="number")
    return rows


def worked_on() -> list[int]:
    """The first items of the units in `log`, each as often as it was tried."""
    return [int(line.split()[0]) for line in Path("log").read_text().split("\n") if " " in line]


def test_a_job_in_this_process(here):
    assert fill([1, 2, 3, 4, 5]).rows == [{"square": i * i} for i in range(1, 6)]
    assert worked_on() == [0, 2, 4] and Path("log").read_text().endswith("closed\n")


def test_a_job_that_is_whole_builds_no_worker(here):
    fill([1, 2, 3]).close()
    assert fill([1, 2, 3], fails="it was built").rows[2] == {"square": 9}


def test_what_is_finished_before_an_error_is_kept(here):
    with pytest.raises(JudgeError, match="has gone"):
        fill([1, 2, "judge", 4, 5])
    assert fill([1, 2, 3, 4, 5]).rows[3:] == [{"square": 16}, {"square": 25}]
    assert worked_on() == [0, 2, 2, 4]


def test_a_worker_that_cannot_be_built_leaves_no_file(here):
    with pytest.raises(UserError, match="no such model"):
        fill([1, 2], fails="no such model")
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 2}, "--workers: needs --engine ray"),
        ({"workers": 0}, "--workers: expected 1 or more, got 0"),
        *(
            ({"shard": text}, f"--shard: expected K/N with K from 1 to N, got {text}")
            for text in ("0/2", "3/2", "1", "a/b", "1/2/3", "-1/2", "")
        ),
    ],
)
def test_mistakes_in_the_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        check_engine(Arguments(**arguments))


def test_without_ray_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"ray is not installed: .*requirements-ray.txt"):
        check_engine(Arguments(engine="ray"))


def test_a_cluster_that_is_not_there_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=rf"no Ray cluster answers at 127.0.0.1:{port}"):
            check_address(f"127.0.0.1:{port}")
    check_address("auto")


def test_what_ends_a_run_and_what_a_worker():
    """An error of a judge or a server may be the worker's; while it is built, none is."""

    def fail(error: Exception) -> list:
        print("warning: odd\nreading:  50%|\rreading: 100%|\nstill loading x (3 s) ...")
        raise error

    assert answer_of(lambda: [{"a": 1}]) == ("rows", [{"a": 1}], "")
    kind, _, said = answer_of(lambda: fail(UserError("row 3")))
    assert kind == "user" and said == "warning: odd\nreading: 100%|\n"
    assert answer_of(lambda: fail(JudgeError("gone")))[:2] == ("died", "JudgeError: gone")
    assert answer_of(lambda: fail(JudgeError("gone")), ends=UserError)[0] == "user"
    kind, reason, said = answer_of(lambda: fail(ValueError("odd")), ends=UserError)
    assert (kind, reason) == ("died", "ValueError: odd") and "Traceback" in said


# --- parts ---


def test_parts_have_every_unit_once():
    for count in range(1, 8):
        parts = [Shard(number, count) for number in range(1, count + 1)]
        assert all(sum(part.has(unit) for part in parts) == 1 for unit in range(20))
    assert shard_of(Arguments(shard="2/8")) == Shard(2, 8)


@pytest.fixture
def score(here, monkeypatch, capsys):
    """Score 100 pairs, in units of 32, with the judge `random`; returns (code, stdout, stderr)."""
    write_records(here / "pairs.jsonl", make_pairs(100))

    def call(*arguments: object, output: str = "out.jsonl") -> tuple[int, str, str]:
        given = ("--input", "pairs.jsonl", "--output", output, "--judge", "random", *arguments)
        return call_main(evaluate_steps.main, *given, monkeypatch=monkeypatch, capsys=capsys)

    return call


@pytest.fixture
def merge(monkeypatch, capsys):
    def call(output: str = "out.jsonl", *arguments: object) -> tuple[int, str, str]:
        given = ("--output", output, *arguments)
        return call_main(merge_shards.main, *given, monkeypatch=monkeypatch, capsys=capsys)

    return call


def test_parts_merge_to_the_file_of_one_run(here, score, merge, monkeypatch):
    assert score(output="whole.jsonl")[0] == 0
    for number in (3, 1, 2):
        code, out, _ = score("--shard", f"{number}/3")
        assert code == 0 and f"part {number}/3, to out.jsonl.shard-{number}-of-3" in out
        assert "merge_shards.py --output out.jsonl" in out
    assert score("--shard", "1/3")[0] == 2  # it is there
    code, out, err = merge()
    assert code == 0 and "100 rows of 3 parts" in out, err
    monkeypatch.setattr(evaluate_steps, "open_judge", None)  # no row is missing
    assert score()[0] == 0
    assert (here / "out.jsonl").read_bytes() == (here / "whole.jsonl").read_bytes()


def test_a_part_that_was_killed_goes_on(here, score, monkeypatch):
    assert score("--shard", "2/2", output="whole.jsonl")[0] == 0
    right, calls = evaluate_steps.score_pairs, itertools.count()

    def killed(*given):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return right(*given)

    monkeypatch.setattr(evaluate_steps, "score_pairs", killed)
    assert score("--shard", "2/2")[0] == 130
    assert score("--shard", "2/2", "--seed", 1)[0] == 2  # other arguments do not continue it
    code, out, _ = score("--shard", "2/2")
    assert code == 0 and "resuming after 32 of 100" in out
    name = "{}.jsonl.shard-2-of-2"
    assert Path(name.format("out")).read_bytes() == Path(name.format("whole")).read_bytes()


def test_a_pair_that_was_fatal_to_its_workers_is_written_and_said(here, score, merge):
    assert score(output="whole.jsonl")[0] == 0 and score("--shard", "1/1")[0] == 0
    path = Path("out.jsonl.shard-1-of-1")
    header, *rows = map(json.loads, path.read_text().splitlines())
    pair = evaluate_steps.PreferencePair.from_row(rows[7]["row"])
    rows[7]["row"] = evaluate_steps.left_out(pair, FATAL)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in (header, *rows)))
    assert merge()[0] == 0
    code, out, _ = score()
    assert code == 0 and f"left out          1 ({FATAL})" in out
    kept = Path("whole.jsonl").read_text().splitlines()
    lost = json.loads(kept.pop(7))
    assert Path("out.jsonl").read_text().splitlines() == kept
    left = json.loads(Path("out.left_out.jsonl").read_text())
    assert {name: lost[name] for name in left} == left and "chosen_scores" not in left


def damage(change) -> None:
    path = Path("out.jsonl.shard-2-of-3")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(change(lines)))


REFUSED = {
    "a gap": (lambda: damage(lambda lines: lines[:5] + lines[6:]), "row 36 is missing"),
    "a double": (lambda: damage(lambda lines: [*lines, lines[1]]), "row 32 is there twice"),
    "damage": (lambda: damage(lambda lines: [*lines[:5], b"\0\n"]), "-of-3:6: damaged"),
    "no part": (lambda: damage(lambda lines: lines[1:]), "is no part of a job"),
    "a row of another part": (
        lambda: damage(lambda lines: [*lines, b'{"n": 0, "row": {}}\n']),
        "row 0 is there twice",
    ),
    "a part is missing": (
        lambda: Path("out.jsonl.shard-3-of-3").unlink(),
        "shard-3-of-3 is missing: give the command with --shard 3/3",
    ),
    "a part is not finished": (
        lambda: os.rename("out.jsonl.shard-3-of-3", "out.jsonl.shard-3-of-3.partial"),
        "shard-3-of-3 is not finished",
    ),
    "parts of two cuts": (
        lambda: Path("out.jsonl.shard-1-of-2").touch(),
        "there are parts of 2 and parts of 3",
    ),
    "a renamed part": (
        lambda: Path("out.jsonl.shard-3-of-3").write_bytes(
            Path("out.jsonl.shard-2-of-3").read_bytes()
        ),
        "shard-3-of-3 is part 2/3",
    ),
    "an unfinished run": (
        lambda: Path("out.jsonl.partial").touch(),
        "out.jsonl.partial exists: give --overwrite",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED)
def test_parts_that_do_not_make_a_whole_are_refused(here, score, merge, spoil, message):
    for number in (1, 2, 3):
        assert score("--shard", f"{number}/3")[0] == 0
    spoil()
    before = {path.name for path in here.iterdir()}
    code, _, err = merge()
    assert code == 2 and message in err and err.count("\n") == 1
    assert {path.name for path in here.iterdir()} == before


def test_parts_of_other_arguments_are_refused(here, score, merge):
    assert score("--shard", "1/2")[0] == 0 and score("--shard", "2/2", "--seed", 1)[0] == 0
    code, _, err = merge()
    assert code == 2 and "shard-2-of-2 is part of another job" in err
    code, _, err = merge("nothing.jsonl")
    assert code == 2 and "no parts" in err


# --- on Ray ---

slow_on_ray = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None,
        reason="ray is not installed: pip install -r requirements-ray.txt",
    ),
]


def on_ray(test):
    for mark in slow_on_ray:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of two nodes on this machine, with two CPUs each."""
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=node)
    nodes.add_node(**{name: node[name] for name in ("num_cpus", "object_store_memory")})
    yield nodes.address
    nodes.shutdown()


@pytest.fixture
def ray_here(cluster, here, monkeypatch) -> Path:
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    return here


@on_ray
def test_an_item_that_kills_its_workers_is_left_out(ray_here, capsys):
    """And so is one on which they fail; the others of its unit are there."""
    items = [1, 2, 3, "deadly", 5, 6, 7, "bug", "judge", 10]
    rows = fill(items, 3, engine="ray", workers=2).rows
    for number, (item, row) in enumerate(zip(items, rows, strict=True)):
        expected = {"square": item * item} if isinstance(item, int) else left_out(item, FATAL)
        assert row == expected, number
    assert worked_on().count(0) == 1  # a unit that nothing happened to
    assert "a worker died: JudgeError: the judge has gone (unit 6)" in capsys.readouterr().err


@on_ray
def test_a_mistake_ends_the_run_and_so_does_a_worker_that_cannot_be_built(ray_here):
    with pytest.raises(UserError, match="row 3 is wrong"):
        fill([1, "mistake"], 1, engine="ray")
    Path("out.jsonl.partial").unlink()
    with pytest.raises(UserError, match="no such model"):
        fill([1, 2], fails="no such model", engine="ray")
    assert not Path("out.jsonl.partial").exists()


@on_ray
def test_a_job_ends_if_all_that_its_workers_do_is_die(ray_here, monkeypatch):
    monkeypatch.setattr(engine, "MOST_DEATHS", 3)
    with pytest.raises(ModelError, match="4 workers died and no unit was finished in between"):
        fill(["deadly"] * 20, 1, engine="ray")


@on_ray
def test_long_units_hold_up_one_worker_and_no_other(ray_here):
    """One of two workers has the long unit, the other one all others."""
    rows = fill([1, 10**6, *range(2, 30)], 1, seconds=-1, engine="ray", workers=2)
    assert len(rows) == 30
    lines = [line.split() for line in Path("log").read_text().splitlines() if " " in line]
    long = next(pid for number, _, pid in lines if number == "1")
    behind = [pid for number, _, pid in lines if int(number) > 1]
    assert behind.count(long) <= 2


@on_ray
def test_20_kills_of_workers_and_of_the_driver(ray_here):
    """No row is lost or there twice, and few units are worked on again."""
    count, seconds, rng = 800, 0.1, random.Random(0)
    command = [sys.executable, ROOT / "tests/helpers/workers.py", count, 2, seconds]

    def start() -> subprocess.Popen:
        with open("messages", "ab") as messages:
            return subprocess.Popen(list(map(str, command)), stdout=messages, stderr=messages)

    def units() -> list[list[str]]:
        lines = Path("log").read_text().splitlines() if Path("log").exists() else []
        return [line.split() for line in lines if " " in line]

    driver, started = start(), 0
    for number, at in enumerate(sorted(rng.sample(range(10, 700), 20))):
        while len(units()) < max(at, started + 3):
            assert driver.poll() is None, Path("messages").read_text()[-3000:]
            time.sleep(0.02)
        if number % 2:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            driver, started = start(), len(units())
        else:
            os.kill(int(units()[-1][2]), signal.SIGKILL)
    assert driver.wait(300) == 0, Path("messages").read_text()[-3000:]
    assert Path("out.txt").read_text() == "".join(f"{k * k}\n" for k in range(count))
    again = len(units()) - count
    print(f"{again} of {count} units were worked on again")
    assert again <= 0.05 * count and {int(unit[0]) for unit in units()} == {*range(count)}


POLICY = "--model_name_or_path {root}/models/policy-mini --max_new_tokens 40"
PRM = "--judge_path {root}/models/prm-mini"
# name -> (script, its arguments, the files that it writes)
SCRIPTS: dict[str, tuple] = {
    "synthetic": (
        build_synthetic_dataset,
        f"--limit 130 --samples 2 {POLICY} --output out.jsonl",
        ["out.jsonl"],
    ),
    "judged": (
        build_synthetic_dataset,
        f"--limit 70 --samples 2 {POLICY} --pair_by judge --judge prm {PRM} --output out.jsonl",
        ["out.jsonl"],
    ),
    "evaluate": (
        evaluate_steps,
        "--input {root}/data/synthetic_dataset.jsonl --limit 100 --output out.jsonl "
        "--judge hf --judge_path {root}/models/policy-mini",
        ["out.jsonl"],
    ),
    "trees": (
        build_mcts_dataset,
        f"--limit 12 --in_flight 5 --rollouts_per_state 2 --budget 8 {POLICY} --keep_dropped "
        "--output out.jsonl --trees trees.jsonl",
        ["out.jsonl", "trees.jsonl"],
    ),
    "answers": (
        build_ranked_responses,
        f"--limit 200 --answers 2 {POLICY} --output out.csv",
        ["out.csv"],
    ),
    "scores": (
        score_responses,
        "score --input responses.jsonl --scorer {root}/models/reward-mini --output out.jsonl",
        ["out.jsonl"],
    ),
    "search": (
        eval_search,
        "--splits problems.jsonl --choose_on validation --choose_limit 60 --limit 60 --samples 2 "
        f"--strategies best_of_n beam --aggregates min --n 2 --controls random {POLICY} {PRM} "
        "--output_dir .",
        ["search.jsonl"],
    ),
}


def contents(names: list[str]) -> dict[str, list]:
    """The lines of files, which are removed. Those of search.jsonl have an order and a time of
    their own."""
    found = {name: Path(name).read_text().splitlines() for name in names}
    if "search.jsonl" in found:
        rows = map(json.loads, found["search.jsonl"])
        found["search.jsonl"] = sorted(
            json.dumps({k: v for k, v in row.items() if k != "seconds"}) for row in rows
        )
    for name in [*names, "search.json", "search.png"]:
        Path(name).unlink(missing_ok=True)
    return found


@on_ray
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_result_is_that_of_one_process(ray_here, monkeypatch, capsys, name):
    script, given, written = SCRIPTS[name]
    write_records("problems.jsonl", itertools.islice(problems("test"), 60))
    texts = [{"prompt": f"{n} + 1 = ?", "response": f"Answer: {n % 7}"} for n in range(1100)]
    write_records("responses.jsonl", texts)
    words = [word.format(root=ROOT) for word in given.split()]

    def call(*more: object) -> dict[str, list]:
        arguments = (*words, *more)
        code, _, err = call_main(script.main, *arguments, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 0, err
        return contents(written)

    expected = call()
    for workers in (1, 2, 4) if name == "synthetic" else (2,):
        assert call("--engine", "ray", "--workers", workers) == expected, workers
