"""The main function of a script, called in the process of the test."""

import sys
from collections.abc import Callable
from typing import Any

from common.cli import run


def call_main(
    main: Callable[[], None], *arguments: object, monkeypatch: Any, capsys: Any
) -> tuple[int, str, str]:
    """Call main with these arguments as its command line. Returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, arguments)])
    code = 0
    try:
        run(main)
    except SystemExit as stopped:
        code = stopped.code
    return code, *capsys.readouterr()
