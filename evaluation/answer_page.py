"""The page of `inference.py --serve`: one prompt, answered by base and tuned policy side by side.

Every step has the colour and the number of the judge's score; below an answer is the tree of all
proposals of the search that led there. Texts of models and people are escaped; formulas are drawn.
"""

import html
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.formulas import html_with_formulas
from reward_model.protocols import StepJudge
from search.candidates import Round, SearchBudget, SearchResult
from search.strategies import STRATEGIES

if TYPE_CHECKING:
    from lm.policy import Policy

HERE = Path(__file__).resolve()
MOST_CHARACTERS = 20_000  # of a prompt
MOST_PROPOSALS = 256  # `n` of a search
SHOWN = 12  # proposals shown below a prefix; of the others only the number is shown


# --- an answer, and the tree of the search ---


@dataclass
class Answer:
    """scores: of the steps, 0 to 1; None if the judge cannot score them. note: what it cost."""

    steps: list[str]
    scores: list[float] | None
    finished: bool
    note: str = ""
    rounds: list[Round] = field(default_factory=list)


@dataclass
class Node:
    """A step that was proposed. count: equal samples of it. kept: a round went on from it."""

    score: float | None = None
    count: int = 0
    kept: bool = False
    note: str = ""
    below: dict[str, "Node"] = field(default_factory=dict)


def tree_of(rounds: Sequence[Round]) -> Node:
    """The proposals of all rounds as one tree, whose root is the empty solution.

    A round of whole solutions adds all their steps, a round of next steps adds the last ones."""
    root = Node()
    for candidates in rounds:
        for candidate, kept in candidates:
            node, steps, scores = root, candidate.state.steps, candidate.scores
            for k, step in enumerate(steps):
                is_new = step not in node.below
                node = node.below.setdefault(step, Node())
                if scores is not None and k < len(scores):
                    node.score = scores[k]
                if is_new or k == len(steps) - 1 or len(rounds) == 1:
                    node.count += candidate.count
                node.kept |= kept
            if steps:
                node.note = candidate.note
    return root


def answer(
    policy: "Policy",
    judge: StepJudge,
    prompt: str,
    strategy: str | None,
    budget: SearchBudget,
    seed: int,
) -> Answer:
    """The answer of one policy, by a search, or without one at the budget's temperature."""
    if strategy is None:
        ((reply,),) = policy.generate(
            [prompt],
            temperature=budget.temperature,
            max_new_tokens=budget.max_new_tokens,
            seed=seed,
        )
        found = SearchResult(prompt, reply.steps, None, reply.finished)
    else:
        (found,) = STRATEGIES[strategy]([prompt], policy, judge, budget, seed)
    scores = found.scores
    if scores is None and found.steps:  # a search that needs no judge, or none
        scores = judge.score_steps([(prompt, found.steps)])[0]
    costs = f"{found.proposals} proposals, {found.tokens:,} tokens, {found.judged} steps judged"
    costs += f", {found.left_out} proposals without a score" if found.left_out else ""
    note = f"{costs}, {found.seconds:.1f} s" if strategy else ""
    return Answer(found.steps, scores, found.finished, note, found.rounds)


# --- as HTML: every text goes through html_with_formulas or html.escape ---


def _scored(score: float | None, text: str, more: str = "") -> str:
    """The inside of a line: the number, a step and remarks."""
    number = "–" if score is None else f"{score:.2f}"
    return (
        f'<span class="score">{number}</span> <span class="text" dir="auto">'
        f"{html_with_formulas(text)}</span>{more}"
    )


def _look(score: float | None) -> str:
    return 'class="step unscored"' if score is None else f'class="step" style="--score:{score:.4f}"'


def answer_html(name: str, model: str, found: Answer) -> str:
    """One column of the page."""
    scores: Sequence[float | None] = found.scores or [None] * len(found.steps)
    lines = "".join(
        f"<li {_look(score)}>{_scored(score, step)}</li>"
        for step, score in zip(found.steps, scores, strict=True)
    )
    notes = [] if found.steps else ["no step"]
    if found.steps and found.scores is None:
        notes.append("the judge cannot score this answer")
    if not found.finished:
        notes.append("the answer did not end by itself")
    notes += [found.note] if found.note else []
    tree = ""
    if found.rounds:
        tree = (
            "<details open><summary>The search tree</summary>"
            f"{_tree_html(tree_of(found.rounds), found.steps)}</details>"
        )
    return (
        f'<section class="answer"><h3>{html.escape(name)} <small>{html.escape(model)}</small></h3>'
        f'<ol>{lines}</ol><p class="quiet">{html.escape("; ".join(notes))}</p>{tree}</section>'
    )


def _tree_html(node: Node, path: Sequence[str]) -> str:
    """The steps below a node: those that were kept first, and then by score.

    path: the rest of the answer, whose steps are marked and unfolded."""

    def order(item: tuple[str, Node]) -> tuple[bool, bool, float]:
        step, below = item
        return step not in path[:1], not below.kept, -(below.score or 0)

    lines = []
    for step, below in sorted(node.below.items(), key=order)[:SHOWN]:
        on_path = step in path[:1]
        remarks = [f"{below.count} x"] if below.count > 1 else []
        remarks += ["in the answer"] if on_path else ["kept"] if below.kept else []
        remarks += [below.note] if below.note else []
        more = f' <span class="quiet">{html.escape(", ".join(remarks))}</span>'
        line = _scored(below.score, step, more)
        mark = " chosen" if on_path else ""
        if below.below:
            inside = _tree_html(below, path[1:] if on_path else ())
            unfolded = " open" if on_path else ""
            look = _look(below.score)
            line = f"<details{unfolded}><summary {look}>{line}</summary>{inside}</details>"
        else:
            line = f"<div {_look(below.score)}>{line}</div>"
        lines.append(f'<li class="node{mark}">{line}</li>')
    if len(node.below) > SHOWN:
        lines.append(f'<li class="quiet">and {len(node.below) - SHOWN} others</li>')
    return f'<ul class="tree">{"".join(lines)}</ul>'


# --- the server's side ---


@dataclass
class AnswerPage:
    """Answers the requests of the page, one after the other.

    policies: name of a column -> (policy, the name of its model). settings: makes the budget of a
    strategy (None: no search) with n proposals. strategy, n, seed: what the page shows at first."""

    policies: Mapping[str, tuple["Policy", str]]
    judge: StepJudge
    settings: Callable[[str | None, int], SearchBudget]
    strategy: str | None
    n: int
    seed: int
    busy: Any = field(default_factory=threading.Lock)

    def reply(self, request: dict[str, Any]) -> dict[str, str]:
        """Answer one request: {"prompt", "strategy" (empty: no search), "n", "seed"}.

        Returns {"html"} of the columns, or {"error"}, one line."""
        try:
            prompt, strategy, n, seed = _checked(request)
            budget = self.settings(strategy, n)
            if strategy not in (None, "greedy") and not budget.temperature and n > 1:
                raise UserError("at --temperature 0 a search has nothing to choose from")
            with self.busy:
                columns = [
                    answer_html(
                        name, model, answer(policy, self.judge, prompt, strategy, budget, seed)
                    )
                    for name, (policy, model) in self.policies.items()
                ]
        except UserError as error:  # and JudgeError
            return {"error": str(error)}
        return {"html": "".join(columns)}

    def form(self) -> str:
        """The page before the first answer."""
        first = self.strategy or ""
        names = [("", "no search"), *((name, name) for name in STRATEGIES)]
        options = "".join(
            f'<option value="{value}"{" selected" * (value == first)}>{name}</option>'
            for value, name in names
        )
        return f"""<div class="work"><form>
<label class="wide">Problem<textarea name="prompt" rows="3" required maxlength="{MOST_CHARACTERS}"
 dir="auto"></textarea></label>
<label>Search<select name="strategy">{options}</select></label>
<label>Proposals<input name="n" type="number" min="1" max="{MOST_PROPOSALS}" value="{self.n}">
</label><label>Seed<input name="seed" type="number" min="0" value="{self.seed}"></label>
<button>Answer</button><span class="message" role="status"></span></form>
<p class="quiet">The judge's score of a step: 0 (wrong) <span class="scale"></span> 1 (right)</p>
<div class="answers"></div></div>"""

    def blocks(self) -> Any:
        """The Gradio Blocks."""
        import gradio as gr  # heavy

        def reply(request: dict) -> dict:
            return self.reply(request)

        with gr.Blocks(title="Try a prompt", analytics_enabled=False) as page:
            gr.HTML(
                # no text of a person or a model is in it: Gradio would run code in a template
                html_template=self.form(),
                js_on_load=HERE.with_suffix(".js").read_text(encoding="utf-8"),
                server_functions=[reply],
                apply_default_css=False,
            )
        return page


def css() -> str:
    return HERE.with_suffix(".css").read_text(encoding="utf-8")


def _checked(request: dict[str, Any]) -> tuple[str, str | None, int, int]:
    """(prompt, strategy, n, seed) of a request. Raises UserError if one of them is not valid."""
    prompt, strategy = str(request.get("prompt") or "").strip(), request.get("strategy") or None
    if not prompt:
        raise UserError("the prompt is empty: write a problem")
    if len(prompt) > MOST_CHARACTERS:
        raise UserError(f"the prompt is too long: expected up to {MOST_CHARACTERS:,} characters")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise UserError("the prompt is not UTF-8 text")
    if strategy is not None and strategy not in STRATEGIES:
        raise UserError(f"search: expected one of {', '.join(STRATEGIES)}")
    numbers = []
    for name, low, high in (("n", 1, MOST_PROPOSALS), ("seed", 0, 2**32 - 1)):
        try:
            number = int(request.get(name) or 0)
        except (TypeError, ValueError):
            number = -1
        if not low <= number <= high:
            raise UserError(f"{'proposals' if name == 'n' else name}: expected {low} to {high:,}")
        numbers.append(number)
    return prompt, strategy, numbers[0], numbers[1]
