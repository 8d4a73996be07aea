"""Search many problems with a policy, in a job that resumes: what scripts that make trees share."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.cli import arg, check_least
from common.errors import PromptTooLong, UserError
from common.files import ResumableRows
from common.progress import progress_bar
from lm.registry import PolicyArgs, policy_identity
from reasoning.datasets.files import FieldArgs
from reasoning.records import Problem, Prompt
from search.tree_search import DROPPED, SEARCHES, UNKNOWN, IsRight, Tree, TreeBudget, run_searches

if TYPE_CHECKING:  # torch would slow --help
    from lm.policy import Policy

PROBLEMS = 500  # of the train problems, if neither --input nor --limit is given
# the arguments that determine a tree
SEARCH = ("search", "rollouts_per_state", "budget", "temperature", "max_new_tokens", "seed")


@dataclass
class TreeArgs(PolicyArgs, FieldArgs):
    """The arguments of a search over many problems, mixed into those of a script."""

    input: str | None = arg(
        None,
        "problems in any shape that reasoning/datasets/shapes.py reads; if not given: "
        "the generated train problems",
    )
    limit: int | None = arg(
        None,
        "use the first LIMIT problems; if not given: "
        f"{PROBLEMS} of the train problems, all of --input",
    )
    search: str = arg(
        "omegaprm",
        "omegaprm: first errors of wrong rollouts; per_step: all steps of solutions",
        choices=[*SEARCHES],
    )
    rollouts_per_state: int = arg(8, "rollouts from each state that is evaluated")
    budget: int = arg(64, "most rollouts for a problem, those from its root included")
    in_flight: int = arg(64, "problems that are searched at once; does not change the result")
    temperature: float = arg(1.0, "sampling temperature, above 0")
    max_new_tokens: int = arg(256, "token limit of a rollout; a longer one is cut, and not right")
    seed: int = arg(0, "seed of the rollouts")

    def __post_init__(self) -> None:
        check_least(self, rollouts_per_state=1, budget=1, in_flight=1, limit=1, max_new_tokens=1)
        smallest = 2 * self.rollouts_per_state
        if self.budget < smallest:
            raise UserError(
                f"argument --budget: {self.budget} rollouts are not enough for the root and one "
                f"more state: expected {smallest} or more (twice --rollouts_per_state)"
            )
        if self.temperature <= 0:
            raise UserError(f"argument --temperature: expected above 0, got {self.temperature}")


def tree_job(args: TreeArgs, to_search: Sequence[Problem | Prompt]) -> dict:
    """What determines the trees of these problems, for a run that can resume."""
    job = {name: getattr(args, name) for name in SEARCH} | policy_identity(args)
    content = json.dumps([vars(problem) for problem in to_search])
    return job | {"problems": hashlib.sha256(content.encode()).hexdigest()}


def search_problems(
    args: TreeArgs,
    to_search: Sequence[Problem | Prompt],
    rows: ResumableRows,
    policy: "Policy",
    is_correct: Callable[[list[str], Any], bool] | None,
) -> list[Tree]:
    """The trees in the order of the problems; each is appended to `rows` when it is finished.

    is_correct(steps, problem): whether a solution is right; None if answers are not known."""
    done = {row["problem"] for row in rows.rows}
    if done:
        print(f"resuming: {len(done)} of {len(to_search)} problems are done")
    budget = TreeBudget(args.budget, args.rollouts_per_state)
    started, rollouts = time.monotonic(), 0

    def searches() -> Iterator:
        for number, problem in enumerate(to_search):
            if number in done:
                continue
            try:
                root = policy.start(problem.prompt)
            except PromptTooLong:
                add(number, Tree(problem.prompt, args.search, "prompt too long"))
            else:
                yield number, SEARCHES[args.search](root, _checker(is_correct, problem), budget)

    def add(number: int, tree: Tree) -> None:
        rows.append({"problem": number, "tree": tree.to_row()})
        bar.update()

    def sampled(count: int) -> None:
        nonlocal rollouts
        rollouts += count
        bar.set_postfix(rollouts=rollouts)

    options = {name: getattr(args, name) for name in ("temperature", "max_new_tokens", "seed")}
    with progress_bar(
        total=len(to_search), initial=len(done), desc="searching", unit="problem"
    ) as bar:
        found = run_searches(searches(), policy, args.in_flight, **options, sampled=sampled)
        for number, tree in found:
            add(number, tree)
    seconds = time.monotonic() - started
    print(f"searched for {seconds:.0f} s: {rollouts} rollouts, {rollouts / seconds:.0f} a second")
    in_order = sorted(rows.rows, key=lambda row: row["problem"])
    return [Tree.from_row(row["tree"]) for row in in_order]


def _checker(
    is_correct: Callable[[list[str], Any], bool] | None, problem: Problem | Prompt
) -> IsRight:
    return None if is_correct is None else lambda steps: is_correct(list(steps), problem)


def print_summary(trees: Sequence[Tree]) -> None:
    """Print the numbers of searched and dropped problems, and of rollouts and tokens."""
    ended = Counter(tree.ended for tree in trees)
    searched = len(trees) - sum(ended[reason] for reason in DROPPED)
    dropped = ", ".join(f"{ended[reason]} {reason}" for reason in DROPPED)
    print(
        f"{len(trees)} problems: {searched} searched, {ended['budget']} of them until the budget "
        f"was used; dropped: {dropped}"
    )
    outcomes = Counter(rollout.outcome for tree in trees for rollout in tree.rollouts)
    unknown = f", {outcomes[UNKNOWN]} without an answer to compare" if outcomes[UNKNOWN] else ""
    unused = sum(len(tree.rollouts) for tree in trees if tree.ended in DROPPED)
    print(
        f"{outcomes.total()} rollouts ({unused} on dropped problems): {outcomes['right']} right, "
        f"{outcomes['wrong']} wrong, {outcomes['cut']} cut at the token limit{unknown}; "
        f"{sum(tree.tokens for tree in trees)} tokens"
    )
