"""A line for what takes long; a bar whose clock goes on, and off a terminal a line for it."""

import io
import time

import pytest

from common import progress


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(progress, "QUIET", 0.1)
    monkeypatch.setattr(progress, "EVERY", 0.1)
    monkeypatch.setattr(progress, "EVERY_IN_LOG", 0.1)


def test_a_fast_block_prints_nothing(capsys):
    with progress.taking_long("thinking"):
        pass
    time.sleep(0.2)
    assert capsys.readouterr() == ("", "")


def test_a_slow_block_says_what_it_does_until_it_ends(capsys):
    with pytest.raises(KeyError), progress.taking_long("thinking"):
        time.sleep(0.35)
        raise KeyError
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 3
    assert all(line.startswith("still thinking (") and line.endswith("...") for line in lines)
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_clock_of_a_bar_goes_on_without_updates():
    drawn = Terminal()
    with progress.progress_bar(total=2, file=drawn, desc="x", mininterval=0) as bar:
        before = drawn.getvalue().count("\r")
        time.sleep(0.35)
        assert drawn.getvalue().count("\r") >= before + 2
        bar.update(2)
    assert "100%" in drawn.getvalue()


def test_off_a_terminal_a_stage_is_one_line(monkeypatch):
    monkeypatch.setattr(progress, "EVERY_IN_LOG", 300)
    log = io.StringIO()
    options = {"file": log, "mininterval": 0, "desc": "sampling", "unit": "problem"}
    with progress.progress_bar(total=1200, initial=200, **options) as bar:
        for _ in range(1000):
            bar.update()
        bar.set_postfix(loss="0.5")
    assert log.getvalue() == "sampling: 1,200 problems in 0 s, 200 of them before, loss=0.5\n"
    with pytest.raises(KeyError), progress.progress_bar(total=3, **options) as bar:
        bar.update()
        raise KeyError
    assert len(log.getvalue().splitlines()) == 1
    with pytest.raises(KeyError), progress.progress_bar(total=3, disable=True, **options):
        raise KeyError
    monkeypatch.setattr(progress, "QUIET", 0)
    with pytest.raises(KeyError), progress.progress_bar(total=3, **options) as bar:
        bar.update()
        raise KeyError
    assert log.getvalue().splitlines()[1:] == ["sampling: 1 of 3 problems in 0 s"]
    assert list(progress.Bar(iter("ab"), file=log, unit="batch")) == ["a", "b"]
    assert list(progress.Bar("c", file=log, unit="batch")) == ["c"]
    assert log.getvalue().splitlines()[2:] == ["2 batches in 0 s", "1 batch in 0 s"]
    before = log.getvalue()
    assert list(progress.Bar("ab", file=log, delay=9)) == ["a", "b"]  # too fast for a line
    assert list(progress.Bar("ab", file=log, disable=True)) == ["a", "b"]
    assert log.getvalue() == before


def test_off_a_terminal_a_long_stage_says_how_far_it_is():
    log = io.StringIO()
    with progress.progress_bar(total=2, file=log, unit="problem") as bar:
        bar.update()
        time.sleep(0.35)
        bar.update()
    *lines, last = log.getvalue().splitlines()
    assert 1 <= len(lines) <= 3 and set(lines) == {"1 of 2 problems in 0 s"}
    assert last == "2 problems in 0 s"
