"""docs/tutorial.md: its Python blocks, run in order in one process from an empty folder."""

import os
import re

import pytest

from tests.conftest import ROOT
from tests.helpers.scripts import run_script

PAGE = ROOT / "docs/tutorial.md"


@pytest.mark.slow
@pytest.mark.process
def test_the_blocks_run_in_order(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    script = tmp_path / "tutorial.py"
    script.write_text(f"import sys\nsys.path.append({str(ROOT)!r})\n" + "\n".join(blocks))
    (tmp_path / "models").symlink_to(ROOT / "models")
    done = run_script(script, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "2"}, timeout=600)
    assert done.returncode == 0, done.stderr

    table = [line for line in done.stdout.splitlines() if line.startswith(("Step", "Answer"))]
    changes = {line[:36].rstrip(): float(line[52:60]) for line in table}
    assert len(changes) == 14
    for right in ("Step 1: 3 * 4 = 12, 20 + 12 = 32", "Step 1: 6 * 3 = 18"):
        assert changes[right] > 0.1
    for wrong in ("Step 1: 3 + 4 = 7, 20 + 7 = 27", "Step 1: 6 + 3 = 9", "Step 2: 35 - 17 = 28"):
        assert changes[wrong] < -0.1
    for after in ("Step 2: 9 + 5 = 14", "Answer: 14", "Answer: 27", "Answer: 28"):
        assert abs(changes[after]) < 0.05
    assert re.search(r"^base \[.*Answer: \d+'\]$", done.stdout, re.M)
    assert re.search(r"^tuned \[.*Answer: \d+'\]$", done.stdout, re.M)
