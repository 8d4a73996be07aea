"""Problems with known answers -> search trees -> steps with their values (data/mcts_steps.jsonl).

    python utils/build_mcts_dataset.py --overwrite

Each problem is searched (`--search omegaprm`, or `per_step` with the same budget): beginnings of solutions are continued several
times by the policy, and the share that ends right is the value of their last step. Nobody labels anything. Held-out problems are
refused, and problems that are always or never right are dropped after the rollouts from their root. Killed, it resumes. `--trees`
keeps the trees: utils/show_tree.py shows them, `--from_trees` gives them other labels.
"""

import csv
import hashlib
import io
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import check_input, check_output, parse_args, run
from common.errors import PromptTooLong, RecordError, UserError
from common.files import ResumableRows, at_root, read_records, write_records, write_text
from lm.registry import PolicyArgs, check_policy, open_policy, policy_identity
from reasoning.datasets.loading import load_problems
from reasoning.datasets.shapes import three_columns
from reasoning.grading import is_correct
from reasoning.problems import problems
from reasoning.records import Problem, StepValue
from reasoning.splits import refuse_held_out
from reasoning.steps import ends_solution
from search.tree_search import DROPPED, SEARCHES, Tree, TreeBudget, run_searches

# what makes a tree
SEARCH = ("search", "rollouts_per_state", "budget", "temperature", "max_new_tokens", "seed")


@dataclass
class TreeArguments(PolicyArgs):
    input: str | None = field(
        default=None,
        metadata={
            "help": "problems, of any shape that reasoning/datasets/shapes.py knows; default: the generated train problems"
        },
    )
    output: str = field(
        default_factory=lambda: at_root("data/mcts_steps.jsonl"),
        metadata={"help": "the steps with their values"},
    )
    csv: str | None = field(
        default=None,
        metadata={"help": "write them also as a table: question and beginning, next step, score"},
    )
    trees: str | None = field(
        default=None,
        metadata={"help": "write the trees here, one a line (utils/show_tree.py shows them)"},
    )
    from_trees: str | None = field(
        default=None,
        metadata={
            "help": "search nothing: take the trees of this file, which --trees wrote, and label their steps"
        },
    )
    search: str = field(
        default="omegaprm",
        metadata={
            "help": "omegaprm: first errors of wrong rollouts; per_step: every step of solutions",
            "choices": [*SEARCHES],
        },
    )
    labels: str = field(
        default="mc",
        metadata={
            "help": "mc: share of rollouts that end right; relative: divided by the parent's, at most 1",
            "choices": ["mc", "relative"],
        },
    )
    keep_dropped: bool = field(
        default=False,
        metadata={
            "help": "keep the steps of problems that are always or never right, from the rollouts there are"
        },
    )
    rollouts_per_state: int = field(
        default=8, metadata={"help": "rollouts from every state that is evaluated"}
    )
    budget: int = field(
        default=64,
        metadata={"help": "what a problem may cost, the rollouts from its root included"},
    )
    in_flight: int = field(
        default=64,
        metadata={"help": "problems searched at once; changes the speed, never the result"},
    )
    limit: int | None = field(
        default=None,
        metadata={
            "help": "use the first N problems; default: 500 of the train problems, all of --input"
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "sampling temperature, above 0"})
    max_new_tokens: int = field(
        default=256,
        metadata={"help": "tokens a rollout may add; more, and it is cut and not right"},
    )
    seed: int = field(default=0, metadata={"help": "seed of the rollouts"})
    overwrite: bool = field(default=False, metadata={"help": "replace the outputs"})

    def __post_init__(self):
        for name in ("rollouts_per_state", "budget", "in_flight", "limit", "max_new_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"argument --{name}: expected 1 or more, got {getattr(self, name)}")
        if self.budget < 2 * self.rollouts_per_state:
            raise UserError(
                f"argument --budget: {self.budget} rollouts are not enough for the root and one state more: expected "
                f"{2 * self.rollouts_per_state} or more (twice --rollouts_per_state)"
            )
        if self.temperature <= 0:
            raise UserError(f"argument --temperature: expected above 0, got {self.temperature}")
        if self.from_trees and self.trees:
            raise UserError("argument --trees: the trees are there, --from_trees reads them")


def read_problems(args: TreeArguments) -> list[Problem]:
    if args.input is None:
        return list(itertools.islice(problems("train"), args.limit or 500))
    dropped: Counter[str] = Counter()
    tasks = {task.prompt: task for task in load_problems(args.input, dropped=dropped)}
    for reason, count in dropped.items():
        print(f"{count} rows of {args.input} left out: {reason}")
    tasks = list(itertools.islice(tasks.values(), args.limit))
    refuse_held_out(args.input, tasks)
    return tasks


def search_problems(args: TreeArguments) -> tuple[list[Tree], ResumableRows]:
    """The trees in the order of the problems. Each is appended to the rows when it ends, in whatever order."""
    tasks = read_problems(args)
    check_policy(args)
    job = {name: getattr(args, name) for name in SEARCH} | policy_identity(args)
    job["problems"] = hashlib.sha256(
        json.dumps([vars(task) for task in tasks]).encode()
    ).hexdigest()
    check_outputs(args, args.overwrite or ResumableRows.pending(args.output, job))

    from tqdm import tqdm

    policy = open_policy(args)
    rows = ResumableRows(args.output, job, overwrite=args.overwrite)
    done = {row["problem"] for row in rows.rows}
    if done:
        print(f"resuming: {len(done)} of {len(tasks)} problems are done")
    budget, started, rollouts = (
        TreeBudget(args.budget, args.rollouts_per_state),
        time.monotonic(),
        0,
    )

    def searches() -> Iterator:
        for number, task in enumerate(tasks):
            if number in done:
                continue
            try:
                root = policy.start(task.prompt)
            except PromptTooLong:
                add(number, Tree(task.prompt, args.search, "prompt too long"))
            else:
                yield number, SEARCHES[args.search](root, judge_of(task), budget)

    def add(number: int, tree: Tree) -> None:
        rows.append({"problem": number, "tree": tree.to_row()})
        bar.update()

    def sampled(count: int) -> None:
        nonlocal rollouts
        rollouts += count
        bar.set_postfix(rollouts=rollouts)

    with tqdm(total=len(tasks), initial=len(done), desc="searching", unit="problem") as bar:
        options = {
            "temperature": args.temperature,
            "max_new_tokens": args.max_new_tokens,
            "seed": args.seed,
        }
        for number, tree in run_searches(
            searches(), policy, args.in_flight, **options, sampled=sampled
        ):
            add(number, tree)
    seconds = time.monotonic() - started
    print(f"searched for {seconds:.0f} s: {rollouts} rollouts, {rollouts / seconds:.0f} a second")
    return [
        Tree.from_row(row["tree"]) for row in sorted(rows.rows, key=lambda row: row["problem"])
    ], rows


def judge_of(task: Problem) -> Callable[[tuple[str, ...]], bool]:
    return lambda steps: is_correct(list(steps), task)


def summary(trees: list[Tree]) -> None:
    """What was searched, what was dropped, what it cost."""
    ended = Counter(tree.ended for tree in trees)
    searched = len(trees) - sum(ended[reason] for reason in DROPPED)
    dropped = ", ".join(f"{ended[reason]} {reason}" for reason in DROPPED)
    print(
        f"{len(trees)} problems: {searched} searched, {ended['budget']} of them to the end of the budget; dropped: {dropped}"
    )
    outcomes = Counter(rollout.outcome for tree in trees for rollout in tree.rollouts)
    in_vain = sum(len(tree.rollouts) for tree in trees if tree.ended in DROPPED)
    print(
        f"{outcomes.total()} rollouts ({in_vain} on dropped problems): {outcomes['right']} right, {outcomes['wrong']} wrong, "
        f"{outcomes['cut']} cut at the limit of tokens; {sum(tree.tokens for tree in trees)} tokens"
    )


def summary_of_labels(labels: str, values: list[StepValue], without: int) -> None:
    """How many rollouts the labels come from, and how they are distributed: exactly 0, exactly 1, and what is between."""
    single = sum(value.rollouts == 1 for value in values)
    mean = sum(value.rollouts for value in values) / len(values)
    print(
        f"{len(values)} rows, from {mean:.1f} rollouts each ({single} of them from 1); labels ({labels}):"
    )
    kinds = {
        "steps on the way": [value.score for value in values if not ends_solution([value.step])],
        "steps that state the answer": [
            value.score for value in values if ends_solution([value.step])
        ],
    }
    for kind, scores in kinds.items():
        bins = Counter(
            "0" if s == 0 else "1" if s == 1 else "below 1/2" if s < 0.5 else "from 1/2 on"
            for s in scores
        )
        shares = ", ".join(
            f"{name}: {bins[name] / len(scores):.3f}"
            for name in ("0", "below 1/2", "from 1/2 on", "1")
            if scores
        )
        print(
            f"  {len(scores)} {kind}"
            + (f"; {shares}; mean {sum(scores) / len(scores):.3f}" if scores else "")
        )
    if labels == "relative":
        print(f"  {without} steps that follow a state of value 0 have no label and are left out")


def check_outputs(args: TreeArguments, overwrite: bool) -> None:
    paths = [path for path in (args.output, args.csv, args.trees) if path]
    if len({Path(path).resolve() for path in (*paths, args.from_trees or "")}) <= len(paths):
        raise UserError(
            f"--output, --csv, --trees and --from_trees: expected different files, got {', '.join(paths)}"
        )
    for path in paths:
        check_output(path, overwrite)


def write_csv(path: str, values: list[StepValue]) -> None:
    """A value that three columns cannot hold (loaders.three_columns says which) is left out, and how many are is said."""
    text, left_out = io.StringIO(newline=""), 0
    writer = csv.DictWriter(text, ["question", "next_step", "score"], lineterminator="\n")
    writer.writeheader()
    for value in values:
        try:
            writer.writerow(three_columns(value))
        except RecordError:
            left_out += 1
    write_text(path, [text.getvalue()])
    if left_out:
        print(
            f"{path}: {left_out} of {len(values)} rows left out: three columns need solutions that begin with 'Step 1:'"
        )


def main() -> None:
    (args,) = parse_args(TreeArguments, description=__doc__.split("\n\n")[0])
    if args.from_trees:
        check_input(args.from_trees)
        trees, rows = list(itertools.islice(read_records(args.from_trees, Tree), args.limit)), None
        refuse_held_out(args.from_trees, trees)
        check_outputs(args, args.overwrite)
    else:
        trees, rows = search_problems(args)

    summary(trees)
    labelled = [
        tree.values(args.labels) for tree in trees if args.keep_dropped or tree.ended not in DROPPED
    ]
    values = [value for of_tree, _ in labelled for value in of_tree]
    if not values:
        kept = (
            f"; {rows.path} keeps the search for other --labels or --keep_dropped" if rows else ""
        )
        raise UserError(f"no steps came out (see above), nothing was written{kept}")
    summary_of_labels(args.labels, values, without=sum(count for _, count in labelled))
    if args.csv:
        write_csv(args.csv, values)
    if args.trees:
        write_records(args.trees, (tree.to_row() for tree in trees))
    write_records(args.output, values)
    if rows:
        rows.finish()
    print(
        f"wrote {len(values)} step values to {args.output}"
        + "".join(f", {path}" for path in (args.csv, args.trees) if path)
    )


if __name__ == "__main__":
    run(main)
