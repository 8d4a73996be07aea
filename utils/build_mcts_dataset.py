"""Search problems with known answers, and write steps with their values (data/mcts_steps.jsonl.gz).

    python utils/build_mcts_dataset.py --overwrite

The policy samples rollouts from prefixes of solutions; the share of rollouts that end right is the
value of the prefix's last step. No person labels anything. Held-out problems are refused. Problems
whose rollouts from the root are all right or all wrong are dropped. A killed run resumes. `--trees`
also writes the trees: utils/show_tree.py shows them, and `--from_trees` computes other labels from
them. File names may end in .gz.
"""

import itertools
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import arg, check_input, check_outputs, parse_args, run
from common.engine import Job, ShardArgs
from common.errors import RecordError, UserError
from common.files import at_root, read_records, write_records, write_text
from common.outputs import together
from common.resumable import ResumableRows
from lm.registry import check_policy
from reasoning.answers import extract_answer
from reasoning.datasets.files import table_lines
from reasoning.datasets.selection import select_problems
from reasoning.datasets.step_shapes import three_columns
from reasoning.grading import is_correct
from reasoning.records import StepValue
from reasoning.samples import FEW, Sample, samples_file, show_samples
from reasoning.splits import refuse_held_out
from reasoning.steps import ends_solution
from search.tree_search import DROPPED, Tree
from utils.tree_building import PROBLEMS, TreeArgs, print_summary, search_problems, tree_job


@dataclass
class TreeArguments(TreeArgs, ShardArgs):
    output: str = arg(at_root("data/mcts_steps.jsonl.gz"), "file of the steps with their values")
    csv: str | None = arg(None, "also write a table: question and prefix, next step, score")
    trees: str | None = arg(None, "also write the trees to this file, one a line")
    from_trees: str | None = arg(
        None, "no search: label the steps of the trees in this file, which --trees wrote"
    )
    labels: str = arg(
        "mc",
        "mc: share of rollouts that end right; relative: that share divided by the "
        "share before the step, at most 1",
        choices=["mc", "relative"],
    )
    keep_dropped: bool = arg(False, "keep the steps of problems that are always or never right")
    overwrite: bool = arg(False, "replace existing outputs")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.from_trees and self.trees:
            raise UserError("argument --trees: not with --from_trees, which reads existing trees")


def build_trees(args: TreeArguments) -> tuple[list[Tree], Job, ResumableRows, Path | None]:
    """The trees in the order of the problems, their job, its rows, and the file for samples."""
    to_search = select_problems(args.input, args.limit, PROBLEMS, args)
    check_policy(args)
    job = Job(args, tree_job(args, to_search), to_search, 1)
    samples_path = None
    if job.is_part:
        check_outputs(job.outputs, [args.input, args.model_name_or_path], job.may_replace())
    else:
        samples_path = check(args, job.may_replace(), job.left_out_path)
    rows = job.open()
    trees = search_problems(args, job, rows, is_correct)
    return trees, job, rows, samples_path


def print_labels(labels: str, values: list[StepValue], left_out: int) -> None:
    """Print the number of rollouts of the labels, and the distribution of the labels."""
    single = sum(value.rollouts == 1 for value in values)
    mean = sum(value.rollouts or 0 for value in values) / len(values)
    print(
        f"{len(values)} rows, from {mean:.1f} rollouts each ({single} of them from 1); "
        f"labels ({labels}):"
    )
    answers = [ends_solution([value.step]) for value in values]
    for kind, is_answer in (("other steps", False), ("steps that state the answer", True)):
        scores = [v.score for v, answer in zip(values, answers, strict=True) if answer == is_answer]
        if not scores:
            print(f"  0 {kind}")
            continue
        bins = Counter(
            "0" if s == 0 else "1" if s == 1 else "below 1/2" if s < 0.5 else "from 1/2 on"
            for s in scores
        )
        names = ("0", "below 1/2", "from 1/2 on", "1")
        shares = ", ".join(f"{name}: {bins[name] / len(scores):.3f}" for name in names)
        print(f"  {len(scores)} {kind}; {shares}; mean {sum(scores) / len(scores):.3f}")
    if labels == "relative":
        print(f"  {left_out} steps after a state of value 0 have no label and are left out")


def examples(trees: list[Tree]) -> list[Sample]:
    """The first rollout of every tree, with its outcome as the verdict."""
    found = []
    for tree in trees:
        for rollout in tree.rollouts[:1]:
            stated = extract_answer(rollout.steps[-1]) if rollout.steps else None
            is_bare = stated is None and rollout.outcome == "wrong"
            verdict = "no answer" if is_bare else rollout.outcome
            found.append(Sample(tree.prompt, list(rollout.steps), verdict, stated))
    return found


def check(args: TreeArguments, overwrite: bool, *more: Path) -> Path:
    """The file for samples. Raises UserError if an output cannot be written.

    more: further outputs."""
    outputs = [*(path for path in (args.csv, args.trees, args.output) if path), *more]
    check_outputs(outputs, [args.input, args.from_trees, args.model_name_or_path], overwrite)
    return samples_file(args.output, overwrite)


def write_csv(path: str, values: list[StepValue]) -> None:
    """Write the three-column table, without the values that it cannot hold (see three_columns)."""
    rows, left_out = [], 0
    for value in values:
        try:
            rows.append(three_columns(value))
        except RecordError:
            left_out += 1
    write_text(path, table_lines(["question", "next_step", "score"], rows))
    if left_out:
        print(
            f"{path}: {left_out} of {len(values)} rows left out: their solution does not begin "
            "with 'Step 1:'"
        )


def main() -> None:
    (args,) = parse_args(TreeArguments, description=__doc__.split("\n\n")[0])
    if args.from_trees:
        check_input(args.from_trees)
        trees, rows = list(itertools.islice(read_records(args.from_trees, Tree), args.limit)), None
        refuse_held_out(args.from_trees, trees)
        for tree in trees:
            tree.check_outcomes(args.from_trees)
        samples_path = check(args, args.overwrite)
    else:
        trees, job, rows, samples_path = build_trees(args)
        if job.is_part:
            return

    print_summary(trees)
    few = sum(tree.ended not in DROPPED for tree in trees) < FEW * len(trees)
    kept = [tree for tree in trees if args.keep_dropped or tree.ended not in DROPPED]
    labelled = [tree.values(args.labels) for tree in kept]
    values = [value for rows_of_tree, _ in labelled for value in rows_of_tree]
    if few or not values:
        show_samples(examples(trees), samples_path)
    if not values:
        hint = (
            f"; {rows.path} keeps the search for other --labels or --keep_dropped" if rows else ""
        )
        raise UserError(
            f"no steps were found (see above), nothing was written to {args.output}{hint}"
        )
    print_labels(args.labels, values, left_out=sum(count for _, count in labelled))
    with together():
        if args.csv:
            write_csv(args.csv, values)
        if args.trees:
            write_records(args.trees, (tree.to_row() for tree in trees))
        write_records(args.output, values)
    if rows:
        rows.finish()
    paths = ", ".join(path for path in (args.output, args.csv, args.trees) if path)
    print(f"wrote {len(values)} step values to {paths}")


if __name__ == "__main__":
    run(main)
