"""Ranks of answers and labels of steps from people: which task comes next, and where it is saved.

This is the state behind the pages of utils/rank_responses.py; it knows nothing of a browser. All
state is in the file: it is written whole after each task, and read again if another program has
changed it. A page that is killed therefore loses nothing and resumes.
"""

import hashlib
import random
import re
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from common.errors import RecordError, UserError
from common.files import read_rows, write_records
from common.outputs import lock
from reasoning.datasets.files import Dropped
from reasoning.datasets.loading import load_records
from reasoning.datasets.ranking import RankedResponse, check_groups, read_answers, write_answers
from reasoning.records import LabelledSolution, PreferencePair

NAME = re.compile(r"[^\W_][\w .'-]{0,39}")
# The `human` judge treats null like a missing label.
LABELS = {"right": 1, "wrong": 0, "unsure": None}


def check_name(name: str) -> str:
    """A person's name with single spaces, none at the ends. Raises UserError for an invalid one."""
    name = " ".join(name.split())
    if name.lower().startswith(("rule:", "llm:")):
        raise UserError(
            f"ranker {name[:60]!r}: names that begin with rule: or llm: are for rules and models; "
            "give your own name"
        )
    if not NAME.fullmatch(name):
        raise UserError(
            f"ranker {name[:60]!r}: expected a name of 1 to 40 letters, digits, spaces or . - _ ', "
            "a letter or digit first"
        )
    return name


def hold(path: str | Path) -> IO[str]:
    """`lock` for a page. Raises UserError if another page writes to this file."""
    return lock(path, "use that page, which serves several people, stop it, or give another file")


@dataclass(frozen=True)
class AnnotationTask:
    """What a person decides in one go: the answers to a prompt, or the steps of a solution."""

    prompt: str
    items: tuple[str, ...]  # answers or steps, in the order in which they are shown
    marks: tuple[str, ...] = ()  # this person's mark of each item, "" for none; empty without marks
    note: str = ""

    @property
    def key(self) -> str:
        """Names the task: a hash of its texts in their order. Other texts are another task."""
        return hashlib.sha256(repr((self.prompt, self.items)).encode()).hexdigest()[:20]

    @property
    def done(self) -> bool:
        return bool(self.marks) and all(self.marks)


class Annotation:
    """Tasks in a fixed order, for any number of people by name. Safe with several threads."""

    def __init__(self, path: str | Path):
        self.path = path
        # The file behind a link is rewritten, so that the link stays a link.
        self._file = Path(path).resolve()
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None

    def tasks(self, name: str) -> list[AnnotationTask]:
        """All tasks with this person's marks. Raises RecordError or OSError: file unreadable."""
        with self._lock:
            self._refresh()
            return self._tasks(name)

    def save(self, name: str, key: str, marks: Sequence[str], note: str = "") -> None:
        """Write a person's marks of a task.

        Raises UserError for invalid marks or if the file no longer has the task, RecordError if the
        file is invalid, OSError if it cannot be written. After an error the file is unchanged."""
        with self._lock:
            self._refresh()
            task = find_task(self._tasks(name), key)
            decided = [mark for mark in marks if mark] if isinstance(marks, Sequence) else []
            if len(decided) != len(task.items):
                counts = f"{len(decided)} of {len(task.items)} are decided"
                raise UserError(f"{counts}: decide all of them, or skip")
            self._save(name, task, [str(mark) for mark in decided], " ".join(str(note).split()))
            self._seen = self._stamp()

    def _stamp(self) -> tuple[int, int, int] | None:
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


def find_task(tasks: Sequence[AnnotationTask], key: str) -> AnnotationTask:
    """The task with this key. Raises UserError if there is none."""
    for task in tasks:
        if task.key == key:
            return task
    raise UserError(
        "this task is not in the file any more: the file has changed since the page was loaded; "
        "reload the page"
    )


def next_task(tasks: Sequence[AnnotationTask], key: str | None = None) -> AnnotationTask | None:
    """The first open task after that of `key`, then from the start; None if all are done."""
    start = 0 if key is None else tasks.index(find_task(tasks, key)) + 1
    return next((task for task in [*tasks[start:], *tasks[:start]] if not task.done), None)


def task_before(tasks: Sequence[AnnotationTask], key: str | None = None) -> AnnotationTask:
    """The task before that of `key`; the first task stays. Without a key: the last task."""
    return tasks[-1] if key is None else tasks[max(0, tasks.index(find_task(tasks, key)) - 1)]


# --- answers ---


class AnswerRanking(Annotation):
    """Answers to rank.

    path: a table of RankedResponse. output: where ranks are saved (default: in the same table). A
    rank is written into the row of its answer if nobody has ranked that row, else it becomes a new
    row after the others of its prompt. The order in which answers are shown is drawn for each
    prompt and ranker; their source is not shown. Raises RecordError for an invalid table, UserError
    if `output` holds other answers."""

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
        source = self.path if exists else self._input
        rows = read_answers(source)
        check_groups(rows, source)
        self.rows = rows

    def _tasks(self, name: str) -> list[AnnotationTask]:
        answers: dict[str, set[str]] = defaultdict(set)  # by prompt
        own: dict[str, dict[str, RankedResponse]] = defaultdict(dict)  # by prompt and answer
        for row in self.rows:
            answers[row.prompt].add(row.answer)
            if row.ranker == name:
                own[row.prompt][row.answer] = row
        tasks = []
        for prompt, texts in answers.items():
            items = sorted(texts)
            random.Random(f"{name}\n{prompt}").shuffle(items)
            ranks = [own[prompt][item].rank if item in own[prompt] else None for item in items]
            marks = tuple("" if rank is None else str(rank) for rank in ranks)
            note = next((row.note for row in own[prompt].values()), "")
            tasks.append(AnnotationTask(prompt, tuple(items), marks, note))
        return tasks

    def _save(self, name: str, task: AnnotationTask, marks: list[str], note: str) -> None:
        n = len(marks)
        if not all(mark.isascii() and mark.isdecimal() and int(mark) <= n for mark in marks):
            raise UserError(f"expected ranks from 1 to {n}, got {', '.join(marks)[:60]}")
        unsaved = dict(zip(task.items, map(int, marks), strict=True))
        own = {row.answer for row in self.rows if (row.prompt, row.ranker) == (task.prompt, name)}
        rows: list[RankedResponse] = []
        end = 0  # where the rows of the prompt end
        for row in self.rows:
            if row.prompt == task.prompt:
                end = len(rows) + 1
                is_used = row.ranker or row.rank is not None or row.note or row.answer in own
                if (row.ranker == name or not is_used) and row.answer in unsaved:
                    row = replace(row, rank=unsaved.pop(row.answer), ranker=name, note=note)
            rows.append(row)
        first = {row.answer: row for row in reversed(rows) if row.prompt == task.prompt}
        rows[end:end] = [
            replace(first[answer], rank=rank, ranker=name, note=note)
            for answer, rank in unsaved.items()
        ]
        saved = [row for row in rows if (row.prompt, row.ranker) == (task.prompt, name)]
        try:
            check_groups(saved, self.path)
        except RecordError as error:
            # The person sees the prompt, so the message need not name it.
            raise UserError(str(error).rpartition(": ")[2]) from None
        write_answers(self._file, rows)
        self.rows = rows


# --- steps ---


def load_solutions(path: str) -> list[AnnotationTask]:
    """Every solution of a file, once, in an order drawn once for everybody.

    Solutions are both sides of preference pairs, labelled solutions (their labels are not shown),
    or the reference solutions of problems. The random order hides which side of a pair a solution
    was, and whoever stops early has labelled a random sample. Raises RecordError."""
    dropped = Dropped()
    solutions: dict[AnnotationTask, None] = {}
    for _, record in load_records(["pairs", "step_labels", "problems"], path, dropped=dropped):
        if isinstance(record, PreferencePair):
            sides = [[*record.prefix, *record.chosen], [*record.prefix, *record.rejected]]
        else:
            sides = [record.steps] if record.steps else []
        solutions |= {AnnotationTask(record.prompt, tuple(steps)): None for steps in sides}
    dropped.print(path)
    if not solutions:
        raise RecordError(f"{path}: no solutions with steps to label")
    shuffled = list(solutions)
    random.Random(0).shuffle(shuffled)
    return shuffled


# One row of the file of labels: a LabelledSolution (reasoning/records.py) and its labeller.
#   {"prompt": "Mia has 12 apples. ...",
#    "steps": ["Step 1: 12 + 14 = 26", "Step 2: 26 + 2 = 28", "Answer: 28"],
#    "labels": [1, 0, null],        1 right, 0 wrong, null unsure (the `human` judge ignores it)
#    "labeller": "Ann",             one row for each person and solution
#    "note": "ambiguous"}           absent if empty
class StepLabelling(Annotation):
    """Steps to label right, wrong or unsure.

    solutions: from `load_solutions`. path: a JSONL file of labels, created with the first one.
    Raises RecordError for an invalid file."""

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
        own = [row for row in self.rows if row.get("labeller") == name]
        labelled = {(row["prompt"], *row["steps"]): row for row in own}
        tasks = []
        for task in self._solutions:
            if row := labelled.get((task.prompt, *task.items)):
                marks = tuple(mark_of.get(label, "") for label in row["labels"])
                task = replace(task, marks=marks, note=str(row.get("note", "")))
            tasks.append(task)
        return tasks

    def _save(self, name: str, task: AnnotationTask, marks: list[str], note: str) -> None:
        if not set(marks) <= set(LABELS):
            raise UserError(f"expected {', '.join(LABELS)}, got {', '.join(marks)[:60]}")
        solution = {"prompt": task.prompt, "steps": list(task.items)}
        labels = {"labels": [LABELS[mark] for mark in marks]}
        labelled = {**solution, **labels, "labeller": name, **({"note": note} if note else {})}
        same = solution | {"labeller": name}
        earlier = (k for k, row in enumerate(self.rows) if same.items() <= row.items())
        place = next(earlier, len(self.rows))
        rows = [*self.rows[:place], labelled, *self.rows[place + 1 :]]
        write_records(self._file, rows)
        self.rows = rows
