"""The files of common: whole or not at all, compressed, rows that resume, identities."""

import gzip
import json
import os
import resource
import shutil

import pytest

from common.errors import RecordError
from common.files import (
    file_stem,
    file_type,
    open_bytes,
    read_records,
    read_rows,
    write_records,
    write_text,
)
from common.identity import content_hash, identity
from common.outputs import replacing
from common.resumable import AppendedRows, ResumableRows
from reasoning.records import PreferencePair

ROWS = [{"i": 0, "text": "🍎"}, {"i": 1, "text": "a\nb"}]


# --- whole or not at all ---


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    def chunks():
        yield "half"
        raise RuntimeError

    (tmp_path / "file").write_text("old")
    with pytest.raises(RuntimeError):
        write_text(tmp_path / "file", chunks())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_replacing(tmp_path):
    target = tmp_path / "new" / "file"
    with replacing(target) as temporary:
        temporary.write_text("new")
        assert temporary.parent == target.parent and not target.exists()
    assert target.read_text() == "new" and list(target.parent.iterdir()) == [target]
    mask = os.umask(0)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~mask
    with pytest.raises(KeyboardInterrupt), replacing(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "new" and list(target.parent.iterdir()) == [target]


# --- JSON lines, compressed or not ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no rows"),
        (b"\n \n", "no rows"),
        (b'{"prompt": ', ":1: not JSON"),
        (b'{"prompt": "\xff"}', ":1: not UTF-8"),
        (b"[" * 100_000, ":1: nested too deeply"),
    ],
)
def test_a_broken_file(tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(RecordError, match=message):
        list(read_records(tmp_path / "rows.jsonl", PreferencePair))


def test_names_of_compressed_files():
    for name in ("data/trees.jsonl", "data/trees.jsonl.gz"):
        assert (file_type(name), file_stem(name)) == (".jsonl", "trees")
    assert (file_type("table.csv.gz"), file_stem("table.v2.csv.gz")) == (".csv", "table.v2")


def test_a_compressed_file_reads_back_and_has_the_same_bytes_each_time(tmp_path):
    plain, first, second = (tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.gz"))
    for path in (plain, first, second):
        assert write_records(path, ROWS) == 2
        assert list(read_rows(path)) == list(enumerate(ROWS, 1))
    assert first.read_bytes() == second.read_bytes() != plain.read_bytes()
    assert gzip.decompress(first.read_bytes()) == plain.read_bytes()
    with open_bytes(first) as file:
        assert file.read() == plain.read_bytes()
    write_text(first, ["no rows of JSON"])
    assert gzip.decompress(first.read_bytes()) == b"no rows of JSON"


def test_a_damaged_compressed_file_is_one_line(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    write_records(path, [{"i": i, "text": str(i) * 9} for i in range(1000)])
    data = path.read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes(byte ^ 255 for byte in data[middle:])
    for damaged in (data[:middle], flipped, b"plain text"):
        path.write_bytes(damaged)
        with pytest.raises(RecordError, match=r"rows.jsonl.gz: not a complete gzip file") as error:
            list(read_rows(path))
        assert "\n" not in str(error.value)


# --- appended rows ---


def test_appended_rows_survive_a_torn_and_a_damaged_line(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    rows = AppendedRows(path)
    assert rows.rows == []
    rows.append(*ROWS)
    rows.append({"i": 2})
    assert rows.rows == [*ROWS, {"i": 2}]
    lines = path.read_bytes().splitlines(keepends=True)  # appended at once, without close()
    assert len(lines) == 3
    rows.close()
    # the second line is damaged, a line is no object, and the last line is torn
    path.write_bytes(lines[0] + b'{"i": 1, "te\xff\n[1]\n' + lines[2] + b'{"i": 3')
    again = AppendedRows(path)
    assert again.rows == [ROWS[0], {"i": 2}]
    again.append({"i": 1})
    again.close()
    assert AppendedRows(path).rows == [ROWS[0], {"i": 2}, {"i": 1}]
    assert path.read_bytes().endswith(lines[2] + b'{"i": 1}\n')


def test_resumable_rows_lose_and_repeat_nothing(tmp_path):
    output, job = tmp_path / "out.jsonl", {"seed": 0}
    rows = ResumableRows(output, job, unit=2)
    for i in range(3):
        rows.append({"i": i})
    with open(rows.path, "ab") as file:
        file.write(b'{"i": 3')  # killed in the middle of a row
    assert ResumableRows.pending(output, job) and not ResumableRows.pending(output, {"seed": 1})
    again = ResumableRows(output, job, unit=2)
    assert again.rows == [{"i": 0}, {"i": 1}]  # row 2 was half of a unit
    again.append({"i": 2})
    again.append({"i": 3})
    assert ResumableRows(output, job, unit=2).rows == [{"i": i} for i in range(4)]
    again.finish()
    assert not again.path.exists() and not ResumableRows.pending(output, job)


def test_rows_after_a_damaged_line_are_computed_again(tmp_path):
    output, job = tmp_path / "out.jsonl.gz", {"seed": 0}
    rows = ResumableRows(output, job)
    rows.append(*({"i": i} for i in range(4)))
    rows.close()
    header, *lines = rows.path.read_bytes().splitlines(keepends=True)
    rows.path.write_bytes(header + lines[0] + b'{"i": \n' + lines[2] + lines[3])
    assert ResumableRows(output, job).rows == [{"i": 0}]
    assert rows.path.read_bytes() == header + lines[0]


FOREIGN = {
    "zeros": b"\0" * 500 + b"\n",
    "zeros without an end": b"\0" * 500,
    "no UTF-8": b'{"n": 2, "row": {"i": "\xff"}}\n',
    "another row": b'{"i": 99}\n',
    "a row with another number": b'{"n": 1, "row": {"i": 99}}\n',
    "a huge line": b'{"n": 2, "row": "' + b"x" * 3_000_000 + b"\n",
    "a huge number": b'{"n": 2, "row": ' + b"9" * 5_000 + b"}\n",
    "brackets": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("line", FOREIGN.values(), ids=FOREIGN)
def test_rows_from_a_foreign_line_on_are_computed_again(tmp_path, line):
    output, job = tmp_path / "out.jsonl", {"seed": 0}
    rows = ResumableRows(output, job)
    rows.append(*({"i": i} for i in range(4)))
    rows.close()
    lines = rows.path.read_bytes().splitlines(keepends=True)
    rows.path.write_bytes(b"".join(lines[:3]) + line + b"".join(lines[3:]))
    again = ResumableRows(output, job)
    assert again.rows == [{"i": 0}, {"i": 1}]
    again.append({"i": 2})
    assert ResumableRows(output, job).rows == [{"i": 0}, {"i": 1}, {"i": 2}]


def test_partial_rows_whose_first_line_is_damaged(tmp_path):
    output, job = tmp_path / "out.jsonl", {"seed": 0}
    partial = tmp_path / "out.jsonl.partial"
    for content in (b"", b"\0" * 100):  # a power cut
        partial.write_bytes(content)
        assert ResumableRows(output, job).rows == []
    for content in (b"\xff\xfe\n", b"[1]\n", b"my notes", b"x" * 1_000_000, b'{"job": 1}\n'):
        partial.write_bytes(content)
        with pytest.raises(RecordError, match=r"out.jsonl.partial: .*another job") as error:
            ResumableRows(output, job)
        assert "\n" not in str(error.value) and partial.read_bytes() == content


def test_a_file_of_something_else_is_never_appended_to(tmp_path):
    path = tmp_path / "notes.txt"
    for content in (b"my notes\n", b"my notes", b'{"i": 1}\n', b'[1]\n{"text": "torn'):
        path.write_bytes(content)
        with pytest.raises(RecordError, match=r"notes.txt: holds something else"):
            AppendedRows(path, lambda row: "key" in row)
        assert path.read_bytes() == content
    for content in (b"", b'{"key": "to', b"\0" * 99):  # killed in its first row, or a power cut
        path.write_bytes(content)
        rows = AppendedRows(path, lambda row: "key" in row)
        rows.append({"key": 1})
        assert AppendedRows(path, lambda row: "key" in row).rows == [{"key": 1}]


def test_two_processes_may_append_to_one_file(tmp_path):
    """What one of them left half-written when it was killed does not damage the other's rows."""
    first, second = (AppendedRows(tmp_path / "rows.jsonl") for _ in range(2))
    first.append({"i": 0})
    with open(first.path, "ab") as file:
        file.write(b'{"i": 1')
    second.append({"i": 2})
    first.append({"i": 3})
    assert AppendedRows(first.path).rows == [{"i": 0}, {"i": 2}, {"i": 3}]


def test_a_row_that_finds_no_room_is_not_there(tmp_path, monkeypatch):
    rows = AppendedRows(tmp_path / "rows.jsonl")
    rows.append({"i": 0})
    before, limits = rows.path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 3, limits[1]))
    try:
        with pytest.raises(OSError, match=r"rows.jsonl"):
            rows.append({"i": 1}, {"i": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert rows.rows == [{"i": 0}] and rows.path.read_bytes() == before
    rows.append({"i": 1})
    assert AppendedRows(rows.path).rows == [{"i": 0}, {"i": 1}]


def test_rows_of_another_job_are_not_continued(tmp_path):
    output = tmp_path / "out.jsonl"
    rows = ResumableRows(output, {"seed": 0})
    rows.append({"i": 0})
    with pytest.raises(RecordError, match=r"out.jsonl.partial: .*another job"):
        ResumableRows(output, {"seed": 1})
    assert ResumableRows(output, {"seed": 0}).rows == [{"i": 0}]
    assert ResumableRows(output, {"seed": 1}, overwrite=True).rows == []
    assert ResumableRows.pending(output, {"seed": 1})


# --- hashes ---


def test_identity_is_content_wherever_it_lies(tmp_path):
    """Everything that changes what a model does changes it, and nothing else."""
    model, moved = tmp_path / "model", tmp_path / "moved"
    model.mkdir()
    files = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
    files += ("tokenizer.model", "vocab.txt", "merges.txt", "chat_template.jinja", "modeling.py")
    for name in files:
        (model / name).write_text(name)
    first = identity(str(model))
    shutil.copytree(model, moved)
    assert identity(str(moved)) == first
    for other in ("README.md", "training_job.json", "model.Q8_0.gguf", "notes.txt"):
        (model / other).write_text("another")
    assert identity(str(model)) == first
    for name in files:
        (moved / name).write_text("changed")
        assert identity(str(moved)) != first, name
        (moved / name).write_text(name)
    assert identity(str(moved)) == first


def test_the_identity_of_an_adapter_has_its_base(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    (base / "model.safetensors").write_text("weights")
    config = {"base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    first = identity(str(adapter))
    (base / "model.safetensors").write_text("other weights")
    assert identity(str(adapter)) != first
    for damaged in ("{", "[1]", '{"base_model_name_or_path": 1}'):
        (adapter / "adapter_config.json").write_text(damaged)
        assert identity(str(adapter))


def test_the_identity_of_a_hub_model_is_its_commit_if_that_is_known(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert identity("org/name") == "org/name"
    snapshots = tmp_path / "models--org--name"
    for commit in ("1" * 40, "2" * 40):
        (snapshots / "snapshots" / commit).mkdir(parents=True)
        (snapshots / "snapshots" / commit / "config.json").write_text("{}")
        (snapshots / "refs").mkdir(exist_ok=True)
        (snapshots / "refs/main").write_text(commit)
        assert identity("org/name") == f"org/name@{commit}"
    assert identity("org/name", "1" * 40) == f"org/name@{'1' * 40}"


def test_content_hash(tmp_path):
    (tmp_path / "model").mkdir()
    assert content_hash(tmp_path / "model") is None and content_hash(tmp_path / "none") is None
    (tmp_path / "model/config.json").write_text("{}")
    first = content_hash(tmp_path / "model")
    (tmp_path / "model/README.md").write_text("not part of the model")
    assert content_hash(tmp_path / "model") == first
    (tmp_path / "model/model.safetensors").write_text("weights")
    assert content_hash(tmp_path / "model") != first
    assert content_hash(tmp_path / "model/config.json") == (
        "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    )
