"""Search many problems with a policy, in a job that resumes: what scripts that make trees share."""

import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from common.cli import arg, check_least
from common.engine import FATAL, EngineArgs, Job
from common.errors import PromptTooLong, UserError
from common.resumable import ResumableRows
from lm.known_words import MOST_TEXTS
from lm.registry import PolicyArgs, open_policy, policy_identity
from reasoning.datasets.files import FieldArgs
from reasoning.records import Problem, Prompt
from search.tree_search import DROPPED, SEARCHES, UNKNOWN, IsRight, Tree, TreeBudget, run_searches

PROBLEMS = 500  # of the train problems, if neither --input nor --limit is given
# the arguments that determine a tree
SEARCH = ("search", "rollouts_per_state", "budget", "temperature", "max_new_tokens", "seed")


@dataclass
class TreeArgs(PolicyArgs, FieldArgs, EngineArgs):
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
    in_flight: int = arg(64, "problems that a worker searches at once; does not change the result")
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
    job: Job,
    rows: ResumableRows,
    is_correct: Callable[[list[str], Any], bool] | None,
) -> list[Tree]:
    """The trees in the order of the problems; each is appended to `rows` when it is finished.

    Problems that were fatal to workers are written to the job's file of what is left out. job: its
    items are the problems; of a part (--shard) no tree is returned. is_correct(steps,
    problem): whether a solution is right; None if answers are not known."""
    if len(rows):
        print(f"resuming: {len(rows)} of {len(job.items)} problems are done")
    prompts = [problem.prompt for problem in job.some(MOST_TEXTS)]
    make_worker = partial(Searching, args, prompts, is_correct)
    missing = [(number, job.items[number]) for number in job.missing(rows)]
    started, rollouts = time.monotonic(), 0

    def add(number: int, tree: dict) -> None:
        rows.append(tree, at=number)
        bar.update()

    def sampled(count: int) -> None:
        nonlocal rollouts
        rollouts += count
        bar.set_postfix(rollouts=rollouts)

    groups = [missing[n : n + args.in_flight] for n in range(0, len(missing), args.in_flight)]
    with (
        job.working(rows, make_worker, len(groups)) as engine,
        job.bar(rows, "searching", "problem") as bar,
    ):
        if engine.worker is not None:  # in this process: a new search begins when one has ended
            for number, tree in engine.worker.search(missing, sampled):
                add(number, tree)
        else:
            for _, group, trees in engine.map(enumerate(groups), left_out(args)):
                for (number, _), tree in zip(group, trees, strict=True):
                    sampled(sum(len(node["rollouts"]) for node in tree["nodes"]))
                    add(number, tree)
    seconds = time.monotonic() - started
    print(f"searched for {seconds:.0f} s: {rollouts} rollouts, {rollouts / seconds:.0f} a second")
    if job.is_part:
        return []
    trees = [Tree.from_row(row) for row in rows]
    lost = [tree.ended == FATAL for tree in trees]
    job.write_left_out(list(itertools.compress(job.items, lost)))
    return trees


class Searching:
    """Searches problems with the policy that it holds.

    prompts: some of those that it will search, to see whether the policy knows their words."""

    def __init__(self, args: TreeArgs, prompts: list[str], is_correct: Callable | None):
        self.args, self.is_correct = args, is_correct
        self.policy = open_policy(args, prompts)

    def __call__(self, key: int, problems: list[tuple[int, Problem | Prompt]]) -> list[dict]:
        """The tree of each (number, problem), as a row."""
        found = dict(self.search(problems))
        return [found[number] for number, _ in problems]

    def search(
        self,
        problems: Iterable[tuple[int, Problem | Prompt]],
        sampled: Callable[[int], None] = lambda count: None,
    ) -> Iterator[tuple[int, dict]]:
        """(number, tree as a row) of every problem when it is finished, --in_flight at once.

        `sampled` is called with the number of rollouts after each round."""
        args, too_long = self.args, []
        budget = TreeBudget(args.budget, args.rollouts_per_state)

        def searches() -> Iterator:
            for number, problem in problems:
                try:
                    root = self.policy.start(problem.prompt)
                except PromptTooLong:
                    too_long.append((number, Tree(problem.prompt, args.search, "prompt too long")))
                else:
                    is_right = _checker(self.is_correct, problem)
                    yield number, SEARCHES[args.search](root, is_right, budget)

        options = {name: getattr(args, name) for name in ("temperature", "max_new_tokens", "seed")}
        found = run_searches(searches(), self.policy, args.in_flight, **options, sampled=sampled)
        for number, tree in itertools.chain(found, too_long):
            yield number, tree.to_row()

    def close(self) -> None:
        """Nothing is open."""


def left_out(args: TreeArgs) -> Callable[[Any, str], dict]:
    """Makes the row of a problem that is left out."""
    return lambda item, reason: Tree(item[1].prompt, args.search, reason).to_row()


def _checker(
    is_correct: Callable[[list[str], Any], bool] | None, problem: Problem | Prompt
) -> IsRight:
    return None if is_correct is None else lambda steps: is_correct(list(steps), problem)


def print_summary(trees: Sequence[Tree]) -> None:
    """Print the numbers of searched and dropped problems, and of rollouts and tokens."""
    ended = Counter(tree.ended for tree in trees)
    searched = len(trees) - sum(ended[reason] for reason in DROPPED)
    reasons = [reason for reason in DROPPED if reason != FATAL or ended[reason]]
    dropped = ", ".join(f"{ended[reason]} {reason}" for reason in reasons)
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
