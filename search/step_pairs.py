"""Preference pairs of siblings: two continuations of the same state of a search tree.

A continuation is the next step (kind `step`) or the rest of a solution (kind `rest`). The steps of
the state are the pair's `prefix`. Siblings differ in their first step; equal texts are one child.

By answer, the value of a continuation is that of its first step, as in `Tree.counts`: the share
that ends right of all rollouts that start after this step or pass through it. The chosen side of
kind `rest` is a rollout that ends right, the rejected side one that ends wrong. By judge, the value
is the mean of the judge's scores of the continuation, and no outcome is looked at.

The score of a step is its own value, the label `mc` of utils/build_mcts_dataset.py, or the judge's
score. Every step of a rollout has a value, because the rollout passes through it; where no other
rollout does, the value is the outcome of this one.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from reasoning.steps import ends_solution
from reward_model.protocols import aggregate
from search.tree_search import Steps, Tree

KINDS = ("step", "rest")


@dataclass(frozen=True)
class Continuation:
    """One side of a pair. scores: of its steps. rollouts: those through its first step.

    is_known: whether these are enough for its value. is_right: whether it ends right; None if that
    does not matter."""

    steps: Steps
    scores: tuple[float, ...]
    value: float
    rollouts: int
    is_known: bool = True
    is_right: bool | None = None


def siblings(tree: Tree) -> dict[Steps, list[Steps]]:
    """State -> the states that are one step longer, in the order in which they were sampled."""
    found: dict[Steps, list[Steps]] = {}
    for steps in tree.counts():
        if steps:
            found.setdefault(steps[:-1], []).append(steps)
    return found


def solutions(tree: Tree) -> dict[Steps, dict[Steps, str]]:
    """State -> the solutions from it or through it, in the order of sampling, with outcomes.

    Only those that state an answer: the others get no EOS in training (lm/text_encoding.py), so
    they would not be what the policy sampled."""
    found: dict[Steps, dict[Steps, str]] = {}
    for node in tree.nodes.values():
        for rollout in node.rollouts:
            whole = (*node.steps, *rollout.steps)
            if rollout.outcome != "cut" and ends_solution(whole):
                for k in range(len(node.steps), len(whole) + 1):
                    found.setdefault(whole[:k], {})[whole] = rollout.outcome
    return found


def by_answer(tree: Tree, kind: str, min_rollouts: int) -> dict[Steps, list[Continuation]]:
    """State -> its continuations, with values from outcomes.

    A value is known if it comes from `min_rollouts` rollouts or more, or if the step states the
    answer: then one rollout says all. Raises RecordError as `Tree.check_outcomes` does."""
    tree.check_outcomes()
    counts, through = tree.counts(), solutions(tree)

    def value(steps: Steps) -> float:
        right, total = counts[steps]
        return right / total

    def continuations(child: Steps) -> Iterator[Continuation]:
        before, rollouts, ends = len(child) - 1, counts[child][1], through.get(child, {})
        more = (value(child), rollouts, child in ends or rollouts >= min_rollouts)
        if kind == "step":
            yield Continuation(child[before:], (value(child),), *more)
            return
        for outcome in ("right", "wrong"):
            whole = next((steps for steps in ends if ends[steps] == outcome), None)
            if whole is not None:
                scores = tuple(value(whole[:k]) for k in range(len(child), len(whole) + 1))
                yield Continuation(whole[before:], scores, *more, outcome == "right")

    return {
        state: [side for child in children for side in continuations(child)]
        for state, children in siblings(tree).items()
    }


def to_judge(tree: Tree, kind: str) -> dict[Steps, int]:
    """The texts that `by_judge` needs scores of -> how many of their first steps need none."""
    through, found = solutions(tree), dict[Steps, int]()
    for state, children in siblings(tree).items():
        if len(children) > 1:
            for steps in _texts(children, kind, through):
                found[steps] = min(len(state), found.get(steps, len(state)))
    return found


def by_judge(
    tree: Tree, kind: str, scores: Mapping[Steps, list[float] | None]
) -> dict[Steps, list[Continuation]]:
    """State -> its continuations, with the scores of a judge.

    scores: for each text of `to_judge` the scores of its last steps; None if the judge cannot read
    it, which leaves it out."""
    counts, through = tree.counts(), solutions(tree)
    found: dict[Steps, list[Continuation]] = {}
    for state, children in siblings(tree).items():
        found[state], before = [], len(state)
        for steps in _texts(children, kind, through):
            if last := scores.get(steps):
                own = tuple(last[before - len(steps) :])
                rollouts = counts[steps[: before + 1]][1]
                found[state].append(Continuation(steps[before:], own, aggregate(own), rollouts))
    return found


def _texts(
    children: list[Steps], kind: str, through: dict[Steps, dict[Steps, str]]
) -> Iterable[Steps]:
    """What continues a state: its children, or the solutions through them."""
    if kind == "step":
        return children
    return dict.fromkeys(whole for child in children for whole in through.get(child, ()))


def pair_up(
    continuations: list[Continuation], min_gap: float, per_state: int | None = None
) -> tuple[list[tuple[Continuation, Continuation]], str]:
    """(pairs (chosen, rejected) of one state, why there is none).

    min_gap: the least difference of the two values. per_state: the most pairs; taken are those with
    the widest gap, among equal ones those with more rollouts behind the weaker side, and each
    rejected first step once before any of them twice."""
    if len({side.steps[0] for side in continuations}) < 2:
        return [], "one next step only"
    pairs = [
        (chosen, rejected)
        for chosen in continuations
        for rejected in continuations
        if chosen.is_right is not False
        and rejected.is_right is not True
        and chosen.steps[0] != rejected.steps[0]
        and chosen.value > rejected.value
    ]
    if not pairs:
        return [], "no worse sibling"
    known = [pair for pair in pairs if all(side.is_known for side in pair)]
    if not known:
        return [], "too few rollouts"
    wide = [pair for pair in known if gap(pair) >= min_gap]
    if not wide:
        return [], "gap too small"
    wide.sort(key=lambda pair: (-gap(pair), -min(side.rollouts for side in pair)))
    used: Counter[str] = Counter()
    turns = []
    for pair in wide:
        turns.append(used[pair[1].steps[0]])
        used[pair[1].steps[0]] += 1
    order = sorted(range(len(wide)), key=turns.__getitem__)
    return [wide[k] for k in order][:per_state], ""


def gap(pair: tuple[Continuation, Continuation]) -> float:
    """The difference of the values of chosen and rejected, rounded, so that .7 - .2 is .5."""
    return round(pair[0].value - pair[1].value, 6)
