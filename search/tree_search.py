"""Tree search for the values of steps: rollouts from beginnings of solutions, and the share of them that ends right.

A search is a generator for one problem: it yields (state, n), is sent n rollouts from there, and returns its Tree. It samples
nothing itself, so `run_searches` keeps many problems in flight and asks the policy for all their rollouts at once. It knows no
answers either: its caller hands in `is_right(steps)`.

Two searches with one signature: `omegaprm` looks for the first errors of wrong rollouts, `per_step` values every step of the first
solutions.

What a tree says of a step's value (`Tree.counts`): of all rollouts that begin after this step or come through it, the share that
ends right. Those that come through cost nothing, and without them a search for first errors would label hardly a right step but
those before an error. A step that closes a solution is 0 or 1. The search comes back to where rollouts went wrong, and not to where
they went right, so a state with few rollouts is one of luck; over many states, each counted as often as it has rollouts, this
cancels exactly (whether to try again is decided before the outcome is known), if no problem is dropped for its outcomes.
"""

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from common.errors import RecordError
from reasoning.records import StepValue

if TYPE_CHECKING:  # nothing here needs torch
    from lm.policy import Policy, State

# Luo et al. 2024, arXiv 2406.06592: what the authors used
ALPHA, BETA, LENGTH, EXPLORATION = 0.5, 0.9, 500, 0.125

# Tree.ended of problems that are not searched, or only at the root
DROPPED = ("always right", "never right", "prompt too long")


@dataclass(frozen=True)
class Rollout:
    """How one rollout went on from its node: the steps it added, whether it ended `right`, `wrong` or was `cut` at a limit of
    tokens, and how many tokens were sampled. `state` is the whole solution, kept while the search runs."""

    steps: tuple[str, ...]
    outcome: str
    tokens: int
    state: Any = field(default=None, repr=False, compare=False)


@dataclass
class TreeNode:
    """An evaluated state. visits: how often the search came by: N(s), the times it was selected (omegaprm), or the solutions that
    go through it (per_step)."""

    steps: tuple[str, ...]
    rollouts: list[Rollout]
    visits: int = 0

    @property
    def value(self) -> float:
        """MC(s), 0..1: the share of its own rollouts that end right (arXiv 2406.06592); one that was cut does not."""
        return sum(rollout.outcome == "right" for rollout in self.rollouts) / len(self.rollouts)


# One row of a file of trees (`utils/build_mcts_dataset.py --trees`), read by `utils/show_tree.py`:
#   {"prompt": "Mia has 12 apples. ...", "search": "omegaprm",
#    "ended": "budget",                         or "nothing left", or why it was not searched: one of DROPPED
#    "nodes": [{"steps": [], "visits": 2,       evaluated states in the order of the search, the first one without a step
#               "rollouts": [{"steps": ["Step 1: 12 + 14 = 26", "Answer: 26"], "outcome": "wrong", "tokens": 31}, ...]}, ...]}
@dataclass
class Tree:
    """What a search found out about one problem. nodes: steps -> TreeNode, in the order of evaluation."""

    prompt: str
    search: str
    ended: str = ""
    nodes: dict[tuple[str, ...], TreeNode] = field(default_factory=dict)

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for node in self.nodes.values() for rollout in node.rollouts]

    @property
    def tokens(self) -> int:
        return sum(rollout.tokens for rollout in self.rollouts)

    def counts(self) -> dict[tuple[str, ...], tuple[int, int]]:
        """Steps -> (rollouts from there or through there that end right, all of them), the root and whole solutions included. The
        last step of a rollout that was cut may be half a step: it is left out."""
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
        """(one row for every state with a step, how many were left out).

        labels `mc`: MC(s, a), the value of the state that the step leads to. `relative`: min(1, MC(s, a) / MC(s)), how much of the
        value of the state before it a step keeps; where that is 0 there is nothing to keep, and the step is left out."""
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
        nodes = [
            {
                "steps": node.steps,
                "visits": node.visits,
                "rollouts": [
                    {"steps": r.steps, "outcome": r.outcome, "tokens": r.tokens}
                    for r in node.rollouts
                ],
            }
            for node in self.nodes.values()
        ]
        return {"prompt": self.prompt, "search": self.search, "ended": self.ended, "nodes": nodes}

    @classmethod
    def from_row(cls, row: Any) -> "Tree":
        """Raises RecordError if the row is no tree."""
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
            raise RecordError(
                "no search tree; expected a row that utils/build_mcts_dataset.py --trees wrote"
            ) from None
        counts = tree.counts()
        if not all(steps in counts and steps[:-1] in counts for steps in tree.nodes):
            raise RecordError(
                "a search tree in which a state hangs in the air: a part of it is missing"
            )
        return tree


@dataclass(frozen=True)
class TreeBudget:
    """What the search of one problem may cost: `rollouts` in all, those of the root included."""

    rollouts: int = 64
    rollouts_per_state: int = 8

    def allows_more(self, tree: Tree) -> bool:
        return len(tree.rollouts) + self.rollouts_per_state <= self.rollouts


Steps = tuple[str, ...]
# yields (state, n), is sent n rollouts, returns the tree
TreeSearch = Generator[tuple["State", int], list["State"], Tree]


def _evaluate(
    tree: Tree, state: "State", is_right: Callable[[Steps], bool], budget: TreeBudget
) -> Generator[Any, Any, TreeNode]:
    """Ask for rollouts from a state and put it into the tree."""
    rollouts = []
    for whole in (yield state, budget.rollouts_per_state):
        finished = "right" if whole.status == "finished" and is_right(whole.steps) else "wrong"
        outcome = "cut" if whole.status == "cut" else finished
        rollouts.append(Rollout(whole.steps[len(state.steps) :], outcome, whole.sampled, whole))
    node = tree.nodes[state.steps] = TreeNode(state.steps, rollouts)
    return node


def _begin(
    tree: Tree, root: "State", is_right: Callable[[Steps], bool], budget: TreeBudget
) -> Generator[Any, Any, TreeNode]:
    """Evaluate the root. A problem that is always or never right has nothing to search: `tree.ended` says so."""
    node = yield from _evaluate(tree, root, is_right, budget)
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
    """Q(s, r) + U(s) of arXiv 2406.06592 (select phase): Q = alpha^(1 - MC(s)) * beta^(len(r) / L) prefers wrong rollouts
    from states that mostly end right, and short ones; U = c * sqrt(sum of all N) / (1 + N(s)) states seldom visited.
    len(r) and L in tokens."""
    quality = alpha ** (1 - node.value) * beta ** (rollout.tokens / length)
    return quality + exploration * math.sqrt(all_visits) / (1 + node.visits)


def omegaprm(root: "State", is_right: Callable[[Steps], bool], budget: TreeBudget) -> TreeSearch:
    """OmegaPRM (Luo et al. 2024, arXiv 2406.06592): take the wrong rollout with the best `selection_score` out of a
    pool of the whole tree, find its first error by binary search, put the wrong rollouts of every state that was evaluated on the
    way into the pool, and go on.

    A beginning is taken to have an error when none of its rollouts ends right. States of value 0 give no rollouts to the pool (all
    that follows is wrong), and neither do rollouts that were cut: there may be no error in them."""
    tree = Tree(root.prompt, "omegaprm")
    pool: list[tuple[TreeNode, Rollout]] = []

    def pool_up(node: TreeNode) -> None:
        if node.value > 0:
            pool.extend((node, rollout) for rollout in node.rollouts if rollout.outcome == "wrong")

    pool_up((yield from _begin(tree, root, is_right, budget)))
    while pool and not tree.ended:
        all_visits = sum(node.visits for node in tree.nodes.values())
        best = max(range(len(pool)), key=lambda i: selection_score(*pool[i], all_visits))
        node, rollout = pool.pop(best)
        node.visits += 1
        whole = rollout.state
        # the first error is in steps right + 1 .. wrong
        right, wrong = (len(node.steps), len(whole.steps))
        for k in range(right + 1, wrong):  # what is known already of the beginnings of this rollout
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
            pool_up(node)
            right, wrong = (middle, wrong) if node.value > 0 else (right, middle)
    tree.ended = tree.ended or "nothing left"
    return tree


def per_step(root: "State", is_right: Callable[[Steps], bool], budget: TreeBudget) -> TreeSearch:
    """Math-Shepherd (Wang et al. 2024, arXiv 2312.08935, soft estimation): rollouts after every step of solutions that were sampled
    from the root, right or wrong, one solution after the other; a beginning that several share is evaluated once. Which solutions
    come first does not depend on how they end. Those that were cut are left out, as in `omegaprm`."""
    tree = Tree(root.prompt, "per_step")
    start = yield from _begin(tree, root, is_right, budget)
    if tree.ended:
        return tree
    for whole in [rollout.state for rollout in start.rollouts if rollout.outcome != "cut"]:
        start.visits += 1
        for k in range(1, len(whole.steps)):  # all but the last, which closes the solution
            if whole.steps[:k] not in tree.nodes:
                if not budget.allows_more(tree):
                    tree.ended = "budget"
                    return tree
                yield from _evaluate(tree, whole.first(k), is_right, budget)
            tree.nodes[whole.steps[:k]].visits += 1
    tree.ended = "nothing left"
    return tree


SEARCHES: dict[str, Callable[["State", Callable[[Steps], bool], TreeBudget], TreeSearch]] = {
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
    """(key, tree) of every (key, search), as they end. What `in_flight` searches ask for is sampled together; the policy seeds its
    samples by state, so a tree does not depend on what else is in flight. `sampled` is told how many rollouts there were."""
    waiting = iter(searches)
    running: list[tuple[Key, TreeSearch, tuple[State, int]]] = []
    while True:
        while len(running) < in_flight and (new := next(waiting, None)) is not None:
            running.append((*new, next(new[1])))  # every search evaluates its root first
        if not running:
            return
        rollouts: list[list[State]] = [[]] * len(running)
        for n in sorted({n for _, _, (_, n) in running}):
            asked = [i for i, (_, _, request) in enumerate(running) if request[1] == n]
            states = [running[i][2][0] for i in asked]
            for i, of_state in zip(
                asked, policy.rollouts(states, n, temperature, max_new_tokens, seed), strict=True
            ):
                rollouts[i] = of_state
        sampled(sum(map(len, rollouts)))
        still = []
        for (key, search, _), of_state in zip(running, rollouts, strict=True):
            try:
                still.append((key, search, search.send(of_state)))
            except StopIteration as end:
                yield key, end.value
        running = still
