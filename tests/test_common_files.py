"""common/files.py: files written whole or not at all, compressed files, rows that resume."""

import gzip
import os

import pytest

from common.errors import RecordError
from common.files import (
    AppendedRows,
    ResumableRows,
    content_hash,
    file_stem,
    file_type,
    open_bytes,
    read_records,
    read_rows,
    replacing,
    write_records,
    write_text,
)
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
