"""Serve a web page on which people rank answers, best first, and label the steps of solutions.

    python utils/rank_responses.py --ranker Ann          ranks go to data/answers.csv.gz
    python utils/rank_responses.py --steps pairs.jsonl   the third tab labels steps
    python utils/rank_responses.py --agreement           print how far the rankers agree

The page is http://127.0.0.1:7860. Only the printed address opens it: its token is new whenever the
script starts. The page needs no network and sends nothing anywhere. Every group is saved at once,
so a page that was stopped resumes.
"""

import html
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import arg, check_different, check_input, parse_args, run
from common.errors import UserError
from common.files import at_root
from common.formulas import html_with_formulas
from common.page_server import check_port, prepare, serve
from evaluation.agreement import AGREEMENT_COLUMNS, agreement_rows
from evaluation.results import print_table
from reasoning.annotation import (
    LABELS,
    Annotation,
    AnnotationTask,
    AnswerRanking,
    StepLabelling,
    check_name,
    hold,
    load_solutions,
    next_task,
    task_before,
)
from reasoning.datasets.ranking import check_groups, read_answers

ANSWERS = "data/answers.csv.gz"
MADE_BY = "python utils/build_ranked_responses.py"
HERE = Path(__file__).resolve()


@dataclass
class RankArguments:
    input: str = arg(at_root(ANSWERS), "table of answers (columns prompt, answer, rank ...)")
    output: str | None = arg(None, "where ranks are saved, a table too (default: in the input)")
    ranker: str | None = arg(None, "your name (default: the page asks each person)")
    steps: str | None = arg(
        None, "solutions whose steps to label: pairs, labelled solutions, problems with steps"
    )
    labels: str = arg(
        at_root("data/step_labels.jsonl"),
        "where labels of steps are saved, JSONL; `--judge human --judge_labels FILE` reads it",
    )
    agreement: bool = arg(False, "print how far the rankers agree, then exit")
    port: int = arg(7860, "port of the page on this machine")
    share: bool = arg(False, "give the page a public address too, through Gradio's servers")

    def __post_init__(self) -> None:
        check_port(self.port)
        if self.ranker is not None:
            self.ranker = check_name(self.ranker)


# --- the page as HTML; every text from a file or a person is escaped ---


@dataclass(frozen=True)
class Kind:
    """The difference between ranking answers and labelling steps."""

    name: str  # of the items, in the style sheet
    unit: str  # what the page counts
    question: str
    help: str
    marks: Callable[[AnnotationTask], dict[str, Sequence[str]]]  # mark -> the keys that set it
    can_drag: bool = False


RANKS = Kind(
    "answers",
    "prompts",
    "Which answer is better? 1 is the best; the same number twice is a tie.",
    "<kbd>1</kbd> <kbd>2</kbd> ... rank the framed answer, from the first to the last · "
    "<kbd>↑</kbd> <kbd>↓</kbd> frame another · or drag the answers by <b>⠿</b>, best first",
    lambda task: {str(rank): [str(rank)] for rank in range(1, len(task.items) + 1)},
    can_drag=True,
)
STEPS = Kind(
    "steps",
    "solutions",
    "Is each step right, given the problem? A step that builds on a wrong one is wrong as well.",
    "<kbd>1</kbd> or <kbd>R</kbd> right · <kbd>2</kbd> or <kbd>W</kbd> wrong · "
    "<kbd>3</kbd> or <kbd>U</kbd> unsure: label the framed step · <kbd>↑</kbd> <kbd>↓</kbd> "
    "frame another",
    lambda task: {mark: [str(k), mark[0]] for k, mark in enumerate(LABELS, 1)},
)


def head_html(name: str, tasks: Sequence[AnnotationTask], kind: Kind) -> str:
    done, total = sum(task.done for task in tasks), len(tasks)
    return (
        f'<div class="head"><span>{html.escape(name)}</span>'
        f'<progress value="{done}" max="{total}"></progress>'
        f"<span>{done} of {total} {kind.unit} done</span></div>"
    )


BACK_AND_MESSAGE = """<button data-do="back">Back <kbd>B</kbd></button>
<span class="message" role="status"></span>"""


def task_html(name: str, tasks: Sequence[AnnotationTask], task: AnnotationTask, kind: Kind) -> str:
    marks = kind.marks(task)
    keys = html.escape(json.dumps({key: mark for mark, keys in marks.items() for key in keys}))
    buttons = "".join(
        f'<button type="button" tabindex="-1" data-mark="{mark}">{mark}</button>' for mark in marks
    )
    grip = '<span class="grip" title="drag">⠿</span>' if kind.can_drag else ""
    marked = zip(task.items, task.marks or [""] * len(task.items), strict=True)
    items = "".join(
        f'<div class="item" tabindex="0" data-place="{k}" data-mark="{html.escape(mark)}">'
        f'<div class="choice">{buttons}{grip}</div>'
        f'<div class="text" dir="auto">{html_with_formulas(item)}</div></div>'
        for k, (item, mark) in enumerate(marked)
    )
    save = "Save again" if task.done else "Save"
    return f"""{head_html(name, tasks, kind)}
<div class="task" data-key="{task.key}" data-keys="{keys}">
<div class="prompt" dir="auto">{html_with_formulas(task.prompt)}</div>
<div class="ask">{kind.question}</div><div class="help">{kind.help}</div>
<div class="items {kind.name}">{items}</div>
<input class="note" maxlength="1000" placeholder="A note, if you like (N; Esc leaves it)"
 value="{html.escape(task.note)}">
<div class="foot"><button data-do="save">{save} <kbd>Enter</kbd></button>
<button data-do="skip">Skip <kbd>S</kbd></button>{BACK_AND_MESSAGE}</div></div>"""


def done_html(name: str, tasks: Sequence[AnnotationTask], kind: Kind) -> str:
    done = f"All {len(tasks)} {kind.unit} are done."
    return f"""{head_html(name, tasks, kind)}
<div class="task" data-keys="{{}}"><div class="done">{done}</div>
<div class="foot">{BACK_AND_MESSAGE}</div></div>"""


def name_html(problem: str) -> str:
    return f"""<form><label for="ranker">Your name</label>
<input id="ranker" maxlength="40" autocomplete="off"><button>Start</button>
<span class="message bad" role="status">{html.escape(problem)}</span></form>"""


def turn(work: Annotation, kind: Kind, request: dict[str, Any]) -> dict[str, str]:
    """Answer one request of the page.

    request: {"action": open, save, skip or back, "name", "key", "marks", "note"}. Returns {"html"}
    to show, with "ask" if the person's name is needed, or {"error"}. The server keeps no state of a
    page, so an open page works with a server that was started again."""
    try:
        try:
            name = check_name(str(request.get("name") or ""))
        except UserError as error:
            return {"html": name_html(str(error) if request.get("name") else ""), "ask": "name"}
        action, key = request.get("action"), request.get("key")
        if action == "save":
            work.save(name, key, request.get("marks"), request.get("note") or "")
        tasks = work.tasks(name)
        if action == "back":
            task = task_before(tasks, key)
        else:
            task = next_task(tasks, key if action in ("save", "skip") else None)
        shown = task_html(name, tasks, task, kind) if task else done_html(name, tasks, kind)
        return {"html": shown}
    except (UserError, OSError) as error:
        return {"error": f"Not saved: {error}" if request.get("action") == "save" else str(error)}


def agreement_html(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return '<div class="agreement"><p>No prompt has been ranked by two rankers yet.</p></div>'
    table = [[f"<td>{html.escape(cell)}</td>" for cell in row] for row in rows]
    cells = "".join(f"<tr>{''.join(row)}</tr>" for row in table)
    columns = "".join(f"<th>{html.escape(column)}</th>" for column in AGREEMENT_COLUMNS)
    return f"""<div class="agreement"><table><tr>{columns}</tr>{cells}</table>
<p>Kendall's tau-b within a prompt: the mean over the n prompts for which it is defined, with a 95 %
bootstrap interval. 1 is the same order, 0 is chance, -1 the opposite order. Krippendorff's alpha,
ordinal, over the answers that two or more of the rankers ranked: 1 is perfect agreement, 0 is
chance.</p></div>"""


# --- the page in Gradio ---


def build_page(ranking: AnswerRanking, labelling: StepLabelling | None, ranker: str | None) -> Any:
    """The Gradio Blocks."""
    import gradio as gr  # heavy

    script = HERE.with_suffix(".js").read_text(encoding="utf-8")
    name = html.escape(ranker or "")
    # Texts never enter Gradio's templates, which would run code in them.
    template = f'<div class="work" data-name="{name}"><span class="message"></span></div>'

    def workplace(work: Annotation, kind: Kind) -> None:
        def answer(request: dict) -> dict:
            return turn(work, kind, request)

        answer.__name__ = "turn"  # the name by which the script calls it
        gr.HTML(
            html_template=template,
            js_on_load=script,
            server_functions=[answer],
            apply_default_css=False,
        )

    with gr.Blocks(title="Rank responses", analytics_enabled=False) as page:
        with gr.Tab("Rank answers"):
            workplace(ranking, RANKS)
        with gr.Tab("Agreement") as tab:
            table = gr.HTML(apply_default_css=False)
        with gr.Tab("Label steps"):
            if labelling:
                workplace(labelling, STEPS)
            else:
                gr.HTML("Start with <code>--steps FILE</code> to label the steps of solutions.")
        tab.select(
            lambda: agreement_html(agreement_rows(ranking.rows)),
            outputs=table,
            api_visibility="private",
        )
    return page


def print_agreement(path: str) -> None:
    """Print the agreement of a table's rankers. Raises UserError if no prompt has two rankers."""
    rows = read_answers(path)
    check_groups(rows, path)
    table = agreement_rows(rows)
    if not table:
        raise UserError(f"{path}: no prompt is ranked by two rankers")
    print_table(f"{path}: agreement between rankers", AGREEMENT_COLUMNS, table)


def main() -> None:
    (args,) = parse_args(RankArguments, description=__doc__.split("\n\n")[0])
    check_input(args.input, MADE_BY if args.input == at_root(ANSWERS) else None)
    if args.agreement:
        return print_agreement(args.input)
    prepare()
    solutions = load_solutions(args.steps) if args.steps else None
    if args.steps:
        check_different([args.labels], [args.steps, args.input, args.output])
    written = [args.output or args.input, *([args.labels] if args.steps else [])]
    locks = [hold(path) for path in written]
    ranking = AnswerRanking(args.input, args.output)
    labelling = StepLabelling(solutions, args.labels) if solutions else None
    css = HERE.with_suffix(".css").read_text(encoding="utf-8")
    labels = f", labels of steps in {args.labels}" if args.steps else ""
    note = f"ranks are saved in {args.output or args.input}{labels}"
    page = build_page(ranking, labelling, args.ranker)
    serve(page, css, "ranking", args.port, args.share, note)
    for lock in locks:
        lock.close()


if __name__ == "__main__":
    run(main)
