"""A page where people rank answers, best first, and label the steps of solutions.

    python utils/rank_responses.py --ranker Ann                 http://127.0.0.1:7860, ranks go to data/answers.csv
    python utils/rank_responses.py --steps pairs.jsonl          the third tab: right, wrong or unsure for each step
    python utils/rank_responses.py --agreement                  how far the rankers of data/answers.csv agree, as a table

Each group is saved at once, and the page goes on where it stopped. It needs no network and sends nothing anywhere.
"""

import html
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import check_input, parse_args, run
from common.errors import RecordError, UserError
from common.files import at_root
from evaluation.agreement import AGREEMENT_COLUMNS, agreement_rows
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

ANSWERS = "data/answers.csv"
MADE_BY = "python utils/build_ranked_responses.py"
HERE = Path(__file__).resolve()


@dataclass
class RankArguments:
    input: str = field(
        default_factory=lambda: at_root(ANSWERS),
        metadata={"help": "table of answers (prompt, answer, rank ...)"},
    )
    output: str | None = field(
        default=None, metadata={"help": "where ranks go, a table as well (default: into the input)"}
    )
    ranker: str | None = field(
        default=None, metadata={"help": "your name (default: the page asks each person)"}
    )
    steps: str | None = field(
        default=None,
        metadata={
            "help": "solutions whose steps are to be labelled: pairs, labelled solutions, problems with steps"
        },
    )
    labels: str = field(
        default_factory=lambda: at_root("data/step_labels.jsonl"),
        metadata={
            "help": "where labels of steps go, JSONL; `--judge human --judge_labels FILE` reads it"
        },
    )
    agreement: bool = field(
        default=False, metadata={"help": "print how far the rankers agree, and end"}
    )
    port: int = field(default=7860, metadata={"help": "of the page on this machine"})
    share: bool = field(
        default=False,
        metadata={"help": "also give the page a public address, through Gradio's servers"},
    )

    def __post_init__(self):
        if not 1 <= self.port <= 65535:
            raise UserError(f"argument --port: expected 1 to 65535, got {self.port}")
        if self.ranker is not None:
            self.ranker = check_name(self.ranker)


# --- the page as HTML; every text that comes from a file or a person goes through html.escape -----------------------------------


@dataclass(frozen=True)
class Kind:
    """What differs between ranking answers and labelling steps."""

    name: str  # of the items, for the style sheet
    thing: str  # what a task is
    ask: str
    help: str
    marks: Callable[[AnnotationTask], dict[str, Sequence[str]]]  # mark -> keys that set it
    can_drag: bool = False


RANKS = Kind(
    "answers",
    "prompts",
    "Which answer is better? 1 is the best; the same number twice is a tie.",
    "<kbd>1</kbd> <kbd>2</kbd> ... rank the framed answer, from the first to the last · <kbd>↑</kbd> <kbd>↓</kbd> frame another · "
    "or drag the answers by <b>⠿</b>, best first",
    lambda task: {str(rank): [str(rank)] for rank in range(1, len(task.items) + 1)},
    can_drag=True,
)
STEPS = Kind(
    "steps",
    "solutions",
    "Is each step right, given the problem? A step that builds on a wrong one is wrong as well.",
    "<kbd>1</kbd> or <kbd>R</kbd> right · <kbd>2</kbd> or <kbd>W</kbd> wrong · <kbd>3</kbd> or <kbd>U</kbd> unsure: "
    "label the framed step · <kbd>↑</kbd> <kbd>↓</kbd> frame another",
    lambda task: {mark: [str(k), mark[0]] for k, mark in enumerate(LABELS, 1)},
)


def head(name: str, tasks: Sequence[AnnotationTask], kind: Kind) -> str:
    done = sum(task.done for task in tasks)
    return (
        f'<div class="head"><span>{html.escape(name)}</span><progress value="{done}" max="{len(tasks)}"></progress>'
        f"<span>{done} of {len(tasks)} {kind.thing} done</span></div>"
    )


BACK = '<button data-do="back">Back <kbd>B</kbd></button>'


def task_html(name: str, tasks: Sequence[AnnotationTask], task: AnnotationTask, kind: Kind) -> str:
    marks = kind.marks(task)
    keys = json.dumps({key: mark for mark, keys in marks.items() for key in keys})
    buttons = "".join(
        f'<button type="button" tabindex="-1" data-mark="{mark}">{mark}</button>' for mark in marks
    )
    grip = '<span class="grip" title="drag">⠿</span>' if kind.can_drag else ""
    items = "".join(
        f'<div class="item" tabindex="0" data-place="{k}" data-mark="{html.escape(mark)}">'
        f'<div class="choice">{buttons}{grip}</div><div class="text">{html.escape(item)}</div></div>'
        for k, (item, mark) in enumerate(
            zip(task.items, task.marks or [""] * len(task.items), strict=True)
        )
    )
    return f"""{head(name, tasks, kind)}
<div class="task" data-key="{task.key}" data-keys="{html.escape(keys)}">
<div class="prompt">{html.escape(task.prompt)}</div>
<div class="ask">{kind.ask}</div><div class="help">{kind.help}</div>
<div class="items {kind.name}">{items}</div>
<input class="note" maxlength="1000" placeholder="A note, if you like (N; Esc leaves it)" value="{html.escape(task.note)}">
<div class="foot"><button data-do="save">{"Save again" if task.done else "Save"} <kbd>Enter</kbd></button>
<button data-do="skip">Skip <kbd>S</kbd></button>{BACK}<span class="message" role="status"></span></div></div>"""


def done_html(name: str, tasks: Sequence[AnnotationTask], kind: Kind) -> str:
    return f"""{head(name, tasks, kind)}
<div class="task" data-keys="{{}}"><div class="done">All {len(tasks)} {kind.thing} are done.</div>
<div class="foot">{BACK}<span class="message" role="status"></span></div></div>"""


def name_html(problem: str) -> str:
    return f"""<form><label for="ranker">Your name</label><input id="ranker" maxlength="40" autocomplete="off">
<button>Start</button><span class="message bad" role="status">{html.escape(problem)}</span></form>"""


def turn(work: Annotation, kind: Kind, request: dict[str, Any]) -> dict[str, str]:
    """One turn of the page: {"action": open, save, skip or back, "name", "key", "marks", "note"} -> {"html"} to show, or {"error"}.

    The server keeps nothing of a page, so a page outlives it: the next turn finds whatever server is there by then."""
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
        return {
            "html": task_html(name, tasks, task, kind) if task else done_html(name, tasks, kind)
        }
    except (UserError, RecordError, OSError) as error:
        return {"error": f"Not saved: {error}" if request.get("action") == "save" else str(error)}


def agreement_html(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return '<div class="agreement"><p>No prompt has been ranked by two rankers yet.</p></div>'
    cells = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    columns = "".join(f"<th>{html.escape(column)}</th>" for column in AGREEMENT_COLUMNS)
    return f"""<div class="agreement"><table><tr>{columns}</tr>{cells}</table>
<p>Kendall's tau-b within a prompt, mean over the n prompts where it is defined, with a 95 % bootstrap interval: 1 is the same
order, 0 is chance, -1 the opposite order. Krippendorff's alpha, ordinal, over the answers that two or more of them ranked: 1 is
perfect, 0 is chance.</p></div>"""


# --- the page in Gradio ----------------------------------------------------------------------------------------------------------


def build_page(ranking: AnswerRanking, labelling: StepLabelling | None, ranker: str | None):
    """The Gradio Blocks."""
    import gradio as gr

    script = HERE.with_suffix(".js").read_text(encoding="utf-8")
    name = html.escape(ranker or "")

    def workplace(work: Annotation, kind: Kind):
        def turn_(request: dict) -> dict:
            return turn(work, kind, request)

        turn_.__name__ = "turn"
        # No text is given to Gradio's templates, which would run what looks like code in it.
        gr.HTML(
            html_template=f'<div class="work" data-name="{name}"><span class="message"></span></div>',
            js_on_load=script,
            server_functions=[turn_],
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


def serve(args: RankArguments, page, waiting: Callable[[], object]) -> None:
    """Show the page until `waiting` returns. Raises UserError if the port is taken or no public address can be had."""
    import gradio as gr

    # none from the network
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Default(primary_hue="indigo", **fonts)
    css = HERE.with_suffix(".css").read_text(encoding="utf-8")
    try:
        _, local, public = page.launch(
            server_name="127.0.0.1", server_port=args.port, share=args.share, theme=theme, css=css, quiet=True, footer_links=[],
            run_history=False, enable_monitoring=False, ssr_mode=False, prevent_thread_lock=True,
        )  # fmt: skip
    except OSError as error:
        raise UserError(
            f"argument --port: {args.port} cannot be used ({error}); give another"
        ) from None
    if args.share and not public:
        raise UserError(
            "argument --share: Gradio could not give the page a public address; leave --share out to use it here"
        )
    print(
        f"ranks go to {args.output or args.input}"
        + (f", labels of steps to {args.labels}" if args.steps else "")
    )
    print(f"{public or local} (Ctrl-C ends)", flush=True)
    waiting()


def main() -> None:
    (args,) = parse_args(RankArguments, description=__doc__.split("\n\n")[0])
    check_input(args.input, MADE_BY if args.input == at_root(ANSWERS) else None)
    if args.agreement:
        from evaluation.metrics import print_table

        rows = read_answers(args.input)
        check_groups(rows, args.input)
        table = agreement_rows(rows)
        if not table:
            raise UserError(f"{args.input}: no prompt is ranked by two rankers")
        print_table(f"{args.input}: agreement between rankers", AGREEMENT_COLUMNS, table)
        return
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    for proxies in ("NO_PROXY", "no_proxy"):  # Gradio asks its own page whether it is there
        os.environ[proxies] = ",".join(filter(None, [os.environ.get(proxies), "127.0.0.1"]))
    solutions = load_solutions(args.steps) if args.steps else None
    # until the process ends
    held = [
        hold(path) for path in (args.output or args.input, *([args.labels] if args.steps else []))
    ]
    ranking = AnswerRanking(args.input, args.output)
    labelling = StepLabelling(solutions, args.labels) if solutions else None
    serve(args, build_page(ranking, labelling, args.ranker), threading.Event().wait)
    for handle in held:
        handle.close()


if __name__ == "__main__":
    run(main)
