"""Ranks of answers and labels of steps that people give: which task is next for whom, and what is saved where.

The state of the pages of utils/rank_responses.py, without a page. Everything known is in the file: it is written whole after each
task, and read again if somebody else has written it since. So a page that is killed loses nothing, and resumes.
"""

import fcntl
import hashlib
import os
import random
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from common.errors import RecordError, UserError
from common.files import read_rows, write_records
from reasoning.datasets.loading import load_records
from reasoning.datasets.ranking import RankedResponse, check_groups, read_answers, write_answers
from reasoning.records import LabelledSolution, PreferencePair

NAME = re.compile(r"[^\W_][\w .'-]{0,39}")
# null is what the `human` judge takes for: nobody said
LABELS = {"right": 1, "wrong": 0, "unsure": None}


def check_name(name: str) -> str:
    """A person's name, without spaces around. Raises UserError."""
    name = " ".join(name.split())
    if name.lower().startswith(("rule:", "llm:")):
        raise UserError(
            f"ranker {name[:60]!r}: names that begin with rule: or llm: are for what is no person; give your own name"
        )
    if not NAME.fullmatch(name):
        raise UserError(
            f"ranker {name[:60]!r}: expected a name of 1 to 40 letters, digits, spaces or . - _ ', a letter or digit first"
        )
    return name


def hold(path: str | Path) -> TextIO:
    """Keep other pages off a file as long as the returned handle is open; the kernel lets go when the process dies, however it
    dies. PATH.lock stays behind, empty of meaning. Raises UserError if another page holds the file."""
    handle = open(f"{Path(path).resolve()}.lock", "a+", encoding="utf-8")  # noqa: SIM115 (open as long as the page is)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        holder = handle.read().strip() or "unknown"
        handle.close()
        what = f"another page (process {holder}) writes to this file"
        raise UserError(
            f"{path}: {what}; use that page, which takes several people, stop it, or give another file"
        ) from None
    handle.truncate(0)
    handle.write(f"{os.getpid()}\n")
    handle.flush()
    return handle


@dataclass(frozen=True)
class AnnotationTask:
    """What a person decides at once: the answers to a prompt, or the steps of a solution."""

    prompt: str
    items: tuple[str, ...]  # answers or steps, in the order in which they are shown
    marks: tuple[str, ...] = ()  # what this person said of each, "" for nothing; empty if of none
    note: str = ""

    @property
    def key(self) -> str:
        """Names the task. Other texts, or another order, make another task: what is said of one is never saved for another."""
        return hashlib.sha256(repr((self.prompt, self.items)).encode()).hexdigest()[:20]

    @property
    def done(self) -> bool:
        return bool(self.marks) and all(self.marks)


class Annotation:
    """Tasks in a fixed order, done by any number of people by name. Safe to use from several threads."""

    def __init__(self, path: str | Path):
        self.path = path
        # a link stays one: it is the file behind it that is written anew
        self._file = Path(path).resolve()
        self._lock = threading.Lock()
        self._seen: tuple | None = None

    def tasks(self, name: str) -> list[AnnotationTask]:
        """All tasks, with what this person said. Raises RecordError or OSError if the file cannot be read any more."""
        with self._lock:
            self._refresh()
            return self._tasks(name)

    def save(self, name: str, key: str, marks: Sequence[str], note: str = "") -> None:
        """Write what a person says of a task. Raises RecordError if it makes no sense, UserError if the task is not there (any
        more), OSError if it cannot be written; the file is as it was then."""
        with self._lock:
            self._refresh()
            task = find(self._tasks(name), key)
            decided = [mark for mark in marks if mark] if isinstance(marks, Sequence) else []
            if len(decided) != len(task.items):
                raise UserError(
                    f"{len(decided)} of {len(task.items)} are decided: decide all of them, or skip"
                )
            self._save(name, task, [str(mark) for mark in decided], " ".join(str(note).split()))
            self._seen = self._stamp()

    def _stamp(self) -> tuple | None:
        if not self._file.exists():
            return None
        stat = self._file.stat()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _refresh(self) -> None:
        if (stamp := self._stamp()) != self._seen or stamp is None:
            self._read(stamp is not None)
            self._seen = stamp

    def _read(self, exists: bool) -> None:
        raise NotImplementedError

    def _tasks(self, name: str) -> list[AnnotationTask]:
        raise NotImplementedError

    def _save(self, name: str, task: AnnotationTask, marks: list[str], note: str) -> None:
        raise NotImplementedError


def find(tasks: Sequence[AnnotationTask], key: str) -> AnnotationTask:
    for task in tasks:
        if task.key == key:
            return task
    raise UserError(
        "this task is not in the file any more: the file was changed while you were reading; reload the page"
    )


def next_task(tasks: Sequence[AnnotationTask], key: str | None = None) -> AnnotationTask | None:
    """The first open task behind that of `key` (default: from the beginning), then from the beginning; None if all are done."""
    start = 0 if key is None else tasks.index(find(tasks, key)) + 1
    return next((task for task in [*tasks[start:], *tasks[:start]] if not task.done), None)


def task_before(tasks: Sequence[AnnotationTask], key: str | None = None) -> AnnotationTask:
    """The task before that of `key`; the first stays the first. Without a key, when all are done: the last."""
    return tasks[-1] if key is None else tasks[max(0, tasks.index(find(tasks, key)) - 1)]


# --- answers ---------------------------------------------------------------------------------------------------------------------


class AnswerRanking(Annotation):
    """Answers to be ranked. path: a table of RankedResponse; output: where ranks go (default: into the same table).

    A rank fills the empty cells of a row that nobody ranked, or becomes a row of its own, behind the others of its prompt. The
    answers are shown in an order drawn anew for each prompt and ranker; where they come from is not shown. Raises RecordError."""

    def __init__(self, path: str | Path, output: str | Path | None = None):
        super().__init__(output or path)
        self.rows: list[RankedResponse] = []
        self._input = path
        if output and Path(output).exists():
            known = {(row.prompt, row.answer) for row in read_answers(output)}
            if known != {(row.prompt, row.answer) for row in read_answers(path)}:
                raise UserError(f"{output}: holds other answers than {path}; give another --output")
        self._refresh()

    def _read(self, exists: bool) -> None:
        rows = read_answers(self.path if exists else self._input)
        check_groups(rows, self.path if exists else self._input)
        self.rows = rows

    def _tasks(self, name: str) -> list[AnnotationTask]:
        answers, said = defaultdict(dict), defaultdict(dict)
        for row in self.rows:
            answers[row.prompt][row.answer] = None
            if row.ranker == name:
                said[row.prompt][row.answer] = row
        tasks = []
        for prompt, texts in answers.items():
            items = sorted(texts)
            random.Random(f"{name}\n{prompt}").shuffle(items)
            ranks = [said[prompt][item].rank if item in said[prompt] else None for item in items]
            note = next((row.note for row in said[prompt].values()), "")
            tasks.append(
                AnnotationTask(
                    prompt,
                    tuple(items),
                    tuple("" if rank is None else str(rank) for rank in ranks),
                    note,
                )
            )
        return tasks

    def _save(self, name: str, task: AnnotationTask, marks: list[str], note: str) -> None:
        if not all(
            mark.isascii() and mark.isdecimal() and int(mark) <= len(marks) for mark in marks
        ):
            raise UserError(f"expected ranks from 1 to {len(marks)}, got {', '.join(marks)[:60]}")
        ranks = dict(zip(task.items, map(int, marks), strict=True))
        said = {"ranker": name, "note": note}
        rows, last, open_ = [], 0, dict(ranks)
        own = {row.answer for row in self.rows if (row.prompt, row.ranker) == (task.prompt, name)}
        for row in self.rows:
            if row.prompt == task.prompt:
                last = len(rows) + 1
                empty = (
                    not row.ranker and row.rank is None and not row.note and row.answer not in own
                )
                if (row.ranker == name or empty) and row.answer in open_:
                    row = replace(row, rank=open_.pop(row.answer), **said)
            rows.append(row)
        first = {row.answer: row for row in reversed(rows) if row.prompt == task.prompt}
        rows[last:last] = [
            replace(first[answer], rank=rank, **said) for answer, rank in open_.items()
        ]
        try:
            check_groups(
                [row for row in rows if (row.prompt, row.ranker) == (task.prompt, name)], self.path
            )
        except RecordError as error:
            # the person sees which prompt it is
            raise UserError(str(error).rpartition(": ")[2]) from None
        write_answers(self._file, rows)
        self.rows = rows


# --- steps -----------------------------------------------------------------------------------------------------------------------


def load_solutions(path: str) -> list[AnnotationTask]:
    """Every solution of a file, once: both sides of preference pairs, labelled solutions (their labels are not shown), or the
    reference solutions of problems. In an order drawn once for everybody: which side a solution was is not seen, and whoever
    stops early has labelled a random sample. Raises RecordError."""
    dropped, solutions = Counter(), {}
    for _, record in load_records(["pairs", "step_labels", "problems"], path, dropped=dropped):
        if isinstance(record, PreferencePair):
            sides = [[*record.prefix, *record.chosen], [*record.prefix, *record.rejected]]
        else:
            sides = [record.steps] if record.steps else []
        solutions |= {AnnotationTask(record.prompt, tuple(steps)): None for steps in sides}
    if not solutions:
        left_out = (
            f" ({', '.join(f'{count} {what}' for what, count in dropped.items())})"
            if dropped
            else ""
        )
        raise RecordError(f"{path}: no solutions with steps to label{left_out}")
    shuffled = list(solutions)
    random.Random(0).shuffle(shuffled)
    return shuffled


# One row of the file of labels: a LabelledSolution (reasoning/records.py) and who said it.
#   {"prompt": "Mia has 12 apples. ...",
#    "steps": ["Step 1: 12 + 14 = 26", "Step 2: 26 + 2 = 28", "Answer: 28"],
#    "labels": [1, 0, null],        1 right, 0 wrong, null unsure: the `human` judge then leaves the step to others
#    "labeller": "Ann",             one row a person and solution
#    "note": "ambiguous"}           left out if empty
class StepLabelling(Annotation):
    """Steps to be labelled right, wrong or unsure. solutions: as `load_solutions` gives them; path: JSONL of labels, made with the
    first one. Raises RecordError."""

    def __init__(self, solutions: Sequence[AnnotationTask], path: str | Path):
        super().__init__(path)
        self._solutions = solutions
        self.rows: list[dict[str, Any]] = []
        self._refresh()

    def _read(self, exists: bool) -> None:
        rows = []
        for number, row in read_rows(self._file) if exists else ():
            try:
                LabelledSolution.from_row(row)
            except RecordError as error:
                raise RecordError(f"{self.path}:{number}: {error}") from None
            rows.append(row)
        self.rows = rows

    def _tasks(self, name: str) -> list[AnnotationTask]:
        mark_of = {label: mark for mark, label in LABELS.items()}
        said = {
            (row["prompt"], *row["steps"]): row for row in self.rows if row.get("labeller") == name
        }
        tasks = []
        for task in self._solutions:
            if row := said.get((task.prompt, *task.items)):
                task = replace(
                    task,
                    marks=tuple(mark_of.get(label, "") for label in row["labels"]),
                    note=str(row.get("note", "")),
                )
            tasks.append(task)
        return tasks

    def _save(self, name: str, task: AnnotationTask, marks: list[str], note: str) -> None:
        if not set(marks) <= set(LABELS):
            raise UserError(f"expected {', '.join(LABELS)}, got {', '.join(marks)[:60]}")
        said = {
            "prompt": task.prompt,
            "steps": list(task.items),
            "labels": [LABELS[mark] for mark in marks],
            "labeller": name,
        }
        said |= {"note": note} if note else {}
        same = ("prompt", "steps", "labeller")
        places = [
            k
            for k, row in enumerate(self.rows)
            if all(row.get(field) == said[field] for field in same)
        ]
        rows = (
            [*self.rows[: places[0]], said, *self.rows[places[0] + 1 :]]
            if places
            else [*self.rows, said]
        )
        write_records(self._file, rows)
        self.rows = rows
