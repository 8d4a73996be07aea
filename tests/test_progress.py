"""A line for what takes long, and a bar whose clock goes on."""

import io
import time

import pytest

from common import progress


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(progress, "QUIET", 0.1)
    monkeypatch.setattr(progress, "EVERY", 0.1)


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


def test_the_clock_of_a_bar_goes_on_without_updates():
    drawn = io.StringIO()
    with progress.progress_bar(total=2, file=drawn, desc="x", mininterval=0) as bar:
        before = drawn.getvalue().count("\r")
        time.sleep(0.35)
        assert drawn.getvalue().count("\r") >= before + 2
        bar.update(2)
    assert "100%" in drawn.getvalue()
