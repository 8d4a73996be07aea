"""`make help`: every target that a person calls has a line, in a group."""

import re
import subprocess

import pytest

from common.files import ROOT

pytestmark = pytest.mark.process


def test_help_has_one_line_for_every_target():
    makefile = (ROOT / "Makefile").read_text()
    (targets,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = shown.stdout.splitlines()
    listed = {line.split()[1]: line for line in lines if line.startswith("  make ")}
    assert listed.keys() == set(targets.split())
    assert all(len(line) <= 100 for line in lines)
    assert all(len(line.split()) > 2 for line in listed.values())
    groups = [line for line in lines if line and not line.startswith(" ")]
    assert groups == re.findall(r"^##@ (.*)$", makefile, re.MULTILINE) and len(groups) > 2
    alone = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert alone.stdout == shown.stdout
