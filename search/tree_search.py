"""Tree search that estimates the values of steps by rollouts from prefixes of solutions.

A search is a generator for one problem: it yields (state, n), receives n rollouts from that state,
and returns its Tree. It samples nothing itself, so `run_searches` can run many searches at once and
request all their rollouts together. It knows no answers: the caller passes `is_right(steps)`, or
None where no answer is known: `per_step` then samples the same tree without outcomes.

There are two searches with the same signature: `omegaprm` finds the first errors of wrong rollouts,
`per_step` evaluates every step of the first solutions.

The value of a step (`Tree.counts`) is the share that ends right of all rollouts that start after
the step or pass through it. The rollouts that pass through cost nothing, and without them
`omegaprm` would label few right steps except those before an error. A step that states the answer
has value 0 or 1. The search returns to states with wrong rollouts, not to states with right ones,
so the value of a state with few rollouts is biased. Over many states, weighted by their rollouts,
this bias is exactly zero, because each decision to sample again is made before the outcome is
known. This holds only if no problem is dropped because of its outcomes.
"""

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from common.engine import FATAL
from common.errors import RecordError, short
from reasoning.records import StepValue

if TYPE_CHECKING:  # nothing here needs torch
    from lm.policy import Policy, State

# the values of the authors (Luo et al. 2024, arXiv 2406.06592)
ALPHA, BETA, LENGTH, EXPLORATION = 0.5, 0.9, 500, 0.125

# values of Tree.ended for problems that were not searched beyond the root
DROPPED = ("always right", "never right", "prompt too long", FATAL)
UNKNOWN = "unknown"  # the outcome of a rollout that ended, where no answer is known


@dataclass(frozen=True)
class Rollout:
    """A rollout from a node.

    steps: those it added. outcome: `right`, `wrong`, `cut` at the token limit, or UNKNOWN without
    an answer. tokens: sampled. state: the whole solution, only kept while the search runs."""

    steps: tuple[str, ...]
    outcome: str
    tokens: int
    state: Any = field(default=None, repr=False, compare=False)


@dataclass
class TreeNode:
    """An evaluated state.

    visits: how often a rollout from it was selected, N(s) (omegaprm), or the number of solutions
    that pass through it (per_step)."""

    steps: tuple[str, ...]
    rollouts: list[Rollout]
    visits: int = 0

    @property
    def value(self) -> float:
        """MC(s), 0..1: the share of its own rollouts that end right; a cut one does not."""
        return sum(rollout.outcome == "right" for rollout in self.rollouts) / len(self.rollouts)


# One row of a file of trees (`utils/build_mcts_dataset.py --trees`), read by `utils/show_tree.py`:
#   {"prompt": "Mia has 12 apples. ...", "search": "omegaprm",
#    "ended": "budget",                    or "nothing left", or one of DROPPED
#    "nodes": [{"steps": [], "visits": 2,  evaluated states in the order of the search, root first
#               "rollouts": [{"steps": ["Step 1: 12 + 14 = 26", "Answer: 26"],
#                             "outcome": "wrong", "tokens": 31}, ...]}, ...]}
@dataclass
class Tree:
    """The result of the search of a problem. nodes: steps -> TreeNode, in order of evaluation."""

    prompt: str
    search: str
    ended: str = ""
    nodes: dict[tuple[str, ...], TreeNode] = field(default_factory=dict)

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for node in self.nodes.values() for rollout in node.rollouts]

    def check_outcomes(self, file: str = "this tree") -> None:
        """Raises RecordError if the tree was searched without answers: then it has no values.

        file: that has it, for the message."""
        if any(rollout.outcome == UNKNOWN for rollout in self.rollouts):
            raise RecordError(
                f"{file}: searched without answers, so its steps have no values (only "
                f"utils/build_step_pairs.py --pair_by judge reads it): {short(self.prompt)}"
            )

    @property
    def tokens(self) -> int:
        return sum(rollout.tokens for rollout in self.rollouts)

    def counts(self) -> dict[tuple[str, ...], tuple[int, int]]:
        """Steps -> (number of rollouts from or through this state that end right, number of all).

        The root and whole solutions are included. The last step of a rollout that was cut may be
        incomplete, so it is left out."""
        found: dict[tuple[str, ...], tuple[int, int]] = {}
        for node in self.nodes.values():
            for rollout in node.rollouts:
                added = rollout.steps[:-1] if rollout.outcome == "cut" else rollout.steps
                for k in range(len(added) + 1):
                    steps = (*node.steps, *added[:k])
                    right, total = found.get(steps, (0, 0))
                    found[steps] = (right + (rollout.outcome == "right"), total + 1)
        return found

    def values(self, labels: str = "mc") -> tuple[list[StepValue], int]:
        """(one StepValue for each state except the root, number of states that are left out).

        labels: `mc` is MC(s, a), the value of the state after the step. `relative` is
        min(1, MC(s, a) / MC(s)), relative to the state before the step; steps after a state of
        value 0 are left out. Raises RecordError as `check_outcomes` does."""
        self.check_outcomes()
        rows, left_out, counts = [], 0, self.counts()
        for steps, (right, total) in counts.items():
            if not steps:
                continue
            value = right / total
            if labels == "relative":
                right_before, total_before = counts[steps[:-1]]
                if right_before == 0:
                    left_out += 1
                    continue
                value = min(1.0, value / (right_before / total_before))
            visits = self.nodes[steps].visits if steps in self.nodes else 0
            rows.append(StepValue(self.prompt, steps[-1], value, list(steps[:-1]), total, visits))
        return rows, left_out

    def to_row(self) -> dict:
        nodes: list[dict] = []
        for node in self.nodes.values():
            rollouts = [
                {"steps": rollout.steps, "outcome": rollout.outcome, "tokens": rollout.tokens}
                for rollout in node.rollouts
            ]
            nodes.append({"steps": node.steps, "visits": node.visits, "rollouts": rollouts})
        return {"prompt": self.prompt, "search": self.search, "ended": self.ended, "nodes": nodes}

    @classmethod
    def from_row(cls, row: Any) -> "Tree":
        """Raises RecordError if the row is not a tree."""
        try:
            tree = cls(row["prompt"], row["search"], row["ended"])
            for node in row["nodes"]:
                rollouts = [
                    Rollout(tuple(r["steps"]), r["outcome"], int(r["tokens"]))
                    for r in node["rollouts"]
                ]
                steps = tuple(node["steps"])
                tree.nodes[steps] = TreeNode(steps, rollouts, int(node["visits"]))
        except (KeyError, TypeError, ValueError):
            expected = "a row that utils/build_mcts_dataset.py --trees wrote"
            raise RecordError(f"no search tree; expected {expected}") from None
        counts = tree.counts()
        if not all(steps in counts and steps[:-1] in counts for steps in tree.nodes):
            raise RecordError("the search tree is not complete: a state has no rollout to it")
        return tree


@dataclass(frozen=True)
class TreeBudget:
    """The budget for one problem: at most `rollouts` in all, those from the root included."""

    rollouts: int = 64
    rollouts_per_state: int = 8

    def allows_more(self, tree: Tree) -> bool:
        return len(tree.rollouts) + self.rollouts_per_state <= self.rollouts


Steps = tuple[str, ...]
# whether a solution is right; None where no answer is known
IsRight = Callable[[Steps], bool] | None
# yields (state, n), receives n rollouts, returns the tree
TreeSearch = Generator[tuple["State", int], list["State"], Tree]


def _evaluate(
    tree: Tree, state: "State", is_right: IsRight, budget: TreeBudget
) -> Generator[Any, Any, TreeNode]:
    """Request rollouts from a state, and add it to the tree."""
    rollouts = []
    for whole in (yield state, budget.rollouts_per_state):
        if whole.status == "cut":
            outcome = "cut"
        elif is_right is None:
            outcome = UNKNOWN
        else:
            right = whole.status == "finished" and is_right(whole.steps)
            outcome = "right" if right else "wrong"
        rollouts.append(Rollout(whole.steps[len(state.steps) :], outcome, whole.sampled, whole))
    node = tree.nodes[state.steps] = TreeNode(state.steps, rollouts)
    return node


def _begin(
    tree: Tree, root: "State", is_right: IsRight, budget: TreeBudget
) -> Generator[Any, Any, TreeNode]:
    """Evaluate the root. `tree.ended` is set if the problem is always or never right."""
    node = yield from _evaluate(tree, root, is_right, budget)
    if is_right is not None:
        tree.ended = {0.0: "never right", 1.0: "always right"}.get(node.value, "")
    return node


def selection_score(
    node: TreeNode,
    rollout: Rollout,
    all_visits: int,
    alpha: float = ALPHA,
    beta: float = BETA,
    length: float = LENGTH,
    exploration: float = EXPLORATION,
) -> float:
    """Q(s, r) + U(s), the selection score of arXiv 2406.06592; the best rollout has the highest.

    Q = alpha^(1 - MC(s)) * beta^(len(r) / L) prefers short wrong rollouts from states that mostly
    end right. U = c * sqrt(sum of all N) / (1 + N(s)) prefers states with few visits. len(r) and L
    are in tokens."""
    quality = alpha ** (1 - node.value) * beta ** (rollout.tokens / length)
    return quality + exploration * math.sqrt(all_visits) / (1 + node.visits)


def omegaprm(root: "State", is_right: IsRight, budget: TreeBudget) -> TreeSearch:
    """OmegaPRM (Luo et al. 2024, arXiv 2406.06592).

    Repeat: take the wrong rollout with the best `selection_score` from the pool of the whole tree,
    find its first error by binary search, and add the wrong rollouts of every state that the binary
    search evaluates to the pool.

    A prefix counts as wrong if none of its rollouts ends right. Rollouts from states of value 0 do
    not enter the pool, because everything after such a state counts as wrong. Rollouts that were
    cut do not either, because they may have no error. Raises ValueError without
    `is_right`."""
    if is_right is None:
        raise ValueError("omegaprm searches for errors, for which it needs the answers")
    tree = Tree(root.prompt, "omegaprm")
    pool: list[tuple[TreeNode, Rollout]] = []

    def add_to_pool(node: TreeNode) -> None:
        if node.value > 0:
            pool.extend((node, rollout) for rollout in node.rollouts if rollout.outcome == "wrong")

    add_to_pool((yield from _begin(tree, root, is_right, budget)))
    while pool and not tree.ended:
        all_visits = sum(node.visits for node in tree.nodes.values())
        best = max(range(len(pool)), key=lambda i: selection_score(*pool[i], all_visits))
        node, rollout = pool.pop(best)
        node.visits += 1
        whole = rollout.state
        # the first error is in steps right + 1 .. wrong
        right, wrong = len(node.steps), len(whole.steps)
        for k in range(right + 1, wrong):  # prefixes of this rollout that are evaluated already
            if whole.steps[:k] in tree.nodes:
                if tree.nodes[whole.steps[:k]].value == 0:
                    wrong = k
                    break
                right = k
        while wrong - right > 1:
            if not budget.allows_more(tree):
                tree.ended = "budget"
                break
            middle = (right + wrong) // 2
            node = yield from _evaluate(tree, whole.first(middle), is_right, budget)
            add_to_pool(node)
            right, wrong = (middle, wrong) if node.value > 0 else (right, middle)
    tree.ended = tree.ended or "nothing left"
    return tree


def per_step(root: "State", is_right: IsRight, budget: TreeBudget) -> TreeSearch:
    """Math-Shepherd with soft estimation (Wang et al. 2024, arXiv 2312.08935).

    Rollouts after every step of solutions. The solutions are the rollouts from the root, right or
    wrong, in the order of sampling, which does not depend on their outcomes. A prefix that several
    solutions share is evaluated once. Rollouts that were cut are left out, as in `omegaprm`."""
    tree = Tree(root.prompt, "per_step")
    start = yield from _begin(tree, root, is_right, budget)
    if tree.ended:
        return tree
    for whole in [rollout.state for rollout in start.rollouts if rollout.outcome != "cut"]:
        start.visits += 1
        for k in range(1, len(whole.steps)):  # all but the last step, which states the answer
            if whole.steps[:k] not in tree.nodes:
                if not budget.allows_more(tree):
                    tree.ended = "budget"
                    return tree
                yield from _evaluate(tree, whole.first(k), is_right, budget)
            tree.nodes[whole.steps[:k]].visits += 1
    tree.ended = "nothing left"
    return tree


SEARCHES: dict[str, Callable[["State", IsRight, TreeBudget], TreeSearch]] = {
    "omegaprm": omegaprm,
    "per_step": per_step,
}

Key = TypeVar("Key")


def run_searches(
    searches: Iterable[tuple[Key, TreeSearch]],
    policy: "Policy",
    in_flight: int = 64,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    sampled: Callable[[int], None] = lambda count: None,
) -> Iterator[tuple[Key, Tree]]:
    """Run searches, `in_flight` at once: yields (key, tree) for each (key, search) when it ends.

    The requests of all running searches are sampled together. The policy seeds its samples by
    state, so a tree does not depend on the other searches. `sampled` is called with the number of
    rollouts after each round."""
    waiting = iter(searches)
    running: list[tuple[Key, TreeSearch, tuple[State, int]]] = []
    while True:
        while len(running) < in_flight and (new := next(waiting, None)) is not None:
            running.append((*new, next(new[1])))  # every search requests rollouts of its root
        if not running:
            return
        rollouts: list[list[State]] = [[]] * len(running)
        for n in sorted({n for _, _, (_, n) in running}):
            places = [i for i, (_, _, request) in enumerate(running) if request[1] == n]
            states = [running[i][2][0] for i in places]
            answers = policy.rollouts(states, n, temperature, max_new_tokens, seed)
            for i, answer in zip(places, answers, strict=True):
                rollouts[i] = answer
        sampled(sum(map(len, rollouts)))
        unfinished = []
        for (key, search, _), answer in zip(running, rollouts, strict=True):
            try:
                unfinished.append((key, search, search.send(answer)))
            except StopIteration as end:
                yield key, end.value
        running = unfinished
