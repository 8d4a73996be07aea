"""What a run writes: never over its inputs, never two runs at once, whole on a full disk."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.cli import check_different, check_output, check_outputs
from common.errors import UserError
from common.files import ROOT, write_records, write_text
from common.outputs import hold, release, replacing_folder, together, was_killed
from evaluation.results import output_paths
from tests.helpers.kills import limited
from tests.helpers.scripts import run_script


@pytest.fixture(autouse=True)
def free():
    yield
    release()


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder with a file `in.jsonl` and a model."""
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text("{}\n")
    Path("model").mkdir()
    for name in ("config.json", "model.safetensors", "chat_template.jinja", "model.gguf"):
        Path("model", name).write_text(name)
    return tmp_path


# --- outputs and inputs ---


def test_an_output_is_no_input_by_any_name(here):
    Path("link.jsonl").symlink_to("in.jsonl")
    Path("folder").symlink_to(".")
    os.link("in.jsonl", "hard.jsonl")
    Path("x.jsonl.partial").write_text("{}\n")
    for output, read in {
        "in.jsonl": "in.jsonl",
        "./folder/in.jsonl": "in.jsonl",
        str(here / "in.jsonl"): "in.jsonl",
        "link.jsonl": "in.jsonl",
        "hard.jsonl": "in.jsonl",
        "x.jsonl": "x.jsonl.partial",
        "model/config.json": "model",
        "model/chat_template.jinja": "model",
        "model": "model/config.json",
    }.items():
        with pytest.raises(UserError, match="give another output"):
            check_different([output], [None, "org/name", read])
    check_different(["model/model.gguf", "other.jsonl"], ["model", "in.jsonl"])


def test_the_base_of_an_adapter_is_an_input(here):
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text('{"base_model_name_or_path": "model"}')
    with pytest.raises(UserError, match="model would replace model"):
        check_different(["model"], ["adapter"])


@pytest.mark.parametrize(
    "other", ["a.jsonl", "./a.jsonl", "sub/../a.jsonl", "A.jsonl", "link/a.jsonl"]
)
def test_two_outputs_are_different_files(here, other):
    Path("sub").mkdir()
    Path("link").symlink_to(".")
    with pytest.raises(UserError, match="are the same file"):
        check_different(["a.jsonl", other])


def test_composed_and_decomposed_letters_are_one_name(here):
    with pytest.raises(UserError, match="are the same file"):
        check_different(["caf\u00e9", "cafe\u0301"])


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("in.jsonl", "in.jsonl exists: give --overwrite"),
        ("model", "model is a folder, expected a file"),
        ("in.jsonl/out.jsonl", "cannot be written"),
        ("/dev/null", "is no file, expected a file"),
        ("x" * 250, "its name is too long"),
        ("x" * 300, "cannot be written"),
        ("", "expected the name of a file"),
        ("a\0b", "expected the name of a file"),
        ("/proc/out.jsonl", "cannot be written"),
    ],
)
def test_an_output_that_cannot_be_written_is_found_before_the_work(here, output, message):
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    with pytest.raises(UserError, match=message):
        check_output(output)
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before


def test_a_folder_is_replaced_only_if_it_is_a_model(here):
    Path("letters").mkdir()
    Path("letters/one.txt").touch()
    with pytest.raises(UserError, match="letters is no model directory: it is not replaced"):
        check_output("letters", overwrite=True, folder=True)
    with pytest.raises(UserError, match="model exists: give --overwrite"):
        check_output("model", folder=True)
    check_output("model", overwrite=True, folder=True)


@pytest.mark.process
def test_score_does_not_delete_its_input(tmp_path):
    """The file of the pairs that were left out has a name made from that of the output."""
    rows = tmp_path / "x.left_out.jsonl"
    write_records(rows, [{"prompt": "1 + 1?", "chosen": ["2"], "rejected": ["3"]}])
    args = ("--input", rows.name, "--output", "x.jsonl", "--judge", "random", "--overwrite")
    done = run_script("reward_model/evaluate_steps.py", *args, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "x.left_out.jsonl would replace x.left_out.jsonl" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [rows.name]


def test_an_evaluation_writes_inside_its_folder_and_replaces_nothing(here):
    paths = output_paths("results", "card", ["in.jsonl"], overwrite=False)
    assert paths == tuple(Path("results", f"card.{end}") for end in ("png", "jsonl", "json"))
    release()
    for path in paths:
        write_text(path, ["mine"])
        with pytest.raises(UserError, match=f"{path} exists: give --overwrite"):
            output_paths("results", "card", [], overwrite=False)
        path.unlink()
    write_text(paths[1], ["rows of an earlier run"])
    assert output_paths("results", "card", [], overwrite=False, appends_rows=True) == paths
    with pytest.raises(UserError, match="which this run reads"):
        output_paths("results", "card", ["results/card.jsonl"], True, appends_rows=True)


# --- several files at once ---


def test_files_are_moved_together_or_not_at_all(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError), together():
        write_text(tmp_path / "a", ["new"])
        write_text(tmp_path / "b", ["new"])
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"
    with together():
        write_text(tmp_path / "a", ["new"])
        assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    write_text(tmp_path / "link", ["new"])
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


def test_an_old_folder_comes_back_after_a_kill_between_two_renames(tmp_path):
    (tmp_path / ".model.old.tmp").mkdir()
    (tmp_path / ".model.old.tmp/weights").write_text("old")
    with pytest.raises(RuntimeError), replacing_folder(tmp_path / "model"):
        raise RuntimeError
    assert (tmp_path / "model/weights").read_text() == "old"
    with replacing_folder(tmp_path / "model") as temporary:
        (temporary / "weights").write_text("new")
    assert (tmp_path / "model/weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- one run at a time ---

HOLD = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from common.outputs import hold, replacing
hold("new/out.jsonl")
with replacing("new/out.jsonl") as temporary:
    print(temporary, flush=True)
    time.sleep(60)
"""


@pytest.mark.process
def test_a_second_process_is_told_and_a_killed_one_leaves_nothing(here, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["another command"])
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    temporary = here / process.stdout.readline().strip()
    assert temporary.is_file()
    for second in (lambda: check_output("new/out.jsonl", True), lambda: hold("new/out.jsonl")):
        with pytest.raises(UserError, match=rf"another process \({process.pid}\) writes to it"):
            second()
    process.kill()
    process.wait()
    process.stdout.close()
    assert temporary.exists() and not was_killed("new/out.jsonl")  # not by this command
    check_output("new/out.jsonl")
    assert not temporary.exists()
    release()
    assert not any((here / "new").iterdir())


def test_the_same_command_goes_on_where_it_was_killed(here, monkeypatch):
    """What lies there beside a lock that nobody holds, with the same command, is its own."""
    out = here / "out.jsonl"
    check_output(out)
    left = (here / ".out.jsonl.lock").read_text()
    release()
    (here / ".out.jsonl.lock").write_text(left)
    out.write_text("written before it was killed")
    argv = sys.argv
    monkeypatch.setattr(sys, "argv", [*argv, "--other"])
    with pytest.raises(UserError, match="exists"):
        check_output(out)
    monkeypatch.setattr(sys, "argv", argv)
    check_output(out)


def test_release_removes_locks_and_the_folders_that_were_made(here):
    check_outputs(["new/deep/a.jsonl", "b.jsonl"])
    assert sorted(here.rglob("*.lock")) == [here / ".b.jsonl.lock", here / "new/deep/.a.jsonl.lock"]
    release()
    assert not list(here.rglob("*.lock")) and not Path("new").exists()


STOPPED = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from common.cli import check_output, run
from common.outputs import replacing
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore them
signal.signal(signal.SIGHUP, signal.SIG_DFL)
def main():
    check_output("out.jsonl")
    with replacing("out.jsonl"):
        os.kill(os.getpid(), signal.{{name}})
        time.sleep(60)
run(main)
"""


@pytest.mark.process
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_stopped_run_cleans_up_at_once(tmp_path, name, code):
    command = [sys.executable, "-c", STOPPED.format(name=name)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


# --- a full disk ---


@pytest.mark.process
def test_a_full_disk_is_one_line_and_nothing_is_left(tmp_path):
    """Files may not grow over a limit here, which ends like a full disk."""
    args = ("--split", "train", "--limit", 300, "--output", "out/problems.jsonl")
    done = run_script(limited("utils/build_problems.py", 20_000, tmp_path), *args, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "out/problems.jsonl cannot be written whole" in done.stderr
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    done = run_script("utils/build_problems.py", *args, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "out/problems.jsonl").stat().st_size > 20_000


@pytest.mark.parametrize(
    "message",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",
        "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534",
        "PytorchStreamWriter failed writing file data/0: file write failed",
        "basic_ios::clear: iostream error",
        "database or disk is full",
        "I/O error: Disk quota exceeded (os error 122)",
    ],
)
def test_what_libraries_say_about_a_full_disk_is_one_line(message, capsys):
    from common.cli import run

    def main():
        raise RuntimeError(message)

    with pytest.raises(SystemExit) as stopped:
        run(main)
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and "cannot be written whole" in line and line.count("\n") == 1

    def bug():
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError):
        run(bug)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
@pytest.mark.process
def test_a_small_disk(tmp_path):
    """A file system of a megabyte, in a mount namespace of its own."""
    script = tmp_path / "fill.sh"
    script.write_text(
        "set -e\nmount -t tmpfs -o size=1m tmpfs small\ncd small\n"
        f"head -c 900000 /dev/zero > filler\n"
        f'"{sys.executable}" {ROOT}/utils/build_problems.py --split train --limit 900 '
        "--output p.jsonl || echo code $?\nls -A\nrm filler\n"
        f'"{sys.executable}" {ROOT}/utils/build_problems.py --split train --limit 900 '
        "--output p.jsonl\nls -A\n"
    )
    (tmp_path / "small").mkdir()
    command = ["unshare", "-m", "sh", str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(done.stderr.splitlines()[0])
    assert "code 2\nfiller\nwrote 900 problems" in done.stdout and done.stdout.endswith("p.jsonl\n")
    assert "No space left on device" in done.stderr and done.stderr.count("\n") == 1


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch):
    """As under nohup."""
    from common.cli import run

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(lambda: os.kill(os.getpid(), signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
