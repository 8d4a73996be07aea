"""Show one search tree as indented text in the terminal, and with --html as a page.

    python utils/show_tree.py --trees data/trees.jsonl --prompt "22 apples" --html tree.html

A line is a step: its value (the share that ends right of the rollouts from or through its state),
the number of these rollouts, the visits of the search, and the text. A first error is a step after
which the value is 0.
"""

import html
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import arg, check_input, check_least, check_output, parse_args, run
from common.errors import UserError
from common.files import at_root, read_records, write_text
from common.terminal import printable
from reasoning.steps import one_line
from search.tree_search import Tree

TREES = "data/mcts_trees.jsonl.gz"
SCRIPT = "utils/build_mcts_dataset.py"


@dataclass
class ShowArguments:
    trees: str = arg(at_root(TREES), f"file of trees, written by {SCRIPT}")
    prompt: str | None = arg(None, "only problems that contain this text; all if not given")
    index: int = arg(0, "index of the tree among them, from 0")
    html: str | None = arg(None, "also write the tree to this file, as a self-contained page")
    overwrite: bool = arg(False, "replace an existing page")

    def __post_init__(self):
        check_least(self, index=0)


@dataclass
class Line:
    """A state in the output. visits is None if the state was not evaluated."""

    text: str
    right: int
    total: int
    visits: int | None
    mark: str
    below: list["Line"]

    @property
    def value(self) -> float:
        return self.right / self.total


def lines_of(tree: Tree) -> Line:
    """The line of the root; the lines below it are ordered by their number of rollouts."""
    counts = tree.counts()
    following: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for steps in counts:
        if steps:
            following.setdefault(steps[:-1], []).append(steps)

    def line(steps: tuple[str, ...]) -> Line:
        right, total = counts[steps]
        below = sorted(following.get(steps, []), key=lambda longer: -counts[longer][1])
        node, mark = tree.nodes.get(steps), ""
        if steps and not right and counts[steps[:-1]][0]:
            # the rollouts through a state that was not evaluated may have their error later
            mark = "first error" if node or not below else "first error, here or below"
        text, visits = steps[-1] if steps else one_line(tree.prompt), node.visits if node else None
        return Line(text, right, total, visits, mark, [line(longer) for longer in below])

    return line(())


def headline(tree: Tree) -> str:
    counts = f"{len(tree.rollouts)} rollouts, {tree.tokens} tokens, {len(tree.nodes)} states"
    return f"{tree.search}: {counts}; ended: {tree.ended}"


def as_text(tree: Tree) -> str:
    rows = [f"{headline(tree)}\n", "value   right/all  visits  step"]

    def add(line: Line, depth: int) -> None:
        rollouts, visits = f"{line.right}/{line.total}", "-" if line.visits is None else line.visits
        text = "  " * depth + line.text + (f"   <-- {line.mark}" if line.mark else "")
        rows.append(f"{line.value:5.2f} {rollouts:>11} {visits:>7}  {text}")
        for below in line.below:
            add(below, depth + 1)

    add(lines_of(tree), 0)
    return "\n".join(rows)


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Search tree</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222;
       max-width: 70em; margin: 2em auto; padding: 0 1em }}
details, .leaf {{ margin-left: 1.6em }}
.leaf {{ padding-left: 1em }}
summary {{ cursor: pointer }}
.value {{ display: inline-block; min-width: 2.6em; text-align: center; border-radius: .4em;
         font-variant-numeric: tabular-nums }}
.counts {{ color: #666; font-size: 85% }}
.mark {{ color: #a34900; font-weight: bold }}
</style></head><body>
<h1>Search tree</h1>
<p>{headline}</p>
<p class="counts">A line is a step: the share of its rollouts that end right, their number, and the
visits of the search.</p>
{tree}
</body></html>
"""


def as_page(tree: Tree) -> str:
    """A page of nested steps that can be folded, coloured from orange (value 0) to blue (1), which
    colour-blind readers tell apart; the number beside it says the same.

    Texts of the model and of the problem are escaped."""

    def element(line: Line) -> str:
        color = f"background: color-mix(in oklab, #56b4e9 {line.value:.0%}, #f2a85e)"
        counts = f"{line.right} of {line.total}"
        counts += "" if line.visits is None else f", {line.visits} visits"
        label = (
            f'<span class="value" style="{color}">{line.value:.2f}</span> {html.escape(line.text)} '
            f'<span class="counts">{counts}</span>'
        )
        label += f' <span class="mark">{line.mark}</span>' if line.mark else ""
        if not line.below:
            return f'<div class="leaf">{label}</div>'
        below = "\n".join(map(element, line.below))
        return f"<details open><summary>{label}</summary>\n{below}\n</details>"

    return PAGE.format(headline=html.escape(headline(tree)), tree=element(lines_of(tree)))


MOST_STEPS = 200  # of a solution; every step is a level of the page


def find_tree(args: ShowArguments) -> Tree:
    """The tree that the arguments select. Raises UserError if there is none."""
    found = 0
    for tree in read_records(args.trees, Tree):
        if args.prompt is None or args.prompt in tree.prompt:
            if found == args.index:
                return tree
            found += 1
    which = "trees" if args.prompt is None else f"trees of problems with {args.prompt!r}"
    raise UserError(f"{args.trees}: holds {found} {which}, none at --index {args.index} (from 0)")


def main() -> None:
    (args,) = parse_args(ShowArguments, description=__doc__.split("\n\n")[0])
    # with an output of its own: the default one exists
    flags = ("--trees", args.trees, "--output", at_root("data/tree_steps.jsonl"))
    check_input(args.trees, shlex.join(["python", SCRIPT, *flags]))
    if args.html:
        check_output(args.html, args.overwrite, [args.trees])
    tree = find_tree(args)
    if not tree.nodes:
        prompt = f"{tree.prompt[:60]!r} ..."
        raise UserError(f"{args.trees}: this problem was not searched ({tree.ended}): {prompt}")
    tree.check_outcomes(args.trees)
    if (longest := max(map(len, tree.counts()))) > MOST_STEPS:
        raise UserError(
            f"{args.trees}: this tree has a solution of {longest} steps, expected {MOST_STEPS} at "
            "most; choose another with --index or --prompt"
        )
    print(printable(as_text(tree)))
    if args.html:
        write_text(args.html, [as_page(tree)])
        print(f"\nwrote {args.html}")


if __name__ == "__main__":
    run(main)
