"""Pair siblings of search trees, and write scored preference pairs (data/step_pairs.jsonl).

    python utils/build_step_pairs.py --overwrite

A pair is two continuations of one state: a right and a wrong next step (`--kind step`), or a rest
of the solution that ends right and one that ends wrong (`--kind rest`). Values of steps order and
score them, or a judge (`--pair_by judge`, which looks at no outcome). The trees are those of
`--from_trees`; with `--model_name_or_path` they are searched with this policy and written too.
Pairs of one state follow one another, for `train.py --pack siblings`. Held-out problems are
refused. A killed run resumes.
"""

import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import (
    arg,
    check_different,
    check_input,
    check_least,
    check_output,
    check_outputs,
    here,
    parse_args,
    run,
    unused,
)
from common.engine import Job
from common.errors import UserError
from common.files import at_root, file_stem, read_records, write_records
from common.identity import content_hash
from common.outputs import together
from common.progress import progress_bar
from common.resumable import ResumableRows
from lm.registry import check_policy
from reasoning.datasets.selection import select_problems
from reasoning.grading import is_correct
from reasoning.records import ScoredPair
from reasoning.splits import refuse_held_out
from reward_model.protocols import StepJudge
from reward_model.registry import (
    JudgeArgs,
    check_judge,
    judge_files,
    judge_identity,
    open_judge,
    warn_of_foreign_text,
)
from search.step_pairs import KINDS, Continuation, by_answer, by_judge, gap, pair_up, to_judge
from search.tree_search import SEARCHES, Steps, Tree
from utils.tree_building import PROBLEMS, TreeArgs, print_summary, search_problems, tree_job

TREES = at_root("data/mcts_trees.jsonl.gz")
MAKES_TREES = "python utils/build_mcts_dataset.py --trees data/trees.jsonl.gz --overwrite"
# the arguments that determine the pairs of a tree
PAIRING = ("kind", "pair_by", "min_gap", "min_rollouts", "per_state", "seed")
UNIT = 32  # trees that a judge scores in one call


@dataclass
class StepPairArguments(JudgeArgs, TreeArgs):
    output: str = arg(at_root("data/step_pairs.jsonl"), "where the pairs are written, JSONL")
    kind: str = arg(
        "step",
        "step: one next step a side; rest: all steps to the end of the solution",
        choices=[*KINDS],
    )
    pair_by: str = arg(
        "answer",
        "answer: by the share of rollouts that end right; judge: by the mean of a judge's step "
        "scores",
        choices=["answer", "judge"],
    )
    min_gap: float = arg(0.5, "least difference of the values of both sides, above 0 to 1")
    min_rollouts: int = arg(
        2,
        "with --pair_by answer: least rollouts behind the value of each side; a step that states "
        "the answer needs one",
    )
    per_state: int | None = arg(
        4, "most pairs of a state: those with the widest gap, different rejected steps first"
    )
    from_trees: str = arg(TREES, "trees that utils/build_mcts_dataset.py --trees wrote")
    model_name_or_path: str | None = arg(
        None, "search with this policy, any causal LM, instead of reading --from_trees"
    )
    trees: str | None = arg(
        None,
        "with --model_name_or_path: where the trees are written (default: beside --output, "
        "NAME.trees.jsonl.gz)",
    )
    search: str = arg(
        "per_step",
        "per_step: all steps of solutions, also without answers; omegaprm: first errors of wrong "
        "rollouts",
        choices=[*SEARCHES],
    )
    limit: int | None = arg(
        None,
        "use the first LIMIT trees or problems; if not given: all, or 500 of the train problems",
    )
    seed: int = arg(0, "seed of the rollouts, and of --judge shuffled and random")
    overwrite: bool = arg(False, "replace existing outputs")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, min_rollouts=1, per_state=1)
        if not 0 < self.min_gap <= 1:
            raise UserError(f"argument --min_gap: expected above 0 to 1, got {self.min_gap}")
        if self.pair_by == "judge":
            if self.min_rollouts != StepPairArguments.min_rollouts:
                raise UserError("argument --min_rollouts: a judge's score comes from no rollouts")
            if self.search == "omegaprm":
                raise UserError(
                    "argument --search: omegaprm needs answers, which --pair_by judge does not "
                    "look at; use per_step"
                )
        elif self.judge != JudgeArgs.judge:
            raise UserError("argument --judge: siblings are judged with --pair_by judge only")
        if self.searches:
            if self.from_trees != TREES:
                raise UserError("argument --from_trees: not with --model_name_or_path")
            self.trees = self.trees or str(
                Path(self.output).with_name(f"{file_stem(self.output)}.trees.jsonl.gz")
            )
        else:
            self._check_no_search()

    @property
    def searches(self) -> bool:
        return self.model_name_or_path is not None

    def _check_no_search(self) -> None:
        """Raises UserError for an argument that only a search uses."""
        names = {field.name for field in fields(TreeArgs)} - {"limit", "seed", "dtype"}
        for name in ("trees", *sorted(names)):
            if getattr(self, name) != getattr(StepPairArguments, name):
                raise UserError(
                    f"argument --{name}: needs --model_name_or_path, the policy to search with"
                )


def read_trees(args: StepPairArguments) -> list[Tree]:
    trees = list(itertools.islice(read_records(args.from_trees, Tree), args.limit))
    refuse_held_out(args.from_trees, trees)
    if args.pair_by == "answer":
        for tree in trees:
            tree.check_outcomes(args.from_trees)
    return trees


def pairs_of(args: StepPairArguments, tree: Tree, states: dict[Steps, list[Continuation]]) -> dict:
    """The row of a tree: its pairs, the gaps of their values, and why other states have none."""
    row: dict = {"pairs": [], "gaps": [], "no_pair": Counter()}
    for state, continuations in states.items():
        pairs, why_not = pair_up(continuations, args.min_gap, args.per_state)
        if not pairs:
            row["no_pair"][why_not] += 1
        for chosen, rejected in pairs:
            row["gaps"].append(gap((chosen, rejected)))
            row["pairs"].append(
                vars(
                    ScoredPair(
                        tree.prompt,
                        list(chosen.steps),
                        list(rejected.steps),
                        list(state),
                        list(chosen.scores),
                        list(rejected.scores),
                    )
                )
            )
    return row


def judged(
    args: StepPairArguments, judge: StepJudge, trees: list[Tree]
) -> Iterator[tuple[dict[Steps, list[Continuation]], int]]:
    """For every tree its continuations, and the number of texts that the judge cannot read."""
    wanted = [to_judge(tree, args.kind) for tree in trees]
    solutions = [
        (tree.prompt, list(steps)) for tree, own in zip(trees, wanted, strict=True) for steps in own
    ]
    skips = [skip for own in wanted for skip in own.values()]
    scores = iter(judge.score_steps(solutions, skips))
    for tree, own in zip(trees, wanted, strict=True):
        of_tree = {steps: next(scores) for steps in own}
        unread = sum(found is None for found in of_tree.values())
        yield by_judge(tree, args.kind, of_tree), unread


def pair_trees(
    args: StepPairArguments, trees: list[Tree], judge: StepJudge | None, rows: ResumableRows
) -> None:
    """Append one row for each tree."""
    done = len(rows)
    if done:
        print(f"resuming: {done} of {len(trees)} trees are done")
    with progress_bar(total=len(trees), initial=done, desc="pairing", unit="tree") as bar:
        for start in range(done, len(trees), unit(args)):
            group = trees[start : start + unit(args)]
            if judge is None:
                found = [(by_answer(tree, args.kind, args.min_rollouts), 0) for tree in group]
            else:
                if start == done:
                    texts = [(t.prompt, list(s)) for t in group for s in to_judge(t, args.kind)]
                    warn_of_foreign_text(judge, texts)
                found = list(judged(args, judge, group))
            rows.append(
                *(
                    pairs_of(args, tree, states) | {"unread": unread}
                    for tree, (states, unread) in zip(group, found, strict=True)
                )
            )
            bar.update(len(group))


def unit(args: StepPairArguments) -> int:
    # these judges score solutions one by one, so a kill need not lose any
    return 1 if args.pair_by == "judge" and args.judge in ("gguf", "llamacpp") else UNIT


def print_table(args: StepPairArguments, rows: list[dict], pairs: list[dict], unread: str) -> None:
    no_pair = Counter[str]()
    for row in rows:
        no_pair.update(row["no_pair"])
    gaps = [gap for row in rows for gap in row["gaps"]]
    states = len({(pair["prompt"], *pair["prefix"]) for pair in pairs})
    lines = [("trees", len(rows)), ("states", states + no_pair.total())]
    lines += [("  with pairs", states)]
    lines += [(f"  {why}", count) for why, count in no_pair.most_common()]
    lines += [("pairs", len(pairs))]
    if pairs:
        lines += [("pairs a state", f"{len(pairs) / states:.2f}")]
        lines += [("mean gap", f"{sum(gaps) / len(gaps):.3f}")]
    if count := sum(row["unread"] for row in rows):
        lines += [(f"texts left out, {unread}", count)]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:{width}}  {value}")


def main() -> None:
    (args,) = parse_args(StepPairArguments, description=__doc__.split("\n\n")[0])
    by_a_judge = args.pair_by == "judge"
    if by_a_judge:
        check_judge(args)
    if args.searches:
        to_search = select_problems(
            args.input, args.limit, PROBLEMS, args, with_answers=not by_a_judge
        )
        check_policy(args)
        search_job = tree_job(args, to_search)
        source = search_job
    else:
        check_input(args.from_trees, MAKES_TREES)
        source = {"trees": content_hash(args.from_trees), "limit": args.limit}
    job = {name: getattr(args, name) for name in PAIRING} | {"source": source}
    if by_a_judge:
        job |= judge_identity(args)
    read = [args.input, args.model_name_or_path, *(judge_files(args) if by_a_judge else [])]
    if args.searches:
        check_different([args.trees, args.output], read)
        trees_job = Job(args, search_job, to_search, 1, args.trees)
        check_outputs(trees_job.outputs, read, trees_job.may_replace())
    else:
        read.append(args.from_trees)
    may_replace = ResumableRows.may_replace(args.output, job, args.overwrite)
    check_output(args.output, may_replace, read)

    if args.searches:
        tree_rows = trees_job.open()
        trees = search_problems(args, trees_job, tree_rows, None if by_a_judge else is_correct)
        print_summary(trees)
    else:
        trees = read_trees(args)
    with open_judge(args) if by_a_judge else nullcontext() as judge:
        rows = ResumableRows(args.output, job, unit(args), args.overwrite)
        pair_trees(args, trees, judge, rows)

    # a state that is in two trees has its pairs in one place
    by_state: dict[tuple, list[dict]] = {}
    for row in rows.rows:
        for pair in row["pairs"]:
            own = by_state.setdefault((pair["prompt"], *pair["prefix"]), [])
            own += [] if pair in own else [pair]
    pairs = list(itertools.chain.from_iterable(by_state.values()))
    print_table(args, rows.rows, pairs, judge.unscored_reason if judge else "")
    rows_left = tree_rows.path if args.searches else None
    if not pairs:
        rows.finish()
        hint = f"; {rows_left} keeps the trees for other arguments" if rows_left else ""
        raise UserError(f"no pairs (see above), nothing was written to {args.output}{hint}")
    with together():
        if args.searches:
            write_records(args.trees, (tree.to_row() for tree in trees))
        write_records(args.output, pairs)
    rows.finish()
    if args.searches:
        tree_rows.finish()
        print(f"wrote {len(trees)} trees to {args.trees}")
    print(f"wrote {len(pairs)} pairs to {args.output}")
    trained = unused(at_root(f"saved_model/{file_stem(args.output)}"))
    flags = ("--dataset_name", args.output, "--pack", "siblings", "--output_dir", trained)
    print(f"next: {here('python train.py dpo', *flags)}")


if __name__ == "__main__":
    run(main)
