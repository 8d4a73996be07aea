"""One HTML page of what evaluations and trainings left on disk.

It shows every problem of eval_reward_scores.py with the answers of base and tuned policy, each step
with the judge's score and the checker's mark; the curves of all trainings in the logs; and the
results of eval_search.py and eval_judge.py. A part without files is left out. The page is one file
that needs no network and sends nothing anywhere.
"""

import base64
import gzip
import hashlib
import html
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import arg, check_least, check_output, here, parse_args, run
from common.errors import RecordError, UserError
from common.files import at_root, read_rows, write_text
from common.progress import taking_long
from evaluation.metrics import Metric, first_error, reported_error
from reasoning.grading import grade_steps, graded
from reasoning.records import Problem

COMPARISON = "reward_score_comparison"  # the files of eval_reward_scores.py
SIDES = ("base", "tuned")
OUTCOMES = {  # (is base right, is tuned right) -> name
    (False, True): "fixed",
    (True, False): "broken",
    (True, True): "both right",
    (False, False): "both wrong",
}
HERE = Path(__file__).resolve()
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src '{style_hash}'; \
script-src '{script_hash}'; img-src data:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main><h1>{title}</h1><p id="message">This page is drawn by its script: allow scripts to see it.</p>
</main>
<script type="text/plain" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


@dataclass
class ReportArgs:
    results_dir: str = arg(
        at_root("evaluation/results"),
        "folder of results: of eval_reward_scores.py, eval_search.py and eval_judge.py",
    )
    logs_dir: str = arg(at_root("logs"), "folder of the trainings' logs, NAME/log.json")
    output: str | None = arg(None, "the page (default: report.html in results_dir)")
    limit: int | None = arg(None, "show the first LIMIT problems; all if not given")
    threshold: float = arg(
        0.5,
        "judge and checker disagree if the first step with a lower score is not the first error",
    )
    overwrite: bool = arg(False, "replace an existing page")

    def __post_init__(self) -> None:
        check_least(self, limit=1)
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"argument --threshold: expected a number above 0, up to 1, got {self.threshold}"
            )


@contextmanager
def as_written(where: str, script: str) -> Iterator[None]:
    """Within the block, what a file lacks becomes a RecordError that names the file."""
    try:
        yield
    except RecordError as error:
        raise RecordError(f"{where}: {error}") from None
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise RecordError(f"{where}: not as {script} writes it ({error!r})") from None


def read_result(path: Path) -> Any:
    """The JSON of a result or a log. Raises RecordError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path}: not JSON ({error})") from None


# --- problems ---


def answer_of(row: dict, side: str, problem: Problem, threshold: float) -> dict[str, Any]:
    """One answer for the page, graded.

    marks: for each step `right`, `wrong` (the first error), `after` (it follows the first error) or
    an empty text (nothing says whether it is right). disagrees: whether the judge reports another
    first error than the checker; without reference steps, whether it reports an error in a right
    answer or none in a wrong one."""
    steps, scores = row[f"{side}_steps"], row.get(f"{side}_scores")
    if not all(isinstance(step, str) for step in steps):
        raise ValueError(f"{side}_steps has something that is no text")
    if scores is not None and (
        len(scores) != len(steps) or not all(0 <= score <= 1 for score in scores)
    ):
        raise ValueError(f"{side}_scores is not one score from 0 to 1 for each step")
    sample = graded(problem.prompt, steps, row[f"{side}_finished"], problem)
    is_right = sample.verdict == "right"
    reported = reported_error(scores, threshold) if scores is not None else None
    if problem.steps:
        error = first_error(grade_steps(steps, problem))  # -1: none
        marks = ["right"] * len(steps)
        if error is not None and error >= 0:
            marks[error:] = ["wrong", *["after"] * (len(steps) - error - 1)]
        disagrees = reported is not None and reported != error
    else:
        error, marks = None, [""] * len(steps)
        if sample.stated is not None:
            marks[-1] = "right" if is_right else "wrong"
        disagrees = reported is not None and (reported == -1) != is_right
    return {
        "steps": steps,
        "scores": scores,
        "marks": marks,
        "verdict": sample.verdict,
        "disagrees": disagrees,
        "trapped": error in [k for k, is_trap in enumerate(problem.traps) if is_trap],
    }


def problem_of(row: dict, threshold: float) -> dict[str, Any]:
    """One problem for the page, with both answers."""
    problem = Problem.from_row(row)
    answers = {side: answer_of(row, side, problem, threshold) for side in SIDES}
    base, tuned = (answers[side]["verdict"] == "right" for side in SIDES)
    return {**asdict(problem), "outcome": OUTCOMES[base, tuned], **answers}


def comparison(folder: Path, threshold: float, limit: int | None) -> dict[str, Any] | None:
    """What eval_reward_scores.py left in a folder; None without its files. Raises RecordError."""
    result_path, rows_path = (folder / f"{COMPARISON}.{end}" for end in ("json", "jsonl"))
    if not (result_path.is_file() and rows_path.is_file()):
        return None
    problems = []
    for number, row in islice(read_rows(rows_path), limit):
        with as_written(f"{rows_path}:{number}", "eval_reward_scores.py"):
            problems.append(problem_of(row, threshold))
    result = read_result(result_path)
    with as_written(str(result_path), "eval_reward_scores.py"):
        config, found = result["config"], metrics_of(result)
        names = [name.removeprefix("base_") for name in found if name.startswith("base_")]
        parts = ("base_{}", "tuned_{}", "{}_improvement")
        return {
            "base": config["base_model"],
            "tuned": config["tuned_model"],
            "judge": " ".join(filter(None, (config["judge"], config.get("judge_path")))),
            "threshold": threshold,
            "metrics": [
                [name, *(str(found[part.format(name)]) for part in parts)] for name in names
            ],
            "problems": problems,
        }


def metrics_of(result: dict) -> dict[str, Metric]:
    return {name: Metric(**value) for name, value in result["metrics"].items()}


# --- curves: a panel has series of points (x, y) or (x, y, low, high) ---


def series(label: str, look: int, points: Sequence[Sequence[float]], **more: Any) -> dict[str, Any]:
    """look: 0 to 5, the number of colour, marker and kind of line."""
    numbers = [point for point in points if all(map(math.isfinite, point))]
    return {"label": label, "look": look, "points": numbers, **more}


def trainings(folder: Path, tuned: str | None) -> list[dict[str, Any]]:
    """The curves of all trainings in a folder of logs, first that of the tuned model.

    Raises RecordError."""
    with taking_long("loading the libraries"):
        from evaluation.plots import DRIFT, LESS_LIKELY, PANELS  # matplotlib is slow to import

    shown = PANELS | {"share of good steps that got less likely": {LESS_LIKELY: "good steps"}}
    shown |= {DRIFT: PANELS[DRIFT]}
    found = []
    for path in sorted(folder.glob("*/log.json")):
        log = read_result(path)
        with as_written(str(path), "train.py"):
            history = [row for row in log["history"] if "step" in row]
            panels = []
            for title, keys in shown.items():
                lines = [
                    series(label + held_out, 2 * k + bool(prefix), points)
                    for k, (key, label) in enumerate(keys.items())
                    for prefix, held_out in (("", ""), ("eval_", ", held-out"))
                    if (points := [
                        (row["step"], row[prefix + key]) for row in history if prefix + key in row
                    ])
                ]  # fmt: skip
                if lines:
                    y = [0, 1] if "share" in title else None
                    panels.append({"title": title, "x": "step", "y": y, "series": lines})
            name, seconds = path.parent.name, float(log["seconds"])
            of_tuned = tuned is not None and log["output_dir"] == str(Path(tuned).resolve())
            about = f"train.py {log['job']['command']}, {log['steps']} steps, {seconds:.0f} s"
            found.append({"name": name, "about": about, "panels": panels, "of_tuned": of_tuned})
    return sorted(found, key=lambda training: not training["of_tuned"])


def searches(path: Path) -> list[dict[str, Any]]:
    """The curves of eval_search.py, a list of panels for every split; none without its file.

    Every strategy has its own panel, with its controls, the majority vote and greedy answers."""
    if not path.is_file():
        return []
    result = read_result(path)
    with as_written(str(path), "eval_search.py"):
        own = Path(result["config"]["model_name_or_path"]).name
        metrics = metrics_of(result)
        splits: dict[str, dict[tuple[str, str], list[list[float]]]] = {}
        for key, metric in metrics.items():
            if key.endswith("/accuracy"):
                split, policy, strategy, n, _ = key.split("/")
                tokens = metrics[f"{split}/{policy}/{strategy}/{n}/tokens"].value
                lines = splits.setdefault(split, {}).setdefault((policy, strategy), [])
                lines.append([tokens, metric.value, *(metric.ci95 or [])])
        return [
            {"split": split, "panels": _search_panels(own, lines)}
            for split, lines in splits.items()
        ]


def _search_panels(
    own: str, lines: dict[tuple[str, str], list[list[float]]]
) -> list[dict[str, Any]]:
    greedy = [
        series("greedy" if policy == own else f"{policy}, greedy", look, points, level=True)
        for look, ((policy, strategy), points) in enumerate(lines.items(), 4)
        if strategy == "greedy"
    ][:2]
    vote = lines.get((own, "majority_vote"))
    names = [name for policy, name in lines if policy == own and name != "greedy"]
    strategies = [name for name in names if "-" not in name and name != "majority_vote"]
    panels = []
    for strategy in strategies or (["majority_vote"] if vote else []):
        shown = [series(strategy, 0, sorted(lines[own, strategy]))]
        if vote and strategy != "majority_vote":
            shown.append(series("majority_vote", 1, sorted(vote)))
        controls = [name for name in names if name.startswith(f"{strategy}-")]
        shown += [
            series(name, look, sorted(lines[own, name]))
            for look, name in enumerate(controls[:2], 2)
        ]
        panels.append(
            {
                "title": strategy,
                "x": "sampled tokens a problem, log scale",
                "log": True,
                "y": [0, 1],
                "series": [*shown, *greedy],
            }
        )
    return panels


def judges(folder: Path) -> list[dict[str, Any]]:
    """The report cards of eval_judge.py in a folder. Raises RecordError."""
    found = []
    for path in sorted(folder.glob("judge_*.json")):
        result = read_result(path)
        with as_written(str(path), "eval_judge.py"):
            panels = [
                {
                    "title": title,
                    "x": "mean score of the steps in a bin",
                    "y": [0, 1],
                    "series": [
                        series("measured", 0, [
                            (row["score"], row["right"]["value"], *(row["right"]["ci95"] or []))
                            for row in result[key]
                        ]),
                        series("perfect", 1, [(0, 0), (1, 1)]),
                    ],
                }
                for title, key in (
                    ("share of right steps, by score", "reliability"),
                    ("share of right rollouts, by score", "value_reliability"),
                )
                if result.get(key)
            ]  # fmt: skip
            rows = [[name, str(value), value.n] for name, value in metrics_of(result).items()]
            found.append({"name": result["judge"], "metrics": rows, "panels": panels})
    return found


# --- the page ---


def page(title: str, data: dict[str, Any]) -> str:
    """The page as HTML.

    The script writes all texts of `data` as text, never as HTML. The page forbids any other script
    or style, and any request."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII
    packed = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
    style, script = (HERE.with_suffix(end).read_text(encoding="utf-8") for end in (".css", ".js"))

    def content_hash(code: str) -> str:
        return f"sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}"

    return PAGE.format(
        title=html.escape(title),
        style=style,
        script=script,
        style_hash=content_hash(style),
        script_hash=content_hash(script),
        data=packed,
    )


def main() -> None:
    (args,) = parse_args(ReportArgs, description=__doc__)
    results, logs = Path(args.results_dir), Path(args.logs_dir)
    compared = comparison(results, args.threshold, args.limit)
    data = {
        "comparison": compared,
        "trainings": trainings(logs, compared["tuned"] if compared else None),
        "searches": searches(results / "search.json"),
        "judges": judges(results),
    }
    made_by = {  # part -> (the folder where it is looked for, the script that writes it)
        "comparison": (results, "python evaluation/eval_reward_scores.py"),
        "trainings": (logs, "python train.py"),
        "searches": (results, "python evaluation/eval_search.py"),
        "judges": (results, "python evaluation/eval_judge.py"),
    }
    if not any(data.values()):
        raise UserError(
            f"nothing to show: {results} has no results and {logs} no logs; run "
            f"{here('python evaluation/eval_reward_scores.py')} first, or name other folders"
        )
    output = Path(args.output or results / "report.html")
    check_output(output, args.overwrite)
    name = Path(compared["tuned"]).name if compared else results.resolve().name
    write_text(output, [page(f"Report: {name}", data)])
    for part, (folder, script) in made_by.items():
        if not data[part]:
            print(f"the page has no {part}: {folder} has none; {here(script)} writes them")
    print(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB): open it in a browser")


if __name__ == "__main__":
    run(main)
