"""Result files with their commit and versions, and the tables that scripts print."""

import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.cli import check_different, check_outputs
from common.files import ROOT, write_text
from common.terminal import printable
from evaluation.metrics import Metric

PACKAGES = (
    "torch", "transformers", "trl", "peft", "ctransformers", "xllamacpp", "numpy", "scipy",
    "scikit-learn",
)  # fmt: skip


def commit() -> str | None:
    """The commit of the repository, `-dirty` if tracked files differ from it; None without git."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    command.append("--exclude=*")  # no tags
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """The versions of Python and of the installed PACKAGES, and the machine's architecture."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def output_paths(
    output_dir: str,
    name: str,
    inputs: Sequence[str | Path | None],
    overwrite: bool,
    appends_rows: bool = False,
) -> tuple[Path, Path, Path]:
    """The paths of plot, rows and result, all in output_dir: NAME.png, NAME.jsonl and NAME.json.

    A script writes the result last. inputs: what the script reads. appends_rows: it keeps the rows
    of earlier runs. Raises UserError as `check_outputs` does."""
    plot, rows, result = (Path(output_dir, f"{name}.{end}") for end in ("png", "jsonl", "json"))
    check_different([plot, rows, result], inputs)
    check_outputs([plot, *([] if appends_rows else [rows]), result], inputs, overwrite)
    return plot, rows, result


def write_result(
    path: str | Path, metrics: dict[str, Metric], config: dict, seeds: Sequence[int], **more: object
) -> None:
    """Write a Result as JSON, whole or not at all; `more` are further keys, written first.

    Raises ValueError if a number is nan."""
    result = {
        **more,
        "metrics": {name: asdict(metric) for name, metric in metrics.items()},
        "config": {key: value for key, value in config.items() if key != "overwrite"},
        "seeds": list(seeds),
        "commit": commit(),
        "versions": versions(),
    }
    write_text(path, [json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"])


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table in Markdown."""
    # slow to import
    from rich.box import MARKDOWN
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=MARKDOWN)
    for row in rows:
        table.add_row(*map(printable, row))
    console = Console(markup=False, highlight=False, emoji=False)
    console.width = max(console.width, 160)  # rows are not wrapped in pipes and narrow terminals
    console.print(printable(title), "", sep="\n", soft_wrap=True)
    console.print(table)


def print_metrics(title: str, metrics: dict[str, Metric]) -> None:
    """Print metrics as a table: name, value and n."""
    rows = [(name, metric, metric.n) for name, metric in metrics.items()]
    print_table(title, ["metric", "value", "n"], rows)


def print_comparison(title: str, metrics: dict[str, Metric]) -> None:
    """Print the metrics of `compare` as a table: base, tuned and difference."""
    rows = []
    for key, difference in metrics.items():
        name = key.removesuffix("_improvement")
        if name != key:
            sides = (metrics[f"base_{name}"], metrics[f"tuned_{name}"])
            rows.append((name, *sides, difference, difference.n))
    print_table(title, ["metric", "base", "tuned", "difference", "n"], rows)
